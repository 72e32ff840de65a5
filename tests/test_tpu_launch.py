"""What starts jobs on TPU slices, as far as it can be read without any."""

import os
import pathlib
import re
import shutil
import string
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
TPU = ROOT / "experiments/tpu"
VALUES = {
    "POLICY": "main",
    "HOSTS": "8",
    "CHIPS": "4",
    "ACCELERATOR": "tpu-v6e-slice",
    "TOPOLOGY": "4x8",
    "IMAGE": "image",
    "CONFIG": "configs/pods/qwen3_8b.py",
    "BUCKET": "gs://bucket/run",
}
PARSE = """
import sys
from experiments import cli, train
left = cli.parse(["train", *sys.argv[1:]])
assert left == ["train"], left
assert train._POLICY.value == "main" and train._PROCESSES.value == 0
assert train._CONFIG.value.policies.main
"""


def jobset():
  """The file as envsubst fills it in: nothing else than our variables."""
  text = (TPU / "jobset.yaml").read_text()
  return yaml.safe_load(string.Template(text).safe_substitute(VALUES))


def of_queued():
  """The flags that the script gives every host."""
  text = (TPU / "queued.sh").read_text()
  (command,) = re.findall(r'run="(.*?)"\n', text, re.DOTALL)
  command = command.replace("\\\n", " ").replace("$1", "main")
  command = re.sub(r"\\\$\(.*?\)", "10.0.0.2", command)
  command = command.replace("$SHARED", "/mnt/shared")
  named = string.Template(command).substitute(VALUES)
  return named.partition("experiments.train")[2].split()


def of_jobset():
  pod = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  (container,) = pod["spec"]["containers"]
  assert container["command"][:3] == ["python", "-m", "experiments.train"]
  return container["command"][3:]


@pytest.mark.parametrize("flags", [of_queued, of_jobset])
def test_the_command_takes_the_flags_that_hosts_are_given(flags):
  found = flags()
  assert len(found) >= 7 and all(one.startswith("--") for one in found)
  assert not any("${" in one for one in found)
  result = subprocess.run(
      [sys.executable, "-c", PARSE, *found],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
  )
  assert result.returncode == 0, result.stderr


def test_the_script_is_one():
  subprocess.run(["bash", "-n", TPU / "queued.sh"], check=True, timeout=60)


def test_without_its_variables_the_script_asks_for_no_slice():
  result = subprocess.run(
      [shutil.which("bash"), TPU / "queued.sh", "main"],
      capture_output=True,
      text=True,
      timeout=60,
      env={"PATH": "/nowhere"},
      check=False,
  )
  assert result.returncode and "PROJECT" in result.stderr


GCLOUD = """#!/bin/bash
echo "$*" >> log
case "$*" in
  *describe*) [ -e state ] && cat state ;;
  *create*)
    [ ! -e refused ] || exit 1
    if [ -e broken ]; then rm broken; exit 1; fi
    echo ACTIVE > state ;;
  *ssh*) exit "$(cat code)" ;;
  *delete*) rm -f state ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
  """Runs the script where Google Cloud is a script and sleep takes no time."""
  for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/bash\n"}.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)

  def run(*policies, code):
    (tmp_path / "code").write_text(str(code))
    done = subprocess.run(
        [shutil.which("bash"), TPU / "queued.sh", *policies],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=VALUES
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ATTEMPTS": "3"}
        | dict.fromkeys(("PROJECT", "ZONE", "TYPE", "RUNTIME", "SHARED"), "x")
        | {"SETUP": "true"},
        check=False,
    )
    return done.returncode, (tmp_path / "log").read_text()

  return run


def test_slices_are_given_back_where_all_goes_well(launch, tmp_path):
  (tmp_path / "broken").touch()  # so is the first request for a slice
  code, log = launch("main", code=0)
  assert code == 0
  assert log.count("resources create mgrpo-main") == 2
  assert log.count("ssh mgrpo-main") == 2  # set up, trained
  assert log.splitlines()[-1].startswith("compute tpus queued-resources delete")


def test_what_never_ends_well_is_told_and_costs_no_slice(launch, tmp_path):
  code, log = launch("main", "researcher", code=75)
  assert code == 1
  for policy in ("main", "researcher"):
    assert log.count(f"ssh mgrpo-{policy}") == 3  # attempts
    assert f"delete mgrpo-{policy}" in log


def test_what_would_end_so_again_is_tried_once(launch, tmp_path):
  text = (tmp_path / "gcloud").read_text()
  set_up = "*--command=true*) ;;\n  *ssh*)"
  (tmp_path / "gcloud").write_text(text.replace("*ssh*)", set_up))
  code, log = launch("main", code=2)
  assert code == 2
  assert log.count("--command=cd mgrpo_jax") == 1
  assert log.splitlines()[-1].startswith("compute tpus queued-resources delete")


def test_who_waits_for_what_never_comes_is_not_started_again(launch, tmp_path):
  """The researcher's command ends when main's has: its patience is over."""
  text = (tmp_path / "gcloud").read_text()
  waits = (
      "*--command=true*) ;;\n"
      "  *ssh*mgrpo-researcher*)\n"
      "    until grep -q 'delete mgrpo-main' log; do :; done; exit 75 ;;\n"
      "  *ssh*)"
  )
  (tmp_path / "gcloud").write_text(text.replace("*ssh*)", waits))
  code, log = launch("main", "researcher", code=2)
  assert code == 2
  assert log.count("--command=cd mgrpo_jax") == 2  # one of each
  assert "delete mgrpo-researcher" in log


def test_requests_that_are_refused_end(launch, tmp_path):
  (tmp_path / "refused").touch()
  code, log = launch("main", code=0)
  assert code == 1
  assert log.count("resources create mgrpo-main") == 3  # attempts
  assert "ssh" not in log


def test_a_slice_that_never_runs_ends(launch, tmp_path):
  text = (tmp_path / "gcloud").read_text()
  (tmp_path / "gcloud").write_text(text.replace("echo ACTIVE", "echo FAILED"))
  code, log = launch("main", code=0)
  assert code == 1
  assert log.count("resources create mgrpo-main") == 3
  assert log.splitlines()[-1].startswith("compute tpus queued-resources delete")


def test_pods_that_would_end_so_again_end_the_jobset():
  spec = jobset()["spec"]
  inner = spec["replicatedJobs"][0]["template"]["spec"]
  (rule,) = inner["podFailurePolicy"]["rules"]
  (container,) = inner["template"]["spec"]["containers"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
      "containerName": container["name"],
      "operator": "In",
      "values": [2],
  }
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule == {
      "action": "FailJobSet",
      "onJobFailureReasons": ["PodFailurePolicy"],
  }


def test_all_pods_of_a_job_are_started_again_together():
  spec = jobset()["spec"]
  (job,) = spec["replicatedJobs"]
  inner = job["template"]["spec"]
  assert inner["parallelism"] == inner["completions"] == 8
  assert inner["backoffLimit"] == 0  # one pod lost: the JobSet begins again
  assert inner["template"]["spec"]["restartPolicy"] == "Never"
  assert spec["failurePolicy"]["maxRestarts"] > 0
