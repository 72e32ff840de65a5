r"""Time of a decoded token against the limits of its products and its memory.

    python -m experiments.bench.roofline [--rows=8,32,64] [--used=48,320] \
        [--rounds=5] [--out=roofline.json]

SmolLM2-135M's shape, random weights, float32. For each number of busy slots and
each length of their streams, a step of the compiled program, beside

  memory    the weights' bytes, and the cache's, at the rate at which a sum
            reads as many
  products  the layers' and the head's, with nothing between them; kernels kept
            as they are trained, turned and in tiles
  drawing   what `sampling.sample` takes alone for as many rows

All are measured in turn in one run. No program with such products can be faster
than `products`; `memory` is what this machine does, not its limit.
Steps are those of the engine, with each of `execution.kernels`; attention is
`native` where they are tiled, else by blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.bench import alone, decode
from mgrpo_jax.policy import arranging, params, sampling
from mgrpo_jax.policy.config import KERNELS, Execution, TransformerConfig
from mgrpo_jax.policy.native import streams

_BLOCK, _STEPS = 64, 8


def of_memory(weights: params.Params) -> Callable[[], float]:
  """Reads every weight once.

  Args:
    weights: of the policy.

  Returns:
    A function that runs it and returns seconds.
  """
  program = jax.jit(lambda tree: jax.tree.map(jnp.sum, tree))
  return lambda: alone.timed(program, weights)


def of_drawing(rows: int, config: TransformerConfig) -> Callable[[], float]:
  """Draws a token a row.

  Args:
    rows: tokens of a step.
    config: sizes.

  Returns:
    A function that runs it and returns seconds.
  """
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(rows, config.vocab_size)), jnp.float32)
  uniform = jnp.asarray(rng.random(rows), jnp.float32)
  program = jax.jit(sampling.sample)
  return lambda: alone.timed(program, logits, uniform, sampling.plainly(rows))


def of_step(
    weights: params.Params, rows: int, used: int, config: TransformerConfig
) -> Callable[[], float]:
  """Decodes with all slots busy.

  Args:
    weights: of the policy.
    rows: slots.
    used: tokens that each stream has.
    config: sizes.

  Returns:
    A function that runs it and returns seconds of one step.
  """
  bench = decode.Bench(
      config=config,
      weights=weights,
      num_slots=rows,
      context=used + _STEPS,
      block=_BLOCK,
      prefill_tokens=rows,
      bucket=1,
      decode_steps=_STEPS,
      decode_rows=0,
      busy=rows,
  )
  run = decode.decode(bench, [decode.empty(bench)], [used] * rows)
  return lambda: rows / run()


def measure(
    rows: Sequence[int], used: Sequence[int], rounds: int
) -> dict[str, list[float]]:
  """Times everything in turn, after a warm-up.

  Args:
    rows: numbers of busy slots.
    used: lengths of their streams, tokens.
    rounds: kept.

  Returns:
    Seconds of each, by what was timed.
  """
  kept = decode.POLICIES["smollm2"]
  weights = jax.jit(params.init, static_argnums=1)(jax.random.key(0), kept)
  runs = {"memory": of_memory(weights)}
  for kernels in KERNELS:
    attention = streams.ATTENTION if kernels == "tiled" else None
    execution = Execution(kernels=kernels, decode_attention=attention)
    config = dataclasses.replace(kept, execution=execution)
    arranging.check(config, mesh=None)
    used_weights = weights
    if kernels != "trained":
      used_weights = arranging.arrange(weights, config=config)
    for count in rows:
      name = f"{kernels} {count}"
      runs[f"products {name}"] = alone.forward(
          used_weights, alone.Rows(layers=count, head=count), config
      )
      for length in used:
        runs[f"step {name} {length}"] = of_step(
            used_weights, count, length, config
        )
  for count in rows:
    runs[f"drawing {count}"] = of_drawing(count, kept)
  for run in runs.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      seconds[name].append(run())
  return seconds


def table(
    seconds: dict[str, list[float]], rows: Sequence[int], used: Sequence[int]
) -> list[str]:
  """Lays the medians out.

  Args:
    seconds: of `measure`.
    rows: numbers of busy slots.
    used: lengths of their streams.

  Returns:
    Lines in Markdown; milliseconds where nothing else is said.
  """
  config = decode.POLICIES["smollm2"]
  number = params.num_params(config)
  middle = {name: statistics.median(one) for name, one in seconds.items()}
  head = "| rows | context | kernels | memory | products | GFLOP/s | drawing |"
  lines = [f"{head} a step | tokens/s | products' share |", "|---" * 10 + "|"]
  a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  for count, length, kernels in itertools.product(rows, used, KERNELS):
    multiplied = middle[f"products {kernels} {count}"]
    step = middle[f"step {kernels} {count} {length}"]
    read = 1 + count * length * a_token / number  # times the weights
    cells = [
        f"{count}",
        f"{length}",
        kernels,
        f"{1e3 * middle['memory'] * read:.0f}",
        f"{1e3 * multiplied:.0f}",
        f"{2 * number * count / multiplied / 1e9:.0f}",
        f"{1e3 * middle[f'drawing {count}']:.1f}",
        f"{1e3 * step:.0f}",
        f"{count / step:.0f}",
        f"{multiplied / step:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _numbers(text: str) -> list[int]:
  """Splits a list of numbers."""
  return [int(part) for part in text.split(",")]


def main() -> None:
  """Prints a table; writes JSON where asked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=_numbers, default=[8, 32, 64])
  parser.add_argument("--used", type=_numbers, default=[48, 320])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out", type=cli.out_file)
  arguments = parser.parse_args()
  seconds = measure(arguments.rows, arguments.used, arguments.rounds)
  print("\n".join(table(seconds, arguments.rows, arguments.used)))
  if arguments.out:
    arguments.out.write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
  main()
