import importlib
import pathlib
import re

import pytest

from configs import presets, quickstart
from experiments import method, recipe
from mgrpo_jax import advantages, alignment, credit, losses

FOLDER = pathlib.Path(presets.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def module(name):
  return importlib.import_module(f"configs.presets.{name}")


def config_of(name, arm="co_train"):
  return module(name).get_config(arm)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arm", ("co_train", "main_only", "smoke"))
def test_presets_are_recipes_that_say_where_they_are_from(name, arm):
  config = config_of(name, arm)
  assert config.name == f"presets/{name}:{arm}"
  recipe.check(config)
  text = module(name).__doc__
  assert "Source:" in text and f"configs/presets/{name}.py" in text
  assert re.search(r"arXiv \d{4}\.\d{5}|ALGORITHM", text)


def test_no_two_presets_are_the_same():
  def chosen(config):
    values = config.to_dict()
    keys = ("alignment", "advantage", "loss", "critic", "reward", "batch")
    return str([values[key] for key in keys]) + str(config.tasks.resample)

  made = {name: chosen(config_of(name)) for name in NAMES}
  made["quickstart"] = chosen(quickstart.get_config())
  assert len(set(made.values())) == len(made) >= 12


def test_the_papers_method():
  made = method.build(config_of("mgrpo"))
  assert made.align is alignment.duplicate_or_drop and made.num_slots == 8
  assert made.comparison == credit.alike(advantages.per_task)
  assert made.policy_loss.ratio is losses.sequence_ratio
  assert made.policy_loss.kl is made.policy_loss.importance is None
  main, calls = (made.reward_weights[n] for n in ("main", "researcher"))
  assert (main.format, main.correct, main.expert) == (0.1, 0.9, 0.0)
  assert (calls.format, calls.correct, calls.expert) == (0.1, 0.4, 0.5)


def test_grpo_is_one_agents_by_default():
  assert list(module("grpo").get_config().team.roles) == ["solo"]
