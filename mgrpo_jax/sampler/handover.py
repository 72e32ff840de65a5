"""Versions of weights as directories that a server reads.

Every version is a directory of its own in a folder, `handed-v12`, with
`config.json` and safetensors, whole or not at all. The name is nobody else's,
so that only what was handed over is ever removed: a published policy has `v12`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil

import numpy as np

from mgrpo_jax import atomic
from mgrpo_jax.policy.load.safetensors import save_directory
from mgrpo_jax.policy.policy import Policy

_KEPT = 2  # versions: the one sampled from, and the one before
_VERSION = re.compile(r"handed-v(\d+)")


def directory(folder: pathlib.Path, version: int) -> pathlib.Path:
  """Where a version lies in a folder."""
  return folder / f"handed-v{version}"


def untied(policy: Policy, *, blank: bool = False) -> Policy:
  """The same policy with an output head of its own, which all servers reload.

  Args:
    policy: any.
    blank: whether the head is to be 0 instead: every token is as likely.

  Returns:
    The policy.
  """
  params = policy.params
  head = params.unembedding
  if head is None:
    head = np.asarray(params.embedding).T
  if blank:
    head = np.zeros(np.shape(head), np.float32)
  return dataclasses.replace(
      policy,
      config=dataclasses.replace(policy.config, tied_embeddings=False),
      params=dataclasses.replace(params, unembedding=head),
  )


def write(folder: pathlib.Path, version: int, policy: Policy) -> pathlib.Path:
  """Writes a version into a folder.

  Args:
    folder: made where it is missing.
    version: number of the weights; one that is there already is replaced.
    policy: with the weights.

  Returns:
    The version's directory, absolute.

  Raises:
    StorageError: it cannot be written.
  """
  path = directory(folder.resolve(), version)
  with atomic.replacing(path) as made:
    save_directory(made, policy)
  return path


def prune(folder: pathlib.Path, newest: int) -> None:
  """Removes all versions of a folder but the newest two.

  Args:
    folder: of the versions.
    newest: number of the one in use; those after it are an older run's.

  Raises:
    StorageError: one cannot be removed.
  """
  kept = range(newest - _KEPT + 1, newest + 1)
  for path in folder.iterdir():
    found = _VERSION.fullmatch(path.name)
    if found and int(found[1]) not in kept:
      try:
        shutil.rmtree(path)
      except OSError as error:
        reason = atomic.reason(error)
        raise atomic.StorageError(f"cannot remove {path}: {reason}") from error
