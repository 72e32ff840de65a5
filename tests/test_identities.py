"""The identities of the algorithm that every change must keep.

Numbers are those of the list in the specification. 9, that micro-batches,
packing, order and devices do not matter, is in `test_invariance`; 10, that a
seed decides a rollout, is in the sampler's tests.

Every example that hypothesis draws is a block of CASES cases, computed at once.
Fifty times as many (`conftest.py`):

    pytest tests/test_identities.py --hypothesis-profile=thorough
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import advantages as oracle
from rules import RULES
from trajectories import group, random_trajectory, task

from experiments.method import COMPARISONS
from mgrpo_jax import (
    advantages,
    alignment,
    credit,
    packing,
    rewards,
)
from mgrpo_jax.testing.team import small_team

CASES = 32
B, K, D = 2, 4, 3
MOST = 5  # calls in a rollout
STRATEGIES = (
    alignment.duplicate_or_drop,
    alignment.mask,
    alignment.inverse_count,
)
SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings.get_current_profile_name() != "thorough"
RUNS = settings(
    deadline=None, max_examples=20 if QUICK else settings().max_examples
)
ROUNDING = dict(rtol=1e-4, atol=1e-5)

# What each normaliser does with a constant added to a group's rewards and with
# their unit, and which slots may be permuted freely: those of its group.
#   constant  "none" it leaves no trace; "kept" it stays
#   unit      "free" of it; "linear" in it
#   group     "batch", "task", "column" (a slot position in all rollouts),
#             "block" (of those that count, as they arrive), "rollouts" (whole
#             ones, and slots within each), "any"
#   copies    whether duplicating every slot changes nothing
# `plain` compares with nothing, so a constant stays and equal rewards are not
# zeros. To `leave_one_out` a copy is one more of the others, so duplicating
# moves the baseline to what it is compared with; and to `per_block` one more
# arrival, so that others share a block.
NORMALISERS = {
    "per_task": ("none", "free", "task", True),
    "mean_only": ("none", "linear", "task", True),
    "leave_one_out": ("none", "linear", "task", False),
    "other_rollouts": ("none", "linear", "rollouts", True),
    "per_call_index": ("none", "free", "column", True),
    "per_batch": ("none", "free", "batch", True),
    "per_block": ("none", "free", "block", False),
    "per_subtask": ("none", "free", "rollouts", True),
    "inherit_parent": ("none", "free", "rollouts", True),
    "plain": ("kept", "linear", "any", True),
}


def all_gains(slots):
  """Every normaliser's advantages of aligned slots [B, K, D]."""
  values, weights = slots["rewards"], slots["weights"]
  roots = advantages.per_task(slots["roots"], np.ones((B, K, 1), np.float32))
  found = {
      name: getattr(advantages, name)(values, weights)
      for name in NORMALISERS
      if name not in ("per_subtask", "inherit_parent")
  }
  found["per_subtask"] = advantages.per_subtask(
      values, weights, subtasks=slots["subtasks"]
  )
  found["inherit_parent"] = advantages.inherit_parent(roots, weights)
  return found


_gains = jax.jit(jax.vmap(all_gains))


def compute(slots):
  return {
      name: np.asarray(values, np.float64)
      for name, values in jax.device_get(_gains(slots)).items()
  }


@functools.cache
def aligner(strategy):
  def lay(seed, num_calls):
    return strategy(jax.random.key(seed), num_calls, num_slots=D)

  return jax.jit(jax.vmap(lay))


def sixteenths(rng, shape):
  """Multiples of 1/16 up to 4: float32 adds and subtracts them exactly."""
  return np.float32(rng.integers(-64, 65, shape) / 16)


def drawn(seed):
  """Slots of every alignment, and of weights that no alignment gives."""
  rng = np.random.default_rng(seed)
  each = CASES // (len(STRATEGIES) + 1)
  parts = []
  for strategy in STRATEGIES:
    num_calls = rng.integers(0, MOST + 1, (each, B, K)).astype(np.int32)
    seeds = rng.integers(2**32, size=each, dtype=np.uint32)
    aligned = jax.device_get(aligner(strategy)(seeds, num_calls))
    calls = {
        "rewards": sixteenths(rng, (each, B, K, MOST)),
        "subtasks": rng.integers(0, 2, (each, B, K, MOST)).astype(np.int32),
    }
    slots = {
        name: np.take_along_axis(values, aligned.index, axis=3)
        for name, values in calls.items()
    }
    parts.append(slots | {"weights": aligned.weight})
  shape = (each, B, K, D)
  free = {
      "rewards": sixteenths(rng, shape),
      "subtasks": rng.integers(0, 2, shape).astype(np.int32),
      "weights": np.float32(rng.choice([0, 0.25, 1, 2], shape)),
  }
  slots = {
      name: np.concatenate([part[name] for part in [*parts, free]])
      for name in free
  }
  return rng, slots | {"roots": sixteenths(rng, (CASES, B, K, 1))}


