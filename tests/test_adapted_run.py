"""Whole runs in which adapters are trained: what is kept and served."""

import dataclasses
import io
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from mgrpo_jax import publish, sharding, store
from mgrpo_jax.plan import Adaptation
from mgrpo_jax.policy import lora as adapters
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.load.peft import load_adapter
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.testing.setup import small_setup

ADAPTED = LoRA(rank=2, alpha=6.0, targets=("query", "output", "down"))
MAX_GAP = 1e-4  # nats, float32 on a CPU


def train(directory, setup):
  return tiny_run.train(
      directory, setup, config={"seed": setup.seed}, stream=io.StringIO()
  )


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, other):
  return all(map(np.array_equal, leaves(one), leaves(other)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp("adapted") / "run"
  adaptation = Adaptation(lora=ADAPTED, base="tiny")
  setup = small_setup(
      seed=0,
      imitation_steps=1,
      steps=3,
      adaptations={"main": adaptation, "researcher": adaptation},
  )
  train(directory, setup)
  return directory, setup


@pytest.mark.parametrize("name", ("main", "researcher"))
def test_only_the_adapter_is_trained_published_and_saved(finished, name):
  directory, setup = finished
  base = setup.policies[name]
  specs = adapters.adapter_specs(base.config, ADAPTED)
  bucket = store.open_folder(directory / "bucket")
  like = sharding.shapes(specs, None)
  last = publish.read(bucket, name, "latest", like=like).params
  assert all(  # B began at 0
      np.any(pair.b) for layer in last.layers for pair in layer.values()
  )
  saved = load(directory / "policies" / name)
  merged = adapters.merge(base.params, last, lora=ADAPTED)
  for one, other in zip(leaves(saved.params), leaves(merged), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
  assert np.array_equal(saved.params.embedding, base.params.embedding)
  assert not same(saved.params.layers, base.params.layers)
  lora, adapter = load_adapter(
      directory / "policies" / name / "adapter", config=base.config
  )
  assert dataclasses.replace(lora, targets=ADAPTED.targets) == ADAPTED
  assert same(adapter.layers, last.layers)


def test_the_sampler_serves_base_and_adapter_together(finished):
  directory, _ = finished
  gaps = [
      value
      for row in read_metrics(directory / "metrics.jsonl")
      for key, value in row.items()
      if key.startswith("logprob_gap_max/")
  ]
  assert len(gaps) >= 3
  assert max(gaps) < MAX_GAP


def test_a_run_goes_on_from_a_checkpointed_adapter(finished, tmp_path):
  directory, setup = finished
  again = tmp_path / "again"
  shutil.copytree(directory, again)
  (again / "summary.json").unlink()
  shutil.rmtree(again / "policies")
  newest = max(
      (again / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name)
  )
  shutil.rmtree(newest)
  train(again, setup)
  for name in setup.policies:
    one, other = (load(d / "policies" / name) for d in (directory, again))
    assert same(one.params, other.params)
