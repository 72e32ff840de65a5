"""The route by which other jobs call this one: POST /v1/calls."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from starlette.types import ASGIApp

from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.desk import Desk
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.sampler.connection import JOB_HEADER
from mgrpo_jax.serving import internal


def build(desk: Desk, token: str) -> ASGIApp:
  """Builds the web application.

  Args:
    desk: answers the calls.
    token: that callers must show; empty for none.

  Returns:
    The ASGI application.
  """

  async def call(body: bytes) -> bytes:
    return wire.dump(await desk.answer(wire.read_call(body)))

  return internal.build({"/v1/calls": call}, token)


def serving(
    desk: Desk,
    policy: str,
    where: socket.socket,
    token: str,
    *,
    broken: Callable[[BaseException], None],
) -> contextlib.AbstractAsyncContextManager[None]:
  """Answers calls while it is entered.

  Args:
    desk: answers them.
    policy: whose job this is, which every answer says.
    where: socket, listening.
    token: that callers must show; empty for none.
    broken: is told, once, that no calls are answered any more and why.

  Returns:
    A context manager.
  """
  return internal.serving(
      build(desk, token),
      where,
      failed=desk.failed,
      ended=lambda why: ServerError(f"this job's {why}"),
      broken=broken,
      headers={JOB_HEADER: policy},
  )
