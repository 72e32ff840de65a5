"""One rollout as a tree: every token once, children where they were called."""

import html
import html.parser
import json

import pytest
from test_report import HOSTILE, make_group, make_trajectory, write
from trajectories import group as group_of
from trajectories import turn

from mgrpo_jax import types
from mgrpo_jax.report import records, text, tree

TAGS = set(
    "div style section header b br span i table thead tbody tr th td".split()
)


class Page(html.parser.HTMLParser):
  """Elements in order, with the text right inside each."""

  def __init__(self, source):
    super().__init__()
    self.elements, self.open = [], []
    self.feed(source)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    depth = sum(e["tag"] == "section" for e in self.open)
    element = {"tag": tag, "text": "", "depth": depth, **attributes}
    self.elements.append(element)
    if tag != "br":
      self.open.append(element)

  def handle_endtag(self, tag):
    assert self.open.pop()["tag"] == tag

  def handle_data(self, data):
    if self.open:
      self.open[-1]["text"] += data

  def of_class(self, name):
    classes = [(e, e.get("class", "").split()) for e in self.elements]
    return [e for e, own in classes if name in own]

  def handle_comment(self, data):
    raise AssertionError(f"a comment: {data}")

  def tokens(self):
    """(depth, role, text) of every token of the stream."""
    shown = [e for e in self.of_class("token") if "title" in e]
    return [(e["depth"], e["class"].split()[1], e["text"]) for e in shown]


def record(tmp_path, group, **changes):
  """A group as it is read back from its file."""
  read = records.read_step(write(tmp_path, 0, [group], **changes))
  assert not read.problems
  return read.groups[0]


def delegating():
  """Main asks twice, then answers, in one rollout of two."""
  asked = [turn("call", name="researcher", argument=str(n)) for n in range(2)]
  first = make_trajectory(
      0, -1, turns=(*asked, turn("answer", argument="Lima"))
  )
  calls = (
      first,
      make_trajectory(0, 0, "researcher", 0),
      make_trajectory(0, 0, "researcher", 1),
      make_trajectory(1, -1),
  )
  return group_of(make_group().task, calls, 2)


def test_every_token_is_drawn_once_with_its_role(tmp_path):
  recorded = record(tmp_path, make_group(num_rollouts=3))
  page = Page(tree.draw(recorded, rollout=1))
  expected = []
  for depth, call in enumerate(recorded["trajectories"][2:4], start=1):
    roles = records.token_roles(call)
    for role, piece in zip(roles, call["pieces"], strict=True):
      shown = text.escape(piece).replace("\n", "↵\n")
      expected.append((depth, role, html.unescape(shown)))
  assert page.tokens() == expected


def test_children_stand_where_they_were_called(tmp_path):
  page = Page(tree.draw(record(tmp_path, delegating()), rollout=0))
  own = [(depth, role) for depth, role, _ in page.tokens()]
  runs = [run for i, run in enumerate(own) if not i or own[i - 1] != run]
  child = [(2, "prompt"), (2, "sampled"), (2, "result"), (2, "sampled")]
  assert runs == [
      (1, "prompt"),
      (1, "sampled"),
      *child,
      (1, "result"),
      (1, "sampled"),
      *child,
  ]
  assert [e["text"] for e in page.of_class("role")] == [
      "main",
      "researcher 1",
      "researcher 2",
  ]


def test_children_whose_turn_was_not_recorded_are_drawn_last(tmp_path):
  page = Page(tree.draw(record(tmp_path, make_group()), rollout=0))
  depths = [depth for depth, _, _ in page.tokens()]
  assert depths == sorted(depths) and set(depths) == {1, 2}


def test_calls_of_a_child_are_boxes_inside_its_box(tmp_path):
  calls = (
      make_trajectory(0, -1),
      make_trajectory(0, 0, "planner"),
      make_trajectory(0, 1, "researcher"),
  )
  roles = ("main", "planner", "researcher")
  nested = group_of(make_group().task, calls, 1, roles)
  page = Page(tree.draw(record(tmp_path, nested), rollout=0))
  boxes = [e for e in page.elements if e["tag"] == "section"]
  assert [box["depth"] for box in boxes] == [0, 1, 2]
  assert [box["class"] for box in boxes] == ["call c0", "call c1", "call c2"]


def test_sampled_tokens_carry_their_log_probabilities(tmp_path):
  recorded = record(tmp_path, make_group())
  page = Page(tree.draw(recorded, rollout=0))
  titles = [e["title"] for e in page.of_class("token") if "title" in e]
  told = [t.split("log-prob ")[1] for t in titles if "log-prob" in t]
  wanted = [x for c in recorded["trajectories"][:2] for x in c["logprobs"]]
  assert told == [f"{x:.3f} nats" for x in wanted]
  assert len([t for t in titles if t.startswith("sampled")]) == len(told)


