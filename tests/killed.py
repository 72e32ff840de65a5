"""Writers that are killed at random moments; run by the tests as a process.

    python killed.py publish|differences|checkpoint DIRECTORY ROUNDS SEED

Each round forks a child that writes as fast as it can, kills it with SIGKILL
at a random moment of its third or fourth write, prints a line and waits for
one.
"""

import os
import pathlib
import random
import signal
import sys
import time

import numpy as np

from mgrpo_jax import bases, checkpoint, publish, store

SHAPES = {"a": (40, 50), "b": (7,), "c": (3, 3, 3), "d": (400_000,)}


def tree(number: int) -> dict[str, np.ndarray]:
  """Returns weights that know which version they are of."""
  return {k: np.full(s, number, np.float32) for k, s in SHAPES.items()}


def publish_forever(
    directory: pathlib.Path, report: int, whole_every: int = 1
) -> None:
  """Publishes version after version, from where the last one stopped."""
  held = bases.Bases(whole_every)
  bucket = store.open_folder(directory)
  newest = publish.latest(bucket, "main")
  number = 0 if newest is None else newest.number + 1
  while True:
    publish.publish(
        bucket,
        "main",
        number,
        tree(number),
        keep=2,
        meta={"n": number},
        bases=held,
    )
    os.write(report, b".")
    number += 1


def save_forever(directory: pathlib.Path, report: int) -> None:
  """Saves step after step, from where the last one stopped."""
  saved = checkpoint.Checkpoints(directory, max_to_keep=2)
  step = max(saved.steps(), default=-1) + 1
  while True:
    states = {"main": tree(step), "researcher": tree(step + 1)}
    saved.save(step, states, {"step": step})  # waits for the one before
    os.write(report, b".")
    step += 1


def publish_differences(directory: pathlib.Path, report: int) -> None:
  """Publishes versions, two of three as differences to the third."""
  publish_forever(directory, report, whole_every=3)


WORK = {
    "publish": publish_forever,
    "differences": publish_differences,
    "checkpoint": save_forever,
}


def main() -> None:
  what, directory, rounds, seed = sys.argv[1:]
  rng = random.Random(int(seed))
  for _ in range(int(rounds)):
    listen, report = os.pipe()
    child = os.fork()
    if child == 0:
      WORK[what](pathlib.Path(directory), report)
    os.read(listen, 1)
    begin = time.monotonic()
    os.read(listen, 1)
    time.sleep(rng.uniform(0, 2 * (time.monotonic() - begin)))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(listen)
    os.close(report)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer failed"
    print("killed", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
  main()
