r"""Serves a scripted policy that looks capitals up, for `bench.framework`.

    python -m experiments.bench.capitals [--port=8000]

It calls the tool `capital`, which the client must offer, for the country that
it was last asked of, and says what came back, in the hermes protocol and
ChatML. So whatever goes wrong between a client and this server is the
interface's, not a model's. Ends at SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Sequence

import numpy as np

from experiments import cli
from mgrpo_jax.agents.chats.chatml import chatml
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.interface import OnTokens, Until
from mgrpo_jax.serving import listen
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.limits import Limits
from mgrpo_jax.serving.policy import Speaker, policy
from mgrpo_jax.serving.service import Service
from mgrpo_jax.testing.tokens import ByteTokenizer
from mgrpo_jax.types import Completion

NAME = "main"
_CONTEXT = 8192  # bytes, which are its tokens
_TOKENIZER = ByteTokenizer(("<|im_start|>", "<|im_end|>"))
_CHAT = chatml(_TOKENIZER, default_system="")
_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_ASKED = re.compile(r"(?:capital|that) of ([A-Z]\w*(?: [A-Z]\w*)*)")
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_LIMITS = Limits(
    max_body_bytes=1_000_000,
    max_concurrent=16,
    max_choices=1,
    requests_per_minute=100_000,
    deadline=60.0,
    read_deadline=60.0,
    write_deadline=60.0,
)


def said(conversation: str) -> str:
  """What the policy says next.

  Args:
    conversation: ChatML; the last question of its user asks for the capital of
      a country.

  Returns:
    A call of the tool, or what the tool told.

  Raises:
    RequestError: there is no such question.
  """
  turns = [t for t in _TURN.finditer(conversation) if not _RESULT.search(t[1])]
  asked = _ASKED.findall(turns[-1][1]) if turns else []
  if not asked:
    raise RequestError(400, "messages: the last question asks for no capital")
  results = _RESULT.findall(conversation, turns[-1].end())
  if results:
    return f"It is {results[-1]}."
  call = {"name": "capital", "arguments": {"country": asked[-1]}}
  return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


async def generate(
    tokens: Sequence[int],
    sampling: Sampling,
    seed: int,
    *,
    session: str | None = None,
    until: Until | None = None,
    tenant: str = "",
    on_tokens: OnTokens | None = None,
) -> Completion:
  """Says it; arguments and result are those of `Engine.generate`.

  Raises:
    RequestError: see `said`.
  """
  del seed, session, tenant
  written = _CHAT.write(said(_TOKENIZER.decode(tokens)))
  drawn: list[int] = []
  ended = False
  for token in written[: sampling.max_new_tokens]:
    drawn.append(token)
    named = until is not None and until(token)
    if ended := named or token in sampling.stop_ids:
      break
  if on_tokens is not None:
    on_tokens(drawn, [0.0] * len(drawn))
  certain = np.zeros(len(drawn), np.float32)
  return Completion(
      tokens=np.asarray(drawn, np.int32),
      logprobs=certain,
      raw_logprobs=certain,
      finish="stop" if ended else "length",
      version_min=0,
      version_max=0,
  )


async def serve(port: int) -> None:
  """Serves until a signal comes.

  Args:
    port: of the loopback address; 0 for any.

  Raises:
    OSError: the port cannot be had.
    ValueError: there is no such port.
  """
  speaker = Speaker(
      name=NAME,
      generate=generate,
      context=_CONTEXT,
      chat=_CHAT,
      protocol=HERMES,
      tokenizer=_TOKENIZER,
      temperature=1.0,
  )
  service = Service(
      {NAME: policy(speaker)}, stats=dict, limits=_LIMITS, token=""
  )
  with listen.bind("127.0.0.1", port) as where:
    cli.tell(f"serving {NAME} on port {where.getsockname()[1]}")
    await listen.listen(
        service, where, stopping=asyncio.Event(), drain=5, max_connections=50
    )


def main() -> None:
  """Serves; see the module."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--port", type=int, default=8000)
  arguments = parser.parse_args()
  with cli.user_errors(OSError, ValueError):
    asyncio.run(serve(arguments.port))


if __name__ == "__main__":
  main()
