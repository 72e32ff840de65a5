"""Stands in for experiments.train; run by the tests of sweeps as a process.

    python fake_training.py PLAN --config=… --workdir=DIR

PLAN is a JSON file that maps the name of DIR to the config of the run. A file
of that name beside PLAN makes the run fail, or wait until it is told to end.
"""

import json
import pathlib
import signal
import sys
import time


def main() -> None:
  plan = pathlib.Path(sys.argv[1])
  given = dict(text[2:].split("=", 1) for text in sys.argv[2:])
  run = pathlib.Path(given["workdir"])
  config = json.loads(plan.read_text())[run.name]
  run.mkdir(parents=True, exist_ok=True)
  (run / "config.json").write_text(json.dumps(config))
  with open(run / "attempts", "a") as attempts:
    attempts.write("x")
  todo = plan.parent / run.name
  if todo.exists():
    misbehave(run, todo.read_text())
  write(run, config, seed=int(given["config.seed"]))


def misbehave(run: pathlib.Path, how: str) -> None:
  """Fails, or waits for SIGTERM."""
  if how == "fail":
    print("error: out of luck", file=sys.stderr)
    sys.exit(3)

  def end(*_: object) -> None:
    (run / "told").touch()
    sys.exit(143)

  signal.signal(signal.SIGTERM, end)
  (run / "waits").touch()
  time.sleep(60)


def write(run: pathlib.Path, config: dict, *, seed: int) -> None:
  """Writes what a run leaves: four steps, a look at dev after every second."""
  lines = [
      {
          "step": step,
          "stage": "hard",
          "time": 0.0,
          "generated_tokens": (100.0 + 10 * seed) * (step + 1),
          "trained_tokens": 50.0 * (step + 1),
          "calls/main": 1.0,
          "calls/researcher": 1.0 + seed,
      }
      for step in range(4)
  ]
  for step, accuracy in ((1, 0.2), (3, 0.4)):
    lines[step]["accuracy/dev"] = accuracy + 0.1 * seed
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (run / "metrics.jsonl").write_text(text)
  after = 0.5 + 0.1 * seed
  summary = {
      "config": config,
      "seed": seed,
      "steps": 4,
      "seconds": 10.0 + seed,
      "eval": {
          "before": {"accuracy": 0.1, "n": 100, "ci95": [0.05, 0.2]},
          "after": {"accuracy": after, "n": 100, "ci95": [0.3, 0.8]},
      },
      "tokens": {
          "generated": 400 + 40 * seed,
          "trained": 200,
          "evaluated": 7,
      },
  }
  (run / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
  main()
