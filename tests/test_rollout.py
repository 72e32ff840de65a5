"""Groups of trees: what is trained on is what was sampled, whatever happens."""

import asyncio
import dataclasses
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import Action, Mark, answer
from mgrpo_jax.rollout import run_group, run_groups
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import drawing, recording
from mgrpo_jax.testing.team import (
    chat_of,
    environment,
    small_team,
    tokenizer,
)
from mgrpo_jax.types import NO_PARENT, Status

TASK = corpus.task()
PROTOCOLS = pytest.mark.parametrize(
    "protocol", [COMPACT, HERMES], ids=lambda p: p.name
)


def run(work):
  """Like `asyncio.run`, which makes a repr of what it returns (CPython)."""
  with asyncio.Runner() as runner:
    return runner.get_loop().run_until_complete(work)


def tool(name, **arguments):
  return Action(kind="tool", name=name, arguments=arguments)


ACTIONS = (
    tool("search", query="capital of Peru"),
    tool("search", query="zebra"),
    tool("visit", page="1"),
    tool("visit", page="nepal/facts"),
    tool("calculate", expression="1 + 2"),
    tool("calculate", expression="1 / 0"),
    tool("fly", to="Lima"),
    Action(kind="call", name="researcher", arguments={"request": "find é 日"}),
    answer("Lima"),
    answer("é" * 40),
)
RAW = (
    "",
    "no structure at all",
    '<tool_call>{"name": "search", "arguments": {"query": "unterminated',
    "<tool_call>" + "[" * 90 + "</tool_call>",
    '<tool_call>{"name": "search", "arguments": {"query": 5}}</tool_call>',
    '<tool_call>{"name":"visit","arguments":{"page":"\\ud800"}}</tool_call>',
)


def menu(protocol, team):
  """Turns of every kind, as tokens: good, bad, cut, random, hostile."""
  chat, special = chat_of(protocol, team), tokenizer(team).special_ids
  (stop,) = chat.stop_ids
  good = [chat.write(protocol.render(action)) for action in ACTIONS[:6]]
  good += [chat.write(protocol.render(a)) for a in ACTIONS[7:]]
  raw = [chat.write((Mark("<search>"), text)) for text in RAW]
  untagged = [[*text.encode(), stop] for text in RAW]
  odd = [
      [],
      [stop],
      [0xFF, 0xC3, 0x28, stop],
      [special["<search>"], 0xE6, 0x97, stop],
      [65, special["<pad>"], 66, stop],
      [*special.values()],
      [*reversed(special.values())],
      [special["<end>"], special["<|im_end|>"], special["<task>"]],
      good[0][:-1] * 9,
  ]
  delegation = good[6:7]
  return [*good * 3, *delegation * 12, *raw, *untagged, *odd]


def traffic(protocol, team, *, stream):
  """A draw function: a turn of the menu, or random tokens."""
  turns = menu(protocol, team)
  size = tokenizer(team).vocab_size + 3

  def draw(rng):
    rng = np.random.default_rng([int(rng.integers(2**32)), stream])
    if rng.random() < 0.15:
      return rng.integers(0, size, rng.integers(0, 60)).tolist()
    return turns[rng.integers(len(turns))]

  return draw


BUDGETS = st.fixed_dictionaries(
    {
        "max_turns": st.integers(1, 7),
        "max_new_tokens": st.integers(1, 130),
        "max_context": st.integers(0, 2500),  # on top of the prompt's
        "max_calls": st.integers(1, 3),
    }
)


@PROTOCOLS
@settings(deadline=None, max_examples=60)
@given(budgets=BUDGETS, seed=st.integers(0, 2**40), stream=st.integers(0, 99))
def test_trained_tokens_are_the_sampled_ones(protocol, budgets, seed, stream):
  prompt = {"compact": 140, "hermes": 1900}[protocol.name]
  budgets = budgets | {"max_context": prompt + budgets["max_context"]}
  team = small_team(**budgets)
  log = []
  generate = recording(drawing(traffic(protocol, team, stream=stream)), log)
  setting = environment(
      {"main": generate, "researcher": generate}, team=team, protocol=protocol
  )
  group = run(run_group(TASK, environment=setting, num_rollouts=2, seed=seed))
  sessions = {}
  for entry in log:
    sessions.setdefault(entry.session.rsplit("/", 1)[0], []).append(entry)
  sampled_from = 0
  for t in group.trajectories:
    entries = sessions.get(f"{t.task_id}/{t.rollout}/{t.role}/{t.call}", [])
    sampled_from += len(entries)
    check_stream(t, entries, team[t.role])
  assert sampled_from == len(log) == setting.counters["turns"]
  check_tree(group, team)


