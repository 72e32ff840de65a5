r"""Times forward and backward of SmolLM2-135M against transformers and torch.

Random weights of SmolLM2's shape, the same on both sides, the same tokens, the
loss the mean negative log-likelihood of the tokens that count. Three loads:
`full`, 8 rows of 256 tokens that all count, and `ragged`, trajectories with
prompts, tool results and answers of mixed length, of which only sampled tokens
count: the peer pads them to the longest of 8, as they come (which is what TRL
does) and, as `sorted`, by length; this project packs them and runs its head for
sampled tokens only. `group` is agents' calls of configs/smollm2_factbook.py, as
bench.rollout has them played, eight rollouts of each of two tasks: the peer
pads them as they come and runs its head from the first sampled token of its
rows on (as TRL does); here prompts that calls of a row have in common are
computed once.

    pip install -e .[bench] torch==2.13.0 transformers
    python -m experiments.bench.train --pairs=5 --out=train.json
    python -m experiments.bench.train --pairs=5 --loads=group --trace=calls.json

and on a GPU, the peer under autocast, a load that fills the card:

    python -m experiments.bench.train --peer=cuda --dtype=bfloat16 \
        --scan_layers --times=32 --most_rows=64

Prints seconds of each side, interleaved, the ratio of real tokens a second, and
what forward and backward of the real tokens are in FLOP/s (6 for each weight
and token, attention left out); compile time apart. Beside them, in the same
rounds, the products of our micro-batches, attention's included, with nothing
between them, and the ratio that a step of nothing else would have: no program
that leaves products to the compiler gets beyond it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import cli
from experiments.bench import alone, loads, recorded
from experiments.bench.decode import POLICIES
from experiments.bench.loads import LENGTH, ROWS, Load
from mgrpo_jax import losses, objectives, packing, prefixes, update
from mgrpo_jax.policy import logprobs, params
from mgrpo_jax.policy.config import DTYPES, Execution, TransformerConfig
from mgrpo_jax.policy.load import save_directory
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.types import TrainBatch, Trajectory

SMOLLM2 = POLICIES["smollm2"]
LOADS = ("full", "ragged", "sorted", "group")


def packed(
    load: Load, most_rows: int
) -> tuple[packing.BatchShape, Sequence[TrainBatch], losses.Totals]:
  """Packs a load in micro-batches that leave little empty, and prints how.

  Args:
    load: what is trained on.
    most_rows: rows of 256 tokens that a micro-batch has at most.

  Returns:
    The micro-batches' shape, the micro-batches, and the whole load's totals.
  """
  credits = [
      packing.Credit(trajectory=one, advantage=1.0, weight=1.0)
      for one in load.calls
  ]
  one_row = packing.BatchShape(
      rows=1,
      row_tokens=load.row_tokens,
      trajectories=len(load.calls),
      row_targets=load.row_targets,
      least_shared=load.least_shared,
  )
  needed = len(packing.pack(credits, shape=one_row))
  allowed = range(1, -(-most_rows * LENGTH // load.row_tokens) + 1)
  rows = min(allowed, key=lambda rows: (-needed % rows, -rows))
  shape = dataclasses.replace(one_row, rows=rows)
  batches = packing.pack(credits, shape=shape)
  totals = packing.count(credits)
  print(
      f"packed: {len(batches)} micro-batches of {rows} x {load.row_tokens} for"
      f" {sum(len(one.tokens) for one in load.calls)} tokens,"
      f" {int(totals.tokens)} of them sampled,"
      f" {prefixes.shared_fraction(batches):.0%} shared",
      flush=True,
  )
  return shape, batches, totals


def ours(
    weights: Any,
    batches: Sequence[TrainBatch],
    totals: losses.Totals,
    *,
    most_wanted: int,
    config: TransformerConfig,
) -> Callable[[], float]:
  """Compiles the gradient of micro-batches; returns what to time."""
  # A mean over sampled tokens is imitation that reads no context.
  objective = objectives.ImitationLoss(context_weight=0.0)
  predict_fn = functools.partial(
      logprobs.predict,
      config=config,
      temperature=1.0,
      most_wanted=most_wanted,
  )
  step = jax.jit(
      functools.partial(
          update.accumulate, objective=objective, predict_fn=predict_fn
      ),
      donate_argnums=0,
  )
  zeros = jax.jit(update.zeros)

  def run() -> float:
    gradient = zeros(weights)
    for batch in batches:
      gradient, _ = step(gradient, weights, batch, totals)
    jax.block_until_ready(gradient)
    return float(gradient.loss)

  return run


def theirs(
    directory: pathlib.Path,
    load: Load,
    *,
    device: str,
    dtype: str,
    most_rows: int,
    by_length: bool,
) -> Callable[[], float]:
  """Loads the peer with the same weights; returns what to time."""
  import torch
  import transformers

  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="sdpa"
  )
  model.to(device).train()
  narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
  ordered = list(load.calls)
  if by_length:
    ordered.sort(key=lambda one: len(one.tokens))
  total = sum(float(np.sum(one.loss_mask)) for one in ordered)
  rows = max(ROWS, most_rows // ROWS * ROWS)
  batches = [
      [torch.from_numpy(one).to(device) for one in _padded(ordered[i:][:rows])]
      for i in range(0, len(ordered), rows)
  ]

  def run() -> float:
    model.zero_grad()
    whole = torch.zeros((), device=device)
    for ids, attended, counted in batches:
      first = int(counted.any(dim=0).nonzero()[0]) if load.prompts else 1
      with narrow:
        logits = model(
            input_ids=ids,
            attention_mask=attended,
            logits_to_keep=ids.shape[1] - first + 1,
        ).logits
      logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
      chosen = torch.gather(logps, 2, ids[:, first:, None])[..., 0]
      loss = -(chosen * counted[:, first:]).sum() / total
      loss.backward()
      whole += loss.detach()
    return float(whole)  # waits for the device

  return run


def products(
    weights: Any,
    shape: packing.BatchShape,
    batches: int,
    config: TransformerConfig,
) -> Callable[[], float]:
  """Compiles the products of micro-batches, with nothing between them."""
  head = shape.rows * (shape.most_wanted or shape.row_tokens)
  rows = alone.Rows(
      layers=shape.rows * shape.row_tokens, head=head, length=shape.row_tokens
  )
  once = alone.both_ways(weights, rows, config)
  return lambda: sum(once() for _ in range(batches))


def measure(
    runs: Mapping[str, Callable[[], float]],
    *,
    pairs: int,
    tolerance: float,
) -> dict[str, Any]:
  """Runs all in turn after one warm-up each; checks that losses agree."""
  loss, compiled = _timed(runs["ours"])
  other, _ = _timed(runs["theirs"])
  if not np.isclose(loss, other, rtol=tolerance):
    raise SystemExit(f"losses differ: {loss} and {other}")
  runs["products"]()
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(pairs):
    for name, run in runs.items():
      seconds[name].append(_timed(run)[1])
  return {
      "first_call_seconds": compiled,
      "loss": [loss, other],
      "seconds": seconds,
      "ratio": _ratios(seconds, "ours"),
      "most": _ratios(seconds, "products"),
  }


def _timed(run: Callable[[], float]) -> tuple[float, float]:
  """What a run returns, and its seconds."""
  started = time.perf_counter()
  found = run()
  return found, time.perf_counter() - started


def _ratios(seconds: Mapping[str, Sequence[float]], name: str) -> list[float]:
  """How many times as long the peer takes, round by round."""
  both = zip(seconds[name], seconds["theirs"], strict=True)
  return [other / mine for mine, other in both]


def _padded(
    load: Sequence[Trajectory],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, attention mask and loss mask, padded on the right."""
  longest = max(len(one.tokens) for one in load)
  tokens = np.zeros((len(load), longest), np.int64)
  attended = np.zeros((len(load), longest), np.int64)
  counted = np.zeros((len(load), longest), np.float32)
  for row, one in enumerate(load):
    tokens[row, : len(one.tokens)] = one.tokens
    attended[row, : len(one.tokens)] = 1
    counted[row, : len(one.tokens)] = one.loss_mask
  return tokens, attended, counted


