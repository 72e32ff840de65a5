r"""A model on paper of a decoupled team: seconds, bytes, requests, idle chips.

    python -m experiments.bench.scaling [--model=qwen3_30b] [--delegate=all]

From 2 to 256 policies and 2 to 4,096 chips, which all have their share of:

    sampling  = max(decode, one rollout's turns after each other) + prefill
    update    = ceil(rows / rows that the chips take at a time) · micro-batch
    records   = what a step's record takes to be written and read, and what the
                bucket is asked besides
    in step   = max over policies sampling + max over policies update + records
    one late  = max over policies (sampling + update), records beside it
    idle      = 1 - chip-seconds sampled or trained / chip-seconds of a step

What a micro-batch takes is what TPU compilers say (experiments/README.md,
"Recipes for pods"); decoding is bound by memory or by products, whichever takes
longer. Assumptions, and what was checked: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Mapping

from experiments import pods
from mgrpo_jax.aot import chips, flops
from mgrpo_jax.decoupled.peer import LONGEST_PAUSE
from mgrpo_jax.decoupled.watch import LOOK
from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import huggingface

POLICIES = (2, 8, 32, 256)
CHIPS = (2, 16, 128, 1024, 4096)
ENVELOPE = 718  # bytes of a call besides text: measured, "A job per policy"
WRITTEN = 2  # requests with which a record is written: it is read before
HEARTBEAT = 5.0  # seconds, `config.jobs.heartbeat`
ROW = 100  # bytes of a call in a step's record: measured, `bench.records`
_IN_TURN = 1 + 1 + 3 * WRITTEN + 1  # of a step's requests, see `step`
TRAINED = 16  # bytes a parameter: weights, gradient and two moments, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A policy's model on its chip, as it was compiled.

  Attributes:
    architecture: name in `configs.architectures`.
    chip: name in `aot.chips`.
    sampler: chips that hold the sampler's weights together.
    row: tokens of a packed row.
    rows: rows that a chip takes in a micro-batch.
    micro: seconds of a micro-batch, the compiler's.
    on_top: bytes of a chip that the update needs besides what it holds.
  """

  architecture: str
  chip: str
  sampler: int
  row: int
  rows: float
  micro: float
  on_top: float

  @functools.cached_property
  def config(self) -> TransformerConfig:
    """Sizes."""
    fields = pods.ARCHITECTURES[self.architecture]()
    return huggingface.read(fields, self.architecture)

  @functools.cached_property
  def params(self) -> int:
    """Weights of the model."""
    return params.num_params(self.config)

  @functools.cached_property
  def active(self) -> int:
    """Weights that multiply a token."""
    return flops.active_params(self.config)

  @property
  def cache(self) -> int:
    """Bytes of a token's keys and values, bfloat16."""
    one = self.config
    return 4 * one.num_layers * one.num_kv_heads * one.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a step asks of a team.

  Attributes:
    rollouts: B·K.
    calls: of sub-agents in a rollout; 0: one of each sub-policy.
    sampled: tokens that a trajectory samples.
    given: tokens that a trajectory is given, and prefills.
    text: bytes of a call's request and report.
    weights: bytes of a published parameter.
  """

  rollouts: int = 512
  calls: int = 4
  sampled: int = 1_000
  given: int = 7_000
  text: int = 2_000
  weights: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
  """What an object store does.

  Attributes:
    latency: seconds of a small request.
    bandwidth: bytes a second that a job writes or reads.
    requests: a second that the bucket answers, of all jobs together.
  """

  latency: float = 0.05
  bandwidth: float = 100e6
  requests: float = 5_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What the model says of a step.

  Attributes:
    sampling: seconds, of the policy that takes longest.
    update: seconds, likewise.
    records: seconds.
    in_step: seconds of a step in which policies wait for each other.
    one_late: seconds of a step with `max_staleness` of 1.
    idle: share of chip-seconds, in step.
    idle_late: the same, one step late.
    crossing: bytes of all calls between jobs.
    requests: of the bucket, for records.
    looks: of the bucket a second, while jobs wait.
    published: bytes of weights.
    bound: what most of a step in step is.
  """

  sampling: float
  update: float
  records: float
  in_step: float
  one_late: float
  idle: float
  idle_late: float
  crossing: float
  requests: int
  looks: float
  published: float
  bound: str


