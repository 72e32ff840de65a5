"""Waiting for another job: bounded, telling for whom, wherever it is."""

import asyncio
import contextlib
import dataclasses
import json
import time

import pytest

from mgrpo_jax import leaves, store
from mgrpo_jax.atomic import CorruptError
from mgrpo_jax.decoupled import members, peer, watch
from mgrpo_jax.decoupled.claim import Home
from mgrpo_jax.decoupled.errors import AbsentError, StuckJobsError
from mgrpo_jax.decoupled.members import Heart
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.sampler.interface import EngineError


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  for module in (peer, watch):
    monkeypatch.setattr(module, "LOOK", 0.02)
  monkeypatch.setattr(watch, "_SILENT", 0.1)


def heart(bucket, port=1, every=0.05, policy="sub"):
  return Heart(
      bucket,
      policy=policy,
      address=f"http://127.0.0.1:{port}",
      home=Home(id="ours", place="here:/run"),
      every=every,
      patience=1.0,
      tell=print,
      lost=print,
  )


def waiting(bucket, said, patience=1.0, heart=None):
  return Peer(
      bucket,
      "sub",
      token="",
      patience=patience,
      timeout=10.0,
      max_concurrent=4,
      tell=said.append,
      heart=heart,
  )


@contextlib.asynccontextmanager
async def answering(status, body, name="sub"):
  """A job that gives one answer to everything; yields its port."""
  named = f"X-Job: {name}\r\n" if name else ""

  async def answer(reader, writer):
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
      await reader.readuntil(b"\r\n\r\n")
      head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{named}"
      writer.write(f"{head}\r\n".encode() + body)
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


@pytest.mark.parametrize("value", [5, None, [], {}, True, 0.5])
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(members.Member)]
)
def test_fields_of_other_types_make_no_record(bucket, name, value):
  with heart(bucket):
    pass
  key = members.key("sub")
  record = leaves.check_seal(json.loads(bucket.get(key)))
  if type(value) is type(record[name]) or (name, value) == ("time", 5):
    return
  bucket.put(key, json.dumps(leaves.seal(record | {name: value})).encode())
  with pytest.raises(CorruptError, match=f"{name} must be of type"):
    members.read(bucket, "sub")


@pytest.mark.parametrize("address", ["http://a:b", "http://a:99999"])
def test_addresses_have_ports(bucket, address):
  with heart(bucket):
    pass
  key = members.key("sub")
  record = leaves.check_seal(json.loads(bucket.get(key)))
  record = leaves.seal(record | {"address": address})
  bucket.put(key, json.dumps(record).encode())
  with pytest.raises(CorruptError, match="[Pp]ort"):
    members.read(bucket, "sub")


def placed_at(bucket, address):
  """Says that the job is at an address, whatever that is."""
  member = members.Member(
      policy="sub",
      process=0,
      address=address,
      incarnation="a",
      beat=1,
      ready=0,
      time=0.0,
      home="b",
      place="here:/run",
      waits="",
      wanted="",
      wait=0,
  )
  record = leaves.seal({"format": members.FORMAT, **dataclasses.asdict(member)})
  bucket.put(members.key("sub"), json.dumps(record).encode())


@pytest.mark.parametrize("address", ["file:///etc/passwd", "http://", "x"])
def test_addresses_are_of_http(bucket, address):
  placed_at(bucket, address)
  with pytest.raises(CorruptError, match="http address"):
    members.read(bucket, "sub")


def test_an_address_that_cannot_be_asked_is_waited_out(bucket):
  placed_at(bucket, "http://256.1.1.1:1")

  async def work():
    async with waiting(bucket, [], patience=0.4) as other:
      await other.post("calls", {}, "to answer")

  with pytest.raises(AbsentError):
    asyncio.run(work())


def test_a_job_that_never_comes_is_waited_for_only_so_long(bucket):
  said = []

  async def work():
    async with waiting(bucket, said, patience=0.4) as other:
      await other.ready(0)

  with pytest.raises(AbsentError, match="'sub'.*jobs.patience.*to be ready"):
    asyncio.run(work())
  assert any("no sign of life" in line and "'sub'" in line for line in said)