def assert_all_close(found, expected, names=tuple(NORMALISERS)):
  for name in names:
    np.testing.assert_allclose(
        found[name], expected[name], **ROUNDING, err_msg=name
    )


def scaled(slots, scale=1, constant=0):
  scale, constant = np.float32(scale), np.float32(constant)
  changed = {n: slots[n] * scale + constant for n in ("rewards", "roots")}
  return slots | changed


@RUNS
@given(SEEDS, st.integers(-64, 64))
def test_1_a_constant_leaves_advantages_unchanged(seed, sixteenth):
  _, slots = drawn(seed)
  constant = sixteenth / 16
  expected = compute(slots)
  expected["plain"] = expected["plain"] + constant * (slots["weights"] > 0)
  assert_all_close(compute(scaled(slots, constant=constant)), expected)


@RUNS
@given(SEEDS, st.sampled_from([1e-12, 1 / 3, 7.0, 1e12]))
@example(0, 1e12)
def test_1_so_does_a_scale(seed, scale):
  _, slots = drawn(seed)
  found = compute(scaled(slots, scale))
  for name, (_, unit, *_) in NORMALISERS.items():
    found[name] = found[name] / (scale if unit == "linear" else 1.0)
  assert_all_close(found, compute(slots))


def blocks_of(weights):
  """Which K slots that count arrive together, of one case."""
  places = np.arange(B * K * D).reshape(B, K, D)
  arrivals = np.swapaxes(places, 0, 1).ravel()
  queue = arrivals[weights.ravel()[arrivals] > 0]
  return np.split(queue, range(K, len(queue), K))


def orders(rng, group, weights):
  """A permutation of slots for each case, [CASES, B·K·D], within groups."""
  found = []
  for case in range(CASES):
    places = np.arange(B * K * D).reshape(B, K, D)
    if group == "block":
      places = places.ravel()
      for block in blocks_of(weights[case]):
        places[block] = rng.permutation(block)
    elif group in ("batch", "any"):
      places = rng.permutation(places.ravel())
    elif group == "task":
      places = rng.permuted(places.reshape(B, K * D), axis=1)
    elif group == "column":
      places = rng.permuted(places, axis=1)
    else:
      places = rng.permuted(places[:, rng.permutation(K)], axis=2)
    found.append(places.ravel())
  return np.array(found)


def permuted(values, order):
  flat = values.reshape(CASES, -1)
  return np.take_along_axis(flat, order, axis=1).reshape(values.shape)


@pytest.mark.parametrize(
    "kind", ("batch", "block", "task", "column", "rollouts", "any")
)
@RUNS
@given(SEEDS)
def test_2_permuting_a_group_permutes_the_result(kind, seed):
  rng, slots = drawn(seed)
  order = orders(rng, kind, slots["weights"])
  moved = {
      name: permuted(slots[name], order)
      for name in ("rewards", "weights", "subtasks")
  }
  # A rollout takes its root with it: all slots of a rollout came from one.
  origins = order.reshape(CASES, B, K, D)[..., :1] // D
  moved["roots"] = permuted(slots["roots"], origins.reshape(CASES, B * K))
  expected = {n: permuted(v, order) for n, v in compute(slots).items()}
  names = [n for n, (_, _, group, _) in NORMALISERS.items() if group == kind]
  assert_all_close(compute(moved), expected, names)


@RUNS
@given(SEEDS, st.floats(-1e6, 1e6, width=32))
def test_3_equal_rewards_give_zeros(seed, size):
  rng, slots = drawn(seed)
  # Equal in a group, else not: rewards of the batch, of each block, task,
  # column and sub-task.
  b, k, d = np.ogrid[:B, :K, :D]
  per_case = [slots["subtasks"][c] for c in range(CASES)]
  arrived = np.zeros((CASES, B * K * D), int)
  for case, weights in enumerate(slots["weights"]):
    for number, block in enumerate(blocks_of(weights)):
      arrived[case, block] = number
  groups = {
      "batch": [b * 0 + k * 0 + d * 0] * CASES,
      "block": list(arrived.reshape(CASES, B, K, D)),
      "task": [b + k * 0 + d * 0] * CASES,
      "column": [b * D + d + k * 0] * CASES,
      "subtask": [(b * K + k) * 2 + asked for asked in per_case],
  }
  names = {
      "batch": ("per_batch",),
      "block": ("per_block",),
      "task": ("per_task", "mean_only", "leave_one_out", "other_rollouts"),
      "column": ("per_call_index",),
      "subtask": ("per_subtask",),
  }
  for kind, numbers in groups.items():
    values = np.float32(size * rng.uniform(-1, 1, B * K * 2 * D))
    flat = slots | {"rewards": values[np.array(numbers)]}
    found = compute(flat | {"roots": values[np.array(groups["task"])[..., :1]]})
    for name in (*names[kind], "inherit_parent"):
      np.testing.assert_array_equal(found[name], 0.0, err_msg=name)
    np.testing.assert_array_equal(
        found["plain"], np.where(slots["weights"] > 0, flat["rewards"], 0.0)
    )


