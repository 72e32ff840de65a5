import jax
import ml_collections
import pytest

from configs import default, quickstart, smollm2_factbook, warm_start
from configs.pods import gemma3, qwen3_8b, qwen3_30b, smollm2
from experiments import method, placing, recipe
from mgrpo_jax import sharding
from mgrpo_jax.agents.team import Team
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.testing.sizes import tiny_config

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


@pytest.mark.parametrize(
    "make",
    (
        gemma3.get_config,
        qwen3_30b.get_config,
        qwen3_8b.get_config,
        smollm2.get_config,
    ),
)
def test_recipes_for_pods_are_possible(make):
  recipe.check(make(), num_devices=128)


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
  assert trained("alternating") == {
      frozenset({"main", "researcher"}),
      frozenset({"main"}),
      frozenset({"researcher"}),
  }
  assert trained("shared") == {frozenset({"team"})}
  frozen = recipe.build_stages(quickstart.get_config("frozen"))
  assert sum(stage.steps for stage in frozen) == 0
  config = quickstart.get_config("frozen")
  config.stages.hard.steps = 2
  with pytest.raises(ValueError, match="hard"):
    recipe.check(config)


def test_arms_take_the_same_number_of_steps():
  steps = {
      arm: sum(
          stage.steps
          for stage in recipe.build_stages(quickstart.get_config(arm))
      )
      for arm in quickstart.ARMS
  }
  assert (steps.pop("frozen"), steps.pop("smoke")) == (0, 4)
  assert set(steps.values()) == {40}


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


