"""The other jobs of a team, run beside the process that leads."""

import contextlib
import signal
import sys
import threading
import time

import pytest

from experiments import fleet, launch
from experiments.fleet import Plan
from mgrpo_jax import atomic, workdir


@pytest.fixture
def others(tmp_path, monkeypatch):
  """Runs a job that is a program of one line, as `launch.others` does."""
  monkeypatch.setattr(fleet, "LOOK", 0.02)
  folder = tmp_path / "jobs/researcher"
  plan = Plan(
      policy="researcher", arguments=(), directory=folder, log=folder, devices=1
  )

  def run(program, said):
    command = (sys.executable, "-c", program)
    monkeypatch.setattr(fleet, "command", lambda *_, **__: command)
    return launch.others([plan], token="0123456789abcdef", tell=said.append)

  return run


@pytest.mark.parametrize(
    ("program", "starts", "ends"),
    [
        ("import sys; sys.exit(75)", 4, True),  # what failed may pass
        ("import sys; sys.exit(2)", 1, True),  # the command line is wrong
        ("import sys; sys.exit(0)", 1, False),
    ],
)
def test_a_job_is_started_again_unless_its_command_is_wrong(
    tmp_path, monkeypatch, others, program, starts, ends
):
  signals, said = threading.Event(), []
  monkeypatch.setattr(launch.os, "kill", lambda *_: signals.set())
  with contextlib.ExitStack() as stack:
    if ends:
      monkeypatch.setattr(fleet, "attend", lambda *_, **__: None)
    stack.enter_context(others(program, said))
    if ends:
      assert signals.wait(60)
  log = (tmp_path / "jobs/researcher.log").read_text()
  assert log.count("$ ") == starts
  assert signals.is_set() == ends
  where, *ended = said
  assert where.endswith(f"prints to {tmp_path}/jobs/researcher.log")
  assert len(ended) == (starts if ends else 0)


@pytest.fixture
def interrupted():
  """SIGTERM interrupts, as `cli.run` has it; gives how often it did."""
  signals = []

  def interrupt(*_):
    signals.append(True)
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  yield signals
  signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize(("code", "ends"), [(2, 2), (75, 75), (1, 75)])
def test_the_run_ends_in_order_with_the_job_that_cannot_go_on(
    tmp_path, monkeypatch, others, interrupted, code, ends, closes
):
  monkeypatch.setattr(fleet, "_RESTARTS", 0)
  closed = []
  with pytest.raises(fleet.FleetError, match="researcher ended") as told:
    with others(f"print('wrong'); raise SystemExit({code})", []):
      try:
        time.sleep(60)
      finally:
        closed.append(True)
        if not closes:
          raise OSError("the disk is full")
  log = tmp_path / "jobs/researcher.log"
  assert str(told.value).endswith(f"code {code}: wrong; see {log}")
  assert told.value.code == ends and closed and len(interrupted) == 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_who_fails_while_a_job_is_looked_at_ends_so(
    monkeypatch, others, interrupted, error
):
  looks, ended = threading.Event(), threading.Event()

  def look(_):
    looks.set()
    ended.wait(60)
    time.sleep(0.5)  # by then the leader waits for this
    raise fleet.FleetError("job of policy 'researcher' ended", code=2)

  stopped = []
  monkeypatch.setattr(fleet.Group, "look", look)
  monkeypatch.setattr(launch.jobs, "stop", stopped.extend)
  said = []
  with pytest.raises(error, match="of the leader"):
    with others("import time; time.sleep(60)", said):
      assert looks.wait(60)
      ended.set()
      raise error("of the leader")
  (process,) = stopped
  process.kill()
  process.wait()
  assert not interrupted and "researcher' ended" in said[-1]


def test_a_user_who_ends_the_run_is_not_told_of_jobs(others):
  with pytest.raises(KeyboardInterrupt):
    with others("import time; time.sleep(60)", []):
      raise KeyboardInterrupt


def test_a_job_that_is_cut_off_is_told(monkeypatch, others):
  monkeypatch.setattr(fleet, "_GRACE", 0.2)
  with pytest.raises(fleet.CutOffError, match="jobs of researcher"):
    with others("import time; time.sleep(60)", []):
      pass


def test_no_job_is_doubled(tmp_path, monkeypatch, others):
  """One of an earlier command still runs: it is waited for, then named."""
  monkeypatch.setattr(fleet, "_LEFT", 0.2)
  said, folder = [], tmp_path / "jobs/researcher"
  with others("pass", said):
    pass
  assert len(said) == 1 and f"runs in {folder}" in said.pop()
  assert not folder.exists()
  with atomic.exclusive(folder / workdir.LOCK_FILE):
    with pytest.raises(atomic.StorageError, match="researcher is in use"):
      with others("pass", said):
        pass
  assert len(said) == 1 and "waits" in said[0]
  with others("pass", said):
    pass
  assert (tmp_path / "jobs/researcher.log").read_text().count("$ ") == 2
