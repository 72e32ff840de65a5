"""The run report: one HTML file that asks nothing of any other machine."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic
from mgrpo_jax.report import browse, curves, png, summary, svg, text, writer
from mgrpo_jax.report.progress import duration
from mgrpo_jax.report.text import escape
from mgrpo_jax.workdir import Workdir

MAX_STEPS = 7
MAX_ROLLOUT_BYTES = 3_500_000
MAX_PROBLEMS = 8  # named on the page; the others are counted
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_SCRIPT = re.compile(r"<script>(.*)</script>", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What was written.

  Attributes:
    page: the HTML file.
    pictures: the curves as PNG.
    shown_rollouts: rollouts that can be opened in the page.
    problems: a line for everything damaged that was skipped.
  """

  page: pathlib.Path
  pictures: tuple[pathlib.Path, ...]
  shown_rollouts: int
  problems: tuple[str, ...]


def write(workdir: str | os.PathLike[str]) -> Report:
  """Writes `report/index.html` and the curves of a run.

  Works on finished runs and on those still going.

  Args:
    workdir: a run directory.

  Returns:
    What was written.

  Raises:
    workdir.NotARunError: `workdir` is not a run directory.
    OSError: it cannot be read, or the report cannot be written.
  """
  workdir = pathlib.Path(workdir)
  config = Workdir(workdir).read_config()
  outcome, problems = summary.read(workdir / "summary.json")
  rows, torn = _metrics(workdir / writer.METRICS_FILE)
  selection = browse.select(
      workdir / "rollouts", max_steps=MAX_STEPS, max_bytes=MAX_ROLLOUT_BYTES
  )
  problems = (*problems, *torn, *selection.problems)
  page = workdir / "report" / "index.html"
  atomic.write(
      page, _render(workdir, config, outcome, rows, selection, problems)
  )
  return Report(
      page=page,
      pictures=tuple(png.write(rows, page.parent)),
      shown_rollouts=selection.shown_rollouts,
      problems=problems,
  )


def _metrics(
    path: pathlib.Path,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
  """Reads the metrics, none where there are none yet."""
  if not path.exists():
    return [], ()
  if not path.is_file():
    return [], (f"{path} is no file",)
  rows = writer.read_metrics(path)
  lost = len(path.read_bytes().splitlines()) - len(rows)
  if not lost:
    return rows, ()
  return rows, (f"{path.name}: skipped {lost} torn or repeated lines",)


def _render(
    workdir: pathlib.Path,
    config: Any,
    outcome: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    selection: browse.Selection,
    problems: Sequence[str],
) -> str:
  """Fills the template."""
  place = workdir.resolve().name
  name = config.get("name") if isinstance(config, dict) else None
  title = escape(f"{name} · {place}" if name and name != place else place)
  template, style = resource("page.html"), resource("page.css")
  script = fill(_matched(_SCRIPT, template), unseen=text.UNSEEN)
  drawn, charts = _curves(rows)
  data = selection.data | {"charts": charts, "roles": _team(rows)}
  return fill(
      template,
      policy=_policy(style, script),
      title=title,
      style=style,
      header="\n".join(_header(title, config, outcome, rows, problems)),
      curves=drawn + _ages(rows),
      shown=_shown(selection),
      footer=f"Written by mgrpo_jax from {escape(place)}/.",
      unseen=text.UNSEEN,
      data=text.embed_json(data),
  )


def resource(name: str) -> str:
  """Reads a file that lies beside this module.

  Args:
    name: of the file.

  Returns:
    Its text.
  """
  return (importlib.resources.files(__package__) / name).read_text("utf-8")


def _matched(pattern: re.Pattern[str], template: str) -> str:
  """The first group of a pattern that the template is known to hold."""
  match = pattern.search(template)
  if match is None:
    raise ValueError(f"template: nothing matches {pattern.pattern}")
  return match[1]


def fill(template: str, **values: str) -> str:
  """Replaces the slots of a template, in one pass.

  Args:
    template: text with slots, `{{name}}`.
    **values: by name; what is put in is never searched for slots.

  Returns:
    The text.
  """
  return _SLOT.sub(lambda match: values[match[1]], template)


def _policy(style: str, script: str) -> str:
  """Content security policy: this style, this script, no requests at all."""
  return (
      f"default-src 'none'; img-src data:; style-src '{digest(style)}';"
      f" script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
  )


def digest(source: str) -> str:
  """Computes how a content security policy names a block it admits.

  Args:
    source: what stands between the tags.

  Returns:
    `sha256-…`.
  """
  found = hashlib.sha256(source.encode("utf-8")).digest()
  return f"sha256-{base64.b64encode(found).decode('ascii')}"


def _header(
    title: str,
    config: Any,
    outcome: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    problems: Sequence[str],
) -> Iterator[str]:
  """Title, result, facts, configuration and what was damaged."""
  yield '<div class="over">run report</div>'
  yield f"<h1>{title}</h1>"
  scores = _scores(outcome)
  if len(scores) == 2:
    yield f'<p class="lead">{_sentence(scores)}</p>'
  elif not outcome:
    last = rows[-1]["step"] if rows else "none"
    yield f'<p class="lead">Not finished; last step recorded: {last}.</p>'
  if scores:
    yield svg.intervals(scores)
    yield '<p class="hint">with 95% Wilson intervals</p>'
  yield '<dl class="facts">'
  for name, value in _facts(config, outcome, rows):
    yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
  yield "</dl>"
  yield "<details><summary>Configuration</summary>"
  yield '<div class="config">'
  for key, value in _flat(config):
    yield f"<div><span>{escape(key)}</span> {escape(value)}</div>"
  yield "</div></details>"
  for problem in problems[:MAX_PROBLEMS]:
    yield f'<p class="warning">Skipped: {escape(problem)}</p>'
  if len(problems) > MAX_PROBLEMS:
    more = len(problems) - MAX_PROBLEMS
    yield f'<p class="warning">and {more} more problems</p>'


def _scores(
    outcome: Mapping[str, Any],
) -> list[tuple[str, float, tuple[float, float], int]]:
  """The accuracies of `summary.json` that are there: label, value, ci, n."""
  found = []
  for label in ("before", "after"):
    score = outcome.get("eval", {}).get(label)
    if score is not None:
      low, high = score["ci95"]
      found.append((label, score["accuracy"], (low, high), score["n"]))
  return found


def _sentence(
    scores: Sequence[tuple[str, float, tuple[float, float], int]],
) -> str:
  """The result in words."""
  (_, before, _, _), (_, after, _, n) = scores
  verb = "rose" if after > before else "fell" if after < before else "stayed"
  return (
      f"Held-out accuracy {verb} from {before:.1%} to {after:.1%} on"
      f" {n:,} questions."
  )


def _facts(
    config: Any,
    outcome: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, str]]:
  """Name and value of what a reader asks first; what is unknown is left out."""
  last: dict[str, Any] = {}
  for row in rows:
    last |= row
  tokens = outcome.get("tokens", {})
  known = {
      "steps": outcome.get("steps", last.get("step")),
      "wall time": outcome.get("seconds"),
      "generated tokens": tokens.get("generated", last.get("generated_tokens")),
      "trained tokens": tokens.get("trained", last.get("trained_tokens")),
      "compilations": outcome.get("compilations", last.get("compilations")),
      "peak memory": outcome.get("peak_rss_bytes", last.get("peak_rss_bytes")),
      "seed": outcome.get("seed", _get(config, "seed")),
      "commit": outcome.get("commit"),
  }
  for name, value in known.items():
    if value in (None, ""):
      continue
    if name == "wall time":
      value = duration(value)
    elif name == "peak memory":
      value = f"{value / 2**30:.2f} GiB"
    elif name == "commit":
      value = str(value)[:12]
    elif name != "seed":
      value = f"{value:,.0f}"
    yield name, str(value)


