"""One agent call: budgets, statuses, retries, seeds."""

import asyncio
import dataclasses

import numpy as np
import pytest

from mgrpo_jax.agents.actor import scripted
from mgrpo_jax.agents.call import (
    NO_VERSION,
    call_agent,
    call_with_retries,
    fit,
    turn_seed,
)
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.context import CallContext, Environment, Ledger
from mgrpo_jax.agents.errors import InfrastructureError
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.agents.tools import Memory, Observation
from mgrpo_jax.testing.generate import complete, recording, replaying
from mgrpo_jax.testing.team import (
    chat_of,
    environment,
    small_team,
    small_tools,
    tokenizer,
)
from mgrpo_jax.types import NO_PARENT, Status

TEAM = small_team()
CHAT = chat_of(COMPACT, TEAM)
BYTES = tokenizer(TEAM)
SPECIAL = BYTES.special_ids


def ids(text):
  """Compact notation to tokens: `<search>peru<end>`."""
  tokens = []
  while text:
    name = next((n for n in SPECIAL if text.startswith(n)), None)
    tokens += [SPECIAL[name]] if name else text[0].encode()
    text = text[len(name) if name else 1 :]
  return tokens


def world(main=("<answer>done<end>",), researcher=(), *, team=TEAM, **fields):
  generates = {
      "main": replaying([ids(turn) for turn in main]),
      "researcher": replaying([ids(turn) for turn in researcher or main]),
  }
  return environment(generates, team=team, protocol=COMPACT, **fields)


def context_of(setting, **fields):
  parts = {
      "environment": setting,
      "task_id": "task",
      "rollout": 0,
      "seed": 7,
      "ledger": Ledger(),
      "parent": NO_PARENT,
  }
  return CallContext(**(parts | fields))


def run(setting, name="main", request="Q", call=call_agent):
  context = context_of(setting)
  trajectory = asyncio.run(call(setting.team[name], request, context))
  return trajectory, context


def shown(trajectory):
  return BYTES.decode(trajectory.tokens.tolist())


def sampled_text(trajectory):
  kept = trajectory.tokens[trajectory.loss_mask == 1]
  return BYTES.decode(kept.tolist())


def test_a_researcher_at_work():
  turns = ("<search>peru capital<end>", "<visit>1<end>", "<answer>Lima<end>")
  trajectory, _ = run(world(turns), "researcher", "capital of Peru")
  assert shown(trajectory) == (
      "<task>capital of Peru<end><search>peru capital<end><result>1 Peru: "
      "Capital\n2 Chad: Capital\n3 Nepal: Capital<end><visit>1<end><result>"
      "Peru: Capital\nLima; as given for Peru<end><answer>Lima<end>"
  ).replace("2 Chad: Capital\n3 Nepal: Capital", _others(trajectory))
  assert sampled_text(trajectory) == "".join(turns)
  assert trajectory.status == Status.COMPLETED
  assert trajectory.result_text == "Lima"
  assert [t.kind for t in trajectory.turns] == ["tool", "tool", "answer"]
  assert [t.name for t in trajectory.turns] == ["search", "visit", ""]
  assert trajectory.turns[1].page == "peru/facts#capital"
  assert (trajectory.version_min, trajectory.version_max) == (0, 2)
  assert trajectory.request == "capital of Peru"
  assert trajectory.tokens.dtype == np.int32
  assert trajectory.loss_mask.dtype == np.float32
  assert trajectory.sampler_logprobs.dtype == np.float32
  assert (trajectory.sampler_logprobs[trajectory.loss_mask == 0] == 0).all()


def _others(trajectory):
  """The second and third line of the first result."""
  return "\n".join(trajectory.turns[0].result.splitlines()[1:])


def test_delegation_is_a_call_one_level_down():
  setting = world(
      ("<researcher>capital of Peru<end>", "<answer>Lima!<end>"),
      ("<answer>Lima<end>",),
  )
  trajectory, context = run(setting)
  root, child = context.ledger.trajectories()
  assert root is trajectory and root.parent == NO_PARENT
  assert (child.role, child.call, child.parent) == ("researcher", 0, 0)
  assert child.request == "capital of Peru"
  assert "<result>Lima<end>" in shown(root)
  assert sampled_text(root) == (
      "<researcher>capital of Peru<end><answer>Lima!<end>"
  )
  assert root.turns[0].result == "Lima"


BUDGETS = {
    "policy": "main",
    "prompt": "",
    "tools": (),
    "max_turns": 3,
    "max_new_tokens": 20,
    "max_context": 200,
    "trainable": True,
    "attempts": 1,
}


