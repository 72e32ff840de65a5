r"""Puts a run's team behind an OpenAI-compatible endpoint, and its policies.

    python -m experiments.serve --workdir=runs/quickstart [--port=8000]
    curl localhost:8000/v1/chat/completions --json \
        '{"model": "main", "messages": [{"role": "user", "content": "Hi"}]}'

Models are the team, under the recipe's name, and each policy. Sampling is as in
the run's evaluations unless a request has a temperature. The weights are read
from the run's bucket, once. Programs are compiled before /readyz says 200 and
requests come in; until then they get 503. SIGTERM finishes what is under way.

/v1/models, /v1/chat/completions, /v1/completions (token ids in, token ids out),
/metrics (all four want the token, if there is one), /healthz, /readyz.

With --weights_from=DIR whoever may ask can also have a policy sampled from
other weights, those of DIR/POLICY/v12: POST /v1/weights/POLICY {"version": 12,
"label": "mine"}. That is how a run hands its weights to a server that samples
for it, see config.policies.NAME.external.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import math
import pathlib
import socket
import typing

from absl import flags

from experiments import cli

if typing.TYPE_CHECKING:
  from collections.abc import Mapping

  from mgrpo_jax.plan import Setup
  from mgrpo_jax.sampler.engine import Engine
  from mgrpo_jax.serving.limits import Limits
  from mgrpo_jax.serving.service import Service
  from mgrpo_jax.store import Store

_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run.")
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "To listen at; any but 127.0.0.1, ::1 and localhost needs a token.",
)
_PORT = flags.DEFINE_integer("port", 8000, "To listen at; 0 for any free one.")
_TOKEN = flags.DEFINE_string(
    "token",
    "",
    "That clients must send, 16 characters or more; see --token_file.",
)
_TOKEN_FILE = flags.DEFINE_string(
    "token_file", "", "That holds the token, which no list of processes shows."
)
_VERSION = flags.DEFINE_string(
    "version", "latest", "Of the weights, a number or latest."
)
_BODY = flags.DEFINE_integer(
    "max_body_bytes", 262_144, "Of a request; more is refused, 413."
)
_CONCURRENT = flags.DEFINE_integer(
    "max_concurrent", 128, "Choices in progress; more are refused, 429."
)
_CHOICES = flags.DEFINE_integer("max_choices", 16, "Largest n of a request.")
_RATE = flags.DEFINE_integer(
    "requests_per_minute", 6000, "Of all clients; more are refused, 429."
)
_DEADLINE = flags.DEFINE_float("deadline", 600.0, "Seconds of a request, 504.")
_READ = flags.DEFINE_float("read_deadline", 30.0, "Seconds of its body, 408.")
_WRITE = flags.DEFINE_float(
    "write_deadline", 30.0, "Seconds in which clients must take what is sent."
)
_WEIGHTS = flags.DEFINE_string(
    "weights_from", "", "Directory of weights that clients may have loaded."
)
_CONNECTIONS = flags.DEFINE_integer(
    "max_connections", 1024, "Of clients; more are refused, 503."
)
_CONVERSATIONS = flags.DEFINE_integer(
    "conversations",
    64,
    "With each policy, whose cache is kept for their next turn; 0 for none.",
)
_DRAIN = flags.DEFINE_float(
    "drain", 30.0, "Seconds that requests may take after SIGTERM."
)

_WARM_UP = flags.DEFINE_boolean(
    "warm_up", True, "Compile before requests come in, not while they wait."
)
_WARM_UP_DEADLINE = flags.DEFINE_float(
    "warm_up_deadline", 1800.0, "Seconds that compiling may take; then exit 2."
)


def main() -> None:
  """Serves; see the module."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    _need("starlette", "uvicorn")
    from experiments import recipe
    from mgrpo_jax import ownership, publish, workdir
    from mgrpo_jax.sampler.interface import EngineError
    from mgrpo_jax.serving import listen

    token = _token()
    cli.check_exposure(
        _HOST.value, token, "give one by --token_file=FILE or --token"
    )
    bounds = _limits()
    folder = pathlib.Path(_WEIGHTS.value).resolve() if _WEIGHTS.value else None
    version = _version()
    directory = workdir.Workdir(pathlib.Path(_WORKDIR.value))
    config = recipe.restore(directory.read_config())
    recipe.check(config)
    store = recipe.open_store(config, directory)
    ownership.check(store, directory.read_id())
    where = listen.bind(_HOST.value, _PORT.value)
    setup = recipe.build(config)
  failures = (ValueError, OSError, publish.NoVersionError, EngineError)
  with cli.user_errors(*failures), where:
    asyncio.run(
        _serve(setup, store, config.name, where, token, bounds, version, folder)
    )


