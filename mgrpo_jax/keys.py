"""Names that are safe as keys of a bucket and as paths on a disk."""

import re

from mgrpo_jax import locks

MAX_KEY_BYTES = 512
_SEGMENT = re.compile(r"[A-Za-z0-9_@=+,-][A-Za-z0-9._@=+,-]*")


def check_key(key: str) -> str:
  """Checks that a key stays inside its bucket.

  Args:
    key: segments of letters, digits and `._@=+,-` joined by `/`; none is empty
      or starts with a dot, so `..` and absolute paths are impossible.

  Returns:
    The key.

  Raises:
    ValueError: it is not one.
  """
  if not is_key(key):
    raise ValueError(
        f"key: {key!r} must be segments of letters, digits and ._@=+,- joined "
        f"by '/', none starting with a dot, at most {MAX_KEY_BYTES} bytes"
    )
  return key


def is_key(key: str) -> bool:
  """Whether a key is one that `check_key` lets pass."""
  return (
      isinstance(key, str)
      and len(key) <= MAX_KEY_BYTES
      and not any(part.endswith(locks.SUFFIX) for part in key.split("/"))
      and all(_SEGMENT.fullmatch(part) for part in key.split("/"))
  )


def check_name(name: str, what: str) -> str:
  """Checks that a name is one segment of a key; `what` names it in errors."""
  if not isinstance(name, str) or "/" in name:
    raise ValueError(f"{what}: {name!r} must not contain '/'")
  try:
    return check_key(name)
  except ValueError as error:
    raise ValueError(f"{what}: {error}") from error
