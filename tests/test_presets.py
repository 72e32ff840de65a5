import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import presets, quickstart
from experiments import method, recipe
from mgrpo_jax import advantages, alignment, losses
from mgrpo_jax.comparison import alike

FOLDER = pathlib.Path(presets.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
DEFAULT = ""  # what a preset trains where no arm is named
# What makes a method, and what it is where a preset's source says nothing of
# it: M-GRPO's copies into D = 8 slots and K = 8, the quickstart's two updates,
# nothing added to a clipped objective of each token.
UNSAID = {
    "alignment.strategy": "duplicate_or_drop",
    "alignment.num_slots": 8,
    "rollout.per_task": 8,
    "tasks.resample": 0,
    "batch.minibatches": 2,
    "reward.overlong_tokens": 0,
    "reward.overlong_share": 1.0,
    "reward.correct_of": "root",
    "advantage": "per_task",
    "loss.ratio": "token",
    "loss.aggregation": "sequence_mean_token_mean",
    "loss.surrogate": "clipped",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.kl": "none",
    "loss.kl_coefficient": 0.0,
    "loss.reference_every": 0,
    "loss.entropy_coefficient": 0.0,
    "loss.importance": "none",
    "critic.coefficient": 0.0,
}
# The sources' values; the presets say where these are printed.
VALUES = {
    "dapo": {
        "tasks.resample": 3,
        "reward.overlong_tokens": 38,  # 192 · 4,096 / 20,480
        "loss.aggregation": "token_mean",
        "loss.clip_high": 0.28,
    },
    "dr_grpo": {
        "advantage": "mean_only",
        "loss.aggregation": "sequence_mean_token_sum_norm",
    },
    "grpo": {
        "batch.minibatches": 1,
        "loss.kl": "k3",
        "loss.kl_coefficient": 0.04,
    },
    "gspo": {
        "batch.minibatches": 4,
        "loss.ratio": "geometric",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
    },
    "matpo_like": {
        "alignment.strategy": "mask",
        "batch.minibatches": 1,
        "advantage": "inherit_parent",
        "loss.aggregation": "token_mean",
    },
    "mgrpo": {"loss.ratio": "sequence"},
    "mgrpo_inverse_count": {
        "alignment.strategy": "inverse_count",
        "loss.ratio": "sequence",
    },
    "mrlx_like": {
        "alignment.strategy": "mask",
        "batch.minibatches": 1,
        "advantage": "per_block",
        "loss.clip_high": 0.28,
    },
    "ppo": {
        "advantage": "plain",
        "loss.aggregation": "token_mean",
        "loss.entropy_coefficient": 0.01,
        "critic.coefficient": 0.5,
        "critic.discount": 1.0,
        "critic.trace": 0.95,
        "critic.clip": 0.2,
    },
    "reinforce_pp": {
        "advantage": "per_batch",
        "loss.aggregation": "token_mean",
        "loss.kl": "k2",
        "loss.kl_coefficient": 0.001,
    },
    "rloo": {
        "alignment.strategy": "inverse_count",
        "batch.minibatches": 1,
        "advantage": "leave_one_out",
        "loss.aggregation": "sequence_mean_token_sum",
        "loss.clip_low": 1.0,  # with 1e6: no ratio is clipped
        "loss.clip_high": 1e6,
        "loss.kl": "k2",
        "loss.kl_coefficient": 0.03,
    },
}


def module(name):
  return importlib.import_module(f"configs.presets.{name}")


def config_of(name, arm=DEFAULT):
  return module(name).get_config(*([arm] if arm else []))


def read(config, keys):
  """What a config has under dotted keys."""
  found = {}
  for key in keys:
    value = config
    for part in key.split("."):
      value = value[part]
    found[key] = value
  return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arm", (DEFAULT, *quickstart.ARMS))
def test_presets_are_recipes_that_say_where_they_are_from(name, arm):
  config = config_of(name, arm)
  default = "single_agent" if name == "grpo" else "co_train"
  assert config.name == f"presets/{name}:{arm or default}"
  recipe.check(config)
  text = module(name).__doc__
  assert "Source:" in text and f"configs/presets/{name}.py" in text
  assert re.search(r"arXiv \d{4}\.\d{5}", text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arm", (DEFAULT, *quickstart.ARMS))
def test_presets_have_the_values_of_their_sources(name, arm):
  expected = UNSAID | VALUES[name]
  if arm == "smoke":  # two tasks a step
    expected["batch.minibatches"] = min(expected["batch.minibatches"], 2)
    expected["rollout.per_task"] = 8 if name.startswith("mgrpo") else 4
  assert read(config_of(name, arm), expected) == expected


def test_every_preset_is_in_the_table():
  assert sorted(VALUES) == NAMES


def test_no_two_presets_are_the_same():
  made = {str(UNSAID | values) for values in VALUES.values()}
  made.add(str(read(quickstart.get_config(), UNSAID)))
  assert len(made) == len(VALUES) + 1 >= 12


def test_the_papers_method():
  made = method.build(config_of("mgrpo"))
  assert made.align is alignment.duplicate_or_drop and made.num_slots == 8
  assert made.comparison == alike(advantages.per_task)
  assert made.policy_loss.ratio is losses.sequence_ratio
  assert made.policy_loss.kl is made.policy_loss.importance is None
  main, calls = (made.reward_weights[n] for n in ("main", "researcher"))
  assert (main.format, main.correct, main.expert) == (0.1, 0.9, 0.0)
  assert (calls.format, calls.correct, calls.expert) == (0.1, 0.4, 0.5)


def test_rloo_compares_a_call_with_the_other_one_alone():
  # Two rollouts of one call each, which earn 1 and 0.
  made = method.build(config_of("rloo"))
  slots = made.align(
      jax.random.key(0), np.ones((1, 2), np.int32), num_slots=made.num_slots
  )
  earned = alignment.gather(np.float32([[[1.0], [0.0]]]), slots)
  gains = made.comparison.calls(earned, slots.weight)
  np.testing.assert_allclose(gains.sum(2), [[1.0, -1.0]], rtol=1e-6)


def test_the_main_agent_of_mrlx_is_compared_with_its_task():
  made = method.build(config_of("mrlx_like")).comparison
  assert made.root is advantages.per_task
  assert made.calls is advantages.per_block


def test_grpo_is_one_agents_by_default():
  assert list(module("grpo").get_config().team.roles) == ["solo"]


def test_what_a_preset_names_reaches_the_loss():
  whole = method.build(config_of("dr_grpo"))
  longest = max(r.max_context for r in config_of("dr_grpo").team.roles.values())
  assert whole.policy_loss.aggregation.keywords == {"max_tokens": longest}
  config = config_of("mgrpo")
  config.loss.surrogate = "dual_clipped"
  config.loss.dual_floor = 2.5
  made = method.build(config).policy_loss
  assert made.surrogate.func is losses.dual_clipped_surrogate
  assert made.surrogate.keywords == {"floor": 2.5}
  config.loss.dual_floor = 1 + config.loss.clip_high
  with pytest.raises(ValueError, match="dual_floor: 1.2 must be above"):
    method.build(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss.reference_every", 5, "reference_every: 5, allowed: 0 where"),
        ("team.roles.main.expert_share", 0.5, "expert_share: 0.5, allowed: 0"),
    ],
)
def test_what_would_do_nothing_is_refused(key, value, message):
  config = config_of("mgrpo")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    recipe.check(config)
