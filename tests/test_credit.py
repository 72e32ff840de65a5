import dataclasses

import numpy as np
import pytest
from trajectories import group as rollout_group
from trajectories import task, trajectory

from experiments.method import COMPARISONS
from mgrpo_jax import advantages, alignment, credit, rewards
from mgrpo_jax.comparison import alike
from mgrpo_jax.testing.team import small_team
from mgrpo_jax.types import Alignment


def researched(question, rollout, call):
  return trajectory(
      task_id=question, role="researcher", rollout=rollout, call=call, parent=0
  )


def role_calls(grid):
  """grid[b][k] lists the rewards of the calls."""
  most = max(len(k) for b in grid for k in b)
  padded = np.zeros((len(grid), len(grid[0]), most), np.float32)
  for b, k in np.ndindex(padded.shape[:2]):
    padded[b, k, : len(grid[b][k])] = grid[b][k]
  return rewards.RoleCalls(
      calls=tuple(
          tuple(
              tuple(researched(f"t{b}", k, d) for d in range(len(values)))
              for k, values in enumerate(row)
          )
          for b, row in enumerate(grid)
      ),
      positions=tuple(
          tuple(
              tuple(10 * k + d for d in range(len(values)))
              for k, values in enumerate(row)
          )
          for row in grid
      ),
      num_calls=np.array([[len(k) for k in b] for b in grid], np.int32),
      rewards=padded,
      subtasks=np.where(padded == 0, -1, 0).astype(np.int32),
  )


def assigned(grid, *, align, num_slots):
  calls = role_calls(grid)
  found = credit.compare(
      {"researcher": calls},
      root="main",
      align=align,
      comparison=COMPARISONS["per_task"],
      num_slots=num_slots,
      seeds={"researcher": 7},
  )
  return credit.assign(calls, *found["researcher"])


def test_a_worked_case():
  # One task, rollouts of 1 and 2 calls; D = 2 and the mask keep all three.
  found = assigned([[[1.0], [0.0, 0.5]]], align=alignment.mask, num_slots=2)
  spread = np.std([1.0, 0.0, 0.5])
  gains = {
      c.trajectory.rollout * 10 + c.trajectory.call: c.advantage
      for c in found.credits
  }
  np.testing.assert_allclose(
      [gains[0], gains[10], gains[11]],
      [0.5 / spread, -0.5 / spread, 0.0],
      atol=1e-6,
  )


def test_rollouts_without_calls_have_no_credit():
  found = assigned([[[], [1.0], [0.0]]], align=alignment.mask, num_slots=3)
  assert {c.trajectory.rollout for c in found.credits} == {1, 2}


def test_copies_are_folded_into_weights():
  found = assigned(
      [[[1.0], [0.0]]], align=alignment.duplicate_or_drop, num_slots=4
  )
  assert [c.weight for c in found.credits] == [4.0, 4.0]


def test_advantages_go_to_the_call_they_belong_to():
  calls = role_calls([[[1.0], [0.0, 0.5]]])
  found = assigned([[[1.0], [0.0, 0.5]]], align=alignment.mask, num_slots=2)
  gains = [np.full(12, np.nan)]
  credit.scatter(found, calls, gains)
  for one in found.credits:
    where = 10 * one.trajectory.rollout + one.trajectory.call
    assert gains[0][where] == np.float32(one.advantage)
  assert np.isnan(gains[0]).sum() == 12 - 3


def test_a_call_with_several_advantages_gets_their_mean():
  # Rollout 0's call fills three slots, of weights 2, 1, 1 in three groups.
  calls = role_calls([[[1.0], [0.0, 0.5, 1.0]]])
  found = credit.Assignment(
      credits=(),
      alignment=Alignment(
          index=np.array([[[0, 0, 0], [0, 2, 1]]]),
          weight=np.array([[[2.0, 1.0, 1.0], [1.0, 1.0, 0.0]]], np.float32),
          num_calls=calls.num_calls,
      ),
      rewards=np.zeros((1, 2, 3), np.float32),
      advantages=np.array([[[1.0, -1.0, 0.5], [0.25, -0.5, 9.0]]], np.float32),
  )
  gains = [np.full(13, np.nan)]
  credit.scatter(found, calls, gains)
  first, *others = (calls.positions[0][0][0], *calls.positions[0][1])
  assert gains[0][first] == 1.5 / 4
  np.testing.assert_array_equal(gains[0][others], [0.25, np.nan, -0.5])


