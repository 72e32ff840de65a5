"""What a recipe decides, stage by stage."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest
from delegating import cast_setup
from test_run import make_setup

from mgrpo_jax import losses, store
from mgrpo_jax.decoupled.run import restricted
from mgrpo_jax.run import open_run


def moves(*, every, loss):
  """Which of a stage's first six steps the reference moves after."""
  method = make_setup(loss=loss, reference_every=every).method
  return [number for number in range(6) if method.moves_reference(number)]


def test_the_reference_moves_after_every_so_many_steps():
  compared = {"kl": losses.kl_k2, "kl_coefficient": 0.1}
  assert moves(every=2, loss=compared) == [1, 3, 5]
  assert moves(every=1, loss=compared) == [0, 1, 2, 3, 4, 5]
  assert moves(every=0, loss=compared) == []
  assert moves(every=2, loss={"kl": None, "kl_coefficient": 0.0}) == []


def equal(one, other):
  return all(
      map(np.array_equal, *(jax.tree.leaves(tree) for tree in (one, other)))
  )


def held(learner):
  """Copies of what is trained, and of what it is compared with."""
  return jax.tree.map(np.array, (learner.trained, learner.state.reference))


@pytest.mark.parametrize("every", [0, 2])
def test_what_a_run_compares_with_moves_when_it_is_due(tmp_path, every):
  setup = make_setup(reference_every=every)
  stage = setup.stages[1]

  async def work():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      learner = run.resources.learners["main"]
      groups = await run.collect(stage, run.take(stage), 0)
      credits = run.assign(stage, groups, run.grade(stage, groups), 0)
      found = [held(learner)]
      for number in range(3):
        run.update(stage, number, groups, credits)
        found.append(held(learner))
      return found

  (begun, kept), *after = asyncio.run(work())
  trained = [params for params, _ in after]
  assert not any(map(equal, [begun, *trained[:-1]], trained))  # it learns
  references = [reference for _, reference in after]
  if not every:
    assert kept is None and references == [None] * 3
    return
  assert equal(kept, begun)
  assert equal(references[0], begun)
  assert equal(references[1], trained[1])
  assert equal(references[2], trained[1])


def test_what_a_stage_does_not_say_of_rewards_is_the_runs():
  setup = make_setup()
  whole = setup.method.reward_weights
  other = dataclasses.replace(whole["researcher"], expert=0.0)
  method = dataclasses.replace(
      setup.method, stage_rewards={"reinforce": {"researcher": other}}
  )
  imitate, reinforce = setup.stages
  assert method.rewards_of(imitate) == whole
  assert method.rewards_of(reinforce) == {**whole, "researcher": other}


def comes_and_goes():
  """`delegating.cast_setup`, whose researcher comes back in a last stage."""
  setup = cast_setup(seed=0)
  again = dataclasses.replace(setup.stages[-1], name="again", steps=3)
  none = dataclasses.replace(again, name="none", steps=0)
  return dataclasses.replace(
      setup,
      stages=(*setup.stages, none, again),
      casts={**setup.casts, "again": setup.casts["reinforce"]},
  )


@pytest.mark.parametrize(
    ("policy", "spans"),
    [
        ("main", [(0, 8)]),
        ("researcher", [(0, 3), (5, 8)]),
        ("scout", [(3, 5)]),
    ],
)
def test_a_job_makes_the_steps_in_which_its_policy_plays(policy, spans):
  whole = comes_and_goes()
  setup = restricted(whole, policy)
  assert setup.spans == tuple(range(*one) for one in spans)
  assert setup.end == spans[-1][1]
  assert setup.leaves == (policy == "scout")
  made = {step for one in spans for step in range(*one)}
  for step in range(10):
    expected = min((s for s in made if s >= step), default=step)
    assert setup.coming(step) == expected
  assert whole.spans == (range(8),) and not whole.leaves


def test_a_team_is_asked_as_it_was_cast_last():
  setup = comes_and_goes()
  before, late = setup.casts["reinforce"], setup.casts["late"]
  teams = [setup.team_at(step) for step in range(-1, 9)]
  assert teams == [before] * 4 + [late] * 2 + [before] * 4
  asked = [setup.team_after(done) for done in range(9)]
  assert asked == [before] * 4 + [late] * 2 + [before] * 3
  nothing = dataclasses.replace(setup, stages=setup.stages[3:4])
  assert nothing.team_after(0) == nothing.team_at(0) == setup.team
  assert not nothing.spans and not nothing.end and not nothing.leaves


def test_jobs_do_not_take_turns_at_the_root():
  setup = cast_setup(seed=0)
  other = setup.team.cast({"main": "scout", "researcher": "main"})
  changed = dataclasses.replace(setup, casts={"late": other})
  with pytest.raises(ValueError, match="one policy of the root's"):
    restricted(changed, "main")
