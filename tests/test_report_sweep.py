"""What the runs of a sweep say together, on run directories made by hand."""

import json
import math
import re

import fake_training
import numpy as np
import pytest

from mgrpo_jax import metrics
from mgrpo_jax.report import sweep, sweep_page


def make_run(tmp_path, name, seed):
  run = tmp_path / name
  run.mkdir()
  fake_training.write(run, {"seed": seed}, seed=seed)
  return run


def combination(tmp_path, name, seeds, planned=None):
  return sweep.Combination(
      name=name,
      settings={"loss.ratio": name},
      seeds=tuple(planned or seeds),
      runs={s: make_run(tmp_path, f"{name}{s}", s) for s in seeds},
  )


def test_a_run_is_finished_when_its_summary_is_of_its_config(tmp_path):
  run = make_run(tmp_path, "run", 1)
  assert sweep.finished(run, {"seed": 1})
  assert not sweep.finished(run, {"seed": 2})
  assert not sweep.finished(tmp_path / "none", {"seed": 1})
  (run / "summary.json").write_text("{")
  assert not sweep.finished(run, {"seed": 1})


def test_means_and_intervals_over_seeds(tmp_path):
  row = sweep.read(combination(tmp_path, "token", (0, 1, 2), planned=range(4)))
  (entry,) = sweep.table([row], {})
  assert entry["planned_seeds"] == [0, 1, 2, 3]
  assert entry["finished_seeds"] == [0, 1, 2]
  after = entry["measures"]["after"]
  assert after["seeds"] == {"0": 0.5, "1": 0.6, "2": 0.7}
  assert after["mean"] == pytest.approx(0.6)
  # By hand: s = 0.1, t of 2 degrees of freedom is 4.302653 in tables.
  half = 4.302653 * 0.1 / math.sqrt(3)
  assert after["over_seeds"] == pytest.approx(
      (0.6 - half, 0.6 + half), abs=1e-6
  )
  assert after["over_questions"] == pytest.approx(metrics.wilson(60, 100))
  assert after["questions"] == 100
  change = entry["measures"]["change"]
  assert change["mean"] == pytest.approx(0.5)
  assert entry["measures"]["calls/researcher"]["mean"] == pytest.approx(2.0)
  assert entry["measures"]["seconds"]["seeds"]["2"] == 12.0
  assert json.loads(json.dumps(entry, allow_nan=False))


def test_one_seed_has_no_interval_over_seeds(tmp_path):
  row = sweep.read(combination(tmp_path, "token", (0,)))
  (entry,) = sweep.table([row], {})
  assert entry["measures"]["after"]["over_seeds"] is None
  assert (entry["measures"]["after"]["n"]) == 1


def test_intervals_end_where_their_measure_does(tmp_path):
  row = sweep.read(combination(tmp_path, "token", (0, 4)))  # after: 0.5, 0.9
  (entry,) = sweep.table([row], {})
  low, high = entry["measures"]["after"]["over_seeds"]
  assert (low, high) == (0.0, 1.0)
  assert entry["measures"]["change"]["over_seeds"][0] < 0
  assert entry["measures"]["generated_tokens"]["over_seeds"][0] == 0.0


def test_accuracy_at_equal_tokens_lies_on_a_line_between_looks(tmp_path):
  # Looks after steps 2 and 4: seed 0 at 200 and 400 generated tokens, seed 1 at
  # 220 and 440; trained tokens 100 and 200 for both.
  rows = [sweep.read(combination(tmp_path, "token", (0, 1)))]
  assert sweep.budgets(rows) == {
      "generated_tokens": 400.0,
      "trained_tokens": 200.0,
  }
  first, second = rows[0].outcomes.values()
  assert sweep.at_budget(first, "generated_tokens", 300) == pytest.approx(0.3)
  assert sweep.at_budget(second, "generated_tokens", 400) == pytest.approx(
      0.3 + 0.2 * 180 / 220
  )
  assert sweep.at_budget(first, "trained_tokens", 100) == pytest.approx(0.2)
  assert sweep.at_budget(first, "trained_tokens", 99) is None
  assert sweep.at_budget(second, "generated_tokens", 441) is None
  (entry,) = sweep.table(rows, {"generated_tokens": 210})
  at = entry["dev_accuracy_at"]["generated_tokens"]
  assert (at["tokens"], at["n"], at["over_seeds"]) == (210, 1, None)
  assert at["seeds"] == {"0": pytest.approx(0.21)}


