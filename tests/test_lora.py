"""Adapters: what they change, what they begin as, how they are stored."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

from mgrpo_jax.policy import lora, transformer
from mgrpo_jax.policy.config import Experts
from mgrpo_jax.policy.load.peft import load_adapter, save_adapter

DENSE = tiny_llama.config(vocab_size=11, embed_dim=8, num_layers=2)
MOE = tiny_llama.config(
    vocab_size=11,
    embed_dim=8,
    num_layers=2,
    qk_norm=True,
    experts=Experts(
        number=3, per_token=2, mlp_dim=5, normalised=True, dense_layers=(0,)
    ),
)
ALL = lora.LoRA(rank=2, alpha=6.0, targets=lora.TARGETS)
SOME = lora.LoRA(rank=3, alpha=1.5, targets=("query", "down"))


def random_adapter(config, adapted, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda spec: rng.normal(size=spec.shape).astype(np.float32),
      lora.adapter_specs(config, adapted),
  )


@pytest.mark.parametrize("config", (DENSE, MOE))
@pytest.mark.parametrize("adapted", (ALL, SOME))
def test_merged_weights_are_base_plus_scaled_product(config, adapted):
  base = tiny_llama.weights(config)
  adapter = random_adapter(config, adapted)
  merged = lora.merge(base, adapter, lora=adapted)
  for before, after, pairs in zip(
      base.layers, merged.layers, adapter.layers, strict=True
  ):
    for name, weight in vars(before).items():
      if name not in adapted.targets:
        assert getattr(after, name) is weight
        continue
      a, b = pairs[name].a, pairs[name].b
      first = int(a.ndim == b.ndim == 3)  # of experts
      experts = range(a.shape[0]) if first else (...,)
      for x in experts:
        rank = adapted.rank
        product = a[x].reshape(-1, rank) @ b[x].reshape(rank, -1)
        expected = weight[x] + adapted.alpha / rank * product.reshape(
            weight[x].shape
        )
        # float32: two products and a sum.
        np.testing.assert_allclose(
            getattr(after, name)[x], expected, rtol=1e-5, atol=1e-5
        )


def test_a_new_adapter_changes_nothing():
  base = tiny_llama.weights(MOE)
  adapter = lora.init(jax.random.key(3), MOE, ALL)
  merged = lora.merge(base, adapter, lora=ALL)
  jax.tree.map(np.testing.assert_array_equal, base, merged)
  for pairs in adapter.layers:
    for name, pair in pairs.items():
      bound = np.max(np.abs(pair.a))
      assert bound > 0, name  # or B would never learn
      assert not np.any(pair.b), name


def test_the_gradient_reaches_every_factor():
  base, adapter = tiny_llama.weights(MOE), random_adapter(MOE, ALL)
  tokens, positions, segments = tiny_llama.packed_rows(((9,),), 9, MOE)

  @jax.jit
  def loss(adapter):
    merged = lora.merge(base, adapter, lora=ALL)
    logits = transformer.apply(merged, tokens, positions, segments, config=MOE)
    return (jax.nn.log_softmax(logits)[..., 0] ** 2).sum()

  for where, slope in jax.tree.leaves_with_path(jax.grad(loss)(adapter)):
    name = jax.tree_util.keystr(where)
    assert np.all(np.isfinite(slope)), name
    assert np.any(slope != 0), name


@pytest.mark.parametrize("config", (DENSE, MOE))
@pytest.mark.parametrize("adapted", (ALL, SOME))
def test_round_trip(config, adapted, tmp_path):
  adapter = random_adapter(config, adapted)
  save_adapter(tmp_path, adapter, lora=adapted, config=config, base="there")
  read, loaded = load_adapter(tmp_path, config=config)
  assert read == adapted
  jax.tree.map(np.testing.assert_array_equal, adapter, loaded)


def test_files_are_those_of_peft(tmp_path):
  adapter = random_adapter(MOE, SOME)
  save_adapter(tmp_path, adapter, lora=SOME, config=MOE, base="there")
  fields = json.loads((tmp_path / "adapter_config.json").read_text())
  assert fields["peft_type"] == "LORA"
  assert (fields["r"], fields["lora_alpha"]) == (3, 1.5)
  assert fields["target_modules"] == ["down_proj", "q_proj"]
  assert fields["base_model_name_or_path"] == "there"
  stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
  root = "base_model.model.model.layers."
  query = stored[f"{root}1.self_attn.q_proj.lora_B.weight"]
  heads = MOE.num_heads * MOE.head_dim
  np.testing.assert_array_equal(
      query, adapter.layers[1]["query"].b.reshape(3, heads).T
  )
  down = stored[f"{root}1.mlp.experts.2.down_proj.lora_A.weight"]
  np.testing.assert_array_equal(down, adapter.layers[1]["down"].a[2].T)
  assert stored[f"{root}0.mlp.down_proj.lora_A.weight"].shape == (3, 20)
  assert len(stored) == 2 * (2 + 1 + 3)


def test_every_wrong_factor_is_listed(tmp_path):
  adapter = random_adapter(DENSE, SOME)
  save_adapter(tmp_path, adapter, lora=SOME, config=DENSE, base="there")
  file = tmp_path / "adapter_model.safetensors"
  stored = safetensors.numpy.load_file(file)
  root = "base_model.model.model.layers."
  del stored[f"{root}0.mlp.down_proj.lora_A.weight"]
  stored["other"] = np.zeros(1, np.float32)
  name = f"{root}1.self_attn.q_proj.lora_A.weight"
  stored[name] = np.ascontiguousarray(stored[name].T)
  safetensors.numpy.save_file(stored, file)
  with pytest.raises(ValueError, match="missing .*unexpected.*has shape"):
    load_adapter(tmp_path, config=DENSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"use_dora": True}, "use_dora = True, must be False"),
        ({"target_modules": ["q_proj", "embed"]}, "target_modules = "),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear'"),
        ({"r": 0}, "rank must be >= 1"),
        ({"r": 2.0}, "r = 2.0, must be an integer"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x', must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha = 10+, must be a number"),
        ({"target_modules": [["a"]]}, "target_modules = "),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', must"),
    ),
)
def test_what_is_not_computed_is_refused(changes, message, tmp_path):
  adapter = random_adapter(DENSE, SOME)
  save_adapter(tmp_path, adapter, lora=SOME, config=DENSE, base="there")
  file = tmp_path / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    load_adapter(tmp_path, config=DENSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": ()}, "targets"),
        ({"targets": ("query", "query")}, "targets"),
        ({"targets": ("embedding",)}, "targets"),
    ),
)
def test_impossible_adapters(changes, message):
  fields = {"rank": 2, "alpha": 1.0, "targets": ("query",)} | changes
  with pytest.raises(ValueError, match=message):
    lora.LoRA(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda x: x.astype(np.int32), "is int32, must be one of"),
        (lambda x: x * np.float32(np.nan), "holds NaN or infinity"),
    ),
)
def test_factors_must_be_finite_floats(change, message, tmp_path):
  adapter = random_adapter(DENSE, SOME)
  save_adapter(tmp_path, adapter, lora=SOME, config=DENSE, base="there")
  file = tmp_path / "adapter_model.safetensors"
  stored = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file({k: change(v) for k, v in stored.items()}, file)
  with pytest.raises(ValueError, match=f"q_proj.lora_A.weight {message}"):
    load_adapter(tmp_path, config=DENSE)
