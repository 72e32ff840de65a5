"""A whole GRPO step of this project: sample, reward, compare, update, publish.

What is trained is what TRL trains with one update a batch: token ratios to the
sampler's own log-probabilities, a mean over tokens, no KL. The completions of a
prompt share a row, in which the prompt stands once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import advantages, losses, objectives, optim, packing
from mgrpo_jax.learner import Learner
from mgrpo_jax.packing import BatchShape, Credit
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.types import NO_PARENT, Completion, Status, Trajectory

Sample = Callable[
    [Sequence[Sequence[int]], int], Awaitable[Sequence[Completion]]
]
_LOSS = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.token_mean,
    clip_low=0.2,
    clip_high=0.2,
    kl=None,
    kl_coefficient=0.0,
    importance=None,
    importance_cap=1.0,
    surrogate=losses.clipped_surrogate,
    entropy_coefficient=0.0,
    critic=None,
)


class Steps:
  """A learner beside an engine that samples from its weights."""

  def __init__(
      self,
      policy: Policy,
      engine: Engine,
      sample: Sample,
      settings: Mapping[str, Any],
  ) -> None:
    """Begins with fresh moments.

    Args:
      policy: to train.
      engine: gets the weights after each step.
      sample: samples so many tokens after each prompt, in that engine.
      settings: see `of_trl`; `ids` in place of `prompts`, and `rows`, prompts
        of a micro-batch.
    """
    self._engine, self._sample, self._settings = engine, sample, settings
    completions, new = settings["completions"], settings["new"]
    sampled = completions * new
    # A prompt's last token stands in every completion: its next one differs.
    shared = len(settings["ids"][0]) - 1
    self._shape = BatchShape(
        rows=settings["rows"],
        row_tokens=shared + completions * (new + 1),
        trajectories=settings["rows"] * completions,
        row_targets=sampled,
        least_shared=8,
    )
    execution = dataclasses.replace(
        policy.config.execution, logit_columns=sampled
    )
    self._learner = Learner(
        dataclasses.replace(policy.config, execution=execution),
        policy.params,
        lora=None,
        shape=self._shape,
        optimizer=optim.AdamW(
            b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        temperature=1.0,
        reference="none",
        seed=0,
        mesh=None,
    )
    self._number = 0

  def step(self) -> dict[str, Any]:
    """Makes a step.

    Returns:
      Seconds, and those of them that sampling took.
    """
    settings, start = self._settings, time.perf_counter()
    prompts = [
        list(ids)
        for ids in settings["ids"]
        for _ in range(settings["completions"])
    ]
    told = asyncio.run(_all(self._sample(prompts, settings["new"])))
    sampled = time.perf_counter()
    rewards = np.array([np.mean(one.tokens % 2 == 0) for one in told])
    groups = rewards.reshape(len(settings["ids"]), -1, 1).astype(np.float32)
    found = advantages.per_task(jnp.asarray(groups), jnp.ones(groups.shape))
    credits = [
        Credit(
            trajectory=_trajectory(number, prompt, one),
            advantage=float(advantage),
            weight=1.0,
        )
        for number, (prompt, one, advantage) in enumerate(
            zip(prompts, told, np.ravel(found), strict=True)
        )
    ]
    batches = tuple(
        dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
        for batch in packing.pack(credits, shape=self._shape)
    )
    self._learner.step(
        [(batches, packing.count(credits))],
        objective=_LOSS,
        learning_rates=[settings["learning_rate"]],
    ).metrics()
    self._number += 1
    self._engine.update(self._learner.weights, self._number)
    jax.block_until_ready(self._learner.state.params)
    ended = time.perf_counter()
    return {"seconds": ended - start, "sampling": sampled - start}


async def _all(
    sampling: Awaitable[Sequence[Completion]],
) -> Sequence[Completion]:
  """What `asyncio.run` can wait for."""
  return await sampling


def _trajectory(
    number: int, prompt: Sequence[int], told: Completion
) -> Trajectory:
  """A prompt and what was sampled after it."""
  unsampled = np.zeros(len(prompt), np.float32)
  return Trajectory(
      task_id=f"t{number}",
      rollout=0,
      role="main",
      call=0,
      parent=NO_PARENT,
      request="",
      tokens=np.concatenate([np.asarray(prompt, np.int32), told.tokens]),
      loss_mask=np.concatenate([unsampled, np.ones(len(told.tokens))]).astype(
          np.float32
      ),
      sampler_logprobs=np.concatenate([unsampled, told.logprobs]),
      version_min=told.version_min,
      version_max=told.version_max,
      status=Status.COMPLETED,
      turns=(),
      result_text="",
      seconds=0.0,
  )
