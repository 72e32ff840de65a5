r"""SmolLM2-135M sampled here, by vLLM, by transformers; steps of TRL, Tunix.

    python -m experiments.bench.rollout --case=requests_34_48 \
        --concurrency=8,32,64 --vllm=/tmp/vllm_env/bin/python \
        --peers=/tmp/peers_trl/bin/python --rounds=5 --out=rollout.json

Every player is a process in its own environment, stopped while another is
timed; this project is one of them. All have the same weights and prompts, draw
at temperature 1 whatever token ends a text, and sample as many tokens. In each
round all are timed in turn, with prompts that are new to them; a first round
warms up and is dropped. Cases:

  requests_P_N  N tokens after each of as many prompts of P random tokens as
                --concurrency says
  traffic       agents' calls of configs/smollm2_factbook.py, as its scripted
                expert plays them, --concurrency of them side by side, eight
                rollouts a task; what is sampled is the engine's own
  step          a whole GRPO step on TRL's terms: 2 prompts of 34 tokens, 8
                completions of 64

--out gets what was measured beside what is there of other players. A player
whose environment is not given, or which does not start, is left out and named.
vLLM finds prefixes in its cache; ours whole prompts and a call's own stream.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import cli
from experiments.bench import compared, recorded
from experiments.bench.workers import traffic
from experiments.bench.workers.peer import Peer, PeerError
from mgrpo_jax import policy
from mgrpo_jax.policy.load import save_directory

VOCABULARY = 49_152
OURS = "ours"
VLLM = ("vllm_float32", "vllm_bfloat16")
VLLM_LIMITS = ("1024", "64")  # the same in all cases: it compiles for a minute
REQUESTS = {
    "requests_34_48": (34, 48),
    "requests_34_256": (34, 256),
    "requests_300_48": (300, 48),
}
BUCKETS = {"requests_300_48": [43, 256], "traffic": [32, 64, 96, 128, 256]}
CASES = (*REQUESTS, "traffic", "step")
GROUP = 8  # rollouts of a task
STEP = {"completions": 8, "new": 64, "learning_rate": 1e-6, "rows": 2}
PROMPT = 34  # tokens of a step's two prompts
AGENTS = 640  # tokens of an agent's context, at most
Round = Callable[[int], tuple[str, dict[str, Any]]]


def engine(case: str, count: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
  """Sizes of our engine.

  Args:
    case: its name.
    count: requests, or rollouts, at a time.
    sizes: that are to be others than the usual ones.

  Returns:
    What `of_ours` is given; the fastest kernels and attention for a CPU with a
    compiler of C++. A rollout's root keeps its slot while a call of it
    is sampled, so agents get two slots each, of which half are busy.
  """
  agents = case == "traffic"
  dtype = sizes.get("dtype", "float32")
  return {
      "num_slots": 2 * count if agents else count,
      "context": context(case),
      "block": 64,
      "prefill_tokens": 256 if agents else 8 * (PROMPT - 1),
      "prefill_buckets": BUCKETS.get(case, [PROMPT - 1]),
      "decode_steps": 8,
      "decode_rows": count if agents else 0,
      "kernels": "tiled" if dtype == "float32" else "turned",
      "decode_attention": "native",
      **sizes,
      "dtype": dtype,
  }


def context(case: str) -> int:
  """Tokens that a stream can have.

  Args:
    case: its name.

  Returns:
    As many as the longest stream needs.
  """
  if case == "traffic":
    return AGENTS
  return sum(REQUESTS[case]) if case in REQUESTS else PROMPT + int(STEP["new"])


def requests_of(prompt: int, new: int, count: int) -> Round:
  """Makes the prompts of a round.

  Args:
    prompt: tokens of each.
    new: tokens to sample after each.
    count: of them.

  Returns:
    Round -> what every player is asked.
  """

  def make(index: int) -> tuple[str, dict[str, Any]]:
    rng = np.random.default_rng((prompt, new, count, index))
    prompts = rng.integers(1000, VOCABULARY, (count, prompt)).tolist()
    return "generate", {"prompts": prompts, "new": new}

  return make


def traffic_of(calls: Sequence[traffic.Call], count: int) -> Round:
  """Makes the calls of a round: a group of rollouts of each of some tasks.

  Args:
    calls: recorded, one a task.
    count: rollouts, a multiple of a group.

  Returns:
    Round -> what every player is asked.
  """

  def make(index: int) -> tuple[str, dict[str, Any]]:
    tasks = count // GROUP
    first = index * tasks
    last = first + tasks if index else 1  # one task is enough to warm up
    picked = [calls[i % len(calls)] for i in range(first, last)]
    return "converse", {"calls": [one for one in picked for _ in range(GROUP)]}

  return make


def a_step(index: int) -> tuple[str, dict[str, Any]]:
  """What every player is asked in a round of steps."""
  return "step", {}


def start(
    players: Mapping[str, tuple[str | None, str, Sequence[str]]],
    folder: pathlib.Path,
    stack: contextlib.ExitStack,
) -> dict[str, Peer]:
  """Starts players one after the other; names those that are not there.

  Args:
    players: name -> Python, module, arguments.
    folder: for what they print.
    stack: ends them.

  Returns:
    Those that are ready.
  """
  ready = {}
  for name, (python, module, arguments) in players.items():
    if python is None:
      print(f"left out: {name} (no environment given)", flush=True)
      continue
    try:
      peer = Peer(python, module, arguments, folder / f"{name}.log")
    except PeerError as error:
      print(f"left out: {name} ({error})", flush=True)
      continue
    stack.callback(peer.close)
    print(f"ready: {name} {peer.told}", flush=True)
    ready[name] = peer
  return ready


def measure(
    players: Mapping[str, Peer], make: Round, rounds: int
) -> dict[str, list[dict[str, Any]]]:
  """Times the players in turn.

  Args:
    players: that are ready.
    make: round -> what each is asked.
    rounds: kept.

  Returns:
    Player -> what it told of each round.

  Raises:
    ValueError: two players did not sample as many tokens.
  """
  told: dict[str, list[dict[str, Any]]] = {name: [] for name in players}
  for index in range(rounds + 1):
    do, arguments = make(index)
    for name, peer in players.items():
      answer = peer.ask(do, **arguments)
      print(f"round {index}: {name} {answer}", flush=True)
      if index:
        told[name].append(answer)
    counts = {name: one[-1].get("tokens") for name, one in told.items() if one}
    if len(set(counts.values())) > 1:
      raise ValueError(f"players sampled different numbers of tokens: {counts}")
  return told


def players_of(
    case: str,
    count: int,
    directory: pathlib.Path,
    arguments: argparse.Namespace,
) -> dict[str, tuple[str | None, str, Sequence[str]]]:
  """Says how the players of a case are started.

  Args:
    case: its name.
    count: requests at a time.
    directory: of the weights.
    arguments: of the command.

  Returns:
    Player -> Python, module, arguments.
  """
  where = str(directory)
  sizes = engine(case, count, json.loads(arguments.engine))
  ours = [where, json.dumps(sizes)]
  if case == "step":
    ids, texts = recorded.prompts(directory, PROMPT)
    told = json.dumps({**STEP, "prompts": texts})
    found: dict[str, tuple[str | None, str, Sequence[str]]] = {
        OURS: (
            sys.executable,
            "of_ours",
            [*ours, json.dumps({**STEP, "ids": ids})],
        ),
        "trl": (arguments.peers, "of_trl", [where, told]),
        "tunix": (arguments.peers, "of_tunix", [where, told]),
    }
  else:
    found = {OURS: (sys.executable, "of_ours", ours)}
    for name in VLLM:
      dtype = name.removeprefix("vllm_")
      found[name] = (arguments.vllm, "of_vllm", [where, dtype, *VLLM_LIMITS])
    if case != "traffic":
      found["transformers"] = (
          arguments.peers,
          "of_transformers",
          [where, "float32"],
      )
  wanted = arguments.players or list(found)
  return {name: one for name, one in found.items() if name in wanted}


def run(
    case: str,
    count: int,
    directory: pathlib.Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
  """Measures a case at one number of requests.

  Args:
    case: its name.
    count: requests at a time.
    directory: of the weights.
    arguments: of the command.

  Returns:
    What is written down.
  """
  load: dict[str, Any] = {}
  if case == "traffic":
    calls = recorded.calls(arguments.trace)
    make = traffic_of(calls, count)
    load = {
        key: sum(traffic.size(one)[key] for one in calls) / len(calls)
        for key in ("calls", "turns", "sampled", "given")
    }
  elif case == "step":
    make = a_step
  else:
    make = requests_of(*REQUESTS[case], count)
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    players = start(
        players_of(case, count, directory, arguments), folder, stack
    )
    told = measure(players, make, arguments.rounds)
  print(
      "\n".join([f"\n{case}, {count} at a time", *compared.table(told)]),
      flush=True,
  )
  return {"case": case, "count": count, "load": load, "told": told}


def main() -> None:
  """Prints tables; writes JSON."""
  arguments = _arguments()
  directory = arguments.weights
  if not directory.exists():
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_directory(directory, policy.load("smollm2"))
  for case in arguments.case:
    for count in arguments.concurrency if case != "step" else [2 * GROUP]:
      found = run(case, count, directory, arguments)
      key = " ".join([case, str(count), *found["told"]])
      compared.keep(arguments.out, key, found, arguments)


def _words(text: str) -> list[str]:
  """Splits a list of names."""
  return text.split(",")


def _arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--case", type=_words, default=list(CASES))
  parser.add_argument(
      "--concurrency",
      type=lambda text: [int(part) for part in text.split(",")],
      default=[8, 32, 64],
  )
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--vllm", help="Python of vLLM's environment")
  parser.add_argument("--peers", help="Python of TRL's and Tunix's")
  parser.add_argument("--players", type=_words, help="only these")
  parser.add_argument(
      "--engine",
      default="{}",
      help="""sizes of our engine as JSON, and the "dtype" it computes in""",
  )
  work = pathlib.Path(tempfile.gettempdir()) / "mgrpo_rollout"
  parser.add_argument("--weights", type=pathlib.Path, default=work / "smollm2")
  parser.add_argument("--trace", type=pathlib.Path, default=work / "calls.json")
  parser.add_argument("--out", type=cli.out_file, default=work / "rollout.json")
  arguments = parser.parse_args()
  if unknown := set(arguments.case) - set(CASES):
    parser.error(f"--case: {unknown} are not among {CASES}")
  players = {OURS, *VLLM, "transformers", "trl", "tunix"}
  if unknown := set(arguments.players or []) - players:
    parser.error(f"--players: {unknown} are not among {sorted(players)}")
  if arguments.players and OURS not in arguments.players:
    parser.error(f"--players: {OURS} is what the others are compared with")
  if arguments.rounds < 1:
    parser.error("--rounds must be at least 1")
  most = int(VLLM_LIMITS[1])
  for count in arguments.concurrency:
    if not 1 <= count <= most:
      parser.error(f"--concurrency: {count}, allowed: 1 to vLLM's {most}")
    if "traffic" in arguments.case and count % GROUP:
      parser.error(f"--concurrency: {count}, for traffic a multiple of {GROUP}")
  return arguments


if __name__ == "__main__":
  main()
