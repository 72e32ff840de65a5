r"""How far every model family is from transformers: a table, and JSON.

    python -m experiments.bench.families [--cases=3] [--seed=0] [--json=FILE]

Random small models of random odd sizes (grouped heads, windows shorter than
the sequence) are made by transformers in float32, saved, and opened here. Each
column is the largest error over the cases, relative to the largest number
compared: logits; gradients of the mean negative log-likelihood against torch
autograd; log-probabilities of sampled tokens, cached decode against the full
forward, in nats; logits after saving here and opening with transformers.
Exit code 1 where an error exceeds 1e-4, or 1e-3 for a mixture of experts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags

from experiments import cli

_CASES = flags.DEFINE_integer("cases", 3, "Models of each family, >= 1.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sizes, weights and tokens.")
_JSON = flags.DEFINE_string("json", None, "Where the errors are written.")

ROWS, LENGTH = 2, 21
COLUMNS = ("logits", "gradients", "decode", "reopened")
LIMIT, MIXTURE_LIMIT = 1e-4, 1e-3
Draw = np.random.Generator


def main() -> None:
  """Measures; see the module."""
  from mgrpo_jax import atomic

  with cli.user_errors(ValueError, OSError):
    missing = [
        name
        for name in ("torch", "transformers")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
      raise ValueError(
          f"packages missing: {', '.join(missing)}; pip install torch"
          " transformers"
      )
    if _CASES.value < 1:
      raise ValueError(f"--cases must be >= 1, got {_CASES.value}")
  worst: dict[str, dict[str, float]] = {}
  for family in FAMILIES:
    errors = [
        _errors(family, np.random.default_rng((_SEED.value, case)))
        for case in range(_CASES.value)
    ]
    worst[family] = {name: max(e[name] for e in errors) for name in COLUMNS}
    print(_line(family, worst[family]), flush=True)
  passed = all(
      max(row.values()) <= _limit(family) for family, row in worst.items()
  )
  if _JSON.value:
    result = {"cases": _CASES.value, "seed": _SEED.value, "errors": worst}
    atomic.write_json(pathlib.Path(_JSON.value), result)
  print("within the limits" if passed else "ABOVE THE LIMITS")
  sys.exit(0 if passed else 1)


def _limit(family: str) -> float:
  """The largest error that a family may have."""
  return MIXTURE_LIMIT if "moe" in family else LIMIT


def _line(family: str, row: Mapping[str, float]) -> str:
  """Lays a family's errors out."""
  cells = "  ".join(f"{name} {row[name]:.1e}" for name in COLUMNS)
  return f"{family:20s} {cells}  (limit {_limit(family):.0e})"


def _sizes(rng: Draw) -> dict[str, Any]:
  """Draws sizes that hardly divide each other."""
  kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  heads = kv_heads * group
  return {
      "vocab_size": int(rng.integers(30, 90)),
      "hidden_size": heads * int(rng.integers(3, 7)),
      "num_hidden_layers": int(rng.integers(2, 4)),
      "num_attention_heads": heads,
      "num_key_value_heads": kv_heads,
      "head_dim": 2 * int(rng.integers(2, 7)),
      "intermediate_size": int(rng.integers(9, 50)),
      "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
      "max_position_embeddings": 512,
      "tie_word_embeddings": bool(rng.integers(2)),
      "pad_token_id": None,
      "bos_token_id": None,
      "eos_token_id": None,
  }


def _windows(rng: Draw, layers: int) -> dict[str, Any]:
  """Draws a window shorter than the sequence, and who has it."""
  return {
      "use_sliding_window": True,
      "sliding_window": int(rng.integers(1, LENGTH - 4)),
      "max_window_layers": int(rng.integers(layers)),
  }


def _llama(rng: Draw) -> Any:
  """Llama 1 and 2, SmolLM2."""
  import transformers

  return transformers.LlamaConfig(**_sizes(rng))


def _llama3(rng: Draw) -> Any:
  """Llama 3.1 and later."""
  import transformers

  rope = {
      "rope_type": "llama3",
      "rope_theta": 500.0,
      "factor": float(rng.uniform(1, 9)),
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": int(rng.integers(8, 40)),
  }
  return transformers.LlamaConfig(**_sizes(rng), rope_parameters=rope)


def _qwen2(rng: Draw) -> Any:
  """Qwen 2 and 2.5."""
  import transformers

  sizes = _sizes(rng)
  windows = _windows(rng, sizes["num_hidden_layers"])
  return transformers.Qwen2Config(**sizes, **windows)


def _qwen3(rng: Draw) -> Any:
  """Qwen 3."""
  import transformers

  sizes = _sizes(rng)
  windows = _windows(rng, sizes["num_hidden_layers"])
  return transformers.Qwen3Config(**sizes, **windows)


def _qwen3_moe(rng: Draw, *, normalised: bool) -> Any:
  """Qwen 3 with experts, some layers dense."""
  import transformers

  experts = int(rng.integers(2, 9))
  return transformers.Qwen3MoeConfig(
      **_sizes(rng),
      num_experts=experts,
      num_experts_per_tok=int(rng.integers(1, experts + 1)),
      moe_intermediate_size=int(rng.integers(4, 20)),
      norm_topk_prob=normalised,
      mlp_only_layers=[0] if rng.integers(2) else [],
  )


