"""A run that is killed ends where the uninterrupted run ends, bit for bit."""

import collections
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mgrpo_jax import publish, store
from mgrpo_jax.policy.load import load
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics

PROGRAM = pathlib.Path(__file__).parent / "tiny_run.py"
SEED, STEPS, TOTAL = 3, 18, 20  # two steps of imitation come first
KILLS = 10
DEADLINE = 240  # seconds; a start takes 5 to 20


def start(directory, *arguments):
  numbers = (SEED, *(arguments or (STEPS,)))
  return subprocess.Popen(
      [sys.executable, PROGRAM, str(directory), *map(str, numbers)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def finish(process):
  out, error = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, error
  return out.strip()


def steps_done(directory):
  return len(records.list_steps(directory / "rollouts"))


def wait_for_step(process, directory, number):
  limit = time.monotonic() + DEADLINE
  while steps_done(directory) < number and process.poll() is None:
    assert time.monotonic() < limit, "the run does not move"
    time.sleep(0.02)


def trained_tasks(directory):
  """Step -> ids of the tasks it was trained on."""
  found = {}
  for step, path in records.list_steps(directory / "rollouts").items():
    read = records.read_step(path)
    assert not read.problems
    found[step] = [group["task"]["id"] for group in read.groups]
  return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  whole, broken = root / "whole", root / "broken"
  expected = finish(start(whole))
  rng = random.Random(0)
  for kill in range(KILLS):
    process = start(broken)
    wait_for_step(process, broken, min(TOTAL - 1, 2 * kill))
    time.sleep(rng.random())
    process.send_signal(signal.SIGKILL)
    process.communicate()
  return expected, finish(start(broken)), whole, broken


def test_parameters_are_equal_bit_for_bit(runs):
  expected, actual, _, _ = runs
  assert actual == expected


def test_what_is_published_is_what_is_saved(runs):
  """Of three versions two are differences, but for the first after a start."""
  _, _, *directories = runs
  for directory in directories:
    bucket, formats = store.open_folder(directory / "bucket"), []
    for name in ("main", "researcher"):
      saved = load(directory / "policies" / name).params
      read = publish.read(bucket, name, "latest", like=saved)
      assert read.version.number == TOTAL and not read.skipped
      pairs = zip(*map(jax.tree.leaves, (read.params, saved)), strict=True)
      assert all(np.array_equal(*pair) for pair in pairs)
      for number in publish.versions(bucket, name):
        text = bucket.get(f"policies/{name}/v{number}/manifest.json")
        formats.append(json.loads(text)["format"])
    assert {5} <= set(formats) <= {5, 6}
    assert 6 in formats or directory != directories[0]


def test_every_task_is_accounted_for_once(runs):
  _, _, whole, broken = runs
  assert trained_tasks(broken) == trained_tasks(whole)
  assert list(trained_tasks(broken)) == list(range(TOTAL))


def test_every_step_is_in_the_metrics_once(runs):
  _, _, whole, broken = runs
  rows = read_metrics(broken / "metrics.jsonl")
  steps = collections.Counter(row["step"] for row in rows)
  assert steps == dict.fromkeys(range(TOTAL), 1)
  for name in (
      "reward/main",
      "loss/main",
      "version/main",
      "trained_tokens",
      "generated_tokens",
      "evaluation_tokens",
      "rollouts",
  ):
    expected = [row[name] for row in read_metrics(whole / "metrics.jsonl")]
    assert [row[name] for row in rows] == expected


def test_a_finished_run_stays_as_it_is(runs):
  expected, _, whole, _ = runs
  before = (whole / "metrics.jsonl").read_bytes()
  assert finish(start(whole)) == expected
  assert (whole / "metrics.jsonl").read_bytes() == before
