"""Errors as responses of HTTP."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mgrpo_jax.serving import response
from mgrpo_jax.serving.errors import RequestError


def told(error: RequestError) -> Response:
  """Makes a response of an error.

  Args:
    error: what a client is told.

  Returns:
    The response, JSON.
  """
  return Response(
      response.dump(error.body()),
      status_code=error.status,
      headers=error.headers,
      media_type="application/json",
  )


async def refuse(request: Request, error: Exception) -> Response:
  """Tells a client what is wrong, as Starlette's handler of `RequestError`.

  It is no plain function, which would run in a thread, left behind where the
  request is cut short.

  Args:
    request: what is refused.
    error: why.

  Returns:
    The response.

  Raises:
    TypeError: it is another error.
  """
  del request
  if not isinstance(error, RequestError):
    raise TypeError(f"no RequestError: {error!r}")
  return told(error)
