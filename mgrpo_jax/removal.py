"""Keys of the store that are being removed while other work goes on."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorstore as ts

from mgrpo_jax import locks


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
    self._folders = set[str]()

  def begin(self, keys: Sequence[str], folders: Iterable[str]) -> None:
    """Starts removing keys, which are all below some folders."""
    self._pending += [(key, self._start(key)) for key in keys]
    self._folders.update(folders)

  def settle(self, wait: Callable[..., Any]) -> None:
    """Waits for all of them, and removes the folders this leaves empty.

    What writers that were killed left there goes, too.

    Args:
      wait: `Store`'s way to wait for an operation on a key.

    Raises:
      StorageError: a key cannot be removed.
    """
    while self._pending:
      key, removal = self._pending.pop(0)
      again = functools.partial(self._start, key)
      wait("delete", key, again, started=removal)
    folders, self._folders = self._folders, set()
    if self._root is not None:
      for folder in folders:
        _sweep(self._root, self._root / folder)

  def _start(self, key: str) -> ts.Future:
    """Starts removing a key, which may be any that a listing gave."""
    return self._kvstore.write(os.fsencode(key), None)


def _sweep(root: pathlib.Path, folder: pathlib.Path) -> None:
  """Removes a folder, and those above it below a root, where they are empty.

  Where there is no such folder, those above it stay: somebody may have made
  them a moment ago, to write there.
  """
  if not folder.is_dir():
    return
  for path, _, names in os.walk(folder, topdown=False):
    for name in names:
      if name.endswith(locks.SUFFIX):
        with contextlib.suppress(OSError):
          os.unlink(os.path.join(path, name))
    with contextlib.suppress(OSError):  # what is there, somebody writes again
      os.rmdir(path)
  while folder != root:
    try:
      folder.rmdir()
    except FileNotFoundError:
      pass  # it went before, or with another one
    except OSError:
      break
    folder = folder.parent


def below(keys: Iterable[str], folders: Iterable[str]) -> list[str]:
  """Returns the keys that lie in one of some folders, however deep."""
  wanted = set(folders)
  return [
      key
      for key in keys
      if not wanted.isdisjoint(map(str, pathlib.PurePosixPath(key).parents))
  ]
