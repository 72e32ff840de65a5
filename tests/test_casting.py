"""A role may be replaced or added between stages: config, prompts, learning."""

import asyncio
import dataclasses
import io
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from delegating import cast_setup

from configs import decoupled_quickstart, default, quickstart
from experiments import casting, joining, placing, recipe
from mgrpo_jax import publish, store
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.team import Team
from mgrpo_jax.policy.load import load
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.run import open_run
from mgrpo_jax.testing.team import environment

EARLY, LATE = range(1, 3), range(3, 5)  # steps, behind one of imitation


def configured():
  """The quickstart; a scout plays the researcher in its hard stage."""
  config = quickstart.get_config()
  config.policies.scout = default.policy()
  config.stages.hard.cast.researcher = "scout"
  return config


def with_checker():
  """The same; beside the scout there is a checker of the researcher's."""
  config = configured()
  checker = default.role("researcher")
  checker.max_calls = 0
  config.team.roles.checker = checker
  config.team.roles.main.calls = ("researcher", "checker")
  config.stages.easy.without = ("checker",)
  return config


def test_stages_are_cast_as_a_recipe_says():
  config = with_checker()
  recipe.check(config)
  again = recipe.restore(recipe.plain(config))
  recipe.check(again)
  for one in (config, again):
    team = recipe.build_team(one)
    casts = casting.build(one, team)
    assert casts == {
        "easy": team.without(("checker",)),
        "hard": team.cast({"researcher": "scout"}),
    }
    names = placing.weighted(one, team)
    assert sorted(names) == ["main", "researcher", "scout"]
    assert names[-1] == "scout"  # others keep their places, and their seeds


def test_the_arm_that_replaces_the_researcher_can_be_had_in_jobs():
  config = decoupled_quickstart.get_config("replaced")
  recipe.check(config)
  joining.check(config)
  team = recipe.build_team(config)
  (late,) = casting.build(config, team).values()
  assert late.policies == ("main", "scout")


def test_who_is_cast_nowhere_changes_nothing():
  config = quickstart.get_config()
  team = recipe.build_team(config)
  assert casting.build(config, team) == {}
  assert placing.playing(config, team) == team.policies


def cast(stage, role, policy):
  return lambda config: config.stages[stage].cast.update({role: policy})


def away(stage, *roles):
  return lambda config: config.stages[stage].update(without=roles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast("hard", "boss", "main"), "stages.hard.cast.boss: no role 'boss'"),
        (cast("hard", "main", "x"), "stages.hard.cast.main: 'x' is not in con"),
        (cast("hard", "main", 3), "stages.hard.cast.main: 3 is not in config"),
        (  # in one line
            cast("hard", "main", {"a": 1}),
            "stages.hard.cast.main: {'a': 1} is not in config.policies",
        ),
        (
            cast("easy", "checker", "main"),
            "stages.easy.cast.checker: no role 'checker' in this stage, allowed"
            ": main, researcher",
        ),
        (away("hard", "boss"), "stages.hard.without: unknown roles ['boss']"),
        (away("hard", "main"), "stages.hard.without: role 'main': is the root"),
        (away("hard", 3), "stages.hard.without[0]: 3 must be text"),
        (
            away("hard", "checker"),
            "team.roles.checker: the role is in no stage that has steps",
        ),
        (
            lambda c: c.stages.hard.update(trained=("main", "researcher", "x")),
            "stages.hard.trained: unknown policy 'x'",
        ),
        (
            lambda c: c.stages.easy.update(trained=("scout",)),
            "stages.easy.trained: no role has policy 'scout', allowed: ['main',"
            " 'researcher']",
        ),
        (
            lambda c: c.stages.hard.update(steps=0),
            "team.roles.checker: the role is in no stage that has steps",
        ),
        (
            lambda c: c.stages.easy.reward.update(checker={}),
            "stages.easy.reward.checker: config.stages.easy.without has 'chec",
        ),
        (
            lambda c: c.engine.update(num_slots=100),
            "engine.num_slots: 100 must be at least 128",
        ),
    ],
)
def test_what_cannot_be_is_named(change, message):
  config = with_checker()
  change(config)
  with pytest.raises(ValueError, match=re.escape(f"config.{message}")):
    recipe.check(config)


def test_a_policy_that_never_plays_is_named():
  config = configured()
  cast("easy", "researcher", "scout")(config)
  with pytest.raises(
      ValueError, match=r"config\.team\.roles\.researcher\.policy: 'resear"
  ):
    recipe.check(config)
  config = configured()
  config.stages.hard.steps = 0
  with pytest.raises(
      ValueError, match=r"config\.stages\.hard\.cast\.researcher: 'scout' pl"
  ):
    recipe.check(config)


