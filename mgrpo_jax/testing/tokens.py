"""A tokenizer of bytes, for tests that need no trained model."""

import types
from collections.abc import Iterable, Mapping, Sequence

NUM_BYTES = 256


class ByteTokenizer:
  """One token a byte of UTF-8, then the control tokens."""

  def __init__(self, special_tokens: Sequence[str]):
    """Numbers the control tokens from 256 on.

    Args:
      special_tokens: their names.
    """
    names = ("<pad>", "<eos>", *special_tokens)
    self.special_ids: Mapping[str, int] = types.MappingProxyType(
        {name: NUM_BYTES + i for i, name in enumerate(dict.fromkeys(names))}
    )
    self._names = {i: name for name, i in self.special_ids.items()}
    self.vocab_size = NUM_BYTES + len(self.special_ids)
    self.bos_id: int | None = None
    self.pad_id = self.special_ids["<pad>"]
    self.eos_id = self.special_ids["<eos>"]

  def encode(self, text: str) -> list[int]:
    """The bytes of a text; unpaired surrogates count as `?`."""
    return list(text.encode("utf-8", "replace"))

  def decode(self, ids: Iterable[int]) -> str:
    """The text, control tokens by name, broken UTF-8 as U+FFFD."""
    pieces = []
    for token in ids:
      if not 0 <= token < self.vocab_size:
        raise ValueError(f"token {token} is not in the vocabulary")
      name = self._names.get(token)
      pieces.append(name.encode() if name else bytes([token]))
    return b"".join(pieces).decode("utf-8", "replace")

  def token_text(self, token: int) -> str:
    """One token for a reader."""
    return self.decode([token])

  def files(self) -> dict[str, bytes]:
    """Nothing: it is made from its control tokens alone."""
    return {}