# The table of "Recipes for pods" in experiments/README.md.
MODELS: Mapping[str, Model] = {
    "smollm2": Model(
        architecture="smollm2_135m",
        chip="v5e",
        sampler=1,
        row=1_024,
        rows=8,
        micro=0.192,
        on_top=4.16 * chips.GIB,
    ),
    "qwen3_8b": Model(
        architecture="qwen3_8b",
        chip="v5e",
        sampler=8,
        row=8_192,
        rows=0.5,
        micro=2.0,
        on_top=8.41 * chips.GIB,
    ),
    "qwen3_30b": Model(
        architecture="qwen3_30b_a3b",
        chip="v5p",
        sampler=4,
        row=32_768,
        rows=1,
        micro=9.6,
        on_top=38.02 * chips.GIB,
    ),
}


def fits(model: Model, each: int) -> bool:
  """Whether a policy of so many chips has the memory for its update."""
  held = TRAINED * model.params / each + model.on_top
  return held <= chips.CHIPS[model.chip].hbm and each >= model.sampler


def sampling(model: Model, work: Work, trajectories: float, each: int) -> float:
  """Seconds in which a policy's sampler does a step's share of it.

  Args:
    model: of the policy.
    work: of the step.
    trajectories: of the policy.
    each: chips of the policy.

  Returns:
    At least what the turns of one rollout take one after the other.
  """
  chip = chips.CHIPS[model.chip]
  samplers = each // model.sampler
  length = work.sampled + work.given
  weights = work.weights * model.params
  room = chip.hbm * model.sampler * 0.9 - weights
  most = max(1, int(room // (length * model.cache)))
  rows = min(most, math.ceil(trajectories / samplers))
  read = (weights + rows * length * model.cache) / (
      chip.hbm_bandwidth * model.sampler
  )
  multiplied = 2 * model.active * rows / (chip.flops * model.sampler)
  waves = math.ceil(trajectories / samplers / rows)
  decode = waves * work.sampled * max(read, multiplied)
  prefill = 2 * model.active * trajectories * work.given / (chip.flops * each)
  return decode + prefill


def update(model: Model, work: Work, trajectories: float, each: int) -> float:
  """Seconds of a policy's gradient; rows are packed full."""
  rows = math.ceil(trajectories * (work.sampled + work.given) / model.row)
  return math.ceil(rows / (model.rows * each)) * model.micro


def requests(policies: int) -> tuple[int, int]:
  """Requests of a step to the bucket for its records, all jobs taking part.

  A record is written with two, a look and a swap. The leader looks for the
  step's and at each follower's record, and writes the step's, that it is ready,
  and its numbers; a follower reads the step's and writes the other two.

  Args:
    policies: jobs.

  Returns:
    Of the leader, and of all.
  """
  leads = 1 + (policies - 1) + 3 * WRITTEN
  return leads, leads + (policies - 1) * (1 + 2 * WRITTEN)


def looks(policies: int, calls: float) -> float:
  """Requests a second to the bucket while all jobs wait.

  Followers look for the step, and at the leader's record; the leader at the
  records of those that it asks; every job writes its own.

  Args:
    policies: jobs.
    calls: jobs, at most, that the leader asks at a time.

  Returns:
    Requests a second, in waits of more than a minute.
  """
  followers = policies - 1
  waiting = followers * (1 / LONGEST_PAUSE + 1 / LOOK)
  asking = min(calls, followers) / LOOK
  return waiting + asking + policies * WRITTEN / HEARTBEAT


def step(
    model: Model, policies: int, number: int, work: Work, bucket: Bucket
) -> Step | None:
  """Says what a step is.

  Args:
    model: of every policy.
    policies: jobs, one of them the main agent's, at least 2.
    number: chips, dealt out evenly.
    work: of the step.
    bucket: that the jobs share.

  Returns:
    The step; None where a policy's chips do not hold it.
  """
  each = number // policies
  if not each or not fits(model, each):
    return None
  calls = work.calls or policies - 1
  shares = (work.rollouts, work.rollouts * calls / (policies - 1))
  # A rollout's turns follow each other, whoever is busy besides.
  alone = (1 + calls) * work.sampled * _shortest(model, work)
  samplings = [sampling(model, work, one, each) for one in shares]
  updates = [update(model, work, one, each) for one in shares]
  _, every = requests(policies)
  asked = looks(policies, work.rollouts * calls)
  size = ROW * work.rollouts * (1 + calls)
  # One after the other: all say that they are ready, the leader looks at them
  # and for the step, writes it, all read it and write their numbers; whatever
  # many ask at the same time takes one request's time.
  records = max(
      _IN_TURN * bucket.latency + 2 * size / bucket.bandwidth,
      every / max(bucket.requests - asked, 1.0),
  )
  longest = max(*samplings, alone)
  parts = {"sampling": longest, "update": max(updates), "records": records}
  in_step = sum(parts.values())
  late = max(
      longest,
      *(a + b for a, b in zip(samplings, updates, strict=True)),
      records,
  )
  busy = sum(
      count * (samplings[i] + updates[i])
      for i, count in enumerate((1, policies - 1))
  )
  return Step(
      sampling=longest,
      update=max(updates),
      records=records,
      in_step=in_step,
      one_late=late,
      idle=1 - busy / (policies * in_step),
      idle_late=1 - busy / (policies * late),
      crossing=work.rollouts * calls * (work.text + ENVELOPE),
      requests=every,
      looks=asked,
      published=policies * work.weights * model.params,
      bound=max(parts, key=lambda name: parts[name]),
  )


def _shortest(model: Model, work: Work) -> float:
  """Seconds of a token where a sampler has one row only."""
  chip = chips.CHIPS[model.chip]
  return work.weights * model.params / (chip.hbm_bandwidth * model.sampler)


def table(model: Model, work: Work, bucket: Bucket) -> list[str]:
  """Lines of Markdown, one for each size of a team that fits."""
  lines = [
      "| policies | chips | sampling, s | update, s | records, s | a step, s |"
      " idle | one late, s | idle | text, MB | bucket requests | a second |"
      " mostly |",
      "|---" * 13 + "|",
  ]
  for policies in POLICIES:
    for number in CHIPS:
      one = step(model, policies, number, work, bucket)
      if one is None:
        continue
      lines.append(
          f"| {policies} | {number:,} | {one.sampling:.3g} | {one.update:.3g}"
          f" | {one.records:.3g} | {one.in_step:.3g} | {one.idle:.0%}"
          f" | {one.one_late:.3g} | {one.idle_late:.0%}"
          f" | {one.crossing / 1e6:.1f} | {one.requests:,} | {one.looks:,.0f}"
          f" | {one.bound} |"
      )
  return lines


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", choices=MODELS, default="smollm2")
  parser.add_argument(
      "--delegate",
      choices=("four", "all"),
      default="four",
      help="calls of a rollout: four, or one of each sub-policy",
  )
  parser.add_argument("--rollouts", type=int, default=512, help="B times K")
  arguments = parser.parse_args()
  if arguments.rollouts < 8 or arguments.rollouts % 8:
    parser.error("--rollouts must be a multiple of 8")
  work = Work(
      rollouts=arguments.rollouts,
      calls=4 if arguments.delegate == "four" else 0,
  )
  print("\n".join(table(MODELS[arguments.model], work, Bucket())))


if __name__ == "__main__":
  main()
