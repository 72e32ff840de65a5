r"""Time per decoded token against what the slots hold.

    python -m experiments.bench.occupancy [--policy=quickstart|smollm2] \
        [--decode_rows=32] [--rounds=7] [--out=occupancy.json]

Three sweeps of the compiled decode program, all measured in turn after a
warm-up: `busy`, slots that are sampled of all slots, decoded in tiles and at
once; `used`, tokens that each busy slot holds; and `room`, tokens that a slot
could hold while what it holds stays the same. A token should cost the same
whoever waits, more the more is used, and no more for what is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments import cli
from experiments.bench import decode
from experiments.bench.decode import POLICIES, Bench
from mgrpo_jax.policy import params
from mgrpo_jax.policy.cache import KVCache

SHARES = (1, 8, 25, 64, 128)  # of 128 slots
PARTS = (8, 4, 2)  # of the context


def arms(bench: Bench) -> dict[str, tuple[Callable[[], float], int]]:
  """Makes what is measured.

  Args:
    bench: sizes; its context is the shortest room.

  Returns:
    Name -> a function that runs a visit and returns tokens per second, and the
    slots that it samples.
  """
  made = {}
  caches: dict[tuple[int, int], list[KVCache]] = {}

  def add(name: str, used: int, **changes: Any) -> None:
    one = dataclasses.replace(bench, **changes)
    cache = caches.setdefault((one.context, one.decode_rows), [])
    if not cache:
      cache.append(decode.empty(one))
    lengths = [used] * bench.num_slots
    made[name] = decode.decode(one, cache, lengths), one.busy

  half = bench.context // 2
  for share in SHARES:
    busy = max(1, share * bench.num_slots // SHARES[-1])
    add(f"busy {busy}, tiles", half, busy=busy)
    add(f"busy {busy}, all slots", half, busy=busy, decode_rows=0)
  for part in PARTS:
    used = bench.context // part
    add(f"used {used}", used)
  used = bench.context - bench.decode_steps
  add(f"used {used}", used)
  for times in (1, 2, 4):
    room = times * bench.context
    add(f"room {room}", bench.context // 4, context=room)
  return made


def measure(
    made: Mapping[str, tuple[Callable[[], float], int]], rounds: int
) -> dict[str, list[float]]:
  """Runs all in turn; the first round warms up and is dropped.

  Args:
    made: by `arms`.
    rounds: kept.

  Returns:
    Microseconds per token of each.
  """
  figures: dict[str, list[float]] = {name: [] for name in made}
  for index in range(rounds + 1):
    for name, (run, _) in made.items():
      seconds = 1 / run()
      if index:
        figures[name].append(1e6 * seconds)
  return figures


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments = _arguments()
  config = POLICIES[arguments.policy]
  bench = Bench(
      config=config,
      weights=jax.jit(params.init, static_argnums=1)(jax.random.key(0), config),
      num_slots=arguments.num_slots,
      context=arguments.context,
      block=arguments.block,
      prefill_tokens=arguments.context,
      bucket=arguments.context,
      decode_steps=arguments.decode_steps,
      decode_rows=arguments.decode_rows,
      busy=arguments.busy,
  )
  made = arms(bench)
  figures = measure(made, arguments.rounds)
  print(f"{params.num_params(config):,} parameters; {vars(arguments)}")
  print(f"{'us/token':24}{'median':>10}{'min':>10}{'max':>10}{'ms/step':>10}")
  for name, values in figures.items():
    middle, busy = statistics.median(values), made[name][1]
    print(
        f"{name:24}{middle:10.1f}{min(values):10.1f}{max(values):10.1f}"
        f"{middle * busy / 1e3:10.2f}"
    )
  if arguments.out is not None:
    record = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "microseconds_per_token": figures,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--policy", choices=POLICIES, default="quickstart")
  for name, default in {
      "num_slots": 128,
      "context": 256,
      "block": 32,
      "decode_steps": 8,
      "decode_rows": 32,
      "busy": 25,
      "rounds": 7,
  }.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--out", type=cli.out_file)
  return parser.parse_args()


if __name__ == "__main__":
  main()