def played(team, act):
  """One rollout in which every role does what `act` says."""
  chat = chat_of(COMPACT, team)
  actor = scripted(act, chat=chat, protocol=COMPACT)
  setting = dataclasses.replace(
      environment({"main": None}, team=team, protocol=COMPACT, tools={}),
      actors={"main": actor},
  )
  return run(setting)


def test_a_sub_task_may_be_attempted_several_times():
  team = Team(
      roles=(
          Role(name="main", calls=("researcher",), max_calls=2, **BUDGETS),
          Role(
              name="researcher",
              calls=(),
              max_calls=0,
              **(BUDGETS | {"attempts": 3}),
          ),
      ),
      root="main",
  )
  seeds = []

  def act(moment):
    if moment.role.name == "researcher":
      seeds.append(moment.seed)
      return answer(str(len(seeds)))
    if len(moment.turns) == 2:
      return answer("".join(turn.result for turn in moment.turns))
    request = f"part {len(moment.turns)}"
    return Action(
        kind="call", name="researcher", arguments={"request": request}
    )

  root, context = played(team, act)
  assert root.result_text == "14"  # the first attempt at each is what counts
  assert len(set(seeds)) == 6
  calls = context.ledger.trajectories()[1:]
  assert [(t.request, t.call, t.attempt, t.parent) for t in calls] == [
      (f"part {number // 3}", number, number % 3, 0) for number in range(6)
  ]
  assert team.most_calls("researcher") == 6
  assert team.without_attempts().most_calls("researcher") == 2


def test_trees_may_be_deeper_than_two():
  team = Team(
      roles=(
          Role(name="main", calls=("editor",), max_calls=2, **BUDGETS),
          Role(name="editor", calls=("researcher",), max_calls=2, **BUDGETS),
          Role(name="researcher", calls=(), max_calls=0, **BUDGETS),
      ),
      root="main",
  )
  below = {"main": "editor", "editor": "researcher", "researcher": None}

  def act(moment):
    child = below[moment.role.name]
    if child is None or len(moment.turns) == 2:
      return answer(moment.request + "!")
    request = f"{moment.request}{len(moment.turns)}"
    return Action(kind="call", name=child, arguments={"request": request})

  _, context = played(team, act)
  tree = [
      (t.role, t.call, t.parent, t.request, t.result_text)
      for t in context.ledger.trajectories()
  ]
  assert tree == [
      ("main", 0, NO_PARENT, "Q", "Q!"),
      ("editor", 0, 0, "Q0", "Q0!"),
      ("researcher", 0, 1, "Q00", "Q00!"),
      ("researcher", 1, 1, "Q01", "Q01!"),
      ("editor", 1, 0, "Q1", "Q1!"),
      ("researcher", 2, 4, "Q10", "Q10!"),
      ("researcher", 3, 4, "Q11", "Q11!"),
  ]


@pytest.mark.parametrize(
    ("turns", "budgets", "status"),
    [
        # Still working when turns run out.
        (("<search>x<end>",), {"max_turns": 3}, Status.TRUNCATED),
        # Only nonsense.
        (("nonsense<end>",), {"max_turns": 3}, Status.MALFORMED),
        # The last turn decides.
        (("no<end>", "<search>x<end>"), {"max_turns": 2}, Status.TRUNCATED),
        (("<search>x<end>", "no<end>"), {"max_turns": 2}, Status.MALFORMED),
        # A turn that does not end is a budget that ran out.
        (("<answer>" + "x" * 99,), {"max_new_tokens": 9}, Status.TRUNCATED),
        # Nonsense, corrected in time.
        (("no<end>", "<answer>x<end>"), {"max_turns": 2}, Status.COMPLETED),
        # Context: the prompt takes 3, results must leave room for a turn.
        (
            ("<search>x<end>",),
            {"max_new_tokens": 5, "max_context": 12},
            Status.TRUNCATED,
        ),
        (("<x<end>",), {"max_new_tokens": 5, "max_context": 12}, "MALFORMED"),
        (
            ("<answer>x<end>",),
            {"max_new_tokens": 5, "max_context": 6},
            Status.COMPLETED,
        ),
        (
            ("<answer>x<end>",),
            {"max_new_tokens": 2, "max_context": 3},
            Status.TRUNCATED,
        ),
    ],
)
def test_budgets(turns, budgets, status):
  team = small_team(**budgets)
  trajectory, _ = run(world(turns, team=team), "researcher")
  role = team["researcher"]
  expected = Status[status] if isinstance(status, str) else status
  assert trajectory.status == expected
  assert len(trajectory.tokens) <= role.max_context
  assert len(trajectory.turns) <= role.max_turns
  answered = expected == Status.COMPLETED
  assert bool(trajectory.result_text) == answered
  # Whatever ended it, the stream ends with what was sampled.
  assert trajectory.loss_mask[-1] == 1 or not trajectory.turns


