"""What `bench.train` trains on: rows, calls of mixed length, recorded calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.bench.decode import POLICIES
from experiments.bench.workers import traffic
from mgrpo_jax.types import NO_PARENT, Status, Trajectory

ROWS, LENGTH = 8, 256
RAGGED = 24  # trajectories
TASKS, GROUP = 2, 8  # recorded tasks, rollouts of each
_VOCABULARY = POLICIES["smollm2"].vocab_size

Part = tuple[int, int] | tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What is trained on, and how it is laid out here.

  Attributes:
    calls: in the order in which they come.
    row_tokens: of a packed row.
    row_targets: sampled tokens of a packed row, at most.
    least_shared: see `packing.BatchShape`.
    prompts: whether the peer's head leaves out what is before the first
      sampled token of its rows.
  """

  calls: Sequence[Trajectory]
  row_tokens: int
  row_targets: int
  least_shared: int = 0
  prompts: bool = False


def full(rng: np.random.Generator, times: int) -> Load:
  """Makes rows of equal length in which all tokens but the first count.

  Args:
    rng: of the tokens.
    times: size, in units of 8 rows.

  Returns:
    The load.
  """
  calls = [_trajectory(rng, n, [(1, LENGTH - 1)]) for n in range(times * ROWS)]
  return Load(calls=calls, row_tokens=LENGTH, row_targets=LENGTH)


def ragged(rng: np.random.Generator, times: int) -> Load:
  """Makes agent calls: a prompt, then turns of sampled tokens and results.

  Args:
    rng: of lengths and tokens.
    times: size, in units of 24 calls.

  Returns:
    The load.
  """
  calls = []
  for number in range(times * RAGGED):
    prompt = int(np.clip(rng.lognormal(3.4, 0.5), 12, 100))
    parts: list[Part] = [(prompt, int(np.clip(rng.lognormal(2.2, 0.6), 3, 40)))]
    for _ in range(rng.integers(0, 4)):
      result = int(np.clip(rng.lognormal(3.0, 0.5), 5, 60))
      parts.append((result, int(np.clip(rng.lognormal(2.0, 0.6), 3, 30))))
    calls.append(_trajectory(rng, number, parts))
  fitting = [call for call in calls if len(call.tokens) <= LENGTH]
  return Load(calls=fitting, row_tokens=LENGTH, row_targets=80)


def group(
    rng: np.random.Generator, times: int, recorded: Sequence[traffic.Call]
) -> Load:
  """Makes the calls of groups of rollouts, of prompts as they were recorded.

  One policy plays all roles; its callers come first, then those they called,
  so that no role's calls are padded to another's.

  Args:
    rng: of the tokens that are sampled.
    times: size, in units of two tasks.
    recorded: a task's root call each.

  Returns:
    The load.

  Raises:
    ValueError: fewer tasks were recorded.
  """
  if len(recorded) < times * TASKS:
    raise ValueError(
        f"times must be at most {len(recorded) // TASKS}, got {times}"
    )
  levels = [
      one
      for root in recorded[: times * TASKS]
      for _ in range(GROUP)
      for one in _calls(root, 0)
  ]
  ordered = sorted(levels, key=lambda one: one[0])
  calls = [
      _trajectory(rng, number, list(_parts(call)))
      for number, (_, call) in enumerate(ordered)
  ]
  return Load(
      calls=calls,
      row_tokens=1280,
      row_targets=512,
      least_shared=8,
      prompts=True,
  )


def _calls(
    call: traffic.Call, depth: int
) -> Iterator[tuple[int, traffic.Call]]:
  """A call and those that it makes, with how deep each is in the tree."""
  yield depth, call
  for turn in call["turns"]:
    for child in turn["calls"]:
      yield from _calls(child, depth + 1)


def _parts(call: traffic.Call) -> Iterator[Part]:
  """What a call is given, and how many tokens it then samples."""
  given = call["prompt"]
  for turn in call["turns"]:
    yield np.asarray(given, np.int32), turn["sampled"]
    given = turn["result"]


def _trajectory(
    rng: np.random.Generator, number: int, parts: Sequence[Part]
) -> Trajectory:
  """A call of (unsampled, sampled) stretches; random where not given."""
  pieces, masks = [], []
  for given, sampled in parts:
    before = given if isinstance(given, int) else len(given)
    masks.append(np.repeat(np.array([0, 1], np.float32), (before, sampled)))
    drawn = rng.integers(_VOCABULARY, size=before + sampled, dtype=np.int32)
    if not isinstance(given, int):
      drawn[:before] = given
    pieces.append(drawn)
  mask = np.concatenate(masks)
  return Trajectory(
      task_id=f"t{number}",
      rollout=0,
      role="main",
      call=0,
      parent=NO_PARENT,
      request="",
      tokens=np.concatenate(pieces),
      loss_mask=mask,
      sampler_logprobs=np.zeros(len(mask), np.float32),
      version_min=0,
      version_max=0,
      status=Status.COMPLETED,
      turns=(),
      result_text="",
      seconds=0.0,
  )
