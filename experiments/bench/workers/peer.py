"""A worker as its parent sees it: asked, and stopped while others are timed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

_REPOSITORY = pathlib.Path(__file__).parents[3]
_INHERITED = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "JAX_COMPILATION_CACHE_DIR",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)


class PeerError(RuntimeError):
  """A worker that is not there, or no longer."""


class Peer:
  """A worker in a process group of its own, stopped unless it is asked."""

  def __init__(
      self,
      python: str,
      module: str,
      arguments: Sequence[str],
      log: pathlib.Path,
  ) -> None:
    """Starts a worker and waits until it is ready.

    Args:
      python: of its environment.
      module: of `experiments.bench.workers`.
      arguments: of its command line.
      log: gets what it and its libraries print.

    Raises:
      PeerError: it does not start.
    """
    self.name = module
    self._log = log
    environment = {
        key: os.environ[key] for key in _INHERITED if key in os.environ
    }
    environment |= {"PYTHONPATH": str(_REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with log.open("w") as errors:
      try:
        self._process = subprocess.Popen(
            [python, "-m", f"experiments.bench.workers.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=_REPOSITORY,
            env=environment,
        )
      except OSError as error:
        raise PeerError(f"{python}: {error}") from error
    self.told = self._answer()
    self._signal(signal.SIGSTOP)

  def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
    """Lets the worker do something, and only while it does.

    Args:
      do: name of the command.
      **arguments: of it, as JSON.

    Returns:
      What it says.

    Raises:
      PeerError: it ended.
    """
    self._signal(signal.SIGCONT)
    request: Mapping[str, Any] = {"do": do, **arguments}
    try:
      assert self._process.stdin is not None
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError as error:
      raise self._ended() from error
    told = self._answer()
    self._signal(signal.SIGSTOP)
    return told

  def close(self) -> None:
    """Ends the worker and what it started."""
    self._signal(signal.SIGKILL)
    self._process.communicate()

  def _answer(self) -> dict[str, Any]:
    """Reads a line."""
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise self._ended()
    told: dict[str, Any] = json.loads(line)
    return told

  def _ended(self) -> PeerError:
    """Says how the worker ended; its log may not outlive its caller."""
    code = self._process.wait()
    last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
    return PeerError(f"{self.name} ended with {code}: {''.join(last)}")

  def _signal(self, number: int) -> None:
    """Tells the worker's whole process group."""
    if self._process.poll() is None:
      os.killpg(self._process.pid, number)
