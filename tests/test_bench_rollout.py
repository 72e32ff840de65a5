"""The benchmark of rollouts: what is played, by whom, how it is compared."""

import argparse
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import tiny_llama

from experiments.bench import compared, recorded, rollout
from experiments.bench.workers import traffic
from experiments.bench.workers.peer import Peer, PeerError
from mgrpo_jax.policy.load import save_directory
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.types import NO_PARENT, Status, Trajectory, Turn

CHILD = {
    "prompt": [7],
    "turns": [
        {"sampled": 1, "calls": [], "result": [8, 8]},
        {"sampled": 3, "calls": [], "result": []},
    ],
}
ROOT = {
    "prompt": [1, 2, 3],
    "turns": [
        {"sampled": 2, "calls": [CHILD], "result": [4]},
        {"sampled": 1, "calls": [], "result": []},
    ],
}


def played(call, token):
  """Every turn of a call, when each token that is sampled is the same."""
  play, turns = traffic.play(call, "a"), []
  turn = next(play)
  while True:
    turns.append((turn.call, turn.tokens, turn.count, turn.last))
    try:
      turn = play.send([token] * turn.count)
    except StopIteration:
      return turns


def test_a_call_is_played_depth_first_on_what_was_sampled():
  assert played(ROOT, 9) == [
      ("a", [1, 2, 3], 2, False),
      ("a.0.0", [7], 1, False),
      ("a.0.0", [7, 9, 8, 8], 3, True),
      ("a", [1, 2, 3, 9, 9, 4], 1, True),
  ]


def test_sizes_count_every_token_once():
  assert traffic.size(ROOT) == {
      "calls": 2,
      "turns": 4,
      "sampled": 7,
      "given": 7,
      "longest": 7,
  }


def trajectory(tokens, mask, parent, kinds):
  turns = tuple(
      Turn(kind=kind, name="", argument="", result="", page="")
      for kind in kinds
  )
  return Trajectory(
      task_id="t",
      rollout=0,
      role="main",
      call=0,
      parent=parent,
      request="",
      tokens=np.asarray(tokens, np.int32),
      loss_mask=np.asarray(mask, np.float32),
      sampler_logprobs=np.zeros(len(mask), np.float32),
      version_min=0,
      version_max=0,
      status=Status.COMPLETED,
      turns=turns,
      result_text="",
      seconds=0.0,
  )


def test_a_rollout_becomes_the_calls_that_its_turns_made():
  root = trajectory(
      [1, 2, 3, 5, 5, 4, 6],
      [0, 0, 0, 1, 1, 0, 1],
      NO_PARENT,
      ("call", "answer"),
  )
  child = trajectory(
      [7, 5, 8, 8, 5, 5, 5], [0, 1, 0, 0, 1, 1, 1], 0, ("tool", "answer")
  )
  assert recorded.tree([root, child]) == ROOT


def test_every_player_is_asked_the_same_and_never_the_same_again():
  make = rollout.requests_of(5, 2, 3)
  (do, first), (_, again), (_, other) = make(0), make(0), make(1)
  assert do == "generate" and first == again
  assert np.shape(first["prompts"]) == (3, 5) and first["new"] == 2
  assert not np.any(np.all(np.isin(other["prompts"], first["prompts"]), axis=1))


def test_groups_share_a_task_and_tasks_follow_each_other():
  calls = [{"prompt": [number]} for number in range(3)]
  make = rollout.traffic_of(calls, 16)
  told = [[one["prompt"][0] for one in make(i)[1]["calls"]] for i in range(3)]
  assert told == [[0] * 8, [2] * 8 + [0] * 8, [1] * 8 + [2] * 8]


def test_agents_get_two_slots_each_and_streams_fit():
  calls = rollout.engine("traffic", 16, {"block": 32})
  assert (calls["num_slots"], calls["decode_rows"]) == (32, 16)
  assert (calls["block"], calls["context"]) == (32, rollout.AGENTS)
  assert rollout.engine("requests_34_48", 8, {})["context"] == 34 + 48
  assert rollout.engine("step", 16, {})["context"] == 34 + 64


def test_kernels_are_of_a_kind_that_the_dtype_has():
  whole = rollout.engine("step", 16, {})
  half = rollout.engine("step", 16, {"dtype": "bfloat16"})
  assert (whole["dtype"], whole["kernels"]) == ("float32", "tiled")
  assert (half["dtype"], half["kernels"]) == ("bfloat16", "turned")


def test_ratios_are_taken_round_by_round():
  told = {
      "ours": [{"seconds": 1.0, "tokens": 8}, {"seconds": 2.0, "tokens": 8}],
      "them": [{"seconds": 3.0, "tokens": 8}, {"seconds": 4.0, "tokens": 8}],
  }
  first, second = compared.table(told)[2:]
  assert first == "| ours | 6 (4 to 8) | 1 (1 to 1) |"
  assert second == "| them | 2.33 (2 to 2.67) | 2.5 (2 to 3) |"
  steps = {name: [{"seconds": 2.0}] for name in told}
  assert compared.table(steps)[2] == "| ours | 2 (2 to 2) | 1 (1 to 1) |"


