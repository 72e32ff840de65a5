"""Waiting for another job: bounded, telling for whom, wherever it is."""

import asyncio
import contextlib
import dataclasses
import json

import pytest

from mgrpo_jax import leaves, store
from mgrpo_jax.atomic import CorruptError
from mgrpo_jax.decoupled import members, peer
from mgrpo_jax.decoupled.errors import AbsentError
from mgrpo_jax.decoupled.members import Heart
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.sampler.interface import EngineError


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(peer, "_LOOK", 0.02)
  monkeypatch.setattr(peer, "_SILENT", 0.1)


def heart(bucket, port=1, every=0.05):
  return Heart(
      bucket,
      policy="sub",
      address=f"http://127.0.0.1:{port}",
      every=every,
      tell=print,
  )


def waiting(bucket, said, patience=1.0):
  return Peer(
      bucket,
      "sub",
      token="",
      patience=patience,
      timeout=10.0,
      max_concurrent=4,
      tell=said.append,
  )


@contextlib.asynccontextmanager
async def answering(status, body):
  """A job that gives one answer to everything; yields its port."""

  async def answer(reader, writer):
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
      await reader.readuntil(b"\r\n\r\n")
      head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n"
      writer.write(head.encode() + body)
      await writer.drain()
    writer.close()

  server = await asyncio.start_server(answer, "127.0.0.1", 0)
  async with server:
    yield server.sockets[0].getsockname()[1]


def test_a_record_says_where_and_how_far_a_job_is(bucket):
  assert members.read(bucket, "sub") is None
  with heart(bucket, port=4711) as beating:
    beating.ready(3)
    found = members.read(bucket, "sub")
  assert (found.address, found.ready) == ("http://127.0.0.1:4711", 3)


def test_a_record_that_was_changed_is_no_record(bucket):
  with heart(bucket):
    pass
  key = members.key("sub")
  record = json.loads(bucket.get(key)) | {"address": "http://evil:1"}
  bucket.put(key, json.dumps(record).encode())
  with pytest.raises(CorruptError, match="members/sub/0.json"):
    members.read(bucket, "sub")


@pytest.mark.parametrize("address", ["file:///etc/passwd", "http://", "x"])
def test_addresses_are_of_http(bucket, address):
  member = members.Member(
      policy="sub",
      process=0,
      address=address,
      incarnation="a",
      beat=1,
      ready=0,
      time=0.0,
  )
  record = leaves.seal({"format": 1, **dataclasses.asdict(member)})
  bucket.put(members.key("sub"), json.dumps(record).encode())
  with pytest.raises(CorruptError, match="http address"):
    members.read(bucket, "sub")


def test_a_job_that_never_comes_is_waited_for_only_so_long(bucket):
  said = []

  async def work():
    async with waiting(bucket, said, patience=0.4) as other:
      await other.ready(0)

  with pytest.raises(AbsentError, match="'sub'.*jobs.patience.*0 steps"):
    asyncio.run(work())
  assert any("no sign of life" in line and "'sub'" in line for line in said)


def test_a_job_that_lives_is_waited_for_longer_than_patience(bucket):
  said = []

  async def work():
    async with waiting(bucket, said, patience=0.3) as other:
      with heart(bucket) as beating:
        waits = asyncio.create_task(other.ready(2))
        await asyncio.sleep(0.9)
        assert not waits.done()
        beating.ready(2)
        await asyncio.wait_for(waits, 5)

  asyncio.run(work())
  assert not said


def test_a_call_finds_the_job_that_was_started_again(bucket):
  said = []

  async def work():
    async with waiting(bucket, said, patience=5.0) as other:
      with heart(bucket, port=9):  # where nobody listens
        asks = asyncio.create_task(other.post("calls", {}, "to answer"))
        await asyncio.sleep(0.2)
        assert not asks.done()
      async with answering(200, b'{"text": "Lima"}') as port:
        with heart(bucket, port=port):
          found = await asyncio.wait_for(asks, 5)
      return found, other.sent, other.received

  found, sent, received = asyncio.run(work())
  assert found == {"text": "Lima"}
  assert any("started again" in line for line in said)
  assert sent > 0 and received > len(b'{"text": "Lima"}')


def test_a_job_that_is_not_there_yet_is_asked_again(bucket):
  async def work():
    async with waiting(bucket, [], patience=5.0) as other:
      async with answering(425, b"{}") as port:
        with heart(bucket, port=port):
          with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
              await other.post("calls", {}, "to answer")

  asyncio.run(work())


def test_a_refusal_ends_the_wait(bucket):
  async def work():
    async with waiting(bucket, [], patience=5.0) as other:
      async with answering(409, b'{"error": {"message": "older"}}') as port:
        with heart(bucket, port=port):
          await other.post("calls", {}, "to answer")

  with pytest.raises(EngineError, match="409: older"):
    asyncio.run(work())


def test_a_silent_job_with_an_open_connection_is_given_up(bucket):
  async def silent(reader, writer):
    await reader.read()
    writer.close()

  async def work():
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
      port = server.sockets[0].getsockname()[1]
      with heart(bucket, port=port):
        pass  # stopped, as by SIGSTOP
      async with waiting(bucket, [], patience=0.5) as other:
        await other.post("calls", {}, "to answer")

  with pytest.raises(AbsentError, match="'sub'"):
    asyncio.run(work())
