"""Jobs of a team as a user starts them, and what is refused."""

import json
import signal
import socket
import threading
import time

import pytest
import replicated
from commands import SMOKE, SPREAD, command

from experiments import cli, joining, launch
from mgrpo_jax import ownership, store
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.replicas import records
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.work import Budget


def test_arguments_of_the_recipe_are_handed_on():
  given = [
      "--config=configs/a.py:smoke",
      "--workdir=x",
      "--config.seed=3",
      "--config.loss.clip_low",
      "0.1",
      "--launch=local",
      "-config.name=other",
  ]
  assert launch.recipe_arguments(given) == [
      "--config=configs/a.py:smoke",
      "--config.seed=3",
      "--config.loss.clip_low",
      "0.1",
      "-config.name=other",
  ]


def test_where_a_token_is_needed_it_is_said_how_to_give_one():
  for host, token in (("0.0.0.0", ""), ("10.0.0.1", ""), ("127.0.0.1", "no")):
    with pytest.raises(ValueError, match="--token_file=FILE .*JOBS_TOKEN"):
      cli.check_exposure(host, token, cli.TOKEN_ADVICE)
  cli.check_exposure("127.0.0.1", "", cli.TOKEN_ADVICE)


def test_a_token_is_read_made_or_found_in_the_environment(
    tmp_path, monkeypatch
):
  monkeypatch.delenv(joining.TOKEN, raising=False)
  assert joining.token("", new=False) == ""
  made = {joining.token("", new=True) for _ in range(2)}
  assert len(made) == 2 and all(len(one) == 32 for one in made)
  monkeypatch.setenv(joining.TOKEN, "from outside")
  assert joining.token("", new=False) == "from outside"
  file = tmp_path / "token"
  file.write_text(" 0123456789abcdef\n")
  assert joining.token(str(file), new=False) == "0123456789abcdef"
  file.write_text("\n")
  with pytest.raises(ValueError, match="is empty"):
    joining.token(str(file), new=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "0.0.0.0", "token": "0123456789abcdef"}, "--reached_as"),
        ({"token": "short"}, "at least 16"),
        ({"port": 70_000}, "allowed: 0 to 65535"),
    ],
)
def test_a_place_that_is_open_or_cannot_be_reached_is_refused(changes, told):
  place = {"host": "127.0.0.1", "port": 0, "reached_as": "", "token": ""}
  with pytest.raises(ValueError, match=told):
    with joining.placed("main", **{**place, **changes}):
      pass


def test_a_port_that_another_has_may_become_free():
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(ServerError, match=f"--port={port}: Address already in"):
      with joining.placed(
          "main", host="127.0.0.1", port=port, reached_as="", token=""
      ):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "10.0.0.1:80", "node:8", "http://nodeA", "a b", "host/", "user@h",
        "host?x", "a\n", "[host]", "[10.0.0.1]", "[::1]:80", "[::1", "::1]",
        "10.0.0", "10.0.0.300", "a..b", "-a", "x" * 64, "fe80::1%eth0", "[]",
    ],
)  # fmt: skip
def test_what_is_no_host_is_no_place(name):
  with pytest.raises(ValueError, match="--reached_as=.*allowed: a host name"):
    with joining.placed(
        "main", host="127.0.0.1", port=0, reached_as=name, token=""
    ):
      pass


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("node-1", "node-1"),
        ("main_1.example.", "main_1.example."),
        ("", "127.0.0.1"),
    ],
)
def test_a_host_is_a_place_by_name_or_address(name, shown):
  with joining.placed(
      "main", host="127.0.0.1", port=0, reached_as=name, token=""
  ) as place:
    port = place.where.getsockname()[1]
  assert place.address == f"http://{shown}:{port}"


@pytest.mark.parametrize("name", ["::", "[::]", "0.0.0.0"])
def test_every_address_is_no_place(name):
  with pytest.raises(ValueError, match="every address of this machine"):
    with joining.placed(
        "main", host="127.0.0.1", port=0, reached_as=name, token=""
    ):
      pass


def test_what_jobs_cannot_do_is_refused_by_name():
  from dataclasses import replace

  from mgrpo_jax.decoupled.run import restricted

  setup = small_setup(seed=0, imitation_steps=0, steps=1)
  with pytest.raises(ValueError, match="'nobody', allowed: main, researcher"):
    restricted(setup, "nobody")
  budget = Budget(trained_tokens=5, generated_tokens=0)
  with pytest.raises(ValueError, match="without budget"):
    restricted(replace(setup, budget=budget), "main")
  with pytest.raises(ValueError, match="without resample"):
    restricted(replace(setup, resample=1), "main")
  own = restricted(setup, "researcher")
  assert own.own == ("researcher",) and own.elsewhere == {"main"}
  assert own.policies["main"].params is None


