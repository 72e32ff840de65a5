"""Small tokenizers built as those of Llama 2, Llama 3, Qwen and Gemma are."""

import functools
import io
import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mgrpo_jax.policy.bpe import BPETokenizer
from mgrpo_jax.policy.tokenizer import SentencePieceTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chats.json"
# The expressions of the models' tokenizer.json: digits by one and by three.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
LLAMA_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
GEMMA_CONTROL = (
    *("<mask>", "[multimodal]", "<unused0>", "<unused1>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
)
GEMMA_PLAIN = (
    *("\n", "\n\n", "\n\n\n", "\t", "\t\t"),
    *("\u2581\u2581", "\u2581\u2581\u2581", "<table>", "</td>", "<b>", "</b>"),
)


@functools.cache
def lines():
  golden = json.loads(GOLDEN.read_text())
  return [
      conversation["text"]
      for family in golden["families"].values()
      for conversation in family["conversations"]
  ]


def _definition(words, special, added, **settings):
  """A byte-level tokenizer.json, trained on the golden conversations."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
          pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
      lines(),
      trainers.BpeTrainer(
          vocab_size=700,
          show_progress=False,
          initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      ),
  )
  tokenizer.add_special_tokens(list(special))
  tokenizer.add_tokens(
      [tokenizers.AddedToken(name, normalized=False) for name in added]
  )
  fields = json.loads(tokenizer.to_str())
  fields["model"] |= settings
  return fields


@functools.cache
def qwen():
  fields = _definition(QWEN_WORDS, QWEN_SPECIAL, QWEN_ADDED)
  fields["normalizer"] = {"type": "NFC"}
  config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
  return BPETokenizer(json.dumps(fields), config | {"bos_token": None})


@functools.cache
def llama():
  fields = _definition(LLAMA_WORDS, LLAMA_SPECIAL, (), ignore_merges=True)
  first = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
  template = {
      "type": "TemplateProcessing",
      "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [],
      "special_tokens": {},
  }
  fields["post_processor"] = {"type": "Sequence", "processors": [template]}
  config = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}
  return BPETokenizer(json.dumps(fields), config)


def _sentencepiece_model(**settings):
  """A tokenizer.model that keeps text, trained on the golden conversations."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter("\n".join(lines()).split("\n")),
      model_writer=model,
      model_type="bpe",
      vocab_size=700,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      num_threads=1,
      minloglevel=2,
      **settings,
  )
  return model.getvalue()


@functools.cache
def llama2_model():
  """A tokenizer.model that begins every text with a space."""
  return _sentencepiece_model(add_dummy_prefix=True)


@functools.cache
def llama2():
  return SentencePieceTokenizer(llama2_model())


@functools.cache
def gemma_model():
  """A tokenizer.model whose control tokens are user-defined symbols."""
  return _sentencepiece_model(
      add_dummy_prefix=False,
      **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
      **{"pad_piece": "<pad>", "eos_piece": "<eos>"},
      **{"bos_piece": "<bos>", "unk_piece": "<unk>"},
      user_defined_symbols=[*GEMMA_CONTROL, *GEMMA_PLAIN],
  )


@functools.cache
def gemma():
  return SentencePieceTokenizer(gemma_model())


@functools.cache
def gemma_json():
  """The same model as transformers would convert it to a tokenizer.json."""
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(gemma_model())
  size = processor.vocab_size()
  vocab = {processor.id_to_piece(i): i for i in range(size)}
  merges = [
      (vocab[piece], piece[:cut], piece[cut:])
      for piece in vocab
      for cut in range(1, len(piece))
      if piece[:cut] in vocab and piece[cut:] in vocab
  ]
  added = ["<pad>", "<eos>", "<bos>", "<unk>", *GEMMA_CONTROL, *GEMMA_PLAIN]
  tokenizer = tokenizers.Tokenizer(
      models.BPE(
          vocab=vocab,
          merges=[(left, right) for _, left, right in sorted(merges)],
          unk_token="<unk>",
          fuse_unk=True,
          byte_fallback=True,
      )
  )
  tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
  tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  tokenizer.decoder = decoders.Sequence(
      [
          decoders.Replace("\u2581", " "),
          decoders.ByteFallback(),
          decoders.Fuse(),
      ]
  )
  tokenizer.add_tokens(
      [tokenizers.AddedToken(name, normalized=False) for name in added[4:]]
  )
  tokenizer.add_special_tokens(added[:4] + ["<start_of_turn>", "<end_of_turn>"])
  config = {
      "eos_token": "<eos>",
      "bos_token": {"content": "<bos>"},
      "pad_token": "<pad>",
      "add_bos_token": True,
  }
  return BPETokenizer(tokenizer.to_str(), config)


ALL = {
    "qwen": qwen,
    "llama": llama,
    "llama2": llama2,
    "gemma": gemma,
    "gemma_json": gemma_json,
}