async def _serve(
    setup: Setup,
    store: Store,
    name: str,
    where: socket.socket,
    token: str,
    bounds: Limits,
    version: int | typing.Literal["latest"],
    folder: pathlib.Path | None,
) -> None:
  """Reads the weights and listens."""
  from mgrpo_jax.resources import open_resources
  from mgrpo_jax.serving import catalog, listen
  from mgrpo_jax.serving.service import Service
  from mgrpo_jax.serving.weights import Weights

  # Whoever samples the policies while they train, here this process does.
  own = dataclasses.replace(setup, external={})
  async with open_resources(own, store) as resources:
    for problem in resources.read_published(version):
      cli.say(f"skipped {problem}")
    service = Service(
        catalog.models(resources, name, conversations=_CONVERSATIONS.value),
        stats=lambda: {n: e.stats() for n, e in resources.engines.items()},
        limits=bounds,
        token=token,
        weights=None
        if folder is None
        else Weights(
            folder,
            engines=resources.engines,
            configs={n: p.config for n, p in setup.policies.items()},
        ),
    )
    host, port = where.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    served = f"http://{address}:{port}/v1 serves {', '.join(service.models)}"
    stopping = asyncio.Event()
    beginning = asyncio.create_task(
        _begin(service, catalog.engines(resources), served, stopping)
    )
    await listen.listen(
        service,
        where,
        stopping=stopping,
        drain=_DRAIN.value,
        max_connections=_CONNECTIONS.value,
    )
    beginning.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await beginning


async def _begin(
    service: Service,
    engines: Mapping[str, Engine],
    served: str,
    stopping: asyncio.Event,
) -> None:
  """Warms up and says what is served; where it cannot, ends the server."""
  from mgrpo_jax.serving import warming

  try:
    if _WARM_UP.value:
      await warming.warm_up(
          service.gate, engines, deadline=_WARM_UP_DEADLINE.value, tell=cli.say
      )
  except Exception:
    stopping.set()
    raise
  cli.say(served)


def _need(*packages: str) -> None:
  """Raises ValueError where a package of the extra is not installed."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise ValueError(
          f"the package {package!r} is missing: pip install -e '.[serve]'"
      )


def _token() -> str:
  """The token, from a file or the command line."""
  if not _TOKEN_FILE.value:
    return _TOKEN.value
  if _TOKEN.value:
    raise ValueError("--token and --token_file: allowed: one of them")
  return cli.secret(_TOKEN_FILE.value, "--token_file")


def _version() -> int | typing.Literal["latest"]:
  """Which weights."""
  text = _VERSION.value
  if text == "latest":
    return "latest"
  if not text.isdecimal():
    raise ValueError(f"--version: {text!r}, allowed: latest or a number")
  return int(text)


def _limits() -> Limits:
  """What the server bears."""
  from mgrpo_jax.fields import check
  from mgrpo_jax.serving.limits import Limits

  check("port", _PORT.value, 0 <= _PORT.value < 2**16, "in [0, 65535]")
  check("drain", _DRAIN.value, 0 <= _DRAIN.value < 86_400, "in [0, 86400)")
  kept = _CONVERSATIONS.value
  check("conversations", kept, kept >= 0, ">= 0")
  seconds = _WARM_UP_DEADLINE.value
  check("warm_up_deadline", seconds, 0 < seconds < math.inf, "finite and > 0")
  check("max_connections", _CONNECTIONS.value, _CONNECTIONS.value >= 1, ">= 1")
  return Limits(
      max_body_bytes=_BODY.value,
      max_concurrent=_CONCURRENT.value,
      max_choices=_CHOICES.value,
      requests_per_minute=_RATE.value,
      deadline=_DEADLINE.value,
      read_deadline=_READ.value,
      write_deadline=_WRITE.value,
  )


if __name__ == "__main__":
  cli.run(main, required=("workdir",))
