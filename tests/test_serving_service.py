"""Clients that leave, stall or come too many; a server that ends."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import logging
import socket
import threading
import time

import pytest
from served import (
    HELLO,
    LIMITS,
    all_free,
    engine,
    raw,
    saying,
    serve,
    speaker,
    text_of,
    until,
)

from mgrpo_jax.sampler import device
from mgrpo_jax.serving import connection, listen
from mgrpo_jax.serving.under_way import UnderWay


@pytest.fixture(scope="module")
def tiny():
  """A server of one tiny policy, and its engine."""
  made = engine()
  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    yield served, made


def test_a_full_server_says_so():
  with serve(speaker(saying("x" * 30, pause=0.2))) as served:
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(served.complete(n=2, max_tokens=30))
        )
        for _ in range(2)
    ]
    for thread in threads:
      thread.start()
    until(lambda: served.service.gate.inside == 4)
    body = {"model": "tiny", "messages": HELLO}
    status, headers, _ = served.ask("POST", "/v1/chat/completions", body)
    assert (status, headers["retry-after"]) == (429, "1")
    for thread in threads:
      thread.join()
    assert len(results) == 2
    served.complete(n=3)  # there is room again


@contextlib.contextmanager
def slow_device(monkeypatch, seconds=0.05):
  decode = device.decode

  def slow(*args, **kwargs):
    time.sleep(seconds)
    return decode(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(device, "decode", slow)
    yield


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slots(tiny, monkeypatch, stream):
  served, made = tiny
  with slow_device(monkeypatch):
    before = made.stats()["cancelled"]
    connection = raw(served, n=3, stream=stream, seed=1)
    until(lambda: made.stats()["slots"]["busy"] == 3)
    if stream:
      assert connection.recv(15) == b"HTTP/1.1 200 OK"
    connection.close()
    until(lambda: all_free(made))
    assert made.stats()["cancelled"] == before + 3
  assert served.service.gate.inside == 0
  until(lambda: b'status="499"' in served.ask("GET", "/metrics")[2])
  served.complete(max_tokens=3)


def test_who_reads_too_slowly_is_left_behind():
  limits = dataclasses.replace(LIMITS, write_deadline=0.3)
  text = "y" * 200
  with serve(
      speaker(saying(text * 100, piece=1, pause=0.0), context=10**6),
      limits=limits,
  ) as served:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    body = json.dumps(
        {"model": "tiny", "messages": HELLO, "stream": True, "logprobs": True}
    )
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type:"
        f" application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection.sendall((head + body).encode())
    until(lambda: served.service.gate.inside == 1)
    until(lambda: served.service.gate.inside == 0)
    connection.close()
    assert b'status="499"' in served.ask("GET", "/metrics")[2]


def test_a_body_that_never_comes_is_not_waited_for():
  limits = dataclasses.replace(LIMITS, read_deadline=0.2)
  with serve(speaker(saying("x")), limits=limits) as served:
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
      connection.sendall(
          b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
          b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{"
      )
      assert b" 408 " in connection.recv(100)


def test_a_request_that_takes_too_long_ends():
  limits = dataclasses.replace(LIMITS, deadline=0.3)
  slow = speaker(saying("x" * 100, pause=0.1))
  with serve(slow, limits=limits) as served:
    assert served.complete(504)["error"]["code"] == "deadline"
    chunks = served.stream()
    assert chunks[-1]["error"]["code"] == "deadline"
    assert text_of(chunks[:-1]).startswith("xxx")
    assert served.service.gate.inside == 0  # before the client has the end


def test_shutting_down_finishes_what_is_under_way():
  with serve(speaker(saying("z" * 30, pause=0.1))) as served:
    results = []
    thread = threading.Thread(target=lambda: results.append(served.stream()))
    thread.start()
    until(lambda: served.service.gate.inside == 1)
    served.stop()
    until(lambda: served.service.gate.closed)
    body = {"model": "tiny", "messages": HELLO}
    status, _, answer = served.ask("POST", "/v1/chat/completions", body)
    assert status == 503
    assert json.loads(answer)["error"]["code"] == "shutting_down"
    assert served.ask("GET", "/readyz")[0] == 503
    assert served.ask("GET", "/healthz")[0] == 200
    thread.join()
    assert text_of(results[0]) == "z" * 30


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"whole"])
def test_a_connection_on_which_no_request_comes_is_closed(sent, monkeypatch):
  monkeypatch.setattr(connection, "_LOOK", 0.3)
  monkeypatch.setattr(listen, "_KEEP_ALIVE", 60)
  with serve(speaker(saying("x"))) as served:
    with socket.create_connection(("127.0.0.1", served.port), 10) as client:
      if sent == b"whole":
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"G")  # which ends uvicorn's own patience
      else:
        client.sendall(sent)
      while client.recv(1000):
        pass


def test_who_asks_again_and_again_keeps_its_connection(monkeypatch):
  monkeypatch.setattr(connection, "_LOOK", 0.3)
  with serve(speaker(saying("x"))) as served:
    one = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    with contextlib.closing(one):
      for _ in range(10):
        one.request("GET", "/healthz")
        assert one.getresponse().read() and one.sock is not None
        time.sleep(0.2)


def test_nothing_is_begun_once_all_is_closed():
  said = []

  async def built(scope, receive, send):
    raise AssertionError("asked")

  async def send(message):
    said.append(message.get("status"))

  async def run():
    requests = UnderWay(built)
    await requests.close()
    await requests({"type": "http"}, None, send)

  asyncio.run(run())
  assert said == [503, None]


def test_a_cancellation_of_another_kind_is_not_the_end():
  async def built(scope, receive, send):
    raise asyncio.CancelledError

  async def run():
    await UnderWay(built)({"type": "http"}, None, None)

  with pytest.raises(asyncio.CancelledError):
    asyncio.run(run())


def test_a_request_that_takes_long_keeps_its_connection(monkeypatch):
  monkeypatch.setattr(connection, "_LOOK", 0.1)
  with serve(speaker(saying("x" * 9, pause=0.3))) as served:
    assert served.complete()["choices"][0]["message"]["content"] == "x" * 9


def test_who_is_cut_short_by_the_end_is_told(caplog):
  slow = speaker(saying("z" * 100, pause=0.3))
  with serve(slow, drain=1.0) as served:
    body = {"model": "tiny", "messages": HELLO}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      whole, streamed = (
          pool.submit(
              served.ask,
              "POST",
              "/v1/chat/completions",
              body | {"stream": kind},
          )
          for kind in (False, True)
      )
      until(lambda: served.service.gate.inside == 2)
      served.stop()
      status, headers, answer = whole.result()
      assert (status, headers["retry-after"]) == (503, "1")
      assert "ends" in json.loads(answer)["error"]["message"]
      last = streamed.result()[2].decode().split("\n\n")[-2]
      told = json.loads(last.removeprefix("data: "))
      assert told["error"]["message"] == "the server is shutting down"
  assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_shutting_down_does_not_wait_for_ever():
  begun = time.monotonic()
  with serve(speaker(saying("z" * 100, pause=1.0)), drain=0.2) as served:
    connection = raw(served, stream=True)
    until(lambda: served.service.gate.inside == 1)
  connection.close()
  assert time.monotonic() - begun < 20
