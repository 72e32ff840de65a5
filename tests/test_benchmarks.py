"""Tasks read from JSON lines."""

import json

import pytest

from mgrpo_jax.tasks import benchmarks
from mgrpo_jax.types import Evidence, Task

FULL = Task(
    id="a-1.b_2",
    question="Where is Lima?",
    answers=("Perú", "Peru"),
    stage="easy",
    hops=1,
    evidence=(
        Evidence(page="p/q#r", question="q", query="s", answers=("Peru",)),
    ),
    meta={"kind": "1hop:x", "level": 2},
)
LEAST = '{"id": "x", "question": "?", "answers": ["y"]}'


def test_written_tasks_are_read_again(tmp_path):
  path = tmp_path / "tasks.jsonl"
  benchmarks.write_jsonl(path, [FULL, benchmarks.parse(LEAST)])
  assert benchmarks.read_jsonl(path) == [FULL, benchmarks.parse(LEAST)]


def test_what_is_left_out_is_filled_in(tmp_path):
  path = tmp_path / "tasks.jsonl"
  path.write_text(f"\n{LEAST}\n\n")
  (task,) = benchmarks.read_jsonl(path)
  assert task == Task(
      id="x",
      question="?",
      answers=("y",),
      stage="hard",
      hops=0,
      evidence=(),
      meta={},
  )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "../x"}, "id must be"),
        ({"id": ".x"}, "id must be"),
        ({"id": 7}, "id must be"),
        ({"id": "a" * 129}, "id must be"),
        ({"question": "  "}, "question must be a text"),
        ({"answers": []}, "answers must not be empty"),
        ({"answers": "y"}, "answers must be a list"),
        ({"answers": ["y", 3]}, r"answers\[1\] must be a text"),
        ({"answers": ["???"]}, r"answers\[0\] must hold a word"),
        ({"question": "\ud800 x"}, "question must be Unicode"),
        ({"stage": "middling"}, "stage must be one of .*'middling'"),
        ({"hops": -1}, "hops must be"),
        ({"hops": True}, "hops must be"),
        ({"meta": []}, "meta must be an object"),
        ({"difficulty": 3}, r"has \['difficulty'\]; allowed are"),
        ({"evidence": [{"page": "p"}]}, r"evidence\[0\] lacks"),
        ({"evidence": {}}, "evidence must be a list"),
        ({"evidence": ["p"]}, r"evidence\[0\] must be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
  path = tmp_path / "tasks.jsonl"
  bad = json.dumps(json.loads(LEAST) | {"id": "z"} | change)
  path.write_text(f"{LEAST}\n{bad}\n")
  with pytest.raises(ValueError, match=rf"tasks\.jsonl:2: .*{message}"):
    benchmarks.read_jsonl(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": ', "not JSON"),
        ("[1]", "task must be an object"),
        ('{"id": "x"}', r"lacks \['answers', 'question'\]"),
        (LEAST[:-1] + ', "meta": {"a": NaN}}', "NaN is not JSON"),
        (LEAST[:-1] + ', "meta": {"a": 1e999}}', "1e999 is too large"),
        ("[" * 100_000, "nested too deeply"),
        (LEAST, "id 'x' is that of line 1 too"),
    ],
)
def test_lines_that_are_no_tasks(tmp_path, line, message):
  path = tmp_path / "tasks.jsonl"
  path.write_text(f"{LEAST}\n{line}\n")
  with pytest.raises(ValueError, match=rf"tasks\.jsonl:2: .*{message}"):
    benchmarks.read_jsonl(path)


def test_unreadable_files(tmp_path):
  with pytest.raises(ValueError, match="No such file"):
    benchmarks.read_jsonl(tmp_path / "none.jsonl")
  empty = tmp_path / "empty.jsonl"
  empty.write_text("\n")
  with pytest.raises(ValueError, match="holds no task"):
    benchmarks.read_jsonl(empty)
  binary = tmp_path / "binary.jsonl"
  binary.write_bytes(b"\xff\xfe{}")
  with pytest.raises(ValueError, match="not UTF-8"):
    benchmarks.read_jsonl(binary)
