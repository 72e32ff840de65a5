"""How an engine's processes find each other, and speak: frames over TCP.

A process that waits for orders must not wait on its device, which others use
meanwhile; so orders go from host to host. A frame is a length, a kind and some
bytes. Process 0 tells every process its address and a secret in a collective
of `jax.distributed`, so there is nothing to configure but an address of its
own, and nobody else can join. What is sent is neither pickled nor encrypted:
like the collectives, it belongs on a network of its own.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgrpo_jax.sampler.interface import EngineError

_HEAD = struct.Struct("<IB")  # bytes of the frame's body, kind
_GREETING = struct.Struct("<32sI")  # secret, number of the process
_LARGEST = 64 << 20  # bytes of a frame's body
_CARD = 256  # bytes in which address, port and secret are told
_GREETING_TIME = 5.0  # seconds that a caller has to say the secret
_BEATS = 4  # signs of life in the time after which one is missed


class Kind(enum.IntEnum):
  """What a frame says."""

  TERMS = 1  # by process 0: the sizes that all must have
  ORDERS = 2  # by process 0: what to do now
  WEIGHTS = 3  # by process 0: sample from this version from now on
  READY = 4  # by the others: understood
  GO = 5  # by process 0: all are ready
  ALIVE = 6  # by process 0: nothing new
  END = 7  # by process 0: its engine was left
  FAILED = 8  # by any: why it cannot go on


class Link:
  """One end of a connection between two processes."""

  def __init__(
      self, connection: socket.socket, *, peer: str, deadline: float
  ) -> None:
    """Takes a connection over.

    Args:
      connection: closed with the link.
      peer: how errors call the other end.
      deadline: seconds after which a silent peer is lost.
    """
    connection.settimeout(deadline)
    if connection.family != socket.AF_UNIX:
      connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.peer, self.deadline = peer, deadline
    self._connection = connection
    self._sending = threading.Lock()

  def send(self, kind: Kind, body: bytes = b"") -> None:
    """Sends a frame; from any thread.

    Args:
      kind: of the frame.
      body: what it says.

    Raises:
      EngineError: the peer is lost.
    """
    with self._sending, self._losing():
      self._connection.sendall(_HEAD.pack(len(body), kind) + body)

  def receive(self) -> tuple[Kind, bytes]:
    """Waits for a frame that says more than that the peer is alive.

    Returns:
      Its kind and body.

    Raises:
      EngineError: the peer is lost, was silent for `deadline` seconds, says
        why it cannot go on, or speaks another language.
    """
    while True:
      with self._losing():
        size, number = _HEAD.unpack(_read(self._connection, _HEAD.size))
        if size > _LARGEST or number not in set(Kind):
          raise EngineError(f"{self.peer} speaks another language")
        body = _read(self._connection, size)
      if number == Kind.FAILED:
        raise EngineError(f"{self.peer} failed: {body.decode()}")
      if number != Kind.ALIVE:
        return Kind(number), body

  def ready(self) -> None:
    """Says that what was asked can be done, and waits until all can do it.

    Raises:
      EngineError: the peer is lost, or another process cannot.
    """
    self.send(Kind.READY)
    kind, _ = self.receive()
    if kind != Kind.GO:
      raise EngineError(f"{self.peer} says {kind.name} instead of GO")

  def close(self) -> None:
    """Hangs up."""
    self._connection.close()

  @contextlib.contextmanager
  def _losing(self) -> Iterator[None]:
    """Names the peer where the connection breaks."""
    try:
      yield
    except TimeoutError as error:
      raise EngineError(
          f"{self.peer} has not been heard of for {self.deadline:g} s"
      ) from error
    except OSError as error:
      raise EngineError(f"{self.peer} is gone: {error}") from error


class Crew:
  """Process 0's links to all other processes of a job, for one engine.

  As long as it is open, the others are told every now and then that this
  process is alive.
  """

  def __init__(self, links: Sequence[Link], *, deadline: float) -> None:
    """Starts to tell that this process is alive.

    Args:
      links: to the others.
      deadline: seconds after which they give a silent process up.
    """
    self._links = tuple(links)
    self._closed = threading.Event()
    threading.Thread(
        target=self._beat, args=(deadline / _BEATS,), name="crew", daemon=True
    ).start()

  def ask(self, kind: Kind, body: bytes = b"") -> None:
    """Tells everybody to do something, once all are ready for it.

    So nobody begins, and then waits on its device, what another cannot do.

    Args:
      kind: of the frame.
      body: what it says.

    Raises:
      EngineError: somebody is lost, or not ready, and why.
    """
    for link in self._links:
      link.send(kind, body)
    for link in self._links:
      answer, _ = link.receive()
      if answer != Kind.READY:
        raise EngineError(f"{link.peer} answers {answer.name}, not READY")
    for link in self._links:
      link.send(Kind.GO)

  def tell(self, kind: Kind, body: bytes = b"") -> None:
    """Tells everybody something; whoever is lost does not hear it.

    Args:
      kind: of the frame.
      body: what it says.
    """
    for link in self._links:
      with contextlib.suppress(EngineError):  # the next `ask` finds out
        link.send(kind, body)

  def close(self) -> None:
    """Hangs up on everybody."""
    self._closed.set()
    for link in self._links:
      link.close()

  def _beat(self, pause: float) -> None:
    """Gives signs of life; the thread's function."""
    while not self._closed.wait(pause):
      self.tell(Kind.ALIVE)