def test_a_job_that_lives_is_waited_for_longer_than_patience(
    bucket, monkeypatch
):
  monkeypatch.setattr(
      watch, "_SILENT", 15.0
  )  # where all is busy, beats are late
  said = []

  async def work():
    async with waiting(bucket, said, patience=2.0) as other:
      with heart(bucket) as beating:
        waits = asyncio.create_task(other.ready(2))
        await asyncio.sleep(3.0)
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


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 405])
@pytest.mark.parametrize("name", ["", "other"])
def test_somebody_else_at_its_address_is_no_answer(bucket, status, name):
  """What now has the port of a job that died, until that is back."""

  async def work():
    async with waiting(bucket, [], patience=5.0) as other:
      async with answering(status, b"{}", name) as port:
        with heart(bucket, port=port):
          asks = asyncio.create_task(other.post("calls", {}, "to answer"))
          await asyncio.sleep(0.3)
          assert not asks.done()
      async with answering(200, b'{"text": "Lima"}') as port:
        with heart(bucket, port=port):
          return await asyncio.wait_for(asks, 5)

  assert asyncio.run(work()) == {"text": "Lima"}


def test_why_a_living_job_cannot_be_asked_is_told(bucket, monkeypatch):
  monkeypatch.setattr(peer, "UNREACHABLE", 0.2)
  said = []

  async def work():
    with heart(bucket, port=9) as theirs:
      with heart(bucket, policy="main") as own:
        with theirs.waiting("main", "to complete step 5"):
          async with waiting(bucket, said, patience=1.5, heart=own) as other:
            await other.post("calls", {}, "to answer")

  with pytest.raises(
      StuckJobsError, match="cannot be asked: http://127.0.0.1:9"
  ):
    asyncio.run(work())
  assert any("gives signs of life, but: http://127.0.0.1:9/" in s for s in said)


def test_a_dead_job_is_not_told_of_as_living(bucket, monkeypatch):
  """Nobody listens at its address any more; many ask it at once."""
  monkeypatch.setattr(peer, "UNREACHABLE", 0.2)
  said = []

  async def work():
    with heart(bucket, port=9):
      pass
    async with waiting(bucket, said, patience=1.5) as other:
      calls = (other.post("calls", {}, "to answer") for _ in range(5))
      return await asyncio.gather(*calls, return_exceptions=True)

  ends = asyncio.run(work())
  assert [type(end) for end in ends] == 5 * [AbsentError]
  assert said and all(line.startswith("no sign of life") for line in said)


def test_calls_tell_together_why_a_job_cannot_be_asked(bucket, monkeypatch):
  """However many wait for it; and anew after it has answered."""
  monkeypatch.setattr(peer, "UNREACHABLE", 0.3)
  said = []

  async def work():
    async with waiting(bucket, said, patience=9.0) as other:

      async def ask():
        calls = [other.post("calls", {}, "to answer") for _ in range(10)]
        async with asyncio.timeout(1.5):
          return await asyncio.gather(*calls)

      for _ in range(2):
        with heart(bucket, port=9):
          with pytest.raises(TimeoutError):
            await ask()
        async with answering(200, b"{}") as port:
          with heart(bucket, port=port):
            await ask()

  asyncio.run(work())
  told = sum("gives signs of life, but" in line for line in said)
  assert 2 <= told <= 2 * 3  # after 0.3 s, and after twice as long each time


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


def test_two_jobs_that_wait_for_each_other_end(bucket):
  """One is at step 5, the other at 7: both live, and neither can go on."""

  async def work():
    with heart(bucket) as theirs, heart(bucket, policy="main") as own:
      with theirs.waiting("main", "to complete step 5"):
        async with waiting(bucket, [], patience=0.5, heart=own) as other:
          await other.ready(7)

  told = "'sub' has waited .*for this one to complete step 5.*have done 7 steps"
  with pytest.raises(StuckJobsError, match=told):
    asyncio.run(work())


def test_waits_that_pass_are_not_added_up(bucket):
  """The other job answers calls while it waits for the step to be complete."""

  async def work():
    with heart(bucket) as theirs, heart(bucket, policy="main") as own:
      async with waiting(bucket, [], patience=3.0, heart=own) as other:
        for _ in range(5):  # each of them shorter than patience, not all
          with theirs.waiting("main", "to complete step 5"):
            waits = asyncio.create_task(other.wait(lambda: None, "to answer"))
            await asyncio.sleep(0.8)
            assert not waits.done()
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

  asyncio.run(work())


def test_a_job_that_waits_for_a_third_one_is_waited_for(bucket):
  async def work():
    with heart(bucket) as theirs, heart(bucket, policy="main") as own:
      with theirs.waiting("third", "to have done 2 steps"):
        async with waiting(bucket, [], patience=2.0, heart=own) as other:
          waits = asyncio.create_task(other.ready(2))
          await asyncio.sleep(3.0)
          assert not waits.done()
          assert members.read(bucket, "main").waits == "sub"
          theirs.ready(2)
          await asyncio.wait_for(waits, 5)

  asyncio.run(work())


