"""The cells of a sweep: every combination of arm, settings and seed.

Values are read by the parser that reads `--config.key=value` of
`experiments.train`, and checked by what checks them there.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import cli, recipe, world
from mgrpo_jax import atomic, workdir
from mgrpo_jax.tasks import factbook

SETTINGS_FILE = "sweep.json"
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"
_UNSAFE = re.compile(r"^[^A-Za-z0-9]|[^A-Za-z0-9._+,=-]")  # in a file name
_LONGEST = 120  # characters of a name
_DIGEST = 8  # hexadecimal digits that tell shortened names apart
_DEVICES = 2**20  # how many there are, only the runs may ask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """A config key and the values it takes, as they were given."""

  key: str
  values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of a sweep.

  Attributes:
    name: of its directory, no two alike; safe as a file name.
    combination: how it and its runs of other seeds are called.
    settings: config key -> value as it was given, but for the seed.
    seed: of the run.
    arguments: of `experiments.train`, but for the directory.
    values: of its config, as a run directory keeps them.
  """

  name: str
  combination: str
  settings: Mapping[str, str]
  seed: int
  arguments: tuple[str, ...]
  values: Mapping[str, Any]


def axes(texts: Sequence[str]) -> tuple[Axis, ...]:
  """Reads what `--set` says.

  Args:
    texts: `key=value,value,…` each; commas within brackets or quotes do not
      separate values, and quotes around a whole value are left out.

  Returns:
    The axes, in the same order.

  Raises:
    ValueError: a text is something else, or a key comes twice.
  """
  found: dict[str, Axis] = {}
  for text in texts:
    key, equals, rest = text.partition("=")
    key = key.strip()
    values = tuple(_split(rest))
    if not (key and equals) or "" in values:
      raise ValueError(f"--set {text!r}: must be key=value,value,…")
    if key in ("seed", "name"):
      raise ValueError(f"--set {key}: allowed: other keys; see --seeds, --arms")
    if key in found:
      raise ValueError(f"--set {key}: given twice")
    found[key] = Axis(key=key, values=values)
  return tuple(found.values())


def plan(
    recipe_file: str,
    *,
    arms: Sequence[str],
    axes: Sequence[Axis],
    seeds: Sequence[str],
) -> tuple[Cell, ...]:
  """Lists the runs of a sweep, all of them checked.

  Args:
    recipe_file: of the config, maybe with an arm after a colon.
    arms: to put behind the colon instead; empty for what stands there.
    axes: keys and their values.
    seeds: of every combination.

  Returns:
    The runs: seeds of the first combination first.

  Raises:
    ValueError: a value is impossible, or two runs would be the same.
    SystemExit: a key or value cannot be read (one line, code 2).
  """
  if not seeds:
    raise ValueError("--seeds: must be one or more, such as 0,1,2")
  cells = []
  for file, chosen in _combinations(recipe_file, arms, axes):
    combination = _title(file, chosen, axes)
    for seed in seeds:
      given = {**chosen, "seed": seed}
      arguments = (
          f"--config={file}",
          *(f"--config.{key}={value}" for key, value in given.items()),
      )
      config = _read(arguments)
      try:
        recipe.check(config, num_devices=_DEVICES)
        if any(axis.key.endswith(".families") for axis in axes):
          _check_families(config)
      except ValueError as error:
        raise ValueError(f"{arguments[0]}: {error}") from error
      cells.append(
          Cell(
              name=f"{combination},seed={config.seed}",
              combination=combination,
              settings=chosen,
              seed=config.seed,
              arguments=arguments,
              values=recipe.plain(config),
          )
      )
  _check_apart(cells)
  return _renamed(cells)


def settings(
    recipe_file: str,
    *,
    arms: Sequence[str],
    axes: Sequence[Axis],
    cells: Sequence[Cell],
) -> dict[str, Any]:
  """Says what a sweep is, so that its directory is taken for no other one.

  Args:
    recipe_file: of the config.
    arms: behind its colon.
    axes: keys and their values.
    cells: planned of these.

  Returns:
    JSON values.
  """
  recipes = {
      file.partition(":")[2]: _read([f"--config={file}"])
      for file in _files(recipe_file, arms)
  }
  return {
      "set": {axis.key: list(axis.values) for axis in axes},
      "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
      "recipes": {arm: recipe.plain(config) for arm, config in recipes.items()},
  }


