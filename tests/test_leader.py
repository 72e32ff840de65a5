"""What the jobs of a step ask of the bucket, and that nobody waits in turn."""

import asyncio
import collections
import contextlib
import time
import types

import pytest
from test_peer import heart

from experiments.bench import records, scaling
from mgrpo_jax import store
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.decoupled import members
from mgrpo_jax.decoupled.follower import Follower
from mgrpo_jax.decoupled.leader import Leader
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.run import Run

STEP = 0
GROUPS, SCORES = records.played(scaling.Work(rollouts=8, calls=2))
FOLLOWERS = ("researcher", "reader", "writer")
STAGE = types.SimpleNamespace(objective="reinforce")


def number(bucket, ours):
  """How many requests there were, looks at another's record counted once."""
  looked = {key for key in bucket.asked if key.startswith("members/")}
  looked.discard(members.key(ours))
  return len([key for key in bucket.asked if key not in looked]) + len(looked)


def job(kind, policy, bucket, peers, beating, tmp_path):
  """A job that samples nothing and trains nothing, but tells and looks."""
  roles = [
      types.SimpleNamespace(name=n, policy=n) for n in ("main", *FOLLOWERS)
  ]

  class Team(dict):
    policies = tuple(role.policy for role in roles)
    root = "main"

  team = Team({role.name: role for role in roles})
  team.roles = roles
  made = object.__new__(kind)
  made.__dict__ |= {
      "_peers": peers,
      "_heart": beating,
      "_board": records.board_of(bucket, tmp_path / policy),
      "_spool": types.SimpleNamespace(
          read=lambda step: None, write=lambda *_: None
      ),
      "_traffic": types.SimpleNamespace(calls=0, text_bytes=0),
      "_told": collections.deque(),
      "_step": STEP,
      "desk": types.SimpleNamespace(open=lambda done: None, close=lambda: None),
      "setup": types.SimpleNamespace(team_in=lambda stage: team, team=team),
      "resources": types.SimpleNamespace(learners={policy: None}),
      "drawing": types.SimpleNamespace(
          timed=lambda name: contextlib.nullcontext(), values={}
      ),
      "meter": types.SimpleNamespace(
          values={}, work=types.SimpleNamespace(trained_tokens=0)
      ),
  }
  return made


@pytest.fixture(autouse=True)
def nothing_is_played(monkeypatch):
  async def rolled_out(*_):
    return list(GROUPS)

  monkeypatch.setattr(Run, "_roll_out", rolled_out)
  monkeypatch.setattr(Run, "_scored", lambda *_: SCORES)
  monkeypatch.setattr(Run, "update", lambda *_: {})
  monkeypatch.setattr(Leader, "_filled", lambda self, group, *_: group)
  monkeypatch.setattr(Follower, "_group", lambda self, told, *_: GROUPS[0])


async def step(made):
  """A step of a job, as far as others hear of it."""
  tasks = [group.task for group in GROUPS]
  await made._rolled_out(STAGE, tasks, STEP, seed=1)
  made.update(STAGE, 0, GROUPS, {})


@contextlib.asynccontextmanager
async def looking_at(bucket, policies):
  """Peers of the policies' jobs."""
  async with contextlib.AsyncExitStack() as stack:
    yield {
        policy: await stack.enter_async_context(
            Peer(
                bucket,
                policy,
                token="",
                patience=60.0,
                timeout=10.0,
                max_concurrent=1,
                tell=print,
            )
        )
        for policy in policies
    }


def test_a_steps_requests_are_those_of_the_model(tmp_path):
  real = store.open_folder(tmp_path / "bucket")
  buckets = {name: records.Counted(real) for name in ("main", *FOLLOWERS)}

  async def work():
    with contextlib.ExitStack() as stack:
      beating = {
          name: stack.enter_context(heart(one, every=600.0, policy=name))
          for name, one in buckets.items()
      }
      for one in buckets.values():
        one.asked.clear()
      for name in FOLLOWERS:
        beating[name].ready(STEP)
      given = tmp_path / "jobs"
      async with looking_at(buckets["main"], FOLLOWERS) as peers:
        leader = job(
            Leader, "main", buckets["main"], peers, beating["main"], given
        )
        await step(leader)
      for name in FOLLOWERS:
        async with looking_at(buckets[name], ["main"]) as peers:
          one = job(Follower, name, buckets[name], peers, beating[name], given)
          await step(one)

  asyncio.run(work())
  found = {name: number(one, name) for name, one in buckets.items()}
  leads, every = scaling.requests(1 + len(FOLLOWERS))
  looks = len(FOLLOWERS)  # of followers at the leader, while they wait
  assert found["main"] == leads
  assert sum(found.values()) in range(every, every + looks + 1)
  assert real.get("steps/0.json") and real.get("stats/researcher/0.json")


def test_jobs_are_waited_for_at_the_same_time(tmp_path):
  real = store.open_folder(tmp_path / "bucket")
  slow = records.Counted(real, pause=0.4)

  async def work():
    with contextlib.ExitStack() as stack:
      for name in FOLLOWERS:
        stack.enter_context(heart(real, policy=name)).ready(STEP)
      own = stack.enter_context(heart(real, policy="main"))
      async with looking_at(slow, FOLLOWERS) as peers:
        leader = job(Leader, "main", real, peers, own, tmp_path / "jobs")
        began = time.monotonic()
        await leader._ready(leader.setup.team, STEP, leader.drawing)
        return time.monotonic() - began

  assert asyncio.run(work()) < 0.4 * len(FOLLOWERS)


def test_a_step_that_another_directory_made_is_named(tmp_path):
  real = store.open_folder(tmp_path / "bucket")
  records.board_of(real, tmp_path / "other").announce(STEP, GROUPS, SCORES)

  async def work():
    with heart(real, policy="main") as own:
      leader = job(Leader, "main", real, {}, own, tmp_path / "jobs")
      await step(leader)

  with pytest.raises(
      MismatchError, match="stands in the bucket, but not in this"
  ):
    asyncio.run(work())