def test_one_who_plays_more_roles_needs_more_slots():
  """The policy of who waits for a call plays who is called, too."""
  config = configured()
  cast("hard", "researcher", "main")(config)
  del config.policies["scout"]
  with pytest.raises(ValueError, match=r"num_slots: 128 must be at least 256"):
    recipe.check(config)


def test_a_stage_that_asks_too_much_of_who_is_cast_is_named():
  config = configured()
  config.symbolic.code = default.symbolic("look_up")
  recipe.check(config)
  cast("hard", "main", "code")(config)
  with pytest.raises(
      ValueError,
      match=r"config\.stages\.hard, as it is cast: config\.team\.roles\.main",
  ):
    recipe.check(config)


def test_jobs_have_one_root():
  config = with_checker()
  config.stages.later = default.stage("reinforce", 1)  # not in the curriculum
  cast("later", "main", "scout")(config)
  cast("easy", "main", "main")(config)
  joining.check(config)
  cast("hard", "main", "scout")(config)
  with pytest.raises(
      ValueError,
      match=r"config\.stages\.hard\.cast\.main: 'scout', allowed: 'main' where",
  ):
    joining.check(config)


def test_prompts_offer_who_is_there():
  async def nothing(tokens, sampling, seed, *, session):
    raise AssertionError("nothing is sampled")

  setup = cast_setup(seed=0)
  for stage, there in zip(setup.stages, (False, False, True), strict=True):
    roles = setup.team_in(stage).roles
    wide = [dataclasses.replace(role, max_context=4000) for role in roles]
    team = Team(roles=tuple(wide), root="main")
    shared = environment(
        dict.fromkeys(setup.policies, nothing), team=team, protocol=HERMES
    )
    main = team["main"]
    assert ("checker" in shared.functions(main)) == there
    assert ("checker" in str(shared.system(main))) == there
    assert "researcher" in str(shared.system(main))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Runs in one process: in step, out of step, and without the late stage."""
  root, setup = tmp_path_factory.mktemp("runs"), cast_setup(seed=3)
  for name, changes in (
      ("in", {}),
      ("out", {"max_staleness": 2}),
      ("short", {"stages": setup.stages[:2]}),
  ):
    one = dataclasses.replace(setup, **changes)
    tiny_run.train(root / name, one, config={}, stream=io.StringIO())
  return root


def calls(directory, step):
  path = records.list_steps(directory / "rollouts")[step]
  for group in records.read_step(path).groups:
    for one in group["trajectories"]:
      yield one["role"]


@pytest.mark.parametrize("name", ["in", "out"])
def test_roles_are_called_where_they_are_there(runs, name):
  for step in EARLY:
    assert {*calls(runs / name, step)} == {"main", "researcher"}
  found = {role for step in LATE for role in calls(runs / name, step)}
  assert found == {"main", "researcher", "checker"}


@pytest.mark.parametrize("name", ["in", "out"])
def test_who_plays_learns(runs, name):
  rows = read_metrics(runs / name / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(5))
  for row in rows:
    learned = {key.split("/")[1] for key in row if key.startswith("loss/")}
    late = row["step"] in LATE
    assert learned == {"main", "scout" if late else "researcher"}
    assert ("calls/checker" in row) == late


def test_who_left_stays_as_it_was(runs):
  """The stages before do not know of what comes after them."""
  found = [
      [
          np.asarray(leaf)
          for leaf in jax.tree.leaves(
              load(runs / name / "policies/researcher").params
          )
      ]
      for name in ("in", "short")
  ]
  assert all(map(np.array_equal, *found))
  begun = jax.tree.leaves(cast_setup(seed=3).policies["researcher"].params)
  assert not all(map(np.array_equal, found[0], begun))


def test_who_has_yet_to_come_is_not_missed_in_an_evaluation(runs, tmp_path):
  """The bucket of jobs of which the scout's was not started yet."""
  shutil.copytree(runs / "short/bucket", tmp_path / "bucket")
  shutil.rmtree(tmp_path / "bucket/policies/scout")
  setup = cast_setup(seed=3)

  async def work():
    bucket = store.open_folder(tmp_path / "bucket")
    async with open_run(setup, bucket) as run:
      assert run.resources.read_published() == []
      done = run.resources.newest
      found = await run.evaluate(setup.dev, "dev", done)
      assert run.resources.read_published(done - 1) == []
      assert run.resources.newest == done - 1
      shutil.rmtree(tmp_path / "bucket/policies/researcher")
      with pytest.raises(publish.NoVersionError, match="researcher"):
        run.resources.read_published()
      return done, found

  done, found = asyncio.run(work())
  assert done == 3
  roles = {one.role for group in found.groups for one in group.trajectories}
  assert roles == {"main", "researcher"}
