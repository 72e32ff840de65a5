"""A worker's end of its pipes: JSON lines in, JSON lines out.

Needs nothing but the standard library, as it runs in any environment. What a
library prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
Command = Callable[..., dict[str, Any]]


class Pipe:
  """Reads requests and writes answers; takes standard output for itself."""

  def __init__(self) -> None:
    """Turns standard output into standard error; ends with its parent.

    A worker that is stopped could not see that nobody reads any more.
    """
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    self._out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

  def read(self) -> dict[str, Any] | None:
    """Waits for a request; None once there will be no more."""
    line = sys.stdin.readline()
    request: dict[str, Any] | None = json.loads(line) if line else None
    return request

  def write(self, answer: Mapping[str, Any]) -> None:
    """Answers a request.

    Args:
      answer: as JSON.
    """
    self._out.write(json.dumps(answer) + "\n")
    self._out.flush()

  def serve(self, commands: Mapping[str, Command], **told: Any) -> None:
    """Answers requests until there are no more.

    Args:
      commands: by the name under `do`; called with the other keys.
      **told: what to say beside being ready.
    """
    self.write({"ready": True, **told})
    while (request := self.read()) is not None:
      command = commands[request.pop("do")]
      self.write(command(**request))
