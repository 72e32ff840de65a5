"""Commands as a user types them: wrong input ends with one line and code 2."""

import json
import os
import signal
import subprocess
import sys

import pytest
from commands import (
    QUICKSTART,
    ROOT,
    SMOKE,
    command,
    environment,
    python,
    refused,
)

from configs import quickstart
from experiments import recipe
from mgrpo_jax import ownership, store, workdir


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((QUICKSTART,), "--workdir is required"),
        (("--workdir=RUN",), "--config is required"),
        ((QUICKSTART, "--workdir=RUN", "--config.sed=1"), "seed"),
        ((QUICKSTART, "--workdir=RUN", "--config.seed=one"), "one"),
        ((QUICKSTART + ":all", "--workdir=RUN"), "main_only"),
        (
            ("--config=configs/nowhere.py", "--workdir=RUN"),
            "cannot read --config: [Errno 2]",
        ),
        ((QUICKSTART, "--workdir=RUN", "--config.loss.ratio=x"), "geometric"),
        ((QUICKSTART, "--workdir=RUN", "--config.tasks.per_step=0"), "least 1"),
        ((QUICKSTART, "--workdir=RUN", "--wrokdir=x"), "wrokdir"),
        ((QUICKSTART, "--workdir=RUN", "seed=1"), "seed=1"),
    ],
)
def test_train_refuses_before_any_work(tmp_path, arguments, told):
  run = tmp_path / "run"
  result = command("train", *(a.replace("RUN", str(run)) for a in arguments))
  assert told in refused(result)
  assert not run.exists()


def test_a_recipe_that_is_missing_is_told_before_others_are_waited_for(
    tmp_path,
):
  result = command(
      "train",
      "--config=configs/nowhere.py",
      f"--workdir={tmp_path}",
      "--policy=main",
      "--coordinator=127.0.0.1:1",
      "--processes=2",
      "--process=1",
  )
  assert "cannot read --config: [Errno 2]" in refused(result)


def test_train_refuses_a_directory_of_other_things(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  result = command("train", QUICKSTART, f"--workdir={tmp_path}")
  assert "not empty" in refused(result)
  assert os.listdir(tmp_path) == ["thesis.tex"]


def test_train_refuses_the_directory_of_another_run(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 5}')
  result = command("train", QUICKSTART, f"--workdir={tmp_path}")
  assert "seed: 5 -> 0" in refused(result) or "another config" in refused(
      result
  )


def test_train_names_weights_that_are_not_there(tmp_path):
  result = command(
      "train",
      QUICKSTART,
      f"--workdir={tmp_path / 'run'}",
      "--config.policies.main.source=nowhere",
  )
  assert "config.policies.main.source" in refused(result)
  assert not (tmp_path / "run").exists()  # mended, the command must run


INTERRUPTED = """
import os, signal
from experiments import cli

cli.run(lambda: os.kill(os.getpid(), signal.SIGTERM), resumes={resumes})
"""


@pytest.mark.parametrize(
    ("resumes", "told"),
    [
        (False, "interrupted\n"),
        (True, "interrupted; the same command continues\n"),
    ],
)
def test_only_what_resumes_says_so_where_it_is_interrupted(resumes, told):
  ended = python("-c", INTERRUPTED.format(resumes=resumes))
  assert ended.returncode == 128 + signal.SIGTERM
  assert ended.stderr == told


LOST = """
import os, signal, time
from experiments import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it

class Callback:
  def __del__(self):  # as Python ends XLA's callbacks when it collects garbage
    os.kill(os.getpid(), signal.SIGINT)

def main():
  Callback()
  time.sleep(30)
  print("went on")

cli.run(main)
"""


def test_an_interrupt_that_a_callback_drops_comes_again():
  ended = python("-c", LOST)
  assert ended.returncode == 128 + signal.SIGINT
  assert ended.stderr == "interrupted\n" and not ended.stdout


BESIDE = """
import asyncio, os, signal
from experiments import cli

async def work():
  try:
    os.kill(os.getpid(), signal.SIGINT)  # which is not for what runs beside
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on until it waits")
    await asyncio.sleep(30)
  except asyncio.CancelledError:
    print("leaves in order")
    raise

signal.signal(signal.SIGINT, signal.SIG_IGN)
cli.run(lambda: asyncio.run(work()))
"""


def test_what_a_shell_starts_beside_itself_ends_in_order():
  ended = python("-c", BESIDE)
  assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
  assert ended.stderr == "interrupted\n"
  assert ended.stdout == "goes on until it waits\nleaves in order\n"


WITHIN = """
import os, signal
from experiments import cli

def main():
  exec("os.kill(os.getpid(), signal.SIGTERM)")  # as a dataclass is made

if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)
  cli.run(main)
"""


def test_the_code_is_told_where_python_runs_a_text(tmp_path):
  """Python's own end by SIGINT would come first."""
  (tmp_path / "within.py").write_text(WITHIN)
  ended = subprocess.run(
      [sys.executable, "-m", "within"],
      cwd=tmp_path,
      env=environment(),
      capture_output=True,
      text=True,
      check=False,
  )
  assert ended.returncode == 128 + signal.SIGTERM, ended.stderr


def test_the_code_stays_where_nobody_reads():
  end, start = os.pipe()
  os.close(end)
  ended = subprocess.run(
      [sys.executable, "-c", INTERRUPTED.format(resumes=False)],
      cwd=ROOT,
      env=environment(),
      stderr=start,
      check=False,
  )
  os.close(start)
  assert ended.returncode == 128 + signal.SIGTERM


LAUNCHING = """
from jax._src import xla_bridge
from experiments import cli, train

train._launch = lambda: print(list(xla_bridge._backends))
cli.run(train.main, required=("config", "workdir"), resumes=True)
"""


@pytest.mark.parametrize("launch", [["ray"], ["local", "--hosts=2"]])
def test_a_launcher_takes_no_device_from_what_it_starts(tmp_path, launch):
  how, *more = launch
  ended = python(
      "-c",
      LAUNCHING,
      SMOKE,
      f"--workdir={tmp_path}",
      f"--launch={how}",
      *more,
  )
  assert ended.stdout == "[]\n", ended.stderr


TWICE = """
import os, signal, sys, time
from experiments import cli

class Callback:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)

class Late:
  def write(self, text):
    sys.__stderr__.write(text)
    {again}
    time.sleep(0.2)

  def flush(self):
    sys.__stderr__.flush()

def main():
  sys.stderr = Late()
  os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(main)
"""


@pytest.mark.parametrize(
    "again", ["os.kill(os.getpid(), signal.SIGTERM)", "Callback()"]
)
def test_the_code_stays_where_it_is_told_again_while_it_leaves(again):
  """As launchers do, and as a callback drops it."""
  ended = python("-c", TWICE.format(again=again))
  assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
  assert ended.stderr == "interrupted\n"


LEAVING = """
import atexit, os, signal, time
from experiments import cli

def leave():
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(0.2)
  print("took its time")

atexit.register(leave)
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


def test_who_is_told_again_when_it_has_left_ends_at_once():
  """Python may wait for long then: for threads, for other processes."""
  ended = python("-c", LEAVING)
  assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
  assert ended.stderr == "interrupted\n" and not ended.stdout


@pytest.mark.parametrize("name", ["credit", "gradients", "decode"])
def test_benchmarks_try_where_to_write_before_they_begin(tmp_path, name):
  out = tmp_path / "missing" / "found.json"
  ended = command(f"bench.{name}", f"--out={out}")
  assert ended.returncode == 2 and not ended.stdout
  assert f"{out.parent} is not a directory" in ended.stderr


FAILING = """
from experiments import cli, {command}
from mgrpo_jax import atomic, loop
from mgrpo_jax.sampler import interface

async def fail(*_, **__):
  raise {error}("what differs")

loop.train = {command}._evaluate = fail
cli.run({command}.main)
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("train", "atomic.MismatchError"),
        ("evaluate", "atomic.MismatchError"),
        ("evaluate", "interface.EngineError"),
    ],
)
def test_what_cannot_go_on_ends_with_one_line(tmp_path, name, error):
  run = tmp_path / "run"
  given = [f"--workdir={run}"]
  if name == "train":
    given.append(QUICKSTART)
  else:
    run.mkdir()
    values = recipe.plain(quickstart.get_config())
    (run / "config.json").write_text(json.dumps(values))
  program = FAILING.format(command=name, error=error)
  assert refused(python("-c", program, *given)) == "error: what differs"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_bucket_of_another_run_is_refused(tmp_path, name):
  bucket = tmp_path / "bucket"
  ownership.claim(store.open_folder(bucket), "someone", {}, jobs=False)
  config = quickstart.get_config()
  config.publish.bucket = bucket.as_uri()
  run = tmp_path / "run"
  if name == "evaluate":
    with workdir.hold(run, recipe.plain(config)):
      pass
    result = command(name, f"--workdir={run}")
  else:
    overridden = f"--config.publish.bucket={bucket.as_uri()}"
    result = command(name, QUICKSTART, f"--workdir={run}", overridden)
    assert not run.exists()
  assert "belongs to another run" in refused(result)
  assert os.listdir(bucket) == ["run.json"]


