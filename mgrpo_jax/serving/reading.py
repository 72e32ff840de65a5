"""Fields of JSON objects, checked; their place in the request is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax.serving.errors import RequestError, wrong


def field(
    fields: Mapping[str, Any],
    path: str,
    valid: Callable[[Any], bool],
    allowed: str,
) -> Any:
  """The value of a field, None if absent; the key is the path's last part."""
  value = fields.get(path.rpartition(".")[2])
  if value is not None and not valid(value):
    raise wrong(path, value, allowed)
  return value


def flag(fields: Mapping[str, Any], path: str) -> bool:
  """A field that is true or false; false if absent."""
  found = field(fields, path, lambda v: isinstance(v, bool), "true, false")
  return bool(found)


def mapping(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
  """A field that is an object; empty if absent."""
  return field(fields, path, lambda v: isinstance(v, dict), "an object") or {}


def whole(
    fields: Mapping[str, Any], path: str, low: int, high: int
) -> int | None:
  """A field that is a whole number in a range."""

  def valid(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and low <= value <= high

  return field(fields, path, valid, f"whole numbers from {low} to {high}")


def text(fields: Mapping[str, Any], path: str) -> str:
  """A field that must be there, a text."""
  value = field(fields, path, lambda v: isinstance(v, str), "a text")
  if value is None:
    raise RequestError(400, f"{path}: missing", param=path)
  return value


def objects(fields: Mapping[str, Any], path: str, most: int) -> list[Any]:
  """A field that is a list of objects; empty if absent."""

  def valid(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) <= most
    return is_list and all(isinstance(item, dict) for item in value)

  return field(fields, path, valid, f"a list of at most {most} objects") or []
