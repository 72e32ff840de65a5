"""The model on paper: bounds that it keeps, requests that it foretells."""

import dataclasses
import sys

import pytest

from experiments.bench import records, scaling

WORK, BUCKET = scaling.Work(), scaling.Bucket()
SIZES = [(p, n) for p in scaling.POLICIES for n in scaling.CHIPS]


@pytest.mark.parametrize("name", scaling.MODELS)
def test_more_chips_never_take_longer(name):
  for policies in scaling.POLICIES:
    found = [
        scaling.step(scaling.MODELS[name], policies, number, WORK, BUCKET)
        for number in scaling.CHIPS
    ]
    held = [one for one in found if one is not None]
    assert all(one is None for one in found[: len(found) - len(held)])
    for fewer, more in zip(held[:-1], held[1:], strict=True):
      assert more.in_step <= fewer.in_step and more.one_late <= fewer.one_late


@pytest.mark.parametrize("name", scaling.MODELS)
@pytest.mark.parametrize("calls", [0, 4])
def test_nobody_works_longer_than_the_step(name, calls):
  work = dataclasses.replace(WORK, calls=calls)
  for policies, number in SIZES:
    one = scaling.step(scaling.MODELS[name], policies, number, work, BUCKET)
    if one is None:
      continue
    assert 0 <= one.idle_late <= one.idle < 1
    assert one.one_late <= one.in_step
    assert one.in_step >= one.sampling + one.update


def test_what_does_not_fit_is_left_out():
  large = scaling.MODELS["qwen3_30b"]
  assert scaling.step(large, 2, 8, WORK, BUCKET) is None  # 4 chips each
  assert scaling.step(large, 2, 32, WORK, BUCKET) is not None
  assert scaling.step(scaling.MODELS["smollm2"], 8, 2, WORK, BUCKET) is None


def test_sizes_are_those_of_the_configs():
  sizes = {n: (m.params, m.active, m.cache) for n, m in scaling.MODELS.items()}
  assert sizes["smollm2"] == (134_515_008, 134_515_008, 2 * 2 * 30 * 3 * 64)
  params, active, cache = sizes["qwen3_30b"]
  assert 30.4e9 < params < 30.6e9 and 2.9e9 < active < 3.4e9
  assert cache == 2 * 2 * 48 * 4 * 128


def test_requests_and_text_grow_as_they_are_said_to():
  model = scaling.MODELS["smollm2"]
  few, many = (
      scaling.step(model, p, 4096, WORK, BUCKET) for p in scaling.POLICIES[::3]
  )
  assert many.requests / few.requests == pytest.approx(256 / 2, rel=0.2)
  assert many.looks / few.looks < 2 * 256 / 2  # no job looks at every other
  assert many.looks < BUCKET.requests / 2
  assert many.crossing == few.crossing  # four calls a rollout, whoever answers
  everyone = dataclasses.replace(WORK, calls=0)
  all_called = scaling.step(model, 256, 4096, everyone, BUCKET)
  assert all_called.crossing == pytest.approx(255 / 4 * many.crossing)


@pytest.mark.parametrize("rollouts", [8, 24])
def test_jobs_ask_the_bucket_what_the_model_says(tmp_path, rollouts):
  work = dataclasses.replace(WORK, rollouts=rollouts, calls=3)
  rows = [line.split("|")[1:4] for line in records.check(work, tmp_path)]
  for name, model, seen in rows[2:4]:
    assert "requests" in name and int(model) == int(seen) > 0
  name, model, seen = (cell.strip().replace(",", "") for cell in rows[-1])
  assert name == "bytes" and 0.7 < float(seen) / float(model) < 1.3


def test_the_command_prints_what_fits(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["scaling", "--model=qwen3_30b"])
  scaling.main()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) > 5 and lines[2].startswith("| 2 | 16 |")
  monkeypatch.setattr(sys, "argv", ["scaling", "--rollouts=12"])
  with pytest.raises(SystemExit, match="2"):
    scaling.main()
