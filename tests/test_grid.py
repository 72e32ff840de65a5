"""The cells of a sweep: which there are, how they are called, refusals."""

import pathlib

import pytest

from experiments import grid
from mgrpo_jax import atomic

SMOKE = "configs/quickstart.py:smoke"
QUICKSTART = "configs/quickstart.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[1])


def plan(*texts, recipe=SMOKE, arms=(), seeds=("0",)):
  return grid.plan(recipe, arms=arms, axes=grid.axes(texts), seeds=seeds)


def names(cells):
  return [cell.name for cell in cells]


def test_a_grid_is_every_combination_of_arm_setting_and_seed():
  cells = plan(
      "alignment.strategy=mask,inverse_count",
      "loss.clip_high=0.2,0.28",
      "tasks.per_step=3",
      recipe=QUICKSTART,
      arms=("smoke", "main_only"),
      seeds=("4", "7"),
  )
  assert len(cells) == 2 * 2 * 2 * 2
  assert names(cells)[:3] == [
      "smoke,strategy=mask,clip_high=0.2,seed=4",
      "smoke,strategy=mask,clip_high=0.2,seed=7",
      "smoke,strategy=mask,clip_high=0.28,seed=4",
  ]
  last = cells[-1]
  assert last.combination == "main_only,strategy=inverse_count,clip_high=0.28"
  assert (last.values["seed"], last.values["name"]) == (
      7,
      "quickstart:main_only",
  )
  assert last.values["alignment"]["strategy"] == "inverse_count"
  assert {cell.values["tasks"]["per_step"] for cell in cells} == {3}
  assert last.arguments[-1] == "--config.seed=7"


def test_values_are_of_the_types_that_the_config_has():
  (cell,) = plan(
      "policies.main.trainable=false",
      "stages.hard.families=('place', 'attribute')",
      "team.roles.main.prompt='Be brief, and right.'",
      "loss.clip_low=1",
  )
  values = cell.values
  assert values["policies"]["main"]["trainable"] is False
  assert values["stages"]["hard"]["families"] == ["place", "attribute"]
  assert values["team"]["roles"]["main"]["prompt"] == "Be brief, and right."
  assert values["loss"]["clip_low"] == 1.0


def test_axes_split_at_commas_outside_of_brackets_and_quotes():
  axes = grid.axes(["a.b=(1,2), (3,) ,'x,y',\"it's\"", "c=1"])
  assert axes[0] == grid.Axis(
      key="a.b", values=("(1,2)", "(3,)", "x,y", "it's")
  )
  assert axes[1] == grid.Axis(key="c", values=("1",))


@pytest.mark.parametrize("text", ["loss", "=1", "a=", "a=1,,2", "seed=1"])
def test_what_is_no_axis_is_refused(text):
  with pytest.raises(ValueError, match="--set"):
    grid.axes([text])


def test_a_key_is_set_once():
  with pytest.raises(ValueError, match="given twice"):
    grid.axes(["loss.clip_low=0.1", "loss.clip_low=0.2"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"texts": ["loss.clip_low=0.2,3"]}, "clip_low"),
        ({"texts": ["loss.ratio=token,tokens"]}, "geometric"),
        ({"texts": ["loss.clip_low=0.2,0.20"]}, "same run"),
        ({"texts": ["publish.bucket=file:///tmp/b"], "seeds": "01"}, "bucket"),
        ({"texts": ["evaluation.families=('x',)"]}, "no dev question"),
        ({"seeds": ("1", "1")}, "same run"),
        ({"seeds": ()}, "--seeds"),
        ({"arms": ("co_train",)}, "names an arm itself"),
    ],
)
def test_impossible_sweeps_are_refused(given, told):
  with pytest.raises(ValueError, match=told):
    plan(*given.pop("texts", ()), **given)


@pytest.mark.parametrize(
    "text",
    [
        "loss.clip_lo=0.2",
        "loss.clip_low=much",
        "nothing.at.all=1",
        "curriculum[9]=easy",
    ],
)
def test_what_cannot_be_read_ends_with_one_line(text, capsys):
  with pytest.raises(SystemExit) as ended:
    plan(text)
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and len(error.splitlines()) == 1


def test_the_arm_that_lacks_a_key_or_refuses_a_value_is_named(capsys):
  arms = ("co_train", "alternating")
  with pytest.raises(SystemExit):
    plan("stages.hard.steps=9", recipe=QUICKSTART, arms=arms)
  told = capsys.readouterr().err
  assert "unknown config key" in told and "quickstart.py:alternating" in told
  with pytest.raises(ValueError, match="quickstart.py:co_train: config.loss"):
    plan("loss.clip_low=7", recipe=QUICKSTART, arms=arms)


def test_names_are_safe_and_never_alike():
  sources = ("../up", "a b", "a_b", "A_b", "x" * 300, "x" * 301, "né")
  cells = plan(f"policies.main.source={','.join(sources)}")
  found = names(cells)
  assert len({name.casefold() for name in found}) == len(sources)
  for name in found:
    assert name == pathlib.Path(name).name
    assert name.isascii() and len(name.encode()) < 200
    assert name[0].isalnum() and not set(name) & set(" /\\'\"$")
  assert found == names(plan(f"policies.main.source={','.join(sources)}"))


def test_keys_that_end_alike_are_named_in_full():
  cell, _ = plan("team.roles.main.max_turns=3", "stages.easy.steps=1,2")
  assert cell.combination == "smoke,steps=1"
  cells = plan("stages.easy.steps=1,2", "stages.hard.steps=1,2")
  assert cells[0].combination == (
      "smoke,stages.easy.steps=1,stages.hard.steps=1"
  )


def settings(*texts, seeds=("0",)):
  axes = grid.axes(texts)
  cells = grid.plan(SMOKE, arms=(), axes=axes, seeds=seeds)
  return grid.settings(SMOKE, arms=(), axes=axes, cells=cells)


def test_a_directory_is_of_one_sweep(tmp_path):
  old = settings("loss.clip_low=0.1,0.2")
  grid.check_directory(tmp_path / "new", old)
  atomic.write_json(tmp_path / grid.SETTINGS_FILE, old)
  grid.check_directory(tmp_path, old)
  other = settings("loss.clip_low=0.1", seeds=("0", "1"))
  with pytest.raises(atomic.MismatchError) as error:
    grid.check_directory(tmp_path, other)
  assert "seeds: [0] -> [0, 1]; set.loss.clip_low" in str(error.value)
  changed = settings("loss.clip_low=0.1,0.2")
  changed["recipes"]["smoke"]["loss"]["ratio"] = "sequence"
  with pytest.raises(atomic.MismatchError, match="'token' -> 'sequence'"):
    grid.check_directory(tmp_path, changed)


def test_a_directory_of_other_things_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(atomic.StorageError, match="not empty"):
    grid.check_directory(tmp_path, {})
