"""Text to token ids and back, with special tokens that text cannot produce.

Two rules hold for every tokenizer here. `decode(encode(text)) == text`, so
what an agent reads is what was written. And `encode` never yields a special
token, whatever the text says: a web page that contains `<answer>` or
`<|im_end|>` is spelled out in ordinary tokens. Structure enters a token stream
only through `special_ids`, or through `encode_with_specials` for templates.
"""

import io
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import sentencepiece
from google.protobuf import message as protobuf
from sentencepiece import sentencepiece_model_pb2

SENTENCEPIECE_FILE = "tokenizer.model"

_PAD, _UNK, _EOS = "<pad>", "<unk>", "<eos>"
SPACE = "\u2581"  # how sentencepiece spells a space; text may hold it too
SPACE_BYTES = tuple(f"<0x{byte:02X}>" for byte in SPACE.encode())
_MODEL: Any = sentencepiece_model_pb2  # its classes are made at run time
_HTML = re.compile(
    r"</?(html|body|div|span|footer|iframe|img|bbox|a|ul|li|table|caption|thead"
    r"|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)  # what Gemma has pieces for
_PROBE = "  two  spaces\n\n\ttab \u2581\u00e9\u2047 "
REPLACEMENT = "\ufffd"
_MAX_LINE_BYTES = 1 << 24  # longer lines would be skipped without a word


class Tokenizer(Protocol):
  """What the rest of the package knows of a tokenizer.

  Attributes:
    vocab_size: number of ids, special ones included.
    bos_id: what every sequence has to start with, None where nothing has to.
    eos_id: what ends a text.
    pad_id: fills unused places; may equal `eos_id`, so never mask by it.
    special_ids: name to id of every token that text cannot produce.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int
  special_ids: Mapping[str, int]

  def encode(self, text: str) -> list[int]:
    """Spells a text in ordinary tokens, never in special ones.

    Args:
      text: any string; unpaired surrogates count as U+FFFD.

    Returns:
      Its token ids.
    """
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Turns token ids into text; special tokens appear as their names.

    Args:
      ids: token ids; byte sequences that are not UTF-8 become U+FFFD.

    Returns:
      The text.

    Raises:
      ValueError: where an id is not in the vocabulary.
    """
    ...

  def token_text(self, token: int) -> str:
    """Shows one token to a reader.

    Args:
      token: its id.

    Returns:
      Its text, or the name of its piece where it is only part of a character.
    """
    ...

  def files(self) -> dict[str, bytes]:
    """Gives the files that `load.load_tokenizer` reads.

    Returns:
      File name to content; the same bytes for the same tokenizer.
    """
    ...


class SentencePieceTokenizer:
  """A sentencepiece model whose control symbols are the special tokens.

  Some models (Gemma) have theirs among the user-defined symbols, which the
  library would find in text. Those that are no plain text count as control
  symbols here.

  Some models (Llama 1 and 2) begin every text with a space. `encode` puts it
  there, and `decode` takes it from the start of every run of ordinary tokens.
  """

  def __init__(self, model: bytes):
    """Reads a serialised model.

    Args:
      model: the content of a `.model` file. Without a padding token the end
        token pads.

    Raises:
      ValueError: where the model cannot be read, has no end token, or changes
        text (normalisation, no byte fallback).
    """
    self._model = bytes(model)
    ordinary, self._prefix = _ordinary(self._model)
    self._processor = _read_sentencepiece(ordinary)
    size = self._processor.vocab_size()
    self.vocab_size: int = size
    self.special_ids: Mapping[str, int] = types.MappingProxyType(
        {
            self._processor.id_to_piece(i): i
            for i in range(size)
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
    )
    self._special_names = {i: name for name, i in self.special_ids.items()}
    bos = self._processor.bos_id()
    self.bos_id: int | None = bos if bos >= 0 else None
    self.eos_id: int = self._processor.eos_id()
    if self.eos_id < 0:
      raise ValueError("sentencepiece model: needs an end token")
    pad = self._processor.pad_id()
    self.pad_id: int = pad if pad >= 0 else self.eos_id
    self._space_ids = [self._processor.piece_to_id(p) for p in SPACE_BYTES]
    if self.decode(self.encode(_PROBE)) != _PROBE:
      raise ValueError(
          "sentencepiece model: changes text; train it with identity"
          " normalisation and byte fallback (train_sentencepiece does)"
      )

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer.encode`."""
    return encode_around_spaces(
        self._prefix + text if text else "",
        self._processor.encode,
        self._space_ids,
    )

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._decode(
        ids, lambda run: self._processor.decode(run).removeprefix(self._prefix)
    )

  def token_text(self, token: int) -> str:
    """See `Tokenizer.token_text`."""
    text = self._decode([token], self._processor.decode)
    piece = self._processor.id_to_piece(token)
    return piece if REPLACEMENT in text else text

  def files(self) -> dict[str, bytes]:
    """See `Tokenizer.files`."""
    return {SENTENCEPIECE_FILE: self._model}

  def _decode(
      self, ids: Iterable[int], decode: Callable[[list[int]], str]
  ) -> str:
    """Decodes, given what decodes ordinary ids."""
    return decode_runs(ids, self._special_names, self.vocab_size, decode)


def train_sentencepiece(
    lines: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]
) -> bytes:
  """Learns a unigram sentencepiece model that keeps text exactly.

  Identity normalisation, no dummy prefix, digits apart, 256 byte tokens for
  what has no piece. One thread, so the same lines give the same bytes.
  Ids: `<pad>` 0, `<unk>` 1, `<eos>` 2, then `special_tokens` in order.

  Args:
    lines: the text to learn from.
    vocab_size: number of ids, special and byte tokens included.
    special_tokens: names of control symbols, at least two characters each.

  Returns:
    The serialised model, for `SentencePieceTokenizer`.

  Raises:
    ValueError: where a name is repeated, reserved or shorter than two
      characters, or the lines do not allow a vocabulary of this size.
  """
  reserved = {_PAD, _UNK, _EOS, *(f"<0x{byte:02X}>" for byte in range(256))}
  wrong = [
      name
      for i, name in enumerate(special_tokens)
      if name in reserved or name in special_tokens[:i] or len(name) < 2
  ]
  if wrong:
    raise ValueError(
        f"special_tokens: {wrong} repeated, reserved or shorter than two"
        " characters"
    )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(without_surrogates, lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=_MAX_LINE_BYTES,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        pad_piece=_PAD,
        unk_piece=_UNK,
        eos_piece=_EOS,
        control_symbols=list(special_tokens),
        num_threads=1,
        minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    raise ValueError(
        f"vocab_size {vocab_size}: sentencepiece cannot learn it from these"
        f" lines: {error}"
    ) from error
  return model.getvalue()


def encode_with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
  """Encodes a trusted template, special tokens parsed.

  Only for text that this program wrote itself: a chat template, a test. Text
  from a task, a tool, a page or a model goes through `Tokenizer.encode`.

  Args:
    tokenizer: any tokenizer.
    text: a template with names of special tokens in it, e.g. `<|im_start|>`.

  Returns:
    Token ids; every name of a special token, the longest first, is one id.
  """
  names = sorted(tokenizer.special_ids, key=len, reverse=True)
  if not names:
    return tokenizer.encode(text)
  ids: list[int] = []
  for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
    if part in tokenizer.special_ids:
      ids.append(tokenizer.special_ids[part])
    else:
      ids += tokenizer.encode(part)
  return ids


def is_plain(name: str) -> bool:
  """Whether an added token is ordinary text, not structure.

  Args:
    name: of a token that its vocabulary does not call special, or of a
      user-defined symbol.

  Returns:
    True for white space and the HTML elements that Gemma has pieces for;
    False for everything else (`<tool_call>`, `<unused7>`, …), known or not.
  """
  is_space = name.replace(SPACE, " ").isspace()
  return is_space or _HTML.fullmatch(name) is not None


def encode_around_spaces(
    text: str, encode: Callable[[str], list[int]], space_ids: Sequence[int]
) -> list[int]:
  """Encodes text with a vocabulary that spells spaces as U+2581.

  Args:
    text: any string, which may hold U+2581 itself.
    encode: text without U+2581 to ids.
    space_ids: byte tokens of U+2581.

  Returns:
    Ids that decode to the text.
  """
  first, *rest = without_surrogates(text).split(SPACE)
  ids = list(encode(first))
  for part in rest:
    ids += space_ids
    ids += encode(part)
  return ids


def without_surrogates(text: str) -> str:
  """Replaces unpaired surrogates, which no UTF-8 text can hold.

  Args:
    text: any string.

  Returns:
    The string with surrogate pairs joined and lone ones as U+FFFD.
  """
  if text.isascii():
    return text
  utf16 = text.encode("utf-16-le", "surrogatepass")
  return utf16.decode("utf-16-le", "replace")


def decode_runs(
    ids: Iterable[int],
    special_names: Mapping[int, str],
    vocab_size: int,
    decode: Callable[[list[int]], str],
) -> str:
  """Decodes runs of ordinary ids, with the names of special ids between.

  Args:
    ids: token ids.
    special_names: id to name of every special token.
    vocab_size: ids are below it.
    decode: turns ordinary ids into text.

  Returns:
    The text.

  Raises:
    ValueError: where an id is not in the vocabulary.
  """
  parts: list[str] = []
  run: list[int] = []
  for token in map(int, ids):
    if not 0 <= token < vocab_size:
      raise ValueError(f"token id {token}: must be in [0, {vocab_size})")
    if token in special_names:
      parts += [decode(run), special_names[token]]
      run = []
    else:
      run.append(token)
  parts.append(decode(run))
  return "".join(parts)


def _ordinary(model: bytes) -> tuple[bytes, str]:
  """Leaves a model nothing but the text that it is given.

  Args:
    model: serialised.

  Returns:
    The model, its user-defined symbols that are no plain text as control
    symbols and without the prefix of texts; the prefix.
  """
  fields = _MODEL.ModelProto()
  try:
    fields.ParseFromString(model)
  except protobuf.DecodeError as error:
    raise ValueError(f"sentencepiece model: cannot be read: {error}") from error
  for piece in fields.pieces:
    if piece.type == piece.USER_DEFINED and not is_plain(piece.piece):
      piece.type = piece.CONTROL
  prefix = " " if fields.normalizer_spec.add_dummy_prefix else ""
  fields.normalizer_spec.add_dummy_prefix = False
  return fields.SerializeToString(), prefix


def _read_sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
  """Parses a model; the library's error becomes a ValueError."""
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except RuntimeError as error:
    raise ValueError(f"sentencepiece model: cannot be read: {error}") from error
  return processor