def test_a_prompt_that_does_not_fit_is_never_sampled_from():
  team = small_team(max_new_tokens=5, max_context=10)
  trajectory, _ = run(world(team=team), request="x" * 8)
  assert trajectory.status == Status.TRUNCATED
  assert not trajectory.turns and not trajectory.loss_mask.any()
  assert trajectory.version_min == trajectory.version_max == NO_VERSION
  assert shown(trajectory) == "<task>" + "x" * 8 + "<end>"
  trajectory, _ = run(world(team=team), request="x" * 99)
  assert len(trajectory.tokens) == len(trajectory.loss_mask) == 10
  assert trajectory.status == Status.TRUNCATED


def test_a_turn_is_no_longer_than_the_context_left():
  team = small_team(max_new_tokens=5, max_context=9)
  whole, _ = run(world(("<answer>y<end>",), team=team), request="x" * 4)
  assert whole.status == Status.COMPLETED and len(whole.tokens) == 9
  cut, _ = run(world(("<answer>yy<end>",), team=team), request="x" * 4)
  assert cut.status == Status.TRUNCATED and len(cut.tokens) == 9
  assert sampled_text(cut) == "<answer>yy"


def test_the_last_turn_runs_no_tool_and_no_child():
  team = small_team(max_turns=1)
  used = []

  async def spy(arguments, memory):
    del memory
    used.append(arguments)
    return Observation(text="x")

  tools = small_tools()
  tools["search"] = dataclasses.replace(tools["search"], run=spy)
  run(world(("<search>x<end>",), team=team, tools=tools), "researcher")
  assert not used
  _, context = run(world(("<researcher>x<end>",), team=team))
  assert len(context.ledger) == 1
  longer = small_team(max_turns=2)
  run(world(("<search>x<end>",), team=longer, tools=tools), "researcher")
  assert used == [{"query": "x"}]


def test_results_are_cut_to_what_fits():
  team = small_team(max_new_tokens=16, max_context=60)
  setting = world(("<visit>fiji/facts<end>", "<answer>x<end>"), team=team)
  trajectory, _ = run(setting, "researcher")
  cut, _ = trajectory.turns
  # 3 prompt + 12 turn + 2 around the result + 16 for the next turn = 33
  assert cut.result == "Fiji: Capital\nSuva; as given for Fiji"[: 60 - 33]
  assert f"<result>{cut.result}<end>" in shown(trajectory)
  assert trajectory.status == Status.COMPLETED
  assert setting.counters["cut_results"] == 1


def test_errors_are_shown_to_the_model():
  turns = ("no<end>", "<visit>9<end>", "<calculate>1/0<end>", "<answer>x<end>")
  setting = world(turns)
  trajectory, _ = run(setting, "researcher")
  results = [turn.result for turn in trajectory.turns]
  assert results[0] == "error: no tag"
  assert results[1].startswith("error: no search results")
  assert results[2] == "error: division by zero"
  assert trajectory.turns[0].argument == "no"
  assert setting.counters["malformed_turns"] == 1
  assert setting.counters["tool_errors"] == 2


def test_calls_beyond_the_budget_are_refused():
  team = small_team(max_calls=2)
  setting = world(
      ("<researcher>a<end>",) * 3 + ("<answer>x<end>",),
      ("<answer>y<end>",),
      team=team,
  )
  trajectory, context = run(setting)
  assert [t.result for t in trajectory.turns] == [
      "y",
      "y",
      "error: no calls left",
      "",
  ]
  assert [t.call for t in context.ledger.trajectories()] == [0, 0, 1]
  assert trajectory.status == Status.COMPLETED
  assert setting.counters["refused_calls"] == 1


def test_a_child_without_an_answer():
  setting = world(("<researcher>a<end>", "<answer>x<end>"), ("nonsense<end>",))
  trajectory, context = run(setting)
  assert trajectory.turns[0].result == "error: no answer"
  assert context.ledger.trajectories()[1].status == Status.MALFORMED


def test_a_context_that_the_engine_exhausts():
  async def generate(tokens, sampling, seed, *, session):
    completion = complete(ids("<search>x"), sampling, seed=seed, version=0)
    return dataclasses.replace(completion, finish="context")

  setting = environment(
      {"main": generate, "researcher": generate}, team=TEAM, protocol=COMPACT
  )
  trajectory, _ = run(setting, "researcher")
  assert trajectory.status == Status.TRUNCATED
  assert len(trajectory.turns) == 1


