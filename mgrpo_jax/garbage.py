"""What Python's garbage collector need not look at."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def passed_over() -> Iterator[None]:
  """Has collections pass over what there is now, until the block ends.

  Modules, compiled programs and tasks are a million objects that stay. A full
  collection walks through them all, half a second in which no thread plans for
  a device or answers a caller. It is the process's setting: ending the block
  ends it for whoever else made it.
  """
  pass_over()
  try:
    yield
  finally:
    gc.unfreeze()


def pass_over() -> None:
  """Has collections pass over what there is now.

  Until a `passed_over` block ends, without one for good.
  """
  gc.freeze()
