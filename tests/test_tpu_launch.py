"""What starts jobs on TPU slices, as far as it can be read without any."""

import os
import pathlib
import re
import shutil
import signal
import string
import subprocess
import sys
import time

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


# Stands for Google Cloud: notes how it was called, CASES being of a test.
GCLOUD = """#!/bin/bash
echo "$*" >> log
name=$(grep -o 'mgrpo-[a-z]*' <<< "$*" | head -n 1)
follow() { until grep -q "$1" log; do /bin/sleep 0.05; done; }
times() { echo x >> $1.$name; wc -l < $1.$name; }
case "$*" in
  CASES
  *describe*) [ ! -e state.$name ] || cat state.$name ;;
  *create*) echo ACTIVE > state.$name ;;
  *--command=true*) ;; # SETUP
  *ssh*) exit CODE ;;
  *delete*) rm -f state.$name ;;
esac
"""
TRAINS = "--command=cd mgrpo_jax"


@pytest.fixture
def script(tmp_path):
  """Starts the script where Google Cloud is one and sleep takes no time."""

  def start(*policies, code=0, cases=""):
    gcloud = GCLOUD.replace("CODE", str(code)).replace("CASES", cases)
    for name, text in {"gcloud": gcloud, "sleep": "#!/bin/bash\n"}.items():
      (tmp_path / name).write_text(text)
      (tmp_path / name).chmod(0o755)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "log").touch()
    return subprocess.Popen(
        # Whoever runs tests may ignore signals, which would be inherited.
        ["env", "--default-signal", "bash", TPU / "queued.sh", *policies],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=VALUES
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ATTEMPTS": "3"}
        | dict.fromkeys(("PROJECT", "ZONE", "TYPE", "RUNTIME", "SHARED"), "x")
        | {"SETUP": "true", "TMPDIR": str(tmp_path / "temporary")},
    )

  return start


@pytest.fixture
def launch(script, tmp_path):
  """Runs the script to its end; gives its exit code and calls of gcloud."""

  def run(*policies, **behaviour):
    with script(*policies, **behaviour) as running:
      try:
        said = running.communicate(timeout=60)[1]
      finally:
        running.terminate()
    assert not list((tmp_path / "temporary").iterdir()), said
    return running.returncode, (tmp_path / "log").read_text()

  return run


def gave_back(log, policy="main"):
  """Whether deleting the slice is the last that is asked for it."""
  asked = [line for line in log.splitlines() if f"mgrpo-{policy}" in line]
  return f"resources delete mgrpo-{policy}" in asked[-1]


def test_slices_are_given_back_where_all_goes_well(launch):
  first = "*create*) [ $(times create) -gt 1 ] && echo ACTIVE > state.$name ;;"
  code, log = launch("main", cases=first)
  assert code == 0
  assert log.count("resources create mgrpo-main") == 2
  assert log.count("ssh mgrpo-main") == 2  # set up, trained
  assert gave_back(log)


def test_what_never_ends_well_is_told_and_costs_no_slice(launch):
  code, log = launch("main", code=75)
  assert code == 1
  assert log.count(TRAINS) == 3  # attempts
  assert gave_back(log)


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (2, 2), (75, 1)])
def test_a_slice_that_cannot_be_deleted_changes_no_code(launch, code, ends):
  assert launch("main", code=code, cases="*delete*) exit 1 ;;")[0] == ends


def test_what_would_end_so_again_is_tried_once(launch):
  code, log = launch("main", code=2)
  assert code == 2
  assert log.count(TRAINS) == 1
  assert gave_back(log)


def test_a_host_that_cannot_be_set_up_is_no_mistake_of_the_job(launch):
  code, log = launch("main", cases="*--command=true*) exit 2 ;;")
  assert code == 1
  assert log.count("--command=true") == 3  # attempts
  assert TRAINS not in log and gave_back(log)


