"""A proxy between a store and an object server that makes mistakes.

It stands on localhost in front of an emulator of S3 or GCS and spoils some of
the requests that go through it, drawn from a seed:

    500, 503     an error in place of the server's answer; nothing is done
    lost         the request is carried out and answered with 500
    hang         no answer for a while, then the connection is closed
    silent       no answer at all: it is for the client to give up
    slow         the upload trickles to the server, and its answer back
    cut          the answer ends half-way through its body
    short        the upload ends half-way, and the connection with it
    flip         one bit of an object differs (listings carry no digest)

What a request has nothing of, no body to cut for example, is neither spoilt nor
counted.
"""

import collections
import contextlib
import dataclasses
import http.client
import http.server
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

KINDS = ("500", "503", "lost", "hang", "slow", "cut", "short", "flip")
ALL_KINDS = (*KINDS, "silent")  # which costs as long as a client waits
_HOP = {"connection", "content-length", "host", "transfer-encoding", "expect"}
_PIECES = 8  # of a body that trickles
_SILENCE = 300.0  # seconds in which a client gives up


class Faults:
  """Draws what goes wrong and counts what did. Safe between threads.

  Attributes:
    rate: share of requests that are spoilt, 0 to 1; may be changed.
    kinds: what is drawn from; may be changed.
    seconds: how long `hang` and `slow` last.
    injected: how often each kind was injected.
    requests: how many came, spoilt or not.
  """

  def __init__(
      self,
      *,
      seed: int,
      rate: float,
      seconds: float,
      kinds: Sequence[str] = KINDS,
  ) -> None:
    """Starts a plan.

    Args:
      seed: of the draws.
      rate: share of requests that are spoilt, 0 to 1.
      seconds: how long `hang` and `slow` last.
      kinds: what is drawn from.
    """
    self.rate = rate
    self.kinds = tuple(kinds)
    self.seconds = seconds
    self.injected: collections.Counter[str] = collections.Counter()
    self.requests = 0
    self._random = random.Random(seed)
    self._lock = threading.Lock()

  def draw(self) -> str:
    """Returns the fault of the next request; empty for none."""
    with self._lock:
      self.requests += 1
      if self.kinds and self._random.random() < self.rate:
        return self._random.choice(self.kinds)
    return ""

  def count(self, kind: str) -> None:
    """Counts a fault that was injected."""
    with self._lock:
      self.injected[kind] += 1


@dataclasses.dataclass(frozen=True)
class _Answer:
  """What the server said."""

  status: int
  headers: list[tuple[str, str]]
  body: bytes

  def is_object(self) -> bool:
    """Returns whether the body is what somebody stored, and is something."""
    kinds = [v for name, v in self.headers if name.lower() == "content-type"]
    told = any("xml" in kind or "json" in kind for kind in kinds)
    return self.status in (200, 206) and bool(self.body) and not told


class _Proxy(http.server.BaseHTTPRequestHandler):
  """Forwards requests; subclasses know where to and what goes wrong."""

  protocol_version = "HTTP/1.1"
  upstream: str
  faults: Faults

  def log_message(self, format: str, *args: Any) -> None:
    """Keeps quiet."""

  def _handle(self) -> None:
    """Forwards a request, or spoils it."""
    kind = self.faults.draw()
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if kind in ("500", "503"):
      self.faults.count(kind)
      self._send(_Answer(int(kind), [], b"injected"))
    elif kind in ("hang", "silent"):
      self.faults.count(kind)
      if kind == "silent":
        self._outwait()
      else:
        time.sleep(self.faults.seconds)
      self.close_connection = True
    elif kind == "short" and body:
      self.faults.count(kind)
      self._forward(body, [body[: len(body) // 2]], leaves=True)
      self.close_connection = True
    elif kind == "slow" and body:
      self.faults.count(kind)
      self._send(self._forward(body, self._trickling(body)), kind)
    else:
      self._spoil(kind, self._forward(body, [body]))

  def _outwait(self) -> None:
    """Returns when the client hangs up."""
    self.connection.settimeout(_SILENCE)
    with contextlib.suppress(OSError):
      self.connection.recv(1, socket.MSG_PEEK)

  def _trickling(self, body: bytes) -> Iterator[bytes]:
    """Yields a body piece by piece, a pause before each."""
    size = max(1, -(-len(body) // _PIECES))
    for start in range(0, len(body), size):
      time.sleep(self.faults.seconds / _PIECES)
      yield body[start : start + size]

  def _spoil(self, kind: str, answer: _Answer) -> None:
    """Passes the server's answer on, spoilt where that is its kind."""
    if kind == "lost":
      answer = _Answer(500, [], b"injected")
    elif kind == "flip" and answer.is_object():
      middle = len(answer.body) // 2
      spoilt = bytearray(answer.body)
      spoilt[middle] ^= 4
      answer = dataclasses.replace(answer, body=bytes(spoilt))
    elif kind not in ("slow", "cut") or not answer.body:
      kind = ""
    if kind:
      self.faults.count(kind)
    self._send(answer, kind)

  def _forward(
      self, body: bytes, pieces: Iterable[bytes], *, leaves: bool = False
  ) -> _Answer:
    """Asks the server; who `leaves` hangs up on it after the pieces."""
    where = urllib.parse.urlsplit(self.upstream)
    assert where.hostname
    server = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    with contextlib.closing(server):
      server.putrequest(
          self.command, self.path, skip_host=True, skip_accept_encoding=True
      )
      for name, value in self.headers.items():
        if name.lower() not in _HOP:
          server.putheader(name, value)
      server.putheader("Host", self.headers.get("Host", where.netloc))
      server.putheader("Content-Length", str(len(body)))
      server.endheaders()
      for piece in pieces:
        server.send(piece)
      if leaves:
        return _Answer(0, [], b"")
      found = server.getresponse()
      data = found.read()
    headers = [h for h in found.getheaders() if h[0].lower() not in _HOP]
    length = found.getheader("Content-Length")
    if self.command == "HEAD" and length:
      headers.append(("Content-Length", length))
    return _Answer(found.status, headers, data)

  def _send(self, answer: _Answer, kind: str = "") -> None:
    """Answers the client: whole, half, or piece by piece."""
    self.send_response(answer.status)
    for name, value in answer.headers:
      self.send_header(name, value)
    if self.command != "HEAD" and answer.status != 204:
      self.send_header("Content-Length", str(len(answer.body)))
    self.end_headers()
    if kind == "cut":
      self.wfile.write(answer.body[: len(answer.body) // 2])
      self.close_connection = True
    elif kind == "slow":
      for piece in self._trickling(answer.body):
        self.wfile.write(piece)
        self.wfile.flush()
    else:
      self.wfile.write(answer.body)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle


class _Server(http.server.ThreadingHTTPServer):
  """Ends with its connections, and says nothing of those that break."""

  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Keeps quiet: clients that give up are what this is for."""

  def finish_request(self, request: Any, client_address: Any) -> None:
    """Answers small writes at once."""
    request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    super().finish_request(request, client_address)


@contextlib.contextmanager
def between(upstream: str, faults: Faults) -> Iterator[str]:
  """Runs a proxy.

  Args:
    upstream: `http://host:port` of the object server.
    faults: what goes wrong.

  Yields:
    The proxy's own `http://host:port`.
  """
  handler = type("Proxy", (_Proxy,), {"upstream": upstream, "faults": faults})
  with _Server(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()