def test_the_recipe_says_how_long_a_text_may_mention():
  config = quickstart.get_config()
  config.reward.correct, config.reward.mention_words = "mentions", 5
  correct = method.build(config).rules.correct
  assert correct("The capital of Peru is Lima.", ["Lima"])
  assert not correct("Surely the capital of Peru is Lima.", ["Lima"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "config.seed"),
        ("budget.trained_tokens", -1, "config.budget.trained_tokens: -1 must"),
        ("budget.generated_tokens", 1.5, "generated_tokens: 1.5 must be int"),
        ("seed", 2**32, "config.seed"),
        ("seed", None, "config.seed: None must be int"),
        ("seed", True, "config.seed: True must be int"),
        ("curriculum", "easy", "config.curriculum: 'easy' must be a tuple"),
        ("optimizer", 3, "config.optimizer: 3 must be a ConfigDict"),
        ("optimizer.beta", 0.9, "config.optimizer.beta: unknown key"),
        ("tasks.per_stop", 8, "did you mean 'per_step'"),
        ("tasks.per_step", 10**9, "at most"),
        ("tasks.seed", -1, "config.tasks.seed"),
        ("tools.max_chars", 0, "config.tools.max_chars"),
        ("tools.deadline", 0.0, "config.tools.deadline"),
        ("rollout.turn_deadline", -1.0, "config.rollout.turn_deadline"),
        ("rollout.max_attempts", 0, "config.rollout.max_attempts"),
        ("rollout.temperature", float("inf"), "finite"),
        ("rollout.temperature", 1e-300, "at least 0.001"),
        ("evaluation.temperature", -1.0, "config.evaluation.temperature"),
        ("evaluation.temperature", 1e-300, "must be 0 or at least 0.001"),
        ("evaluation.temperature", 1e39, "finite, as float32"),
        ("engine.num_slots", 0, "config.engine.num_slots"),
        ("engine.num_slots", 127, "least 128.*config.rollout.max_concurrent"),
        ("rollout.max_concurrent", 7, "at least 8, config.rollout.per_task"),
        ("rollout.spare", 121, "at least 129, .* and config.rollout.spare"),
        ("rollout.watchdog", 0.0, "config.rollout.watchdog"),
        ("rollout.deadline", -1.0, "config.rollout.deadline"),
        ("rollout.spare", -1, "config.rollout.spare: -1 must be at least 0"),
        (
            "rollout.max_staleness",
            10,
            "max_staleness: 10 must be at most 9, one",
        ),
        ("rollout.patience", -1.0, "config.rollout.patience: -1.0 must be"),
        ("rollout.patience", 9.0, "patience: 9.0 must be 0 where there is no"),
        ("engine.block", 512, "config.engine.block: 512 must be at most 256"),
        ("engine.prefill_buckets", (), "config.engine.prefill_buckets"),
        ("engine.prefill_buckets", (64, 16), "ascending"),
        ("engine.prefill_buckets", (16, "32"), r"prefill_buckets\[1\]: '32'"),
        ("alignment.num_slots", 10**9, "config.alignment.num_slots"),
        ("batch.minibatches", 17, "at most 16, config.tasks.per_step"),
        ("optimizer.eps", float("nan"), "config.optimizer.eps"),
        ("optimizer.eps", 1e-60, "config.optimizer.eps: 1e-60 must be > 0"),
        ("optimizer.clip_norm", 1e-60, "config.optimizer.clip_norm"),
        ("optimizer.clip_norm", 1e39, "config.optimizer.clip_norm: 1e.39"),
        ("policies.main.norm_eps", 1e-60, "config.policies.main.norm_eps"),
        ("stages.easy.learning_rate", 1e-60, "easy.learning_rate"),
        ("stages.easy.steps", 10**9, "config.stages.easy.steps"),
        ("team.roles.main.max_turns", 10**9, "main.max_turns"),
        ("team.roles.main.max_new_tokens", 10**9, "main.max_new_tokens"),
        ("team.roles.main.max_context", 10**9, "config.team.roles.main.max_c"),
        ("team.roles.main.max_calls", 10**9, "config.team.roles.main.max_ca"),
        ("warmup_steps", -1, "config.warmup_steps"),
        ("jobs.heartbeat", 0.0, "config.jobs.heartbeat: 0.0 must be at least"),
        ("jobs.heartbeat", 1e10, "config.jobs.heartbeat: 10.* at most 3600"),
        ("jobs.heartbeat", 601, "patience: 1800.0 must be at least 1803, 3 "),
        ("jobs.patience", 5.0, "config.jobs.patience: 5.0 must be at least 15"),
        ("jobs.patience", 1e10, "config.jobs.patience: 1.* at most 2592000"),
        ("publish.bucket", "/tmp/bucket", "config.publish.bucket"),
        ("publish.bucket", "memory://x", "ends with the run"),
        ("policies.main.num_layers", 0, "config.policies.main.num_layers"),
        ("policies.main.rope_base", -5.0, "config.policies.main.rope_base"),
        ("policies.main.tokenizer_share", 2.0, "tokenizer_share: 2.0"),
        ("tools.max_chars", 20, "config.tools.max_chars"),
        ("tools.title_weight", 0, "config.tools.title_weight"),
        ("reward.correct", "guesses", "config.reward.correct"),
        ("reward.mention_words", 0, "config.reward.mention_words"),
        ("reward.opened_share", 1.5, "config.reward.opened_share"),
        ("stages.hard.final_fraction", -0.1, "final_fraction must be in"),
        ("tasks.max_retries", -1, "config.tasks.max_retries"),
        ("team.roles.main.policy", "ghost", "main.policy: 'ghost'"),
        ("team.roles.main.max_calls", 10**6, "researcher may be called"),
        ("team.roles.main.format_share", 2.0, "main.format_share"),
        ("team.roles.researcher.tools", ("searhc",), "searhc"),
        ("policies.main.trainable", "no", "main.trainable: 'no'"),
        ("stages.easy.families", (("a",),), r"easy.families\[0\]"),
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
        ("loss.kl_coefficient", 0.1, "kl_coefficient must be 0 where kl is"),
        ("loss.kl", "k3", "loss: kl_coefficient must be > 0 where kl is not"),
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
        ("publish.dtype", "float16", "allowed: bfloat16, float32"),
        ("publish.whole_every", 0, "config.publish.whole_every"),
        ("evaluation.final_tasks", 0, "config.evaluation.final_tasks"),
        ("policies.main.mesh.data", 0, "config.policies.main.mesh.data"),
        ("policies.main.mesh.fsdp", 16, r"main.mesh: takes 16 devices.* are 8"),
        ("policies.main.sampler_tensor", 9, "main.sampler_tensor: takes 9"),
        ("policies.main.execution.attention", "flash", "execution.attention"),
        ("reward.overlong_tokens", 193, "must be at most 192"),
        ("advantage", "per_subtask", "attempts"),
        ("team.roles.researcher.attempts", 2, "allowed: per_subtask"),
        ("critic.coefficient", 0.5, "allowed: plain"),
        ("loss.entropy_coefficient", -1.0, "entropy_coefficient"),
        ("policies.main.execution.remat", "all", "main.execution.remat"),
        ("policies.main.execution.logit_columns", 0, "logit_columns"),
        ("policies.main.dtype", "float16", "config.policies.main.dtype"),
        ("policies.main.lora.rank", -1, "config.policies.main.lora.rank"),
        ("policies.main.lora.alpha", 1e-60, "policies.main.lora.alpha"),
    ],
)
def test_impossible_values_are_named(key, value, message):
  config = quickstart.get_config()
  with config.ignore_type(), config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    recipe.check(config)