# --- infrastructure ---


def flaky(failures, turns, error=OSError):
  """Fails at the given samplings, counted from 0, else replays."""
  inner = replaying([ids(turn) for turn in turns])
  counter = iter(range(1000))

  async def generate(tokens, sampling, seed, *, session):
    if next(counter) in failures:
      raise error("broken")
    return await inner(tokens, sampling, seed, session=session)

  return generate


RESEARCH = ("<search>peru<end>", "<answer>Lima<end>")
MAIN = ("<researcher>a<end>", "<researcher>b<end>", "<answer>x<end>")


def breaking(main=(), researcher=(), error=OSError, **fields):
  generates = {
      "main": flaky(main, MAIN, error),
      "researcher": flaky(researcher, RESEARCH, error),
  }
  return environment(generates, team=TEAM, protocol=COMPACT, **fields)


def assert_same(first, second):
  """Equal but for the time they took."""
  assert len(first) == len(second)
  for one, two in zip(first, second, strict=True):
    for field in dataclasses.fields(one):
      if field.name != "seconds":
        left, right = getattr(one, field.name), getattr(two, field.name)
        np.testing.assert_equal(left, right, err_msg=field.name)


@pytest.mark.parametrize("error", [OSError, InfrastructureError, TimeoutError])
@pytest.mark.parametrize(
    ("main", "researcher"), [((1,), ()), ((), (0,)), ((), (3,)), ((2,), (1,))]
)
def test_what_breaks_once_leaves_no_trace(main, researcher, error):
  _, whole = run(breaking(), call=call_with_retries)
  setting = breaking(main, researcher, error)
  trajectory, context = run(setting, call=call_with_retries)
  assert trajectory.status == Status.COMPLETED
  assert_same(context.ledger.trajectories(), whole.ledger.trajectories())
  assert setting.counters["retries"] == len(main) + len(researcher)
  assert setting.counters["failed"] == 0


def test_what_stays_broken_fails_its_ancestors_without_repeating_them():
  setting = breaking(researcher=range(2, 1000), max_attempts=3)
  trajectory, context = run(setting, call=call_with_retries)
  assert trajectory.status == Status.FAILED
  statuses = [t.status for t in context.ledger.trajectories()]
  assert statuses == [Status.FAILED, Status.COMPLETED, Status.FAILED]
  assert setting.counters["retries"] == 2
  assert setting.counters["failed"] == 1
  # What was sampled before is kept, for the record.
  assert sampled_text(trajectory) == "".join(MAIN[:2])


def test_a_broken_tool_is_infrastructure():
  async def broken(arguments, memory):
    raise KeyError("bug")

  tools = small_tools()
  tools["search"] = dataclasses.replace(tools["search"], run=broken)
  setting = world(RESEARCH, tools=tools)
  trajectory, _ = run(setting, "researcher", call=call_with_retries)
  assert trajectory.status == Status.FAILED
  assert setting.counters["retries"] == 1


def test_a_stuck_engine_is_infrastructure():
  async def stuck(tokens, sampling, seed, *, session):
    await asyncio.sleep(60)

  setting = environment(
      {"main": stuck, "researcher": stuck},
      team=TEAM,
      protocol=COMPACT,
      turn_deadline=0.02,
  )
  trajectory, _ = run(setting, call=call_with_retries)
  assert trajectory.status == Status.FAILED
  assert trajectory.seconds < 5
  assert setting.counters["retries"] == 1


def test_a_programming_error_is_not_hidden():
  with pytest.raises(ZeroDivisionError):
    run(breaking(main=(0,), error=ZeroDivisionError), call=call_with_retries)


def test_every_session_is_released_once():
  log, released = [], []
  generates = {
      "main": recording(flaky((1,), MAIN), log),
      "researcher": recording(flaky((0,), RESEARCH), log),
  }
  setting = environment(
      generates, team=TEAM, protocol=COMPACT, release=released.append
  )
  run(setting, call=call_with_retries)
  assert {entry.session for entry in log} <= set(released)
  assert len(set(released)) == len(released) == setting.counters["calls"]


def test_cancellation_releases_and_ends_the_call():
  released = []

  async def stuck(tokens, sampling, seed, *, session):
    await asyncio.sleep(60)

  setting = environment(
      {"main": stuck, "researcher": stuck},
      team=TEAM,
      protocol=COMPACT,
      release=released.append,
  )

  async def main():
    task = asyncio.ensure_future(
        call_agent(TEAM["main"], "Q", context_of(setting))
    )
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task

  asyncio.run(main())
  assert len(released) == 1


# --- seeds ---


