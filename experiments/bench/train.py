r"""Times forward and backward of SmolLM2-135M against transformers and torch.

Random weights of SmolLM2's shape, the same on both sides, the same tokens, the
loss the mean negative log-likelihood of the tokens that count. Two loads:
`full`, 8 rows of 256 tokens that all count, and `ragged`, trajectories with
prompts, tool results and answers of mixed length, of which only sampled tokens
count: the peer pads them to the longest of 8, as they come (which is what TRL
does) and, as `sorted`, by length; this project packs them and runs its head for
sampled tokens only.

    pip install -e .[bench] torch==2.13.0 transformers
    python -m experiments.bench.train --pairs=5 --out=train.json

and on a GPU, the peer under autocast, a load that fills the card:

    python -m experiments.bench.train --peer=cuda --dtype=bfloat16 \
        --scan_layers --times=32 --most_rows=64

Prints seconds of each side, interleaved, the ratio of real tokens a second, and
what forward and backward of the real tokens are in FLOP/s (6 for each weight
and token, attention left out); compile time apart.
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench.decode import POLICIES
from mgrpo_jax import objectives, packing, update
from mgrpo_jax.policy import logprobs, params
from mgrpo_jax.policy.config import DTYPES, Execution, TransformerConfig
from mgrpo_jax.policy.load import save_directory
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.types import NO_PARENT, Status, Trajectory

SMOLLM2 = POLICIES["smollm2"]
ROWS, LENGTH = 8, 256
RAGGED = 24  # trajectories
RAGGED_TARGETS = 80  # sampled tokens of a packed row, at most


def full_load(rng: np.random.Generator, times: int) -> list[Trajectory]:
  """Rows of equal length in which all tokens but the first count."""
  return [_trajectory(rng, n, [(1, LENGTH - 1)]) for n in range(times * ROWS)]


def ragged_load(rng: np.random.Generator, times: int) -> list[Trajectory]:
  """Agent calls: a prompt, then turns of sampled tokens and results."""
  calls = []
  for number in range(times * RAGGED):
    prompt = int(np.clip(rng.lognormal(3.4, 0.5), 12, 100))
    parts = [(prompt, int(np.clip(rng.lognormal(2.2, 0.6), 3, 40)))]
    for _ in range(rng.integers(0, 4)):
      result = int(np.clip(rng.lognormal(3.0, 0.5), 5, 60))
      parts.append((result, int(np.clip(rng.lognormal(2.0, 0.6), 3, 30))))
    calls.append(_trajectory(rng, number, parts))
  return [call for call in calls if len(call.tokens) <= LENGTH]


def ours(
    weights: Any,
    load: Sequence[Trajectory],
    targets: int,
    *,
    config: TransformerConfig,
    most_rows: int,
) -> Callable[[], float]:
  """Compiles the gradient of a load; returns what to time."""
  credits = [
      packing.Credit(trajectory=one, advantage=1.0, weight=1.0) for one in load
  ]
  used = sum(len(one.tokens) for one in load)
  one_row = packing.BatchShape(
      rows=1,
      row_tokens=LENGTH,
      trajectories=len(load),
      row_targets=targets,
  )
  needed = len(packing.pack(credits, shape=one_row))
  rows = -(-needed // -(-needed // most_rows))  # little is left empty
  shape = dataclasses.replace(one_row, rows=rows)
  batches = packing.pack(credits, shape=shape)
  totals = packing.count(credits)
  # A mean over sampled tokens is imitation that reads no context.
  objective = objectives.ImitationLoss(context_weight=0.0)
  predict_fn = functools.partial(
      logprobs.predict,
      config=config,
      temperature=1.0,
      most_wanted=targets if targets < LENGTH else 0,
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

  print(
      f"packed: {len(batches)} micro-batches of {rows} x {LENGTH} for {used}"
      f" tokens, {int(totals.tokens)} of them sampled",
      flush=True,
  )
  return run


def theirs(
    directory: pathlib.Path,
    load: Sequence[Trajectory],
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
  ordered = list(load)
  if by_length:
    ordered.sort(key=lambda one: len(one.tokens))
  total = sum(float(np.sum(one.loss_mask)) for one in load)
  rows = max(ROWS, most_rows // ROWS * ROWS)
  batches = [
      [torch.from_numpy(one).to(device) for one in _padded(ordered[i:][:rows])]
      for i in range(0, len(ordered), rows)
  ]

  def run() -> float:
    model.zero_grad()
    whole = torch.zeros((), device=device)
    for ids, attended, counted in batches:
      with narrow:
        logits = model(input_ids=ids, attention_mask=attended).logits
      logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
      chosen = torch.gather(logps, 2, ids[:, 1:, None])[..., 0]
      loss = -(chosen * counted[:, 1:]).sum() / total
      loss.backward()
      whole += loss.detach()
    return float(whole)  # waits for the device

  return run


def measure(
    ours_run: Callable[[], float],
    theirs_run: Callable[[], float],
    *,
    pairs: int,
    tolerance: float,
) -> dict[str, Any]:
  """Runs both in turn after one warm-up each; checks that losses agree."""
  started = time.perf_counter()
  loss = ours_run()
  compiled = time.perf_counter() - started
  other = theirs_run()
  if not np.isclose(loss, other, rtol=tolerance):
    raise SystemExit(f"losses differ: {loss} and {other}")
  seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
  for _ in range(pairs):
    for name, run in (("ours", ours_run), ("theirs", theirs_run)):
      started = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - started)
  ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
  return {
      "first_call_seconds": compiled,
      "loss": [loss, other],
      "seconds": seconds,
      "ratio": ratios,
  }


def _trajectory(
    rng: np.random.Generator, number: int, parts: Sequence[tuple[int, int]]
) -> Trajectory:
  """A call of (unsampled, sampled) stretches of random tokens."""
  mask = np.concatenate(
      [np.repeat(np.array([0, 1], np.float32), one) for one in parts]
  )
  return Trajectory(
      task_id=f"t{number}",
      rollout=0,
      role="main",
      call=0,
      parent=NO_PARENT,
      request="",
      tokens=rng.integers(SMOLLM2.vocab_size, size=len(mask), dtype=np.int32),
      loss_mask=mask,
      sampler_logprobs=np.zeros(len(mask), np.float32),
      version_min=0,
      version_max=0,
      status=Status.COMPLETED,
      turns=(),
      result_text="",
      seconds=0.0,
  )


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
  config = dataclasses.replace(
      SMOLLM2,
      dtype=arguments.dtype,
      execution=Execution(scan_layers=arguments.scan_layers),
  )
  weights = jax.jit(params.init, static_argnums=1)(jax.random.key(0), config)
  rng = np.random.default_rng
  ragged = ragged_load(rng(0), arguments.times)
  loads = {
      "full": (full_load(rng(0), arguments.times), LENGTH),
      "ragged": (ragged, RAGGED_TARGETS),
      "sorted": (ragged, RAGGED_TARGETS),
  }
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
    for name, (load, targets) in loads.items():
      results[name] = measure(
          ours(
              weights,
              load,
              targets,
              config=config,
              most_rows=arguments.most_rows,
          ),
          theirs(
              directory,
              load,
              device=arguments.peer,
              dtype=arguments.dtype,
              most_rows=arguments.most_rows,
              by_length=name == "sorted",
          ),
          pairs=arguments.pairs,
          tolerance=1e-4 if arguments.dtype == "float32" else 1e-2,
      )
      tokens = sum(len(one.tokens) for one in load)
      _print(name, results[name], tokens, params.num_params(config))
  if arguments.out:
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def _print(
    name: str, result: dict[str, Any], tokens: int, weights: int
) -> None:
  """Prints what was measured of a load."""
  ratio = result["ratio"]
  mine, other = map(statistics.median, result["seconds"].values())
  rate = 6 * weights * tokens / 1e12
  print(
      f"{name:8} ours {mine:.3g} s ({rate / mine:.3g} TFLOP/s), theirs"
      f" {other:.3g} s ({rate / other:.3g}), ratio"
      f" {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f});"
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
      "--most_rows", type=int, default=12, help="of a micro-batch"
  )
  parser.add_argument("--out", type=pathlib.Path)
  arguments = parser.parse_args()
  for name in ("pairs", "times", "most_rows"):
    if getattr(arguments, name) < 1:
      parser.error(f"--{name} must be at least 1")
  return arguments


if __name__ == "__main__":
  main()
