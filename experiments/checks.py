"""What a config may hold: its keys, the types of its values, their ranges.

What a dataclass of `mgrpo_jax` checks itself is not repeated here.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from configs import default

T = TypeVar("T")

_MOST = 1_000_000  # of anything that is counted
MOST_CALLS = 4096  # of one role in a rollout, and slots for them
_NAMES_KEY = re.compile(r"config\.(?!json\b)")
_LEAST32 = float(np.finfo(np.float32).tiny)
_MOST32 = float(np.finfo(np.float32).max)

_RANGES = {  # lowest and highest allowed
    "seed": (0, 2**32 - 1),
    "tasks.per_step": (1, _MOST),
    "tasks.resample": (0, 1000),
    "tasks.max_retries": (0, _MOST),
    "tasks.seed": (0, 2**32 - 1),
    "tools.search_results": (1, _MOST),
    "tools.title_weight": (1, 1000),
    "tools.max_chars": (32, _MOST),  # a number must fit
    "rollout.per_task": (1, _MOST),
    "rollout.spare": (0, _MOST),
    "rollout.patience": (0, math.inf),
    "rollout.max_attempts": (1, _MOST),
    "rollout.max_staleness": (0, _MOST),
    "budget.trained_tokens": (0, 10**15),
    "budget.generated_tokens": (0, 10**15),
    "rollout.max_concurrent": (1, _MOST),
    "engine.num_slots": (1, _MOST),
    "engine.context": (1, _MOST),
    "engine.block": (1, _MOST),
    "engine.prefill_tokens": (1, _MOST),
    "engine.decode_steps": (1, _MOST),
    "engine.decode_rows": (0, _MOST),
    "alignment.num_slots": (1, MOST_CALLS),
    "reward.overlong_tokens": (0, _MOST),
    "loss.reference_every": (0, _MOST),
    "critic.coefficient": (0, math.inf),
    "batch.minibatches": (1, _MOST),
    "batch.rows": (1, _MOST),
    "batch.row_tokens": (1, _MOST),
    "batch.row_targets": (0, _MOST),
    "batch.least_shared": (0, _MOST),
    "batch.trajectories": (1, _MOST),
    "warmup_steps": (0, _MOST),
    "evaluation.every": (1, _MOST),
    "evaluation.tasks": (1, _MOST),
    "evaluation.final_tasks": (1, _MOST),
    "checkpoint.every": (1, _MOST),
    "checkpoint.keep": (1, _MOST),
    "publish.every": (1, _MOST),
    "publish.keep": (1, _MOST),
    "publish.whole_every": (1, _MOST),
    "jobs.heartbeat": (0.01, 3600.0),
    "jobs.patience": (0.03, 30 * 24 * 3600.0),
}
_POSITIVE = (  # as float32, which is what they are computed with
    "rollout.turn_deadline",
    "rollout.watchdog",
    "rollout.deadline",
    "tools.deadline",
    "optimizer.eps",
    "reward.overlong_share",
    "optimizer.clip_norm",
)
_COLDEST = 1e-3  # temperature; below, logits are divided beyond float32
_SIZES = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
)
_PIECES = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.expert",
    "sampler_tensor",
    "execution.logit_columns",
)
_RATES = ("rope_base", "norm_eps", "lora.alpha")
_COUNTS = (
    "max_turns",
    "max_new_tokens",
    "max_context",
    "max_calls",
    "attempts",
)
_SHARES = ("format_share", "correct_share", "expert_share")
_STAGE_SHARES = (*_SHARES, "overlong_share")


@contextlib.contextmanager
def inside(key: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
  """Says of every ValueError raised inside which config key it is about.

  An error that names a key already, from an inner use, is left as it is.

  Args:
    key: dotted.
    kind: of the errors that are about this key; others pass.

  Yields:
    Nothing.
  """
  try:
    yield
  except kind as error:
    if _NAMES_KEY.match(str(error)):
      raise
    raise ValueError(f"config.{key}: {error}") from error


def pick(choices: Mapping[str, T], name: str, key: str) -> T:
  """Looks a name up among the choices that a config key has.

  Args:
    choices: by name.
    name: what the config says.
    key: the config key, for the error.

  Returns:
    The choice.

  Raises:
    ValueError: there is no such choice; lists those there are.
  """
  if name not in choices:
    raise ValueError(
        f"config.{key}: {name!r}, allowed: {', '.join(sorted(choices))}"
    )
  return choices[name]


def keys_and_types(values: Mapping[str, Any]) -> None:
  """Compares the keys of a config, and the types of its values, with default's.

  Args:
    values: of the config, nested.

  Raises:
    ValueError: a key is unknown or missing, or a value has another type.
  """
  known = default.get_config().to_dict()
  open_ended = {  # recipes name what is in these
      "team.roles": default.role("policy").to_dict(),
      "policies": default.policy().to_dict(),
      "symbolic": default.symbolic("").to_dict(),
      "stages": default.stage("reinforce", 1).to_dict(),
  }
  _compare(values, known, "", open_ended)
  _stage_rewards(values)


def ranges(values: Mapping[str, Any]) -> None:
  """Checks the numbers of a config that no dataclass checks.

  Args:
    values: of the config, nested; with the right keys and types.

  Raises:
    ValueError: a number is out of range; names the key and what is allowed.
  """
  for key, (low, high) in _limits(values).items():
    number = _at(values, key)
    if number < low:
      raise ValueError(f"config.{key}: {number} must be at least {low}")
    if number > high:
      raise ValueError(f"config.{key}: {number} must be at most {high}")
  for key in _positive(values):
    number = _at(values, key)
    if not number >= _LEAST32:
      raise ValueError(f"config.{key}: {number} must be > 0, as float32")
  warmth = _at(values, "evaluation.temperature")
  if warmth != 0 and not warmth >= _COLDEST:
    raise ValueError(
        f"config.evaluation.temperature: {warmth} must be 0 or at least"
        f" {_COLDEST}"
    )
  for key, share in _shares(values).items():
    if not 0 <= share <= 1:
      raise ValueError(f"config.{key}: {share} must be in [0, 1]")


def _limits(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """The lowest and highest number allowed, by key."""
  limits: dict[str, tuple[float, float]] = dict(_RANGES)
  limits["rollout.temperature"] = (_COLDEST, math.inf)
  for name in values["policies"]:
    sizes = (*_SIZES, *_PIECES)
    limits |= {f"policies.{name}.{key}": (1, _MOST) for key in sizes}
    limits[f"policies.{name}.lora.rank"] = (0, _MOST)
  for name in values["stages"]:
    limits[f"stages.{name}.steps"] = (0, _MOST)
  for name in values["team"]["roles"]:  # how few, `Role` knows
    limits |= {
        f"team.roles.{name}.{key}": (-math.inf, _MOST) for key in _COUNTS
    }
  return limits


def _positive(values: Mapping[str, Any]) -> list[str]:
  """The keys of what must be above 0."""
  rates = [
      f"policies.{name}.{key}" for name in values["policies"] for key in _RATES
  ]
  peaks = [f"stages.{name}.learning_rate" for name in values["stages"]]
  return [*_POSITIVE, *rates, *peaks]


def _shares(values: Mapping[str, Any]) -> dict[str, float]:
  """Everything that must be in 0..1, by its key."""
  shares = {
      "tasks.renamed": values["tasks"]["renamed"],
      "reward.opened_share": values["reward"]["opened_share"],
  }
  for name, policy in values["policies"].items():
    shares[f"policies.{name}.tokenizer_share"] = policy["tokenizer_share"]
  for name, stage in values["stages"].items():
    shares[f"stages.{name}.hasty"] = stage["hasty"]
    shares |= {
        f"stages.{name}.reward.{role}.{key}": share
        for role, given in stage["reward"].items()
        for key, share in given.items()
        if key in _SHARES
    }
  for name, role in values["team"]["roles"].items():
    shares |= {f"team.roles.{name}.{key}": role[key] for key in _SHARES}
  return shares


def _compare(
    values: Mapping[str, Any],
    known: Mapping[str, Any],
    prefix: str,
    open_ended: Mapping[str, Mapping[str, Any]],
) -> None:
  """Compares one level of a config, and what is below it."""
  _check_known(values, known, prefix)
  for key, like in known.items():
    name = f"{prefix}{key}"
    if key not in values:
      raise ValueError(f"config.{name}: missing")
    value = values[key]
    if not isinstance(like, Mapping):
      _check_type(name, value, like)
      continue
    if not isinstance(value, Mapping):
      raise ValueError(f"config.{name}: {value!r} must be a ConfigDict")
    if not like and name not in open_ended:
      continue  # see `_stage_rewards`
    entry = open_ended.get(name)
    below = dict.fromkeys(value, entry) if entry else like
    _compare(value, below, f"{name}.", open_ended)


def _stage_rewards(values: Mapping[str, Any]) -> None:
  """Compares what stages say of rewards: any part of it, for any role."""
  roles = sorted(values["team"]["roles"])
  known = dict.fromkeys(_STAGE_SHARES, 0.0)
  for stage, settings in values["stages"].items():
    for role, given in settings["reward"].items():
      name = f"stages.{stage}.reward.{role}"
      if role not in roles:
        raise ValueError(
            f"config.{name}: unknown role {role!r}, allowed: {', '.join(roles)}"
        )
      if not isinstance(given, Mapping):
        raise ValueError(f"config.{name}: {given!r} must be a ConfigDict")
      _check_known(given, known, f"{name}.")
      for key, share in given.items():
        _check_type(f"{name}.{key}", share, known[key])


def _check_known(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str
) -> None:
  """Raises where a level of a config has a key that there is not."""
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(str(key), known, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"config.{prefix}{key}: unknown key{hint}")


def _check_type(name: str, value: Any, like: Any) -> None:
  """Raises unless a value has the type of the default one."""
  if isinstance(like, tuple):
    item = like[0] if like else ""  # what is empty by default holds names
    if not isinstance(value, tuple | list):
      raise ValueError(
          f"config.{name}: {value!r} must be a tuple of {_kind(item)}"
      )
    for number, one in enumerate(value):
      _check_type(f"{name}[{number}]", one, item)
    return
  if type(value) is not type(like) and not (
      type(like) is float and type(value) is int
  ):
    raise ValueError(f"config.{name}: {value!r} must be {_kind(like)}")
  if type(like) is float and not abs(value) <= _MOST32:
    raise ValueError(f"config.{name}: {value} must be finite, as float32")


def _kind(like: Any) -> str:
  """Names the type of a default value."""
  names = {bool: "True or False", int: "int", float: "a number", str: "text"}
  return names[type(like)]


def _at(values: Mapping[str, Any], key: str) -> Any:
  """The value of a dotted key."""
  for part in key.split("."):
    values = values[part]
  return values