def check_directory(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Checks that a directory may be used for a sweep, and changes nothing.

  Args:
    path: of the sweep; may be missing.
    settings: what `settings` returned.

  Raises:
    MismatchError: it belongs to another sweep; lists the differences.
    StorageError: it cannot be used.
  """
  workdir.check_ours(path, SETTINGS_FILE, "sweep")
  if not (path / SETTINGS_FILE).exists():
    return
  old = atomic.read_json(path / SETTINGS_FILE)
  if not isinstance(old, dict):
    raise atomic.CorruptError(f"{path / SETTINGS_FILE}: not an object")
  if found := workdir.differences(old, settings):
    raise atomic.MismatchError(
        f"{path} belongs to a sweep with other settings:"
        f" {workdir.listed(found)}; give another --out"
    )


def _combinations(
    recipe_file: str, arms: Sequence[str], axes: Sequence[Axis]
) -> Iterator[tuple[str, dict[str, str]]]:
  """Every recipe with every choice of settings."""
  choices = [axis.values for axis in axes]
  for file in _files(recipe_file, arms):
    for values in itertools.product(*choices):
      keys = (axis.key for axis in axes)
      yield file, dict(zip(keys, values, strict=True))


def _files(recipe_file: str, arms: Sequence[str]) -> list[str]:
  """The recipe with each arm behind its colon."""
  if not arms:
    return [recipe_file]
  if ":" in recipe_file:
    raise ValueError(
        f"--arms: {','.join(arms)}, but --config={recipe_file} names an arm"
        " itself"
    )
  return [f"{recipe_file}:{arm}" for arm in arms]


def _title(file: str, settings: Mapping[str, str], axes: Sequence[Axis]) -> str:
  """What tells a combination from the others, short enough to read."""
  arm = file.partition(":")[2]
  varied = [axis.key for axis in axes if len(axis.values) > 1]
  last = [key.rpartition(".")[2] for key in varied]
  parts = [arm] if arm else []
  for key, short in zip(varied, last, strict=True):
    label = short if last.count(short) == 1 else key
    parts.append(f"{label}={settings[key]}")
  return ",".join(parts) or "recipe"


def _read(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """Reads a config as `experiments.train` does."""
  argv = ["train", *arguments]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=argv
  )
  with cli.flag_errors(arguments[0]):
    values(argv)
  return cli.config_of(holder)


def _check_families(config: ml_collections.ConfigDict) -> None:
  """Raises where a family has no questions; reads the Factbook, in seconds."""
  book = factbook.load(config.tasks.seed)
  for name in config.curriculum:
    world.questions(book, "train", f"stages.{name}", config)
  for split in ("dev", "test"):
    world.questions(book, split, "evaluation", config)


def _check_apart(cells: Sequence[Cell]) -> None:
  """Raises where two runs would be the same, or share what they write."""
  seen: dict[str, str] = {}
  for cell in cells:
    text = json.dumps(cell.values, sort_keys=True)
    if text in seen:
      raise ValueError(f"{seen[text]} and {cell.name} are the same run")
    seen[text] = cell.name
    if cell.values["publish"]["bucket"] and len(cells) > 1:
      raise ValueError(
          f"config.publish.bucket: {cell.values['publish']['bucket']!r},"
          " allowed in a sweep: '', so that every run has its own"
      )


def _renamed(cells: Sequence[Cell]) -> tuple[Cell, ...]:
  """Makes names safe as file names, and apart where that made them alike."""
  safe = [_UNSAFE.sub("_", cell.name)[:_LONGEST] for cell in cells]
  alike = collections.Counter(name.casefold() for name in safe)
  named = []
  for cell, name in zip(cells, safe, strict=True):
    if name != cell.name or alike[name.casefold()] > 1:
      text = json.dumps(cell.values, sort_keys=True)
      digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
      name = f"{name}-{digest}"
    named.append(dataclasses.replace(cell, name=name))
  return tuple(named)


def _split(text: str) -> Iterator[str]:
  """Splits at commas that stand in no brackets and no quotes."""
  part, depth, quote = "", 0, ""
  for character in text:
    if quote:
      quote = "" if character == quote else quote
    elif character in _QUOTES:
      quote = character
    elif character in _OPENING:
      depth += 1
    elif character in _CLOSING:
      depth -= 1
    elif character == "," and depth <= 0:
      yield _unquoted(part)
      part = ""
      continue
    part += character
  yield _unquoted(part)


def _unquoted(text: str) -> str:
  """A value without spaces around it, nor quotes around all of it."""
  text = text.strip()
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES
  return text[1:-1] if quoted else text
