"""Agents' calls and prompts from the Factbook, as ids for any engine."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import smollm2_factbook
from experiments import recipe
from experiments.bench.workers.traffic import Call
from mgrpo_jax import atomic
from mgrpo_jax.policy.load import load
from mgrpo_jax.types import Trajectory

TASKS = 64


def calls(path: pathlib.Path) -> list[Call]:
  """Reads recorded calls; records them where there are none.

  Args:
    path: of the JSON.

  Returns:
    The root call of each of some tasks, as the recipe's expert plays it.
  """
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, asyncio.run(_record()))
  found: list[Call] = json.loads(path.read_text())
  return found


def prompts(
    directory: pathlib.Path, length: int
) -> tuple[list[list[int]], list[str]]:
  """Makes two prompts of exactly so many tokens.

  Args:
    directory: of a policy with a tokenizer.
    length: tokens.

  Returns:
    Their ids and their texts.

  Raises:
    ValueError: a text does not give the same ids again.
  """
  tokenizer: Any = load(directory).tokenizer
  texts = (
      "The capital of Peru is a large city on the coast of the Pacific Ocean",
      "The longest river of this continent flows through many countries",
  )
  ids, told = [], []
  for text in texts:
    more = " and the people there have always known it well"
    tokens = tokenizer.encode(text + 4 * more)[:length]
    again = tokenizer.decode(tokens)
    if tokenizer.encode(again) != tokens or len(tokens) != length:
      raise ValueError(f"{again!r} is not {length} tokens")
    ids.append(list(map(int, tokens)))
    told.append(again)
  return ids, told


async def _record() -> list[Call]:
  """Lets the expert play the recipe's hard tasks."""
  setup = recipe.build(smollm2_factbook.get_config())
  play = setup.demonstrate["imitation"]
  found: list[Call] = []
  for number, task in enumerate(setup.tasks["imitation"]):
    group = await play(task, number)
    if group is not None:
      found.append(tree(group.trajectories))
    if len(found) == TASKS:
      break
  return found


def tree(trajectories: Sequence[Trajectory]) -> Call:
  """Puts the calls of a rollout into the turns that made them.

  Args:
    trajectories: of one rollout, the root first, children in order.

  Returns:
    The root's call, see `workers.traffic`.
  """
  made = [_call(one) for one in trajectories]
  for index, one in enumerate(trajectories):
    children = iter(
        [
            made[i]
            for i, child in enumerate(trajectories)
            if child.parent == index
        ]
    )
    for turn, told in zip(made[index]["turns"], one.turns, strict=True):
      if told.kind == "call":
        turn["calls"] = [next(children)]
  return made[0]


def _call(one: Trajectory) -> Call:
  """A call without the calls that it makes."""
  edges = np.flatnonzero(np.diff(one.loss_mask, append=0.0)) + 1
  bounds = [*edges.tolist(), len(one.tokens)]
  pieces = list(zip(bounds, bounds[1:], strict=False))
  turns = []
  for sampled, result in zip(pieces[::2], [*pieces[1::2], None], strict=False):
    given = one.tokens[slice(*result)].tolist() if result else []
    turns.append(
        {"sampled": sampled[1] - sampled[0], "calls": [], "result": given}
    )
  return {"prompt": one.tokens[: bounds[0]].tolist(), "turns": turns}