@pytest.mark.parametrize("name", ["evaluate", "serve", "view"])
def test_runs_that_do_not_exist_are_named(tmp_path, name):
  result = command(name, f"--workdir={tmp_path / 'nothing'}")
  assert "nothing" in refused(result)


@pytest.mark.parametrize("name", ["train", "evaluate", "serve", "view"])
def test_help_says_what_a_command_does(name):
  result = command(name, "--help")
  text = result.stdout + result.stderr
  assert f"python -m experiments.{name}" in text
  assert "--workdir" in text


def in_shell(line, name, *arguments):
  """A command with its streams as a line of shell gives them."""
  return subprocess.run(
      ["bash", "-c", line, sys.executable, "-m", f"experiments.{name}"]
      + list(arguments),
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      env=environment(),
      check=False,
  )


@pytest.mark.parametrize("arguments", [("--help",), ("--workdir=RUN",)])
def test_output_that_cannot_be_written_is_one_line(tmp_path, arguments):
  (tmp_path / "config.json").write_text("{}")
  arguments = [a.replace("RUN", str(tmp_path)) for a in arguments]
  full = in_shell('"$0" "$@" > /dev/full', "view", *arguments)
  told = "error: cannot write to stdout: No space left on device"
  assert refused(full) == told
  unread = in_shell(
      'exec 3> >(:); sleep 0.5; exec "$0" "$@" >&3', "view", *arguments
  )
  assert (unread.returncode, unread.stderr) == (128 + 13, "")


def test_a_command_runs_without_stderr_or_stdout(tmp_path):
  refusal = in_shell('"$0" "$@" 2>&-', "view", f"--workdir={tmp_path / 'no'}")
  assert (refusal.returncode, refusal.stdout) == (2, "")
  (tmp_path / "config.json").write_text("{}")
  silent = in_shell('"$0" "$@" >&-', "view", f"--workdir={tmp_path}")
  assert (silent.returncode, silent.stderr) == (0, "")
  assert (tmp_path / "report/index.html").is_file()
