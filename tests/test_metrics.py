"""Definitions, intervals, counters, and the files that keep metrics."""

import json
import math
import os
import pathlib
import re
import struct
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mgrpo_jax import metrics
from mgrpo_jax.report import writer


def read_events(directory):
  """Events of each TensorBoard file, in the order TensorBoard reads them."""
  files = []
  for path in sorted(directory.iterdir()):
    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      events.append(
          event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      )
      at += 16 + length
    files.append(events)
  return files


def visible_scalars(files, tag):
  """What TensorBoard shows: a START hides earlier events of its later steps."""
  shown = []
  for event in (event for events in files for event in events):
    if event.session_log.status == event_pb2.SessionLog.START:
      shown = [point for point in shown if point[0] < event.step]
    for value in event.summary.value:
      if value.tag == tag:
        shown.append((event.step, value.simple_value))
  return shown


def test_every_metric_is_defined_whole():
  parts = ("", "role", "policy", "split", "phase", "event", "updates")
  for name, metric in metrics.METRICS.items():
    assert metric.name == name and "/" not in name
    assert metric.per in parts
    assert metric.better in ("higher", "lower", "")
    assert metric.unit and metric.meaning and metric.meaning[-1] != "."


def test_define_finds_families_and_refuses_other_names():
  assert metrics.define("reward/main").better == "higher"
  assert metrics.define("compilations").unit == "programs"
  with pytest.raises(ValueError, match="'rewrd/main' is not defined"):
    metrics.define("rewrd/main")
  for name in ("reward", "reward/"):
    with pytest.raises(ValueError, match="reward/<role>"):
      metrics.define(name)
  for name in ("compilations/x", "compilations/"):
    with pytest.raises(ValueError, match="written as compilations"):
      metrics.define(name)


# Worked by hand: p = 0.5, n = 4, z^2 = 3.8415; and Newcombe (1998), table I,
# method 3, to the four decimals printed there.
@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (2, 4, 0.1500, 0.8500),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(successes, n, low, high):
  np.testing.assert_allclose(
      metrics.wilson(successes, n), (low, high), atol=5e-5
  )


@hypothesis.given(st.integers(1, 10_000), st.floats(0, 1))
@hypothesis.settings(deadline=None)
def test_wilson_solves_the_score_equation(n, share):
  successes = round(share * n)
  low, high = metrics.wilson(successes, n)
  assert 0 <= low <= successes / n <= high <= 1
  for end in (low, high):
    if 0 < end < 1:  # |p - p0| = z sqrt(p0 (1 - p0) / n) defines the ends
      score = (successes / n - end) / math.sqrt(end * (1 - end) / n)
      assert abs(score) == pytest.approx(1.959964, rel=1e-5)
  mirrored = metrics.wilson(n - successes, n)
  assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_knows_nothing_of_nothing_and_refuses_nonsense():
  assert metrics.wilson(0, 0) == (0.0, 1.0)
  for successes, n, name in ((1, 0, "suc"), (-1, 5, "suc"), (0, -1, "n")):
    with pytest.raises(ValueError, match=f"^{name}"):
      metrics.wilson(successes, n)


def test_accuracy_summary_is_what_the_run_directory_promises():
  summary = metrics.Accuracy(correct=81, n=263, failed=0).summary()
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert list(summary) == ["accuracy", "n", "ci95", "failed"]
  assert summary["accuracy"] == 81 / 263
  empty = metrics.Accuracy(correct=0, n=0, failed=0).summary()
  assert empty == {"accuracy": None, "n": 0, "ci95": [0.0, 1.0], "failed": 0}


def test_compilations_are_counted_while_the_context_is_open():
  x = np.ones(3, np.float32)
  with metrics.count_compilations() as counters:
    double = jax.jit(lambda x: jnp.tanh(x) * 2.5)
    double(x)
    assert counters.count == 1 and counters.seconds > 0
    double(x)
    assert counters.count == 1
    double(np.ones(4, np.float32))
    assert counters.count == 2 and 0 <= counters.cached <= 2
  jax.jit(lambda x: x - 7.25)(x)
  assert counters.count == 2


def test_peak_rss_is_what_the_kernel_says():
  status = pathlib.Path("/proc/self/status")
  if not status.exists():
    pytest.skip("no /proc to compare with")
  block = np.ones(8 << 20)
  match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
  assert metrics.peak_rss_bytes() >= block.nbytes
  # The kernel sums per-CPU counters lazily; both lag by a few MB at most.
  assert abs(metrics.peak_rss_bytes() - int(match[1]) * 1024) < 16 << 20


