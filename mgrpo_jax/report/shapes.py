"""Checks of what JSON gave back, where a damaged file may hold anything.

A check is a function from a value to whether it is what it should be; checks
of lists and objects are made of checks of what is in them.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

_MOST = 1e100  # nothing that a run measures comes near; axes need room above


def is_text(value: Any) -> bool:
  """Whether it is text."""
  return isinstance(value, str)


def is_whole(value: Any) -> bool:
  """Whether it is a whole number; True and 1.0 are none."""
  return type(value) is int


def is_count(value: Any) -> bool:
  """Whether it is a whole number from 0, and not absurdly large."""
  return type(value) is int and 0 <= value <= _MOST


def is_number(value: Any) -> bool:
  """Whether it is a number, finite and not absurdly large."""
  return type(value) in (int, float) and abs(value) <= _MOST


def is_share(value: Any) -> bool:
  """Whether it is a number in 0..1, such as an accuracy."""
  return is_number(value) and 0 <= value <= 1


def optional(check: Check) -> Check:
  """A check that also lets null pass."""
  return lambda value: value is None or check(value)


def one_of(*choices: str) -> Check:
  """A check that a value is one of these texts."""
  return lambda value: is_text(value) and value in choices


def list_of(check: Check) -> Check:
  """A check of lists, every item by the same check."""
  return lambda value: type(value) is list and all(map(check, value))


def tuple_of(*checks: Check) -> Check:
  """A check of lists of a fixed length, an item by its own check."""
  return lambda value: (
      type(value) is list
      and len(value) == len(checks)
      and all(check(item) for check, item in zip(checks, value, strict=True))
  )


def mapping_of(check: Check) -> Check:
  """A check of objects with any keys, every value by the same check."""
  return lambda value: type(value) is dict and all(map(check, value.values()))


def object_of(fields: Mapping[str, Check]) -> Check:
  """A check of objects that hold at least these fields."""
  return lambda value: type(value) is dict and not misfits(value, fields)


def misfits(value: Mapping[str, Any], fields: Mapping[str, Check]) -> list[str]:
  """Lists the fields that are missing or not what they should be.

  Args:
    value: an object.
    fields: name -> check.

  Returns:
    Names, in the order of the checks.
  """
  return [
      name
      for name, check in fields.items()
      if name not in value or not check(value[name])
  ]