def make_load(name: str, arguments: argparse.Namespace) -> Load:
  """Makes a load of its name.

  Args:
    name: of `LOADS`.
    arguments: of the command.

  Returns:
    The load.
  """
  rng, times = np.random.default_rng(0), arguments.times
  if name == "group":
    return loads.group(rng, times, recorded.calls(arguments.trace))
  return (loads.full if name == "full" else loads.ragged)(rng, times)


def executed(
    config: TransformerConfig, load: Load, scan_layers: bool
) -> TransformerConfig:
  """Says how a load is run here.

  Args:
    config: sizes.
    load: whose logits all stay until the backward pass.
    scan_layers: whether layers run as a loop.

  Returns:
    The sizes, executed so.
  """
  execution = Execution(scan_layers=scan_layers, logit_columns=load.row_targets)
  return dataclasses.replace(config, execution=execution)


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments = _arguments()
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError as error:
    print(f"{error}; pip install torch==2.13.0 transformers", file=sys.stderr)
    raise SystemExit(2) from error
  device = jax.devices()[0]
  print(f"ours on {device.device_kind}, theirs on {arguments.peer}", flush=True)
  config = dataclasses.replace(SMOLLM2, dtype=arguments.dtype)
  weights = jax.jit(params.init, static_argnums=1)(jax.random.key(0), config)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    directory = pathlib.Path(folder) / "smollm2"
    save_directory(
        directory,
        Policy(
            config=config,
            params=weights,
            tokenizer=None,
            chat=None,
            system="",
        ),
    )
    for name in arguments.loads:
      load = make_load(name, arguments)
      ran = executed(config, load, arguments.scan_layers)
      shape, batches, totals = packed(load, arguments.most_rows)
      runs = {
          "ours": ours(
              weights,
              batches,
              totals,
              most_wanted=shape.most_wanted,
              config=ran,
          ),
          "theirs": theirs(
              directory,
              load,
              device=arguments.peer,
              dtype=arguments.dtype,
              most_rows=arguments.most_rows,
              by_length=name == "sorted",
          ),
          "products": products(weights, shape, len(batches), ran),
      }
      results[name] = measure(
          runs,
          pairs=arguments.pairs,
          tolerance=1e-4 if arguments.dtype == "float32" else 1e-2,
      )
      tokens = sum(len(one.tokens) for one in load.calls)
      _print(name, results[name], tokens, params.num_params(config))
  if arguments.out:
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def _print(
    name: str, result: dict[str, Any], tokens: int, weights: int
) -> None:
  """Prints what was measured of a load."""
  ratio, most = result["ratio"], statistics.median(result["most"])
  seconds = result["seconds"]
  mine, other, least = map(statistics.median, seconds.values())
  rate = 6 * weights * tokens / 1e12
  print(
      f"{name:8} ours {mine:.3g} s ({rate / mine:.3g} TFLOP/s), theirs"
      f" {other:.3g} s ({rate / other:.3g}), ratio"
      f" {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f});"
      f" products alone {least:.3g} s, so {most:.2f} at most;"
      f" first call {result['first_call_seconds']:.0f} s",
      flush=True,
  )


def _arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=5)
  parser.add_argument("--peer", default="cpu", help="torch's device")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--scan_layers", action="store_true")
  parser.add_argument("--times", type=int, default=1, help="size of the loads")
  parser.add_argument(
      "--most_rows", type=int, default=3, help="of a micro-batch"
  )
  parser.add_argument(
      "--loads", type=lambda text: text.split(","), default=list(LOADS)
  )
  parser.add_argument(
      "--trace",
      type=pathlib.Path,
      default=pathlib.Path(tempfile.gettempdir()) / "mgrpo_rollout/calls.json",
      help="recorded calls; recorded where there are none",
  )
  parser.add_argument("--out", type=cli.out_file)
  arguments = parser.parse_args()
  for name in ("pairs", "times", "most_rows"):
    if getattr(arguments, name) < 1:
      parser.error(f"--{name} must be at least 1")
  if unknown := set(arguments.loads) - set(LOADS):
    parser.error(f"--loads: {unknown} are not among {LOADS}")
  return arguments


if __name__ == "__main__":
  main()
