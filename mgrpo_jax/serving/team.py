"""A team as a model: the root's answer to the user's last message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax import rollout
from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.policy.tokenizer import Tokenizer
from mgrpo_jax.sampler.spelling import Cutter
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.serving.models import Job, Model, Piece, Pieces, any_seed
from mgrpo_jax.serving.request import ChatRequest
from mgrpo_jax.types import RolloutGroup, Status, Task, Trajectory

_TASK = "served"  # equal seeds and questions give equal answers


def team(
    name: str,
    *,
    environment: Environment,
    tokenizer: Tokenizer,
    actors: Callable[[str], Mapping[str, Actor]] | None = None,
) -> Model:
  """Serves a team: every choice is a rollout of its own.

  The last message of the user is the question; those before it are not read,
  as in training. Roles keep their own budgets: `max_tokens` and `stop` cut the
  answer, nothing before it.

  Args:
    name: of the model.
    environment: team, actors, tools and limits.
    tokenizer: that answers are measured with.
    actors: gives those that work for a client; None: the environment's do.

  Returns:
    The model.
  """

  def prepare(request: ChatRequest) -> Job:
    refused = {
        "tools": [one.name for one in request.functions],
        "top_k": request.top_k,
        "top_p": request.top_p if request.top_p < 1 else None,
        "min_p": request.min_p,
        "logprobs": request.logprobs,
        "return_token_ids": request.return_token_ids,
    }
    for field, value in refused.items():
      if value:
        raise wrong(
            field, value, "none for a team; its policies are models, too"
        )
    question = request.messages[-1]
    if question.role != "user" or not question.content.strip():
      raise wrong(
          f"messages[{len(request.messages) - 1}]",
          f"{question.role}: {question.content}",
          "the question, a message of the user, as the last",
      )
    return Job(
        prompt=(),
        token_text=tokenizer.token_text,
        pieces=lambda client: _pieces(
            environment
            if actors is None
            else dataclasses.replace(environment, actors=actors(client)),
            tokenizer,
            request,
        ),
    )

  return Model(name=name, prepare=prepare, continue_tokens=None, context=None)


async def _pieces(
    environment: Environment, tokenizer: Tokenizer, request: ChatRequest
) -> Pieces:
  """Every answer as one piece; nothing is shown of how it came about."""
  if request.temperature is not None:
    environment = dataclasses.replace(
        environment, temperature=request.temperature
    )
  task = Task(
      id=_TASK,
      question=request.messages[-1].content,
      answers=(),
      stage="",
      hops=0,
      evidence=(),
      meta={},
  )
  with rollout.telling_late_turns(environment):
    group = await rollout.run_group(
        task,
        environment=environment,
        num_rollouts=request.n,
        seed=any_seed(request.seed),
    )
  for index in range(request.n):
    yield _answer(request, tokenizer, group, index)


def _answer(
    request: ChatRequest,
    tokenizer: Tokenizer,
    group: RolloutGroup,
    index: int,
) -> Piece:
  """What one rollout came to."""
  calls = [one for one in group.trajectories if one.rollout == index]
  root = calls[0]
  if root.status == Status.FAILED:
    raise RequestError(503, "a machine failed on the team; try again")
  text, finish = root.result_text, "stop"
  if root.status != Status.COMPLETED:
    finish = "length"  # a budget ran out
  cutter = Cutter(request.stop)
  text = cutter.push(text) + cutter.flush()
  ids = tokenizer.encode(text)
  if request.max_tokens is not None and len(ids) > request.max_tokens:
    text, finish = tokenizer.decode(ids[: request.max_tokens]), "length"
  sampled = sum(int(one.loss_mask.sum()) for one in calls)
  extra: dict[str, Any] = {"status": root.status.name}
  if request.return_calls:
    extra["calls"] = [_record(one) for one in calls]
  return Piece(
      index=index,
      text=text,
      finish=finish,
      prompt_tokens=sum(len(one.tokens) for one in calls) - sampled,
      sampled_tokens=sampled,
      extra=extra,
  )


def _record(call: Trajectory) -> dict[str, Any]:
  """An agent call as JSON; `parent` is a position in the list of calls."""
  return {
      "role": call.role,
      "call": call.call,
      "parent": call.parent,
      "request": call.request,
      "status": call.status.name,
      "result": call.result_text,
      "seconds": call.seconds,
      "versions": [call.version_min, call.version_max],
      "turns": [dataclasses.asdict(turn) for turn in call.turns],
  }