def test_a_job_that_could_not_look_gives_nobody_up(bucket):
  """Its event loop is blocked for longer than patience, as by compiling."""

  async def work():
    async with waiting(bucket, [], patience=2.0) as other:
      with heart(bucket) as beating:
        waits = asyncio.create_task(other.ready(1))
        await asyncio.sleep(0.1)
        time.sleep(4.0)
        await asyncio.sleep(0.2)
        assert not waits.done()
        beating.ready(1)
        await asyncio.wait_for(waits, 5)

  asyncio.run(work())


def test_absence_that_begins_during_a_look_is_no_silence(bucket, monkeypatch):
  """The record is read slowly, and nobody beats while the loop is blocked."""
  read = members.read

  def slowly(*arguments):
    time.sleep(0.3)
    return read(*arguments)

  async def work():
    with heart(bucket):
      pass
    monkeypatch.setattr(members, "read", slowly)
    async with waiting(bucket, [], patience=2.5) as other:
      waits = asyncio.create_task(other.wait(lambda: None, "to answer"))
      await asyncio.sleep(0.1)  # the first look is under way
      time.sleep(4.0)
      blocked = time.monotonic()
      with pytest.raises(AbsentError):
        await waits
      assert time.monotonic() - blocked > 1.5

  asyncio.run(work())


def test_a_bucket_that_answers_slowly_is_no_absence(bucket, monkeypatch):
  """Its silence is borne as long as any other."""

  async def work():
    async with waiting(bucket, [], patience=1.0) as other:
      monkeypatch.setattr(members, "read", lambda *_: time.sleep(3.0))
      with pytest.raises(AbsentError):
        await asyncio.wait_for(other.wait(lambda: None, "to answer"), 8)

  asyncio.run(work())


def test_nobody_looks_where_nobody_waits(bucket, monkeypatch):
  looks = []
  read = members.read
  monkeypatch.setattr(
      members, "read", lambda *some: (looks.append(some), read(*some))[1]
  )

  async def work():
    async with waiting(bucket, [], patience=0.5) as other:
      await asyncio.sleep(0.7)
      assert not looks
      with heart(bucket) as beating:
        beating.ready(1)
        await other.ready(1)
      seen = len(looks)
      await asyncio.sleep(0.7)  # silence in which nobody waited
      assert 0 < seen == len(looks)
      with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(other.wait(lambda: None, "to answer"), 0.3)
      assert len(looks) > seen

  asyncio.run(work())


def test_what_breaks_the_looking_ends_the_wait(bucket, monkeypatch):
  def broken(*_):
    raise AttributeError("a bug")

  async def work():
    async with waiting(bucket, [], patience=30.0) as other:
      monkeypatch.setattr(members, "read", broken)
      await other.wait(lambda: None, "to answer")

  with pytest.raises(AttributeError, match="a bug"):
    asyncio.run(work())


def test_a_record_damaged_on_its_way_is_read_again(bucket):
  reads = 0

  def probe():
    nonlocal reads
    reads += 1
    if reads < 3:
      raise CorruptError("a bit flipped")
    return reads

  async def work():
    with heart(bucket):
      async with waiting(bucket, []) as other:
        return await other.wait(probe, "to answer")

  assert asyncio.run(work()) == 3


def test_a_record_that_stays_damaged_ends_the_wait(bucket):
  def probe():
    raise CorruptError("steps/5.json is damaged")

  async def work():
    with heart(bucket):
      async with waiting(bucket, []) as other:
        await other.wait(probe, "to answer")

  with pytest.raises(CorruptError, match="steps/5.json"):
    asyncio.run(work())


def test_a_job_that_need_not_be_there_is_not_missed(bucket):
  """Its silence counts from when it is first waited for."""
  said = []

  async def work():
    async with waiting(bucket, said, patience=0.5) as sub:
      await asyncio.sleep(1.0)  # it plays no part yet
      sub.expect()
      waits = asyncio.create_task(sub.ready(3))
      await asyncio.sleep(0.2)
      with heart(bucket) as late:
        late.ready(3)
        await waits

  asyncio.run(work())


def test_a_job_that_does_not_come_when_it_is_due_is_missed(bucket):
  async def work():
    async with waiting(bucket, [], patience=0.3) as sub:
      sub.expect()
      began = time.monotonic()
      with pytest.raises(AbsentError, match="job of policy 'sub'"):
        await sub.ready(3)
      assert time.monotonic() - began > 0.25

  asyncio.run(work())