def test_each_step_reaches_both_files_at_once(tmp_path):
  with writer.MetricsWriter(tmp_path, last_step=-1) as log:
    log.write(0, "imitate", {"nll/main": np.float32(1.5), "compilations": 3})
    log.write(1, "easy", {"reward/main": jnp.float32(0.25)})
    rows = writer.read_metrics(tmp_path / "metrics.jsonl")  # not yet closed
    files = read_events(tmp_path / "tensorboard")
  assert [row["step"] for row in rows] == [0, 1]
  assert [row["stage"] for row in rows] == ["imitate", "easy"]
  assert rows[0]["nll/main"] == 1.5 and rows[0]["compilations"] == 3.0
  assert visible_scalars(files, "nll/main") == [(0, 1.5)]
  assert visible_scalars(files, "reward/main") == [(1, 0.25)]
  assert files[0][0].file_version == "brain.Event:2"


def test_writer_refuses_unknown_names_and_steps_out_of_order(tmp_path):
  with writer.MetricsWriter(tmp_path, last_step=4) as log:
    with pytest.raises(ValueError, match="'loss' is written as loss/<policy>"):
      log.write(5, "easy", {"loss": 0.0})
    log.write(5, "easy", {"loss/main": 0.0})
    for step in (5, 3):
      with pytest.raises(ValueError, match=f"step: {step}, allowed: above 5"):
        log.write(step, "easy", {"loss/main": 0.0})
  assert len(writer.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_numbers_that_json_lacks_survive(tmp_path):
  values = {"loss/a": math.nan, "loss/b": math.inf, "loss/c": -math.inf}
  with writer.MetricsWriter(tmp_path, last_step=-1) as log:
    log.write(0, "easy", values)
  path = tmp_path / "metrics.jsonl"

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  json.loads(path.read_text(), parse_constant=refuse)
  (row,) = writer.read_metrics(path)
  assert math.isnan(row["loss/a"])
  assert (row["loss/b"], row["loss/c"]) == (math.inf, -math.inf)


def test_resumed_run_has_each_step_once(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with writer.MetricsWriter(tmp_path, last_step=-1) as log:
    for step in range(6):
      log.write(step, "easy", {"reward/main": step})
  path.write_bytes(path.read_bytes() + b'{"step": 6, "rewa')  # killed here
  with writer.MetricsWriter(tmp_path, last_step=3) as log:
    assert [row["step"] for row in writer.read_metrics(path)] == [0, 1, 2, 3]
    for step in (4, 5, 6):
      log.write(step, "easy", {"reward/main": step + 100})
  rows = writer.read_metrics(path)
  expected = [(s, s if s < 4 else s + 100) for s in range(7)]
  assert [(row["step"], row["reward/main"]) for row in rows] == expected
  assert len(path.read_bytes().splitlines()) == 7
  files = read_events(tmp_path / "tensorboard")
  assert len(files) == 2
  assert visible_scalars(files, "reward/main") == expected
  assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_two_resumes_within_a_second_keep_both_event_files(tmp_path):
  for step in range(3):
    with writer.MetricsWriter(tmp_path, last_step=step - 1) as log:
      log.write(step, "easy", {"reward/main": step})
  files = read_events(tmp_path / "tensorboard")
  assert visible_scalars(files, "reward/main") == [(0, 0), (1, 1), (2, 2)]


def test_truncate_after_drops_what_does_not_count(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert writer.truncate_after(path, 3) == 0 and not path.exists()
  lines = [
      b'{"step": 0, "stage": "a"}',
      b"\xff\xfe not json",
      b'{"step": "1"}',
      b"[1, 2]",
      b'{"step": 2, "stage": "first"}',
      b'{"step": 2, "stage": "again"}',
      b'{"step": 9, "stage": "late"}',
      b'{"step": 3, "st',
  ]
  path.write_bytes(b"\n".join(lines))
  assert writer.truncate_after(path, 3) == 6
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows == [
      {"step": 0, "stage": "a"},
      {"step": 2, "stage": "again"},
  ]
  before = os.stat(path)
  assert writer.truncate_after(path, 3) == 0
  assert os.stat(path).st_ino == before.st_ino  # nothing to do, not rewritten


@hypothesis.given(st.integers(0, 400))
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_file_cut_anywhere_loses_at_most_the_torn_step(cut):
  whole = b"".join(
      json.dumps({"step": s, "stage": "é"}).encode() + b"\n" for s in range(12)
  )
  with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "metrics.jsonl")
    with open(path, "wb") as stream:
      stream.write(whole[:cut])
    complete = whole[:cut].count(b"\n")
    steps = [row["step"] for row in writer.read_metrics(path)]
  assert steps in (list(range(complete)), list(range(complete + 1)))


def test_student_is_the_t_interval_of_tables():
  assert metrics.student([0.5]) is None
  # t of 1 degree of freedom is 12.706205; s of (0, 1) is sqrt(1/2).
  half = 12.706205 * math.sqrt(0.5) / math.sqrt(2)
  assert metrics.student([0.0, 1.0]) == pytest.approx((0.5 - half, 0.5 + half))
  assert metrics.student([0.3] * 4) == pytest.approx((0.3, 0.3))
