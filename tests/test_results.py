"""Results that are kept in a file, from run directories made by hand."""

import json
import math

import finished_arms
import numpy as np
import pytest
from commands import ROOT, command

from mgrpo_jax import atomic
from mgrpo_jax.report import results, sweep

KEPT = sorted(  # of runs; gradients.json has other tables, see test_game
    path
    for path in (ROOT / "experiments" / "results").glob("*.json")
    if path.stem != "gradients"
)


@pytest.fixture
def kept(tmp_path):
  finished_arms.make_arms(tmp_path / "a" / "runs")
  return finished_arms.collect(tmp_path / "a")


def test_what_a_run_came_to_is_kept(kept):
  names = [(run["arm"], run["seed"]) for run in kept["runs"]]
  assert names == [
      ("co_train", 0),
      ("co_train", 1),
      ("frozen", 0),
      ("main_only", 0),
      ("main_only", 1),
  ]
  run = kept["runs"][1]
  assert run["after"] == {"accuracy": 0.6, "n": 100, "ci95": [0.3, 0.8]}
  assert (run["steps"], run["seconds"], run["commit"]) == (4, 11.0, "0123abc")
  assert run["tokens"] == {"generated": 440, "trained": 200}
  # step, generated, trained, accuracy, n
  assert run["dev"] == [
      [2, 220, 100, pytest.approx(0.3), 50],
      [4, 440, 200, pytest.approx(0.5), 50],
  ]
  assert kept["runs"][2]["dev"] == []


def test_the_file_gives_back_what_the_directories_hold(kept, tmp_path):
  atomic.write_json(tmp_path / "kept.json", kept)
  again = results.read(tmp_path / "kept.json")
  assert again == json.loads(json.dumps(kept))
  for row in results.rows(again):
    for seed, found in row.outcomes.items():
      name = f"{row.combination.name},seed={seed}"
      there = sweep.outcome(tmp_path / "a" / "runs" / name)
      assert found.questions == there.questions
      assert found.values.items() <= there.values.items()
      for key, look in there.looks.items():
        np.testing.assert_array_equal(found.looks[key], look)


def test_arms_are_compared_seed_by_seed(kept):
  best, second, last = results.compare(results.rows(kept), "co_train")
  assert (best["name"], second["name"]) == ("co_train", "main_only")
  assert "differences" not in best
  after = second["differences"]["after"]
  assert after["seeds"] == pytest.approx({"0": -0.2, "1": -0.1})
  # By hand: s of -0.2, -0.1 is 0.0707, t of 1 degree of freedom is 12.706205.
  half = 12.706205 * math.sqrt(0.005) / math.sqrt(2)
  assert after["over_seeds"] == pytest.approx(
      (-0.15 - half, -0.15 + half), abs=1e-6
  )
  assert last["differences"]["after"]["n"] == 1  # a seed that both have


def test_dev_is_compared_at_tokens_that_both_arms_spent(kept):
  _, arm, still = results.compare(results.rows(kept), "co_train")
  generated = arm["differences"]["generated_tokens"]
  assert generated["tokens"] == 400.0  # of seed 0, the least of both arms
  assert generated["seeds"] == pytest.approx({"0": -0.2, "1": -0.1})
  trained = arm["differences"]["trained_tokens"]
  assert trained["tokens"] == 150.0  # all that main_only was trained on
  # By hand: co_train had (0.2 + 0.4) / 2 and (0.3 + 0.5) / 2 at 150 tokens,
  # main_only 0.4 - 0.2 and 0.5 - 0.1.
  assert trained["seeds"] == pytest.approx({"0": -0.1, "1": 0.0})
  assert still["differences"]["generated_tokens"]["n"] == 0


def test_the_table_says_what_was_measured(kept):
  header, lines = results.table(kept)
  assert header[5] == "less co_train"
  assert [line[0] for line in lines] == ["co_train", "main_only", "frozen"]
  assert lines[0][5] == "-" and lines[2][-1] == "-"
  assert lines[1][1] == "0, 1"
  assert lines[1][5].startswith("-0.150 [-0.785, +0.485]")
  assert lines[1][-1].endswith(" at 150")
  text = results.markdown(kept | {"note": "by hand"})
  assert "| main_only | 0, 1 | 0.100 [0.100, 0.100] | 0.400" in text
  assert text.endswith("- machine: a slide rule\n- commit: 0123abc\n- by hand")


def test_statistics_in_the_file_are_those_of_its_runs(kept):
  found = results.compare(results.rows(kept), kept["baseline"])
  assert kept["statistics"] == found


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
  finished_arms.make_run(tmp_path / "a", "co_train", 0)
  finished_arms.make_run(tmp_path / "b", "co_train", 0)
  with pytest.raises(ValueError, match="both arm 'co_train', seed 0"):
    finished_arms.collect(tmp_path)
  finished_arms.make_run(tmp_path / "a", "co_train", 1, budget=5)
  with pytest.raises(ValueError, match="more than their seed: budget: absent"):
    finished_arms.collect(tmp_path / "a")
  with pytest.raises(ValueError, match="baseline: 'best', allowed: co_train"):
    finished_arms.collect(tmp_path / "b", baseline="best")
  finished_arms.make_run(tmp_path / "c", "co_train", 0, name="quickstart")
  with pytest.raises(ValueError, match="config.name: 'quickstart', allowed"):
    finished_arms.collect(tmp_path / "c")
  run = finished_arms.make_run(tmp_path / "d", "co_train", 0)
  (run / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match="a part is missing"):
    finished_arms.collect(tmp_path / "d")
  with pytest.raises(ValueError, match="none: no run that finished"):
    finished_arms.collect(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"runs": [{"arm": "co_train"}]}, "runs"),
        ({"machine": 3}, "machine"),
        ({"runs": []}, "no run of arm 'co_train'"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    kept, tmp_path, change, told
):
  atomic.write_json(tmp_path / "kept.json", kept | change)
  with pytest.raises(atomic.CorruptError, match=told):
    results.read(tmp_path / "kept.json")


def test_an_accuracy_above_one_is_refused(kept, tmp_path):
  kept["runs"][0]["after"]["accuracy"] = 1.01
  atomic.write_json(tmp_path / "kept.json", kept)
  with pytest.raises(atomic.CorruptError, match="runs"):
    results.read(tmp_path / "kept.json")


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_files_in_the_repository_are_whole(path):
  kept = results.read(path)
  found = results.compare(results.rows(kept), kept["baseline"])
  assert kept["statistics"] == json.loads(json.dumps(found))


def test_the_command_records_and_prints(tmp_path):
  finished_arms.make_arms(tmp_path / "runs")
  to = f"--to={tmp_path / 'results' / 'arms.json'}"
  runs = f"--runs={tmp_path}"
  refused = command("record", runs, to)
  assert (refused.returncode, refused.stdout) == (2, "")
  assert refused.stderr == "error: --machine is required with --runs\n"
  made = command("record", runs, to, "--machine=two cores")
  assert made.returncode == 0, made.stderr
  assert "| main_only | 0, 1 |" in made.stdout
  again = command("record", to)
  assert (again.returncode, again.stdout) == (0, made.stdout)