def test_curves_average_seeds_where_all_have_looked(tmp_path):
  row = sweep.read(combination(tmp_path, "token", (0, 1)))
  steps, mean, low, high = sweep.curve(row, "steps")
  np.testing.assert_allclose(steps, [2, 4])
  np.testing.assert_allclose(mean, [0.25, 0.45])
  assert (low < mean).all() and (mean < high).all()
  spent, mean, *_ = sweep.curve(row, "generated_tokens")
  np.testing.assert_allclose(spent, [220, 400])  # not 200, not 440
  np.testing.assert_allclose(
      mean, [(0.22 + 0.3) / 2, (0.4 + 0.3 + 0.2 * 180 / 220) / 2]
  )
  alone = sweep.curve(sweep.read(combination(tmp_path, "x", (0,))), "steps")
  assert np.isnan(alone[2:]).all()


def test_runs_that_never_looked_have_no_curve(tmp_path):
  one = combination(tmp_path, "token", (0,))
  (one.runs[0] / "metrics.jsonl").write_text("")
  row = sweep.read(one)
  assert sweep.curve(row, "steps") is None
  assert sweep.budgets([row]) == {}
  assert sweep.at_budget(row.outcomes[0], "trained_tokens", 1) is None
  assert sweep.table([row], {})[0]["measures"]["after"]["mean"] == 0.5


def test_looks_that_cost_nothing_more_count_once(tmp_path):
  one = combination(tmp_path, "token", (0,))
  path = one.runs[0] / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    line["generated_tokens"] = 0.0  # as imitation does
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  row = sweep.read(one)
  assert sweep.budgets([row]) == {"trained_tokens": 200.0}
  assert sweep.curve(row, "steps")[1] == pytest.approx([0.2, 0.4])
  assert sweep.curve(row, "generated_tokens")[1] == pytest.approx([0.4])


def test_damaged_runs_are_left_out_of_the_means(tmp_path):
  one = combination(tmp_path, "token", (0, 1))
  (one.runs[1] / "summary.json").write_text("[]")
  row = sweep.read(one)
  assert list(row.outcomes) == [0]


def test_tables_pictures_and_a_page_are_written(tmp_path):
  out = tmp_path / "a<b"
  combinations = [
      combination(tmp_path, "token", (0, 1, 2)),
      combination(tmp_path, "se|quence", (0,), planned=(0, 1)),
      sweep.Combination(name="none", settings={}, seeds=(0,), runs={}),
  ]
  page = sweep_page.write(out, combinations, {"trained_tokens": 150})
  text = (out / "table.md").read_text()
  rows = [line for line in text.splitlines() if line.startswith("| ")]
  assert rows[0].startswith("| # | combination | seeds | before |")
  assert "dev at 150 trained tokens" in rows[0]
  assert rows[2].startswith(
      "| 1 | token | 3 of 3 | 0.100 [0.100, 0.100] | [0.055, 0.174] (n = 100)"
      " | 0.600 [0.352, 0.848] |"
  )
  assert rows[3].startswith("| 2 | se\\|quence | 1 of 2 | 0.100 | [")
  assert rows[4].startswith("| 3 | none | 0 of 1 | - | - |")
  assert "calls of researcher" in rows[0] and "calls of main" not in rows[0]
  assert len(rows) == 5 + 2 + 4  # the second table: a run a row
  whole = json.loads((out / "table.json").read_text())
  assert whole["budgets"] == {"generated_tokens": 400.0, "trained_tokens": 150}
  for name in ("steps", "generated_tokens", "trained_tokens"):
    picture = (out / f"accuracy_{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
  html = page.read_text()
  assert "<h1>a&lt;b</h1>" in html and "<script" not in html
  assert html.count("<figure>") == 3
  assert not re.search(r'(src|href)="(?!data:)', html)


def test_a_sweep_of_nothing_yet_has_empty_tables(tmp_path):
  none = sweep.Combination(name="a", settings={}, seeds=(0,), runs={})
  sweep_page.write(tmp_path, [none], {})
  assert "0 of 1 runs finished" in (tmp_path / "table.md").read_text()
