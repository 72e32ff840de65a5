import jax
import numpy as np

from mgrpo_jax import advantages, alignment, credit, rewards
from mgrpo_jax.types import Status, Trajectory


def trajectory(task, rollout, call):
  return Trajectory(
      task_id=task,
      rollout=rollout,
      role="researcher",
      call=call,
      parent=0,
      request="",
      tokens=np.zeros(2, np.int32),
      loss_mask=np.array([0, 1], np.float32),
      sampler_logprobs=np.zeros(2, np.float32),
      version_min=0,
      version_max=0,
      status=Status.COMPLETED,
      turns=(),
      result_text="",
      seconds=0.0,
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
              tuple(trajectory(f"t{b}", k, d) for d in range(len(values)))
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
  )


def assigned(grid, *, align, num_slots):
  return credit.assign(
      role_calls(grid),
      align=align,
      advantage=advantages.per_task,
      num_slots=num_slots,
      seed=7,
  )


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


def test_one_program_for_all_batches_of_a_shape():
  with jax.log_compiles(False):
    assigned([[[1.0], [0.0]]], align=alignment.mask, num_slots=3)
    before = credit._aligned._cache_size()
    assigned([[[0.3], [0.9]]], align=alignment.mask, num_slots=3)
    assert credit._aligned._cache_size() == before
