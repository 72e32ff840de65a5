"""A job ends when nobody can call it any more."""

import asyncio
import contextlib
import logging

import httpx2
import pytest

from mgrpo_jax.decoupled import server
from mgrpo_jax.decoupled.ending import Ending
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.serving import internal, under_way
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.listen import bind


class Desk:
  """Answers nothing; a call breaks it when that is set."""

  def __init__(self):
    self.breaks = asyncio.Event()

  async def failed(self):
    await self.breaks.wait()
    return RuntimeError("the sampler stopped")


async def serve(desk, body):
  with bind("127.0.0.1", 0) as where:
    async with Ending() as ending:
      async with server.serving(desk, "sub", where, "", broken=ending.tell):
        await body()


def test_a_server_that_dies_ends_the_job(monkeypatch):
  async def dies(self, sockets=None):
    await asyncio.sleep(0.05)
    raise OSError("too many open files")

  monkeypatch.setattr(internal.Server, "serve", dies)
  with pytest.raises(ServerError, match="too many open files"):
    asyncio.run(serve(Desk(), lambda: asyncio.sleep(60)))


def test_a_call_that_breaks_the_desk_ends_whoever_leads():
  async def work():
    desk = Desk()

    async def body():
      await asyncio.sleep(0.2)
      desk.breaks.set()
      await asyncio.sleep(60)

    await serve(desk, body)

  with pytest.raises(RuntimeError, match="the sampler stopped"):
    asyncio.run(work())


def test_a_server_that_is_told_to_end_breaks_nothing():
  asyncio.run(serve(Desk(), lambda: asyncio.sleep(0.2)))


@pytest.mark.parametrize("path, status", [("v1/calls", 415), ("other", 404)])
def test_every_answer_says_whose_it_is(path, status):
  async def work():
    with bind("127.0.0.1", 0) as where:
      url = f"http://127.0.0.1:{where.getsockname()[1]}/{path}"
      async with httpx2.AsyncClient(trust_env=False) as client:
        async with server.serving(Desk(), "sub", where, "", broken=pytest.fail):
          return await client.post(url, content=b"nonsense")

  response = asyncio.run(work())
  assert (response.status_code, response.headers["x-job"]) == (status, "sub")


@contextlib.asynccontextmanager
async def asked(answer):
  """A server within which somebody waits for an answer; yields that task."""
  under_way = asyncio.Event()

  async def slow(body):
    under_way.set()
    return await answer(body)

  with bind("127.0.0.1", 0) as where:
    url = f"http://127.0.0.1:{where.getsockname()[1]}/v1/calls"
    async with httpx2.AsyncClient(trust_env=False) as client:
      async with internal.serving(
          internal.build({"/v1/calls": slow}, ""),
          where,
          failed=asyncio.Event().wait,
          ended=RuntimeError,
          broken=lambda error: pytest.fail(str(error)),
          headers={"x-job": "sub"},
      ):
        call = asyncio.create_task(client.post(url, json={}))
        await under_way.wait()
        yield call
      ended = asyncio.all_tasks() - {asyncio.current_task(), call}
      assert not ended, "requests go on after the server was left"
      await call


def test_who_is_answered_when_the_server_is_left_gets_503_and_no_traceback(
    caplog,
):
  """As where an engine is closed behind the server: nobody asks it then."""
  closed, asked_of_it = asyncio.Event(), []

  async def answer(body):
    del body
    try:
      await closed.wait()
    finally:
      asked_of_it.append(closed.is_set())
    raise RequestError(503, "a call broke it")

  async def work():
    async with asked(answer) as call:
      pass
    closed.set()
    assert asked_of_it == [False]
    return call.result()

  with caplog.at_level(logging.DEBUG):
    response = asyncio.run(work())
  assert response.status_code == 503
  assert response.json()["error"]["message"] == "this process ends"
  assert response.headers["retry-after"] == "1"
  assert response.headers["x-job"] == "sub"
  assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_one_that_will_not_end_does_not_hold_the_server(monkeypatch, caplog):
  monkeypatch.setattr(under_way, "_LAST", 0.1)

  async def answer(body):
    del body
    for _ in range(3):
      with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0.4)
    return b"{}"

  async def work():
    began = asyncio.get_running_loop().time()
    with pytest.raises(AssertionError, match="go on after"):
      async with asked(answer):
        pass
    assert asyncio.get_running_loop().time() - began < 1

  with caplog.at_level(logging.DEBUG):
    asyncio.run(work())
  assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
