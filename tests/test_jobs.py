"""Commands side by side: their cores, logs, ends, and how they are stopped."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments import jobs

ROOT = pathlib.Path(__file__).parents[1]
SHOW = (
    "import os, json; print(json.dumps([sorted(os.sched_getaffinity(0)),"
    " os.environ.get('NPROC'), os.environ['MARK']]))"
)
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="no affinity here"
)


def job(tmp_path, name, program):
  return jobs.Job(
      name=name,
      command=(sys.executable, "-c", program),
      log=tmp_path / f"{name}.log",
  )


def run(todo, parallel=1, watch=lambda ages: None):
  environment = os.environ | {"MARK": "ours"}
  environment.pop("NPROC", None)
  return jobs.run(todo, parallel=parallel, environment=environment, watch=watch)


def test_each_job_tells_how_it_ended(tmp_path):
  todo = [
      job(tmp_path, "good", "print('fine')"),
      job(tmp_path, "bad", "import sys; sys.exit('no luck')"),
      job(tmp_path, "quiet", "import os; os._exit(4)"),
  ]
  ended = list(run(todo))
  assert [(one.job.name, one.code) for one in ended] == [
      ("good", 0),
      ("bad", 1),
      ("quiet", 4),
  ]
  assert jobs.last_line(todo[1].log) == "no luck"
  list(run(todo[:1]))  # again: the log goes on
  assert todo[0].log.read_text().count("fine\n") == 2


def test_a_job_alone_may_use_everything(tmp_path):
  todo = [job(tmp_path, "one", SHOW)]
  list(run(todo))
  cores, threads, mark = json.loads(jobs.last_line(todo[0].log))
  assert set(cores) == os.sched_getaffinity(0)
  assert (threads, mark) == (None, "ours")


@needs_affinity
def test_jobs_at_a_time_have_cores_of_their_own(tmp_path):
  wait = "import time; time.sleep(0.5); "  # all of it after pinning
  todo = [job(tmp_path, str(i), wait + SHOW) for i in range(2)]
  most = []
  list(run(todo, parallel=2, watch=lambda ages: most.append(len(ages))))
  said = [json.loads(jobs.last_line(one.log)) for one in todo]
  shares = jobs.shares(sorted(os.sched_getaffinity(0)), 2)
  assert sorted(tuple(cores) for cores, _, _ in said) == sorted(shares)
  assert [int(threads) for _, threads, _ in said] == list(map(len, shares))
  assert max(most) == 2


@pytest.mark.parametrize("cores", [1, 2, 5, 8])
@pytest.mark.parametrize("parallel", [2, 3, 8])
def test_shares_are_all_cores_and_as_even_as_can_be(cores, parallel):
  shares = jobs.shares(range(cores), parallel)
  assert len(shares) == parallel
  assert {core for share in shares for core in share} == set(range(cores))
  sizes = [len(share) for share in shares]
  assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
  if parallel <= cores:
    assert sum(sizes) == cores


@pytest.mark.parametrize(
    ("codes", "number"),
    [
        ([75, 1], 0),
        ([None, 0, 1, 75], 2),
        ([1, 2, 2], 1),
        ([2, 1, 2], 0),
        ([-9, None, 2], 2),
    ],
)
def test_who_tells_best_why_several_end(codes, number):
  assert jobs.telling(codes) == number


def test_a_stopped_sweep_stops_its_jobs(tmp_path):
  waits = "import time; print('up', flush=True); time.sleep(60)"
  todo = [job(tmp_path, str(i), waits) for i in range(3)]
  pids = []

  def watch(ages):
    if all(jobs.last_line(one.log) == "up" for one in todo[:2]):
      raise KeyboardInterrupt

  began = time.monotonic()
  with (
      pytest.raises(KeyboardInterrupt),
      contextlib.closing(run(todo, parallel=2, watch=watch)) as running,
  ):
    pids += list(running)
  assert time.monotonic() - began < 20
  assert not pids and not todo[2].log.exists()
  assert not alive(todo[0].command)


def alive(command):
  """Whether any process of this user runs a command."""
  told = "\0".join(command).encode()
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      if told in path.read_bytes():
        return True
  return False


def test_what_missed_a_signal_is_told_again(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs, "_GRACES", (0.5, 20.0))
  misses = (
      "import signal, sys, time; told = []\n"
      "def end(*_):\n"
      "  told.append(1)\n"
      "  if len(told) == 2: print('told twice'); sys.exit()\n"
      "signal.signal(signal.SIGTERM, end); print('up', flush=True)\n"
      "while True: time.sleep(0.1)"
  )
  todo = job(tmp_path, "misses", misses)

  def watch(ages):
    if jobs.last_line(todo.log) == "up":
      raise RuntimeError("stop")

  with (
      pytest.raises(RuntimeError),
      contextlib.closing(run([todo], watch=watch)) as running,
  ):
    list(running)
  assert jobs.last_line(todo.log) == "told twice"


def test_what_does_not_end_is_killed(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs, "_GRACES", (0.5,))
  deaf = (
      "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
      " print('deaf', flush=True); time.sleep(60)"
  )
  todo = [job(tmp_path, "deaf", deaf)]

  def watch(ages):
    if jobs.last_line(todo[0].log) == "deaf":
      raise RuntimeError("stop")

  with (
      pytest.raises(RuntimeError),
      contextlib.closing(run(todo, watch=watch)) as running,
  ):
    list(running)
  assert not alive(todo[0].command)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
def test_jobs_end_with_a_sweep_that_is_killed(tmp_path):
  todo = job(tmp_path, "left", "import time; print('up'); time.sleep(61)")
  program = (
      "import os, pathlib; from experiments import jobs\n"
      f"todo = jobs.Job(name='left', command={todo.command!r},"
      f" log=pathlib.Path({str(todo.log)!r}))\n"
      "list(jobs.run([todo], parallel=1, environment=os.environ,"
      " watch=lambda ages: print(len(ages), flush=True)))"
  )
  sweep = subprocess.Popen(
      [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE
  )
  sweep.stdout.readline()
  assert alive(todo.command)
  sweep.send_signal(signal.SIGKILL)
  sweep.wait()
  for _ in range(100):
    if not alive(todo.command):
      return
    time.sleep(0.1)
  pytest.fail("the job outlived its sweep")


def test_the_last_line_is_of_any_log(tmp_path):
  log = tmp_path / "log"
  assert "No such file" in jobs.last_line(log)
  log.write_bytes(b"")
  assert jobs.last_line(log) == "(nothing was printed)"
  log.write_bytes(
      b"x\n" * 50_000 + b"50%\r99%\r\n\xff\x1b[31mlate " + b"y" * 999
  )
  line = jobs.last_line(log)
  assert line.startswith("\ufffd?[31mlate y") and len(line) == 300


def test_a_log_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "logs").touch()
  todo = jobs.Job(name="a", command=("true",), log=tmp_path / "logs" / "a.log")
  with pytest.raises(OSError, match="cannot write .*a.log"):
    list(run([todo]))
