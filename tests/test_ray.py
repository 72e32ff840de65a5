"""Jobs on a Ray cluster of several nodes, one of which is lost."""

import concurrent.futures
import functools
import itertools
import time
import types

import pytest
from commands import assert_ended_alike, environment, train_spread

from experiments import fleet, ray_fleet
from experiments.fleet import FleetError, Plan
from experiments.ray_fleet import Slice

TRIES = 3
DEADLINE = 300  # seconds; machines that run tests are busy
# Stands for Python: notes how it was called, then does what its file says.
SCRIPT = """#!/bin/bash
process=0
for one; do case $one in
  --policy=*) policy=${one#*=} ;;
  --process=*) process=${one#*=} ;;
esac; done
cd DIRECTORY
echo "$@ TOKEN=$MGRPO_JOBS_TOKEN" >> $policy.$process
starts=$(wc -l < $policy.$process)
. ./$policy.does
"""
WAITS = "until [ -e over ]; do sleep 0.1; done"


@pytest.fixture(scope="module")
def cluster():
  """A head and three nodes of one place each, with a user's environment."""
  pytest.importorskip("ray", reason="ray is missing: pip install -e .[ray]")
  from ray.cluster_utils import Cluster

  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("XLA_FLAGS", raising=False)
    for name, value in environment().items():
      patch.setenv(name, value)
    patch.setenv("RAY_worker_niceness", "0")  # else they wait for other tests
    yield from nodes(Cluster)


def nodes(cluster):
  """A cluster that lasts until it is asked for another; some do not start."""
  for _ in range(TRIES):
    made = cluster()
    try:
      made.add_node(num_cpus=0, include_dashboard=False)  # the head
      for _ in range(3):
        made.add_node(num_cpus=1)
    except Exception as error:  # ray raises no narrower one
      made.shutdown()
      if "timed out during startup" not in str(error):
        raise
      continue
    yield made
    made.shutdown()
    return
  pytest.skip("ray's nodes do not start within the 30 s that it gives them")


@pytest.fixture
def run(cluster, tmp_path, monkeypatch):
  """Runs jobs of one process each that do what files say."""
  program = tmp_path / "python"
  program.write_text(SCRIPT.replace("DIRECTORY", str(tmp_path)))
  program.chmod(0o755)
  monkeypatch.setattr(fleet.sys, "executable", str(program))

  def run(**does):
    for name, text in does.items():
      (tmp_path / f"{name}.does").write_text(text)
    plans = [
        Plan(
            policy=name,
            arguments=(f"--policy={name}",),
            directory=tmp_path / "runs" / name,
            log=tmp_path / "logs" / name,
            devices=1,
        )
        for name in does
    ]
    ray_fleet.run(
        plans,
        hosts=1,
        token="0123456789abcdef",
        address=cluster.address,
        tpu=None,
    )

  return run


def until(condition, what):
  end = time.monotonic() + DEADLINE
  while not (found := condition()):
    assert time.monotonic() < end, f"no {what}"
    time.sleep(0.1)
  return found


def calls(path):
  return path.read_text().splitlines() if path.exists() else []


def node_of(cluster, policy, process=0):
  """The node on which a process of a job is."""
  import ray

  groups = ray.util.placement_group_table().values()
  (group,) = [
      one
      for one in groups
      if one["name"] == policy and one["state"] == "CREATED"
  ]
  number = group["bundles_to_node_id"][process]
  return next(one for one in cluster.worker_nodes if one.node_id == number)


def test_a_job_goes_on_elsewhere_where_its_node_is_lost(cluster, run, tmp_path):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(run, main=WAITS, researcher=WAITS)
    until(
        lambda: running.done()
        or (calls(tmp_path / "main.0") and calls(tmp_path / "researcher.0")),
        "start",
    )
    assert not running.done(), running.result()
    cluster.remove_node(node_of(cluster, "researcher"), allow_graceful=False)
    again = until(
        lambda: running.done() or len(calls(tmp_path / "researcher.0")) > 1,
        "second start",
    )
    (tmp_path / "over").touch()
    running.result(timeout=DEADLINE)
  assert again and len(calls(tmp_path / "main.0")) == 1
  first, second = calls(tmp_path / "researcher.0")
  for call in (first, second):
    assert "--listen=" in call and "--process" not in call
    assert "TOKEN=0123456789abcdef" in call


@pytest.fixture
def train():
  """Starts to train; what still runs is ended with its jobs."""
  started = []

  def train(*arguments):
    started.append(train_spread(*arguments))
    return started[-1]

  yield train
  for process in started:
    process.terminate()
    process.wait(DEADLINE)