def check_stream(trajectory, entries, role):
  """The stream holds the sampled tokens, in order, and what came between."""
  mask = trajectory.loss_mask == 1
  tokens = [entry.completion.tokens for entry in entries]
  logprobs = [entry.completion.logprobs for entry in entries]
  np.testing.assert_array_equal(
      trajectory.tokens[mask], np.concatenate([np.empty(0, np.int32), *tokens])
  )
  np.testing.assert_array_equal(
      trajectory.sampler_logprobs[mask],
      np.concatenate([np.empty(0, np.float32), *logprobs]),
  )
  assert not trajectory.sampler_logprobs[~mask].any()
  assert len(entries) == len(trajectory.turns) <= role.max_turns
  assert len(trajectory.tokens) <= role.max_context
  stream = trajectory.tokens.tolist()
  for entry, following in zip(entries, [*entries[1:], None], strict=True):
    so_far = [*entry.tokens, *entry.completion.tokens.tolist()]
    further = stream if following is None else list(following.tokens)
    assert further[: len(so_far)] == so_far
    start = len(entry.tokens)
    assert mask[start : len(so_far)].all()
    if following is not None:
      assert not mask[len(so_far) : len(further)].any()
      assert len(further) + role.max_new_tokens <= role.max_context
  if entries:
    assert len(stream) == len(so_far)
    assert not mask[: len(entries[0].tokens)].any()


def check_tree(group, team):
  """Arrays agree with the records; statuses agree with the turns."""
  assert group.trajectories[0].parent == NO_PARENT
  for i, t in enumerate(group.trajectories):
    assert group.rollout[i] == t.rollout and group.call[i] == t.call
    assert team.roles[group.role[i]].name == t.role
    assert t.status != Status.FAILED
    assert (t.status == Status.COMPLETED) == (
        bool(t.turns) and t.turns[-1].kind == "answer"
    )
    if t.status == Status.MALFORMED:
      assert t.turns[-1].kind == "malformed"
    json.dumps([t.request, t.result_text, *map(str, t.turns)]).encode()
    t.result_text.encode()
    if t.parent == NO_PARENT:
      assert group.parent[i] == NO_PARENT
      assert (t.role, t.call, t.request) == ("main", 0, TASK.question)
      continue
    parent = group.parent[i]
    assert parent < i and group.rollout[parent] == t.rollout
    caller = group.trajectories[parent]
    requests = [u.argument for u in caller.turns if u.kind == "call"]
    assert t.request in requests[t.call] and t.call < team["main"].max_calls
    assert t.result_text == "" or caller.turns


@PROTOCOLS
def test_traffic_covers_every_outcome(protocol):
  """The property above would be empty talk if nothing ever happened."""
  team = small_team(max_turns=4, max_context=2500)
  generate = drawing(traffic(protocol, team, stream=0))
  setting = environment(
      {"main": generate, "researcher": generate}, team=team, protocol=protocol
  )
  group = run(run_group(TASK, environment=setting, num_rollouts=60, seed=0))
  statuses = {t.status for t in group.trajectories}
  assert statuses == {Status.COMPLETED, Status.TRUNCATED, Status.MALFORMED}
  kinds = {turn.kind for t in group.trajectories for turn in t.turns}
  assert kinds == {"tool", "call", "answer", "malformed"}
  assert any(turn.page for t in group.trajectories for turn in t.turns)
  for counter in ("tool_errors", "cut_turns", "malformed_turns"):
    assert setting.counters[counter] > 0, counter


def same(first, second):
  for field in ("rollout", "parent", "role", "call"):
    np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
  for one, two in zip(first.trajectories, second.trajectories, strict=True):
    for field in dataclasses.fields(one):
      if field.name != "seconds":
        np.testing.assert_equal(
            getattr(one, field.name), getattr(two, field.name)
        )


def lively(*, pause=None):
  team = small_team(max_turns=6)
  generate = drawing(traffic(COMPACT, team, stream=1), pause=pause)
  return environment(
      {"main": generate, "researcher": generate}, team=team, protocol=COMPACT
  )


