import asyncio

from rules import RULES

from mgrpo_jax import evaluate
from mgrpo_jax.agents import expert
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.errors import InfrastructureError
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing import setup as setup_lib
from mgrpo_jax.testing.team import chat_of, small_team, small_tools


def ask(tasks, act):
  """Asks a team whose every role is played by a function of the task."""
  roles = small_team()
  by_question = {task.question: task for task in tasks}
  titles = {p.id: p.title for p in corpus.passages()}

  def environment_for(task):
    return expert.environment(
        task,
        team=roles,
        coded={},
        chats={n: chat_of(COMPACT, roles) for n in roles.policies},
        protocol=COMPACT,
        tools=small_tools(),
        titles=titles,
        hasty=lambda moment: act(moment, by_question),
    )

  return [
      asyncio.run(
          evaluate.evaluate(
              [task],
              environment=environment_for(task),
              rules=RULES,
              seed=0,
              max_concurrent=2,
          )
      )
      for task in tasks
  ]


def test_right_wrong_and_failed_are_told_apart():
  right, broken = setup_lib.tasks()[:2]
  wrong = corpus.task()  # of two hops, of which the hasty one does the first

  def act(moment, by_question):
    task = by_question.get(moment.request)
    if task is broken:
      raise InfrastructureError("no power")
    return task is wrong

  found = ask([right, wrong, broken], act)
  assert [f.overall.correct for f in found] == [1, 0, 0]
  assert [f.overall.n for f in found] == [1, 1, 0]
  assert [f.overall.failed for f in found] == [0, 0, 1]
  assert found[0].by_family["Capital"].n == 1
