r"""Tokens per second of the sampler, part by part.

    python -m experiments.bench.decode [--policy=quickstart|smollm2] \
        [--num_slots=128] [--rounds=7] [--out=decode.json]

Three rows, measured in turn (A B C A B C …) after a warm-up: `decode`, the
compiled program with every slot sampling; `prefill`, full calls of one bucket
onto streams that are already half filled; and `engine`, agents that converse
with the engine (prompts and tool results of 20 to 60 tokens, turns of 5 to 25),
whose limit is the first two. The figures of a machine that does other things
too are only good as ratios; compile time is apart.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from mgrpo_jax import metrics
from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.policy.sampling import MAX_STOP_IDS, NO_TOKEN, Sampling
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.engine import Engine

POLICIES = {
    "quickstart": TransformerConfig(
        vocab_size=512,
        embed_dim=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        mlp_dim=288,
        rope_base=10_000.0,
        norm_eps=1e-5,
        tied_embeddings=True,
        dtype="float32",
    ),
    "smollm2": TransformerConfig(
        vocab_size=49_152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        rope_base=100_000.0,
        norm_eps=1e-5,
        tied_embeddings=True,
        dtype="float32",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """What is measured.

  Attributes:
    config: sizes of the policy.
    weights: random ones.
    num_slots: of every cache.
    context: tokens of a slot.
    block: tokens of cache attended or skipped together.
    prefill_tokens: of one call.
    bucket: tokens of a row of the prefill that is timed.
    decode_steps: of one call.
  """

  config: TransformerConfig
  weights: params.Params
  num_slots: int
  context: int
  block: int
  prefill_tokens: int
  bucket: int
  decode_steps: int


def decode(bench: Bench) -> Callable[[], float]:
  """Times one visit with every slot sampling, on average half filled.

  Args:
    bench: sizes.

  Returns:
    A function that runs it and returns tokens per second.
  """
  rng = np.random.default_rng(0)
  rows = bench.num_slots
  slots = Slots(
      token=rng.integers(0, bench.config.vocab_size, rows).astype(np.int32),
      length=rng.integers(
          1, bench.context - bench.decode_steps, rows, np.int32
      ),
      budget=np.full(rows, bench.decode_steps, np.int32),
      seed=rng.integers(0, 2**32, (rows, 2), np.uint32),
      temperature=np.ones(rows, np.float32),
      stop_ids=np.full((rows, MAX_STOP_IDS), NO_TOKEN, np.int32),
  )
  cache = [_cache(bench)]

  def run() -> float:
    start = time.perf_counter()
    cache[0], tokens, _ = device.decode(
        bench.weights,
        cache[0],
        slots,
        config=bench.config,
        num_steps=bench.decode_steps,
    )
    tokens.block_until_ready()
    return tokens.size / (time.perf_counter() - start)

  return run


def prefill(bench: Bench) -> Callable[[], float]:
  """Times one full prefill call onto half filled streams.

  Args:
    bench: sizes.

  Returns:
    A function that runs it and returns tokens per second.
  """
  rng = np.random.default_rng(0)
  rows = bench.prefill_tokens // bench.bucket
  shape = (rows, bench.bucket)
  arguments = (
      rng.integers(0, bench.config.vocab_size, shape).astype(np.int32),
      np.full(rows, bench.bucket, np.int32),
      np.arange(rows, dtype=np.int32) % bench.num_slots,
      np.full(rows, bench.context // 2 - bench.bucket // 2, np.int32),
  )
  cache = [_cache(bench)]

  def run() -> float:
    start = time.perf_counter()
    cache[0] = device.prefill(
        bench.weights, cache[0], *arguments, config=bench.config
    )
    jax.block_until_ready(cache[0])
    return rows * bench.bucket / (time.perf_counter() - start)

  return run


async def converse(engine: Engine, number: int, bench: Bench) -> None:
  """Plays one agent until its context is nearly full.

  Args:
    engine: running.
    number: of the agent, seeds its prompts and draws.
    bench: sizes.
  """
  rng = np.random.default_rng(number)
  vocab = bench.config.vocab_size
  tokens = rng.integers(0, vocab, rng.integers(20, 60)).tolist()
  while len(tokens) + 25 < bench.context:
    limit = int(rng.integers(5, 26))
    completion = await engine.generate(
        tokens,
        Sampling(temperature=1.0, max_new_tokens=limit, stop_ids=()),
        number,
        session=str(number),
    )
    result = rng.integers(0, vocab, rng.integers(20, 60)).tolist()
    tokens = tokens + completion.tokens.tolist() + result
  engine.release(str(number))


async def traffic(
    engine: Engine, bench: Bench, offset: int
) -> dict[str, float]:
  """Plays three agents a slot, as many at a time as there are slots.

  Args:
    engine: running.
    bench: sizes.
    offset: number of the first agent.

  Returns:
    Sampled and prefilled tokens per second, tokens sampled per visit.
  """
  room = asyncio.Semaphore(bench.num_slots)

  async def agent(number: int) -> None:
    async with room:
      await converse(engine, number, bench)

  before, start = engine.stats(), time.perf_counter()
  await asyncio.gather(*(agent(offset + i) for i in range(3 * bench.num_slots)))
  seconds, after = time.perf_counter() - start, engine.stats()
  done = {
      name: after[name] - before[name]
      for name in ("generated", "prefilled", "visits")
  }
  return {
      "engine, sampled": done["generated"] / seconds,
      "engine, prefilled": done["prefilled"] / seconds,
      "engine, per visit": done["generated"] / done["visits"],
  }


async def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
  """Runs everything in turn; the first round warms up and is dropped.

  Args:
    bench: sizes.
    rounds: kept.

  Returns:
    A list of figures for each row of the table.
  """
  engine = Engine(
      bench.config,
      bench.weights,
      0,
      num_slots=bench.num_slots,
      context=bench.context,
      block=bench.block,
      prefill_tokens=bench.prefill_tokens,
      prefill_buckets=[
          size for size in (16, 32, 64, 128) if size <= bench.context
      ],
      decode_steps=bench.decode_steps,
  )
  run_decode, run_prefill = decode(bench), prefill(bench)
  figures: dict[str, list[float]] = {}
  async with engine:
    for index in range(rounds + 1):
      row = {
          "decode, full": run_decode(),
          "prefill, full": run_prefill(),
      } | await traffic(engine, bench, index * 3 * bench.num_slots)
      if index:
        for name, value in row.items():
          figures.setdefault(name, []).append(value)
  return figures


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments = _arguments()
  config = POLICIES[arguments.policy]
  init = jax.jit(params.init, static_argnums=1)
  with metrics.count_compilations() as compiled:
    bench = Bench(
        config=config,
        weights=init(jax.random.key(0), config),
        num_slots=arguments.num_slots,
        context=arguments.context,
        block=arguments.block,
        prefill_tokens=arguments.prefill_tokens,
        bucket=arguments.bucket,
        decode_steps=arguments.decode_steps,
    )
    figures = asyncio.run(measure(bench, arguments.rounds))
  print(f"{params.num_params(config):,} parameters; {vars(arguments)}")
  print(f"compiled, programs of the sampler: {dict(device.compilations())}")
  print(f"compiled, all: {compiled.count} programs, {compiled.seconds:.1f} s")
  print(f"{'tokens/s':20}{'median':>10}{'min':>10}{'max':>10}")
  for name, values in figures.items():
    middle = statistics.median(values)
    print(f"{name:20}{middle:10.0f}{min(values):10.0f}{max(values):10.0f}")
  if arguments.out is not None:
    record = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "compilations": dict(device.compilations()),
        "compile_seconds": compiled.seconds,
        "tokens_per_second": figures,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _cache(bench: Bench) -> device.KVCache:
  """Makes an empty cache."""
  return device.init_cache(
      config=bench.config,
      num_slots=bench.num_slots,
      length=bench.context,
      block=bench.block,
  )


def _arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--policy", choices=POLICIES, default="quickstart")
  for name, default in {
      "num_slots": 128,
      "context": 256,
      "block": 64,
      "prefill_tokens": 512,
      "bucket": 32,
      "decode_steps": 8,
      "rounds": 7,
  }.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--out", type=pathlib.Path)
  return parser.parse_args()


if __name__ == "__main__":
  main()