def test_what_is_inherited_must_be_there():
  with pytest.raises(ValueError, match="those of 'main', to inherit from"):
    credit.compare(
        {"researcher": role_calls([[[1.0], [0.0]]])},
        root="main",
        align=alignment.mask,
        comparison=COMPARISONS["inherit_parent"],
        num_slots=2,
        seeds={"researcher": 0},
    )


def test_one_program_for_all_batches_of_a_shape():
  assigned([[[1.0], [0.0]]], align=alignment.mask, num_slots=3)
  before = credit._aligned._cache_size()
  assigned([[[0.3], [0.9]]], align=alignment.mask, num_slots=3)
  assert credit._aligned._cache_size() == before


def graded(totals, weights=None):
  totals = np.float32(totals)
  return rewards.Scores(
      format=np.ones_like(totals),
      correct=totals,
      expert=totals,
      overlong=np.zeros_like(totals),
      total=totals,
      weight=np.float32(np.ones_like(totals) if weights is None else weights),
  )


def two_rollouts(attempts=(0,) * 6):
  """Main is called once and the researcher twice in each of two rollouts."""
  calls = []
  for k in range(2):
    calls.append(trajectory(rollout=k))
    calls += [researched("t", k, call) for call in range(2)]
  calls = [
      dataclasses.replace(call, attempt=attempt)
      for call, attempt in zip(calls, attempts, strict=True)
  ]
  return rollout_group(task(), calls, 2)


def compared(totals, attempts=(0,) * 6, **changes):
  settings = {
      "team": small_team(),
      "trained": {"main", "researcher"},
      "align": alignment.mask,
      "comparison": alike(advantages.mean_only),
      "num_slots": 2,
      "seeds": {"main": 0, "researcher": 1},
  }
  return credit.compared(
      [two_rollouts(attempts)], [graded(totals)], **(settings | changes)
  )


def test_every_role_is_compared_with_itself():
  found = compared([1, 0, 0.5, 0, 0.5, 1])
  np.testing.assert_allclose(
      found.advantages[0], [0.5, -0.5, 0, -0.5, 0, 0.5], atol=1e-6
  )
  assert {n: len(c) for n, c in found.by_policy.items()} == {
      "main": 2,
      "researcher": 4,
  }
  assert found.assignments["main"].alignment.index.shape == (1, 2, 1)


@pytest.mark.parametrize(
    "align, share",
    [
        (alignment.duplicate_or_drop, 8),  # D
        (alignment.mask, 2),  # d
        (alignment.inverse_count, 1),
    ],
)
def test_how_much_a_called_role_weighs_in_a_policy_it_shares(align, share):
  team = small_team()
  team = dataclasses.replace(
      team,
      roles=tuple(
          dataclasses.replace(role, policy="both") for role in team.roles
      ),
  )
  found = compared(
      [1, 0, 0.5, 0, 0.5, 1],
      team=team,
      trained={"both"},
      align=align,
      num_slots=8,
  )
  weights = {"main": 0.0, "researcher": 0.0}
  for one in found.by_policy["both"]:
    weights[one.trajectory.role] += one.weight
  assert weights == pytest.approx({"main": 2.0, "researcher": 2.0 * share})


def test_a_role_that_does_not_learn_has_no_credit_and_no_advantage():
  found = compared([1, 0, 0.5, 0, 0.5, 1], trained={"main"})
  np.testing.assert_allclose(
      found.advantages[0], [0.5, np.nan, np.nan, -0.5, np.nan, np.nan]
  )
  assert set(found.by_policy) == set(found.assignments) == {"main"}


def test_calls_may_inherit_what_their_rollout_is_worth():
  inherited = {"comparison": COMPARISONS["inherit_parent"]}
  found = compared([3, 0, 0.5, 0, 0.5, 1], **inherited)
  np.testing.assert_allclose(
      found.advantages[0], [1, 1, 1, -1, -1, -1], atol=1e-6
  )
  # Also where the root does not learn.
  found = compared([3, 0, 0.5, 0, 0.5, 1], trained={"researcher"}, **inherited)
  np.testing.assert_allclose(
      found.advantages[0], [np.nan, 1, 1, np.nan, -1, -1], atol=1e-6
  )
  assert set(found.by_policy) == set(found.assignments) == {"researcher"}


