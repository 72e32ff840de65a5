"""A call in another job is the same call: same tokens, text and rewards."""

import asyncio
import dataclasses
import json
import pathlib
import tempfile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curriculum import stage

from mgrpo_jax import rewards
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.desk import Desk
from mgrpo_jax.decoupled.remote import Remote, Traffic
from mgrpo_jax.rollout import run_group
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import drawing
from mgrpo_jax.testing.setup import small_method
from mgrpo_jax.testing.team import chat_of, environment, small_team

TASK = corpus.task()
DONE = 3
FREE = ("tokens", "seconds")  # compared apart, and not at all


def three_deep():
  """Main calls researcher, who calls reader, who is the main policy again."""
  main, researcher = small_team(max_turns=3, max_calls=2).roles
  researcher = dataclasses.replace(
      researcher, calls=("reader",), max_calls=2, attempts=2
  )
  fields = dataclasses.asdict(main)
  reader = Role(**fields | {"name": "reader", "calls": (), "max_calls": 0})
  return Team(roles=(main, researcher, reader), root="main")


TEAM = three_deep()
STAGES = (stage("easy", steps=DONE), stage("hard", steps=1))
METHOD = small_method(TEAM)
METHOD = dataclasses.replace(  # what grades matter, only the stage says
    METHOD,
    reward_weights={
        role: dataclasses.replace(weights, expert=0.0)
        for role, weights in METHOD.reward_weights.items()
    },
    stage_rewards={STAGES[1].name: METHOD.reward_weights},
)


def draw(rng):
  """Delegations, answers, tools and noise; decided by the turn's seed."""
  rng = np.random.default_rng(int(rng.integers(2**32)))
  chat = chat_of(COMPACT, TEAM)
  child = ("researcher", "reader")[int(rng.integers(2))]
  actions = [
      Action(kind="call", name=child, arguments={"request": "find é 日"}),
      Action(kind="call", name=child, arguments={"request": "rivers"}),
      Action(kind="tool", name="search", arguments={"query": "Peru"}),
      answer("Lima é"),
  ]
  number = int(rng.integers(5))
  if number == 4:
    return rng.integers(0, 256, 9).tolist()
  return chat.write(COMPACT.render(actions[number]))


class Direct:
  """A peer without HTTP between: JSON in, JSON out."""

  def __init__(self, desks, policy):
    self.desks, self.policy = desks, policy

  async def post(self, path, body, what):
    del path, what
    call = wire.read_call(json.dumps(body).encode())
    return json.loads(wire.dump(await self.desks[self.policy].answer(call)))


def shared():
  generate = drawing(draw, version=DONE)
  return environment(
      {"main": generate, "researcher": generate}, team=TEAM, protocol=COMPACT
  )


def jobs(folder):
  """The two jobs' environments, desks and traffic."""
  whole, desks = shared(), {}
  traffic = Traffic()
  environments = {
      own: dataclasses.replace(
          whole,
          actors={own: whole.actors[own]},
          elsewhere={
              other: Remote(
                  Direct(desks, other),
                  "training",
                  done=lambda: DONE,
                  traffic=traffic,
              )
          },
      )
      for own, other in (("main", "researcher"), ("researcher", "main"))
  }
  for policy, own in environments.items():
    desks[policy] = Desk(
        pathlib.Path(folder) / policy,
        environments=lambda _, own=own: {"training": own},
        tasks={TASK.id: TASK},
        stages=STAGES,
        method=METHOD,
    )
    desks[policy].open(DONE)
  return environments, desks, traffic


def play(setting, seed):
  return asyncio.run(
      run_group(TASK, environment=setting, num_rollouts=2, seed=seed)
  )


def filled(group, desks, seed):
  """The group, every call as the job that made it kept it."""
  calls = []
  for t in group.trajectories:
    if t.account is not None:
      key = wire.identity(seed, t.task_id, t.rollout, t.role, t.call, t.attempt)
      kept = desks[TEAM[t.role].policy].own(key)
      t = dataclasses.replace(kept, parent=t.parent)
    calls.append(t)
  return tuple(calls)


def same(one, other):
  for field in dataclasses.fields(one):
    a, b = getattr(one, field.name), getattr(other, field.name)
    if isinstance(a, np.ndarray):
      assert np.array_equal(a, b), field.name
    elif field.name != "seconds":
      assert a == b, field.name


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**40))
def test_groups_and_rewards_are_those_of_one_process(seed):
  expected = play(shared(), seed)
  with tempfile.TemporaryDirectory() as folder:
    environments, desks, _ = jobs(folder)
    group = play(environments["main"], seed)
    for one, other in zip(
        expected.trajectories, filled(group, desks, seed), strict=True
    ):
      same(one, other)
    for policy in desks:
      desks[policy].close()
  for name in ("rollout", "parent", "role", "call"):
    assert np.array_equal(getattr(group, name), getattr(expected, name))
  weights = METHOD.rewards_of(STAGES[1])
  graded = {"weights": weights, "rules": METHOD.rules}
  one, other = (rewards.score(g, **graded) for g in (expected, group))
  for field in dataclasses.fields(one):
    assert np.array_equal(getattr(one, field.name), getattr(other, field.name))


def test_some_of_these_groups_are_three_deep_and_cross_twice(tmp_path):
  environments, _, traffic = jobs(tmp_path)
  roles = set()
  for seed in range(40):
    group = play(environments["main"], seed)
    roles |= {t.role for t in group.trajectories}
    for t in group.trajectories:
      assert (t.account is None) == (t.role == "main")
  assert roles == {"main", "researcher", "reader"}
  assert traffic.calls > 40 and traffic.text_bytes > 0
