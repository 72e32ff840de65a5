r"""How a server bears many clients, good and bad ones.

    python -m experiments.bench.serve --url=http://127.0.0.1:8000 --model=main \
        [--token=…] [--clients=200] [--seconds=30] [--max_tokens=16] \
        [--out=serve.json]

Each client asks again and again over connections of its own: of ten clients
five want whole answers, two read streams, and one each reads a stream slowly,
leaves in the middle of one, or sends nonsense (a body that is too large, bad
JSON, a wrong token, an unknown model, in turn). Statuses are counted by kind of
client; milliseconds are those of whole answers and streams with status 200.
At the end /metrics must say that nothing is in progress and no slot is busy.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import pathlib
import time
import urllib.parse

import numpy as np

KINDS = (
    *("whole",) * 5,
    *("stream",) * 2,
    "slow",
    "leaves",
    "nonsense",
)
_WAIT = 120.0  # seconds for any answer
_BACK = 0.2  # seconds before a client that was refused asks again


class Load:
  """Clients of one server, and what became of their requests."""

  def __init__(self, arguments: argparse.Namespace) -> None:
    """Asks nothing yet."""
    parts = urllib.parse.urlsplit(arguments.url)
    self._host, self._port = parts.hostname or "", parts.port or 80
    self._arguments = arguments
    self.statuses: collections.Counter[str] = collections.Counter()
    self.seconds: dict[str, list[float]] = {"whole": [], "stream": []}

  async def client(self, number: int, end: float) -> None:
    """Asks until the time is over."""
    kind = KINDS[number % len(KINDS)]
    turn = 0
    while time.monotonic() < end:
      began = time.monotonic()
      async with asyncio.timeout(_WAIT):
        status = await self._ask(kind, number + turn)
      self.statuses[f"{kind} {status}"] += 1
      if status == 200 and kind in self.seconds:
        self.seconds[kind].append(time.monotonic() - began)
      elif status in (429, 503):
        await asyncio.sleep(_BACK)
      turn += 1

  async def get(self, path: str) -> str:
    """The body of a page of the server's."""
    async with asyncio.timeout(_WAIT):
      reader, writer = await self._open("GET", path, b"", self._arguments.token)
      text = (await reader.read()).decode()
      writer.close()
    return text.partition("\r\n\r\n")[2]

  async def _ask(self, kind: str, turn: int) -> int:
    """Makes one request; returns its status, 0 where the server hung up."""
    asked = {
        "model": self._arguments.model,
        "messages": [{"role": "user", "content": f"Question {turn}?"}],
        "max_tokens": self._arguments.max_tokens,
        "seed": turn,
        "stream": kind in ("stream", "slow", "leaves"),
    }
    token, body = self._arguments.token, json.dumps(asked).encode()
    if kind == "nonsense":
      token, body = _nonsense(turn, token, asked)
    try:
      reader, writer = await self._open(
          "POST", "/v1/chat/completions", body, token
      )
      try:
        status = int((await reader.readline()).split()[1])
        if kind == "leaves" and status == 200:
          await reader.readuntil(b"data: ")
          writer.transport.abort()
          return status
        while await reader.read(64 if kind == "slow" else 65_536):
          await asyncio.sleep(0.01 if kind == "slow" else 0)
        return status
      finally:
        writer.close()
    except (OSError, IndexError, asyncio.IncompleteReadError):
      return 0

  async def _open(
      self, method: str, path: str, body: bytes, token: str
  ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request on a connection of its own."""
    reader, writer = await asyncio.open_connection(self._host, self._port)
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n"
        f"authorization: Bearer {token}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


def _nonsense(
    turn: int, token: str, asked: dict[str, object]
) -> tuple[str, bytes]:
  """A token and a body, one of which is wrong."""
  wrong = (
      (token, b" " * 1_000_000),
      (token, b"{"),
      ("wrong", json.dumps(asked).encode()),
      (token, json.dumps(asked | {"model": "nobody"}).encode()),
  )
  return wrong[turn // len(KINDS) % len(wrong)]


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
  """Loads the server.

  Args:
    arguments: of the command.

  Returns:
    What was found.
  """
  load = Load(arguments)
  began = time.monotonic()
  end = began + arguments.seconds
  await asyncio.gather(*(load.client(i, end) for i in range(arguments.clients)))
  spent = time.monotonic() - began
  left: list[str] = []
  for _ in range(50):  # who left is noticed within a visit
    lines = (await load.get("/metrics")).splitlines()
    left = [line for line in lines if _is_leak(line)]
    if not left:
      break
    await asyncio.sleep(0.1)
  return {
      "clients": arguments.clients,
      "seconds": spent,
      "statuses": dict(sorted(load.statuses.items())),
      "milliseconds": {
          kind: _quantiles(found) for kind, found in load.seconds.items()
      },
      "left_behind": left,
  }


def _is_leak(line: str) -> bool:
  """Whether a line of the metrics says that something is still going on."""
  watched = line.startswith(("mgrpo_choices_in_progress", "mgrpo_queue{")) or (
      'state="busy"' in line
  )
  return watched and not line.endswith(" 0")


def _quantiles(seconds: list[float]) -> dict[str, float]:
  """How long requests took, in milliseconds."""
  if not seconds:
    return {"n": 0}
  p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
  return {
      "n": len(seconds),
      "p50": round(float(p50), 1),
      "p99": round(float(p99), 1),
      "max": round(max(seconds) * 1e3, 1),
  }


def main() -> None:
  """Measures and prints; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--url", required=True)
  parser.add_argument("--model", required=True)
  parser.add_argument("--token", default="none")
  parser.add_argument("--clients", type=int, default=200)
  parser.add_argument("--seconds", type=float, default=30.0)
  parser.add_argument("--max_tokens", type=int, default=16)
  parser.add_argument("--out", type=pathlib.Path)
  arguments = parser.parse_args()
  text = json.dumps(asyncio.run(measure(arguments)), indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(text)


if __name__ == "__main__":
  main()
