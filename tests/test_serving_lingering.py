"""Who is refused while it sends learns why, but is not listened to for ever."""

import asyncio
import contextlib
import dataclasses
import http.client
import logging
import socket
import threading
import time
import types

import pytest
from served import LIMITS, saying, serve, speaker

from mgrpo_jax.serving import internal, lingering, listen
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


@pytest.mark.parametrize("drain", [0.2, 10.0])
def test_who_is_refused_when_the_server_stops_has_heard_why(drain, caplog):
  began = time.monotonic()
  with serve(speaker(saying("x")), token=TOKEN, drain=drain) as served:
    with connected(served) as client:
      client.sendall(head(token="wrong") + b" ")
      assert status(client) == 401
      served.stop()
      while client.recv(1000):
        pass
  assert time.monotonic() - began < 9
  assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_who_is_refused_and_sends_no_more_is_answered_at_once():
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      began = time.monotonic()
      client.sendall(head(token="wrong") + b" ")
      assert status(client) == 401
      assert time.monotonic() - began < 3  # not the five seconds of a body


def test_what_was_read_to_its_end_is_answered_at_once():
  limits = dataclasses.replace(LIMITS, read_deadline=60.0)
  with serve(speaker(saying("x")), limits=limits, token=TOKEN) as served:
    with connected(served) as client:
      began = time.monotonic()
      client.sendall(head(length=2) + b"{]")
      assert status(client) == 400
      assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "more",
    ["expect: x, 100-Continue\r\n", "expect: x\r\nexpect: 100-continue\r\n"],
)
def test_who_asks_whether_to_send_is_not_invited(more):
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      began = time.monotonic()
      client.sendall(head(token="wrong", more=more))
      answer = client.recv(1000)
      assert answer.startswith(b"HTTP/1.1 401")
      assert b"connection: close" in answer.lower()
      while client.recv(1000):
        pass
      assert time.monotonic() - began < 3  # not invited, it is not waited for


def test_who_sent_all_keeps_its_connection():
  with serve(speaker(saying("x")), token=TOKEN) as served:
    one = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    with contextlib.closing(one):
      for _ in range(3):
        one.request("POST", "/v1/chat/completions", b"{}", {"x": "y"})
        answer = one.getresponse()
        assert answer.status == 401 and answer.read()
        assert answer.getheader("connection") is None


@pytest.mark.parametrize("sent", [b" " * 10_000, b"5\r\n" + b" " * 5 + b"\r\n"])
def test_who_never_ends_is_cut_off(sent):
  chunked = not sent.startswith(b" ")
  first = head(token="wrong", length=10**12)
  if chunked:
    first = first.replace(
        b"content-length: 1000000000000", b"transfer-encoding: chunked"
    )
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      client.sendall(first)
      began = time.monotonic()
      with pytest.raises(ConnectionError):
        while time.monotonic() - began < 20:
          client.sendall(sent)
          time.sleep(0.01)


def test_nonsense_after_a_refusal_ends_the_connection_quietly(caplog):
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      first = head(token="wrong").replace(
          b"content-length: 1000000", b"transfer-encoding: chunked"
      )
      client.sendall(first + b"5\r\nabcde\r\n")
      assert status(client) == 401
      client.sendall(b"zz\r\n")
      while client.recv(1000):
        pass
  assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_who_is_refused_does_not_hold_the_end():
  with serve(speaker(saying("x")), token=TOKEN, drain=60) as served:

    def refused():
      """Comes again and again, and stays each time."""
      with contextlib.suppress(OSError):
        while True:
          with connected(served) as client:
            client.sendall(head(token="wrong") + b" ")
            client.recv(1000)
            time.sleep(1.5)

    threads = [threading.Thread(target=refused) for _ in range(2)]
    for thread in threads:
      thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    served.stop()
    for thread in threads:
      thread.join(60)
    assert time.monotonic() - began < 10


def test_a_redirection_lingers_too():
  with serve(speaker(saying("x")), token=TOKEN) as served:
    with connected(served) as client:
      path = "/v1/chat/completions/"
      client.sendall(head(path=path, more="connection: close\r\n"))
      for _ in range(100):
        client.sendall(b" " * (LARGE // 100))
        time.sleep(0.001)
      assert status(client) == 307


def test_servers_between_jobs_linger_as_well():
  async def never(body):
    raise AssertionError(body)

  async def run():
    with listen.bind("127.0.0.1", 0) as where:
      built = internal.build({"/v1/calls": never}, TOKEN)
      async with internal.serving(
          built, where, failed=asyncio.Event().wait, ended=str, broken=print
      ):
        return await asyncio.to_thread(refused, where.getsockname()[1])

  def refused(port):
    with connected(types.SimpleNamespace(port=port)) as client:
      client.sendall(head(path="/v1/calls", token="wrong"))
      for _ in range(100):
        client.sendall(b" " * (LARGE // 100))
        time.sleep(0.001)
      return status(client)

  assert asyncio.run(run()) == 401


def heard(messages, *, built, kind="http"):
  """How many of a client's messages are read, and what it is answered."""
  scope = {"type": kind, "headers": [(b"transfer-encoding", b"chunked")]}
  left, said = list(messages), []

  async def receive():
    return left.pop(0)

  async def send(message):
    said.append(message)

  asyncio.run(Lingering(built)(scope, receive, send))
  return len(messages) - len(left), said


def part(body, more=True):
  return {"type": "http.request", "body": body, "more_body": more}


async def refuses(scope, receive, send):
  await send({"type": "http.response.start", "status": 400})
  await send({"type": "http.response.body", "body": b"no"})


@pytest.mark.parametrize(
    ("messages", "read", "closes"),
    [
        ([part(b"a" * 9)] * 2 + [part(b"", more=False)], 3, False),
        ([part(b"")] + [{"type": "http.disconnect"}] * 2, 2, False),
        ([part(b"a" * 64)] * 20, 11, True),  # the first beyond 640 bytes
    ],
)
def test_a_body_is_read_to_its_end_or_its_limit(
    messages, read, closes, monkeypatch
):
  monkeypatch.setattr(lingering, "_DISCARDED", 640)
  count, said = heard(messages, built=refuses)
  assert count == read
  first, *rest = said
  assert first["status"] == 400
  assert ((b"connection", b"close") in first.get("headers", ())) == closes
  assert b"".join(one.get("body", b"") for one in rest) == b"no"
  assert [one.get("more_body", False) for one in rest][-1] is False


def test_what_the_application_read_is_not_waited_for():
  async def reads(scope, receive, send):
    while (await receive())["more_body"]:
      pass
    await refuses(scope, receive, send)

  body = [part(b"a"), part(b"", more=False)]
  assert heard(body, built=reads) == (
      2,
      [
          {"type": "http.response.start", "status": 400},
          {"type": "http.response.body", "body": b"no"},
      ],
  )


def test_nothing_is_read_of_who_is_answered():
  async def answers(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"yes"})

  assert heard([part(b"a")] * 2, built=answers)[0] == 0


def test_what_is_no_request_passes_through():
  async def lives(scope, receive, send):
    await send({"type": "lifespan.startup.complete", "status": 400})

  count, said = heard([part(b"a")], built=lives, kind="lifespan")
  assert (count, len(said)) == (0, 1)
