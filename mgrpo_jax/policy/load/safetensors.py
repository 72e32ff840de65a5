"""Directories as Hugging Face writes them, read and written.

    config.json  model.safetensors (or shards with their index)
    tokenizer.model | tokenizer.json + tokenizer_config.json, or neither

`config.json` has three keys of ours: `chat`, the chat format, `system`, the
system message where a call has none, and `activation_dtype`. Without them the
chat format is derived from the special tokens, the message from the chat
template, and activations are float32.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from mgrpo_jax import atomic
from mgrpo_jax.policy import bpe
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import huggingface
from mgrpo_jax.policy.load.fields import read_json
from mgrpo_jax.policy.load.names import safetensors_names
from mgrpo_jax.policy.load.tensors import StoredTensor, assemble, disassemble
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import (
    CHATS,
    SILENT_CHATS,
    Policy,
    default_system,
    derive_chat,
)
from mgrpo_jax.policy.tokenizer import (
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEMPLATE_FILE = "chat_template.jinja"
DTYPES = ("F32", "F16", "BF16")

MAX_FILE_BYTES = 4 * 2**30  # of one weights file, unless a tensor is larger
_COPY, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # compared at once
# Where a multimodal Gemma 3 keeps its text model, and what else it holds.
_TEXT_PREFIXES = {
    "language_model.": "",
    "model.language_model.": "model.",
}
_OTHER_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def load_directory(
    path: pathlib.Path, *, mesh: jax.sharding.Mesh | None
) -> Policy:
  """Loads a policy from a directory.

  Args:
    path: the directory.
    mesh: whose devices hold the parameters; None for the default device.

  Returns:
    The policy, parameters in float32; tokenizer and chat are None where the
    directory holds no tokenizer.

  Raises:
    ValueError: where a file is missing or cannot be read, `config.json` asks
      for something this code does not compute, the tokenizer has ids beyond
      the vocabulary, or tensors are missing, unexpected, misshaped or no
      floats; each lists all its findings.
  """
  fields = read_json(path / CONFIG_FILE)
  config = huggingface.read(fields, str(path / CONFIG_FILE))
  tokenizer = load_tokenizer(path)
  chat = _chat(fields, tokenizer, str(path / CONFIG_FILE))
  if tokenizer is not None:
    _check_ids(tokenizer, config, str(path))
  params = _params(path, config, mesh)
  return Policy(
      config=config,
      params=params,
      tokenizer=tokenizer,
      chat=chat,
      system=_system(path, fields),
  )


def save_directory(path: pathlib.Path | str, policy: Policy) -> None:
  """Writes a policy as a directory, whole or not at all.

  The same policy gives the same bytes. Files are written beside the target,
  which then appears with one rename.

  Args:
    path: what to make; its parent must exist, itself must not, unless empty.
    policy: what to write.

  Raises:
    ValueError: where the path is taken or a parameter has not the shape that
      the config gives it.
    StorageError: where a file cannot be written.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path}: exists already; policies are not overwritten")
  if not path.parent.is_dir():
    raise ValueError(f"{path.parent}: must be a directory")
  tensors = disassemble(
      policy.params, policy.config, safetensors_names(policy.config)
  )
  files = {CONFIG_FILE: _config_file(policy)}
  if policy.tokenizer is not None:
    files |= policy.tokenizer.files()
  with _appearing(path) as directory:
    for name, content in files.items():
      atomic.write(directory / name, content)
    _write_weights(directory, tensors)


def load_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
  """Reads the tokenizer that a directory holds.

  Args:
    directory: holds `tokenizer.model` (sentencepiece), or `tokenizer.json`
      and `tokenizer_config.json`; ours writes one kind, and where a directory
      of another origin holds both, `tokenizer.json` is read.

  Returns:
    The tokenizer; None where there is neither file.

  Raises:
    ValueError: where a file cannot be read or does not keep text exactly.
  """
  definition = directory / bpe.DEFINITION_FILE
  pieces = directory / SENTENCEPIECE_FILE
  if not definition.is_file() and not pieces.is_file():
    return None
  try:
    if not definition.is_file():
      return SentencePieceTokenizer(pieces.read_bytes())
    config = read_json(directory / bpe.CONFIG_FILE)
    return bpe.BPETokenizer(definition.read_text("utf-8"), config)
  except (OSError, ValueError) as error:
    raise ValueError(f"{directory}: {error}") from error


