"""What a team acts in: tokenizers and policies made from scratch."""

import io
import math
import re

import jax
import numpy as np
import pytest
import tiny_run

from configs import warm_start
from experiments import recipe, sources
from mgrpo_jax.policy.load import load
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.tasks import factbook
from mgrpo_jax.tasks.factbook import text

ANY_LENGTH = 10**6


@pytest.fixture(scope="module")
def book():
  return factbook.load(0)


def words(texts):
  """Words without case and accents, as names are written."""
  return set(re.findall(r"\w+", text.fold("\n".join(texts)).lower()))


def read(book, *, training):
  """Pages, names and questions of training places, or of all others."""
  train = {p for p, split in book.place_splits.items() if split == "train"}
  texts = []
  for place in book.corpus.places.values():
    if (place.id in train) == training:
      texts += [place.name, *place.aliases]
  for passage in book.corpus.passages.values():
    if (passage.page.split("/")[0] in train) == training:
      texts += [passage.title, passage.text]
  for split, tasks in book.splits.items():
    for task in tasks if (split == "train") == training else ():
      texts += [task.question, *task.answers]
      for hop in task.evidence:
        texts += [hop.question, hop.query, *hop.answers]
  return texts


def test_tokenizers_learn_nothing_of_held_out_places(book):
  lines = sources._lines(book, 1.0, ANY_LENGTH)
  allowed = words(read(book, training=True))
  foreign = words(read(book, training=False)) - allowed
  assert len(foreign) > 1000
  learned = words(lines)
  assert not foreign & learned
  assert len(learned) > 0.9 * len(allowed)  # and everything else is there


def test_tokenizers_read_no_whole_line_of_held_out_places(book):
  lines = set(sources._lines(book, 1.0, ANY_LENGTH))
  places = book.corpus.places
  train = {p for p, split in book.place_splits.items() if split == "train"}
  held_out = set(places) - train
  names = {n for p in held_out for n in (places[p].name, *places[p].aliases)}
  titles = {
      passage.title
      for passage in book.corpus.passages.values()
      if passage.page.split("/")[0] in held_out
  }
  questions = {
      question
      for split in ("dev", "test")
      for task in book.splits[split]
      for question in (task.question, *(hop.question for hop in task.evidence))
  }
  assert min(map(len, (names, titles, questions))) > 90
  assert not lines & (names | titles | questions)


def test_the_share_of_lines_and_their_length_are_what_is_asked_for(book):
  names = list(factbook.training_names(book))
  assert sources._lines(book, 0.0, ANY_LENGTH) == names
  some = sources._lines(book, 0.1, 40)
  assert some == sources._lines(book, 0.1, 40)  # the same for every run
  everything = len(sources._lines(book, 1.0, 40)) - len(names)
  assert 0.08 < (len(some) - len(names)) / everything < 0.12


def tiny_warm_start():
  """The recipe of the shipped weights, two steps of it, small."""
  config = warm_start.get_config()
  for policy in config.policies.values():
    policy.vocab_size = 400
    policy.embed_dim, policy.mlp_dim = 16, 24
    policy.num_layers, policy.num_heads, policy.num_kv_heads = 1, 2, 1
    policy.head_dim = 8
    policy.tokenizer_share = 0.02
  for name in config.curriculum:
    config.stages[name].steps = 1
  config.tasks.per_step = 4
  config.rollout.per_task, config.rollout.max_concurrent = 1, 4
  config.batch.rows = 4
  config.batch.row_tokens = config.engine.context = 384
  for role in config.team.roles.values():
    role.max_context = 384
    role.max_turns, role.max_new_tokens = 6, 64
  config.engine.num_slots = 4
  config.engine.block = 128
  config.engine.prefill_buckets = (128,)
  config.engine.prefill_tokens = 128
  config.evaluation.tasks = config.evaluation.final_tasks = 2
  return config


def test_the_warm_start_makes_two_policies_and_trains_them(tmp_path, book):
  del book  # built once for all tests of this file
  config = tiny_warm_start()
  setup = recipe.build(config)
  hasty = [setup.demonstrate[name].hasty for name in config.curriculum]
  assert hasty == [0.0, 0.6]
  before = {
      name: [np.asarray(leaf) for leaf in jax.tree.leaves(policy.params)]
      for name, policy in setup.policies.items()
  }
  assert any(  # policies of one run do not begin as twins
      not np.array_equal(*pair)
      for pair in zip(before["main"], before["researcher"], strict=True)
  )
  summary = tiny_run.train(
      tmp_path / "run", setup, config={}, stream=io.StringIO()
  )
  assert summary["steps"] == 2
  rows = read_metrics(tmp_path / "run/metrics.jsonl")
  assert [row["stage"] for row in rows] == ["careful", "hasty"]
  for name, was in before.items():
    assert all(math.isfinite(row[f"nll/{name}"]) for row in rows)
    saved = load(tmp_path / "run/policies" / name)
    assert saved.chat == "compact"
    assert saved.tokenizer.decode(saved.tokenizer.encode("Lima")) == "Lima"
    now = [np.asarray(leaf) for leaf in jax.tree.leaves(saved.params)]
    assert any(map(np.any, map(np.not_equal, was, now)))