def test_seeds_are_stable_and_depend_on_every_part():
  # Recorded once: a run resumed under a later version must draw the same.
  assert turn_seed(0, "task", 0, "main", 0, 0) == 5522994643697104460
  base = (0, "task", 0, "main", 0, 0)
  others = [
      (1, "task", 0, "main", 0, 0),
      (0, "tusk", 0, "main", 0, 0),
      (0, "task", 1, "main", 0, 0),
      (0, "task", 0, "maim", 0, 0),
      (0, "task", 0, "main", 1, 0),
      (0, "task", 0, "main", 0, 1),
      (0, "task1", 0, "main", 0, 0),
  ]
  seeds = {turn_seed(*identity) for identity in (base, *others)}
  assert len(seeds) == 8
  assert all(0 <= seed < 2**64 for seed in seeds)


def test_turns_are_sampled_with_their_own_seed_and_budget():
  log = []
  inner = recording(replaying([ids(turn) for turn in RESEARCH]), log)
  setting = environment(
      {"main": inner, "researcher": inner}, team=TEAM, protocol=COMPACT
  )
  run(setting, "researcher")
  assert [entry.seed for entry in log] == [
      turn_seed(7, "task", 0, "researcher", 0, turn) for turn in range(2)
  ]
  assert {entry.session for entry in log} == {log[0].session}
  for entry in log:
    assert entry.sampling.temperature == 1.0
    assert entry.sampling.stop_ids == CHAT.stop_ids
    assert entry.sampling.max_new_tokens == TEAM["researcher"].max_new_tokens


# --- scripted actors ---


@pytest.mark.parametrize("protocol", [COMPACT, HERMES], ids=lambda p: p.name)
def test_plain_code_can_play_a_role(protocol):
  def act(moment):
    assert moment.request == "Q"
    if not moment.turns:
      return Action(kind="tool", name="search", arguments={"query": "peru"})
    return answer(moment.turns[-1].result.splitlines()[0])

  chat = chat_of(protocol, TEAM)
  actor = scripted(act, chat=chat, protocol=protocol)
  setting = environment({"main": None, "researcher": None}, team=TEAM)
  setting = dataclasses.replace(
      setting, actors={"main": actor, "researcher": actor}
  )
  trajectory, _ = run(setting, "researcher")
  assert trajectory.status == Status.COMPLETED
  assert trajectory.result_text.startswith("1 Peru: ")
  expected = chat.write(
      protocol.render(
          Action(kind="tool", name="search", arguments={"query": "peru"})
      )
  ) + chat.write(protocol.render(answer(trajectory.result_text)))
  kept = trajectory.tokens[trajectory.loss_mask == 1]
  assert kept.tolist() == expected
  assert not trajectory.sampler_logprobs.any()


# --- the environment ---


def test_environments_are_checked():
  setting = world()
  fields = {
      field.name: getattr(setting, field.name)
      for field in dataclasses.fields(setting)
  }
  for change, message in (
      ({"actors": {"main": setting.actors["main"]}}, r"\['researcher'\]"),
      ({"tools": {}}, r"unknown tools \['calculate', 'search', 'visit'\]"),
      ({"turn_deadline": 0}, "turn_deadline: is 0"),
      ({"max_attempts": 0}, "max_attempts: is 0"),
      ({"temperature": -1}, "temperature: is -1"),
  ):
    with pytest.raises(ValueError, match=message):
      Environment(**(fields | change))


def test_prompts_that_leave_no_room_are_refused():
  team = small_team(max_context=900)
  with pytest.raises(ValueError, match="'researcher': max_context is 900"):
    environment({"main": None, "researcher": None}, team=team, protocol=HERMES)


def test_fit_finds_the_longest_prefix():
  def encode(text):
    return [0, *text.encode(), 0]

  assert fit("abcdef", encode, 8) == "abcdef"
  assert fit("abcdef", encode, 7) == "abcde"
  assert fit("abcdef", encode, 3) == "a"
  assert fit("abcdef", encode, 2) == ""
  assert fit("日本", encode, 6) == "日"


def test_memory_belongs_to_the_call():
  seen = []

  async def spy(arguments, memory):
    seen.append(memory)
    return Observation(text="x")

  tools = small_tools()
  tools["search"] = dataclasses.replace(tools["search"], run=spy)
  setting = world(
      MAIN, ("<search>x<end>", "<search>y<end>", "<answer>z<end>"), tools=tools
  )
  run(setting)
  assert len(seen) == 4 and isinstance(seen[0], Memory)
  assert seen[0] is seen[1] and seen[2] is seen[3]
  assert seen[0] is not seen[2]
