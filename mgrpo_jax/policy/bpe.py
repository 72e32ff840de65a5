"""BPE tokenizers of the `tokenizers` library (SmolLM2, Llama 3, Qwen, Gemma).

The library would find special tokens in text. Here they are taken out of its
vocabulary before it is built, so it has no way to.
"""

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mgrpo_jax.policy.tokenizer import (
    REPLACEMENT,
    SPACE,
    SPACE_BYTES,
    decode_runs,
    encode_around_spaces,
    is_plain,
    without_surrogates,
)

DEFINITION_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_PROBE = "Lima's <A|b>  12\n\tend caf\u00e9"  # the same in form NFC


class BPETokenizer:
  """A `tokenizer.json` whose added tokens are the special tokens.

  All of them, whatever the definition says (Qwen does not call `<tool_call>`
  special), but for those that are plain text: Gemma's runs of white space and
  HTML elements.

  A byte without a token of its own is dropped, as transformers does; SmolLM2
  lacks six control characters and what only unassigned planes of Unicode need.
  Text that a definition normalises (Qwen's NFC) reads as its normal form.

  Deviation: where spaces are spelled as U+2581 (Gemma), transformers reads a
  U+2581 of the text as a space; here it is kept, in bytes.
  """

  def __init__(self, definition: str, config: Mapping[str, Any]):
    """Reads a definition.

    Args:
      definition: the content of a `tokenizer.json`.
      config: what `tokenizer_config.json` says: `eos_token`, `bos_token` and
        `pad_token` (names, or None), `add_bos_token`. Without a padding token
        the end token pads.

    Raises:
      ValueError: where the package `tokenizers` is missing, the definition
        cannot be read, an end token is missing, or a name is not a token.
    """
    self._definition, self._config = definition, dict(config)
    fields, added = _read_definition(definition)
    self.special_ids: Mapping[str, int] = types.MappingProxyType(added)
    self._special_names = {i: name for name, i in added.items()}
    self._inner = _read_bpe(fields, added)
    spaces = [self._inner.token_to_id(piece) for piece in SPACE_BYTES]
    self._space_ids = None if None in spaces else spaces
    largest = max([*self._inner.get_vocab().values(), *self._special_names])
    self.vocab_size: int = largest + 1
    eos = self._named("eos_token")
    if eos is None:
      raise ValueError(f"{CONFIG_FILE}: eos_token is missing")
    pad = self._named("pad_token")
    self.eos_id: int = eos
    self.pad_id: int = eos if pad is None else pad
    adds_bos = config.get(
        "add_bos_token",
        json.dumps(self._name("bos_token"))
        in json.dumps(fields.get("post_processor")),
    )
    self.bos_id: int | None = self._named("bos_token") if adds_bos else None

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer.encode`."""
    if self._space_ids is None:
      return self._encode_ordinary(without_surrogates(text))
    return encode_around_spaces(text, self._encode_ordinary, self._space_ids)

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer.decode`."""
    return decode_runs(
        ids, self._special_names, self.vocab_size, self._decode_ordinary
    )

  def token_text(self, token: int) -> str:
    """See `Tokenizer.token_text`."""
    text = self.decode([token])
    return self._inner.id_to_token(token) if REPLACEMENT in text else text

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer.files`."""
    config = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
    return {
        DEFINITION_FILE: self._definition.encode(),
        CONFIG_FILE: config.encode(),
    }

  def _encode_ordinary(self, text: str) -> list[int]:
    """Encodes text without surrogates."""
    return self._inner.encode(text, add_special_tokens=False).ids

  def _decode_ordinary(self, ids: list[int]) -> str:
    """Decodes ids none of which is special."""
    return self._inner.decode(ids, skip_special_tokens=False)

  def _name(self, key: str) -> str | None:
    """Reads the name under a key of the config, in either of its forms."""
    name = self._config.get(key)
    if isinstance(name, dict):  # the long form of transformers
      return name.get("content")
    return name

  def _named(self, key: str) -> int | None:
    """Looks up the token that the config names under a key."""
    name = self._name(key)
    if name is None:
      return None
    if not isinstance(name, str) or name not in self.special_ids:
      raise ValueError(f"{CONFIG_FILE}: {key} {name!r} is no added token")
    return self.special_ids[name]