def _gemma3(rng: Draw) -> Any:
  """Gemma 3's text model; a global layer among local ones."""
  import transformers

  sizes = _sizes(rng) | {"num_hidden_layers": 3}
  kinds = ["sliding_attention"] * 3
  kinds[rng.integers(3)] = "full_attention"
  whole = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
  return transformers.Gemma3TextConfig(
      **sizes,
      layer_types=kinds,
      sliding_window=int(rng.integers(1, LENGTH - 4)),
      query_pre_attn_scalar=int(rng.integers(4, 40)),
      rope_parameters={
          "full_attention": whole,
          "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
  )


FAMILIES: Mapping[str, Callable[[Draw], Any]] = {
    "llama": _llama,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": functools.partial(_qwen3_moe, normalised=True),
    "qwen3_moe_unscaled": functools.partial(_qwen3_moe, normalised=False),
    "gemma3": _gemma3,
}


def _errors(family: str, rng: Draw) -> dict[str, float]:
  """Makes one model and compares it."""
  import torch

  from mgrpo_jax.policy.load import load, save_directory

  torch.manual_seed(int(rng.integers(2**31)))
  model = _random_model(FAMILIES[family](rng))
  tokens = rng.integers(0, model.config.vocab_size, (ROWS, LENGTH))
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    model.save_pretrained(place / "theirs")
    policy = load(place / "theirs")
    save_directory(place / "ours", policy)
    expected = _torch_logits(model, tokens)
    reopened = _torch_logits(_opened(place / "ours"), tokens)
    logits, gradient = _logits_and_gradient(policy, tokens)
    theirs = _torch_gradient(model, tokens, place / "torch")
    save_directory(
        place / "gradient", dataclasses.replace(policy, params=gradient)
    )
    ours = safetensors.numpy.load_file(place / "gradient/model.safetensors")
  offset = 1.0 if policy.config.post_norms else 0.0  # saved less 1
  largest = max(np.abs(one).max() for one in theirs.values())
  differences = [
      np.abs(ours[name] + (offset if "norm" in name else 0) - theirs[name])
      for name in ours
  ]
  return {
      "logits": _relative(logits, expected),
      "gradients": float(max(d.max() for d in differences) / largest),
      "decode": _decode_error(policy, tokens[0]),
      "reopened": _relative(reopened, expected),
  }


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
  """The largest difference, over the largest number."""
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _random_model(config: Any) -> Any:
  """A float32 model whose every weight matters, norms away from 1."""
  import torch
  import transformers

  config._attn_implementation = config._experts_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      ones = "norm" in name and config.model_type != "gemma3_text"
      weight.copy_(float(ones) + 0.3 * torch.randn_like(weight))
  return model


def _opened(place: pathlib.Path) -> Any:
  """Opens a directory of ours with transformers."""
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
      place, attn_implementation="eager", experts_implementation="eager"
  ).eval()


def _torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """Runs a model of transformers."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


def _torch_gradient(
    model: Any, tokens: np.ndarray, place: pathlib.Path
) -> Mapping[str, np.ndarray]:
  """Differentiates; names and layout are those of a saved model."""
  import torch

  ids = torch.tensor(tokens)
  logits = model(ids).logits[:, :-1].flatten(0, 1)
  torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
  with torch.no_grad():
    for weight in model.parameters():
      weight.copy_(
          torch.zeros_like(weight) if weight.grad is None else weight.grad
      )
  model.save_pretrained(place)
  return safetensors.numpy.load_file(place / "model.safetensors")


def _logits_and_gradient(policy: Any, tokens: np.ndarray) -> tuple[Any, Any]:
  """The same here."""
  from mgrpo_jax.policy import transformer

  ids = jnp.asarray(tokens, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)

  def loss(tree: Any) -> tuple[jax.Array, jax.Array]:
    logits = transformer.apply(
        tree, ids, positions, jnp.ones_like(ids), config=policy.config
    )
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)
    return -chosen.mean(), logits

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, logits), gradient = run(policy.params)
  return np.asarray(logits), gradient


def _decode_error(policy: Any, prompt: np.ndarray) -> float:
  """Samples after a prompt, and scores the whole in one forward."""
  from mgrpo_jax.policy import cache, decode, logprobs, sampling

  steps, config = 7, policy.config
  known = len(prompt) - 1
  empty = cache.init(
      config, num_slots=1, length=known + steps + 1, block=8, num_rows=1
  )
  one = functools.partial(jnp.full, (1,), dtype=jnp.int32)
  filled = jax.jit(functools.partial(decode.prefill, config=config))(
      policy.params,
      empty,
      jnp.asarray(prompt[None, :-1], jnp.int32),
      one(fill_value=known),
      one(fill_value=0),
      one(fill_value=0),
  )
  slots = decode.Slots(
      token=one(fill_value=int(prompt[-1])),
      length=one(fill_value=known),
      budget=one(fill_value=steps),
      seed=jnp.ones((1, 2), jnp.uint32),
      drawing=sampling.plainly(1),
      stop_ids=jnp.full((1, 1), sampling.NO_TOKEN, jnp.int32),
  )
  run = functools.partial(
      decode.decode, config=config, num_steps=steps, num_rows=1
  )
  _, drawn = jax.jit(run)(policy.params, filled, slots)
  tokens = [jnp.asarray(prompt, jnp.int32), drawn.tokens[:, 0]]
  whole = jnp.concatenate(tokens)[None]
  score = functools.partial(
      logprobs.token_logprobs, config=config, temperature=1.0
  )
  scored = jax.jit(score)(
      policy.params,
      whole,
      jnp.arange(whole.shape[1])[None],
      jnp.ones_like(whole),
  )
  return float(jnp.abs(scored[0, -steps:] - drawn.logprobs[:, 0]).max())


if __name__ == "__main__":
  cli.run(main)