def _get(config: Any, key: str) -> Any:
  """A value of the configuration; None where it has none."""
  return config.get(key) if isinstance(config, dict) else None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """Dotted keys and values of a nested configuration."""
  if isinstance(value, dict) and value:
    for key, child in value.items():
      yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))
  elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
    for i, child in enumerate(value):
      yield from _flat(child, f"{prefix}[{i}]")
  else:
    yield prefix, str(value)


def _team(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Roles in the order of their colours, so that trees match curves."""
  colours = curves.palette(rows)
  return [key for key in colours if any(f"reward/{key}" in row for row in rows)]


def _curves(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[str, list[dict[str, Any]]]:
  """The charts' HTML, and what the script needs of each."""
  figures: list[str] = []
  pointers: list[dict[str, Any]] = []
  stages = curves.stages(rows)
  for chart in curves.CHARTS:
    lines = curves.series(rows, chart)
    if not lines:
      continue
    drawing, pointer = svg.chart(chart, lines, stages)
    unit = f' <span class="unit">{escape(chart.unit)}</span>'
    figures.append(
        f'<figure data-chart="{len(pointers)}"><figcaption><span>'
        f"{escape(chart.title)}{unit if chart.unit else ''}</span>"
        f"<output></output></figcaption>{drawing}</figure>"
    )
    pointers.append(pointer)
  if not figures:
    return "<h2>Curves</h2><p class=hint>No metrics yet.</p>", []
  return (
      "<h2>Curves</h2><p class=hint>Over steps. Pale: single steps; bold:"
      " their moving mean; dotted: where a stage of the curriculum begins."
      " Point at a curve to read it.</p>"
      f'<div class="charts">{"".join(figures)}</div>',
      pointers,
  )


def _ages(rows: Sequence[Mapping[str, Any]]) -> str:
  """How old what was trained on was; nothing where it never was."""
  shares = curves.shares(rows, "aged")
  if not any(int(age) for age in shares):
    return ""
  drawing = svg.bars(
      [
          (f"{age} update{'s' if age != '1' else ''}", share)
          for age, share in sorted(shares.items(), key=lambda one: int(one[0]))
      ],
      "Age of what was trained on",
  )
  return (
      "<h2>Age</h2><p class=hint>Share of the trained trajectories by the"
      " updates since their oldest token was sampled; mean of the steps."
      f"</p>{drawing}"
  )


def _shown(selection: browse.Selection) -> str:
  """Says how much of the run the page holds, and explains the colours."""
  if not selection.total_steps:
    return "<p>No rollouts were recorded.</p>"
  return (
      f"<p class=hint>Shown: {selection.shown_steps} of"
      f" {selection.total_steps} steps, and {selection.shown_rollouts} of"
      f" {selection.read_rollouts} rollouts of these steps; all are in"
      " <code>rollouts/</code>. Arrow keys turn from rollout to rollout.</p>"
      '<p class=hint><span class="key prompt">prompt</span>'
      '<span class="key sampled">sampled: trained on</span>'
      '<span class="key result">result of a tool or call</span> Point at a'
      " token for its log-prob. "
      '<button type="button" id="shade" aria-pressed="false">shade by'
      " surprise</button></p>"
  )
