"""The load of `experiments.bench.serve` in small: no wrong answer, no leak."""

import asyncio
import dataclasses

import pytest
from served import LIMITS, engine, saying, serve, speaker

from experiments.bench import serve as bench
from mgrpo_jax.serving.sessions import Sessions

TOKEN = "0123456789abcdef"


def measured(served, **fields):
  named = {"model": "tiny", "token": TOKEN, "max_tokens": 6} | fields
  flags = [f"--{name}={value}" for name, value in named.items()]
  url = f"--url=http://127.0.0.1:{served.port}"
  return asyncio.run(bench.measure(bench.parser().parse_args([url, *flags])))


def test_good_and_bad_clients_get_what_they_deserve_and_leave_nothing():
  made = engine()
  sessions = Sessions(made.generate, made.release, limit=2)
  limits = dataclasses.replace(LIMITS, max_concurrent=12)
  with serve(
      speaker(made.generate, sessions=sessions),
      engines={"tiny": made},
      limits=limits,
      token=TOKEN,
  ) as served:
    served.complete(key=TOKEN, max_tokens=2)  # compiled now
    found = measured(served, clients=40, seconds=4, turns=3)
    counts = made.stats()
    assert served.service.gate.inside == 0
  assert (found["unexpected"], found["left_behind"]) == ({}, [])
  for kind, status in {
      "whole": 200, "stream": 200, "slow": 200, "leaves": 200, "large": 413,
      "broken": 400, "stranger": 401, "nobody": 404,
  }.items():  # fmt: skip
    assert found["statuses"][f"{kind} {status}"] >= 1
  assert found["milliseconds"]["whole"]["p99"] > 0
  assert found["memory"]["start_mib"] > 10
  assert counts["slots"]["idle"] == len(sessions) <= 2
  assert (counts["slots"]["busy"], counts["requests"]) == (0, 0)


@pytest.mark.parametrize(
    ("model", "told"), [("other", "whole 404"), ("tiny", "stranger 200")]
)
def test_what_is_not_deserved_is_told(model, told):
  limits = dataclasses.replace(LIMITS, max_concurrent=100)
  with serve(speaker(saying("x")), limits=limits) as served:
    found = measured(served, model=model, clients=50, seconds=1)
  assert found["unexpected"][told] >= 1


def test_memory_that_grows_is_told():
  flat = [(float(s), 2**20 * 100.0) for s in range(61)]
  grown = [(s, b + 2**20 * s / 6) for s, b in flat]
  assert bench._growth(flat)["slope_mib_per_minute"] == 0
  told = bench._growth(grown)
  assert told["slope_mib_per_minute"] == 10 == told["end_mib"] - 100
  assert told["middle_mib"] == 105