@functools.cache
def single_agents(seed, num_tasks=25):
  """Rollouts of teams whose main agent called nobody."""
  rng = np.random.default_rng(seed)
  texts = rng.choice(
      ["Lima", "Quito", "Rome"], (num_tasks, K), p=[0.5, 0.3, 0.2]
  )
  groups = [
      group(
          task(answers=("Lima",)),
          [
              random_trajectory(rng, 6, 9, rollout=k, result_text=str(text))
              for k, text in enumerate(row)
          ],
          K,
      )
      for row in texts
  ]
  weights = rewards.RewardWeights(
      format=0.1, correct=0.9, expert=0.0, overlong=0.0
  )
  scores = [
      rewards.score(g, weights={"main": weights}, rules=RULES) for g in groups
  ]
  return groups, scores, (0.1 + 0.9 * (texts == "Lima"))[..., None]


@pytest.mark.parametrize(
    "strategy, normaliser",
    list(itertools.product(STRATEGIES, NORMALISERS)),
)
def test_4_a_team_without_calls_is_a_single_agent(strategy, normaliser):
  # Those that are about calls give the main agent `per_task`.
  comparison = COMPARISONS[normaliser]
  about_calls = comparison.calls is not comparison.root
  single = "per_task" if about_calls else normaliser
  for seed in range(4):
    groups, scores, earned = single_agents(seed)
    found = credit.compared(
        groups,
        scores,
        team=small_team(),
        trained={"main", "researcher"},
        align=strategy,
        comparison=comparison,
        num_slots=D,
        seeds={"main": seed, "researcher": seed + 1},
    )
    assert found.by_policy["researcher"] == ()
    credits = found.by_policy["main"]
    # GRPO as for one agent: K rewards of a task, compared.
    expected = earned
    if single != "plain":
      expected = getattr(oracle, single)(earned, np.ones_like(earned))
    assert [one.weight for one in credits] == [1.0] * earned.size
    np.testing.assert_allclose(
        [one.advantage for one in credits], expected.ravel(), **ROUNDING
    )
    flat = [t for g in groups for t in g.trajectories]
    assert all(c.trajectory is t for c, t in zip(credits, flat, strict=True))


@RUNS
@given(SEEDS)
def test_5_duplicating_every_slot_changes_no_advantage(seed):
  _, slots = drawn(seed)
  copied = {n: np.tile(v, 2) for n, v in slots.items() if n != "roots"}
  found = compute(copied | {"roots": slots["roots"]})
  expected = {n: np.tile(v, 2) for n, v in compute(slots).items()}
  names = [n for n, (*_, copies) in NORMALISERS.items() if copies]
  assert_all_close(found, expected, names)


@RUNS
@given(SEEDS)
def test_5_nor_does_folding_copies_change_what_they_weigh(seed):
  _, slots = drawn(seed)
  rng = np.random.default_rng(seed)
  index = rng.integers(0, 3, (CASES, B, K, D))
  calls = [[list(range(3 * k, 3 * k + 3)) for k in range(K)]] * B
  for case in range(CASES):
    weights = slots["weights"][case]
    gains = slots["rewards"][case]
    aligned = alignment.Alignment(
        index=index[case], weight=weights, num_calls=np.full((B, K), 3)
    )
    folded = packing.fold(calls, aligned, gains)
    places = [(c.trajectory, c.advantage) for c in folded]
    expected = {}
    for b, k, d in np.argwhere(weights > 0):
      held = (b, calls[b][k][index[case, b, k, d]], float(gains[b, k, d]))
      expected[held] = expected.get(held, 0.0) + float(weights[b, k, d])
    assert [key[1:] for key in expected] == places
    assert [c.weight for c in folded] == list(expected.values())
