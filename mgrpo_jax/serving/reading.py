"""Fields of JSON objects, checked; their place in the request is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mgrpo_jax.serving.errors import RequestError, wrong

_COLDEST, _WARMEST = 1e-3, 2.0  # below, logits are divided beyond float32


def parse(body: bytes) -> dict[str, Any]:
  """Reads a body; fields that are null are absent.

  Args:
    body: JSON.

  Returns:
    Fields of the object.

  Raises:
    RequestError: it is no JSON object.
  """

  def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

  try:
    value = json.loads(body, parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    raise RequestError(
        400, f"the body is not JSON: {error}", code="invalid_json"
    ) from error
  if not isinstance(value, dict):
    raise wrong("the body", value, "a JSON object")
  return {key: found for key, found in value.items() if found is not None}


def check_names(
    fields: Mapping[str, Any],
    *,
    read: Collection[str],
    neutral: Mapping[str, Sequence[Any]],
    without_effect: Collection[str] = (),
) -> None:
  """Raises for fields that are unknown, or that would have to do something.

  Args:
    fields: of a request.
    read: names of those that are honoured.
    neutral: names of those that are not, with the values at which that changes
      nothing.
    without_effect: names of those that never change anything.

  Raises:
    RequestError: naming the field.
  """
  known = {*read, *neutral, *without_effect}
  for name, value in fields.items():
    if name not in known:
      raise RequestError(
          400,
          f"{name[:80]}: unknown field, allowed: {', '.join(sorted(known))}",
          param=name[:80],
          code="unknown_parameter",
      )
    if name in neutral and not any(
        value == one and isinstance(value, bool) == isinstance(one, bool)
        for one in neutral[name]  # JSON's true is no 1
    ):
      raise wrong(name, value, " or ".join(map(json.dumps, neutral[name])))


def temperature(fields: Mapping[str, Any]) -> float | None:
  """The field `temperature`, None if absent."""

  def valid(value: Any) -> bool:
    return _is_number(value) and (value == 0 or _COLDEST <= value <= _WARMEST)

  found = field(
      fields, "temperature", valid, f"0, or {_COLDEST} to {_WARMEST:g}"
  )
  return None if found is None else float(found)


def share(
    fields: Mapping[str, Any], path: str, *, lowest: float, absent: float
) -> float:
  """A field that is a share of a probability, from the lowest one to 1."""

  def valid(value: Any) -> bool:
    return _is_number(value) and lowest <= value <= 1

  found = field(fields, path, valid, f"{lowest:g} to 1")
  return absent if found is None else float(found)


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


def _is_number(value: Any) -> bool:
  """Whether a JSON value is a number; True and False are not."""
  return isinstance(value, int | float) and not isinstance(value, bool)
