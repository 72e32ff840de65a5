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
from mgrpo_jax.policy.sampling import MAX_STOP_IDS, Sampling
from mgrpo_jax.policy.tokenizer import Tokenizer
from mgrpo_jax.sampler.interface import Generate
from mgrpo_jax.sampler.spelling import Decode
from mgrpo_jax.serving import prompt as prompting
from mgrpo_jax.serving.conversation import ToolCall
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.serving.models import Job, Model, Piece, Pieces, any_seed
from mgrpo_jax.serving.request import ChatRequest
from mgrpo_jax.serving.sessions import Sessions
from mgrpo_jax.serving.text import Spelling
from mgrpo_jax.serving.token_request import TokenRequest
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
    _check_room(speaker, ids, "messages")
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

  return Model(
      name=speaker.name,
      prepare=prepare,
      continue_tokens=lambda asked: token_job(speaker, asked),
      context=speaker.context,
  )


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


def token_job(speaker: Speaker, asked: TokenRequest) -> Job:
  """Continues token ids, with nothing of the chat format.

  Args:
    speaker: the policy.
    asked: what is asked for.

  Returns:
    The job.

  Raises:
    RequestError: the ids leave no room, or too many of them end it.
  """
  _check_room(speaker, asked.prompt, "prompt")
  ends = () if asked.ignore_eos else speaker.chat.stop_ids
  stop_ids = tuple(dict.fromkeys((*asked.stop_ids, *ends)))
  if len(stop_ids) > MAX_STOP_IDS:
    raise RequestError(
        400,
        f"stop_token_ids: with the model's own are {len(stop_ids)}, allowed: at"
        f" most {MAX_STOP_IDS}",
        param="stop_token_ids",
    )

  async def pieces(client: str) -> Pieces:
    yield Piece(index=0, prompt_tokens=len(asked.prompt))
    warmth = asked.temperature
    room = speaker.context - len(asked.prompt)
    sampling = Sampling(
        temperature=speaker.temperature if warmth is None else warmth,
        max_new_tokens=min(asked.max_tokens, room),
        stop_ids=stop_ids,
    )
    try:
      generate = _alone(speaker, client)
      completion = await generate(asked.prompt, sampling, any_seed(asked.seed))
    except ValueError as error:  # an id that the policy does not have
      raise RequestError(400, f"prompt: {error}", param="prompt") from error
    tokens = completion.tokens.tolist()
    spelled = tokens[:-1] if completion.finish == "stop" else tokens
    yield Piece(
        index=0,
        text=readable(speaker.tokenizer)(spelled),
        tokens=tuple(tokens),
        logprobs=tuple(completion.logprobs.tolist()),
        finish=_finish(completion),
        sampled_tokens=len(tokens),
        extra={
            "policy_versions": [completion.version_min, completion.version_max]
        },
    )

  return Job(
      prompt=asked.prompt,
      token_text=lambda token: _shown(speaker.tokenizer, token),
      pieces=pieces,
  )


def _check_room(speaker: Speaker, ids: Sequence[int], field: str) -> None:
  """Raises where a prompt leaves no room for a token."""
  if len(ids) >= speaker.context:
    raise RequestError(
        400,
        f"{field}: are {len(ids)} tokens, allowed: at most"
        f" {speaker.context - 1}, for the context of model {speaker.name!r}"
        f" has {speaker.context}",
        param=field,
        code="context_length_exceeded",
    )


def _sampler(speaker: Speaker, request: ChatRequest, client: str) -> Generate:
  """How a client's request is sampled; of several choices none goes on."""
  if speaker.sessions is None or request.n > 1:
    return _alone(speaker, client)
  return functools.partial(speaker.sessions.go_on, client)


def _alone(speaker: Speaker, client: str) -> Generate:
  """How a stream is sampled that no other turn of a client's goes on from."""
  if speaker.sessions is None:
    return speaker.generate
  return functools.partial(speaker.sessions.begin, client)


async def _pieces(
    speaker: Speaker, request: ChatRequest, prompt: Sequence[int]
) -> Pieces:
  """What all choices say, as it comes."""
  queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
  seed = any_seed(request.seed)

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
  texts: list[str] = []  # not yet told
  spelling = Spelling(
      readable(speaker.tokenizer),
      stop_ids=speaker.chat.stop_ids,
      stops=request.stop,
      marks=prompting.CALLS[speaker.protocol.name].marks
      if request.functions
      else (),
  )

  def ends(token: int) -> bool:
    texts.append(spelling.push(token))
    return spelling.cut

  def hear(tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    sampled.extend(tokens)
    tell(
        Piece(
            index=index,
            text="".join(texts),
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
            sampled_tokens=len(tokens),
        )
    )
    texts.clear()

  room = speaker.context - len(prompt)
  warmth = request.temperature
  sampling = Sampling(
      temperature=speaker.temperature if warmth is None else warmth,
      max_new_tokens=min(request.max_tokens or room, room),
      stop_ids=speaker.chat.stop_ids,
      top_k=request.top_k,
      top_p=request.top_p,
      min_p=request.min_p,
  )
  completion = await speaker.generate(
      prompt, sampling, seed, until=ends, on_tokens=hear
  )
  finish = _finish(completion)
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
