"""A server like vLLM's whose answers are scripted, in a thread."""

import asyncio
import contextlib
import json
import socket
import threading

import numpy as np
import uvicorn

VOCAB = 23


def honest(body, *, top=None, **changes):
  """What a server that samples would answer; the seed decides the tokens."""
  rng = np.random.default_rng(abs(body["seed"]))
  tokens, stops = [], set(body["stop_token_ids"])
  while len(tokens) < body["max_tokens"] and not stops & set(tokens):
    tokens.append(int(rng.integers(VOCAB)))
  logprobs = [-float(x) for x in rng.random(len(tokens), np.float32)]
  names = [f"token_id:{token}" for token in tokens]
  likeliest = top(body["temperature"]) if top else -1.0 / body["temperature"]
  choice = {
      "index": 0,
      "text": "not to be read",
      "finish_reason": "stop" if stops & set(tokens) else "length",
      "token_ids": tokens,
      "prompt_token_ids": body["prompt"],
      "logprobs": {
          "tokens": names,
          "token_logprobs": logprobs,
          "top_logprobs": [{name: likeliest} for name in names],
      },
  }
  return {"choices": [choice | changes]}


class Fake:
  """What is asked of the server, and how it answers.

  `plan` holds answers to come, of /v1/completions: a function of the body to
  JSON, or (status, headers, JSON or bytes), or 'hang', 'drop', 'cut'. Beyond
  it the server is honest.
  """

  def __init__(self):
    self.port = 0
    self.calls = []  # method, path, body
    self.plan = []
    self.always = honest
    self.models = [{"id": "tiny", "max_model_len": 64}]
    self.loaded = []  # paths, but for heads of zeros
    self.blank = False  # whether the last one had such a head
    self.reloads = True  # whether heads are loaded at all
    self.label = "default"
    self.development = True
    self.cached = True  # prefixes of older weights
    self.slow = {}  # seconds that a path's answers take
    self.paused = False
    self.pausing = 200, {}, {"status": "paused"}  # the answer to it
    self.running = self.most_running = 0
    self.hold = threading.Event()
    self.hold.set()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.port}/v1"

  def asked(self, path):
    return [body for _, where, body in self.calls if where == path]

  async def __call__(self, scope, receive, send):
    assert scope["type"] == "http"
    parts = []
    while True:
      message = await receive()
      parts.append(message.get("body", b""))
      if not message.get("more_body"):
        break
    body = json.loads(b"".join(parts) or b"null")
    path, query = scope["path"], scope["query_string"].decode()
    self.headers = dict(scope["headers"])
    self.calls.append((scope["method"], path, body))
    self.running += 1
    self.most_running = max(self.most_running, self.running)
    try:
      answer = self.route(path, query, body)
      await asyncio.sleep(self.slow.get(path, 0.0))
      while not self.hold.is_set():
        await asyncio.sleep(0.01)
      await self.send(answer, receive, send)
    finally:
      self.running -= 1

  def route(self, path, query, body):
    if path == "/v1/models":
      return 200, {}, {"data": self.models}
    if path == "/v1/completions" and self.blank and self.reloads:
      flat = {"token_logprobs": [-float(np.log(VOCAB))] * body["max_tokens"]}
      return 200, {}, honest(body, logprobs=flat)
    if path == "/v1/completions":
      how = self.plan.pop(0) if self.plan else self.always
      return (200, {}, how(body)) if callable(how) else how
    if not self.development:
      return 404, {}, {"detail": "Not Found"}
    if path == "/weight_info":
      return 200, {}, {"weight_version": self.label}
    if path == "/pause":
      assert query == "mode=wait"
      self.paused = True
      return self.pausing
    if path == "/collective_rpc":
      assert body["method"] == "reload_weights"
      where = body["kwargs"]["weights_path"]
      self.blank = "/blank/" in where
      self.loaded += [] if self.blank else [where]
      return 200, {}, {"results": [None]}
    if path == "/reset_prefix_cache":
      return 200, {}, {"success": self.cached}
    if path == "/update_weight_version":
      self.label = body["new_version"]
      return 200, {}, {"success": True}
    assert path == "/resume", path
    self.paused = False
    return 200, {}, {"status": "resumed"}

  async def send(self, answer, receive, send):
    if answer == "hang":
      await asyncio.sleep(60)
    if answer == "drop":
      raise ConnectionAbortedError
    cut = answer == "cut"
    status, headers, body = (200, {}, b'{"cho') if cut else answer
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = {"content-length": str(len(data) + 10 * cut)}
    pairs = [(k.encode(), v.encode()) for k, v in (headers | length).items()]
    await send(
        {"type": "http.response.start", "status": status, "headers": pairs}
    )
    await send({"type": "http.response.body", "body": data, "more_body": cut})
    if cut:
      raise ConnectionAbortedError


@contextlib.contextmanager
def running(app, port=0):
  """Serves an ASGI application at a port of this machine; yields the port."""
  where = socket.create_server(("127.0.0.1", port))
  server = uvicorn.Server(
      uvicorn.Config(app, lifespan="off", log_config=None, http="h11")
  )
  thread = threading.Thread(
      target=lambda: asyncio.run(server.serve(sockets=[where]))
  )
  thread.start()
  try:
    yield where.getsockname()[1]
  finally:
    server.should_exit = server.force_exit = True
    thread.join(20)
    where.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def fake():
  """A fake that is being served."""
  made = Fake()
  with running(made) as made.port:
    yield made
