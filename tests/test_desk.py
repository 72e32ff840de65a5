"""Calls of other jobs are answered once, and kept before they are told."""

import asyncio
import collections
import dataclasses

import numpy as np
import pytest
from test_curriculum import stage

from mgrpo_jax.agents.errors import InfrastructureError
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import answer
from mgrpo_jax.decoupled.desk import Desk
from mgrpo_jax.decoupled.wire import Call, identity, read_report
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.testing.setup import small_method
from mgrpo_jax.testing.team import chat_of, environment, small_team
from mgrpo_jax.types import Completion, Status, Task

TEAM = small_team()
STAGES = (stage("easy", steps=4), stage("hard", steps=2))
METHOD = small_method(TEAM)
TASKS = {
    "t": Task(
        id="t",
        question="?",
        answers=("Lima",),
        stage="easy",
        hops=1,
        evidence=(),
        meta={},
    )
}


def call(**changes):
  fields = dict(
      done=4,
      purpose="training",
      seed=11,
      task="t",
      rollout=0,
      role="researcher",
      attempt=0,
      earlier={"main": 1},
      request="capital of Peru",
  )
  return Call(**{**fields, **changes})


class Voice:
  """A researcher that answers with a number of its own each time."""

  def __init__(self):
    self.asked = 0
    self.broken = False

  async def __call__(self, tokens, sampling, seed, *, session):
    del tokens, sampling, seed, session
    self.asked += 1
    number = self.asked
    await asyncio.sleep(0)  # others may be asked meanwhile
    if self.broken:
      raise InfrastructureError("no power")
    ids = chat_of(HERMES, TEAM).write(HERMES.render(answer(f"{number}")))
    return Completion(
        tokens=np.asarray(ids, np.int32),
        logprobs=np.full(len(ids), -0.5, np.float32),
        raw_logprobs=None,
        finish="stop",
        version_min=4,
        version_max=4,
    )


@pytest.fixture
def voice():
  return Voice()


def desk(folder, voice, done=4, method=METHOD):
  async def nobody(role, request, context):
    raise AssertionError("the main agent is another job's")

  plain = environment({"main": voice, "researcher": voice}, team=TEAM)
  own = dataclasses.replace(
      plain,
      actors={"researcher": plain.actors["researcher"]},
      elsewhere={"main": nobody},
  )
  made = Desk(
      folder,
      environments=lambda _: {
          "training": own,
          "testing": dataclasses.replace(own, counters=collections.Counter()),
      },
      tasks=TASKS,
      stages=STAGES,
      method=method,
  )
  if done is not None:
    made.open(done)
  return made


def ask(at, asked):
  return asyncio.run(at.answer(asked))


def test_a_call_is_made_once_and_told_as_often_as_asked(tmp_path, voice):
  at = desk(tmp_path, voice)
  first, again = ask(at, call()), ask(at, call())
  assert first == again and voice.asked == 1
  (told,) = read_report(first, call())
  assert (told.result_text, told.call) == ("1", 0)
  kept = at.own(identity(11, "t", 0, "researcher", 0, 0))
  assert kept.account is None and told.sampled == kept.sampled > 0
  assert at.own(identity(12, "t", 0, "researcher", 0, 0)) is None


def test_what_was_told_outlives_the_process(tmp_path, voice):
  told = ask(desk(tmp_path, voice), call())  # which is never closed
  later = desk(tmp_path, voice)
  assert ask(later, call()) == told and voice.asked == 1
  kept = later.own(identity(11, "t", 0, "researcher", 0, 0))
  assert kept.loss_mask.sum() > 0 and kept.sampler_logprobs.min() == -0.5


def test_a_call_asked_twice_at_a_time_is_told_as_it_was_kept(tmp_path, voice):
  at = desk(tmp_path, voice)

  async def both():
    return await asyncio.gather(at.answer(call()), at.answer(call()))

  first, second = asyncio.run(both())
  assert voice.asked == 2 and first == second
  kept = at.own(identity(11, "t", 0, "researcher", 0, 0))
  assert kept.result_text == first["text"]
  assert (
      desk(tmp_path, voice)
      .own(identity(11, "t", 0, "researcher", 0, 0))
      .result_text
      == first["text"]
  )


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_that_was_cut_was_never_told(tmp_path, voice, lost):
  at = desk(tmp_path, voice)
  told = ask(at, call())
  ask(at, call(rollout=1))
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:-lost])
  later = desk(tmp_path, voice)
  assert ask(later, call()) == told
  ask(later, call(rollout=1))
  assert voice.asked == 3
  ask(desk(tmp_path, voice), call(rollout=1))
  assert voice.asked == 3  # the line made anew is whole


