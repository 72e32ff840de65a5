import asyncio
import dataclasses

import pytest
from rules import grade

from mgrpo_jax import answers, rollout
from mgrpo_jax.agents import expert
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.team import Team
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.team import chat_of, small_team, small_tools
from mgrpo_jax.types import Evidence, Status

CHAIN = dataclasses.replace(
    corpus.task(),
    question="currency of where the capital is the capital of Peru?",
    answers=("Sol",),
    evidence=(
        corpus.task().evidence[0],
        Evidence(
            page="peru/facts#currency",
            question="currency of where the capital is Lima",
            query="Lima currency",
            answers=("Sol",),
        ),
    ),
)
TITLES = {p.id: p.title for p in corpus.passages()}


def play(protocol, *, hasty=expert.never, task=None, titles=TITLES, roles=None):
  roles = roles or small_team()
  task = task or corpus.task()
  environment = expert.environment(
      task,
      team=roles,
      coded={},
      chats={name: chat_of(protocol, roles) for name in roles.policies},
      protocol=protocol,
      tools=small_tools(),
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
    assert grade(group.task, call) == 1.0
    assert [turn.name for turn in call.turns] == ["search", "visit", ""]
  assert all(t.loss_mask.sum() > 0 for t in group.trajectories)


def is_researcher(moment):
  return moment.role.name == "researcher"


def test_the_hasty_researcher_reports_a_title_without_opening_it():
  group = play(COMPACT, hasty=is_researcher, task=CHAIN)
  _, first, _ = group.trajectories
  assert first.result_text == "Peru"
  assert [turn.name for turn in first.turns] == ["search", ""]
  assert grade(group.task, first) == 0.0


def test_a_chain_that_goes_well_ends_with_the_last_report():
  root, *calls = play(COMPACT, task=CHAIN).trajectories
  assert [call.result_text for call in calls] == ["Lima", "Sol"]
  assert root.result_text == "Sol"


def test_the_caller_takes_a_wrong_report_as_it_is():
  root, first, second = play(
      COMPACT, hasty=is_researcher, task=CHAIN
  ).trajectories
  assert first.request == "capital of Peru"
  assert second.request == "currency of where the capital is Peru"
  assert second.turns[0].argument == "Peru currency"
  assert root.result_text == second.result_text == "Peru"


def test_what_the_evidence_does_not_tell_is_guessed_even_without_haste():
  def hasty_at_first(moment):
    return moment.request == "capital of Peru"

  root, _, second = play(COMPACT, hasty=hasty_at_first, task=CHAIN).trajectories
  assert [turn.name for turn in second.turns] == ["search", ""]
  assert root.result_text == "Peru"


def test_nothing_is_computed_from_wrong_reports():
  with pytest.raises(expert.LostError, match="nothing known follows"):
    play(COMPACT, hasty=is_researcher)


def test_the_hasty_main_agent_answers_with_the_first_report():
  group = play(COMPACT, hasty=lambda moment: moment.role.name == "main")
  root, *calls = group.trajectories
  assert len(calls) == 1
  assert root.result_text == "Lima"


def test_it_says_so_where_the_evidence_does_not_help():
  with pytest.raises(expert.LostError, match="did not list 'Atlantis'"):
    play(COMPACT, titles=dict.fromkeys(TITLES, "Atlantis"))


def test_names_are_replaced_as_whole_words_only():
  first, second = CHAIN.evidence
  short = dataclasses.replace(
      CHAIN,
      evidence=(
          dataclasses.replace(first, answers=("Li", "Lima")),
          dataclasses.replace(
              second,
              question="currency of Li, not of Lima",
              query="Li or Lima currency",
          ),
      ),
  )
  _, _, second_call = play(
      COMPACT, hasty=is_researcher, task=short
  ).trajectories
  assert second_call.request == "currency of Peru, not of Lima"
  assert second_call.turns[0].argument == "Peru or Lima currency"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evidence": ()}, "has no evidence"),
        ({"titles": {}}, "has no title"),
    ],
)
def test_what_a_task_lacks_is_said(changes, message):
  titles = changes.pop("titles", TITLES)
  with pytest.raises(expert.LostError, match=message):
    play(COMPACT, task=dataclasses.replace(CHAIN, **changes), titles=titles)


@pytest.mark.parametrize("budget", [{"max_turns": 1}, {"max_calls": 1}])
def test_errors_are_no_reports(budget):
  main, researcher = small_team().roles
  if "max_turns" in budget:
    researcher = dataclasses.replace(researcher, **budget)
  else:
    main = dataclasses.replace(main, **budget)
  roles = Team(roles=(main, researcher), root="main")
  with pytest.raises(expert.LostError, match="came back with 'error: no"):
    play(COMPACT, roles=roles, task=CHAIN)


def test_one_agent_with_all_tools_looks_every_hop_up_itself():
  _, researcher = small_team().roles
  solo = dataclasses.replace(researcher, max_turns=9)
  group = play(COMPACT, roles=Team(roles=(solo,), root="researcher"))
  (only,) = group.trajectories
  assert [turn.name for turn in only.turns] == ["search", "visit"] * 2 + [""]
  assert answers.matches(only.result_text, group.task.answers)
