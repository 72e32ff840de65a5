r"""How a server bears many clients, good and bad ones.

    python -m experiments.bench.serve --url=http://127.0.0.1:8000 --model=main \
        [--token=…] [--clients=200] [--seconds=30 | --minutes=30] [--turns=1] \
        [--max_tokens=16] [--out=serve.json]

Each client asks again and again over connections of its own: of ten clients
five want whole answers (and ask on, with --turns above 1, for models whose
protocol takes conversations: the quickstart's does not), two read streams, and
one each reads a stream slowly, leaves in the middle of one, or sends nonsense
(a body that is too large, bad JSON, a wrong token, an unknown model, in turn; a
server without a token takes any). Statuses are counted by kind of client;
milliseconds are those of requests with status 200. The server's memory is what
its /metrics say, every second. At the end they must say that nothing is in
progress and no slot is busy. Exit code 1 where something is left, or a status
was not what such a request deserves.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import sys
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import cli

KINDS = (
    *("whole",) * 5,
    *("stream",) * 2,
    "slow",
    "leaves",
    "nonsense",
)
WRONG = ("large", "broken", "stranger", "nobody")  # kinds of nonsense
_DESERVED = {
    "large": 413,
    "broken": 400,
    "stranger": 401,
    "nobody": 404,
}
_BUSY = (429, 503)
_WAIT = 120.0  # seconds for any answer
_BACK = 0.2  # seconds before a client that was refused asks again
_RESIDENT = "process_resident_memory_bytes "
_MIB = 2**20


class Load:
  """Clients of one server, and what became of their requests."""

  def __init__(self, arguments: argparse.Namespace) -> None:
    """Asks nothing yet."""
    parts = urllib.parse.urlsplit(arguments.url)
    self._host, self._port = parts.hostname or "", parts.port or 80
    self._arguments = arguments
    self.statuses: collections.Counter[str] = collections.Counter()
    self.unexpected: collections.Counter[str] = collections.Counter()
    self.seconds: dict[str, list[float]] = {
        "whole": [], "stream": [], "slow": []
    }  # fmt: skip
    self.memory: list[tuple[float, float]] = []  # seconds, bytes

  async def client(self, number: int, end: float) -> None:
    """Asks until the time is over, once at least."""
    turn, talk = 0, _Talk(self._arguments.turns)
    while turn == 0 or time.monotonic() < end:
      kind = KINDS[number % len(KINDS)]
      if kind == "nonsense":
        kind = WRONG[(number // len(KINDS) + turn) % len(WRONG)]
      began = time.monotonic()
      async with asyncio.timeout(_WAIT):
        status, body = await self._ask(kind, number + turn, talk)
      self._count(kind, status, time.monotonic() - began)
      if kind == "whole" and status == 200:
        talk.hear(body)
      elif status in _BUSY:
        await asyncio.sleep(_BACK)
      turn += 1

  async def watch(self, began: float, end: float) -> None:
    """Notes the server's memory every second."""
    while (now := time.monotonic()) < end:
      for line in (await self.get("/metrics")).splitlines():
        if line.startswith(_RESIDENT):
          resident = float(line.removeprefix(_RESIDENT))
          self.memory.append((now - began, resident))
      await asyncio.sleep(max(0.0, now + 1 - time.monotonic()))

  async def get(self, path: str) -> str:
    """The body of a page of the server's."""
    async with asyncio.timeout(_WAIT):
      reader, writer = await self._open("GET", path, b"", self._arguments.token)
      text = (await reader.read()).decode()
      writer.close()
    return text.partition("\r\n\r\n")[2]

  def _count(self, kind: str, status: int, seconds: float) -> None:
    """Counts a request."""
    self.statuses[f"{kind} {status}"] += 1
    if status == 200 and kind in self.seconds:
      self.seconds[kind].append(seconds)
    deserved = _DESERVED.get(kind, 200)
    is_open = kind == "stranger" and self._arguments.token == "none"
    if status not in (deserved, *_BUSY) and not (is_open and status == 200):
      self.unexpected[f"{kind} {status}"] += 1

  async def _ask(self, kind: str, turn: int, talk: _Talk) -> tuple[int, bytes]:
    """Makes one request; its status, 0 where the server hung up, and answer."""
    asked = {
        "model": self._arguments.model,
        "messages": talk.ask(f"Question {turn}?"),
        "max_tokens": self._arguments.max_tokens,
        "seed": turn,
        "stream": kind in ("stream", "slow", "leaves"),
    }
    token, body = _sent(kind, self._arguments.token, asked)
    try:
      reader, writer = await self._open(
          "POST", "/v1/chat/completions", body, token
      )
      with contextlib.closing(writer):
        status = int((await reader.readline()).split()[1])
        if kind == "leaves" and status == 200:
          await reader.readuntil(b"data: ")
          writer.transport.abort()
          return status, b""
        told = b""
        while some := await reader.read(64 if kind == "slow" else 65_536):
          told += some
          await asyncio.sleep(0.01 if kind == "slow" else 0)
        return status, told
    except (OSError, IndexError, asyncio.IncompleteReadError):
      return 0, b""

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