def _check_ids(
    tokenizer: Tokenizer, config: TransformerConfig, source: str
) -> None:
  """Raises where text could become an id that the policy does not have.

  Special tokens may lie beyond: Gemma 3 1B lacks the image token that its
  tokenizer shares with the larger ones.
  """
  special = tokenizer.special_ids.values()
  beyond = sum(token >= config.vocab_size for token in special)
  if tokenizer.vocab_size - beyond > config.vocab_size:
    raise ValueError(
        f"{source}: tokenizer has {tokenizer.vocab_size} ids, vocab_size is"
        f" {config.vocab_size}"
    )


def _config_file(policy: Policy) -> bytes:
  """Writes the sizes the way transformers reads them."""
  tokens = {
      f"{name}_token_id": getattr(policy.tokenizer, f"{name}_id", None)
      for name in ("bos", "eos", "pad")
  }
  fields = huggingface.write(policy.config) | tokens
  fields |= {"chat": policy.chat, "system": policy.system}
  return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _write_weights(
    directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes tensors into one file, or into several and their index."""
  held: dict[str, np.ndarray] = {}
  written: list[tuple[str, list[str], int]] = []  # file, tensors, bytes

  def write_held() -> None:
    file = f"model-{len(written) + 1:05d}.safetensors"
    size = sum(tensor.nbytes for tensor in held.values())
    content = safetensors.numpy.save(held, {"format": "pt"})
    atomic.write(directory / file, content)
    written.append((file, list(held), size))
    held.clear()

  for name, tensor in tensors:
    size = sum(other.nbytes for other in held.values()) + tensor.nbytes
    if held and size > MAX_FILE_BYTES:
      write_held()
    held[name] = tensor
  write_held()
  if len(written) == 1:
    (directory / written[0][0]).rename(directory / WEIGHTS_FILE)
    return
  index = {
      "metadata": {"total_size": sum(size for _, _, size in written)},
      "weight_map": {
          name: file for file, names, _ in written for name in names
      },
  }
  atomic.write_json(directory / INDEX_FILE, index)


def _chat(
    fields: Mapping[str, Any], tokenizer: Tokenizer | None, source: str
) -> str | None:
  """Reads the chat format, or derives it from the special tokens."""
  if tokenizer is None:
    return None
  if "chat" not in fields:
    return derive_chat(tokenizer)
  allowed = (*CHATS, *SILENT_CHATS)
  if fields["chat"] not in (None, *allowed):
    raise ValueError(
        f"{source}: chat = {fields['chat']!r}, must be one of {allowed}"
    )
  return fields["chat"]


def _system(path: pathlib.Path, fields: Mapping[str, Any]) -> str:
  """Reads the default system message, or derives it from the template."""
  if "system" in fields:
    if not isinstance(fields["system"], str):
      raise ValueError(
          f"{path / CONFIG_FILE}: system = {fields['system']!r}, must be text"
      )
    return fields["system"]
  template = path / TEMPLATE_FILE
  try:
    if template.is_file():
      return default_system(template.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{template}: cannot be read: {error}") from error
  if not (path / bpe.CONFIG_FILE).is_file():
    return ""
  return default_system(read_json(path / bpe.CONFIG_FILE).get("chat_template"))


def _params(
    path: pathlib.Path,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh | None,
) -> Params:
  """Opens all weight files at once and reads the parameters from them."""
  with contextlib.ExitStack() as stack:
    stored: dict[str, StoredTensor] = {}
    wrong: list[str] = []
    twice: list[str] = []
    copies: list[Any] = []
    for file in _weight_files(path):
      handle = stack.enter_context(_open(file))
      for stored_name in handle.keys():
        name = _text_name(stored_name, config)
        if name is None:
          continue
        view = handle.get_slice(stored_name)
        if config.tied_embeddings and name == _COPY:
          copies.append(view)
          continue
        if view.get_dtype() not in DTYPES:
          wrong.append(f"{name} is {view.get_dtype()}")
        if name in stored:
          twice.append(f"{name} is stored twice")
        stored[name] = StoredTensor(
            tuple(view.get_shape()), functools.partial(_part, view)
        )
    if wrong:
      wrong.append(f"supported: {DTYPES}")
    if wrong or twice:
      raise ValueError(f"{path}: {'; '.join([*twice, *wrong])}")
    if copies:
      _check_copies(copies, stored, str(path))
    names = safetensors_names(config)
    return assemble(stored, config, names, str(path), mesh)


def _check_copies(
    copies: Iterable[Any], stored: Mapping[str, StoredTensor], source: str
) -> None:
  """Raises where tied embeddings come with an unembedding of their own."""
  embedding = stored.get(_EMBEDDING)
  for view in copies if embedding else ():
    assert embedding is not None
    shape = tuple(view.get_shape())
    same = shape == embedding.shape and len(shape) == 2
    for start in range(0, shape[0] if same else 0, _ROWS):
      end = min(start + _ROWS, shape[0])
      rows = slice(start, end), slice(0, shape[1])
      same &= np.array_equal(view[rows], embedding.read(*rows))
    if not same:
      raise ValueError(
          f"{source}: tie_word_embeddings = True, but {_COPY} differs from"
          f" {_EMBEDDING}"
      )


def _part(view: Any, *index: slice) -> np.ndarray:
  """Reads a part of a tensor."""
  return view[index]


def _text_name(name: str, config: TransformerConfig) -> str | None:
  """A tensor's name in a text-only model; None for what is not a weight of it.

  Beside weights, files may hold buffers of rotations that are computed here.
  """
  if config.post_norms:
    if name.startswith(_OTHER_PREFIXES):
      return None
    for prefix, instead in _TEXT_PREFIXES.items():
      if name.startswith(prefix):
        name = instead + name.removeprefix(prefix)
  return None if name.endswith("rotary_emb.inv_freq") else name


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Lists the files that hold the tensors."""
  index = path / INDEX_FILE
  if not index.is_file():
    return [path / WEIGHTS_FILE]
  mapped = read_json(index).get("weight_map")
  held: list[Any] = (
      list(mapped.values()) if isinstance(mapped, dict) else [mapped]
  )
  wrong = [name for name in held if not _is_file_name(name)]
  if wrong or not held:
    raise ValueError(f"{index}: weight_map must name files, has {wrong}")
  names = sorted(set(held))
  missing = [name for name in names if not (path / name).is_file()]
  if missing:
    raise ValueError(f"{path}: missing {', '.join(missing)}")
  return [path / name for name in names]


def _is_file_name(name: object) -> bool:
  """Whether a name stays in its directory."""
  if not isinstance(name, str) or "\0" in name or len(name) > 255:
    return False
  return name not in ("", ".", "..") and name == pathlib.PurePath(name).name


def _open(file: pathlib.Path) -> Any:
  """Opens a safetensors file; the library's errors become ValueErrors."""
  if file.exists() and not file.is_file():  # a pipe would be waited for
    raise ValueError(f"{file}: cannot be read: not a regular file")
  try:
    return safetensors.safe_open(file, framework="numpy")
  except FileNotFoundError as error:
    raise ValueError(f"{file}: missing") from error
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file}: cannot be read: {error}") from error


@contextlib.contextmanager
def _appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a directory that takes the path's name if all goes well."""
  directory = path.parent / f".{path.name}.{uuid.uuid4().hex}"
  directory.mkdir()
  try:
    yield directory
    directory.replace(path)
  except BaseException:
    shutil.rmtree(directory, ignore_errors=True)
    raise
