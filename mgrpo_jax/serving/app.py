"""The routes: models, chat completions, health and metrics."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mgrpo_jax.serving import metrics, response
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.service import Chat, Service


def build(service: Service) -> Starlette:
  """Builds the web application.

  Args:
    service: what its requests share.

  Returns:
    The ASGI application.
  """

  async def health(request: Request) -> Response:
    del request
    if service.failure:
      raise RequestError(503, f"the sampler stopped: {service.failure}")
    return _json({"status": "ok"})

  async def ready(request: Request) -> Response:
    service.gate.check_open()
    return await health(request)

  async def measure(request: Request) -> Response:
    service.check_client(request)
    text = service.metrics_text()
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})

  async def models(request: Request) -> Response:
    service.admit(request)
    return _json(response.models(list(service.models), service.created))

  async def model(request: Request) -> Response:
    service.admit(request)
    found = service.model(request.path_params["name"])
    return _json(response.model(found.name, service.created))

  return Starlette(
      routes=[
          Route("/healthz", health),
          Route("/readyz", ready),
          Route("/metrics", measure),
          Route("/v1/models", models),
          Route("/v1/models/{name:path}", model),
          Route("/v1/chat/completions", Chat(service), methods=["POST"]),
      ],
      exception_handlers={RequestError: _refuse, HTTPException: _other},
  )


def _json(value: object) -> Response:
  """A value as a response."""
  return Response(response.dump(value), media_type="application/json")


def _refuse(request: Request, error: Exception) -> Response:
  """Tells a client what is wrong."""
  del request
  if not isinstance(error, RequestError):
    raise TypeError(f"no RequestError: {error!r}")
  return Response(
      response.dump(error.body()),
      status_code=error.status,
      headers=error.headers,
      media_type="application/json",
  )


def _other(request: Request, error: Exception) -> Response:
  """Unknown paths and methods, in the same form."""
  if not isinstance(error, HTTPException):
    raise TypeError(f"no HTTPException: {error!r}")
  told = f"{request.method} {request.url.path[:80]}: {error.detail}"
  return _refuse(request, RequestError(error.status_code, told))
