"""Agent calls as they were recorded, played again on any engine.

A call is `{"prompt": ids, "turns": [{"sampled": n, "calls": [call, …],
"result": ids}, …]}`: n tokens are sampled after the prompt, the calls that the
turn makes are played, the result's tokens are appended, and so on. The tokens
sampled are the engine's own, as many as were recorded. Standard library only,
as workers import it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

Call = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Turn:
  """What an engine is asked for.

  Attributes:
    call: names the call, whose turns extend one stream.
    tokens: the whole stream so far, ids.
    count: tokens to sample.
    last: whether the call ends with this turn.
  """

  call: str
  tokens: list[int]
  count: int
  last: bool


def play(call: Call, name: str) -> Generator[Turn, list[int], None]:
  """Plays a call and those that it makes, depth first.

  Args:
    call: recorded.
    name: of the call; those that it makes get longer ones.

  Yields:
    Turns; what was sampled is to be sent back.
  """
  stream = list(call["prompt"])
  for number, turn in enumerate(call["turns"]):
    last = number + 1 == len(call["turns"])
    sampled = yield Turn(name, stream, turn["sampled"], last)
    stream = stream + list(sampled)
    for index, child in enumerate(turn["calls"]):
      yield from play(child, f"{name}.{number}.{index}")
    stream = stream + list(turn["result"])


def size(call: Call) -> dict[str, int]:
  """Counts what a call and those that it makes are.

  Args:
    call: recorded.

  Returns:
    Numbers of calls, turns and sampled tokens; tokens of the prompts and
    results, each counted once; the longest stream.
  """
  turns = call["turns"]
  sampled = sum(turn["sampled"] for turn in turns)
  given = len(call["prompt"]) + sum(len(turn["result"]) for turn in turns)
  found = {
      "calls": 1,
      "turns": len(turns),
      "sampled": sampled,
      "given": given,
      "longest": sampled + given,
  }
  for child in (child for turn in turns for child in turn["calls"]):
    inner = size(child)
    longest = max(found["longest"], inner["longest"])
    found = {key: found[key] + inner[key] for key in found}
    found["longest"] = longest
  return found