def _read_bpe(fields: dict[str, Any], added: Mapping[str, int]) -> Any:
  """Builds the library's tokenizer, the added tokens taken out of it."""
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
        f"{DEFINITION_FILE} needs the package tokenizers: pip install"
        " 'mgrpo_jax[smollm2]'"
    ) from error
  model, vocabulary = _read_model(fields)
  _check_added(vocabulary, added)
  model["vocab"] = {t: i for t, i in vocabulary.items() if t not in added}
  model["merges"] = [
      merge for merge in model["merges"] if not _spells(merge, added)
  ]
  unknown = model.get("unk_token")
  if isinstance(unknown, str) and unknown in added:
    model["unk_token"] = None
  plain = [t for t in fields["added_tokens"] if t["content"] not in added]
  ordinary = fields | {
      "added_tokens": plain, "post_processor": None, "model": model,
      # Some files keep how they were last called; no text is cut or filled up.
      "truncation": None, "padding": None,
  }  # fmt: skip
  try:
    read = tokenizers.Tokenizer.from_str(json.dumps(ordinary))
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(f"{DEFINITION_FILE}: cannot be read: {error}") from error
  if read.normalizer is not None:
    seen = read.normalizer.normalize_str(_PROBE)
    if seen.replace(SPACE, " ").lstrip(" ") != _PROBE:
      raise ValueError(f"{DEFINITION_FILE}: its normalizer changes text")
  return read


def _read_model(
    fields: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Takes the model and its vocabulary out of a definition."""
  model = fields.get("model")
  if (
      not isinstance(model, dict)
      or model.get("type") != "BPE"
      or not isinstance(model.get("vocab"), dict)
  ):
    raise ValueError(
        f"{DEFINITION_FILE}: model.type must be 'BPE', with a vocab"
    )
  merges = model.get("merges", [])
  if not isinstance(merges, list) or not all(map(_is_merge, merges)):
    raise ValueError(f"{DEFINITION_FILE}: model.merges must be pairs of tokens")
  return model | {"merges": merges}, model["vocab"]


def _is_merge(merge: object) -> bool:
  """Whether a merge names two tokens."""
  two = merge.split(" ") if isinstance(merge, str) else merge
  return (
      isinstance(two, list)
      and len(two) == 2
      and all(isinstance(one, str) for one in two)
  )


def _check_added(vocabulary: dict[str, Any], added: Mapping[str, int]) -> None:
  """Raises where text could become the id of a special token."""
  owners: dict[int, str] = {}
  wrong = []
  for name, token in added.items():
    other = owners.setdefault(token, name)
    if not name or token < 0:
      wrong.append(f"{name!r} has id {token}")
    elif other != name:
      wrong.append(f"{other!r} and {name!r} have id {token}")
    elif vocabulary.get(name, token) != token:
      wrong.append(f"{name!r} has ids {vocabulary[name]} and {token}")
  wrong += [
      f"{owners[token]!r} and {name!r} have id {token}"
      for name, token in vocabulary.items()
      if isinstance(token, int) and owners.get(token, name) != name
  ]
  if wrong:
    raise ValueError(f"{DEFINITION_FILE}: added_tokens: {'; '.join(wrong)}")


def _spells(merge: str | Sequence[str], added: Mapping[str, int]) -> bool:
  """Whether a merge makes a special token, or needs one."""
  left, right = merge.split(" ") if isinstance(merge, str) else merge
  return left + right in added or left in added or right in added


def _read_definition(text: str) -> tuple[dict[str, Any], dict[str, int]]:
  """Parses a definition and its special tokens, name to id."""
  try:
    fields = json.loads(text)
    special = [
        (t["content"], t["id"])
        for t in fields["added_tokens"]
        if t.get("special") or not is_plain(t["content"])
    ]
    added = dict(special)
    if not all(type(n) is str and type(i) is int for n, i in special):
      raise TypeError("content must be text, id an integer")
    if len(added) < len(special):
      raise ValueError("a token is there twice")
  except (
      ValueError, KeyError, TypeError, AttributeError, RecursionError
  ) as error:  # fmt: skip
    raise ValueError(
        f"{DEFINITION_FILE}: must be a JSON object with added_tokens:"
        f" {error!r}"
    ) from error
  return fields, added