def test_training_goes_on_where_a_node_is_lost(
    steady, cluster, train, tmp_path
):
  """Two policies on two nodes each; a fifth takes the lost one's place.

  Compared with as many processes without Ray, for one process may add the four
  terms of a global norm in another order.
  """
  import ray

  while len(cluster.worker_nodes) < 5:
    cluster.add_node(num_cpus=1)
  address = f"--ray_address={cluster.address}"
  running = train(f"--workdir={tmp_path}", "--launch=ray", address)
  second = tmp_path / "bucket/steps/1.json"
  until(lambda: second.exists() or running.poll() is not None, "second step")
  assert running.poll() is None
  with ray.init(address=cluster.address, log_to_driver=False):
    lost = node_of(cluster, "researcher", process=1)
    cluster.remove_node(lost, allow_graceful=False)
  assert running.wait(DEADLINE) == 0
  assert_ended_alike(tmp_path, steady)
  log = (tmp_path / "jobs/researcher.1.log").read_text()
  assert log.count("$ ") == 2  # it was started again


def test_what_does_not_mend_ends_all(run):
  with pytest.raises(FleetError, match="job of 'researcher' .* code 2") as told:
    run(main="sleep 600", researcher="exit 2")
  assert told.value.code == 2


def test_a_job_that_stays_behind_is_named(run, monkeypatch, capsys):
  monkeypatch.setattr(fleet, "_GRACE", 0.1)
  with pytest.raises(FleetError, match="jobs of researcher do not") as told:
    run(main="exit 0", researcher="sleep 30")  # else it ends well
  assert told.value.code == 75
  said = capsys.readouterr().err
  for policy in ("main", "researcher"):
    assert said.count(f"'{policy}': waits for its 1 places") == 1


def test_what_no_node_can_start_is_told_at_once(run, tmp_path):
  (tmp_path / "logs").touch()  # where they would be
  began = time.monotonic()
  with pytest.raises(FleetError, match="'main' cannot be started") as told:
    run(main="exit 0", researcher="exit 0")
  assert f"cannot write {tmp_path}/logs/main.log" in str(told.value)
  assert "\n" not in str(told.value) and told.value.code == 75
  assert time.monotonic() - began < ray_fleet._PLACING / 2


def test_a_folder_that_a_node_lacks_is_told_at_once(run, monkeypatch):
  monkeypatch.setattr(ray_fleet.os, "getcwd", lambda: "/nowhere")
  with pytest.raises(FleetError, match="'main' cannot .*/nowhere"):
    run(main="exit 0", researcher="exit 0")


def test_who_waits_for_ray_says_so_once(tmp_path, monkeypatch, capsys):
  pytest.importorskip("ray", reason="ray is missing: pip install -e .[ray]")
  from ray.exceptions import ActorUnavailableError

  monkeypatch.setattr(ray_fleet, "_LOOK", 0.01)
  monkeypatch.setattr(ray_fleet, "_PLACING", 0.2)
  tries = []

  def begin(_):
    tries.append(1)
    raise ActorUnavailableError("it is elsewhere", None)

  monkeypatch.setattr(ray_fleet._Group, "_begin", begin)
  group = object.__new__(ray_fleet._Group)
  group.policy = "main"
  with pytest.raises(FleetError, match="not bring back .*'main'.*elsewhere"):
    group.start()
  (line,) = capsys.readouterr().err.splitlines()
  assert "'main': waits for Ray" in line and len(tries) > 2


