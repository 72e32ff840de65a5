"""One rollout as a tree of calls, as HTML that stands in any page or notebook.

Drawn from the records a run leaves (`records.read_step`), without scripts or
requests. A call is a box with its token stream, run by run of prompt, sampled
and result tokens; a child's box stands where it was called, between the tokens
that asked and the tokens that came back.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence

from mgrpo_jax.report.records import (
    GroupRecord,
    TokenRole,
    TrajectoryRecord,
)
from mgrpo_jax.report.text import escape
from mgrpo_jax.types import NO_PARENT

_COLOURS = 6  # of roles, in tree.css
_UNKNOWN = "–"


def draw(group: GroupRecord, *, rollout: int) -> str:
  """Draws one rollout, beside it the rewards and advantages of all of them.

  Args:
    group: the K rollouts of a task, as `records.read_step` reads them.
    rollout: which of them is drawn as a tree, 0..K-1.

  Returns:
    An HTML element with its own style.

  Raises:
    ValueError: there is no such rollout.
  """
  if not 0 <= rollout < group["num_rollouts"]:
    raise ValueError(
        f"rollout: {rollout}, allowed: 0 to {group['num_rollouts'] - 1}"
    )
  folder = importlib.resources.files(__package__)
  style = (folder / "tree.css").read_text("utf-8")
  parts = [
      f'<div class="team-tree"><style>{style}</style>',
      *_question(group),
      '<div class="columns"><div class="tree">',
      *_tree(group, rollout),
      '</div><div class="scores">',
      *_table(group, rollout),
      "</div></div></div>",
  ]
  return "\n".join(parts)


def _question(group: GroupRecord) -> Iterator[str]:
  """What was asked, and what answers it."""
  task = group["task"]
  yield f'<div class="question">{escape(task["question"])}</div>'
  yield f'<div class="hint">accepted: {escape(" | ".join(task["answers"]))}'
  for hop in task["evidence"]:
    yield f'<br>{escape(hop["question"])} → {escape(hop["page"])}'
  yield "</div>"


def _tree(group: GroupRecord, rollout: int) -> Iterator[str]:
  """The boxes of a rollout, the root's around all others."""
  calls = group["trajectories"]
  roles = _roles(group)
  for position, call in enumerate(calls):
    if call["rollout"] == rollout and call["parent"] == NO_PARENT:
      yield from _box(calls, position, roles)
  yield '<div class="hint">'
  for role in ("prompt", "sampled", "result"):
    yield f'<span class="token {role}">{role}</span>'
  yield "tokens; only sampled ones are trained on</div>"


def _box(
    calls: Sequence[TrajectoryRecord], position: int, roles: Sequence[str]
) -> Iterator[str]:
  """One call, its children where they were called."""
  call = calls[position]
  children = [i for i, c in enumerate(calls) if c["parent"] == position]
  colour = roles.index(call["role"]) % _COLOURS
  yield f'<section class="call c{colour}">{_head(call)}'
  turns = iter(call["turns"])
  for role, tokens in _spans(call):
    yield f'<div class="span"><span class="gutter">{role}</span>'
    yield f'<span class="tokens">{tokens}</span></div>'
    turn = next(turns, None) if role == "sampled" else None
    if turn and turn["kind"] == "call":
      # Calls refused for want of budget come last, so order pairs the others.
      asked = [i for i in children if calls[i]["role"] == turn["name"]][:1]
      for child in asked:
        children.remove(child)
        yield from _box(calls, child, roles)
  for child in children:  # whose call broke before the turn was recorded
    yield from _box(calls, child, roles)
  yield "</section>"


def _head(call: TrajectoryRecord) -> str:
  """Who was called, how it ended, and what it earned."""
  facts = {
      "reward": _number(call["rewards"].get("total")),
      "advantage": _signed(call["advantage"]),
      "version": str(call["version_max"]),
  }
  chips = "".join(
      f'<span class="chip">{name} <b>{value}</b></span>'
      for name, value in facts.items()
  )
  status = "" if call["status"] == "COMPLETED" else call["status"].lower()
  return (
      f'<header><b class="role">{escape(_name(call))}</b>{chips}'
      f'<span class="chip down">{escape(status)}</span></header>'
  )


def _spans(call: TrajectoryRecord) -> Iterator[tuple[TokenRole, str]]:
  """The token stream in runs of one role, a title on each token."""
  start = 0
  logprobs = iter(call["logprobs"])
  for role, length in call["spans"]:
    tokens = []
    for i in range(start, start + length):
      fact = f"{role}: token {i + 1} of {len(call['tokens'])}"
      if role == "sampled":
        fact += f", log-prob {next(logprobs):.3f} nats"
      piece = escape(call["pieces"][i]).replace("\n", "↵\n")
      tokens.append(
          f'<span class="token {role}" title="{escape(fact)}">{piece}</span>'
      )
    yield role, "".join(tokens)
    start += length


def _table(group: GroupRecord, rollout: int) -> Iterator[str]:
  """A row a call: components of the reward, total and advantage."""
  calls = group["trajectories"]
  parts = {n: None for c in calls for n in c["rewards"] if n != "total"}
  gains = [abs(call["advantage"] or 0.0) for call in calls]
  scale = max(gains, default=0.0) or 1.0
  names = ("rollout", "call", *parts, "total", "advantage")
  yield "<table><thead><tr>"
  yield "".join(f"<th>{escape(name)}</th>" for name in names)
  yield "</tr></thead><tbody>"
  roles = _roles(group)
  for call in calls:
    is_root = call["parent"] == NO_PARENT
    shown = "shown" if call["rollout"] == rollout else ""
    number = str(call["rollout"] + 1) if is_root else ""
    colour = roles.index(call["role"]) % _COLOURS
    earned = [call["rewards"].get(name) for name in (*parts, "total")]
    yield f'<tr class="{"root" if is_root else ""} {shown}">'
    yield f'<td>{number}</td><td class="c{colour}">{escape(_name(call))}</td>'
    yield "".join(f"<td>{_number(value)}</td>" for value in earned)
    yield f"<td>{_bar(call['advantage'], scale)}</td></tr>"
  yield "</tbody></table>"
  yield '<div class="hint">all rollouts; the one drawn is shaded</div>'


def _bar(advantage: float | None, scale: float) -> str:
  """An advantage as a number, and as a bar to either side of zero."""
  gain = advantage or 0.0
  width = 50 * abs(gain) / scale
  left = 50 if gain >= 0 else 50 - width
  side = "up" if gain >= 0 else "down"
  return (
      f'{_signed(advantage)} <span class="bar"><i class="{side}"'
      f' style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'
  )


def _roles(group: GroupRecord) -> list[str]:
  """Every role once, in order of appearance."""
  return list(dict.fromkeys(call["role"] for call in group["trajectories"]))


def _name(call: TrajectoryRecord) -> str:
  """The role; with a number where it can be called more than once."""
  if call["parent"] == NO_PARENT:
    return call["role"]
  return f"{call['role']} {call['call'] + 1}"


def _number(value: float | None) -> str:
  """Two decimals at most."""
  return _UNKNOWN if value is None else f"{round(value, 2):g}"


def _signed(value: float | None) -> str:
  """Two decimals and a sign; zero has none."""
  if value is None:
    return _UNKNOWN
  return f"{value:+.2f}" if round(value, 2) else "0"
