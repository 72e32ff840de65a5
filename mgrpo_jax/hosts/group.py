"""The processes of a job find each other.

`jax.distributed` ends all of them where one dies, so they are started again
together. Neither its coordination service nor gloo asks who calls: they belong
on a network of their own, or on one machine.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import jax
from jax._src import distributed  # its client has no public name yet
from jax.experimental import multihost_utils

from mgrpo_jax.hosts import signals
from mgrpo_jax.hosts.channel import Channel

_START = 300  # seconds in which all of them come


def join(
    *, coordinator: str, processes: int, process: int, silence: int
) -> None:
  """Joins the other processes of this job; before any device is used.

  Where they do not come in time `jax.distributed` aborts this one (SIGABRT).

  Args:
    coordinator: host:port at which process 0 can be reached and all meet.
    processes: of the job; 1 for this one alone, 0 where the machines know all
      three themselves (TPU slices, Slurm, GKE).
    process: number of this one, 0 for the one that decides.
    silence: seconds without a sign of life of a process, then all end.

  Raises:
    ValueError: an argument is out of range.
    ConnectionError: they cannot come together.
  """
  if processes == 1:
    return
  arguments: dict[str, Any] = {
      "initialization_timeout": _START,
      "heartbeat_timeout_seconds": silence,
      "shutdown_timeout_seconds": silence,
  }
  if processes:
    host, port = _address(coordinator)
    if not 0 <= process < processes:
      raise ValueError(f"--process={process}: allowed: 0 to {processes - 1}")
    arguments |= {
        "coordinator_address": f"{host}:{port}",
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": (
            f"{host}:{port}" if _is_here(host) else f"[::]:{port}"
        ),
    }
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # It would take SIGTERM from Python, which closes files and leaves in order.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    with signals.unheld():  # Python sees none while it waits
      jax.distributed.initialize(**arguments)
  except RuntimeError as error:
    first = str(error).splitlines()[0]
    raise ConnectionError(
        f"the processes of this job did not come together: {first}"
    ) from error


def decides() -> bool:
  """Says whether this process is the one of its job that decides."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def open_channel(patience: float = 0.0) -> Channel | None:
  """Opens the channel between the processes of this job.

  Args:
    patience: seconds that process 0 waits for another to take an order; may be
      set later, see `Channel`.

  Returns:
    The channel; None where this process is all of the job.
  """
  if not jax.distributed.is_initialized():  # takes no device to be found out
    return None
  if jax.process_count() == 1:
    return None
  client = distributed.global_state.client
  assert client is not None  # there are several processes
  return Channel(
      client,
      process=jax.process_index(),
      processes=jax.process_count(),
      patience=patience,
      broadcast=multihost_utils.broadcast_one_to_all,
  )


def _address(coordinator: str) -> tuple[str, int]:
  """Host and port."""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(f"--coordinator={coordinator}: must be HOST:PORT")
  return host, int(port)


def _is_here(host: str) -> bool:
  """Whether a host is this machine's own loopback address."""
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return host == "localhost"