@pytest.mark.parametrize(
    ("cases", "ends"),
    [
        ("*ssh*mgrpo-main*cd*) follow policy=researcher; exit 2 ;;", 2),
        ("*ssh*mgrpo-main*) follow policy=researcher; exit 1 ;;", 1),
        ("*create*mgrpo-main*) follow policy=researcher; exit 1 ;;", 1),
    ],
)
def test_who_waits_for_what_never_comes_is_not_started_again(
    launch, cases, ends
):
  """The researcher's command ends when main's has: its patience is over."""
  waits = (
      "*ssh*mgrpo-researcher*cd*)\n"
      "    follow 'delete mgrpo-main'; exit 75 ;;\n  "
  )
  code, log = launch("main", "researcher", cases=waits + cases)
  assert code == ends
  assert log.count(TRAINS) == (2 if ends == 2 else 1)
  assert gave_back(log) and gave_back(log, "researcher")


def test_who_is_in_the_queue_leaves_it_when_a_job_is_given_up(launch):
  """The slice would come as soon as main's is deleted."""
  queue = (
      "*create*mgrpo-researcher*) echo WAITING > state.$name ;;\n"
      "  *describe*mgrpo-researcher*)\n"
      "    if grep -q 'delete mgrpo-main' log; then echo ACTIVE\n"
      "    elif [ -e state.$name ]; then cat state.$name; fi ;;"
  )
  code, log = launch("main", "researcher", code=2, cases=queue)
  assert code == 2
  assert "ssh mgrpo-researcher" not in log
  assert gave_back(log, "researcher")


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
)
def test_who_ends_the_script_gives_slices_back(script, tmp_path, number, ends):
  """One job trains, another one's slice is in the queue."""
  cases = (
      "*create*mgrpo-researcher*) echo WAITING > state.$name ;;\n"
      "  *ssh*cd*) echo $$ > training; exec /bin/sleep 600 ;;"
  )
  log = tmp_path / "log"
  with script("main", "researcher", cases=cases) as running:
    end = time.monotonic() + 60
    while not (
        (tmp_path / "training").exists()
        and log.read_text().count("describe mgrpo-researcher") > 1
    ):
      assert time.monotonic() < end
      time.sleep(0.05)
    running.send_signal(number)
    try:
      running.communicate(timeout=60)
    finally:
      trains = int((tmp_path / "training").read_text())
      alive = pathlib.Path(f"/proc/{trains}").exists()
      if alive:
        os.kill(trains, signal.SIGKILL)
      running.kill()
  assert running.returncode == ends and not alive
  assert log.read_text().count(TRAINS) == 1
  for policy in ("main", "researcher"):
    assert gave_back(log.read_text(), policy)
  assert not list((tmp_path / "temporary").iterdir())


def test_requests_that_are_refused_end(launch):
  code, log = launch("main", cases="*create*) exit 1 ;;")
  assert code == 1
  assert log.count("resources create mgrpo-main") == 3  # attempts
  assert "ssh" not in log


def test_only_refusals_in_a_row_end(launch):
  """Two are, one stands in the queue and is gone, two are, one is granted."""
  cases = (
      "*create*) case $(times create) in\n"
      "    3) echo WAITING > state.$name ;;\n"
      "    6) echo ACTIVE > state.$name ;;\n"
      "    *) exit 1 ;; esac ;;\n"
      "  *describe*) if [ -e state.$name ]; then cat state.$name; fi\n"
      "    grep -q ACTIVE state.$name || rm -f state.$name ;;"
  )
  code, log = launch("main", cases=cases)
  assert code == 0
  assert log.count("resources create mgrpo-main") == 6
  assert log.count(TRAINS) == 1


def test_a_slice_that_never_runs_ends(launch):
  code, log = launch("main", cases="*create*) echo FAILED > state.$name ;;")
  assert code == 1
  assert log.count("resources create mgrpo-main") == 3
  assert gave_back(log)


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
