"""A real server on localhost, in a thread, over tiny or scripted policies."""

import asyncio
import contextlib
import functools
import http.client
import json
import socket
import threading
import time

import jax
import numpy as np

from mgrpo_jax.agents.chats.chatml import chatml
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.policy import params
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.serving import listen
from mgrpo_jax.serving.limits import Limits
from mgrpo_jax.serving.policy import Speaker, policy
from mgrpo_jax.serving.service import Service
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.testing.tokens import ByteTokenizer
from mgrpo_jax.types import Completion

CONTEXT = 256
TOKENIZER = ByteTokenizer(("<|im_start|>", "<|im_end|>"))
CHAT = chatml(TOKENIZER, default_system="")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size)
LIMITS = Limits(
    max_body_bytes=20_000,
    max_concurrent=4,
    max_choices=3,
    requests_per_minute=100_000,
    deadline=60.0,
    read_deadline=5.0,
    write_deadline=5.0,
)
HELLO = [{"role": "user", "content": "Hello"}]


@functools.cache
def weights():
  init = jax.jit(params.init, static_argnums=1)
  return jax.tree.map(
      lambda x: 2 * np.asarray(x), init(jax.random.key(0), CONFIG)
  )


def engine(**sizes):
  return Engine(
      CONFIG, weights(), 7, context=CONTEXT,
      **{"num_slots": 4, "block": 64, "prefill_tokens": 128,
         "prefill_buckets": (32, 128), "decode_steps": 4,
         "decode_rows": 0} | sizes,
  )  # fmt: skip


def speaker(generate, name="tiny", **fields):
  return Speaker(
      **{
          "name": name,
          "generate": generate,
          "context": CONTEXT,
          "chat": CHAT,
          "protocol": HERMES,
          "tokenizer": TOKENIZER,
          "temperature": 1.0,
      }
      | fields
  )


def saying(text, *, pause=0.0, piece=3, chat=CHAT):
  """A `generate` function that always says the same."""

  async def generate(tokens, sampling, seed, *, until=None, on_tokens=None):
    ids = chat.write(text)[: sampling.max_new_tokens]
    said, ended = [], False
    while len(said) < len(ids) and not ended:
      await asyncio.sleep(pause)
      part = []
      for token in ids[len(said) : len(said) + piece]:
        part.append(token)
        ended = until(token) or token in sampling.stop_ids
        if ended:
          break
      said += part
      on_tokens(part, [-0.5] * len(part))
    return Completion(
        tokens=np.asarray(said, np.int32),
        logprobs=np.full(len(said), -0.5, np.float32),
        raw_logprobs=np.full(len(said), -0.5, np.float32),
        finish="stop" if ended else "length",
        version_min=7,
        version_max=7,
    )

  return generate


class Served:
  """A server that listens; `serve` makes one."""

  def __init__(self, port, service, stop):
    self.port, self.service, self.stop = port, service, stop

  def ask(self, method, path, body=None, **headers):
    """Returns status, headers and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    with contextlib.closing(connection):
      if isinstance(body, dict):
        body = json.dumps(body)
        headers = {"content-type": "application/json"} | headers
      named = {name.replace("_", "-"): v for name, v in headers.items()}
      connection.request(method, path, body, named)
      answer = connection.getresponse()
      return answer.status, answer.headers, answer.read()

  def complete(self, expected=200, key="any", **fields):
    """The JSON of a chat completion, for the client that has a key."""
    body = {"model": "tiny", "messages": HELLO} | fields
    status, _, answer = self.ask(
        "POST", "/v1/chat/completions", body, authorization=f"Bearer {key}"
    )
    assert status == expected, answer
    return json.loads(answer)

  def continue_tokens(self, expected=200, **fields):
    """The JSON of a completion of token ids."""
    body = {"model": "tiny", "prompt": [1, 2, 3]} | fields
    status, _, answer = self.ask("POST", "/v1/completions", body)
    assert status == expected, answer
    return json.loads(answer)

  def stream(self, **fields):
    """The chunks of a streamed chat completion."""
    body = {"model": "tiny", "messages": HELLO, "stream": True} | fields
    status, headers, answer = self.ask("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    assert headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextlib.contextmanager
def serve(
    *speakers,
    engines=None,
    limits=LIMITS,
    token="",
    models=(),
    drain=10.0,
    weights=None,
):
  """Serves policies, and the engines behind them, until the block ends."""
  ready, told = threading.Event(), {}
  engines = engines or {}

  async def main():
    async with contextlib.AsyncExitStack() as stack:
      for one in engines.values():
        await stack.enter_async_context(one)
      made = [*map(policy, speakers), *models]
      service = Service(
          {one.name: one for one in made},
          stats=lambda: {name: one.stats() for name, one in engines.items()},
          limits=limits,
          token=token,
          weights=weights,
      )
      where = stack.enter_context(listen.bind("127.0.0.1", 0))
      loop, stopping = asyncio.get_running_loop(), asyncio.Event()
      told["served"] = Served(
          where.getsockname()[1],
          service,
          lambda: loop.call_soon_threadsafe(stopping.set),
      )
      ready.set()
      await listen.listen(
          service, where, stopping=stopping, drain=drain, max_connections=1000
      )

  def run():
    try:
      asyncio.run(main())
    except BaseException as error:
      told["error"] = error
      raise
    finally:
      ready.set()

  thread = threading.Thread(target=run)
  thread.start()
  try:
    assert ready.wait(60) and "served" in told, told
    yield told["served"]
  finally:
    if "served" in told:
      with contextlib.suppress(RuntimeError):  # it has ended already
        told["served"].stop()
    thread.join(60)
    assert not thread.is_alive()
  assert "error" not in told, told


def text_of(chunks, index=0):
  """The text that a streamed choice spells."""
  return "".join(
      choice["delta"].get("content") or ""
      for chunk in chunks
      for choice in chunk["choices"]
      if choice["index"] == index
  )


def until(condition, seconds=20):
  """Waits until something is so."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def all_free(made):
  stats = made.stats()
  return not (stats["slots"]["busy"] or stats["requests"])


def raw(served, **fields):
  """A connection on which a completion was asked for."""
  body = {"model": "tiny", "messages": HELLO, "temperature": 2.0} | fields
  data = json.dumps(body).encode()
  head = (
      "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
      f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
  )
  connection = socket.create_connection(("127.0.0.1", served.port), 10)
  connection.sendall(head.encode() + data)
  return connection