def test_every_open_call_of_a_policy_has_a_slot():
  config = quickstart.get_config()  # 128 rollouts at a time, 128 slots
  config.team.roles.researcher.policy = "main"  # waits for itself
  with pytest.raises(ValueError, match="num_slots: 128 must be at least 256"):
    recipe.check(config)
  config.rollout.max_concurrent = 64
  recipe.check(config)
  config.rollout.max_concurrent = 10**6  # of tasks, there are fewer
  config.engine.num_slots = 2 * 420
  config.evaluation.final_tasks = 420
  recipe.check(config)
  config.engine.num_slots -= 1
  with pytest.raises(ValueError, match="in 420 rollouts"):
    recipe.check(config)


@pytest.mark.parametrize("key", ("rows", "trajectories"))
def test_batches_must_divide_by_the_mesh(key):
  config = quickstart.get_config()
  config.policies.main.mesh.data = config.policies.main.mesh.fsdp = 2
  config.batch.rows = config.batch.trajectories = 8
  config.batch[key] = 6
  with pytest.raises(
      ValueError, match=f"batch.{key}: 6 must be a multiple of 4.*mesh.data"
  ):
    recipe.check(config)


def test_policies_live_where_the_recipe_says():
  config = quickstart.get_config()
  team = recipe.build_team(config)
  alone = placing.meshes(config, team, jax.devices())
  assert {m.learner for m in alone.values()} == {None}
  assert {m.sampler for m in alone.values()} == {None}
  config.policies.main.mesh.fsdp = 2
  config.policies.researcher.sampler_tensor = 4
  made = placing.meshes(config, team, jax.devices())
  assert dict(made["main"].learner.shape)["fsdp"] == 2
  assert dict(made["researcher"].sampler.shape)["tensor"] == 4
  used = [
      set(mesh.devices.flat)
      for meshes in made.values()
      for mesh in (meshes.learner, meshes.sampler)
  ]
  assert not (used[0] | used[1]) & (used[2] | used[3])


def test_a_recipe_runs_a_policy_as_it_says():
  config = quickstart.get_config()
  execution = placing.execution(config, "main")
  assert execution == Execution()  # the defaults change nothing
  config.policies.main.dtype = "bfloat16"
  config.policies.main.execution.remat = "dots"
  config.policies.main.execution.scan_layers = True
  where = sharding.Meshes(learner=None, sampler=None)
  sizes = placing.executed(tiny_config(), config, "main", where)
  assert (sizes.dtype, sizes.execution.scan_layers) == ("bfloat16", True)
  assert sizes.execution.remat is placing.REMATS["dots"]
  mesh = sharding.sampler_mesh(jax.devices()[:2])
  where = sharding.Meshes(learner=None, sampler=mesh)
  with pytest.raises(ValueError, match="main.sampler_tensor: .*of 2"):
    placing.executed(tiny_config(), config, "main", where)


