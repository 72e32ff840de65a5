import ml_collections
import pytest

from configs import default, quickstart, smollm2_factbook, warm_start
from experiments import recipe
from mgrpo_jax.agents.team import Team

CONFIGS = {
    **{
        f"quickstart:{a}": lambda a=a: quickstart.get_config(a)
        for a in quickstart.ARMS
    },
    **{
        f"smollm2:{a}": lambda a=a: smollm2_factbook.get_config(a)
        for a in smollm2_factbook.ARMS
    },
    **{
        f"warm_start:{a}": lambda a=a: warm_start.get_config(a)
        for a in warm_start.ARMS
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_possible(name):
  recipe.check(CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_the_run_directory(name):
  config = CONFIGS[name]()
  values = recipe.plain(config)
  again = recipe.restore(values)
  recipe.check(again)
  assert recipe.plain(again) == values


def test_arms_train_what_they_say():
  def trained(arm):
    return {s.trained for s in recipe.build_stages(quickstart.get_config(arm))}

  assert trained("co_train") == {frozenset({"main", "researcher"})}
  assert trained("main_only") == {frozenset({"main"})}
  assert trained("sub_only") == {frozenset({"researcher"})}


def test_a_single_agent_has_all_tools_and_the_main_agents_context():
  solo = recipe.build_team(quickstart.get_config("single_agent"))
  team = recipe.build_team(quickstart.get_config())
  (role,) = solo.roles
  assert set(role.tools) == {"search", "visit", "calculate"}
  assert role.max_context == team["main"].max_context


def test_the_main_agent_must_delegate():
  team = recipe.build_team(quickstart.get_config())
  assert isinstance(team, Team)
  assert team["main"].tools == ()
  assert team["main"].calls == ("researcher",)
  assert team["main"].max_context < team["researcher"].max_context
  assert set(team["researcher"].tools) == {"search", "visit"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "config.seed"),
        ("tasks.per_step", 0, "config.tasks.per_step"),
        ("tasks.renamed", 1.5, "config.tasks.renamed"),
        ("rollout.per_task", 0, "config.rollout.per_task"),
        ("rollout.temperature", 0.0, "config.rollout.temperature"),
        ("alignment.strategy", "magic", "config.alignment.strategy"),
        ("alignment.num_slots", 0, "config.alignment.num_slots"),
        ("advantage", "best", "config.advantage"),
        ("loss.ratio", "words", "config.loss.ratio"),
        ("loss.aggregation", "sum", "config.loss.aggregation"),
        ("loss.clip_low", 2.0, "clip_low"),
        ("loss.kl", "k9", "config.loss.kl"),
        ("loss.kl_coefficient", 0.1, "kl_coefficient"),
        ("loss.importance_cap", 0.5, "importance_cap"),
        ("batch.rows", 0, "rows"),
        ("batch.row_tokens", 16, "config.batch.row_tokens"),
        ("optimizer.b1", 1.0, "b1"),
        ("engine.context", 64, "config.engine.context"),
        ("team.protocol", "morse", "config.team.protocol"),
        ("team.root", "boss", "boss"),
        ("team.roles.main.max_turns", 0, "max_turns"),
        ("team.roles.main.calls", ("nobody",), "nobody"),
        ("team.roles.main.correct_share", -0.1, "correct"),
        ("curriculum", ("easy", "boss"), "boss"),
        ("stages.easy.steps", -1, "steps"),
        ("stages.easy.learning_rate", 0.0, "learning_rate"),
        ("stages.easy.trained", ("boss",), "boss"),
        ("stages.easy.hasty", -0.1, "config.stages.easy.hasty"),
        ("checkpoint.keep", 0, "config.checkpoint.keep"),
        ("publish.every", 0, "config.publish.every"),
        ("evaluation.final_tasks", 0, "config.evaluation.final_tasks"),
    ],
)
def test_impossible_values_are_named(key, value, message):
  config = quickstart.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    recipe.check(config)


def test_arms_that_do_not_exist_are_listed():
  with pytest.raises(ValueError, match="main_only"):
    quickstart.get_config("train_everything")


def test_every_hyper_parameter_is_in_the_defaults():
  known = set(default.get_config().to_dict())
  for make in CONFIGS.values():
    assert set(make().to_dict()) == known


def test_the_defaults_are_a_locked_config():
  assert isinstance(default.get_config(), ml_collections.ConfigDict)
