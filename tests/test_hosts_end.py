"""A job of two processes that is told to end does, in order and together."""

import contextlib
import signal
import socket
import subprocess
import time

import commands
import pytest

from mgrpo_jax import ownership, store
from mgrpo_jax.decoupled import members

POLICY = "researcher"
TRAIN = ("-m", "experiments.train")
TOLD = """
import os, signal
from experiments import cli, train
from mgrpo_jax.hosts import group

done = {after}

def tell():
  found = done()
  os.kill(os.getpid(), signal.SIGTERM)
  return found

{after} = tell
cli.run(train.main, required=("config", "workdir"), resumes=True)
"""


@pytest.fixture
def taken(tmp_path):
  """The bucket is another run's."""
  bucket = store.open_folder(tmp_path / "bucket")
  ownership.claim(bucket, "another", {}, jobs=True)


def begin(tmp_path, number, meeting, program=TRAIN, more=(), **streams):
  """Starts a process of a job of two."""
  return commands.start(
      *program,
      commands.SMOKE,
      *(one for one in commands.SPREAD if "hosts" not in one),
      f"--policy={POLICY}",
      f"--bucket={(tmp_path / 'bucket').as_uri()}",
      f"--workdir={tmp_path / 'run'}",
      f"--coordinator={meeting}",
      "--processes=2",
      f"--process={number}",
      *more,
      devices=2,
      **streams,
  )


@pytest.fixture
def meeting():
  """Where the processes of a job meet."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def first(tmp_path, meeting):
  """Starts process 0, for which no other one comes."""
  with contextlib.ExitStack() as stack:

    def run(program=TRAIN):
      process = stack.enter_context(begin(tmp_path, 0, meeting, program))
      stack.callback(process.kill)
      return process

    yield run


@pytest.fixture
def job(tmp_path, meeting, request):
  """Its two processes, and what they print; the first as the test has it."""
  first = getattr(request, "param", {})
  logs = [tmp_path / f"{number}.log" for number in range(2)]
  processes = []
  for number, log in enumerate(logs):
    with open(log, "w") as errors:
      processes.append(
          begin(
              tmp_path,
              number,
              meeting,
              **({} if number else first),
              stderr=errors,
          )
      )
  try:
    yield processes, logs
  finally:
    for process in processes:
      process.kill()
      process.wait()


@pytest.fixture
def waiting(job, tmp_path):
  """Both when process 0 waits for the other policy's job."""
  processes, logs = job
  bucket = store.open_folder(tmp_path / "bucket")
  limit = time.monotonic() + 600
  while not ((record := members.read(bucket, POLICY)) and record.waits):
    codes = [one.poll() for one in processes]
    assert codes == [None, None], [log.read_text() for log in logs]
    assert time.monotonic() < limit
    time.sleep(0.1)
  return job


@pytest.fixture
def beside():
  """As what a shell starts with `&`: without Ctrl-C."""
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  yield
  signal.signal(signal.SIGINT, before)


def wait_for(path, process):
  """Waits until a file is there."""
  limit = time.monotonic() + 600
  while not path.exists():
    assert process.poll() is None and time.monotonic() < limit, f"no {path}"
    time.sleep(0.1)


def listens(meeting):
  """Whether process 0 waits for the others there."""
  host, _, port = meeting.rpartition(":")
  with socket.socket() as client:
    return client.connect_ex((host, int(port))) == 0


def codes(processes, seconds=60):
  """With what they end, within what launchers give them."""
  try:
    return [process.wait(seconds) for process in processes]
  except subprocess.TimeoutExpired:
    return [process.poll() for process in processes]


def test_both_close_what_is_open_when_both_are_told(waiting):
  processes, logs = waiting
  for process in processes:
    process.send_signal(signal.SIGTERM)
  assert codes(processes) == [143, 143]
  for log in logs:
    text = log.read_text()
    assert "interrupted; the same command continues" in text
    assert "Traceback" not in text


def test_the_other_ends_when_process_0_is_told(waiting):
  processes, logs = waiting
  processes[0].send_signal(signal.SIGTERM)
  assert codes(processes) == [143, 143]
  assert "process 0 ended: " in logs[1].read_text()


@pytest.mark.parametrize(
    "job",
    [{"program": ("-c", TOLD.format(after="group.open_channel"))}],
    indirect=True,
)
def test_the_other_ends_where_process_0_is_told_before_it_begins(job):
  processes, logs = job
  assert codes(processes, seconds=90) == [143, 143]
  assert "process 0 ended: " in logs[1].read_text()


def test_who_waits_for_the_others_ends_at_once_when_it_is_told(first, meeting):
  """Python heeds no signal while `jax.distributed` waits."""
  process = first()
  limit = time.monotonic() + 100
  while not listens(meeting):
    assert process.poll() is None and time.monotonic() < limit
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert codes([process], seconds=30) == [-signal.SIGTERM]


def test_who_is_told_before_it_joins_waits_for_nobody(first):
  process = first(("-c", TOLD.format(after="train._check_flags")))
  assert codes([process]) == [143]


def test_both_end_with_the_code_of_process_0(taken, job):
  processes, logs = job
  assert codes(processes, seconds=300) == [2, 2]
  assert "a run with another config" in logs[1].read_text()


@pytest.mark.parametrize(
    "job", [{"more": ["--config.jobs.patience=-1.0"]}], indirect=True
)
def test_both_end_where_process_0_alone_cannot_begin(job):
  processes, logs = job
  assert codes(processes, seconds=90) == [2, 2]
  assert "process 0 ended: config." in logs[1].read_text()


def test_a_launcher_that_is_told_ends_soon_and_goes_on(tmp_path, beside):
  steps = tmp_path / "bucket" / "steps"
  logs = [
      tmp_path / "jobs" / f"{policy}.{process}.log"
      for policy in ("main", POLICY)
      for process in range(2)
  ]
  for number in range(2):
    before = {int(one.stem) for one in steps.glob("*.json")} or {-1}
    training = commands.train_spread(f"--workdir={tmp_path}", "--launch=local")
    try:
      wait_for(steps / f"{max(before) + 1}.json", training)  # amid the next
      training.terminate()
      # Who compiles hears of it afterwards; after 60 s he is killed.
      assert codes([training], seconds=90) == [143]
    finally:
      commands.end(training)
    for log in logs:  # of all that ran here, and none was killed
      said = log.read_text().count("interrupted; the same command continues")
      assert said == number + 1, log.read_text()
