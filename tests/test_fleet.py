"""Jobs of several processes on one machine: who is started again with whom."""

import pathlib

import pytest

from configs import decoupled_quickstart
from experiments import fleet, joining
from experiments.fleet import FleetError, Plan

# Stands for Python: notes how it was called, then does what its file says.
SCRIPT = """#!/bin/bash
for one; do case $one in
  --policy=*) policy=${one#*=} ;;
  --process=*) process=${one#*=} ;;
esac; done
cd DIRECTORY
echo "$@ TOKEN=$MGRPO_JOBS_TOKEN ${XLA_FLAGS##* }" >> $policy.$process
starts=$(wc -l < $policy.$process)
. ./$policy.does
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
  """Runs two jobs of two processes each that do what files say."""
  program = tmp_path / "python"
  program.write_text(SCRIPT.replace("DIRECTORY", str(tmp_path)))
  program.chmod(0o755)
  monkeypatch.setattr(fleet.sys, "executable", str(program))
  monkeypatch.setattr(fleet, "LOOK", 0.05)
  monkeypatch.setattr(fleet, "SETTLING", 0.2)

  def run(**does):
    for name, text in does.items():
      (tmp_path / f"{name}.does").write_text(text)
    plans = [
        Plan(
            policy=name,
            arguments=(f"--policy={name}",),
            directory=tmp_path / "runs" / name,
            log=tmp_path / "logs" / name,
            devices=2,
        )
        for name in does
    ]
    fleet.run(plans, hosts=2, token="0123456789abcdef")

  def calls(process):
    lines = (tmp_path / process).read_text().splitlines()
    return [
        dict(one.split("=", 1) for one in line.split() if "=" in one)
        for line in lines
    ]

  return run, calls


def test_the_processes_of_a_job_begin_again_together(jobs, capsys):
  run, calls = jobs
  run(
      main="until [ -e over ]; do sleep 0.05; done; echo all is well",
      researcher="""
        if [ $starts = 1 ]; then
          [ $process = 0 ] && sleep 600
          echo no memory; exit 3
        fi
        touch over""",
  )
  assert len(calls("main.0")) == len(calls("main.1")) == 1
  pairs = list(zip(calls("researcher.0"), calls("researcher.1"), strict=True))
  assert len(pairs) == 2
  meetings = [[one["--coordinator"] for one in pair] for pair in pairs]
  assert all(one == other for one, other in meetings)
  assert len({one for one, _ in meetings}) == 2  # nobody waits for the dead
  said = capsys.readouterr()
  assert "all is well" in said.out
  assert "researcher.1 ended with code 3: no memory" in said.err


def test_every_process_is_told_its_place(jobs):
  run, calls = jobs
  run(main="exit 0", researcher="exit 0")
  for name in ("main", "researcher"):
    for number in range(2):
      (call,) = calls(f"{name}.{number}")
      assert call["--process"] == str(number) and call["--processes"] == "2"
      assert call["--coordinator"].startswith("127.0.0.1:")
      assert call["TOKEN"] == "0123456789abcdef"
      assert call["--xla_force_host_platform_device_count"] == "2"


@pytest.mark.parametrize(
    ("code", "starts", "ends"), [(2, 1, 2), (75, 4, 75), (3, 4, 75)]
)
def test_what_does_not_mend_ends_all(jobs, code, starts, ends):
  run, calls = jobs
  with pytest.raises(
      FleetError, match=f"researcher.*code {code}: wrong"
  ) as told:
    run(main="sleep 600", researcher=f"echo wrong; exit {code}")
  assert told.value.code == ends
  assert max(len(calls(f"researcher.{n}")) for n in range(2)) == starts


def test_code_2_counts_where_another_process_ended_otherwise(jobs, monkeypatch):
  monkeypatch.setattr(fleet, "SETTLING", 60.0)
  run, calls = jobs
  with pytest.raises(FleetError, match="researcher.1 .*code 2: wrong") as told:
    run(
        main="sleep 600",
        researcher="[ $process = 0 ] && exit 1; echo wrong; exit 2",
    )
  assert told.value.code == 2
  assert len(calls("researcher.1")) == 1


def test_devices_are_shared_out_among_hosts(tmp_path):
  config = decoupled_quickstart.get_config("smoke")
  config.policies.main.mesh.update(fsdp=2, tensor=2)
  config.policies.researcher.mesh.update(data=2)
  config.publish.bucket = "file:///b"
  arguments = {"hosts": 2, "workdir": tmp_path, "arguments": ["--config=c.py"]}
  made = fleet.plans(config, ["main", "researcher"], **arguments)
  assert [one.devices for one in made] == [2, 1]
  folders = [one.arguments[1] for one in made]
  assert folders == [
      f"--workdir={tmp_path}",
      f"--workdir={tmp_path}/jobs/researcher",
  ]
  config.policies.researcher.mesh.data = 1
  with pytest.raises(ValueError, match="researcher.mesh: takes 1 devices"):
    fleet.plans(config, ["main", "researcher"], **arguments)


def test_virtual_devices_are_only_where_there_are_no_others():
  path = pathlib.Path("log")
  plan = Plan(policy="main", arguments=(), directory=path, log=path, devices=3)
  told = fleet.environment(plan, "0123456789abcdef", virtual=False)
  assert told == {joining.TOKEN: "0123456789abcdef"}
  told = fleet.environment(plan, "0123456789abcdef", virtual=True)
  assert told["XLA_FLAGS"].endswith("device_count=3")


def test_a_job_that_stays_behind_is_named(jobs, monkeypatch):
  run, _ = jobs
  monkeypatch.setattr(fleet, "_GRACE", 0.1)
  with pytest.raises(FleetError, match="jobs of researcher do not end") as told:
    run(main="exit 0", researcher="sleep 20")  # else it ends well
  assert told.value.code == 75  # the same command goes on with it


@pytest.mark.parametrize("code", [2, 75])
def test_a_fleet_ends_with_the_code_of_what_ended_it(capsys, code):
  with pytest.raises(SystemExit) as ended:
    with fleet.failures():
      raise FleetError("job of policy main.0 ended", code=code)
  assert ended.value.code == code
  assert capsys.readouterr().err == "error: job of policy main.0 ended\n"
