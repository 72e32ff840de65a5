r"""Compiles a recipe for TPUs, on a machine without any.

    pip install -e '.[tpu]'
    python -m experiments.aot --config=configs/pods/smollm2.py \
        --topology=v5e-4 [--out=DIR] [--programs=accumulate,apply]

For every policy: the train step (a micro-batch's gradient, the update) and
the sampler's prefill and decode, with what they need of each device's memory,
compute, exchange, and the utilisation that follows. No weights are read. Exit
code 1: something is too large, and how it would fit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import typing
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import cli
from mgrpo_jax.aot import chips

with cli.user_errors(ModuleNotFoundError):
  from ml_collections import config_flags

if typing.TYPE_CHECKING:
  from mgrpo_jax.aot.programs import Plan
  from mgrpo_jax.aot.report import ProgramReport, TooLarge

PROGRAMS = ("accumulate", "apply", "prefill", "decode")
TOO_LARGE = 1
# How the compiler says that a program may not run on a part of a slice.
_WHOLE_SLICES = "should include all slice devices"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, such as configs/pods/smollm2.py"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "slice, such as v5e-16, or slices, such as 2xv5p-128"
)
_OUT = flags.DEFINE_string("out", "runs/aot", "directory of the JSON file")
_PROGRAMS = flags.DEFINE_list(
    "programs", list(PROGRAMS), "what to compile of each policy"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What came of one policy.

  Attributes:
    programs: that compiled.
    failures: programs that are too large.
    model_flops: of one micro-batch.
    seconds: that compiling took.
  """

  programs: tuple[ProgramReport, ...]
  failures: tuple[TooLarge, ...]
  model_flops: float
  seconds: float


def main() -> None:
  """Compiles and reports; see the module."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    config = cli.config_of(_CONFIG)
    topology = chips.parse(_TOPOLOGY.value)
    unknown = sorted(set(_PROGRAMS.value) - set(PROGRAMS))
    if unknown:
      raise ValueError(
          f"--programs: unknown {', '.join(unknown)}, allowed:"
          f" {', '.join(PROGRAMS)}"
      )
    if importlib.util.find_spec("libtpu") is None:
      raise ValueError(
          "the TPU compiler is missing: pip install -e '.[tpu]' installs it"
      )
    os.environ.update(topology.environment())  # before jax is imported
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from experiments import pods

    plans = pods.plans(config, topology)
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
  name = re.sub(r"[^\w.\-]", "_", f"{config.name}_{topology.name}")
  path = out / f"{name}.json"
  outcomes: dict[str, Outcome] = {}
  for policy, plan in plans.items():
    outcomes[policy] = _equal(plan, plans, outcomes) or _outcome(
        policy, plan, topology
    )
    path.write_text(json.dumps(_json(plans, outcomes, topology), indent=2))
  print(_text(plans, outcomes, topology))
  print(f"written: {path}")
  if any(
      _problems(plans[name], one, topology) for name, one in outcomes.items()
  ):
    sys.exit(TOO_LARGE)


def _equal(
    plan: Plan, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome]
) -> Outcome | None:
  """The outcome of a policy that runs the same programs, if one has."""

  def key(one: Plan) -> str:
    return str(dataclasses.replace(one, devices=range(len(one.devices))))

  return next(
      (out for name, out in outcomes.items() if key(plans[name]) == key(plan)),
      None,
  )


def _outcome(policy: str, plan: Plan, topology: chips.Topology) -> Outcome:
  """Compiles one policy's programs."""
  import jax

  from mgrpo_jax.aot import flops, programs, report

  done: list[ProgramReport] = []
  failures: list[TooLarge] = []
  started = time.monotonic()
  for name, trace in programs.programs(plan).items():
    if name not in _PROGRAMS.value:
      continue
    before = time.monotonic()
    program = trace()
    try:
      compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
      if _WHOLE_SLICES in str(error):
        cli.fail(
            f"policies.{policy}: programs for {topology.chip.name} take whole"
            f" slices, not {program.mesh.size} of {topology.chips} chips:"
            " --topology must have a slice for each policy, such as 2xv5e-32"
            " for the halves of v5e-64"
        )
      failure = report.too_large(name, str(error))
      if failure is None:
        raise
      failures.append(failure)
      continue
    done.append(
        report.read(
            name,
            compiled,
            held=program.held,
            work=program.work,
            devices=program.mesh.size,
            topology=topology,
        )
    )
    print(
        f"{policy}: {name} compiled in {time.monotonic() - before:.0f} s",
        file=sys.stderr,
        flush=True,
    )
  return Outcome(
      programs=tuple(done),
      failures=tuple(failures),
      model_flops=flops.training(
          plan.config,
          rows=plan.shape.rows,
          length=plan.shape.row_tokens,
          targets=plan.shape.most_wanted or plan.shape.row_tokens,
      ),
      seconds=time.monotonic() - started,
  )


