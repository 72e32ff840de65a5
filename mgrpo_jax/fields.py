"""Checks of the fields of frozen dataclasses."""


def check(name: str, value: float, valid: bool, allowed: str) -> None:
  """Raises unless a field has an allowed value.

  Args:
    name: of the field.
    value: what it has.
    valid: whether that is allowed; write it so that NaN is not.
    allowed: what is, for the error: `in [0, 1)`.

  Raises:
    ValueError: it is not.
  """
  if not valid:
    raise ValueError(f"{name} must be {allowed}, got {value}")
