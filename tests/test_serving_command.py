"""The command as a user types it: what it refuses, serves, and finishes."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import pytest
from commands import ROOT, command, refused, start

from configs import quickstart
from experiments import recipe
from mgrpo_jax import workdir
from mgrpo_jax.policy.load import load
from mgrpo_jax.publisher import Publisher
from mgrpo_jax.resources import Resources
from mgrpo_jax.sampler import handover

TOKEN = "0123456789abcdef"
QUESTION = "What is the capital of Peru?"


@pytest.fixture
def run(tmp_path):
  """A run that has published nothing yet."""
  directory = tmp_path / "run"
  config = recipe.plain(quickstart.get_config("smoke"))
  with workdir.hold(directory, config):
    return directory


def publish(run):
  """Publishes the weights that the quickstart begins with."""
  directory = workdir.Workdir(run)
  config = recipe.restore(directory.read_config())
  store = recipe.open_store(config, directory)
  resources = Resources(recipe.build(config), store)
  Publisher(resources).publish(list(resources.engines), 1, last=True)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host=0.0.0.0"], "--token_file=FILE"),
        (["--token=short"], "16"),
        ([f"--token={TOKEN}", "--token_file=x"], "one of them"),
        (["--token_file=nowhere"], "nowhere"),
        (["--version=newest"], "'newest', allowed: latest or a number"),
        ([], "nothing is published"),
        (["--port=70000"], "[0, 65535]"),
        (["--max_concurrent=0"], "max_concurrent"),
        (["--deadline=inf"], "deadline"),
        (["--warm_up_deadline=0"], "warm_up_deadline"),
        (["--conversations=-1"], "conversations"),
    ],
)
def test_wrong_flags_end_before_anything_is_served(run, flags, told):
  port = [] if "--port=70000" in flags else ["--port=0"]
  assert told in refused(command("serve", f"--workdir={run}", *port, *flags))


def test_a_port_that_is_taken_is_named(run):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    result = command("serve", f"--workdir={run}", f"--port={port}")
  assert "use" in refused(result)


def test_a_warm_up_that_takes_too_long_ends_the_server(run):
  publish(run)
  result = command(
      "serve", f"--workdir={run}", "--port=0", "--warm_up_deadline=1e-3"
  )
  assert "warm-up took longer than 0.001 s" in refused(result)


@contextlib.contextmanager
def serving(run, *flags):
  """A server's process, and its address."""
  process = start(
      "-m", "experiments.serve", f"--workdir={run}", *flags,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  watchdog = threading.Timer(300, process.kill)
  watchdog.start()
  try:
    lines = iter(process.stdout.readline, "")
    line = next(one for one in lines if not one.startswith("warm-up: "))
    assert line.startswith("http://127.0.0.1:"), process.stderr.read()
    assert line.endswith("serves quickstart:smoke, main, researcher\n")
    yield process, line.split()[0]
  finally:
    watchdog.cancel()
    process.kill()
    process.communicate()


def ask(address, token, **fields):
  """The parsed response to a chat completion."""
  body = {"messages": [{"role": "user", "content": QUESTION}]} | fields
  return post(f"{address}/chat/completions", token, **body)


def post(url, token, **body):
  """The parsed response to JSON."""
  headers = {"content-type": "application/json"}
  if token:
    headers["authorization"] = f"Bearer {token}"
  request = urllib.request.Request(url, json.dumps(body).encode(), headers)
  with urllib.request.urlopen(request, timeout=60) as response:
    return json.load(response)


def test_a_run_is_served_until_it_is_told_to_end(run, tmp_path):
  publish(run)
  secret = tmp_path / "token"
  secret.write_text(TOKEN + "\n")
  begun = load(ROOT / "configs/quickstart_weights/main")
  handover.write(tmp_path / "weights/main", 3, begun)
  given = [f"--token_file={secret}", f"--weights_from={tmp_path}/weights"]
  with serving(run, "--port=0", *given) as (process, address):
    with pytest.raises(urllib.error.HTTPError, match="401"):
      ask(address, "", model="main")
    told = ask(address, TOKEN, model="quickstart:smoke", return_calls=True)
    (choice,) = told["choices"]
    assert choice["calls"][0]["request"] == QUESTION
    assert choice["calls"][0]["versions"] == [1, 1]
    assert choice["message"]["content"] == choice["calls"][0]["result"]
    turn = ask(address, TOKEN, model="main")["choices"][0]["message"]["content"]
    assert turn.startswith("<researcher>")  # delegates, as it was trained to
    named = {"version": 3, "label": "mine"}
    post(f"{address}/weights/main", TOKEN, **named)
    told = post(f"{address}/completions", TOKEN, model="main", prompt=[1, 2])
    assert told["choices"][0]["policy_versions"] == [3, 3]
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            ask(address, TOKEN, model="quickstart:smoke", n=8, temperature=1.0)
        )
    )
    thread.start()
    metrics = address.removesuffix("/v1") + "/metrics"
    asking = urllib.request.Request(
        metrics, headers={"authorization": f"Bearer {TOKEN}"}
    )
    for _ in range(1000):
      with urllib.request.urlopen(asking, timeout=60) as response:
        if "mgrpo_choices_in_progress 8" in response.read().decode():
          break
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert len(results[0]["choices"]) == 8
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