def test_all_jobs_of_a_run_have_one_name_and_one_config(tmp_path):
  bucket = store.open_folder(tmp_path)
  name = ownership.join(bucket, {"seed": 0})
  assert ownership.join(bucket, {"seed": 0}) == name
  with pytest.raises(ownership.TakenError, match="another config"):
    ownership.join(bucket, {"seed": 1})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policy=main",), "needs --bucket"),
        (("--policy=main", "--launch=local"), "allowed: one of them"),
        (("--policy=nobody", "--bucket=BUCKET"), "'nobody', allowed: main"),
        (("--launch=local", "--config.rollout.spare=1"), "rollout.spare: 1"),
        (("--processes=2",), "--processes: is for the job of one --policy"),
        (("--hosts=2",), "--hosts: goes with --launch"),
        (("--launch=local", "--hosts=2"), "a multiple of --hosts=2"),
        (
            ("--policy=main", "--processes=2", "--coordinator=here"),
            "must be HOST:PORT",
        ),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, arguments, told):
  named = [a.replace("BUCKET", (tmp_path / "b").as_uri()) for a in arguments]
  result = command("train", SMOKE, f"--workdir={tmp_path / 'run'}", *named)
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert told in line


def test_what_may_pass_is_no_mistake_in_the_command(tmp_path):
  (tmp_path / "jobs").touch()  # where logs would be
  result = command(
      "train",
      SMOKE,
      *SPREAD,
      f"--workdir={tmp_path}",
      "--launch=local",
      timeout=280,
  )
  assert result.returncode == 75, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert f"cannot write {tmp_path}/jobs/main.0.log" in line


def test_a_job_of_another_config_ends_the_command_as_it_ended(tmp_path):
  """The leader is well, but its command would end so again."""
  other = tmp_path / "jobs/researcher"
  other.mkdir(parents=True)
  (other / "config.json").write_text('{"seed": 99}')
  result = command(
      "train", SMOKE, f"--workdir={tmp_path}", "--launch=local", timeout=280
  )
  assert result.returncode == 2, result.stderr
  last = result.stderr.strip().splitlines()[-1]
  assert last.startswith("error: job of policy researcher ended with code 2")
  assert last.endswith(f"see {tmp_path}/jobs/researcher.log")
  assert "interrupted" not in result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The quickstart's smoke in jobs, and in one process."""
  root = tmp_path_factory.mktemp("smoke")
  taken = {}
  for name, extra in (("jobs", ["--launch=local"]), ("one", [])):
    began = time.monotonic()
    result = command(
        "train", SMOKE, f"--workdir={root / name}", *extra, timeout=280
    )
    assert result.returncode == 0, result.stderr
    taken[name] = time.monotonic() - began
  print(taken)
  return root


def test_jobs_end_with_the_summary_of_one_process(runs):
  one, led = (
      json.loads((runs / name / "summary.json").read_text())
      for name in ("one", "jobs")
  )
  for name in ("seed", "steps", "eval", "tokens"):
    assert led[name] == one[name]


@pytest.mark.parametrize(
    ("policy", "folder"),
    [("main", "jobs"), ("researcher", "jobs/jobs/researcher")],
)
def test_jobs_end_with_the_parameters_of_one_process(runs, policy, folder):
  file = f"policies/{policy}/model.safetensors"
  expected = (runs / "one" / file).read_bytes()
  assert (runs / folder / file).read_bytes() == expected


def test_replicas_help_a_job_and_are_killed(runs, tmp_path):
  """Two samplers of the researcher; one dies when the job has met both."""
  url = (tmp_path / "bucket").as_uri()
  (tmp_path / "token").write_text("0123456789abcdef")
  shared = (
      f"--bucket={url}", f"--token_file={tmp_path / 'token'}",
      "--config.rollout.replicas=True", "--config.jobs.heartbeat=1.0",
  )  # fmt: skip
  steady, killed = (
      replicated.command(tmp_path, *shared, "--policy=researcher")
      for _ in range(2)
  )

  over, helped_until = threading.Event(), []

  def kill():
    while not over.wait(0.2):
      entries = records.read(store.open(url), "researcher").values()
      if sum(entry.weights != "" for entry in entries) == 2:
        time.sleep(2.0)
        killed.kill()
        helped_until.append(over.is_set())
        return

  killer = threading.Thread(target=kill)
  killer.start()
  try:
    folder = f"--workdir={tmp_path / 'run'}"
    result = command(
        "train", SMOKE, folder, "--launch=local", *shared, timeout=280
    )
    assert result.returncode == 0, result.stderr
  finally:
    over.set()
    killer.join()
    killed.kill()
    steady.terminate()
    assert steady.wait(60) == 128 + signal.SIGTERM
  one, helped = (
      json.loads((where / "summary.json").read_text())
      for where in (runs / "one", tmp_path / "run")
  )
  assert helped["tokens"] == one["tokens"] and helped["eval"] == one["eval"]
  assert helped_until == [False]  # it was killed while the run lasted
  log = (tmp_path / "replica.log").read_text()
  assert "samples from version 0" in log
  assert "Traceback" not in log
  rows = read_metrics(tmp_path / "run/jobs/researcher/metrics.jsonl")
  assert sum(row["replica_tokens/researcher"] for row in rows) > 0
  assert max(row["replicas/researcher"] for row in rows) >= 1
  assert len(records.read(store.open(url), "researcher")) == 1  # the killed
