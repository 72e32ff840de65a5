"""The command that scores a run again: on its splits, on files of tasks."""

import json
import math

import pytest
from commands import command, refused
from test_serving_command import publish, run

from mgrpo_jax.tasks import benchmarks

__all__ = ["run"]  # a fixture
TASKS = [
    {
        "id": "peru",
        "question": "What is the capital of Peru?",
        "answers": ["x"],
    },
    {"id": "none", "question": "What is a chair?", "answers": ["a seat"]},
]


def written(path, *tasks):
  path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
  return path


def asked(run, path, *arguments):
  """The command, ended."""
  return command("evaluate", f"--workdir={run}", f"--tasks={path}", *arguments)


def test_questions_of_ones_own_are_asked(run, tmp_path):
  publish(run)
  path = written(tmp_path / "own.jsonl", *TASKS)
  assert len(benchmarks.read_jsonl(path)) == 2
  ended = asked(run, path)
  assert ended.returncode == 0, ended.stderr
  found = json.loads(ended.stdout.splitlines()[-1])
  assert found["n"] == 2 and not math.isnan(found["accuracy"])


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "holds no task"),
        ('{"id": "1", "question": "?"}\n', ":1: task lacks ['answers']"),
    ],
)
def test_files_without_tasks_are_refused(run, tmp_path, text, told):
  path = tmp_path / "own.jsonl"
  path.write_text(text)
  assert told in refused(asked(run, path))


def test_a_split_and_a_file_exclude_each_other(run, tmp_path):
  path = written(tmp_path / "own.jsonl", *TASKS)
  assert "--split" in refused(asked(run, path, "--split=dev"))