def test_prompts_are_shared_only_where_a_policy_that_learns_can():
  config = quickstart.get_config()
  config.batch.least_shared = 8
  where = sharding.Meshes(learner=None, sampler=None)
  placing.executed(tiny_config(), config, "main", where)
  near = tiny_config(windows=(0, 9))
  with pytest.raises(ValueError, match=r"batch\.least_shared: 8.*main.*window"):
    placing.executed(near, config, "main", where)
  config.policies.main.execution.attention = "splash"
  with pytest.raises(ValueError, match="least_shared: 8.* not blockwise"):
    placing.executed(tiny_config(), config, "main", where)
  config.policies.main.trainable = False
  placing.executed(near, config, "main", where)


def test_frozen_policies_cannot_be_asked_to_learn():
  config = quickstart.get_config("main_only")
  config.stages.easy.trained = ("researcher",)
  with pytest.raises(ValueError, match="'researcher' is frozen"):
    recipe.check(config)


def test_a_stage_in_which_nothing_learns_is_refused():
  config = quickstart.get_config("main_only")
  config.team.roles.main.trainable = False
  with pytest.raises(ValueError, match="stages.easy.trained: nothing learns"):
    recipe.check(config)
  config.stages.easy.steps = config.stages.hard.steps = 0
  recipe.check(config)


def test_a_key_that_a_stored_config_lacks_is_named():
  values = recipe.plain(quickstart.get_config())
  del values["stages"]["hard"]["final_fraction"]
  with pytest.raises(
      ValueError, match="config.stages.hard.final_fraction: missing"
  ):
    recipe.check(recipe.restore(values))


@pytest.mark.parametrize(
    "section", ["engine", "stages.easy", "team.roles.main"]
)
def test_a_recipe_that_mistypes_a_key_is_told_so(section):
  config = quickstart.get_config()
  for part in section.split("."):
    config = config[part]
  with pytest.raises(AttributeError, match="max_truns"):
    config.max_truns = 3


def test_arms_that_do_not_exist_are_listed():
  with pytest.raises(ValueError, match="main_only"):
    quickstart.get_config("train_everything")


def test_every_hyper_parameter_is_in_the_defaults():
  known = set(default.get_config().to_dict())
  for make in CONFIGS.values():
    assert set(make().to_dict()) == known


def test_the_defaults_are_a_locked_config():
  config = default.get_config()
  assert isinstance(config, ml_collections.ConfigDict)
  assert config.is_locked
  assert config.optimizer.is_locked


def test_an_adapter_is_what_the_config_says():
  config = quickstart.get_config()
  assert recipe.build_adaptations(config) == {}
  config.policies.main.lora.rank = 4
  config.policies.main.lora.targets = ("key", "down")
  recipe.check(config)
  (name, one), *_ = recipe.build_adaptations(config).items()
  assert (name, one.base) == ("main", config.policies.main.source)
  assert one.lora == LoRA(rank=4, alpha=16.0, targets=("key", "down"))
  config.policies.main.lora.targets = ("keys",)
  with pytest.raises(ValueError, match="config.policies.main.lora: targets"):
    recipe.check(config)


def test_a_frozen_policy_has_no_adapter():
  config = quickstart.get_config("main_only")
  config.policies.researcher.lora.rank = 4
  with pytest.raises(ValueError, match="policies.researcher.lora.rank: 4.*0"):
    recipe.check(config)


def idle():
  """A policy that nobody has, with an adapter."""
  policy = default.policy()
  policy.lora.rank = 8
  return policy


def with_symbolic(code="look_up", **role):
  """The quickstart with a researcher that is plain code."""
  config = quickstart.get_config()
  config.symbolic.finder = default.symbolic(code)
  config.team.roles.researcher.policy = "finder"
  for name, value in role.items():
    config.team.roles.researcher[name] = value
  del config.policies["researcher"]
  return config


