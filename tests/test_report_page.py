"""The run report: text made safe, curves, selected rollouts, the page."""

import ast
import base64
import hashlib
import html.parser
import json
import math
import os
import re
import shutil
import subprocess

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from commands import ROOT, command
from test_report import HOSTILE, make_group, make_trajectory, pieces_of, write

from mgrpo_jax import metrics, store, types
from mgrpo_jax.report import browse, curves, page, png, text, writer
from mgrpo_jax.workdir import NotARunError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_rows(steps=60):
  """Metrics of a run of two stages, as `read_metrics` gives them."""
  rng = np.random.default_rng(0)
  rows = []
  for step in range(1, steps + 1):
    stage = "imitate" if step <= steps // 3 else "hard"
    row = {"step": step, "stage": stage, "time": 0.0}
    if stage == "imitate":
      row["nll/main"] = 3.0 / step
    else:
      row |= {"reward/main": rng.random(), "reward/researcher": rng.random()}
      row |= {"logprob_gap_mean/main": 1e-8, "logprob_gap_max/main": 2e-6}
      row |= {"tokens_per_second/rollout": 5e3, "compilations": 30.0}
    if step % 10 == 0:
      low, high = metrics.wilson(step, steps + 1)
      row["accuracy/dev"] = step / (steps + 1)
      row |= {"accuracy_low/dev": low, "accuracy_high/dev": high}
    rows.append(row)
  return rows


