"""What a visit brought, told to the callers; runs in the event loop.

The device may be some visits ahead. Only where a caller names the last token
does that matter: what was drawn beyond it is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from mgrpo_jax.sampler import stream
from mgrpo_jax.sampler.schedule import News, Schedule
from mgrpo_jax.sampler.slots import Request
from mgrpo_jax.types import Completion


def deliver(
    news: Sequence[News],
    schedule: Schedule,
    guard: contextlib.AbstractContextManager[object],
    *,
    context: int,
) -> None:
  """Tells callers what was drawn, and answers the requests that are done.

  Args:
    news: of one visit, after those of the visits before it.
    schedule: that reported the visit.
    guard: held by whoever uses the schedule.
    context: tokens that a stream can have.

  Raises:
    KeyboardInterrupt: a caller's function did, and all others were told; so for
      SystemExit.
  """
  ends: list[BaseException] = []
  for one in news:
    request = one.request
    if request.future.done():
      continue
    with _failing_alone(request, ends):
      kept, named = _heard(one)
      if request.future.done() or not (named or one.last):
        continue  # the caller left on hearing it, or there is more to come
      if request.until is not None:
        with guard:
          schedule.end(one, kept)
      stopped = named or one.stopped
      request.future.set_result(completion(request, stopped, context))
  if ends:
    raise ends[0]


def completion(request: Request, stopped: bool, context: int) -> Completion:
  """Says what a finished request yielded, and why it ended.

  Args:
    request: with what was sampled, and under which versions.
    stopped: whether its last token says that it is the last.
    context: tokens that a stream can have.

  Returns:
    The completion.
  """
  length = len(request.tokens) + len(request.sampled)
  return Completion(
      tokens=np.asarray(request.sampled, np.int32),
      logprobs=np.asarray(request.logprobs, np.float32),
      raw_logprobs=np.asarray(request.raw_logprobs, np.float32),
      finish=stream.finish(length, stopped=stopped, context=context),
      version_min=request.versions[0],
      version_max=request.versions[-1],
  )


def _heard(news: News) -> tuple[int, bool]:
  """Asks and tells the caller.

  Returns:
    How many tokens the request keeps, and whether the caller named the last.
  """
  request, first = news.request, news.end - news.count
  kept, named = news.end, False
  if request.until is not None:
    for number in range(first, news.end):
      if request.until(request.sampled[number]):
        kept, named = number + 1, True
        break
  if request.on_tokens is not None and not request.future.done():
    request.on_tokens(request.sampled[first:kept], request.logprobs[first:kept])
  return kept, named


@contextlib.contextmanager
def _failing_alone(
    request: Request, ends: list[BaseException]
) -> Iterator[None]:
  """Fails a request with what its caller's function raises; others go on.

  Args:
    request: whose function it is.
    ends: to which is added what is to end the program.
  """
  try:
    yield
  except BaseException as raised:
    error: BaseException = raised
    if not isinstance(raised, Exception) or isinstance(raised, StopIteration):
      # No future takes it, or no task survives it.
      error = RuntimeError(f"a caller's function raised {raised!r}")
      error.__cause__ = raised
    if not request.future.done():
      request.future.set_exception(error)
    if isinstance(raised, KeyboardInterrupt | SystemExit):
      ends.append(raised)