def _mfu(one: Outcome, topology: chips.Topology) -> float | None:
  """The bound of a whole train step, where it compiled."""
  from mgrpo_jax.aot import report

  step = [p for p in one.programs if p.name in ("accumulate", "apply")]
  if len(step) < 2:
    return None
  return report.mfu_bound(one.model_flops, step, topology)


def _problems(plan: Plan, one: Outcome, topology: chips.Topology) -> list[str]:
  """What does not fit, and what to change."""
  import jax

  from mgrpo_jax.aot import report

  failures = list(one.failures)
  total = report.resident(one.programs)["total"]
  if not failures and total > topology.chip.hbm:
    everything = "training and sampling together"
    failures.append(
        report.TooLarge(
            name=everything, used=total, available=topology.chip.hbm
        )
    )
  leanest = jax.checkpoint_policies.nothing_saveable
  remat = plan.config.execution.remat is leanest
  return [
      report.advice(failure, mesh=plan.mesh, rows=plan.shape.rows, remat=remat)
      for failure in failures
  ]


def _text(
    plans: Mapping[str, Plan],
    outcomes: Mapping[str, Outcome],
    topology: chips.Topology,
) -> str:
  """The report of all policies."""
  from mgrpo_jax.aot import report

  parts = [f"{_CONFIG.value.name} on {topology.name}, per device"]
  for name, plan in plans.items():
    one = outcomes[name]
    mesh = " × ".join(
        f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1
    )
    same = next(other for other in outcomes if outcomes[other] is one)
    parts.append(
        f"\n{name}: {mesh or '1 device'}; sampler on {plan.sampler_tensor} of"
        f" {len(plan.devices)}"
    )
    if same != name:
      parts.append(f"the same programs as {same}")
      continue
    memory = report.resident(one.programs)
    parts.append(
        ", ".join(f"{kind} {report.gib(size)}" for kind, size in memory.items())
        + f" of {report.gib(topology.chip.hbm)} GiB"
    )
    parts.append(report.table(report.program_rows(one.programs)))
    parts.append(report.table(report.collective_rows(one.programs)))
    parts += _problems(plan, one, topology) or ["fits"]
    mfu = _mfu(one, topology)
    if mfu is not None:
      parts.append(
          f"a micro-batch is {one.model_flops / 1e15:.3g} PFLOP for the model:"
          f" MFU at most {mfu:.1%}"
      )
  return "\n".join(parts)


def _json(
    plans: Mapping[str, Plan],
    outcomes: Mapping[str, Outcome],
    topology: chips.Topology,
) -> dict[str, Any]:
  """Everything that is known, for other programs."""
  from mgrpo_jax.aot import report

  return {
      "recipe": _CONFIG.value.name,
      "topology": topology.name,
      "chip": dataclasses.asdict(topology.chip),
      "policies": {
          name: {
              "mesh": dict(plans[name].mesh),
              "sampler_tensor": plans[name].sampler_tensor,
              "memory": report.resident(one.programs),
              "problems": _problems(plans[name], one, topology),
              "fits": not _problems(plans[name], one, topology),
              "model_flops": one.model_flops,
              "mfu_bound": _mfu(one, topology),
              "compile_seconds": one.seconds,
              "programs": [
                  dataclasses.asdict(p)
                  | {"bound_seconds": p.bound, "limit": p.limit, "peak": p.peak}
                  for p in one.programs
              ],
              "too_large": [dataclasses.asdict(f) for f in one.failures],
          }
          for name, one in outcomes.items()
      },
  }


if __name__ == "__main__":
  cli.run(main, required=("config", "topology"))