def test_a_role_may_be_plain_code():
  config = with_symbolic(max_context=4000)  # no cache, no row has to hold that
  recipe.check(config)
  setup = recipe.build(config)
  assert set(setup.policies) == {"main"}
  assert set(setup.coded) == {"finder"}
  again = recipe.restore(recipe.plain(config))
  recipe.check(again)
  (plan,) = placing.needs(config, placing.weighted(config, setup.team))
  assert plan == "main"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.symbolic.__setattr__("finder", default.symbolic("x")),
            r"config\.symbolic\.finder\.code: 'x', allowed: calculate, look_up",
        ),
        (
            lambda c: c.policies.__setattr__("finder", default.policy()),
            r"config\.symbolic\.finder: is in config\.policies, too",
        ),
        (
            lambda c: c.team.roles.researcher.__setattr__("tools", ("visit",)),
            r"config\.team\.roles\.researcher\.tools: .*\['search'\]",
        ),
        (
            lambda c: c.team.roles.researcher.__setattr__("max_turns", 2),
            r"config\.team\.roles\.researcher\.max_turns: 2 must be at least 3",
        ),
        (
            lambda c: c.team.roles.researcher.__setattr__("attempts", 2),
            r"config\.team\.roles\.researcher\.attempts: 2, allowed: 1",
        ),
        (
            lambda c: c.team.roles.main.__setattr__("policy", "finder"),
            r"config\.team\.roles\.main|config\.team\.roles: all are played",
        ),
        (
            lambda c: c.policies.__setattr__("idle", idle()),
            r"config\.policies\.idle\.lora\.rank: 8, allowed: 0, for no role",
        ),
        (
            lambda c: c.budget.__setattr__("trained_tokens", -1),
            r"config\.budget\.trained_tokens: -1 must be at least 0",
        ),
        (
            lambda c: c.team.roles.main.__setattr__("policy", "nobody"),
            r"config\.team\.roles\.main\.policy: 'nobody'",
        ),
        (
            lambda c: c.rollout.__setattr__("max_staleness", -1),
            r"config\.rollout\.max_staleness: -1 must be at least 0",
        ),
    ],
)
def test_impossible_symbolic_roles_are_named(change, message):
  config = with_symbolic()
  change(config)
  with pytest.raises(ValueError, match=message):
    recipe.check(config)


def test_plain_code_calls_nobody():
  config = quickstart.get_config()
  config.symbolic.planner = default.symbolic("calculate")
  config.team.roles.main.policy = "planner"
  with pytest.raises(
      ValueError, match=r"main\.calls: .* calculate calls nobody"
  ):
    recipe.check(config)


@pytest.mark.parametrize("advantage", sorted(method.COMPARISONS))
def test_nothing_is_drawn_again_where_equal_rewards_may_teach(advantage):
  config = quickstart.get_config()
  config.advantage, config.tasks.resample = advantage, 2
  if advantage == "per_subtask":
    config.team.roles.researcher.attempts = 2
    config.rollout.max_concurrent = 64
  if advantage not in ("plain", "per_batch", "per_block"):
    recipe.check(config)
    return
  with pytest.raises(
      ValueError, match=f"resample: 2 must be 0 .* is {advantage}: groups with"
  ):
    recipe.check(config)


def test_rollouts_run_ahead_only_where_that_is_possible():
  config = quickstart.get_config()
  config.rollout.max_staleness = config.evaluation.every - 1
  recipe.check(config)
  config.policies.main.external.url = "http://127.0.0.1:1/v1"
  with pytest.raises(ValueError, match=r"allowed: 0 where .*main\.external"):
    recipe.check(config)
  config.policies.main.external.url = ""
  config.policies.main.sampler_tensor = 2
  with pytest.raises(ValueError, match="allowed: 0 where .*sampler_tensor"):
    recipe.check(config)
  config.policies.main.sampler_tensor = 1
  config.tasks.resample = 1
  with pytest.raises(ValueError, match=r"config\.tasks\.resample: 1, allowed"):
    recipe.check(config)
