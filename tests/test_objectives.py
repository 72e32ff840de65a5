import dataclasses
import functools

import jax
import numpy as np
import pytest
from oracles import losses as oracle

from mgrpo_jax import importance, losses, objectives
from mgrpo_jax.critic import Critic
from mgrpo_jax.types import Prediction, TrainBatch

SHAPE = (6, 9)
CRITIC = Critic(coefficient=0.5, discount=0.9, trace=0.95, clip=0.2)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
PLAIN = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.token_mean,
    **CLIP,
    kl=None,
    kl_coefficient=0.0,
    importance=None,
    importance_cap=2.0,
    surrogate=losses.clipped_surrogate,
    entropy_coefficient=0.0,
    critic=None,
)
FULL = dataclasses.replace(
    PLAIN,
    kl=losses.kl_k3,
    kl_coefficient=0.3,
    importance=importance.by_token,
    entropy_coefficient=0.02,
    critic=CRITIC,
)
DUAL = functools.partial(losses.dual_clipped_surrogate, floor=1.5)


def drawn(seed):
  """What a policy says of a micro-batch, and the micro-batch."""
  rng = np.random.default_rng(seed)
  old = -rng.exponential(1.0, SHAPE)
  mask = (rng.random(SHAPE) < 0.6) * 1.0
  mask[0] = 0.0
  said = {
      "logprobs": old + rng.normal(0, 0.3, SHAPE),
      "entropy": rng.exponential(1.0, SHAPE),
      "values": rng.normal(size=SHAPE),
  }
  batch = {
      "loss_mask": mask,
      "old_logprobs": old,
      "sampler_logprobs": old + rng.normal(0, 0.5, SHAPE),
      "ref_logprobs": old + rng.normal(0, 0.5, SHAPE),
      "old_values": said["values"] + rng.normal(0, 0.3, SHAPE),
      "advantage": rng.normal(size=SHAPE[0]),
      "weight": rng.choice([0.0, 0.5, 1.0, 2.0], SHAPE[0]),
  }
  return said, batch


def as_batch(arrays):
  unused = {f.name: np.zeros(()) for f in dataclasses.fields(TrainBatch)}
  return TrainBatch(**{k: np.float32(v) for k, v in (unused | arrays).items()})


def totals_of(batch):
  tokens = batch["loss_mask"].sum(1)
  return losses.Totals(
      trajectories=np.float32(batch["weight"].sum()),
      tokens=np.float32(batch["weight"] @ tokens),
      context_tokens=np.float32(0),
  )


@functools.cache
def run(objective):
  def loss(said, batch, totals):
    value, tally = objective(Prediction(**said), batch, totals)
    return value, tally.sums

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_of(objective, said, batch, totals=None):
  said = {name: np.float32(value) for name, value in said.items()}
  totals = totals_of(batch) if totals is None else totals
  return run(objective)(said, as_batch(batch), totals)


def expected(objective, said, batch):
  """The objective from the oracles, in float64."""
  mask, weight = batch["loss_mask"], batch["weight"]
  gains = batch["advantage"][:, None] + 0 * mask
  part = objective.critic
  if part is not None:
    gains = oracle.generalised_advantages(
        batch["advantage"],
        batch["old_values"],
        mask,
        discount=part.discount,
        trace=part.trace,
    )
  ratio = oracle.token_ratio(said["logprobs"], batch["old_logprobs"], mask)
  surrogate, floor = objective.surrogate, {}
  if isinstance(surrogate, functools.partial):
    surrogate, floor = surrogate.func, surrogate.keywords
  surrogate = getattr(oracle, surrogate.__name__)
  per_token = surrogate(ratio, gains, **CLIP, **floor)
  if objective.importance is not None:
    gap = oracle.token_ratio(
        batch["old_logprobs"], batch["sampler_logprobs"], mask
    )
    per_token = per_token * np.minimum(gap, 2.0)
  if objective.kl is not None:
    kl = oracle.kl_k3(said["logprobs"], batch["ref_logprobs"])
    per_token = per_token - objective.kl_coefficient * kl
  per_token = per_token + objective.entropy_coefficient * said["entropy"]
  loss = -oracle.token_mean(per_token, mask, weight)
  if part is not None:
    error = oracle.clipped_value_loss(
        said["values"],
        batch["old_values"],
        gains + batch["old_values"],
        clip=part.clip,
    )
    loss += part.coefficient * oracle.token_mean(error, mask, weight)
  return loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", (PLAIN, FULL), ids=("plain", "full"))