class Fake:
  """A player that samples so many tokens."""

  def __init__(self, tokens):
    self.tokens = tokens
    self.asked = []

  def ask(self, do, **arguments):
    self.asked.append(arguments["new"])
    return {"seconds": float(len(self.asked)), "tokens": self.tokens}


def test_rounds_are_interleaved_and_the_first_is_dropped():
  told = rollout.measure(
      {"a": Fake(6), "b": Fake(6)}, rollout.requests_of(4, 2, 3), 2
  )
  assert [one["seconds"] for one in told["a"]] == [2.0, 3.0]


def test_players_that_sample_less_are_not_compared():
  with pytest.raises(ValueError, match="different numbers"):
    rollout.measure(
        {"a": Fake(6), "b": Fake(5)}, rollout.requests_of(4, 2, 3), 1
    )


def test_what_was_measured_before_is_kept(tmp_path):
  out = tmp_path / "out.json"
  for key in ("a 8", "b 8"):
    arguments = argparse.Namespace(rounds=1)
    compared.keep(out, key, {"told": {}}, arguments)
  assert sorted(json.loads(out.read_text())) == ["a 8", "b 8"]


def test_a_player_that_is_not_there_is_named(tmp_path, capsys):
  players = {
      "without": (None, "of_vllm", []),
      "wrong": ("/nowhere/python", "of_vllm", []),
      "broken": (sys.executable, "of_nobody", []),
  }
  with rollout.contextlib.ExitStack() as stack:
    assert rollout.start(players, tmp_path, stack) == {}
  told = capsys.readouterr().out.splitlines()
  assert [line.split()[2] for line in told] == ["without", "wrong", "broken"]
  assert "of_nobody" in (tmp_path / "broken.log").read_text()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  """Our worker, with a tiny policy and a step of four completions."""
  folder = tmp_path_factory.mktemp("ours")
  config = tiny_llama.config()
  policy = Policy(
      config=config,
      params=tiny_llama.weights(config),
      tokenizer=None,
      chat=None,
      system="",
  )
  save_directory(folder / "policy", policy)
  sizes = {"context": 16, "block": 8, "prefill_tokens": 16}
  sizes |= {"prefill_buckets": [8]}
  sizes |= {"kernels": "trained", "decode_attention": "blocks"}
  step = {
      "ids": [[1, 2, 3], [4, 5, 6]],
      "completions": 2,
      "new": 4,
      "learning_rate": 1e-3,
      "rows": 2,
  }
  arguments = [
      str(folder / "policy"),
      json.dumps(rollout.engine("step", 4, sizes)),
      json.dumps(step),
  ]
  try:
    peer = Peer(sys.executable, "of_ours", arguments, folder / "log")
  except PeerError:
    pytest.fail((folder / "log").read_text())
  yield peer
  peer.close()


def state(peer):
  """The letter that Linux has for what a process does."""
  with open(f"/proc/{peer._process.pid}/stat") as file:
    return file.read().rsplit(")", 1)[1].split()[0]


def becomes(letter, peer):
  """Whether the process is in that state within ten seconds.

  A signal that stops it is sent at once, and taken when it next runs.
  """
  end = time.monotonic() + 10
  while state(peer) != letter and time.monotonic() < end:
    time.sleep(0.01)
  return state(peer) == letter


def test_our_worker_samples_plays_and_trains(ours):
  told = ours.ask("generate", prompts=[[1, 2], [3, 4, 5]], new=3)
  assert told["tokens"] == 6 and told["seconds"] > 0
  told = ours.ask("converse", calls=[ROOT, ROOT])
  assert told["tokens"] == 14
  # The second root's prompt is copied; what a turn left is not filled again.
  assert told["copied"] >= 1 and told["mismatches"] == 0
  told = ours.ask("step")
  assert 0 < told["sampling"] < told["seconds"]


def test_our_worker_is_stopped_unless_it_is_asked(ours):
  ours.ask("generate", prompts=[[1]], new=1)
  assert becomes("T", ours)


def test_a_worker_that_ended_is_an_error(ours):
  os.kill(ours._process.pid, signal.SIGKILL)
  with pytest.raises(PeerError, match="of_ours ended"):
    for _ in range(2):  # the pipe may still take one
      ours.ask("generate", prompts=[[1]], new=1)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--concurrency=65"], "65, allowed: 1 to vLLM's 64"),
        (["--concurrency=0"], "0, allowed"),
        (["--case=traffic", "--concurrency=12"], "a multiple of 8"),
        (["--players=ours,sglang"], "'sglang'"),
        (["--players=trl"], "compared with"),
        (["--case=nothing"], "'nothing'"),
    ],
)
def test_flags_that_cannot_be_measured(flags, text, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["rollout", *flags])
  with pytest.raises(SystemExit, match="2"):
    rollout._arguments()
  assert text in capsys.readouterr().err
