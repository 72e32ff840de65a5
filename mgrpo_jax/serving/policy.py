"""A policy as a model: what it writes next in a conversation."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import uuid
from collections.abc import Callable, Sequence

from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.protocol import Action, Protocol
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.policy.tokenizer import Tokenizer
from mgrpo_jax.serving import prompt as prompting
from mgrpo_jax.serving.conversation import ToolCall
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.serving.models import Job, Model, Piece, Pieces, any_seed
from mgrpo_jax.serving.request import ChatRequest
from mgrpo_jax.serving.sessions import Generate, Sessions
from mgrpo_jax.serving.text import Decode, Spelling
from mgrpo_jax.types import Completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
  """A policy that can be sampled.

  Attributes:
    name: of the model.
    generate: `Engine.generate`.
    context: tokens that a stream can have.
    chat: messages to tokens.
    protocol: calls and results.
    tokenizer: tokens to text.
    temperature: where a request has none.
    sessions: of its conversations; None where none goes on from another.
  """

  name: str
  generate: Generate
  context: int
  chat: Chat
  protocol: Protocol
  tokenizer: Tokenizer
  temperature: float
  sessions: Sessions | None = None


def policy(speaker: Speaker) -> Model:
  """Serves a policy: what it writes next in a conversation.

  The text of a choice is the turn as the policy wrote it, control tokens by
  name and the stop token left out. Choice 0 has the request's seed.

  Args:
    speaker: the policy.

  Returns:
    The model.
  """

  def prepare(request: ChatRequest) -> Job:
    if request.return_calls:
      raise wrong("return_calls", True, "false; a policy makes no calls itself")
    ids = prompting.encode(
        request, chat=speaker.chat, protocol=speaker.protocol
    )
    if len(ids) >= speaker.context:
      raise RequestError(
          400,
          f"messages: are {len(ids)} tokens, allowed: at most"
          f" {speaker.context - 1}, for the context of model {speaker.name!r}"
          f" has {speaker.context}",
          param="messages",
          code="context_length_exceeded",
      )
    return Job(
        prompt=tuple(ids),
        token_text=lambda token: _shown(speaker.tokenizer, token),
        pieces=lambda client: _pieces(
            dataclasses.replace(
                speaker, generate=_sampler(speaker, request, client)
            ),
            request,
            ids,
        ),
    )

  return Model(name=speaker.name, prepare=prepare)


def readable(tokenizer: Tokenizer) -> Decode:
  """Makes a function that decodes any ids that a model may sample.

  Args:
    tokenizer: may know fewer than the model has rows of logits.

  Returns:
    Ids to text; unknown ones by number.
  """

  def known(token: int) -> bool:
    return 0 <= token < tokenizer.vocab_size

  def decode(ids: Sequence[int]) -> str:
    texts = []
    for is_known, run in itertools.groupby(ids, known):
      if is_known:
        texts.append(tokenizer.decode(run))
      else:
        texts += [f"<token {token}>" for token in run]
    return "".join(texts)

  return decode


def _shown(tokenizer: Tokenizer, token: int) -> str:
  """One token for a reader, parts of characters by their names."""
  if 0 <= token < tokenizer.vocab_size:
    return tokenizer.token_text(token)
  return readable(tokenizer)([token])


def _sampler(speaker: Speaker, request: ChatRequest, client: str) -> Generate:
  """How a client's request is sampled; of several choices none goes on."""
  sessions = speaker.sessions
  if sessions is None:
    return speaker.generate
  sample = sessions.go_on if request.n == 1 else sessions.begin
  return functools.partial(sample, client)


async def _pieces(
    speaker: Speaker, request: ChatRequest, prompt: Sequence[int]
) -> Pieces:
  """What all choices say, as it comes."""
  queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
  seed = any_seed(request)

  async def choose(index: int) -> None:
    own = turn_seed(seed, index) if index else seed
    try:
      queue.put_nowait(
          await _choose(speaker, request, prompt, index, own, queue.put_nowait)
      )
    except Exception as error:  # raised where the pieces are read
      queue.put_nowait(error)

  tasks = [asyncio.create_task(choose(index)) for index in range(request.n)]
  try:
    yield Piece(index=0, prompt_tokens=len(prompt))
    running = request.n
    while running:
      item = await queue.get()
      if isinstance(item, Exception):
        raise item
      running -= item.finish is not None
      yield item
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _choose(
    speaker: Speaker,
    request: ChatRequest,
    prompt: Sequence[int],
    index: int,
    seed: int,
    tell: Callable[[Piece], None],
) -> Piece:
  """Samples one choice; returns its last piece."""
  sampled: list[int] = []
  spelling = Spelling(
      readable(speaker.tokenizer),
      stop_ids=speaker.chat.stop_ids,
      stops=request.stop,
      marks=prompting.CALLS[speaker.protocol.name].marks
      if request.functions
      else (),
  )

  def hear(tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    text, kept = "", 0
    while kept < len(tokens) and not spelling.cut:
      text += spelling.push(tokens[kept])
      kept += 1
    sampled.extend(tokens[:kept])
    tell(
        Piece(
            index=index,
            text=text,
            tokens=tuple(tokens[:kept]),
            logprobs=tuple(logprobs[:kept]),
            sampled_tokens=kept,
        )
    )
    if spelling.cut:
      generation.cancel()

  room = speaker.context - len(prompt)
  warmth = request.temperature
  sampling = Sampling(
      temperature=speaker.temperature if warmth is None else warmth,
      max_new_tokens=min(request.max_tokens or room, room),
      stop_ids=speaker.chat.stop_ids,
  )
  generation = asyncio.create_task(
      speaker.generate(prompt, sampling, seed, on_tokens=hear)
  )
  try:
    await asyncio.wait({generation})
  finally:
    generation.cancel()
  if generation.cancelled() and not spelling.cut:
    raise RuntimeError("the sampler gave the request up")
  finish = "stop" if spelling.cut else _finish(generation.result())
  return _last(speaker, request, index, spelling, sampled, finish)


def _finish(completion: Completion) -> str:
  """Why a completion ended, in OpenAI's words."""
  return "stop" if completion.finish == "stop" else "length"


def _last(
    speaker: Speaker,
    request: ChatRequest,
    index: int,
    spelling: Spelling,
    sampled: Sequence[int],
    finish: str,
) -> Piece:
  """What is left to say of a choice, and the call that it makes, if any."""
  text, held = spelling.flush()
  if spelling.cut:  # maybe only by its last characters
    return Piece(index=index, text=text + held, finish="stop")
  functions = prompting.checkable(request.functions)
  if functions:
    utterance = speaker.chat.read(sampled)
    action = speaker.protocol.parse(utterance, functions)
    if isinstance(action, Action) and action.kind == "tool":
      call = ToolCall(
          id=f"call_{uuid.uuid4().hex[:24]}",
          name=action.name,
          arguments=action.arguments,
      )
      return Piece(index=index, text=text, calls=(call,), finish="tool_calls")
  return Piece(index=index, text=text + held, finish=finish)
