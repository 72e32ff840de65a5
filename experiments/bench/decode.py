r"""Tokens per second of the sampler, part by part.

    python -m experiments.bench.decode [--policy=quickstart|smollm2] \
        [--dtype=float32|bfloat16] [--num_slots=128] [--busy=25] \
        [--decode_rows=0,16,32] [--rounds=7] [--out=decode.json]

Measured in turn (A B C A B C …) after a warm-up: `prefill`, full calls of one
bucket onto streams that are already half filled; and for each number of rows
that are decoded together (0: all slots), `decode`, the compiled program with
some slots busy, and `engine`, agents that converse with the engine (prompts and
tool results of 20 to 60 tokens, turns of 5 to 25), one a slot, of whom no more
than `busy` ask at a time; the others wait as if for their tools. The figures of
a machine that does other things too are only good as ratios; compile time is
apart.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments import cli
from mgrpo_jax import metrics
from mgrpo_jax.policy import params
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.policy.sampling import MAX_STOP_IDS, NO_TOKEN, Sampling, plainly
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
    decode_rows: decoded together; 0 for all.
    busy: slots that are sampled at a time.
  """

  config: TransformerConfig
  weights: params.Params
  num_slots: int
  context: int
  block: int
  prefill_tokens: int
  bucket: int
  decode_steps: int
  decode_rows: int
  busy: int


def decode(
    bench: Bench,
    cache: list[KVCache],
    lengths: Sequence[int] | None = None,
) -> Callable[[], float]:
  """Times one visit with some slots busy, the others idle sessions.

  Args:
    bench: sizes.
    cache: one; donated and replaced, so that others can use it in turn.
    lengths: tokens that each slot holds; None for any, half full on average.

  Returns:
    A function that runs it and returns tokens per second.
  """
  rng = np.random.default_rng(0)
  rows = bench.num_slots
  length = np.asarray(
      rng.integers(1, bench.context - bench.decode_steps, rows)
      if lengths is None
      else lengths,
      np.int32,
  )
  budget = np.zeros(rows, np.int32)
  budget[rng.permutation(rows)[: bench.busy]] = bench.decode_steps
  slots = Slots(
      token=rng.integers(0, bench.config.vocab_size, rows).astype(np.int32),
      length=length,
      budget=budget,
      seed=rng.integers(0, 2**32, (rows, 2), np.uint32),
      drawing=plainly(rows),
      stop_ids=np.full((rows, MAX_STOP_IDS), NO_TOKEN, np.int32),
  )

  def run() -> float:
    start = time.perf_counter()
    cache[0], drawn = device.decode(
        bench.weights,
        cache[0],
        slots,
        config=bench.config,
        num_steps=bench.decode_steps,
        num_rows=bench.decode_rows or rows,
    )
    jax.block_until_ready(drawn)
    return int(budget.sum()) / (time.perf_counter() - start)

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
  cache = [empty(bench)]

  def run() -> float:
    start = time.perf_counter()
    cache[0] = device.prefill(
        bench.weights, cache[0], *arguments, config=bench.config
    )
    jax.block_until_ready(cache[0])
    return rows * bench.bucket / (time.perf_counter() - start)

  return run