def test_a_host_that_is_started_again_leaves_no_process_behind(
    tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # where a host goes, too
  host = ray_fleet.Host(str(tmp_path), {})
  started = []
  for _ in range(2):
    host.start(["sleep", "600"], str(tmp_path / "log"))
    started.append(host._running.process)
  assert started[0].wait(60) == -9 and started[1].poll() is None
  host.stop(kill=True)
  assert started[1].wait(60) == -9


def test_without_a_cluster_the_command_is_wrong(tmp_path, monkeypatch):
  pytest.importorskip("ray", reason="ray is missing: pip install -e .[ray]")
  monkeypatch.delenv("RAY_ADDRESS", raising=False)
  # Other tests' clusters on this machine are none of ours.
  monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
  monkeypatch.setattr(
      "ray._private.services.find_gcs_addresses", functools.cache(set)
  )
  with pytest.raises(
      FleetError, match="--ray_address=auto: .*not find"
  ) as told:
    ray_fleet.run([], hosts=1, token="", address="auto", tpu=None)
  assert told.value.code == 2


@pytest.mark.parametrize("text", ["v6e:3x3", "v99:4x4"])
def test_a_slice_that_is_none_is_a_mistake_in_the_command(text):
  pytest.importorskip("ray", reason="ray is missing: pip install -e .[ray]")
  with pytest.raises(FleetError, match=f"--ray_tpu={text}: ") as told:
    with ray_fleet._reserved(4, ray_fleet.parse_slice(text), "main"):
      pass
  assert told.value.code == 2


def test_a_slice_is_waited_for_as_long_as_is_said(monkeypatch):
  pytest.importorskip("ray", reason="ray is missing: pip install -e .[ray]")
  from ray.util import tpu

  waited = []

  def reserve(*_, timeout_s):
    waited.append(timeout_s)
    raise TimeoutError("Failed to reserve")

  monkeypatch.setattr(tpu, "reserve_tpu_slice", reserve)
  with pytest.raises(FleetError, match="no slice for 'main': Failed") as told:
    with ray_fleet._reserved(4, ray_fleet.parse_slice("v6e:4x4"), "main"):
      pass
  assert told.value.code == 75 and waited == [ray_fleet._PLACING]


class Answer:
  """A method of an actor that answers after a while, as a task of its own."""

  def __init__(self, seconds):
    import ray

    def stop(kill):
      time.sleep(seconds)

    self.remote = ray.remote(num_cpus=0)(stop).remote


def test_hosts_are_told_to_end_at_the_same_time(cluster, monkeypatch):
  """One that does not answer costs the others nothing."""
  import ray

  monkeypatch.setattr(ray_fleet, "_ANSWER", 5.0)
  with ray.init(address=cluster.address, log_to_driver=False):
    groups = []
    for _ in range(2):
      group = object.__new__(ray_fleet._Group)
      slow = types.SimpleNamespace(stop=Answer(60))
      group._hosts = [slow, slow]
      groups.append(group)
    began = time.monotonic()
    ray_fleet._stop(groups, kill=False)
    assert 4 < time.monotonic() - began < 9  # once, not for each


def test_who_dies_too_often_is_told_with_its_log(tmp_path):
  plan = Plan(
      policy="main",
      arguments=(),
      directory=tmp_path,
      log=tmp_path / "main",
      devices=1,
  )
  plan.log_of(0, 2).write_text("no memory\n")
  group = object.__new__(ray_fleet._Group)
  group.policy, group._plan, group._hosts, group._left = "main", plan, [0, 1], 0
  with pytest.raises(FleetError) as told:
    group._again("code 1")
  assert str(told.value) == (
      f"job of 'main': code 1: no memory; see {tmp_path}/main*.log"
  )


@pytest.mark.parametrize(
    "second", [[None, 75, 75], [None, None, 75], [None, None, None]]
)
def test_code_2_counts_where_another_process_ended_before(
    second, tmp_path, monkeypatch
):
  codes = [[1, 1, 1], second, [None, 2, 2]]
  monkeypatch.setattr(ray_fleet, "_LOOK", 0.01)
  monkeypatch.setattr(ray_fleet.fleet, "SETTLING", 0.1)
  monkeypatch.setattr(ray_fleet, "_get", list)
  group = object.__new__(ray_fleet._Group)
  group.policy, group._over, group._left = "main", False, 0
  group._plan = types.SimpleNamespace(log=tmp_path / "main")
  group._hosts = [
      types.SimpleNamespace(
          code=types.SimpleNamespace(
              remote=itertools.chain(one, itertools.repeat(one[-1])).__next__
          )
      )
      for one in codes
  ]
  with pytest.raises(FleetError, match="main.* ended with code 2") as told:
    group.look()
  assert told.value.code == 2


def test_who_goes_on_without_the_others_is_not_waited_for(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(ray_fleet, "_LOOK", 0.01)
  monkeypatch.setattr(ray_fleet.fleet, "SETTLING", 0.05)
  monkeypatch.setattr(ray_fleet, "_get", list)
  group = object.__new__(ray_fleet._Group)
  group.policy, group._over = "main", False
  again = []
  group._again = again.append
  group._hosts = [
      types.SimpleNamespace(
          code=types.SimpleNamespace(remote=lambda code=code: code)
      )
      for code in (None, 75)
  ]
  group.look()
  assert again == ["code 75"]


def test_a_slice_is_read_or_refused():
  assert ray_fleet.parse_slice("") is None
  assert ray_fleet.parse_slice("v6e:4x4") == Slice(
      version="v6e", topology="4x4"
  )
  for text in ("v6e", "v6e:", "v6e:4by4"):
    with pytest.raises(ValueError, match="VERSION:TOPOLOGY"):
      ray_fleet.parse_slice(text)
