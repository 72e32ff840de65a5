"""The progress line, and the table that a run ends with."""

import io
import math

import pytest

from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.report import live, progress


class Terminal(io.StringIO):
  """A stream that says it is a terminal; its width comes from COLUMNS."""

  def isatty(self):
    return True

  def fileno(self):
    raise OSError("no descriptor")


class Clock:
  """Seconds that a test moves by hand."""

  seconds = 0.0

  def __call__(self):
    return self.seconds


VALUES = {
    "reward/main": 0.4123,
    "reward/researcher": 0.625,
    "tokens_per_second/step": 5120.4,
    "logprob_gap_mean/main": 3e-8,
    "logprob_gap_mean/researcher": 1e-8,
    "logprob_gap_max/main": 2e-6,
    "logprob_gap_max/researcher": 4e-6,
}


def make_progress(stream, clock, total_steps=100):
  return progress.Progress(
      stream,
      total_steps=total_steps,
      every_seconds=10.0,
      split="dev",
      clock=clock,
  )


def test_progress_line_says_where_the_run_stands():
  stream, clock = io.StringIO(), Clock()
  shown = make_progress(stream, clock)
  shown.update(0, "hard", {"accuracy/dev": 0.384})
  clock.seconds = 20.0
  shown.update(10, "hard", VALUES)
  assert stream.getvalue().splitlines() == [
      "hard 0/100 · dev accuracy 0.384",
      "hard 10/100 · reward main 0.41 researcher 0.62 · dev accuracy 0.384"
      " · 5,120 tokens/s · log-prob gap 3e-8 max 4e-6 · 3m00s left",
  ]


def test_plain_lines_are_rare_but_never_miss_a_stage_or_the_end():
  stream, clock = io.StringIO(), Clock()
  shown = make_progress(stream, clock, total_steps=12)
  for step in range(1, 13):
    clock.seconds += 3
    shown.update(step, "easy" if step < 7 else "hard", VALUES)
  steps = [line.split(" · ")[0] for line in stream.getvalue().splitlines()]
  assert steps == ["easy 1/12", "easy 5/12", "hard 7/12", "hard 11/12",
                   "hard 12/12"]  # fmt: skip
  assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("columns", [200, 80, 40, 12, 2])
def test_terminal_line_is_rewritten_and_never_wraps(columns, monkeypatch):
  monkeypatch.setenv("COLUMNS", str(columns))
  stream, clock = Terminal(), Clock()
  shown = make_progress(stream, clock)
  for step in range(3):
    clock.seconds += 1
    shown.update(step, "hard\n\x1b[2J", VALUES)
  shown.note("checkpoint saved")
  shown.close()
  written = stream.getvalue()
  assert written.endswith("\n") and written.count("\n") == 2
  assert written.count("\x1b") == 4  # three lines, one note, no other escapes
  for line in written.replace("\n", "\r\x1b[K").split("\r\x1b[K"):
    assert len(line) < columns or line == "checkpoint saved"
  if columns >= 80:
    said = "reward main 0.41" if columns > 80 else "main .41"
    assert said in written and "1m38s" in written


def test_line_gives_up_the_least_important_first():
  said = [(0, "hard 1/9"), (2, "b" * 10), (1, "a" * 10), (2, "c" * 10)]
  fields = [(rank, (text,)) for rank, text in said]
  assert live.fit(fields, 99) == " · ".join(text for _, text in said)
  assert live.fit(fields, 40) == "hard 1/9 · aaaaaaaaaa · cccccccccc"
  assert live.fit(fields, 25) == "hard 1/9 · aaaaaaaaaa"
  assert live.fit(fields, 8) == "hard 1/9"
  assert live.fit(fields, 5) == "hard…"
  assert live.fit(fields, 0) == ""


def test_line_takes_shorter_words_before_it_gives_anything_up():
  fields = [(0, ("hard 1/9",)), (1, ("reward 1", "r 1")), (2, ("left 9", "9"))]
  assert live.fit(fields, 28) == "hard 1/9 · reward 1 · left 9"
  assert live.fit(fields, 27) == "hard 1/9 · r 1 · 9"
  assert live.fit(fields, 17) == "hard 1/9 · r 1"


def line_at(columns, monkeypatch, *, stage="hard", steps=(56, 57), **values):
  """What a terminal shows after two steps, a minute apart."""
  monkeypatch.setenv("COLUMNS", str(columns))
  stream, clock = Terminal(), Clock()
  shown = make_progress(stream, clock, total_steps=steps[-1] + 43)
  shown.update(steps[0], stage, {"accuracy/dev": 0.4533})
  clock.seconds += 100 / 43 * 2
  shown.update(steps[1], stage, VALUES | values)
  return stream.getvalue().split("\r\x1b[K")[-1]


def test_every_field_stands_on_a_terminal_of_80_columns(monkeypatch):
  assert line_at(200, monkeypatch) == (
      "hard 57/100 · reward main 0.41 researcher 0.62 · dev accuracy 0.453"
      " · 5,120 tokens/s · log-prob gap 3e-8 max 4e-6 · 3m20s left"
  )
  assert line_at(80, monkeypatch) == (
      "hard 57/100 · main .41 rese .62 · dev .453 · 5.1k tok/s"
      " · gap 3e-8/4e-6 · 3m20s"
  )
  assert line_at(80, monkeypatch, stage="reinforce", steps=(1556, 1557)) == (
      "reinforce 1557/1600 · m .41 r .62 · dev .453 · 5.1k/s"
      " · gap 3e-8/4e-6 · 3m20s"
  )


