"""Tokenizers put into GGUF files as llama.cpp's converter puts them."""

import gguf
import sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = gguf.TokenType


def looks_special(name):
  return (
      name in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
      or (name.startswith("<|") and name.endswith("|>"))
      or (name.startswith("<unused") and name.endswith(">"))
  )


def kind_of_added(name, special):
  return CONTROL if special or looks_special(name) else USER_DEFINED


def byte_level(definition, *, vocab_size):
  """Tokens, types and merges of a tokenizer.json, padded to a size."""
  model = definition["model"]
  names = {i: token for token, i in model["vocab"].items()}
  types = dict.fromkeys(names, NORMAL)
  for token in definition["added_tokens"]:
    names[token["id"]] = token["content"]
    types[token["id"]] = kind_of_added(token["content"], token["special"])
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  ids = range(vocab_size)
  return (
      [names.get(i, f"[PAD{i}]") for i in ids],
      [types.get(i, UNUSED) for i in ids],
      merges,
  )


def pieces(model, *, vocab_size, added):
  """Tokens, scores and types of a tokenizer.model, padded to a size.

  Args:
    model: serialised.
    vocab_size: at least its own.
    added: id to name and whether it is special: `added_tokens_decoder` of
      tokenizer_config.json.
  """
  library = sentencepiece.SentencePieceProcessor(model_proto=model)
  tokens = [f"[PAD{i}]" for i in range(vocab_size)]
  scores, types = [-10000.0] * vocab_size, [UNUSED] * vocab_size
  for i in range(library.vocab_size()):
    kinds = {
        UNKNOWN: library.is_unknown(i),
        CONTROL: library.is_control(i),
        UNUSED: library.is_unused(i),
        BYTE: library.is_byte(i),
    }
    tokens[i], scores[i] = library.id_to_piece(i), library.get_score(i)
    types[i] = next((kind for kind, it_is in kinds.items() if it_is), NORMAL)
  for i, (name, special) in added.items():
    tokens[i] = name.replace("\u2581", " ")
    scores[i], types[i] = -1000.0, kind_of_added(name, special)
  return tokens, scores, types


def add(writer, *, model, tokens, types, scores=None, merges=None, **rest):
  """Writes a vocabulary.

  Args:
    writer: of a GGUF file.
    model: `gpt2` or `llama`.
    tokens: one an id.
    types: one an id.
    scores: one an id, or None.
    merges: of byte-level BPE, or None.
    **rest: `pre`, `bos`, `eos`, `pad`, `unk` (ids), `add_bos`, `add_space`;
      None is not written.
  """
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types([int(kind) for kind in types])
  adders = {
      "pre": writer.add_tokenizer_pre,
      "bos": writer.add_bos_token_id,
      "eos": writer.add_eos_token_id,
      "pad": writer.add_pad_token_id,
      "unk": writer.add_unk_token_id,
      "add_bos": writer.add_add_bos_token,
      "add_space": writer.add_add_space_prefix,
  }
  for name, value in rest.items():
    if value is not None:
      adders[name](value)
  if scores is not None:
    writer.add_token_scores(scores)
  if merges is not None:
    writer.add_token_merges(merges)


def metadata(path, **vocabulary):
  """Writes a vocabulary into a file of its own; reads the metadata back."""
  writer = gguf.GGUFWriter(path, "llama")
  add(writer, **vocabulary)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  fields = gguf.GGUFReader(path).fields
  return {name: field.contents() for name, field in fields.items()}
