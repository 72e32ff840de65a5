"""Who may ask, how much and how often; and what is counted."""

import dataclasses

import pytest

from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.limits import (
    Gate,
    Limits,
    Rate,
    check_exposure,
    check_token,
)
from mgrpo_jax.serving.metrics import Metrics

LIMITS = Limits(
    max_body_bytes=1000,
    max_concurrent=4,
    max_choices=2,
    requests_per_minute=60,
    deadline=1.0,
    read_deadline=1.0,
    write_deadline=1.0,
)
TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Limits)])
def test_limits_are_positive(field):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(LIMITS, **{field: 0})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nothing_waits_for_ever(value):
  with pytest.raises(ValueError, match="deadline"):
    dataclasses.replace(LIMITS, deadline=value)


def test_more_choices_than_fit_are_no_limit():
  with pytest.raises(ValueError, match="max_choices"):
    dataclasses.replace(LIMITS, max_choices=5)


def test_the_gate_counts_choices():
  gate = Gate(3)
  with gate.enter(2):
    with pytest.raises(RequestError) as caught, gate.enter(2):
      pass
    assert (caught.value.status, gate.inside) == (429, 2)
    assert caught.value.headers == {"Retry-After": "1"}
    with gate.enter(1):
      assert gate.inside == 3
  with pytest.raises(KeyError), gate.enter(3):
    raise KeyError
  assert gate.inside == 0
  gate.close()
  with pytest.raises(RequestError) as caught, gate.enter(1):
    pass
  assert caught.value.status == 503


def test_the_rate_is_kept_and_recovers():
  now = 0.0
  rate = Rate(60, lambda: now)
  for _ in range(60):
    rate.take()
  with pytest.raises(RequestError) as caught:
    rate.take()
  assert (caught.value.status, caught.value.retry_after) == (429, 1)
  now = 1.0
  rate.take()
  with pytest.raises(RequestError):
    rate.take()
  now = 1e6
  for _ in range(60):
    rate.take()
  with pytest.raises(RequestError):
    rate.take()


@pytest.mark.parametrize(
    "header", ["", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer 0123", "Bearer é"]
)
def test_wrong_tokens_are_refused(header):
  with pytest.raises(RequestError) as caught:
    check_token(header, TOKEN)
  assert caught.value.status == 401
  assert TOKEN not in caught.value.message


def test_the_right_token_passes_and_none_is_needed_where_none_is_set():
  check_token(f"Bearer {TOKEN}", TOKEN)
  check_token(f"bearer  {TOKEN}", TOKEN)
  check_token("", "")


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""]
)
def test_others_are_not_served_without_a_token(host):
  with pytest.raises(ValueError, match="token"):
    check_exposure(host, "")
  with pytest.raises(ValueError, match="16"):
    check_exposure(host, "short")
  check_exposure(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is(host):
  check_exposure(host, "")


def test_metrics_are_what_prometheus_reads():
  metrics = Metrics()
  metrics.request('a"b', 200, 0.02)
  metrics.request('a"b', 200, 400.0)
  metrics.request("", 429, 0.001)
  metrics.first_piece('a"b', 0.5)
  metrics.tokens('a"b', 10, 3)
  stats = {
      "requests": 2, "visits": 9, "slots": {"free": 1, "busy": 3},
      "prefilled": 7, "generated": 5, "evictions": 6,
  }  # fmt: skip
  text = metrics.text(inside=5, engines={"main": stats}, resident=4096)
  lines = text.splitlines()
  label = r'model="a\"b"'
  for line in (
      f'mgrpo_requests_total{{{label},status="200"}} 2',
      'mgrpo_requests_total{model="",status="429"} 1',
      f'mgrpo_tokens_total{{{label},kind="sampled"}} 3',
      f'mgrpo_request_seconds_bucket{{{label},le="0.01"}} 0',
      f'mgrpo_request_seconds_bucket{{{label},le="0.03"}} 1',
      f'mgrpo_request_seconds_bucket{{{label},le="+Inf"}} 2',
      f"mgrpo_request_seconds_count{{{label}}} 2",
      f"mgrpo_request_seconds_sum{{{label}}} 400.02",
      "mgrpo_choices_in_progress 5",
      'mgrpo_queue{policy="main"} 2',
      'mgrpo_slots{policy="main",state="busy"} 3',
      'mgrpo_device_tokens_total{policy="main",kind="prefilled"} 7',
      'mgrpo_evictions_total{policy="main"} 6',
      "process_resident_memory_bytes 4096",
  ):
    assert line in lines
  assert text.endswith("\n")
  assert sum(line.startswith("# TYPE") for line in lines) == 11
  unknown = metrics.text(inside=0, engines={}, resident=None)
  assert "process_" not in unknown