class _Talk:
  """A conversation, begun anew after so many turns."""

  def __init__(self, turns: int) -> None:
    """Has said nothing yet."""
    self._turns = turns
    self._messages: list[dict[str, Any]] = []

  def ask(self, text: str) -> list[dict[str, Any]]:
    """The messages so far and the next one of the user."""
    if len(self._messages) >= 2 * self._turns:
      self._messages = []
    if len(self._messages) % 2:  # the last one was not answered
      self._messages.pop()
    self._messages.append({"role": "user", "content": text})
    return list(self._messages)

  def hear(self, answer: bytes) -> None:
    """Takes the answer to the last message in."""
    body = answer.partition(b"\r\n\r\n")[2]
    first, last = body.index(b"{"), body.rindex(b"}")  # it is one chunk
    told = json.loads(body[first : last + 1])
    said = told["choices"][0]["message"]["content"]
    self._messages.append({"role": "assistant", "content": said})


def _sent(kind: str, token: str, asked: dict[str, Any]) -> tuple[str, bytes]:
  """The token and the body of a request."""
  if kind == "large":
    return token, b" " * 1_000_000
  if kind == "broken":
    return token, b"{"
  if kind == "stranger":
    token = "wrong"
  if kind == "nobody":
    asked = asked | {"model": "nobody"}
  return token, json.dumps(asked).encode()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  """Loads the server.

  Args:
    arguments: of the command.

  Returns:
    What was found.
  """
  load = Load(arguments)
  began = time.monotonic()
  end = began + (arguments.minutes * 60 or arguments.seconds)
  clients = (load.client(i, end) for i in range(arguments.clients))
  await asyncio.gather(load.watch(began, end), *clients)
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
      "seconds": round(spent, 1),
      "requests": sum(load.statuses.values()),
      "statuses": dict(sorted(load.statuses.items())),
      "unexpected": dict(sorted(load.unexpected.items())),
      "milliseconds": {
          kind: _quantiles(found) for kind, found in load.seconds.items()
      },
      "memory": _growth(load.memory),
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


def _growth(found: Sequence[tuple[float, float]]) -> dict[str, float]:
  """Resident memory over time, in MiB, and its slope by least squares."""
  if len(found) < 2:
    return {}
  seconds, resident = np.transpose(found)
  later = seconds >= seconds[-1] / 2  # caches and counters are full
  minutes, mib = seconds / 60, resident / _MIB
  told = {
      "start_mib": mib[0],
      "middle_mib": mib[len(mib) // 2],
      "end_mib": mib[-1],
      "max_mib": mib.max(),
      "slope_mib_per_minute": _slope(minutes, mib),
  }
  if later.sum() >= 2:
    told["second_half_mib_per_minute"] = _slope(minutes[later], mib[later])
  return {name: round(float(value), 2) for name, value in told.items()}


def _slope(x: np.ndarray, y: np.ndarray) -> float:
  """Slope of the line through points."""
  return float(np.polyfit(x, y, 1)[0])


def parser() -> argparse.ArgumentParser:
  """The command line."""
  made = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  made.add_argument("--url", required=True)
  made.add_argument("--model", required=True)
  made.add_argument("--token", default="none")
  made.add_argument("--clients", type=int, default=200)
  made.add_argument("--seconds", type=float, default=30.0)
  made.add_argument("--minutes", type=float, default=0.0)
  made.add_argument("--turns", type=int, default=1)
  made.add_argument("--max_tokens", type=int, default=16)
  made.add_argument("--out", type=cli.out_file)
  return made


def main() -> None:
  """Measures and prints; see the module."""
  arguments = parser().parse_args()
  found = asyncio.run(measure(arguments))
  text = json.dumps(found, indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(text)
  sys.exit(1 if found["left_behind"] or found["unexpected"] else 0)


if __name__ == "__main__":
  main()
