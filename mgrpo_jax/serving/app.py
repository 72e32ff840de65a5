"""The routes: models, completions, weights, health and metrics."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mgrpo_jax.serving import jobs, metrics, response
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.lingering import Lingering
from mgrpo_jax.serving.refusing import refuse
from mgrpo_jax.serving.service import (
    LEFT,
    Endpoint,
    LeftError,
    Service,
    read_body,
)
from mgrpo_jax.serving.weights import Weights


def build(service: Service) -> ASGIApp:
  """Builds the web application.

  Args:
    service: what its requests share.

  Returns:
    The ASGI application, which reads on from whom it refuses.
  """
  chat, tokens = (Endpoint(service, r) for r in (jobs.chat, jobs.tokens))

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
    return _json(response.models(service.models.values(), service.created))

  async def model(request: Request) -> Response:
    service.admit(request)
    found = service.model(request.path_params["name"])
    return _json(response.model(found, service.created))

  routes = Starlette(
      routes=[
          Route("/healthz", health),
          Route("/readyz", ready),
          Route("/metrics", measure),
          Route("/v1/models", models),
          Route("/v1/models/{name:path}", model),
          Route("/v1/chat/completions", chat, methods=["POST"]),
          Route("/v1/completions", tokens, methods=["POST"]),
          *_weights(service, service.weights),
      ],
      exception_handlers={RequestError: refuse, HTTPException: _other},
  )
  return Lingering(routes)


def _weights(service: Service, weights: Weights | None) -> list[Route]:
  """The routes by which a trainer hands weights over, if it may."""
  if weights is None:
    return []

  async def say(request: Request) -> Response:
    service.admit(request)
    name = request.path_params["name"]
    return _json({"label": weights.label(name)})

  async def load(request: Request) -> Response:
    service.admit(request)
    try:
      body = await read_body(request, service.limits)
    except LeftError:
      return Response(status_code=LEFT)  # which nobody reads
    name = request.path_params["name"]
    return _json({"label": await weights.load(name, body)})

  path = "/v1/weights/{name}"
  return [Route(path, say), Route(path, load, methods=["POST"])]


def _json(value: object) -> Response:
  """A value as a response."""
  return Response(response.dump(value), media_type="application/json")


async def _other(request: Request, error: Exception) -> Response:
  """Unknown paths and methods, in the same form."""
  if not isinstance(error, HTTPException):
    raise TypeError(f"no HTTPException: {error!r}")
  told = f"{request.method} {request.url.path[:80]}: {error.detail}"
  return await refuse(request, RequestError(error.status_code, told))
