"""A policy is recognised by its tokenizer, chat format, sizes and weights."""

import dataclasses
import pathlib

import jax
import pytest

from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.policy import fingerprint
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.policy.lora import LoRA

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def policy():
  return load(ROOT / "configs/quickstart_weights/main")


def test_the_same_files_give_the_same_fingerprint(policy, tmp_path):
  before = fingerprint.fingerprint(policy)
  save_directory(tmp_path / "policy", policy)
  fingerprint.check("main", before, fingerprint.fingerprint(policy))
  again = fingerprint.fingerprint(load(tmp_path / "policy"))
  fingerprint.check("main", before, again)


def test_what_differs_is_named(policy):
  before = fingerprint.fingerprint(policy)
  bigger = jax.tree.map(lambda leaf: leaf * 1.0000002, policy.params)
  base = dataclasses.replace(policy.config, rope_base=9.0)
  for change, part in [
      ({"params": bigger}, ": weights$"),
      ({"chat": "chatml"}, ": chat format$"),
      ({"tokenizer": None}, ": tokenizer$"),
      ({"config": base, "chat": None}, ": chat format, sizes$"),
  ]:
    after = fingerprint.fingerprint(dataclasses.replace(policy, **change))
    with pytest.raises(MismatchError, match=f"policy 'main' .*{part}"):
      fingerprint.check("main", before, after)


def test_a_run_that_recorded_nothing_is_not_trusted(policy):
  with pytest.raises(MismatchError, match="'main': the run did not record"):
    fingerprint.check("main", None, fingerprint.fingerprint(policy))


def test_an_adapter_of_another_scale_is_named(policy):
  one, other = (
      fingerprint.fingerprint(
          policy, LoRA(rank=1, alpha=alpha, targets=("key",))
      )
      for alpha in (1.0, 2.0)
  )
  with pytest.raises(MismatchError, match=": adapter$"):
    fingerprint.check("main", one, other)
