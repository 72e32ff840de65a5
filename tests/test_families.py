"""Every family against transformers; tests/golden/make_families.py records."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

from mgrpo_jax.policy import transformer
from mgrpo_jax.policy.load import load, save_directory

with np.load(pathlib.Path(__file__).parent / "golden/families.npz") as stored:
  ARRAYS = dict(stored)
CASES = sorted({name.split("/")[0] for name in ARRAYS})


def golden(case):
  return {
      name.removeprefix(f"{case}/"): array
      for name, array in ARRAYS.items()
      if name.startswith(f"{case}/")
  }


def tolerance(case):
  # Two float32 programs; what the issue asks for, and measured ten times less.
  return 1e-3 if "moe" in case else 1e-4


def under(arrays, kind):
  return {
      name.removeprefix(f"{kind}/"): np.ascontiguousarray(array)
      for name, array in arrays.items()
      if name.startswith(f"{kind}/")
  }


def directory_of(path, arrays, kind):
  path.mkdir()
  (path / "config.json").write_text(str(arrays["config"]))
  safetensors.numpy.save_file(under(arrays, kind), path / "model.safetensors")
  return path


def relative_error(actual, expected):
  return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def packed(arrays):
  prompts = [arrays["tokens0"], arrays["tokens1"]]
  sizes = tuple(map(len, prompts))
  cfg = tiny_llama.config(
      vocab_size=json.loads(str(arrays["config"]))["vocab_size"]
  )
  tokens, positions, segments = tiny_llama.packed_rows((sizes,), 29, cfg)
  tokens[0, : sum(sizes)] = np.concatenate(prompts)
  return (tokens, positions, segments), sizes


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_transformers(case, tmp_path):
  arrays = golden(case)
  policy = load(directory_of(tmp_path / "weights", arrays, "weight"))
  rows, (first, second) = packed(arrays)

  def loss(tree):
    logits = transformer.apply(tree, *rows, config=policy.config)
    logprobs = jax.nn.log_softmax(logits[0, : first - 1])
    chosen = jnp.take_along_axis(logprobs, rows[0][0, 1:first, None], axis=1)
    return -jnp.mean(chosen), logits

  (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      policy.params
  )
  logits = np.asarray(logits)[0]
  within = tolerance(case)
  assert relative_error(logits[:first], arrays["logits0"]) < within
  end = first + second
  assert relative_error(logits[first:end], arrays["logits1"]) < within
  np.testing.assert_allclose(value, arrays["loss"], rtol=within)
  save_directory(
      tmp_path / "gradients", dataclasses.replace(policy, params=gradient)
  )
  ours = safetensors.numpy.load_file(
      tmp_path / "gradients" / "model.safetensors"
  )
  # Gemma's scales are saved less 1, which no gradient is.
  offset = 1.0 if case == "gemma3" else 0.0
  theirs = under(arrays, "gradient")
  assert ours.keys() == theirs.keys()
  largest = max(np.max(np.abs(one)) for one in theirs.values())
  for name, expected in theirs.items():
    actual = ours[name] + (offset if "norm" in name else 0.0)
    error = np.max(np.abs(actual - expected)) / largest
    assert error < within, name