def test_calls_may_be_compared_with_whatever_arrived_with_them():
  grids = {
      "main": [[[1.0], [0.0]], [[0.0], [0.5]]],
      "researcher": [[[0.0], [1.0]], [[0.5], [0.5]]],
  }
  found = credit.compare(
      {name: role_calls(grid) for name, grid in grids.items()},
      root="main",
      align=alignment.mask,
      comparison=COMPARISONS["per_block"],
      num_slots=1,
      seeds={"main": 0, "researcher": 1},
  )
  gains = {name: one[2][..., 0] for name, one in found.items()}
  # The root's with the same task's; calls in blocks of K = 2: the first
  # rollouts of both tasks, then the second ones.
  np.testing.assert_allclose(gains["main"], [[1, -1], [-1, 1]], atol=1e-6)
  np.testing.assert_allclose(gains["researcher"], [[-1, 1], [1, -1]], atol=1e-6)


def test_attempts_are_compared_with_each_other():
  found = compared(
      [3, 0.25, 0.75, 0, 9, 8],
      comparison=COMPARISONS["per_subtask"],
      attempts=(0, 0, 1, 0, 0, 1),
  )
  np.testing.assert_allclose(
      found.advantages[0], [1, -1, 1, -1, 1, -1], atol=1e-6
  )
  # Two sub-tasks of one attempt each: nothing to compare.
  found = compared(
      [0, 0.25, 0.75, 0, 9, 8], comparison=COMPARISONS["per_subtask"]
  )
  np.testing.assert_array_equal(found.advantages[0], 0)


def test_demonstrations_are_copied_but_for_calls_that_failed():
  scores = graded([1, 1, 1, 1, 1, 1], weights=[1, 1, 0, 1, 1, 1])
  found = credit.copied([two_rollouts()], [scores], small_team())
  assert [c.weight for c in found.by_policy["main"]] == [1.0, 1.0]
  assert len(found.by_policy["researcher"]) == 3
  assert all(c.advantage == 0 for c in found.by_policy["researcher"])
  assert np.isnan(found.advantages[0]).all()


def test_a_role_is_compared_the_same_alone_and_among_others():
  grids = {
      "a": [[[1.0, 0.0], [0.0, 0.5, 1.0, 0.25]], [[], [0.5]]],
      "b": [[[1.0], [0.0]], [[0.5], [1.0, 0.0]]],
      "c": [[[1.0] * 6, [0.0, 0.5]], [[0.75], [0.0, 1.0]]],
  }
  calls = {name: role_calls(grid) for name, grid in grids.items()}
  settings = {
      "root": "main",
      "align": alignment.duplicate_or_drop,
      "comparison": COMPARISONS["per_task"],
      "num_slots": 3,
      "seeds": {"a": 1, "b": 2, "c": 2**32 - 1},
  }
  together = credit.compare(calls, **settings)
  assert list(together) == list(calls)
  for name in calls:
    (alone,) = credit.compare({name: calls[name]}, **settings).values()
    aligned, earned, gains = together[name]
    np.testing.assert_array_equal(aligned.index, alone[0].index)
    np.testing.assert_array_equal(aligned.weight, alone[0].weight)
    np.testing.assert_array_equal(earned, alone[1])
    # float32: sums in another order.
    np.testing.assert_allclose(gains, alone[2], rtol=1e-5, atol=1e-6)


def test_roles_that_cannot_stand_side_by_side_are_named():
  calls = {
      "a": role_calls([[[1.0], [0.0]]]),
      "b": role_calls([[[1.0], [0.0]], [[0.5], [1.0]]]),
  }
  settings = {
      "root": "main",
      "align": alignment.mask,
      "comparison": COMPARISONS["per_task"],
      "num_slots": 2,
  }
  with pytest.raises(ValueError, match=r"'b': \(2, 2\)"):
    credit.compare(calls, **settings, seeds={"a": 1, "b": 2})
  with pytest.raises(ValueError, match=r"seeds must name roles \['a'\]"):
    credit.compare({"a": calls["a"]}, **settings, seeds={"b": 2})


def test_nobody_who_learns_has_nothing_to_compare():
  found = compared([1, 0, 0.5, 0, 0.5, 1], trained=())
  assert found.by_policy == found.assignments == {}
  assert np.isnan(found.advantages[0]).all()
