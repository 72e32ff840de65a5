"""What starts jobs on TPU slices, as far as it can be read without any."""

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


def test_all_pods_of_a_job_are_started_again_together():
  spec = jobset()["spec"]
  (job,) = spec["replicatedJobs"]
  inner = job["template"]["spec"]
  assert inner["parallelism"] == inner["completions"] == 8
  assert inner["backoffLimit"] == 0  # one pod lost: the JobSet begins again
  assert inner["template"]["spec"]["restartPolicy"] == "Never"
  assert spec["failurePolicy"]["maxRestarts"] > 0