def test_rewards_and_advantages_of_all_rollouts_stand_beside(tmp_path):
  recorded = record(tmp_path, make_group(num_rollouts=2))
  page = Page(tree.draw(recorded, rollout=1))
  assert [e["text"] for e in page.elements if e["tag"] == "th"] == (
      ["rollout", "call", "format", "correct", "total", "advantage"]
  )
  cells = [e["text"].strip() for e in page.elements if e["tag"] == "td"]
  assert [cells[i : i + 6] for i in range(0, len(cells), 6)] == [
      ["1", "main", "1", "0.5", "0", "-1.00"],
      ["", "researcher 1", "1", "0.5", "0.12", "-0.33"],
      ["2", "main", "1", "0.5", "0.25", "+0.33"],
      ["", "researcher 1", "1", "0.5", "0.38", "+1.00"],
  ]
  rows = [e for e in page.elements if e["tag"] == "tr"][1:]
  assert ["shown" in row["class"] for row in rows] == [0, 0, 1, 1]
  assert ["root" in row["class"] for row in rows] == [1, 0, 1, 0]
  bars = [(e["class"], e["style"]) for e in page.elements if e["tag"] == "i"]
  assert bars == [
      ("down", "left:0.0%;width:50.0%"),
      ("down", "left:33.3%;width:16.7%"),
      ("up", "left:50.0%;width:16.7%"),
      ("up", "left:50.0%;width:50.0%"),
  ]


def test_calls_without_reward_or_advantage_are_drawn(tmp_path):
  failed = make_trajectory(0, -1, status=types.Status.FAILED)
  recorded = record(tmp_path, group_of(make_group().task, (failed,), 1))
  recorded["trajectories"][0] |= {"rewards": {}, "advantage": None}
  page = Page(tree.draw(recorded, rollout=0))
  cells = [e["text"].strip() for e in page.elements if e["tag"] == "td"]
  assert cells == ["1", "main", "–", "–"]
  assert "failed" in [e["text"] for e in page.of_class("chip")]


def test_what_models_and_pages_wrote_stays_text(tmp_path):
  hostile = make_group(question=HOSTILE[0])
  recorded = record(tmp_path, hostile)
  recorded["task"]["answers"] = list(HOSTILE)
  for call in recorded["trajectories"]:
    call["role"] = HOSTILE[0]
    call["status"] = HOSTILE[1]
    call["rewards"] = {HOSTILE[0]: 1.0}
    call["pieces"] = [HOSTILE[i % 7] for i in range(len(call["tokens"]))]
  recorded = json.loads(json.dumps(recorded))
  drawn = tree.draw(recorded, rollout=0)
  drawn.encode()
  page = Page(drawn)
  assert {e["tag"] for e in page.elements} == TAGS
  known = {"tag", "text", "depth", "class", "title", "style"}
  assert all(e.keys() <= known for e in page.elements)
  assert "\u202e" not in drawn and "\x1b" not in drawn
  assert "document.title='owned'" in page.of_class("question")[0]["text"]


def test_question_answers_and_evidence_stand_above(tmp_path):
  page = Page(tree.draw(record(tmp_path, make_group()), rollout=0))
  assert page.of_class("question")[0]["text"] == "Capital of Peru?"
  hint = page.of_class("hint")[0]["text"]
  assert "accepted: Lima" in hint
  assert "capital of Peru → peru/government#capital" in hint


def test_line_feeds_are_seen_and_still_break_the_line(tmp_path):
  recorded = record(tmp_path, make_group())
  recorded["trajectories"][0]["pieces"][0] = "1 Peru\n"
  page = Page(tree.draw(recorded, rollout=0))
  assert page.tokens()[0] == (1, "prompt", "1 Peru↵\n")


@pytest.mark.parametrize("rollout", [-1, 2])
def test_rollouts_that_do_not_exist_are_refused(tmp_path, rollout):
  with pytest.raises(ValueError, match="rollout: .* 0 to 1"):
    tree.draw(record(tmp_path, make_group()), rollout=rollout)


def test_its_style_reaches_nothing_else(tmp_path):
  drawn = tree.draw(record(tmp_path, make_group()), rollout=0)
  style = drawn.split("<style>")[1].split("</style>")[0]
  rules = [rule.split("{")[0] for rule in style.split("}") if rule.strip()]
  selectors = [s.strip() for rule in rules for s in rule.split(",")]
  assert len(selectors) > 20
  assert all(s.startswith(".team-tree") for s in selectors)
  assert "url(" not in style and "@import" not in style
