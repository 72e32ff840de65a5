"""Who is refused while it sends learns why, but is not listened to for ever."""

import asyncio
import dataclasses
import socket
import time

import pytest
from served import LIMITS, saying, serve, speaker

from mgrpo_jax.serving.lingering import Lingering

TOKEN = "0123456789abcdef"
LARGE = 1_000_000


def head(
    *, path="/v1/chat/completions", method="POST", token=TOKEN, kind="json",
    length=LARGE, more="",
):  # fmt: skip
  return (
      f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}"
      f"\r\ncontent-type: application/{kind}\r\ncontent-length: {length}\r\n"
      f"{more}\r\n"
  ).encode()


def connected(served):
  connection = socket.socket()
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
  connection.settimeout(20)
  connection.connect(("127.0.0.1", served.port))
  return connection


def status(connection):
  return int(connection.recv(100).split()[1])


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize(
    ("fields", "limits", "expected"),
    [
        ({}, {}, 413),
        ({"token": "wrong"}, {}, 401),
        ({}, {"requests_per_minute": 1}, 429),
        ({"kind": "xml"}, {}, 415),
        ({"path": "/v1/nothing"}, {}, 404),
        ({"method": "PUT"}, {}, 405),
    ],
)
def test_who_sends_much_hears_why_it_is_refused(
    fields, limits, expected, connection
):
  limits = dataclasses.replace(LIMITS, **limits)
  with serve(speaker(saying("x")), limits=limits, token=TOKEN) as served:
    if expected == 429:
      served.complete(key=TOKEN)
    with connected(served) as client:
      client.sendall(head(**fields, more=f"connection: {connection}\r\n"))
      for _ in range(100):
        client.sendall(b" " * (LARGE // 100))
        time.sleep(0.001)
      assert status(client) == expected


def test_a_server_that_ends_says_so_to_who_still_sends():
  with serve(speaker(saying("x")), token=TOKEN) as served:
    served.service.gate.close()
    with connected(served) as client:
      client.sendall(head() + b" " * LARGE)
      assert status(client) == 503


def test_who_is_refused_and_sends_no_more_is_answered_in_time():
  limits = dataclasses.replace(LIMITS, read_deadline=0.3)
  with serve(speaker(saying("x")), limits=limits, token=TOKEN) as served:
    with connected(served) as client:
      client.sendall(head(token="wrong") + b" ")
      began = time.monotonic()
      assert status(client) == 401
      assert time.monotonic() - began < 5


def test_who_asks_whether_to_send_is_not_invited():
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      client.sendall(head(token="wrong", more="expect: 100-continue\r\n"))
      assert status(client) == 401


def heard(messages, *, built, max_body_bytes=10, read_deadline=60.0):
  """How many of a client's messages are read, and what it is answered."""
  limits = dataclasses.replace(
      LIMITS, max_body_bytes=max_body_bytes, read_deadline=read_deadline
  )
  scope = {"type": "http", "headers": []}
  left, said = list(messages), []

  async def receive():
    return left.pop(0)

  async def send(message):
    said.append(message)

  asyncio.run(Lingering(built, limits)(scope, receive, send))
  return len(messages) - len(left), said


def part(body, more=True):
  return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([part(b"a" * 9)] * 2 + [part(b"", more=False)], 3),
        ([part(b"")] + [{"type": "http.disconnect"}] * 2, 2),
        ([part(b"a" * 100)] * 20, 7),  # no more than 640 bytes
    ],
)
def test_a_body_is_read_to_its_end_or_its_limit(messages, read):
  async def refuses(scope, receive, send):
    await send({"type": "http.response.start", "status": 400})
    await send({"type": "http.response.body", "body": b"no"})

  count, said = heard(messages, built=refuses)
  assert count == read
  assert [message["type"] for message in said] == [
      "http.response.start",
      "http.response.body",
  ]


def test_nothing_is_read_of_who_is_answered():
  async def answers(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})

  assert heard([part(b"a")] * 2, built=answers)[0] == 0