def gather(*, address: str, deadline: float) -> Crew:
  """Lets the other processes of this job find process 0, where it is called.

  They call `join` at the same point of their program: both are a collective
  of all processes. For each engine anew.

  Args:
    address: of this host, numeric, as the others reach it; 127.0.0.1 if all
      processes run on this machine.
    deadline: seconds that they have to come, and after which a silent process
      is lost.

  Returns:
    Links to all of them; to be closed.

  Raises:
    EngineError: some do not come.
    OSError: this host has no such address.
    ValueError: there is no other process, or this is not process 0.
  """
  others = set(range(1, jax.process_count()))
  if not others or jax.process_index():
    raise ValueError(
        "gather is for process 0 of several, this is"
        f" {jax.process_index()} of {jax.process_count()}"
    )
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  with socket.create_server((address, 0), family=family) as server:
    secret = secrets.token_bytes(32)
    port = server.getsockname()[1]
    card = f"{address} {port} {secret.hex()}".encode().ljust(_CARD)
    multihost_utils.broadcast_one_to_all(np.frombuffer(card, np.uint8))
    return Crew(accept(server, secret, others, deadline), deadline=deadline)


def join(*, deadline: float) -> Link:
  """Finds process 0, which calls `gather`.

  Args:
    deadline: seconds after which a silent process 0 is lost; at least as many
      as it was told.

  Returns:
    The link to it; to be closed.

  Raises:
    EngineError: it cannot be reached.
  """
  empty = np.zeros(_CARD, np.uint8)
  card = np.asarray(multihost_utils.broadcast_one_to_all(empty), np.uint8)
  address, port, secret = card.tobytes().decode().split()
  return call(
      (address, int(port)), bytes.fromhex(secret), jax.process_index(), deadline
  )


def call(
    where: tuple[str, int], secret: bytes, number: int, deadline: float
) -> Link:
  """Connects to who accepts.

  Args:
    where: address and port.
    secret: 32 bytes that let one in.
    number: of this process.
    deadline: seconds, see `join`.

  Returns:
    The link.

  Raises:
    EngineError: there is nobody.
  """
  try:
    connection = socket.create_connection(where, timeout=deadline)
    connection.sendall(_GREETING.pack(secret, number))
  except OSError as error:
    raise EngineError(f"process 0 cannot be reached: {error}") from error
  return Link(connection, peer="process 0", deadline=deadline)


def accept(
    server: socket.socket, secret: bytes, others: set[int], deadline: float
) -> list[Link]:
  """Waits for all others to call; who does not know the secret is left out.

  Args:
    server: that listens.
    secret: 32 bytes that they know.
    others: their numbers.
    deadline: seconds that they have.

  Returns:
    Links, by number.

  Raises:
    EngineError: some do not come, saying which.
  """
  came: dict[int, Link] = {}
  end = time.monotonic() + deadline
  while missing := others - came.keys():
    server.settimeout(max(0.01, end - time.monotonic()))
    try:
      connection, _ = server.accept()
    except TimeoutError as error:
      for link in came.values():
        link.close()
      raise EngineError(
          f"processes {sorted(missing)} did not come within {deadline:g} s"
      ) from error
    number = _greeted(connection, secret)
    if number in missing:
      came[number] = Link(
          connection, peer=f"process {number}", deadline=deadline
      )
    else:
      connection.close()
  return [came[number] for number in sorted(came)]


def _greeted(connection: socket.socket, secret: bytes) -> int:
  """Which process is calling; -1 for anybody else."""
  connection.settimeout(_GREETING_TIME)
  try:
    told, number = _GREETING.unpack(_read(connection, _GREETING.size))
  except OSError:
    return -1
  return number if hmac.compare_digest(told, secret) else -1


def _read(connection: socket.socket, size: int) -> bytes:
  """Reads so many bytes; raises ConnectionError where there are fewer."""
  parts, left = [], size
  while left:
    part = connection.recv(min(left, 1 << 20))
    if not part:
      raise ConnectionError("it hung up")
    parts.append(part)
    left -= len(part)
  return b"".join(parts)