async def converse(
    engine: Engine, number: int, bench: Bench, asking: asyncio.Semaphore
) -> None:
  """Plays one agent until its context is nearly full.

  Args:
    engine: running.
    number: of the agent, seeds its prompts and draws.
    bench: sizes.
    asking: how many may ask at a time.
  """
  rng = np.random.default_rng(number)
  vocab = bench.config.vocab_size
  tokens = rng.integers(0, vocab, rng.integers(20, 60)).tolist()
  while len(tokens) + 25 < bench.context:
    limit = int(rng.integers(5, 26))
    async with asking:
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
    Sampled and prefilled tokens per second, tokens sampled per visit. Agents
    take turns in asking, so that all sessions are open for most of the time.
  """
  room = asyncio.Semaphore(bench.num_slots)
  asking = asyncio.Semaphore(bench.busy)

  async def agent(number: int) -> None:
    async with room:
      await converse(engine, number, bench, asking)

  before, start = engine.stats(), time.perf_counter()
  await asyncio.gather(*(agent(offset + i) for i in range(3 * bench.num_slots)))
  seconds, after = time.perf_counter() - start, engine.stats()
  done = {
      name: after[name] - before[name]
      for name in ("generated", "prefilled", "visits")
  }
  return {
      "sampled": done["generated"] / seconds,
      "prefilled": done["prefilled"] / seconds,
      "a visit": done["generated"] / done["visits"],
  }


async def measure(
    benches: Sequence[Bench], rounds: int
) -> dict[str, list[float]]:
  """Runs everything in turn; the first round warms up and is dropped.

  Args:
    benches: that differ in `decode_rows`.
    rounds: kept.

  Returns:
    A list of figures for each row of the table.
  """
  run_prefill = prefill(benches[0])
  decoders = [decode(bench, [empty(bench)]) for bench in benches]
  figures: dict[str, list[float]] = {}
  async with contextlib.AsyncExitStack() as stack:
    engines = [
        await stack.enter_async_context(start(bench)) for bench in benches
    ]
    for index in range(rounds + 1):
      row = {"prefill, full": run_prefill()}
      for bench, run, engine in zip(benches, decoders, engines, strict=True):
        name = f"{bench.decode_rows or 'all'} rows, "
        row[f"{name}decode"] = run()
        told = await traffic(engine, bench, index * 3 * bench.num_slots)
        row |= {f"{name}{key}": value for key, value in told.items()}
      if index:
        for name, value in row.items():
          figures.setdefault(name, []).append(value)
  return figures


def start(bench: Bench) -> Engine:
  """Makes an engine.

  Args:
    bench: sizes.

  Returns:
    The engine, not yet running.
  """
  return Engine(
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
      decode_rows=bench.decode_rows,
  )


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments = _arguments()
  config = dataclasses.replace(
      POLICIES[arguments.policy], dtype=arguments.dtype
  )
  init = jax.jit(params.init, static_argnums=1)
  with metrics.count_compilations() as compiled:
    weights = init(jax.random.key(0), config)
    benches = [
        Bench(
            config=config,
            weights=weights,
            num_slots=arguments.num_slots,
            context=arguments.context,
            block=arguments.block,
            prefill_tokens=arguments.prefill_tokens,
            bucket=arguments.bucket,
            decode_steps=arguments.decode_steps,
            decode_rows=rows,
            busy=arguments.busy,
        )
        for rows in arguments.decode_rows
    ]
    figures = asyncio.run(measure(benches, arguments.rounds))
  print(f"{params.num_params(config):,} parameters; {vars(arguments)}")
  print(f"compiled, programs of the sampler: {dict(device.compilations())}")
  print(f"compiled, all: {compiled.count} programs, {compiled.seconds:.1f} s")
  print(f"{'tokens/s':22}{'median':>10}{'min':>10}{'max':>10}")
  for name, values in figures.items():
    middle = statistics.median(values)
    print(f"{name:22}{middle:10.0f}{min(values):10.0f}{max(values):10.0f}")
  if arguments.out is not None:
    record = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "compilations": dict(device.compilations()),
        "compile_seconds": compiled.seconds,
        "tokens_per_second": figures,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def empty(bench: Bench) -> KVCache:
  """Makes an empty cache.

  Args:
    bench: sizes.

  Returns:
    The cache.
  """
  return device.init_cache(
      config=bench.config,
      num_slots=bench.num_slots,
      length=bench.context,
      block=bench.block,
      num_rows=bench.decode_rows or bench.num_slots,
  )


def _arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--policy", choices=POLICIES, default="quickstart")
  parser.add_argument(
      "--dtype", choices=("float32", "bfloat16"), default="float32"
  )
  for name, default in {
      "num_slots": 128,
      "context": 256,
      "block": 64,
      "prefill_tokens": 512,
      "bucket": 32,
      "decode_steps": 8,
      "busy": 25,
      "rounds": 7,
  }.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument(
      "--decode_rows",
      type=lambda text: [int(part) for part in text.split(",")],
      default=[0, 16, 32],
  )
  parser.add_argument("--out", type=cli.out_file)
  return parser.parse_args()


if __name__ == "__main__":
  main()
