"""What a team acts in: chat formats that go with protocols."""

import families
import pytest

from experiments import world
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.compact import compact_tags
from mgrpo_jax.policy.policy import CHATS, SILENT_CHATS, Policy, derive_chat
from mgrpo_jax.testing.team import small_team
from mgrpo_jax.testing.tokens import ByteTokenizer

TEAM = small_team()
TOKENIZERS = {
    "compact": lambda: ByteTokenizer(compact_tags(TEAM)),
    "llama3": families.llama,
    "llama3_1": families.llama,
    "gemma3": families.gemma,
}


def policy(chat, tokenizer=None):
  make = TOKENIZERS.get(chat, families.qwen)
  made = tokenizer or make()
  return Policy(config=None, params=None, tokenizer=made, chat=chat, system="")


@pytest.mark.parametrize("name", [*CHATS, *SILENT_CHATS])
def test_every_chat_format_goes_with_a_protocol(name):
  protocols = [
      protocol
      for protocol in world.PROTOCOLS
      if name in world.CHATS.get(protocol, ("compact",))
  ]
  assert protocols
  for protocol in protocols:
    made = world.chats(TEAM, {"main": policy(name)}, protocol)
    assert isinstance(made["main"], Chat)


def test_llama_calls_tools_in_its_own_way_under_its_own_protocol():
  loaded = {"main": policy("llama3_1")}
  made = {p: world.chats(TEAM, loaded, p)["main"] for p in ("hermes", "llama")}
  told = {
      protocol: families.llama().decode(chat.extend(True, "x"))
      for protocol, chat in made.items()
  }
  assert "<|start_header_id|>user<|end_header_id|>" in told["hermes"]
  assert "<|start_header_id|>ipython<|end_header_id|>" in told["llama"]


@pytest.mark.parametrize(
    ("chat", "protocol"),
    [
        ("compact", "hermes"),
        ("chatml", "compact"),
        ("qwen3", "llama"),
        ("llama3", "llama"),
        (None, "hermes"),
    ],
)
def test_other_pairs_are_refused(chat, protocol):
  with pytest.raises(ValueError, match=f"{protocol!r} does not go with"):
    world.chats(TEAM, {"main": policy(chat)}, protocol)


def test_missing_control_tokens_name_the_policy():
  loaded = {"main": policy("gemma3", families.qwen())}
  with pytest.raises(ValueError, match=r"config.policies.main.source: token"):
    world.chats(TEAM, loaded, "hermes")


@pytest.mark.parametrize(
    ("family", "chat"),
    [
        ("qwen", "qwen3"),
        ("llama", "llama3_1"),
        ("gemma", "gemma3"),
        ("gemma_json", "gemma3"),
    ],
)
def test_families_are_known_by_their_control_tokens(family, chat):
  assert derive_chat(families.ALL[family]()) == chat
