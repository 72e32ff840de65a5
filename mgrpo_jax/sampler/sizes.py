"""The sizes of an engine: what its programs' shapes follow from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """See `Engine` for what they mean.

  Raises:
    ValueError: if one is out of range, naming it.
  """

  num_slots: int
  context: int
  block: int
  prefill_tokens: int
  prefill_buckets: Sequence[int]
  decode_steps: int
  decode_rows: int

  def __post_init__(self) -> None:
    """Checks every size."""
    for name in (
        "num_slots",
        "context",
        "block",
        "prefill_tokens",
        "decode_steps",
    ):
      _check(name, getattr(self, name))
    _check("prefill_buckets", min(self.prefill_buckets, default=0))
    if not 0 <= self.decode_rows <= self.num_slots:
      raise ValueError(
          f"decode_rows must be in 0..{self.num_slots} (num_slots), got"
          f" {self.decode_rows!r}"
      )

  @property
  def rows(self) -> int:
    """Slots that are computed together."""
    return self.decode_rows or self.num_slots


def _check(name: str, size: int) -> None:
  """Raises for a size that is not positive."""
  if size < 1:
    raise ValueError(f"{name} must be >= 1, got {size!r}")
