"""Rollout records."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest

from mgrpo_jax import types
from mgrpo_jax.report import records

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<!--<img src=x onerror=document.title='owned'>-->",
    "\"quotes' & `ticks` \\ \u2028\u2029",
    "\u202eright to left\u202c\u2066isolated\u2069",
    "null\x00bell\x07escape\x1b[31m",
    "half a pair \ud83d and \ude00",
    "https://example.com/x.js",
)


def make_trajectory(rollout, parent, role="main", call=0, **changes):
  """A call of 4 prompt, 3 sampled, 2 result and 2 sampled tokens."""
  mask = np.repeat([0, 1, 0, 1], [4, 3, 2, 2]).astype(np.float32)
  rng = np.random.default_rng([rollout, call, len(role)])
  fields = {
      "task_id": "t",
      "rollout": rollout,
      "role": role,
      "call": call,
      "parent": parent,
      "request": "What?",
      "tokens": rng.integers(0, 50, mask.size).astype(np.int32),
      "loss_mask": mask,
      "sampler_logprobs": -mask * rng.random(mask.size, np.float32),
      "version_min": 3,
      "version_max": 4,
      "status": types.Status.COMPLETED,
      "turns": (),
      "result_text": "Lima",
      "seconds": 0.25,
  }
  return types.Trajectory(**fields | changes)


def make_group(task_id="t", num_rollouts=2, question="Capital of Peru?"):
  """K rollouts, each a main call with one researcher call below it."""
  task = types.Task(
      id=task_id,
      question=question,
      answers=("Lima",),
      stage="easy",
      hops=1,
      evidence=(
          types.Evidence(
              page="peru/government#capital",
              question="capital of Peru",
              query="Peru capital",
              answers=("Lima",),
          ),
      ),
      meta={"kind": "1hop:capital", "places": ("Peru",), "year": np.int32(7)},
  )
  trajectories = []
  for k in range(num_rollouts):
    parent = len(trajectories)
    trajectories.append(make_trajectory(k, -1))
    trajectories.append(make_trajectory(k, parent, "researcher"))
  return types.RolloutGroup(
      task=task,
      num_rollouts=num_rollouts,
      trajectories=tuple(trajectories),
      rollout=np.array([t.rollout for t in trajectories], np.int32),
      parent=np.array([t.parent for t in trajectories], np.int32),
      role=np.array([t.role != "main" for t in trajectories], np.int32),
      call=np.array([t.call for t in trajectories], np.int32),
  )


def pieces_of(role, tokens):
  """Text of tokens, made of hostile strings."""
  return [f"{role[0]}{t}{HOSTILE[t % len(HOSTILE)]}" for t in tokens]


def write(directory, step, groups, *, stage="easy"):
  """Writes groups with a reward of 0, 1, 2, … / 8 per trajectory."""
  sizes = [len(group.trajectories) for group in groups]
  return records.write_step(
      directory,
      step,
      groups,
      rewards=[
          [{"format": 1.0, "correct": 0.5, "total": m / 8} for m in range(n)]
          for n in sizes
      ],
      advantages=[np.linspace(-1, 1, n, dtype=np.float32) for n in sizes],
      pieces=pieces_of,
      stage=stage,
  )


def test_record_keeps_every_field_of_a_trajectory(tmp_path):
  group = make_group(num_rollouts=3)
  read = records.read_step(write(tmp_path, 7, [group, make_group("u")]))
  assert read.problems == ()
  assert [r["task"]["id"] for r in read.groups] == ["t", "u"]
  record = read.groups[0]
  assert (record["step"], record["stage"]) == (7, "easy")
  assert record["task"]["evidence"][0]["page"] == "peru/government#capital"
  assert record["task"]["meta"]["year"] == 7
  for m, (kept, was) in enumerate(
      zip(record["trajectories"], group.trajectories, strict=True)
  ):
    assert kept["tokens"] == was.tokens.tolist()
    assert kept["pieces"] == pieces_of(was.role, was.tokens.tolist())
    assert kept["parent"] == group.parent[m]
    roles = records.token_roles(kept)
    assert roles == (
        ["prompt"] * 4 + ["sampled"] * 3 + ["result"] * 2 + ["sampled"] * 2
    )
    np.testing.assert_allclose(
        kept["logprobs"],
        was.sampler_logprobs[was.loss_mask > 0],
        atol=0.5 * 10**-records.LOGPROB_DECIMALS + 1e-7,
    )
    assert kept["rewards"] == {"format": 1.0, "correct": 0.5, "total": m / 8}
    assert kept["status"] == "COMPLETED"
    for field in ("rollout", "role", "call", "request", "version_min"):
      assert kept[field] == getattr(was, field)
  names = {field for field in was.__dataclass_fields__}
  renamed = {"task_id", "loss_mask", "sampler_logprobs"}
  assert names - renamed - {"account"} <= kept.keys()


def test_record_keeps_what_another_job_told_of_a_call(tmp_path):
  account = types.Account(
      sampled=3, turns=1, format=True, correct=1.0, expert=None, overlong=0.0
  )
  group = make_group(num_rollouts=1)
  told = tuple(
      dataclasses.replace(one, account=account) for one in group.trajectories
  )
  group = dataclasses.replace(group, trajectories=told)
  kept = records.read_step(write(tmp_path, 7, [group])).groups[0]
  assert kept["trajectories"][0]["account"] == dataclasses.asdict(account)


def test_roles_of_tokens_when_nothing_or_the_first_token_was_sampled(tmp_path):
  group = make_group(num_rollouts=1)
  masks = [np.zeros(11, np.float32), np.ones(11, np.float32)]
  trajectories = tuple(
      make_trajectory(0, -1, loss_mask=mask) for mask in masks
  ) + (
      make_trajectory(
          0,
          -1,
          tokens=np.zeros(0, np.int32),
          loss_mask=np.zeros(0, np.float32),
          sampler_logprobs=np.zeros(0, np.float32),
      ),
  )
  group = types.RolloutGroup(
      **vars(group) | {"trajectories": trajectories, "parent": [-1, -1, -1]}
  )
  (record,) = records.read_step(write(tmp_path, 0, [group])).groups
  spans = [t["spans"] for t in record["trajectories"]]
  assert spans == [[["prompt", 11]], [["sampled", 11]], []]


def test_failed_trajectory_has_no_reward_and_no_advantage(tmp_path):
  group = make_group(num_rollouts=1)
  path = records.write_step(
      tmp_path,
      1,
      [group],
      rewards=[[{}, {"total": math.nan}]],
      advantages=[[math.nan, 0.5]],
      pieces=pieces_of,
      stage="hard",
  )
  (record,) = records.read_step(path).groups
  assert record["trajectories"][0]["rewards"] == {}
  assert record["trajectories"][0]["advantage"] is None
  assert record["trajectories"][1]["rewards"] == {"total": None}
  assert record["trajectories"][1]["advantage"] == 0.5


def test_same_rollouts_give_the_same_bytes(tmp_path):
  first = write(tmp_path / "a", 3, [make_group()]).read_bytes()
  assert write(tmp_path / "b", 3, [make_group()]).read_bytes() == first
  assert first[4:8] == bytes(4)  # gzip's header holds no time


def test_mismatched_lengths_are_refused_and_nothing_is_written(tmp_path):
  for name in ("rewards", "advantages"):
    arguments = {"rewards": [[{}] * 4], "advantages": [[0.0] * 4]}
    arguments[name] = [arguments[name][0][:3]]
    with pytest.raises(ValueError, match=rf"{name}: \[3\] .* \[4\]"):
      records.write_step(
          tmp_path, 0, [make_group()], pieces=pieces_of, stage="", **arguments
      )
  assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_no_partial(tmp_path):
  path = write(tmp_path, 5, [make_group()])
  before = path.read_bytes()
  group = make_group()
  odd = types.Task(**vars(group.task) | {"meta": {"set": {1}}})
  with pytest.raises(TypeError, match="set cannot be recorded"):
    write(
        tmp_path, 5, [group, types.RolloutGroup(**vars(group) | {"task": odd})]
    )
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_damaged_records_are_named_skipped_and_counted(tmp_path):
  path = write(tmp_path, 2, [make_group(i) for i in "abcdefghij"])
  lines = gzip.decompress(path.read_bytes()).splitlines()
  broken = [json.loads(line) for line in lines]
  lines[1] = lines[1][:200]
  broken[2]["trajectories"][1]["pieces"].pop()
  broken[3]["trajectories"][0]["parent"] = 5
  del broken[4]["task"]
  broken[5]["trajectories"][0] = ["not", "an", "object"]
  broken[6]["trajectories"][0]["logprobs"].append(0.0)
  broken[7]["trajectories"][3]["parent"] = 0
  for i in range(2, 8):
    lines[i] = json.dumps(broken[i]).encode()
  lines[8] = b"[" * 100_000
  path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
  read = records.read_step(path)
  assert [g["task"]["id"] for g in read.groups] == ["a", "j"]
  assert len(read.problems) == 8
  for i, problem in enumerate(read.problems):
    assert problem.startswith(f"{path.name}: record {i + 2}: ")
  assert "pieces for 11 tokens" in read.problems[1]
  assert "missing task" in read.problems[3]
  assert "belongs to another rollout" in read.problems[6]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("turns", [5]),
        ("turns", {"a": {}}),
        ("rewards", [1.0]),
        ("rewards", {"total": "much"}),
        ("pieces", [None] * 11),
        ("logprobs", "aaaaaa"),
        ("logprobs", [float("nan")] * 6),
        ("tokens", "x"),
        ("tokens", [[]] * 11),
        ("turns", [{}]),
        ("spans", [["sampled", 11.0]]),
        ("spans", [["other", 11]]),
        ("rewards", {"total": 10**400}),
        ("advantage", float("inf")),
        ("seconds", None),
        ("role", []),
        ("version_max", "1"),
        ("status", {}),
        ("parent", None),
        ("rollout", True),
    ],
)
def test_fields_of_another_type_are_a_damaged_record(tmp_path, name, value):
  path = write(tmp_path, 2, [make_group()])
  record = json.loads(gzip.decompress(path.read_bytes()))
  record["trajectories"][0][name] = value
  path.write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
  read = records.read_step(path)
  assert not read.groups
  assert f"trajectory 0: {name} does not hold" in read.problems[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", float("nan")),
        ("step", -1),
        ("trajectories", None),
        ("task", []),
        ("task.meta", None),
        ("task.evidence", [{}]),
        ("task.answers", "Lima"),
        ("task.hops", "2"),
    ],
)
def test_groups_of_another_shape_are_a_damaged_record(tmp_path, key, value):
  path = write(tmp_path, 2, [make_group()])
  record = json.loads(gzip.decompress(path.read_bytes()))
  *above, last = key.split(".")
  (record[above[0]] if above else record)[last] = value
  path.write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
  read = records.read_step(path)
  assert not read.groups
  assert key in read.problems[0]


@pytest.mark.parametrize("count", [10**12, 3, -1, 2.0, "2", None])
def test_a_false_number_of_rollouts_costs_no_memory(tmp_path, count):
  path = write(tmp_path, 2, [make_group(num_rollouts=2)])
  record = json.loads(gzip.decompress(path.read_bytes()))
  record["trajectories"] = record["trajectories"][:2]
  path.write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
  assert len(records.read_step(path).groups) == 1
  record["num_rollouts"] = count
  path.write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
  read = records.read_step(path)
  assert not read.groups
  assert "rollouts of 2 trajectories" in read.problems[0]


def test_truncated_file_gives_its_whole_records(tmp_path):
  groups = [make_group(f"task-{i}", num_rollouts=8) for i in range(40)]
  path = write(tmp_path, 2, groups)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  read = records.read_step(path)
  ids = [group["task"]["id"] for group in read.groups]
  assert 0 < len(ids) < 40
  assert ids == [f"task-{i}" for i in range(len(ids))]
  assert len(read.problems) == 1 and path.name in read.problems[0]
  path.write_bytes(b"not gzip at all")
  assert len(records.read_step(path).problems) == 1
  with pytest.raises(OSError):
    records.read_step(tmp_path / "step_000009.jsonl.gz")


def test_steps_are_listed_in_order_and_removed_after_a_resume(tmp_path):
  assert records.list_steps(tmp_path / "absent") == {}
  assert records.remove_after(tmp_path / "absent", 0) == 0
  for step in (10, 2, 1_000_000):
    write(tmp_path, step, [make_group()])
  other = tmp_path / "notes.txt"
  other.write_text("kept")
  torn = tmp_path / ".step_000011.jsonl.gz.77.0.partial"
  torn.write_bytes(b"")
  assert list(records.list_steps(tmp_path)) == [2, 10, 1_000_000]
  assert records.remove_after(tmp_path, 2) == 2
  assert list(records.list_steps(tmp_path)) == [2]
  assert other.exists() and not torn.exists()
