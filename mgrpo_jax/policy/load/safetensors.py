"""Directories as Hugging Face writes them for Llama, read and written.

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
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.numpy

from mgrpo_jax import atomic
from mgrpo_jax.policy import bpe
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import llama
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import Policy, default_system
from mgrpo_jax.policy.tokenizer import (
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEMPLATE_FILE = "chat_template.jinja"
CHATS = ("chatml", "compact")
DTYPES = ("F32", "F16", "BF16")

# Sizes that a config.json has to give, and what they are called here.
_SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
}
# What the transformer does not compute otherwise.
_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def load_directory(path: pathlib.Path) -> Policy:
  """Loads a policy from a directory.

  Args:
    path: the directory.

  Returns:
    The policy, parameters in float32; tokenizer and chat are None where the
    directory holds no tokenizer.

  Raises:
    ValueError: where a file is missing or cannot be read, `config.json` asks
      for something this code does not compute, the tokenizer has ids beyond
      the vocabulary, or tensors are missing, unexpected, misshaped or no
      floats; each lists all its findings.
  """
  fields = _read_json(path / CONFIG_FILE)
  config = _config(fields, str(path / CONFIG_FILE))
  tokenizer = load_tokenizer(path)
  chat = _chat(fields, tokenizer, str(path / CONFIG_FILE))
  if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
        f"{path}: tokenizer has {tokenizer.vocab_size} ids, vocab_size is"
        f" {config.vocab_size}"
    )
  params = _params(path, config)
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
  tensors = llama.disassemble(
      policy.params, policy.config, llama.SAFETENSORS_NAMES
  )
  files = {
      CONFIG_FILE: _config_file(policy),
      WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"}),
  }
  if policy.tokenizer is not None:
    files |= policy.tokenizer.files()
  with _appearing(path) as directory:
    for name, content in files.items():
      atomic.write(directory / name, content)


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
    config = _read_json(directory / bpe.CONFIG_FILE)
    return bpe.BPETokenizer(definition.read_text("utf-8"), config)
  except (OSError, ValueError) as error:
    raise ValueError(f"{directory}: {error}") from error


def _config(fields: Mapping[str, Any], source: str) -> TransformerConfig:
  """Reads the sizes; refuses what the transformer does not compute."""
  rope = fields.get("rope_parameters") or {}
  base: Any = rope.get("rope_theta", fields.get("rope_theta"))
  problems = [f"missing {key}" for key in _SIZES if key not in fields]
  if base is None:
    problems.append("missing rope_theta")
  problems += [
      f"{key} = {fields[key]!r}, must be {value!r}"
      for key, value in _FIXED.items()
      if fields.get(key, value) != value
  ]
  if rope.get("rope_type", "default") != "default":
    problems.append(f"rope_type = {rope['rope_type']!r}, must be 'default'")
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  sizes = {ours: fields[theirs] for theirs, ours in _SIZES.items()}
  heads = sizes["num_heads"]
  try:
    return TransformerConfig(
        **sizes,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or sizes["embed_dim"] // heads,
        rope_base=base,
        tied_embeddings=fields.get("tie_word_embeddings", False),
        dtype=fields.get("activation_dtype", "float32"),
    )
  except (ValueError, TypeError) as error:
    raise ValueError(f"{source}: {error}") from error


def _config_file(policy: Policy) -> bytes:
  """Writes the sizes the way transformers reads them."""
  config = policy.config
  sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
  tokenizer = policy.tokenizer
  tokens = {
      f"{name}_token_id": getattr(tokenizer, f"{name}_id", None)
      for name in ("bos", "eos", "pad")
  }
  fields = {
      **_FIXED,
      **sizes,
      **tokens,
      "architectures": ["LlamaForCausalLM"],
      "num_key_value_heads": config.num_kv_heads,
      "head_dim": config.head_dim,
      "rope_theta": config.rope_base,
      "tie_word_embeddings": config.tied_embeddings,
      "torch_dtype": "float32",
      "activation_dtype": config.dtype,
      "chat": policy.chat,
      "system": policy.system,
  }
  return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _chat(
    fields: Mapping[str, Any], tokenizer: Tokenizer | None, source: str
) -> str | None:
  """Reads the chat format, or derives it from the special tokens."""
  if tokenizer is None:
    return None
  if "chat" not in fields:
    return "chatml" if "<|im_start|>" in tokenizer.special_ids else None
  if fields["chat"] not in (None, *CHATS):
    raise ValueError(
        f"{source}: chat = {fields['chat']!r}, must be one of {CHATS}"
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
  return default_system(_read_json(path / bpe.CONFIG_FILE).get("chat_template"))


def _params(path: pathlib.Path, config: TransformerConfig) -> Params:
  """Opens all weight files at once and reads the parameters from them."""
  with contextlib.ExitStack() as stack:
    stored: dict[str, llama.StoredTensor] = {}
    wrong: list[str] = []
    for file in _weight_files(path):
      handle = stack.enter_context(_open(file))
      for name in handle.keys():
        view = handle.get_slice(name)
        if view.get_dtype() not in DTYPES:
          wrong.append(f"{name} is {view.get_dtype()}")
        stored[name] = llama.StoredTensor(
            tuple(view.get_shape()), functools.partial(handle.get_tensor, name)
        )
    if wrong:
      raise ValueError(f"{path}: {'; '.join(wrong)}; supported: {DTYPES}")
    return llama.assemble(stored, config, llama.SAFETENSORS_NAMES, str(path))


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Lists the files that hold the tensors."""
  index = path / INDEX_FILE
  if not index.is_file():
    return [path / WEIGHTS_FILE]
  names = sorted(set(_read_json(index).get("weight_map", {}).values()))
  wrong = [n for n in names if n != pathlib.PurePath(n).name]
  if wrong or not names:
    raise ValueError(f"{index}: weight_map must name files, has {wrong}")
  missing = [name for name in names if not (path / name).is_file()]
  if missing:
    raise ValueError(f"{path}: missing {', '.join(missing)}")
  return [path / name for name in names]


def _open(file: pathlib.Path) -> Any:
  """Opens a safetensors file; the library's errors become ValueErrors."""
  try:
    return safetensors.safe_open(file, framework="numpy")
  except FileNotFoundError as error:
    raise ValueError(f"{file}: missing") from error
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file}: cannot be read: {error}") from error


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; everything else is a ValueError naming the file."""
  try:
    fields = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{file}: cannot be read: {error}") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{file}: must be a JSON object")
  return fields


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
