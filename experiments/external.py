"""Policies that a server samples: what a recipe may say of it, and its engine.

Needs the extra `external`, but only where a recipe has such a policy.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from experiments import checks, cli, placing
from mgrpo_jax.agents.team import Team
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.sampler.interface import RolloutEngine

if typing.TYPE_CHECKING:
  from mgrpo_jax.sampler.connection import Address
  from mgrpo_jax.sampler.lease import Server

DIALECTS = ("mgrpo", "vllm")
_ONLY_WITH_URL = ("folder", "model", "token_file")


def check(values: Mapping[str, Any]) -> None:
  """Checks what a config says of servers; asks none.

  Args:
    values: of the config, nested; with the right keys and types.

  Raises:
    ValueError: a value is impossible, two policies would get in each other's
      way, or a package is missing; names the key and what is allowed.
  """
  users: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for name, policy in values["policies"].items():
    one, key = policy["external"], f"policies.{name}.external"
    if one["url"]:
      _check_one(one, key)
      _check_sampler(policy["sampler_tensor"], name)
      users["url", _place(one, name)].append(name)
      folder = str(pathlib.Path(one["folder"]).resolve())
      users["folder", folder].append(name)
      continue
    for other in _ONLY_WITH_URL:
      if one[other]:
        raise ValueError(
            f"config.{key}.{other}: {one[other]!r}, allowed: '', for"
            f" config.{key}.url is ''"
        )
  for (key, value), names in users.items():
    if len(names) > 1:
      first, second, *_ = names
      raise ValueError(
          f"config.policies.{second}.external.{key}: {value!r} is that of"
          f" policy {first!r}, too; each needs its own"
      )


def engines(
    config: ml_collections.ConfigDict, team: Team
) -> dict[str, Callable[[Policy], RolloutEngine]]:
  """Builds what makes the engines of policies that a server samples.

  Args:
    config: the whole recipe, checked.
    team: of the recipe.

  Returns:
    By policy, what makes its engine from its weights at the start; raises
    ValueError where the file of its token cannot be read, which who samples
    here need not have.
  """
  made: dict[str, Callable[[Policy], RolloutEngine]] = {}
  for name in placing.weighted(config, team):
    one = config.policies[name].external
    if one.url:
      made[name] = functools.partial(_engine, one, name, config.engine.context)
  return made


def _engine(
    one: ml_collections.ConfigDict, name: str, context: int, policy: Policy
) -> RolloutEngine:
  """The engine of a policy that a server samples; reads its token."""
  from mgrpo_jax.sampler.external import ExternalEngine

  server = _server(one, name)
  return ExternalEngine(policy, 0, server=server, context=context)


def _server(one: ml_collections.ConfigDict, name: str) -> Server:
  """The server of a policy."""
  from mgrpo_jax.sampler import dialects
  from mgrpo_jax.sampler.lease import Server

  token, key = "", f"policies.{name}.external.token_file"
  if one.token_file:
    token = cli.secret(one.token_file, f"config.{key}")
  known = {"mgrpo": dialects.MGRPO, "vllm": dialects.VLLM}
  return Server(
      address=_address(one, token),
      model=one.model or name,
      folder=pathlib.Path(one.folder),
      dialect=known[one.dialect],
  )


def _address(one: Mapping[str, Any], token: str) -> Address:
  """Where a server is; raises ValueError where that is impossible."""
  from mgrpo_jax.sampler.connection import Address

  return Address(
      url=one["url"],
      token=token,
      max_concurrent=one["max_concurrent"],
      timeout=one["timeout"],
      attempts=one["attempts"],
  )


def _check_one(one: Mapping[str, Any], key: str) -> None:
  """Checks what is said of one server."""
  if importlib.util.find_spec("httpx2") is None:
    raise ValueError(
        f"config.{key}.url: needs the package 'httpx2', which is missing: pip"
        " install -e .[external]"
    )
  if one["dialect"] not in DIALECTS:
    raise ValueError(
        f"config.{key}.dialect: {one['dialect']!r}, allowed:"
        f" {', '.join(DIALECTS)}"
    )
  if not one["folder"]:
    raise ValueError(
        f"config.{key}.folder: '' must be a directory that the server at"
        f" {one['url']} reads, too"
    )
  with checks.inside(key):
    _address(one, "")


def _check_sampler(pieces: int, name: str) -> None:
  """Raises where a sampler that there is not would be split."""
  if pieces != 1:
    raise ValueError(
        f"config.policies.{name}.sampler_tensor: {pieces}, allowed: 1, for"
        f" config.policies.{name}.external.url is set"
    )


def _place(one: Mapping[str, Any], name: str) -> str:
  """What at a server is sampled; vLLM has one model, under several names."""
  url = one["url"].rstrip("/")
  if one["dialect"] == "vllm":
    return url
  return f"{url} {one['model'] or name}"
