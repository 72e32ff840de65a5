"""The shape of a rollout record, and the check that a record has it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

from mgrpo_jax.report import shapes
from mgrpo_jax.report.shapes import Check, is_number, is_text, is_whole
from mgrpo_jax.types import NO_PARENT, Status

FORMAT = 1

TokenRole = Literal["prompt", "sampled", "result"]


class TrajectoryRecord(TypedDict):
  """One agent call, T tokens of which S were sampled."""

  rollout: int
  role: str
  call: int
  parent: int  # position in the group's trajectories, -1 for a root
  request: str
  tokens: list[int]  # [T]
  pieces: list[str]  # [T] text of each token
  spans: list[tuple[TokenRole, int]]  # run lengths of token roles, sum T
  logprobs: list[float]  # [S] nats, sampler's, rounded to 4 decimals
  version_min: int
  version_max: int
  status: str  # name of a `Status`
  turns: list[dict[str, str]]  # the fields of `Turn`
  result_text: str
  seconds: float
  rewards: dict[str, float | None]  # components and "total"; empty if FAILED
  advantage: float | None  # None where the update did not see the call
  attempt: NotRequired[int]  # at its sub-task; files of before lack it
  account: NotRequired[dict[str, Any]]  # of a call whose tokens another job has


class GroupRecord(TypedDict):
  """The K rollouts of one task at one step."""

  format: int
  step: int
  stage: str  # of the curriculum
  task: dict[str, Any]  # the fields of `Task`
  num_rollouts: int
  trajectories: list[TrajectoryRecord]


_GROUP: Mapping[str, Check] = {
    "step": shapes.is_count,
    "stage": is_text,
    "trajectories": shapes.list_of(shapes.object_of({})),
}
_TASK: Mapping[str, Check] = {
    "id": is_text,
    "question": is_text,
    "answers": shapes.list_of(is_text),
    "stage": is_text,
    "hops": is_whole,
    "evidence": shapes.list_of(
        shapes.object_of(
            {
                "page": is_text,
                "question": is_text,
                "query": is_text,
                "answers": shapes.list_of(is_text),
            }
        )
    ),
    "meta": shapes.object_of({}),
}
_TRAJECTORY: Mapping[str, Check] = {
    "rollout": is_whole,
    "role": is_text,
    "call": is_whole,
    "parent": is_whole,
    "request": is_text,
    "tokens": shapes.list_of(is_whole),
    "pieces": shapes.list_of(is_text),
    "spans": shapes.list_of(
        shapes.tuple_of(
            shapes.one_of("prompt", "sampled", "result"), shapes.is_count
        )
    ),
    "logprobs": shapes.list_of(is_number),
    "version_min": is_whole,
    "version_max": is_whole,
    "status": shapes.one_of(*(status.name for status in Status)),
    "turns": shapes.list_of(
        shapes.object_of(
            {
                "kind": shapes.one_of("tool", "call", "answer", "malformed"),
                "name": is_text,
                "argument": is_text,
                "result": is_text,
                "page": is_text,
            }
        )
    ),
    "result_text": is_text,
    "seconds": is_number,
    "rewards": shapes.mapping_of(shapes.optional(is_number)),
    "advantage": shapes.optional(is_number),
}


def checked(record: Any) -> GroupRecord:
  """Returns a record that has the promised shape.

  Args:
    record: what JSON gave back.

  Returns:
    The same object.

  Raises:
    ValueError: it has another shape; says where.
  """
  if not isinstance(record, dict) or record.get("format") != FORMAT:
    raise ValueError(f"not a rollout record of format {FORMAT}")
  missing = sorted(GroupRecord.__required_keys__ - record.keys())
  if missing:
    raise ValueError(f"missing {', '.join(missing)}")
  if wrong := shapes.misfits(record, _GROUP):
    raise ValueError(f"{wrong[0]} does not hold what it should")
  task, calls = record["task"], record["trajectories"]
  if not isinstance(task, dict):
    raise ValueError("task is no object")
  if wrong := shapes.misfits(task, _TASK):
    raise ValueError(f"task.{wrong[0]} does not hold what it should")
  count = record["num_rollouts"]
  if type(count) is not int or not 0 <= count <= len(calls):
    raise ValueError(f"{count!r} rollouts of {len(calls)} trajectories")
  for position, call in enumerate(calls):
    problem = _trajectory_problem(call, calls[:position], count)
    if problem:
      raise ValueError(f"trajectory {position}: {problem}")
  return cast(GroupRecord, record)


def _trajectory_problem(
    trajectory: Mapping[str, Any], earlier: Sequence[Any], num_rollouts: int
) -> str:
  """Says what is wrong with a trajectory's record; empty if nothing is."""
  missing = sorted(TrajectoryRecord.__required_keys__ - trajectory.keys())
  if missing:
    return f"missing {', '.join(missing)}"
  if wrong := shapes.misfits(trajectory, _TRAJECTORY):
    return f"{wrong[0]} does not hold what it should"
  if not 0 <= trajectory["rollout"] < num_rollouts:
    return f"rollout {trajectory['rollout']} of {num_rollouts}"
  return _length_problem(trajectory) or _place_problem(trajectory, earlier)


def _length_problem(trajectory: Mapping[str, Any]) -> str:
  """Says which field is of another length than promised."""
  length = len(trajectory["tokens"])
  if len(trajectory["pieces"]) != length:
    return f"{len(trajectory['pieces'])} pieces for {length} tokens"
  if sum(n for _, n in trajectory["spans"]) != length:
    return f"spans do not cover {length} tokens"
  sampled = sum(n for role, n in trajectory["spans"] if role == "sampled")
  if len(trajectory["logprobs"]) != sampled:
    return f"{len(trajectory['logprobs'])} log-probs for {sampled} samples"
  return ""


def _place_problem(
    trajectory: Mapping[str, Any], earlier: Sequence[Any]
) -> str:
  """Says what is wrong with where in the tree it stands."""
  parent = trajectory["parent"]
  if not NO_PARENT <= parent < len(earlier):
    return f"parent {parent} is not an earlier trajectory"
  if parent >= 0 and earlier[parent]["rollout"] != trajectory["rollout"]:
    return f"parent {parent} belongs to another rollout"
  return ""
