"""Keys of the store that are being removed while other work goes on."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorstore as ts


class Removal:
  """What was begun and not waited for; belongs to one store."""

  def __init__(self, kvstore: ts.KvStore, root: pathlib.Path | None) -> None:
    """Begins with nothing.

    Args:
      kvstore: where keys are removed.
      root: its folder, where it is one of the local disk.
    """
    self._kvstore = kvstore
    self._root = root
    self._pending: list[tuple[str, ts.Future]] = []

  def begin(self, keys: Sequence[str]) -> None:
    """Starts removing keys."""
    self._pending += [(key, self._start(key)) for key in keys]

  def settle(self, wait: Callable[..., Any]) -> None:
    """Waits for all of them, and removes the folders this leaves empty.

    Args:
      wait: `Store`'s way to wait for an operation on a key.

    Raises:
      StorageError: a key cannot be removed.
    """
    folders = set[str]()
    while self._pending:
      key, removal = self._pending.pop(0)
      again = functools.partial(self._start, key)
      wait("delete", key, again, started=removal)
      folders.add(key.rpartition("/")[0])
    if self._root is not None:
      _remove_empty(self._root, folders)

  def _start(self, key: str) -> ts.Future:
    """Starts removing a key, which may be any that a listing gave."""
    return self._kvstore.write(os.fsencode(key), None)


def _remove_empty(root: pathlib.Path, folders: Iterable[str]) -> None:
  """Removes folders below a root, and those above them, that are empty."""
  for folder in folders:
    path = root / folder
    while path != root:
      try:
        path.rmdir()
      except FileNotFoundError:
        pass  # it went with another one
      except OSError:
        break  # something is there, or somebody writes there again
      path = path.parent


def below(keys: Iterable[str], folders: Iterable[str]) -> list[str]:
  """Returns the keys that lie in one of some folders, however deep."""
  wanted = set(folders)
  return [
      key
      for key in keys
      if not wanted.isdisjoint(map(str, pathlib.PurePosixPath(key).parents))
  ]
