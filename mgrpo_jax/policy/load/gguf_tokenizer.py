"""Tokenizers as the metadata of GGUF files describe them.

GGUF has two kinds: byte-level BPE (`gpt2`: tokens and merges) and
sentencepiece's BPE (`llama`: tokens and scores). How text becomes words is not
in the file, only the name of a rule; what each name stands for is here, as the
models' own `tokenizer.json` has it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mgrpo_jax.policy.bpe import BPETokenizer
from mgrpo_jax.policy.tokenizer import (
    SPACE,
    SentencePieceTokenizer,
    Tokenizer,
)

_PREFIX = "tokenizer.ggml."
# Of token_type; sentencepiece gives its pieces the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODEL: Any = sentencepiece_model_pb2  # its classes are made at run time


def read_tokenizer(fields: Mapping[str, Any], source: str) -> Tokenizer:
  """Builds the tokenizer that a file describes.

  Control tokens, unused ones, and user-defined ones that are no plain text
  cannot come from text.

  Args:
    fields: the metadata, name to value.
    source: names the file in errors.

  Returns:
    The tokenizer; `add_bos_token` and `add_space_prefix`, where the file does
    not give them, are as llama.cpp takes them.

  Raises:
    ValueError: metadata are missing, contradict themselves, or describe
      another kind of tokenizer.
  """
  own = {
      key.removeprefix(_PREFIX): value
      for key, value in fields.items()
      if key.startswith(_PREFIX)
  }
  kind: Any = own.get("model")
  if not isinstance(kind, str) or kind not in _KINDS:
    raise ValueError(
        f"{source}: {_PREFIX}model = {kind!r}, must be one of {list(_KINDS)}"
    )
  build, needed = _KINDS[kind]
  needed = ("tokens", "token_type", "eos_token_id", *needed)
  problems = [f"missing {_PREFIX}{key}" for key in needed if key not in own]
  problems += _mistyped(own)
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  try:
    _check(own)
    return build(own)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error


def _mistyped(own: Mapping[str, Any]) -> list[str]:
  """Finds what is not of the type that it must be."""
  lists: Mapping[str, tuple[type, ...]] = {
      "tokens": (str,),
      "merges": (str,),
      "token_type": (int,),
      "scores": (int, float),
  }
  problems = [
      f"{_PREFIX}{key} must be a list of {kinds[-1].__name__}"
      for key, kinds in lists.items()
      if key in own
      and not (
          isinstance(own[key], list)
          and all(
              isinstance(one, kinds) and not isinstance(one, bool)
              for one in own[key]
          )
      )
  ]
  problems += [
      f"{_PREFIX}{key} = {own[key]!r}, must be an integer"
      for key in (f"{name}_token_id" for name in _NAMED.values())
      if key in own and type(own[key]) is not int
  ]
  if not problems and any(m.count(" ") != 1 for m in own.get("merges", [])):
    problems.append(f"{_PREFIX}merges must be pairs of tokens")
  pre = own.get("pre", "")
  if not isinstance(pre, str):
    problems.append(f"{_PREFIX}pre = {pre!r}, must be text")
  return problems


def _check(own: Mapping[str, Any]) -> None:
  """Raises where lists are of unequal length or ids lie beyond them."""
  number = len(own["tokens"])
  problems = [
      f"{_PREFIX}{key} has {len(own[key])} entries, tokens {number}"
      for key in ("token_type", "scores")
      if len(own.get(key, own["tokens"])) != number
  ]
  problems += [
      f"{_PREFIX}{key} = {own[key]}, must be in [0, {number})"
      for key in (f"{name}_token_id" for name in _NAMED.values())
      if not 0 <= own.get(key, 0) < number
  ]
  if problems:
    raise ValueError("; ".join(problems))


# What the named tokens are called here and in GGUF.
_NAMED: Mapping[str, str] = {
    "bos": "bos",
    "eos": "eos",
    "pad": "padding",
    "unk": "unknown",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Words:
  """What `tokenizer.ggml.pre` stands for.

  Attributes:
    splitters: make what cuts text into words, in order; bytes come after.
    composed: whether text is brought to Unicode's form NFC first.
    whole: whether a word of the vocabulary is its token, whatever the merges.
    adds_bos: whether sequences start with it where the file does not say.
  """

  splitters: tuple[Callable[[], Any], ...]
  composed: bool = False
  whole: bool = False
  adds_bos: bool = False


def _digits() -> Any:
  """SmolLM's: every digit apart."""
  from tokenizers import pre_tokenizers

  return pre_tokenizers.Digits(individual_digits=True)


