"""Tasks from files: one JSON object a line.

    {"id": "gaia-1", "question": "…", "answers": ["…"]}

`stage` (`easy` or `hard`, else taken as `hard`), `hops` (>= 0, else the number
of evidence entries), `evidence` (objects with `page`, `question`, `query`,
`answers`) and `meta` (an object) may be given as well; nothing else may.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mgrpo_jax import answers, atomic
from mgrpo_jax.types import Evidence, Task

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REQUIRED = frozenset({"id", "question", "answers"})
_OPTIONAL = frozenset({"stage", "hops", "evidence", "meta"})
_EVIDENCE = frozenset({"page", "question", "query", "answers"})
_STAGES = ("easy", "hard")


def read_jsonl(path: str | pathlib.Path) -> list[Task]:
  """Reads tasks from a file; blank lines are skipped.

  Args:
    path: UTF-8 text.

  Returns:
    The tasks in the file's order.

  Raises:
    ValueError: where the file cannot be read or a line is not a task, naming
      file, line and what is wrong.
  """
  tasks: list[Task] = []
  seen: dict[str, int] = {}
  for number, line in _lines(path):
    try:
      task = parse(line)
      if task.id in seen:
        raise ValueError(f"id {task.id!r} is that of line {seen[task.id]} too")
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    seen[task.id] = number
    tasks.append(task)
  if not tasks:
    raise ValueError(f"{path}: holds no task")
  return tasks


def write_jsonl(path: str | pathlib.Path, tasks: Iterable[Task]) -> None:
  """Writes tasks for `read_jsonl`; tuples in `meta` come back as lists.

  Args:
    path: file to write, whole or not at all.
    tasks: whose meta holds nothing that JSON lacks.
  """
  lines = [json.dumps(to_json(task), ensure_ascii=False) for task in tasks]
  atomic.write(pathlib.Path(path), ("\n".join(lines) + "\n").encode())


def parse(line: str) -> Task:
  """Reads one task from its JSON.

  Args:
    line: a JSON object.

  Returns:
    The task.

  Raises:
    ValueError: naming the field that is missing, unknown or out of range.
  """
  try:
    data = json.loads(
        line, parse_constant=_refuse_constant, parse_float=_finite
    )
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON: {error.msg} at {error.colno}") from error
  except RecursionError as error:
    raise ValueError("not a task: nested too deeply") from error
  _check_keys("task", data, _REQUIRED, _OPTIONAL)
  evidence = _list("evidence", data.get("evidence", []))
  steps = tuple(_evidence(i, entry) for i, entry in enumerate(evidence))
  if not isinstance(data["id"], str) or not _ID.fullmatch(data["id"]):
    raise ValueError(
        f"id must be 1 to 128 of letters, digits, '.', '_' and '-', beginning"
        f" with a letter or digit, got {data['id']!r}"
    )
  stage = data.get("stage", "hard")
  if stage not in _STAGES:
    raise ValueError(f"stage must be one of {list(_STAGES)}, got {stage!r}")
  hops = data.get("hops", len(steps))
  if not isinstance(hops, int) or isinstance(hops, bool) or hops < 0:
    raise ValueError(f"hops must be an integer >= 0, got {hops!r}")
  meta = data.get("meta", {})
  if not isinstance(meta, dict):
    raise ValueError(f"meta must be an object, got {meta!r}")
  return Task(
      id=data["id"],
      question=_text("question", data["question"]),
      answers=_answers("answers", data["answers"]),
      stage=stage,
      hops=hops,
      evidence=steps,
      meta=meta,
  )


def to_json(task: Task) -> dict[str, Any]:
  """Returns a task as JSON values, every field written out."""
  return {
      "id": task.id,
      "question": task.question,
      "answers": list(task.answers),
      "stage": task.stage,
      "hops": task.hops,
      "evidence": [
          {
              "page": e.page,
              "question": e.question,
              "query": e.query,
              "answers": list(e.answers),
          }
          for e in task.evidence
      ],
      "meta": dict(task.meta),
  }


def _lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields numbered lines that are not blank."""
  try:
    with open(path, encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text: {error.reason}") from error


def _evidence(index: int, data: Any) -> Evidence:
  """Reads one entry of `evidence`."""
  name = f"evidence[{index}]"
  _check_keys(name, data, _EVIDENCE, frozenset())
  return Evidence(
      page=_text(f"{name}.page", data["page"]),
      question=_text(f"{name}.question", data["question"]),
      query=_text(f"{name}.query", data["query"]),
      answers=_answers(f"{name}.answers", data["answers"]),
  )


def _check_keys(
    name: str, data: Any, required: frozenset[str], optional: frozenset[str]
) -> None:
  """Refuses anything but an object with the expected keys."""
  if not isinstance(data, Mapping):
    raise ValueError(f"{name} must be an object, got {type(data).__name__}")
  if missing := required - set(data):
    raise ValueError(f"{name} lacks {sorted(missing)}")
  if unknown := set(data) - required - optional:
    allowed = sorted(required | optional)
    raise ValueError(f"{name} has {sorted(unknown)}; allowed are {allowed}")


def _text(name: str, value: Any) -> str:
  """Returns a text that is not blank."""
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{name} must be a text that is not blank, got {value!r}")
  if any("\ud800" <= char <= "\udfff" for char in value):
    raise ValueError(f"{name} must be Unicode text, has a lone surrogate")
  return value


def _list(name: str, value: Any) -> list[Any]:
  """Returns a list."""
  if not isinstance(value, list):
    raise ValueError(f"{name} must be a list, got {value!r}")
  return value


def _answers(name: str, value: Any) -> tuple[str, ...]:
  """Returns one or more accepted answers."""
  entries = _list(name, value)
  if not entries:
    raise ValueError(f"{name} must not be empty")
  accepted = tuple(_text(f"{name}[{i}]", v) for i, v in enumerate(entries))
  for i, text in enumerate(accepted):
    if not answers.words(text):
      raise ValueError(f"{name}[{i}] must hold a word or number, got {text!r}")
  return accepted


def _finite(digits: str) -> float:
  """Refuses numbers too large for a float, which JSON could not write."""
  number = float(digits)
  if not math.isfinite(number):
    raise ValueError(f"{digits} is too large")
  return number


def _refuse_constant(name: str) -> float:
  """Refuses NaN and infinities, which are not JSON."""
  raise ValueError(f"{name} is not JSON")
