"""The command that sweeps, with a script in the place of training."""

import json
import os
import signal
import subprocess
import time

import pytest
from commands import ROOT, command, start

from experiments import grid

SMOKE = "configs/quickstart.py:smoke"
RATIOS = "loss.ratio=token,sequence"
PROGRAM = """
import sys
from experiments import cli, sweep
sweep.TRAIN = (sys.executable, {fake!r}, {plan!r})
cli.run(sweep.main, required=("config", "out"), resumes=True)
"""


class Sweep:
  """A sweep of two ratios and two seeds, whose runs do what they are told."""

  def __init__(self, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    self.tmp_path, self.out = tmp_path, tmp_path / "out"
    given = {"arms": (), "axes": grid.axes([RATIOS])}
    cells = grid.plan(SMOKE, seeds=("0", "1"), **given)
    self.settings = grid.settings(SMOKE, cells=cells, **given)
    self.names = [cell.name for cell in cells]
    self.plan = tmp_path / "plan.json"
    self.plan.write_text(json.dumps({c.name: c.values for c in cells}))

  def start(self, *arguments, ratios=RATIOS):
    fake = str(ROOT / "tests/fake_training.py")
    program = PROGRAM.format(fake=fake, plan=str(self.plan))
    given = [f"--config={SMOKE}", f"--out={self.out}", "--seeds=0,1"]
    return start(
        "-c", program, *given, "--set", ratios, *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  def run(self, *arguments, **given):
    process = self.start(*arguments, **given)
    said, complained = process.communicate(timeout=120)
    return process.returncode, said, complained

  def attempts(self):
    runs = self.out / "runs"
    return [(runs / name / "attempts").stat().st_size for name in self.names]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
  return Sweep(tmp_path, monkeypatch)


def test_a_sweep_goes_on_until_all_of_it_is_there(sweep):
  unlucky = sweep.names[1]
  (sweep.tmp_path / unlucky).write_text("fail")
  code, said, complained = sweep.run()
  assert code == 1, complained
  lines = complained.splitlines()
  assert f"failed {unlucky}" in complained
  assert "exit code 3: error: out of luck" in complained
  assert sum(line.startswith("finished ") for line in lines) == 3
  assert lines[-1] == "3 of 4 runs finished · 1 failed"
  assert "3 of 4 runs finished, 2 combinations." in said
  assert "| 1 | smoke,ratio=token | 1 of 2 |" in said

  (sweep.tmp_path / unlucky).unlink()
  code, said, complained = sweep.run("--jobs=2")
  assert code == 0, complained
  assert sweep.attempts() == [1, 2, 1, 1]  # only what failed
  assert (
      complained.splitlines()[-1] == "4 of 4 runs finished · 3 of them before"
  )
  table = json.loads((sweep.out / "table.json").read_text())
  assert [c["finished_seeds"] for c in table["combinations"]] == [[0, 1]] * 2
  assert (sweep.out / "accuracy_trained_tokens.png").is_file()
  assert (sweep.out / "index.html").is_file()

  code, said, complained = sweep.run(ratios="loss.ratio=token,geometric")
  assert (code, said, len(complained.splitlines())) == (2, "", 1)
  assert "set.loss.ratio: ['token', 'sequence'] ->" in complained
  assert sweep.attempts() == [1, 2, 1, 1]

  metrics = sweep.out / "runs" / unlucky / "metrics.jsonl"
  text = metrics.read_text()
  metrics.write_text(text[: len(text) // 2])  # what is left could be averaged
  assert sweep.run()[0] == 2
  metrics.unlink()
  code, said, complained = sweep.run()
  assert (code, said, len(complained.splitlines())) == (2, "", 1)
  assert f"{unlucky}: finished, but its metrics.jsonl or" in complained


def test_a_sweep_that_is_told_to_end_ends_its_runs(sweep):
  (sweep.tmp_path / sweep.names[1]).write_text("wait")
  process = sweep.start()
  run = sweep.out / "runs" / sweep.names[1]
  for _ in range(600):
    if (run / "waits").exists() or process.poll() is not None:
      break
    time.sleep(0.1)
  second = sweep.run()
  assert second[0] == 2 and "in use by another process" in second[2]
  process.send_signal(signal.SIGTERM)
  _, complained = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert (
      complained.splitlines()[-1] == "interrupted; the same command continues"
  )
  assert (run / "told").exists()
  assert len(os.listdir(sweep.out / "runs")) == 2

  (sweep.tmp_path / sweep.names[1]).unlink()
  code, _, complained = sweep.run()
  assert code == 0, complained
  assert sweep.attempts() == [1, 2, 1, 1]


def test_a_run_directory_of_another_config_is_refused(sweep):
  run = sweep.out / "runs" / sweep.names[2]
  run.mkdir(parents=True)
  (run / "config.json").write_text('{"seed": 5}')
  (sweep.out / "sweep.json").write_text(json.dumps(sweep.settings))
  code, _, complained = sweep.run()
  assert (code, len(complained.splitlines())) == (2, 1)
  assert "another config" in complained and sweep.names[2] in complained
  assert not (sweep.out / "logs").exists()


def test_help_shows_a_command_and_every_flag():
  text = command("sweep", "--help").stdout
  assert "python -m experiments.sweep --config=" in text
  for flag in ("config", "out", "set", "arms", "seeds", "jobs"):
    assert f"  --{flag}: " in text
  assert "--at_trained_tokens: " in text


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--set=loss.ratio=token,x", "geometric"),
        ("--set=loss.raito=token", "unknown config key"),
        ("--jobs=0", "--jobs"),
    ],
)
def test_mistakes_end_before_any_run(sweep, argument, told):
  code, said, complained = sweep.run(argument, ratios="loss.clip_low=0.1")
  assert (code, said, len(complained.splitlines())) == (2, "", 1)
  assert told in complained
  assert not sweep.out.exists()
