"""Frames between processes: who is silent, lost or wrong is named."""

import asyncio
import socket
import threading

import jax
import numpy as np
import pytest

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import links, orders
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.links import Crew, Kind, Link
from mgrpo_jax.sampler.schedule import Schedule
from mgrpo_jax.sampler.sizes import Sizes
from mgrpo_jax.sampler.slots import Request

SIZES = {
    "num_slots": 3,
    "context": 32,
    "block": 16,
    "prefill_tokens": 16,
    "prefill_buckets": (4, 8),
    "decode_steps": 2,
    "decode_rows": 0,
}
SECRET = bytes(range(32))


def pair(deadline=20.0):
  """Two ends: of a crew's process 1, and of that process."""
  near, far = socket.socketpair()
  return (
      Link(near, peer="process 1", deadline=deadline),
      Link(far, peer="process 0", deadline=deadline),
  )


def planned(loop):
  """A visit with prefills of both buckets and a copy."""
  schedule = Schedule(
      3,
      **{k: SIZES[k] for k in ("num_slots", "context", "prefill_tokens")},
      **{k: SIZES[k] for k in ("prefill_buckets", "decode_steps")},
  )
  sampling = Sampling(
      temperature=0.5, max_new_tokens=5, stop_ids=(1, 2), top_k=7, top_p=0.9
  )
  for length in (4, 9, 9):
    schedule.add(
        Request(
            tokens=np.arange(length, dtype=np.int32) + 5,
            sampling=sampling,
            seed=(2**32 - 1, length),
            session=None,
            tenant="",
            limit=20,
            future=loop.create_future(),
        )
    )
  return schedule.plan().orders


@pytest.fixture
def visit():
  loop = asyncio.new_event_loop()
  yield planned(loop)
  loop.close()


def test_orders_come_back_as_they_were(visit):
  assert len(visit.prefills) == 2 and visit.copies  # else it shows little
  read = orders.unpack(orders.pack(visit), sizes=Sizes(**SIZES))
  assert (read.version, read.copies) == (3, list(visit.copies))
  for one, other in zip(visit.prefills, read.prefills, strict=True):
    for name in ("tokens", "lengths", "slots", "starts"):
      np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
      assert getattr(other, name).dtype == np.int32
  jax.tree.map(np.testing.assert_array_equal, visit.slots, read.slots)
  kinds = [x.dtype for x in jax.tree.leaves(visit.slots)]
  assert kinds == [x.dtype for x in jax.tree.leaves(read.slots)]


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"num_slots": 4}, "expects at least"),
        ({"num_slots": 2}, "of which an engine of these sizes expects"),
        ({"prefill_buckets": (8, 16)}, r"a prefill of 4 x 4 tokens.*\(2, 8\)"),
        ({"prefill_tokens": 32}, "a prefill of"),
    ],
)
def test_orders_of_another_engine_are_refused(visit, change, hint):
  with pytest.raises(ValueError, match=hint):
    orders.unpack(orders.pack(visit), sizes=Sizes(**SIZES | change))


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_orders_cut_off_are_refused(visit, kept):
  with pytest.raises(ValueError, match="expects at least"):
    orders.unpack(orders.pack(visit)[:kept], sizes=Sizes(**SIZES))


def test_a_frame_arrives_whole_and_signs_of_life_are_passed_over():
  near, far = pair()
  body = np.random.default_rng(0).bytes(3_000_000)
  sender = threading.Thread(
      target=lambda: (near.send(Kind.ALIVE), near.send(Kind.ORDERS, body))
  )
  sender.start()
  assert far.receive() == (Kind.ORDERS, body)
  sender.join()


def test_a_silent_a_lost_and_a_foreign_peer_are_named():
  near, far = pair(deadline=0.1)
  with pytest.raises(EngineError, match="process 0 has not been heard of for"):
    far.receive()
  near.close()
  with pytest.raises(EngineError, match="process 0 is gone"):
    far.receive()
  raw, other = socket.socketpair()
  raw.sendall(b"GET / HTTP/1.1")
  with pytest.raises(EngineError, match="another language"):
    Link(other, peer="process 0", deadline=5.0).receive()


def test_a_crew_gives_signs_of_life_until_it_is_closed():
  near, far = socket.socketpair()
  far.settimeout(60.0)
  crew = Crew([Link(near, peer="process 1", deadline=60.0)], deadline=0.1)
  alive = bytes(4) + bytes([Kind.ALIVE])  # nothing follows
  seen = b""
  while len(seen) < 5 * len(alive):
    seen += far.recv(1)
  crew.close()
  while part := far.recv(100):
    seen += part
  assert seen == alive * (len(seen) // len(alive))


def test_nobody_begins_what_somebody_cannot_do():
  ends = [pair(), pair()]
  crew = Crew([near for near, _ in ends], deadline=20.0)
  began = []

  def obey(link, able):
    link.receive()
    if not able:
      link.send(Kind.FAILED, b"no room")
      return
    try:
      link.ready()
    except EngineError as error:
      began.append(str(error))

  threads = [
      threading.Thread(target=obey, args=(far, able))
      for (_, far), able in zip(ends, (True, False), strict=True)
  ]
  for thread in threads:
    thread.start()
  with pytest.raises(EngineError, match="failed: no room"):
    crew.ask(Kind.ORDERS)
  crew.tell(Kind.FAILED, b"process 1 failed: no room")
  for thread in threads:
    thread.join()
  assert began == ["process 0 failed: process 1 failed: no room"]
  crew.close()


def test_only_who_knows_the_secret_is_let_in():
  with socket.create_server(("127.0.0.1", 0)) as server:
    where = server.getsockname()
    strangers = [
        links.call(where, bytes(32), 1, 5.0),
        links.call(where, SECRET, 7, 5.0),  # no such process
    ]
    own = links.call(where, SECRET, 1, 5.0)
    (link,) = links.accept(server, SECRET, {1}, 5.0)
    link.send(Kind.END)
    assert own.receive() == (Kind.END, b"")
    for stranger in strangers:
      with pytest.raises(EngineError, match="process 0 is gone"):
        stranger.receive()
      stranger.close()
    own.close()
    link.close()
    with pytest.raises(EngineError, match=r"processes \[1\] did not come"):
      links.accept(server, SECRET, {1}, 0.1)
  with pytest.raises(EngineError, match="cannot be reached"):
    links.call(where, SECRET, 1, 5.0)