def test_results_do_not_depend_on_scheduling():
  tasks = [dataclasses.replace(TASK, id=f"task-{i}") for i in range(6)]
  groups = {}
  for name, pause, at_once in (
      ("calm", None, 6),
      ("hasty", lambda seed: seed % 7 / 1000, 6),
      ("reversed", lambda seed: 6 / 1000 - seed % 7 / 1000, 2),
  ):
    groups[name] = run(
        run_groups(
            tasks,
            environment=lively(pause=pause),
            num_rollouts=4,
            seed=3,
            max_concurrent=at_once,
        )
    )
  assert [g.task.id for g in groups["calm"]] == [t.id for t in tasks]
  for other in ("hasty", "reversed"):
    for one, two in zip(groups["calm"], groups[other], strict=True):
      same(one, two)
  alone = run(run_group(tasks[4], environment=lively(), num_rollouts=4, seed=3))
  same(alone, groups["calm"][4])


def streams(group):
  return {t.tokens.tobytes() for t in group.trajectories if t.parent < 0}


def test_rollouts_seeds_and_repeated_tasks_differ():
  def groups(seed, tasks):
    return run(
        run_groups(
            tasks,
            environment=lively(),
            num_rollouts=8,
            seed=seed,
            max_concurrent=4,
        )
    )

  first, again = groups(0, [TASK, TASK])
  (other,) = groups(1, [TASK])
  assert len(streams(first)) > 4
  assert streams(first) != streams(again)
  assert streams(first) != streams(other)
  same(first, groups(0, [TASK])[0])


def test_concurrency_is_bounded_and_used():
  active, most = 0, 0

  async def generate(tokens, sampling, seed, *, session):
    nonlocal active, most
    active += 1
    most = max(most, active)
    await asyncio.sleep(0.001)
    active -= 1
    return await inner(tokens, sampling, seed, session=session)

  team = small_team()
  inner = drawing(traffic(COMPACT, team, stream=1))
  setting = environment(
      {"main": generate, "researcher": generate}, team=team, protocol=COMPACT
  )
  tasks = [dataclasses.replace(TASK, id=str(i)) for i in range(9)]
  run(
      run_groups(
          tasks, environment=setting, num_rollouts=3, seed=0, max_concurrent=2
      )
  )
  assert most == 6


def test_a_failed_rollout_leaves_the_others_alone():
  team = small_team()
  chat = chat_of(COMPACT, team)

  async def generate(tokens, sampling, seed, *, session):
    if session.startswith(f"{TASK.id}/1/"):
      raise OSError("broken")
    return await good(tokens, sampling, seed, session=session)

  good = drawing(lambda rng: chat.write(COMPACT.render(answer("x"))))
  setting = environment(
      {"main": generate, "researcher": generate}, team=team, protocol=COMPACT
  )
  group = run(run_group(TASK, environment=setting, num_rollouts=3, seed=0))
  assert [t.status for t in group.trajectories] == [
      Status.COMPLETED,
      Status.FAILED,
      Status.COMPLETED,
  ]


def test_a_programming_error_ends_the_run_as_itself():
  async def generate(tokens, sampling, seed, *, session):
    raise ZeroDivisionError("bug")

  setting = environment(
      {"main": generate, "researcher": generate}, team=small_team()
  )
  with pytest.raises(ZeroDivisionError, match="bug"):
    run(
        run_groups(
            [TASK],
            environment=setting,
            num_rollouts=3,
            seed=0,
            max_concurrent=1,
        )
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts: is 0"),
        ({"max_concurrent": 0}, "max_concurrent: is 0"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
  numbers = {"num_rollouts": 1, "max_concurrent": 1, "seed": 0} | fields
  with pytest.raises(ValueError, match=message):
    run(run_groups([TASK], environment=lively(), **numbers))


def test_turns_that_come_too_late_are_told_of_once(caplog):
  async def stuck(tokens, sampling, seed, *, session):
    await asyncio.sleep(60)

  setting = environment(
      {"main": stuck, "researcher": stuck},
      team=small_team(),
      protocol=COMPACT,
      turn_deadline=0.02,
  )
  with caplog.at_level(logging.WARNING):
    groups = run(
        run_groups(
            [TASK, TASK], environment=setting, num_rollouts=3, seed=0,
            max_concurrent=2,
        )
    )  # fmt: skip
  assert all(t.status == Status.FAILED for g in groups for t in g.trajectories)
  attempts = 2 * 3 * setting.max_attempts
  assert setting.counters["late_turns"] == attempts
  (line,) = [record.getMessage() for record in caplog.records]
  assert line.startswith(
      f"{attempts} turns took longer than rollout.turn_deadline (0.02 s)"
  )