def _gpt2() -> Any:
  """GPT-2's: words, numbers, punctuation, spaces; then bytes."""
  from tokenizers import pre_tokenizers

  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _tiktoken(digits: str) -> Callable[[], Any]:
  """Llama 3's and Qwen's, which differ in how many digits go together."""
  words = (
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
      + digits
      + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )

  def make() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

  return make


_WORDS: Mapping[str, _Words] = {
    "gpt-2": _Words(splitters=(_gpt2,)),
    "smollm": _Words(splitters=(_digits, _gpt2)),
    "llama-bpe": _Words(
        splitters=(_tiktoken(r"\p{N}{1,3}"),), whole=True, adds_bos=True
    ),
    "qwen2": _Words(splitters=(_tiktoken(r"\p{N}"),), composed=True),
}


def _byte_level(own: Mapping[str, Any]) -> BPETokenizer:
  """Builds a byte-level BPE tokenizer."""
  from tokenizers import (
      AddedToken,
      Tokenizer,
      decoders,
      models,
      normalizers,
      pre_tokenizers,
  )

  pre: Any = own.get("pre")
  if pre not in _WORDS:
    raise ValueError(
        f"{_PREFIX}pre = {pre!r}, must be one of {list(_WORDS)}; load the"
        " directory that the file was converted from"
    )
  words = _WORDS[pre]
  ids = {token: i for i, token in enumerate(own["tokens"])}
  merges = [tuple(merge.split(" ")) for merge in own["merges"]]
  try:
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=words.whole)
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(f"tokenizer: {error}") from error
  tokenizer = Tokenizer(model)
  if words.composed:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [make() for make in words.splitters]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(
      [
          AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
          for token, kind in zip(own["tokens"], own["token_type"], strict=True)
          if kind in (_CONTROL, _USER_DEFINED, _UNUSED)
      ]
  )
  config = {
      f"{name}_token": own["tokens"][own[f"{key}_token_id"]]
      for name, key in _NAMED.items()
      if f"{key}_token_id" in own and name != "unk"
  }
  config["add_bos_token"] = own.get("add_bos_token", words.adds_bos)
  return BPETokenizer(tokenizer.to_str(), config)


def _pieces(own: Mapping[str, Any]) -> SentencePieceTokenizer:
  """Builds the sentencepiece model that the file was made from."""
  tokens, scores, types = own["tokens"], own["scores"], own["token_type"]
  normal = [s for s, kind in zip(scores, types, strict=True) if kind == _NORMAL]
  if len(set(normal)) == 1 < len(normal):
    raise ValueError(
        f"{_PREFIX}scores are all equal, so the order of merges is lost; load"
        " the directory that the file was converted from"
    )
  unknown = _unknown(own)
  model = _MODEL.ModelProto()
  for i, (token, score, kind) in enumerate(
      zip(tokens, scores, types, strict=True)
  ):
    if kind == _USER_DEFINED:  # which the converter writes with spaces
      token = token.replace(" ", SPACE)
    model.pieces.add(
        piece=token, score=score, type=_UNKNOWN if i == unknown else kind
    )
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(tokens)
  trainer.byte_fallback = _BYTE in types
  trainer.unk_piece = tokens[unknown]
  trainer.eos_piece = tokens[own["eos_token_id"]]
  trainer.pad_piece = tokens[own.get("padding_token_id", unknown)]
  # To the library the unknown token is none of these.
  bos = own.get("bos_token_id", unknown)
  trainer.bos_piece = tokens[bos if own.get("add_bos_token", True) else unknown]
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = own.get("add_space_prefix", True)
  normalizer.remove_extra_whitespaces = False
  return SentencePieceTokenizer(model.SerializeToString())


def _unknown(own: Mapping[str, Any]) -> int:
  """Finds the unknown token, which Gemma's files count as control token."""
  types: Sequence[int] = own["token_type"]
  if _UNKNOWN in types:
    return types.index(_UNKNOWN)
  if "unknown_token_id" not in own:
    raise ValueError(
        f"missing {_PREFIX}unknown_token_id, or a token of type {_UNKNOWN}"
    )
  return own["unknown_token_id"]


_KINDS: Mapping[str, tuple[Callable[..., Tokenizer], tuple[str, ...]]] = {
    "gpt2": (_byte_level, ("merges",)),
    "llama": (_pieces, ("scores",)),
}
