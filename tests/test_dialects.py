"""How servers are told of weights."""

import asyncio
import pathlib

import pytest
from fake_openai import fake

from mgrpo_jax.sampler import dialects
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError

WEIGHTS = dialects.Weights(
    model="tiny", version=3, path=pathlib.Path("/w/v3"), label="ours"
)


@pytest.fixture
def server():
  with fake() as made:
    yield made


async def load(server, timeout):
  """Has vLLM load weights."""
  address = Address(
      url=server.url, token="", max_concurrent=4, timeout=timeout, attempts=1
  )
  async with Connection(address) as connection:
    await dialects.VLLM.load(connection, WEIGHTS)


async def until(condition):
  while not condition():
    await asyncio.sleep(0.01)


def test_a_pause_that_fails_is_ended(server):
  server.pausing = "hang"
  with pytest.raises(UnreachableError, match="/pause"):
    asyncio.run(load(server, timeout=0.3))
  assert server.calls[-1][1] == "/resume" and not server.paused


@pytest.mark.parametrize("times", [1, 2])
def test_a_pause_that_is_cancelled_is_ended(server, times):
  server.pausing = "hang"

  async def work():
    loading = asyncio.create_task(load(server, timeout=5.0))
    await until(lambda: server.paused)
    for _ in range(times):
      loading.cancel()
      await asyncio.sleep(0)
    await asyncio.wait({loading})
    assert loading.cancelled()

  asyncio.run(work())
  assert not server.paused and not server.loaded
