"""HTTP to a server that fails in every way."""

import asyncio
import dataclasses
import email.utils
import threading
import time

import pytest
from fake_openai import fake

from mgrpo_jax.sampler import connection
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError
from mgrpo_jax.sampler.interface import EngineError

BODY = {"prompt": [1], "max_tokens": 2, "seed": 1, "stop_token_ids": [],
        "temperature": 1.0}  # fmt: skip
FINE = (200, {}, {"fine": True})


@pytest.fixture
def server():
  with fake() as made:
    yield made


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
  """The pauses that were made, without making them."""
  made, sleep = [], asyncio.sleep

  async def note(seconds):
    if threading.current_thread() is not threading.main_thread():
      await sleep(seconds)  # of the fake's
    else:
      made.append(seconds)

  monkeypatch.setattr(asyncio, "sleep", note)
  return made


def address(server, **changes):
  fields = {
      "url": server.url, "token": "", "max_concurrent": 4, "timeout": 5.0,
      "attempts": 3,
  }  # fmt: skip
  return Address(**fields | changes)


def post(server, count=1, **changes):
  """Answers to so many requests at a time, and the connection."""

  async def run():
    async with Connection(address(server, **changes)) as made:
      posts = (made.post("completions", BODY) for _ in range(count))
      return await asyncio.gather(*posts), made

  return asyncio.run(run())


def test_json_goes_out_and_comes_back(server):
  server.plan = [FINE]
  (told,), made = post(server, token="secret-secret-secret")
  assert told == {"fine": True}
  assert server.asked("/v1/completions") == [BODY]
  assert server.headers[b"authorization"] == b"Bearer secret-secret-secret"
  assert (made.opened, made.retries) == (1, 0)


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, {"error": "oh"}),
        (502, {}, b"<html>"),
        (503, {}, {"error": {"message": "busy"}}),
        (429, {}, {}),
        (408, {}, {}),
        (200, {}, b"no json"),
        (200, {}, b"[" * 100_000),
        "drop",
        "cut",
    ],
)
def test_what_may_pass_is_tried_again(server, pauses, failure):
  server.plan = [failure, failure, FINE]
  (told,), made = post(server)
  assert told == {"fine": True} and made.retries == 2
  first, second = pauses
  assert 0.25 <= first <= 0.5 <= second <= 1.0


def test_in_the_end_it_is_unreachable(server):
  server.plan = [(503, {}, {"error": {"message": "too\nbusy"}})] * 4
  with pytest.raises(UnreachableError) as caught:
    post(server)
  assert isinstance(caught.value, OSError)  # so a call that meets it FAILED
  told = str(caught.value)
  assert f"{server.url}/completions" in told and "3 attempts" in told
  assert "status 503: too busy" in told
  assert len(server.plan) == 1


def test_a_deadline_holds(server):
  server.plan = ["hang"]
  began = time.monotonic()
  with pytest.raises(UnreachableError, match="Timeout"):
    post(server, timeout=0.2, attempts=1)
  assert time.monotonic() - began < 5


def test_who_is_not_there_is_unreachable(server):
  nobody = server.url.replace(str(server.port), "1")
  with pytest.raises(UnreachableError, match="ConnectError"):
    post(server, url=nobody)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_will_not_pass_ends_it_at_once(server, status):
  server.plan = [(status, {}, {"error": {"message": "no such field"}})] * 2
  with pytest.raises(EngineError, match=f"{status}: no such field"):
    post(server)
  assert len(server.plan) == 1


def test_retry_after_is_honoured(server, pauses):
  then = email.utils.formatdate(time.time() + 9, usegmt=True)
  server.plan = [
      (429, {"retry-after": "7"}, {}),
      (503, {"retry-after": then}, {}),
      FINE,
  ]
  post(server)
  assert pauses[0] == 7 and 7 < pauses[1] <= 9


def test_nobody_waits_for_an_hour(server, pauses):
  server.plan = [(429, {"retry-after": "3600"}, {})]
  with pytest.raises(UnreachableError, match="3600 s"):
    post(server)
  assert not pauses


def test_senseless_retry_after_is_not_honoured(server, pauses):
  server.plan = [(429, {"retry-after": "soon"}, {}), FINE]
  post(server)
  assert pauses[0] <= 0.5


def test_requests_at_a_time_are_limited(server):
  server.hold.clear()

  async def run():
    async with Connection(address(server, max_concurrent=3)) as made:
      posts = [
          asyncio.create_task(made.post("completions", BODY)) for _ in range(9)
      ]
      while server.running < 3:
        await asyncio.wait(posts, timeout=0.02)
      await asyncio.wait(posts, timeout=0.1)
      waiting = made.waiting
      server.hold.set()
      await asyncio.gather(*posts)
      return waiting, made.waiting, made.opened

  waiting, after, opened = asyncio.run(run())
  assert (waiting, after, server.most_running) == (6, 0, 3)
  assert opened <= 3  # connections are used again


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "127.0.0.1:8000"),
        ("url", "ftp://host/v1"),
        ("url", "http://"),
        ("url", "http://host:port/v1"),
        ("max_concurrent", 0),
        ("attempts", 0),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
    ],
)
def test_addresses_are_checked(server, field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(address(server), **{field: value})


def test_the_token_is_not_shown(server):
  assert "secret" not in repr(address(server, token="secret"))


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/"])
def test_a_servers_own_routes_are_beside_the_version(server, url):
  assert address(server, url=url).root == "http://h:1"


@pytest.mark.parametrize("token", ["secret\nline", "secret one", "sécret"])
def test_a_token_is_one_word_and_never_quoted(server, token):
  with pytest.raises(ValueError, match="token must be visible") as caught:
    address(server, token=token)
  assert token not in str(caught.value)


def test_an_error_moves_no_cursor(server):
  server.plan = [(400, {}, {"error": {"message": "a\x1b[2Jb"}})]
  with pytest.raises(EngineError, match="400: a.\\[2Jb") as caught:
    post(server)
  assert "\x1b" not in str(caught.value)


def test_a_deadline_is_of_the_whole_answer(server, monkeypatch):
  async def trickle(answer, receive, send):
    start = {"type": "http.response.start", "status": 200, "headers": []}
    await send(start)
    for _ in range(30):
      await send(
          {"type": "http.response.body", "body": b" ", "more_body": True}
      )
      await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"{}"})

  monkeypatch.setattr(server, "send", trickle)
  with pytest.raises(UnreachableError, match="TimeoutError"):
    post(server, timeout=0.5, attempts=1)


def test_an_answer_without_end_is_not_kept(server, monkeypatch):
  monkeypatch.setattr(connection, "_LONGEST_BODY", 1000)
  server.plan = [(200, {}, b'"' + b"a" * 998 + b'"')]
  assert post(server)[0] == ["a" * 998]
  server.plan = [(200, {}, b'"' + b"a" * 999 + b'"')]
  with pytest.raises(EngineError, match="over 1000 bytes"):
    post(server)


def test_a_strangers_answer_without_end_is_none(server, monkeypatch):
  monkeypatch.setattr(connection, "_LONGEST_BODY", 1000)
  server.plan = [
      (200, {}, b'"' + b"a" * 2000 + b'"'),
      (200, {"x-job": "sub"}, {}),
  ]
  assert post(server, name="sub")[0] == [{}]
