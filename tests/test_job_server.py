"""A job ends when nobody can call it any more."""

import asyncio

import pytest

from mgrpo_jax.decoupled import server
from mgrpo_jax.decoupled.ending import Ending
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.serving import internal
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
