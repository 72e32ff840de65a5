"""A stage may say what rewards count in it: from the config to the records."""

import dataclasses
import io
import re

import pytest
import tiny_run

from configs import quickstart
from experiments import method, recipe
from mgrpo_jax.report import records
from mgrpo_jax.testing.setup import small_setup


def changed(role="researcher", **shares):
  """The quickstart, whose hard stage pays a role otherwise."""
  config = quickstart.get_config()
  config.stages.hard.reward[role] = shares
  return config


def test_a_stage_changes_what_it_names_and_nothing_else():
  config = changed(expert_share=0.2, correct_share=0)
  recipe.check(config)
  again = recipe.restore(recipe.plain(config))
  recipe.check(again)
  for one in (config, again):
    made = method.build(one)
    easy, hard = recipe.build_stages(one)
    whole = made.reward_weights
    assert made.rewards_of(easy) == whole
    assert made.rewards_of(hard)["main"] == whole["main"]
    assert made.rewards_of(hard)["researcher"] == dataclasses.replace(
        whole["researcher"], expert=0.2, correct=0.0
    )


def test_without_them_every_stage_pays_as_the_run():
  made = method.build(quickstart.get_config())
  assert made.stage_rewards == {}


def test_a_stage_may_charge_otherwise_for_long_streams():
  config = changed(overlong_share=0.0)
  with pytest.raises(ValueError, match=r"overlong_share: 0\.0, allowed: noth"):
    recipe.check(config)
  config.reward.overlong_tokens = 8
  recipe.check(config)
  stages = recipe.build_stages(config)
  found = [method.build(config).rewards_of(s)["researcher"] for s in stages]
  assert [one.overlong for one in found] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("role", "shares", "message"),
    [
        ("boss", {}, "boss: unknown role 'boss', allowed: main, researcher"),
        ("main", {"expert": 0.1}, "main.expert: unknown key; did you mean 'ex"),
        ("main", {"format_share": 1.5}, "main.format_share: 1.5 must be in"),
        ("main", {"expert_share": 0.1}, "main.expert_share: 0.1, allowed: 0, "),
        ("main", {"expert_share": -0.1}, "main.expert_share: -0.1 must be in"),
        ("main", {"format_share": "a"}, "main.format_share: 'a' must be a num"),
        ("main", {"format_share": True}, "main.format_share: True must be a n"),
        ("main", {"correct_share": float("nan")}, "main.correct_share: nan mu"),
    ],
)
def test_what_is_impossible_is_named(role, shares, message):
  expected = re.escape(f"config.stages.hard.reward.{message}")
  with pytest.raises(ValueError, match=expected):
    recipe.check(changed(role, **shares))


def test_a_charge_for_length_is_not_below_zero():
  config = changed(overlong_share=-1.0)
  config.reward.overlong_tokens = 8
  with pytest.raises(
      ValueError, match=r"config\.stages\.hard\.reward\.researcher: overlong"
  ):
    recipe.check(config)


def test_what_is_no_role_of_a_stages_rewards_is_named():
  config = quickstart.get_config()
  config.stages.hard.reward.main = 0.5
  with pytest.raises(ValueError, match=r"reward\.main: 0\.5 must be a ConfigD"):
    recipe.check(config)


def totals(directory, step):
  """Of each call of a step, its role, components and total."""
  path = records.list_steps(directory / "rollouts")[step]
  for one in records.read_step(path).groups:
    for call in one["trajectories"]:
      yield call["role"], call["rewards"]


@pytest.mark.parametrize("staleness", [0, 2])
def test_calls_are_paid_as_their_stage_says(tmp_path, staleness):
  """Also those that are rolled out while the stage before is trained on."""
  setup = small_setup(seed=0, imitation_steps=0, steps=2)
  whole = setup.method.reward_weights
  first = setup.stages[1]
  later = dataclasses.replace(first, name="later", steps=1)
  other = {
      role: dataclasses.replace(weights, format=0.7, expert=0.0)
      for role, weights in whole.items()
  }
  setup = dataclasses.replace(
      setup,
      stages=(first, later),
      tasks=dict.fromkeys(("reinforce", "later"), setup.tasks["reinforce"]),
      method=dataclasses.replace(setup.method, stage_rewards={"later": other}),
      max_staleness=staleness,
  )
  tiny_run.train(tmp_path / "run", setup, config={}, stream=io.StringIO())
  for step, weights in enumerate((whole, whole, other)):
    found = list(totals(tmp_path / "run", step))
    assert len(found) >= 9
    for role, paid in found:
      share = weights[role]
      expected = (
          share.format * paid["format"]
          + share.correct * paid["correct"]
          + share.expert * paid["expert"]
      )
      assert paid["total"] == pytest.approx(expected, abs=1e-6)  # float32
      assert paid["total"] > 0  # the format is always right here
