"""Runs the other jobs of a team beside this process, which is the root's."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from experiments import fleet, jobs
from experiments.fleet import FleetError, Group, Plan


def recipe_arguments(arguments: Sequence[str]) -> list[str]:
  """Picks the arguments that give the recipe.

  Args:
    arguments: of this process.

  Returns:
    `--config`, `--config.key` and their values.
  """
  found: list[str] = []
  takes_value = False
  for one in arguments:
    name, equals, _ = one.partition("=")
    is_recipe = name.lstrip("-").partition(".")[0] == "config"
    if takes_value or (one.startswith("-") and is_recipe):
      found.append(one)
      takes_value = not takes_value and not equals
  return found


@contextlib.contextmanager
def others(
    plans: Sequence[Plan], *, token: str, tell: Callable[[str], None]
) -> Iterator[None]:
  """Runs the other jobs of a team while it is entered, a process each.

  A job that dies is started again, a few times; then the body is ended as by
  SIGTERM, so that it closes its files, and the error of that job raised.

  Args:
    plans: of the jobs.
    token: that they show each other; handed on in their environment.
    tell: takes a line.

  Yields:
    Nothing.

  Raises:
    CutOffError: a job did not end well after the leader has.
    FleetError: a job died more often than it may, or was used wrongly.
    OSError: a job cannot be started.
    StorageError: one that an earlier command started still runs.
  """
  groups = [Group(plan, hosts=1, token=token, tell=tell) for plan in plans]
  for group in groups:
    group.wait_until_free()
  over, lock = threading.Event(), threading.Lock()
  lost: list[FleetError | OSError] = []
  watching = threading.Thread(
      target=_watch, args=(groups, over, lock, tell, lost), daemon=True
  )
  try:
    try:
      for group, plan in zip(groups, plans, strict=True):
        group.start()
        tell(
            f"job of policy {plan.policy!r}: runs in {plan.directory}, prints"
            f" to {plan.log_of(0, 1)}"
        )
      watching.start()
      yield
    finally:
      with lock:  # from here on nobody signals
        over.set()
      if watching.is_alive():
        watching.join()
    fleet.attend(groups, every=fleet.LOOK, ended=True)
  except BaseException as error:
    if lost:  # whatever came of ending the body
      raise lost[0] from error
    raise
  finally:
    over.set()  # a second Ctrl-C does not wait above
    jobs.stop([one.process for group in groups for one in group.running])


def _watch(
    groups: Sequence[Group],
    over: threading.Event,
    lock: threading.Lock,
    tell: Callable[[str], None],
    lost: list[FleetError | OSError],
) -> None:
  """Starts again what died; where it may not, notes it and ends the body."""
  while not over.wait(fleet.LOOK):
    try:
      for group in groups:
        group.look()
    except (FleetError, OSError) as error:
      tell(str(error))
      with lock:
        if not over.is_set():  # else the body has ended by itself
          lost.append(error)
          os.kill(os.getpid(), signal.SIGTERM)
      return