def make_run(directory, *, finished=True, steps=4, tasks=2):
  """A run directory whose every text is hostile."""
  directory.mkdir()
  config = {
      "name": "quick" + HOSTILE[0],
      "seed": 3,
      "roles": [{"a": HOSTILE[3]}],
  }
  (directory / "config.json").write_text(json.dumps(config))
  if finished:
    before = metrics.Accuracy(correct=30, n=100, failed=0).summary()
    after = metrics.Accuracy(correct=60, n=100, failed=0).summary()
    summary = {"steps": 60, "seconds": 83.0, "commit": "f" * 40}
    summary |= {"peak_rss_bytes": 3 << 30, "compilations": 41, "seed": 3}
    summary["eval"] = {"before": before, "after": after}
    summary["tokens"] = {"generated": 123_456, "trained": 1}
    (directory / "summary.json").write_text(json.dumps(summary))
  with writer.MetricsWriter(directory, last_step=-1) as log:
    for row in make_rows():
      named = {k: v for k, v in row.items() if k not in ("step", "time")}
      log.write(row["step"], named.pop("stage") + HOSTILE[2], named)
  for step in range(1, steps + 1):
    groups = [
        make_group(f"t{i}{HOSTILE[1]}", question=f"{i}" + "".join(HOSTILE))
        for i in range(tasks)
    ]
    write(directory / "rollouts", step, groups, stage="hard" + HOSTILE[0])
  return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The report of a finished run."""
  return page.write(make_run(tmp_path_factory.mktemp("view") / "run"))


class Document(html.parser.HTMLParser):
  """Elements, attributes and the contents of scripts and styles."""

  def __init__(self, source):
    super().__init__()
    self.tags, self.attributes, self.raw, self.text = [], [], [], []
    self.inside = False
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes.extend((tag, *pair) for pair in attrs)
    self.inside = tag in ("script", "style")
    if self.inside:
      self.raw.append((tag, dict(attrs).get("type"), ""))

  def handle_endtag(self, tag):
    self.inside = False

  def handle_data(self, data):
    if self.inside:
      tag, kind, before = self.raw[-1]
      self.raw[-1] = (tag, kind, before + data)
    else:
      self.text.append(data)

  def content(self, tag, kind=None):
    """The one element of a tag and type."""
    (found,) = [c for t, k, c in self.raw if (t, k) == (tag, kind)]
    return found


def test_spelled_text_shows_all_it_holds():
  assert text.spell("a\x00b\u202ec\ud83d") == "a‹U+0000›b‹U+202E›c‹U+D83D›"
  assert text.spell("line\n\ttab é 😀 عربى") == "line\n\ttab é 😀 عربى"
  assert text.escape("<a b='c'>&\"") == "&lt;a b=&#x27;c&#x27;&gt;&amp;&quot;"


@hypothesis.given(st.text(st.characters(codec=None)))
@hypothesis.settings(deadline=None)
def test_any_text_survives_embedding_and_cannot_leave_its_element(value):
  embedded = text.embed_json({"v": value, value: [value]})
  assert json.loads(embedded) == {"v": value, value: [value]}
  assert embedded.isascii() and not set("<>&") & set(embedded)
  text.escape(value).encode("utf-8")  # no half of a pair is left
  assert not set('<>"') & set(text.escape(value))


def test_lines_have_one_colour_a_name_and_keep_gaps_out():
  rows = make_rows()
  rows[40]["reward/main"] = math.nan
  by_name = {chart.name: chart for chart in curves.CHARTS}
  main, researcher = curves.series(rows, by_name["reward"])
  assert (main.label, researcher.label) == ("main", "researcher")
  assert len(main.steps) == 39 and len(researcher.steps) == 40
  assert np.isfinite(main.values).all()
  (nll,) = curves.series(rows, by_name["nll"])
  assert nll.colour == main.colour != researcher.colour
  (dev,) = curves.series(rows, by_name["accuracy"])
  assert (dev.low < dev.values).all() and (dev.values < dev.high).all()
  mean, largest = curves.series(rows, by_name["logprob_gap"])
  assert not mean.dashed and largest.dashed
  assert curves.value_range([mean, largest], log=True) == (
      pytest.approx(1e-8),
      pytest.approx(1e-5),
  )
  assert curves.series(rows, by_name["entropy"]) == []


def test_phases_have_colours_of_their_own_whatever_else_was_counted():
  phases = (
      "rollout", "step", "wait", "reward", "align", "update", "publish",
      "evaluate",
  )  # fmt: skip
  row = {"step": 0, "stage": "a", "reward/main": 0.5, "accuracy/dev": 0.5}
  row |= {f"events/{name}": 1.0 for name in ("calls", "timeouts", "retries")}
  row |= {f"tokens_per_second/{name}": 1.0 for name in phases[:2]}
  row |= {f"seconds/{phase}": 1.0 for phase in phases}
  (chart,) = [c for c in curves.CHARTS if c.name == "seconds"]
  lines = curves.series([row], chart)
  assert {line.label: line.colour for line in lines} == {
      phase: number for number, phase in enumerate(phases)
  }


def test_roles_and_policies_share_their_colours_with_nothing_else():
  row = {
      "step": 0, "stage": "a", "reward/planner": 0.5, "reward/reader": 0.5,
      "nll/planner": 1.0, "nll/shared": 1.0, "accuracy/dev": 0.5,
      "seconds/reader": 1.0, "seconds/rollout": 1.0,
  }  # fmt: skip
  colours = curves.palette([row])
  assert [colours[k] for k in ("planner", "reader", "shared")] == [0, 1, 2]
  assert (colours["dev"], colours["rollout"]) == (0, 0)


def test_smoothing_never_mixes_stages():
  rows = [
      {"step": s, "stage": "ab"[s >= 60], "reward/main": float(s >= 60)}
      for s in range(120)
  ]
  (line,) = curves.series(rows, curves.CHARTS[0])
  np.testing.assert_array_equal(line.smoothed, line.values)
  for row in rows:
    row["stage"] = "a"
  (line,) = curves.series(rows, curves.CHARTS[0])
  assert 0 < line.smoothed[59] < line.smoothed[60] < 1
  assert (np.diff(line.smoothed) >= 0).all()
  (line,) = curves.series(rows[50:70], curves.CHARTS[0])
  assert line.smoothed is line.values  # too short to be smoothed


def test_long_runs_are_thinned_without_changing_their_mean():
  rows = [
      {"step": s, "stage": "a", "reward/main": math.sin(s)}
      for s in range(40 * curves.MAX_POINTS)
  ]
  (line,) = curves.series(rows, curves.CHARTS[0])
  assert len(line.steps) == curves.MAX_POINTS
  assert line.values.mean() == pytest.approx(
      np.mean([row["reward/main"] for row in rows])
  )
  assert (np.diff(line.steps) > 0).all()


@hypothesis.given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@hypothesis.settings(deadline=None)
def test_ticks_are_few_round_and_within(low, width, count):
  high = low + width
  hypothesis.assume(high > low)
  marks = curves.ticks(low, high, count=count)
  slack = 1e-6 * width + 1e-9 * abs(low)
  assert all(low - slack <= mark <= high + slack for mark in marks)
  assert len(marks) <= count + 1
  if len(marks) > 1:
    mantissa = f"{(marks[-1] - marks[0]) / (len(marks) - 1):.1e}"[:3]
    assert mantissa in ("1.0", "2.0", "5.0")


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (0.25, "0.25"),
        (1200, "1,200"),
        (38_400, "38.4k"),
        (2.1e6, "2.1M"),
        (3e-7, "3e-07"),
        (1.5e-5, "1.5e-05"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_on_axes_are_short(value, shown):
  assert curves.short(value) == shown


def test_spread_takes_first_middle_and_last():
  assert browse.spread(range(0, 101), 3) == [0, 50, 100]
  assert browse.spread([4, 9], 5) == [4, 9]
  assert browse.spread([], 3) == []
  assert browse.spread([1, 2, 3], 1) == [3]


def test_packed_rollouts_hold_what_was_recorded(tmp_path):
  group = make_group(num_rollouts=3)
  write(tmp_path, 5, [group])
  selection = browse.select(tmp_path, max_steps=3, max_bytes=1 << 20)
  (step,) = selection.data["steps"]
  (task,) = step["tasks"]
  assert (step["step"], step["total"], task["total"]) == (5, 1, 3)
  assert [rollout["k"] for rollout in task["rollouts"]] == [0, 1, 2]
  for k, rollout in enumerate(task["rollouts"]):
    assert [call["parent"] for call in rollout["calls"]] == [-1, 0]
    for call, was in zip(
        rollout["calls"], group.trajectories[2 * k : 2 * k + 2], strict=True
    ):
      pieces = [selection.data["pieces"][i] for i in call["tokens"]]
      assert [token for _, token in pieces] == was.tokens.tolist()
      assert [p for p, _ in pieces] == pieces_of(was.role, was.tokens.tolist())
  assert (selection.shown_rollouts, selection.read_rollouts) == (3, 3)


def test_selection_stays_within_its_space_and_says_what_is_missing(tmp_path):
  for step in range(9):
    write(tmp_path, step, [make_group(f"t{i}", 8) for i in range(6)])
  limit = 60_000
  selection = browse.select(tmp_path, max_steps=4, max_bytes=limit)
  assert limit / 2 < len(text.embed_json(selection.data)) < 1.02 * limit + 200
  assert [step["step"] for step in selection.data["steps"]] == [0, 3, 5, 8]
  assert (selection.shown_steps, selection.total_steps) == (4, 9)
  shown = sum(
      len(task["rollouts"])
      for step in selection.data["steps"]
      for task in step["tasks"]
  )
  assert 0 < shown == selection.shown_rollouts < selection.read_rollouts
  assert selection.read_rollouts == 4 * 6 * 8
  nothing = browse.select(tmp_path, max_steps=4, max_bytes=10)
  assert (nothing.shown_steps, nothing.shown_rollouts) == (0, 0)


def test_page_is_one_file_that_asks_for_nothing(finished):
  source = finished.page.read_text("utf-8")
  document = Document(source)
  assert finished.problems == () and finished.shown_rollouts == 16
  for tag, name, value in document.attributes:
    assert not name.startswith("on"), (tag, name)
    if name in ("src", "href", "srcset", "action", "data", "poster"):
      assert value == "data:,", (tag, name, value)
    assert name != "style"  # the policy would refuse it
  assert "@import" not in source and "url(" not in source
  (rules,) = [v for t, n, v in document.attributes
              if n == "content" and "default-src" in v]  # fmt: skip
  assert rules.startswith("default-src 'none'; img-src data:;")
  for kind, tag in (("style-src", "style"), ("script-src", "script")):
    digest = hashlib.sha256(document.content(tag).encode()).digest()
    named = f"{kind} 'sha256-{base64.b64encode(digest).decode()}'"
    assert named in rules
  assert "unsafe" not in rules


def test_nothing_a_model_wrote_becomes_markup(finished):
  source = finished.page.read_text("utf-8")
  document = Document(source)
  assert document.tags.count("script") == 2  # the data and the program
  assert "img" not in document.tags
  data = json.loads(document.content("script", "application/json"))
  task = data["steps"][0]["tasks"][1]
  assert task["question"] == "1" + "".join(HOSTILE)
  assert task["id"] == "t1" + HOSTILE[1]
  assert {piece[0][-20:] for piece in data["pieces"]} >= {
      value[-20:] for value in HOSTILE if len(value) >= 20
  }
  for character in "\x00\x07\x1b\u202e\u2066\u2028":
    assert character not in source
  shown = "".join(document.text)
  assert "‹U+202E›right to left" in shown  # the configuration
  assert "quick</script>" in shown  # the title


def test_header_says_what_came_of_the_run(finished):
  source = finished.page.read_text("utf-8")
  shown = " ".join("".join(Document(source).text).split())
  for part in (
      "rose from 30.0% to 60.0% on 100 questions",
      "1m23s",
      "123,456",
      "3.00 GiB",
      "Shown: 4 of 4 steps, and 16 of 16 rollouts",
  ):
    assert part in shown, part
  assert 'class="whisker"' in source


def test_ages_are_drawn_where_anything_was_old():
  rows = [
      {"step": 0, "stage": "s", "aged/0": 1.0},
      {"step": 1, "stage": "s", "aged/0": 0.25, "aged/1": 0.75},
      {"step": 2, "stage": "s"},
      {"step": 3, "stage": "s", "aged/x": 1.0, "aged/2": "<b>"},
  ]
  drawn = page._ages(rows)
  assert "0 updates" in drawn and "1 update<" in drawn
  assert "62.5%" in drawn and "37.5%" in drawn and "<b>" not in drawn
  assert page._ages(rows[:1]) == page._ages([]) == ""


def test_unfinished_run_has_a_report_too(tmp_path):
  run = make_run(tmp_path / "run", finished=False)
  with (run / "metrics.jsonl").open("ab") as stream:
    stream.write(b'{"step": 61, "stage')
  report = page.write(run)
  source = report.page.read_text("utf-8")
  assert "Not finished; last step recorded: 60" in source
  assert report.problems == ("metrics.jsonl: skipped 1 torn or repeated lines",)
  shutil.rmtree(run / "rollouts")
  (run / "metrics.jsonl").unlink()
  source = page.write(run).page.read_text("utf-8")
  assert "No metrics yet" in source and "No rollouts were recorded" in source


def test_damage_is_named_on_the_page_and_the_rest_is_shown(tmp_path):
  run = make_run(tmp_path / "run")
  (run / "summary.json").write_text('{"steps": 6')
  for step in (2, 3):
    path = run / "rollouts" / f"step_{step:06d}.jsonl.gz"
    path.write_bytes(path.read_bytes()[: 300 if step == 2 else 0])
  report = page.write(run)
  assert len(report.problems) == 2  # an empty file is no damaged gzip member
  source = report.page.read_text("utf-8")
  assert "summary.json is not JSON" in source
  assert "step_000002.jsonl.gz" in source
  assert report.shown_rollouts == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "x"),
        ("seconds", float("nan")),
        ("peak_rss_bytes", 10**400),
        ("commit", {}),
        ("tokens", "x"),
        ("tokens.generated", [1]),
        ("eval", 3),
        ("eval.before", None),
        ("eval.after.accuracy", 10**400),
        ("eval.after.ci95", [0.1]),
    ],
)
def test_wrong_values_of_a_summary_are_named_and_left_out(tmp_path, key, value):
  run = make_run(tmp_path / "run")
  summary = json.loads((run / "summary.json").read_text())
  part = summary
  *above, last = key.split(".")
  for name in above:
    part = part[name]
  part[last] = value
  (run / "summary.json").write_text(json.dumps(summary))
  report = page.write(run)
  (problem,) = report.problems
  named = ".".join(key.split(".")[:2])
  assert f"summary.json: {named} " in problem
  assert "summary.json" in report.page.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 10**400),
        ("step", -1),
        ("stage", float("nan")),
        ("reward/main", 10**400),
        ("reward/main", float("inf")),
        ("reward/main", 1e308),
        ("accuracy_low/dev", None),
        ("accuracy/dev", [1]),
        ("nll/main", True),
    ],
)
def test_rows_that_no_run_wrote_are_counted(tmp_path, name, value):
  run = make_run(tmp_path / "run")
  path = run / "metrics.jsonl"
  lines = path.read_text().splitlines()
  lines[1] = json.dumps(json.loads(lines[1]) | {name: value})
  path.write_text("\n".join(lines) + "\n")
  told = "metrics.jsonl: skipped 1 torn or repeated lines"
  assert page.write(run).problems == (told,)


@pytest.mark.parametrize("value", [5e-324, 1e308])
def test_a_logarithmic_axis_ends_where_floats_do(value):
  plot = curves.Chart(name="x", title="X", families=("nll",), log=True)
  rows = [{"step": 0, "nll/main": value}, {"step": 1, "nll/main": value}]
  low, high = curves.value_range(curves.series(rows, plot), log=True)
  assert 0 < low < high < math.inf


def test_a_long_run_makes_a_page_below_5_mb(tmp_path):
  run = make_run(tmp_path / "run", steps=1)
  mask = np.tile(np.repeat([0, 1], [60, 40]), 8).astype(np.float32)
  rng = np.random.default_rng(0)
  trajectories = tuple(
      make_trajectory(
          k,
          -1,
          tokens=rng.integers(0, 49_000, mask.size).astype(np.int32),
          loss_mask=mask,
          sampler_logprobs=-mask * rng.random(mask.size, np.float32),
      )
      for k in range(8)
  )
  group = types.RolloutGroup(
      **vars(make_group())
      | {"num_rollouts": 8, "trajectories": trajectories, "parent": [-1] * 8}
  )
  path = write(run / "rollouts", 1, [group] * 8)
  for step in range(2, 9):
    shutil.copy(path, path.with_name(f"step_{step:06d}.jsonl.gz"))
  report = page.write(run)
  size = report.page.stat().st_size
  assert 2_500_000 < size < 5_000_000
  assert 0 < report.shown_rollouts < 7 * 64


def test_pictures_of_the_curves_are_written(tmp_path):
  written = png.write(make_rows(), tmp_path)
  names = {path.name for path in written}
  assert names == {
      "reward.png",
      "accuracy.png",
      "logprob_gap.png",
      "nll.png",
      "tokens_per_second.png",
  }
  for path in written:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5_000
  assert png.write([], tmp_path / "none") == []


def test_matplotlib_is_imported_only_to_draw():
  modules = list((ROOT / "mgrpo_jax" / "report").glob("*.py"))
  assert len(modules) > 5
  for path in [*modules, ROOT / "experiments" / "view.py"]:
    for node in ast.parse(path.read_text("utf-8")).body:
      names = [alias.name for alias in getattr(node, "names", ())]
      names.append(getattr(node, "module", None) or "")
      assert not any(name.startswith("matplotlib") for name in names), path


def view(*arguments):
  """Runs the command as a user does."""
  return command("view", *arguments, timeout=600)


def test_view_writes_the_report_and_says_where(tmp_path):
  run = make_run(tmp_path / "run")
  done = view(f"--workdir={run}")
  assert done.returncode == 0, done.stderr
  last = done.stdout.splitlines()[-1]
  assert last == f"{run}/report/index.html (16 rollouts)"
  assert (run / "report" / "reward.png").stat().st_size > 5_000


def test_what_is_not_a_run_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(NotARunError, match="nowhere: does not exist"):
    page.write(tmp_path / "nowhere")
  with pytest.raises(NotARunError, match=r"no config\.json"):
    page.write(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(OSError, match=r"config\.json is not JSON"):
    page.write(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workdir=nowhere"], "nowhere"),
        ([], "--workdir is required"),
        (["--workdir=a", "--bucket=b"], "allowed: one of them"),
        (["--bucket=nowhere"], "--bucket=nowhere: nothing lies there"),
    ],
)
def test_view_ends_with_code_2_and_one_line_on_misuse(flags, told):
  done = view(*flags)
  assert done.returncode == 2
  assert done.stdout == "" and len(done.stderr.splitlines()) == 1
  assert told in done.stderr


def test_view_knows_a_run_from_a_bucket(tmp_path):
  store.open_folder(tmp_path / "bucket").put("steps/0.json", b"{}")
  done = view(f"--bucket={tmp_path}")
  assert done.returncode == 2 and done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.endswith(f"a run's directory, which keeps one: {tmp_path}/bucket")


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH to open the page with"
)
def test_page_opens_in_a_browser(finished, tmp_path):
  index = finished.page
  done = subprocess.run(
      [
          CHROMIUM,
          "--headless",
          "--no-sandbox",
          "--disable-gpu",
          "--disable-background-networking",
          f"--user-data-dir={tmp_path / 'profile'}",
          "--virtual-time-budget=2000",
          "--dump-dom",
          f"{index.as_uri()}#step=2&task=1&rollout=1",
      ],
      capture_output=True,
      timeout=600,
      check=True,
      env=os.environ | {"HOME": str(tmp_path)},
  )
  source = done.stdout.decode("utf-8")
  document = Document(source)
  title = re.search(r"<title>(.*?)</title>", source)[1]
  assert title.startswith("quick&lt;/script&gt;")  # no script took it over
  assert document.tags.count("script") == 2 and "img" not in document.tags
  classes = [v for _, n, v in document.attributes if n == "class"]
  tokens = [c for c in classes if c.startswith("token ")]
  assert len(tokens) == 22  # two calls of 11 tokens
  assert sum("sampled" in c for c in tokens) == 10
  assert sum("result" in c for c in tokens) == 4
  assert classes.count("call") == 2
  pressed = re.findall(r'aria-pressed="true"[^>]*>([^<]*)', source)
  assert pressed[1] == "step 3" and pressed[2].startswith("1")
  assert "U+202E</span>right to left" in source
  assert "&lt;img src=x onerror=document.title='owned'&gt;" in source
  assert source.count('class="chart"') == 5