@pytest.mark.parametrize("stage", ["easy", "hard", "reinforce"])
@pytest.mark.parametrize(
    "values",
    [
        {"tokens_per_second/step": 123_456.0},
        {"tokens_per_second/step": 9.0, "logprob_gap_max/main": 0.0},
        {"reward/main": 1.0, "reward/researcher": -0.125},
    ],
)
def test_no_field_is_dropped_at_80_columns(stage, values, monkeypatch):
  line = line_at(80, monkeypatch, stage=stage, steps=(956, 957), **values)
  assert len(line) < 80
  assert len(line.split(" · ")) == 6


def test_an_imitating_line_says_its_nll_too_where_there_is_room(monkeypatch):
  imitating = {
      name: value
      for name, value in VALUES.items()
      if not name.startswith("logprob_gap")
  } | {"nll/main": 1.234, "nll/researcher": 0.5}
  monkeypatch.setenv("COLUMNS", "80")
  stream, clock = Terminal(), Clock()
  shown = make_progress(stream, clock, total_steps=1600)
  for step in (1, 2):
    clock.seconds += 1
    shown.update(step, "careful", imitating | {"accuracy/dev": 0.5})
  assert stream.getvalue().endswith(
      "careful 2/1600 · m .41 r .62 · nll m 1.23 r .50 · dev .500 · 5.1k/s"
      " · 26m38s"
  )


def test_short_names_tell_roles_apart():
  fields = progress.progress_fields(
      step=1,
      total_steps=2,
      stage="hard",
      values={"reward/reader": 1.0, "reward/researcher": 0.5, "reward/main": 0},
      split="dev",
      seconds_left=math.nan,
  )
  assert live.fit(fields, 36).endswith("rea 1.00 res .50 mai .00")


def test_age_is_told_where_anything_is_old():
  def line(oldest, mean):
    values = {"staleness/main": oldest, "staleness_mean/main": mean}
    fields = progress.progress_fields(
        step=1,
        total_steps=2,
        stage="hard",
        values=values,
        split="dev",
        seconds_left=math.nan,
    )
    return [wordings for _, wordings in fields[1:]]

  assert line(0.0, 0.0) == []
  assert line(2.0, 1.25) == [("age 1.2 max 2", "age 1.2")]


def test_only_accuracy_is_carried_from_an_earlier_step():
  stream, clock = io.StringIO(), Clock()
  shown = make_progress(stream, clock, total_steps=2)
  shown.update(1, "hard", VALUES | {"accuracy/dev": 0.4533})
  shown.update(2, "hard", {"reward/main": 0.5})
  assert stream.getvalue().splitlines()[-1] == (
      "hard 2/2 · reward main 0.50 · dev accuracy 0.453 · 0s left"
  )


def test_time_left_follows_the_pace_of_the_stage():
  stream, clock = io.StringIO(), Clock()
  shown = make_progress(stream, clock)
  for step in range(50):
    clock.seconds += 1
    shown.update(step, "imitate", {"nll/main": 1.0})
  for step in range(50, 54):
    clock.seconds += 20
    shown.update(step, "easy", VALUES)
  last = stream.getvalue().splitlines()[-1]
  assert last.endswith("15m40s left")  # 47 steps of 20 s
  assert "nll" not in last


def test_time_left_ends_with_the_budget():
  stream, clock = io.StringIO(), Clock()
  shown = progress.Progress(
      stream,
      total_steps=100,
      every_seconds=0.0,
      split="dev",
      limits={"trained_tokens": 1000.0, "generated_tokens": 9000.0},
      clock=clock,
  )
  for step in range(1, 5):
    clock.seconds += 10
    spent = {"trained_tokens": 50.0 * step, "generated_tokens": 60.0 * step}
    shown.update(step, "hard", spent)
  # 800 tokens to train on, 50 every 10 s, before 96 steps and 8,760 tokens.
  assert stream.getvalue().splitlines()[-1].endswith("2m40s left")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
    ],
)
def test_durations_read_as_people_write_them(seconds, text):
  assert progress.duration(seconds) == text


def test_comparison_table_shows_intervals_and_change():
  table = progress.comparison(
      {
          "test": (
              Accuracy(correct=156, n=500, failed=0),
              Accuracy(correct=265, n=500, failed=0),
          ),
          "3 hops": (
              Accuracy(correct=0, n=90, failed=0),
              Accuracy(correct=9, n=91, failed=0),
          ),
      }
  )
  header, test, hops = table.splitlines()
  assert test.split() == [
      "test", "500", "0.312", "[0.273,", "0.354]", "0.530", "[0.486,",
      "0.573]", "+0.218",
  ]  # fmt: skip
  assert "90/91" in hops and "+0.099" in hops
  assert len(header) == len(test) == len(hops)


def test_questions_that_a_machine_failed_on_are_told():
  whole = Accuracy(correct=3, n=9, failed=0)
  some = Accuracy(correct=3, n=7, failed=2)
  assert "left out" not in progress.accuracies(whole, {"place": whole})
  assert progress.accuracies(some, {}).endswith("on them: 2 questions")
  assert progress.comparison({"all": (whole, some)}).endswith(
      "on them: 0, then 2 questions"
  )
