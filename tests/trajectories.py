"""Trajectories for tests, with only what a test says different."""

import dataclasses

import numpy as np

from mgrpo_jax.packing import Credit
from mgrpo_jax.types import (
    NO_PARENT,
    Evidence,
    RolloutGroup,
    Status,
    Task,
    Trajectory,
    Turn,
)


def trajectory(**fields):
  """One completed root call of three tokens, one of them sampled."""
  defaults = dict(
      task_id="t",
      rollout=0,
      role="main",
      call=0,
      parent=NO_PARENT,
      request="",
      tokens=np.array([1, 2, 3], np.int32),
      loss_mask=np.array([0, 0, 1], np.float32),
      sampler_logprobs=np.array([0, 0, -1], np.float32),
      version_min=0,
      version_max=0,
      status=Status.COMPLETED,
      turns=(),
      result_text="answer",
      seconds=0.0,
  )
  return Trajectory(**{**defaults, **fields})


def random_trajectory(rng, length, vocab_size, **fields):
  """A stream of random tokens, about half of them sampled."""
  mask = (rng.random(length) < 0.5).astype(np.float32)
  mask[0] = 0.0
  return trajectory(
      tokens=rng.integers(0, vocab_size, length).astype(np.int32),
      loss_mask=mask,
      sampler_logprobs=np.float32(mask * -rng.uniform(0.5, 3.0, length)),
      **fields,
  )


def random_credits(lengths, *, vocab_size, weights, seed=0):
  """A trajectory of each length, with any advantage and one of the weights."""
  rng = np.random.default_rng(seed)
  return [
      Credit(
          trajectory=random_trajectory(rng, n, vocab_size, rollout=i),
          advantage=float(np.float32(rng.normal())),
          weight=float(rng.choice(weights)),
      )
      for i, n in enumerate(lengths)
  ]


def begun_alike(credits, prompts, seed=1):
  """Puts unsampled tokens before each credit: numbers in turn, of one stream.

  Args:
    credits: to put them before.
    prompts: (tokens, place in the stream), given out in turn.
    seed: of the stream, of tokens below 9.

  Returns:
    Credits; those with prompts from one place begin alike.
  """
  stream = np.random.default_rng(seed).integers(0, 9, 64).astype(np.int32)
  longer = []
  for number, credit in enumerate(credits):
    size, place = prompts[number % len(prompts)]
    one, nothing = credit.trajectory, np.zeros(size, np.float32)
    one = dataclasses.replace(
        one,
        tokens=np.concatenate([stream[place : place + size], one.tokens]),
        loss_mask=np.concatenate([nothing, one.loss_mask]),
        sampler_logprobs=np.concatenate([nothing, one.sampler_logprobs]),
    )
    longer.append(dataclasses.replace(credit, trajectory=one))
  return longer


def turn(kind, **fields):
  """One turn."""
  defaults = dict(kind=kind, name="", argument="", result="", page="")
  return Turn(**{**defaults, **fields})


def evidence(page, question, *answers):
  """One look-up."""
  return Evidence(page=page, question=question, query="", answers=answers)


def task(*hops, answers=("Lima",), id="t"):
  """A task with its evidence."""
  return Task(
      id=id,
      question="?",
      answers=answers,
      stage="easy",
      hops=len(hops),
      evidence=hops,
      meta={},
  )


def group(question, trajectories, num_rollouts, roles=("main", "researcher")):
  """A group in the order given."""
  return RolloutGroup(
      task=question,
      num_rollouts=num_rollouts,
      trajectories=tuple(trajectories),
      rollout=np.array([t.rollout for t in trajectories], np.int32),
      parent=np.array([t.parent for t in trajectories], np.int32),
      role=np.array([roles.index(t.role) for t in trajectories], np.int32),
      call=np.array([t.call for t in trajectories], np.int32),
  )
