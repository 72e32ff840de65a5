"""Tunix's GRPOLearner with its vanilla rollouts, a step at a time.

    PYTHON -m experiments.bench.workers.of_tunix DIRECTORY SETTINGS

Requests and SETTINGS as in `of_trl`.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from experiments.bench.workers import pipe

_NEVER = -1  # no token ends a completion


def main() -> None:
  """Trains as long as it is asked to."""
  wire = pipe.Pipe()
  import jax
  import numpy as np
  import optax
  import transformers
  from flax import nnx
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  directory, settings = sys.argv[1], json.loads(sys.argv[2])
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  prompts, new = settings["prompts"], settings["new"]
  lengths = [len(tokenizer(one).input_ids) for one in prompts]
  longest = max(lengths) + 1  # its sampler puts a BOS before a prompt
  mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
  with mesh:
    actor = _model(directory, mesh)
  cluster = rl_cluster.RLCluster(
      actor=actor,
      tokenizer=tokenizer,
      cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh={
              rl_cluster.Role.ACTOR: mesh,
              rl_cluster.Role.ROLLOUT: mesh,
          },
          rollout_engine="vanilla",
          training_config=rl_cluster.RLTrainingConfig(
              actor_optimizer=optax.adamw(settings["learning_rate"]),
              eval_every_n_steps=10**6,
              max_steps=10**6,
              mini_batch_size=len(prompts),
              train_micro_batch_size=len(prompts),
          ),
          rollout_config=base_rollout.RolloutConfig(
              max_tokens_to_generate=new,
              temperature=1.0,
              top_p=1.0,  # None would be greedy
              max_prompt_length=longest,
              kv_cache_size=longest + new + 1,
              eos_tokens=[_NEVER],
          ),
      ),
  )
  learner = grpo_learner.GRPOLearner(
      rl_cluster=cluster,
      algo_config=grpo_learner.GRPOConfig(
          num_generations=settings["completions"], beta=0.0
      ),
      reward_fns=_reward,
  )

  def batches() -> Iterator[dict[str, Any]]:
    answer: dict[str, Any] = {"ready": True, "prompt_tokens": lengths}
    while True:
      wire.write(answer)
      if wire.read() is None:
        return
      began = time.perf_counter()
      yield {"prompts": np.array(prompts)}
      # What the last update dispatched belongs to its step.
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      answer = {"seconds": time.perf_counter() - began}

  learner.train(batches())


def _model(directory: str, mesh: Any) -> Any:
  """Loads the policy as Tunix's Llama, float32."""
  import jax.numpy as jnp
  from tunix.models.llama3 import model, params

  sizes = json.loads((pathlib.Path(directory) / "config.json").read_text())
  config = model.ModelConfig(
      num_layers=sizes["num_hidden_layers"],
      vocab_size=sizes["vocab_size"],
      embed_dim=sizes["hidden_size"],
      hidden_dim=sizes["intermediate_size"],
      num_heads=sizes["num_attention_heads"],
      head_dim=sizes["head_dim"],
      num_kv_heads=sizes["num_key_value_heads"],
      rope_theta=int(sizes["rope_theta"]),
      norm_eps=sizes["rms_norm_eps"],
      weight_tying=sizes["tie_word_embeddings"],
  )
  return params.create_model_from_safe_tensors(
      directory, config, mesh, dtype=jnp.float32
  )


def _reward(completions: list[str], **_: Any) -> list[float]:
  """The share of even characters: a reward that differs within a group."""
  return [
      sum(ord(c) % 2 == 0 for c in one) / max(len(one), 1)
      for one in completions
  ]


if __name__ == "__main__":
  main()
