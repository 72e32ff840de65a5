"""Run directories of arms, made by hand."""

import json

import fake_training

from mgrpo_jax.report import results


def make_run(root, arm, seed, *, worse=0.0, cheaper=1.0, **config):
  """A run whose accuracies and tokens are lower than usual."""
  run = root / f"{arm},seed={seed}"
  run.mkdir(parents=True)
  config = {"name": f"quickstart:{arm}", "seed": seed} | config
  fake_training.write(run, config, seed=seed)
  summary = json.loads((run / "summary.json").read_text())
  summary["commit"] = "0123abc"
  summary["eval"]["after"]["accuracy"] -= worse
  summary["tokens"]["trained"] = round(summary["tokens"]["trained"] * cheaper)
  (run / "summary.json").write_text(json.dumps(summary))
  lines = (run / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    row["trained_tokens"] *= cheaper
    if "accuracy/dev" in row:
      row["accuracy/dev"] -= worse
      row["questions/dev"] = 50.0
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (run / "metrics.jsonl").write_text(text)
  return run


def make_arms(root):
  """Two arms of two seeds, and one that never took a step."""
  for seed in (0, 1):
    make_run(root, "co_train", seed)
  make_run(root, "main_only", 0, worse=0.2, cheaper=0.75)
  make_run(root, "main_only", 1, worse=0.1, cheaper=0.75)
  still = make_run(root, "frozen", 0, worse=0.4)
  (still / "metrics.jsonl").write_text("")


def collect(root, **changes):
  given = {"machine": "a slide rule", "note": "", "baseline": "co_train"}
  return results.collect(results.find([root]), **given | changes)
