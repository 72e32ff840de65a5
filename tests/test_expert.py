import asyncio
import dataclasses

import pytest

from mgrpo_jax import answers, rewards, rollout
from mgrpo_jax.agents import expert
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.team import Team
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing import team as team_lib
from mgrpo_jax.types import Status

TITLES = {p.id: p.title for p in corpus.passages()}


def play(protocol, *, hasty=expert.never, task=None, titles=TITLES, roles=None):
  roles = roles or team_lib.small_team()
  task = task or corpus.task()
  environment = expert.environment(
      task,
      team=roles,
      chats={
          name: team_lib.chat_of(protocol, roles) for name in roles.policies
      },
      protocol=protocol,
      tools=team_lib.small_tools(),
      titles=titles,
      hasty=hasty,
  )
  return asyncio.run(
      rollout.run_group(task, environment=environment, num_rollouts=1, seed=0)
  )


@pytest.mark.parametrize("protocol", [COMPACT, HERMES])
def test_the_careful_expert_is_right_and_earns_everything(protocol):
  group = play(protocol)
  root, *calls = group.trajectories
  assert root.status == Status.COMPLETED
  assert answers.matches(root.result_text, group.task.answers)
  assert [call.result_text for call in calls] == ["Lima", "CFA franc"]
  for call in calls:
    assert rewards.evidence_grade(group.task, call) == 1.0
    assert [turn.name for turn in call.turns] == ["search", "visit", ""]
  assert all(t.loss_mask.sum() > 0 for t in group.trajectories)


def test_the_hasty_researcher_reports_a_title_without_opening_it():
  group = play(COMPACT, hasty=lambda moment: moment.role.name == "researcher")
  _, *calls = group.trajectories
  assert [call.result_text for call in calls] == ["Peru", "Chad"]
  for call in calls:
    assert [turn.name for turn in call.turns] == ["search", ""]
    assert rewards.evidence_grade(group.task, call) == 0.0


def test_the_hasty_main_agent_answers_with_the_first_report():
  group = play(COMPACT, hasty=lambda moment: moment.role.name == "main")
  root, *calls = group.trajectories
  assert len(calls) == 1
  assert root.result_text == "Lima"


def test_it_says_so_where_the_evidence_does_not_help():
  with pytest.raises(expert.LostError, match="did not list 'Atlantis'"):
    play(COMPACT, titles=dict.fromkeys(TITLES, "Atlantis"))


def test_one_agent_with_all_tools_looks_every_hop_up_itself():
  _, researcher = team_lib.small_team().roles
  solo = dataclasses.replace(researcher, max_turns=9)
  group = play(COMPACT, roles=Team(roles=(solo,), root="researcher"))
  (only,) = group.trajectories
  assert [turn.name for turn in only.turns] == ["search", "visit"] * 2 + [""]
  assert answers.matches(only.result_text, group.task.answers)