@pytest.mark.parametrize(
    "surrogate", (losses.clipped_surrogate, losses.cispo_surrogate, DUAL)
)
def test_loss_equals_the_oracle(base, surrogate, seed):
  objective = dataclasses.replace(base, surrogate=surrogate)
  said, batch = drawn(seed)
  (loss, sums), _ = loss_of(objective, said, batch)
  np.testing.assert_allclose(
      loss, expected(objective, said, batch), rtol=1e-4, atol=1e-6
  )
  assert sums["clip_fraction"] > 0


@pytest.mark.parametrize("base", (PLAIN, FULL), ids=("plain", "full"))
def test_trajectories_may_be_split_over_micro_batches(base):
  said, batch = drawn(0)
  (whole, _), slope = loss_of(base, said, batch)
  parts = [
      loss_of(
          base,
          {name: value[rows] for name, value in said.items()},
          {name: value[rows] for name, value in batch.items()},
          totals_of(batch),
      )
      for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
  ]
  np.testing.assert_allclose(
      sum(float(loss) for (loss, _), _ in parts), whole, rtol=1e-5
  )
  for name in ("logprobs", "entropy", "values"):
    joined = np.concatenate([grads[name] for _, grads in parts])
    np.testing.assert_allclose(joined, slope[name], rtol=1e-5, atol=1e-8)


def test_what_was_not_sampled_changes_nothing():
  said, batch = drawn(1)
  clean = loss_of(FULL, said, batch)
  unseen = (batch["loss_mask"] == 0) | (batch["weight"][:, None] == 0)

  def garbled(arrays):
    return {
        name: np.where(unseen, np.nan, value)
        if value.shape == SHAPE and name != "loss_mask"
        else value
        for name, value in arrays.items()
    }

  jax.tree.map(
      np.testing.assert_array_equal,
      loss_of(FULL, garbled(said), garbled(batch)),
      clean,
  )


def test_a_critic_is_pulled_to_what_came_of_its_states():
  said, batch = drawn(2)
  part = dataclasses.replace(CRITIC, discount=1.0, trace=1.0, clip=100.0)
  objective = dataclasses.replace(PLAIN, critic=part)
  batch["weight"] = np.ones(SHAPE[0])
  _, slope = loss_of(objective, said, batch)
  # All of the reward comes after every token of its trajectory.
  error = said["values"] - batch["advantage"][:, None]
  wanted = 0.5 * batch["loss_mask"] * error / batch["loss_mask"].sum()
  np.testing.assert_allclose(slope["values"], wanted, rtol=1e-4, atol=1e-7)


def test_entropy_is_rewarded():
  said, batch = drawn(3)
  objective = dataclasses.replace(PLAIN, entropy_coefficient=0.1)
  (_, sums), slope = loss_of(objective, said, batch)
  weight = batch["weight"][:, None] * batch["loss_mask"]
  np.testing.assert_allclose(
      slope["entropy"], -0.1 * weight / weight.sum(), rtol=1e-5
  )
  counted = batch["loss_mask"] * (weight > 0)
  np.testing.assert_allclose(
      sums["entropy"], (counted * said["entropy"]).sum(), rtol=1e-5
  )
  assert objective.needs_entropy and not PLAIN.needs_entropy


def test_where_an_advantage_of_zero_teaches_nothing():
  assert PLAIN.only_advantage
  for more in (
      {"kl": losses.kl_k2, "kl_coefficient": 0.1},
      {"entropy_coefficient": 0.1},
      {"critic": CRITIC},
  ):
    assert not dataclasses.replace(PLAIN, **more).only_advantage


@pytest.mark.parametrize("value", (-0.1, float("inf"), float("nan")))
def test_an_impossible_bonus_is_named(value):
  with pytest.raises(ValueError, match="entropy_coefficient"):
    dataclasses.replace(PLAIN, entropy_coefficient=value)