def test_another_request_is_another_call_and_replaces_it(tmp_path, voice):
  at = desk(tmp_path, voice)
  ask(at, call())
  other = ask(at, call(request="capital of Chad"))
  assert other["text"] == "2"
  kept = at.own(identity(11, "t", 0, "researcher", 0, 0))
  assert (kept.request, kept.result_text) == ("capital of Chad", "2")


def test_ordinals_count_on_from_the_callers_ledger(tmp_path, voice):
  at = desk(tmp_path, voice)
  asked = call(earlier={"main": 1, "researcher": 2})
  (told,) = read_report(ask(at, asked), asked)
  assert told.call == 2


@pytest.mark.parametrize(
    ("asked", "done", "status"),
    [
        (call(done=5), 4, 425),
        (call(), None, 425),
        (call(done=3), 4, 409),
        (call(role="main"), 4, 400),
        (call(role="nobody"), 4, 400),
        (call(task="u"), 4, 400),
        (call(done=6), 6, 400),
        (call(earlier={"nobody": 1}), 4, 400),
    ],
)
def test_calls_out_of_place_are_refused(tmp_path, voice, asked, done, status):
  with pytest.raises(RequestError) as caught:
    ask(desk(tmp_path, voice, done), asked)
  assert caught.value.status == status
  assert not voice.asked


def test_a_call_that_failed_is_told_and_made_again_when_asked(tmp_path, voice):
  at = desk(tmp_path, voice)
  voice.broken = True
  (told,) = read_report(ask(at, call()), call())
  assert told.status == Status.FAILED and voice.asked == 2
  voice.broken = False
  (told,) = read_report(ask(at, call()), call())
  assert told.status == Status.COMPLETED and told.result_text == "3"


def test_what_breaks_a_call_ends_the_job(tmp_path, voice, monkeypatch):
  at = desk(tmp_path, voice)
  with pytest.raises(asyncio.TimeoutError):
    asyncio.run(asyncio.wait_for(at.failed(), 0.05))

  async def broken(*_):
    raise RuntimeError("the sampler stopped")

  monkeypatch.setattr("mgrpo_jax.decoupled.desk.call_with_retries", broken)
  with pytest.raises(RequestError) as caught:
    ask(at, call())
  assert caught.value.status == 503
  assert str(asyncio.run(at.failed())) == "the sampler stopped"


def test_the_next_step_forgets_the_last_one(tmp_path, voice):
  at = desk(tmp_path, voice)
  ask(at, call())
  at.open(5)
  assert [path.name for path in tmp_path.iterdir()] == ["step_000005.jsonl"]
  assert at.own(identity(11, "t", 0, "researcher", 0, 0)) is None


def test_evaluations_are_answered_and_not_kept(tmp_path, voice):
  at = desk(tmp_path, voice)
  asked = call(purpose="testing", task="held-out")
  assert ask(at, asked)["text"] == "1"
  assert ask(at, asked)["text"] == "2"
  assert at.own(identity(11, "held-out", 0, "researcher", 0, 0)) is None


def test_a_call_is_graded_by_the_stage_of_its_step(tmp_path, voice):
  """The last easy step and the first hard one, where its own find counts."""
  researcher = METHOD.reward_weights["researcher"]
  method = dataclasses.replace(
      METHOD,
      reward_weights={
          "researcher": dataclasses.replace(researcher, expert=0.0)
      },
      stage_rewards={"hard": {"researcher": researcher}},
  )
  accounts = {}
  for done in (3, 4):
    at = desk(tmp_path, voice, done, method=method)
    (told,) = read_report(ask(at, call(done=done)), call(done=done))
    accounts[done] = told.account
    at.close()
  assert accounts[3].expert == 0.0 < accounts[4].expert


def test_turns_that_came_too_late_are_told_at_the_end_of_a_step(
    tmp_path, voice, caplog
):
  at = desk(tmp_path, voice)
  at._here["training"].counters["late_turns"] += 2
  at.close()
  assert caplog.text.count("2 turns took longer than rollout.turn_dead") == 1
  at.open(5)
  at.close()
  assert caplog.text.count("took longer") == 1
