"""Every metric of a run, defined once, and the counters of the process.

A metric is written under its name, or under `name/key` where there is one
value for each role, policy, split of the questions or phase of a step:
`reward/main`, `kl/researcher`, `accuracy/dev`, `seconds/rollout`. Names that
are not defined here are refused by the writer, `report.writer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.monitoring
import numpy as np
from scipy.special import stdtrit

NORMAL_QUANTILE_95 = 1.959963984540054  # two-sided

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """What a number means.

  Attributes:
    name: the first part of the name it is written under.
    per: what the second part names; empty where there is one value.
    unit: of the value; `1` for shares and other pure numbers.
    better: which way is an improvement; empty where neither is.
    meaning: one sentence.
  """

  name: str
  per: Literal["", "role", "policy", "split", "phase", "event", "updates"]
  unit: str
  better: Literal["higher", "lower", ""]
  meaning: str


def _metric(
    name: str, per: Any, unit: str, better: Any, meaning: str
) -> tuple[str, Metric]:
  """An entry of `METRICS`."""
  return name, Metric(
      name=name, per=per, unit=unit, better=better, meaning=meaning
  )


# fmt: off
METRICS: Mapping[str, Metric] = dict((
    # What the team achieves.
    _metric("accuracy", "split", "1", "higher",
            "share of held-out questions answered correctly"),
    _metric("accuracy_low", "split", "1", "",
            "lower end of the 95% Wilson interval of accuracy"),
    _metric("accuracy_high", "split", "1", "",
            "upper end of the 95% Wilson interval of accuracy"),
    _metric("questions", "split", "questions", "",
            "held-out questions that accuracy was measured on"),
    # Rewards, over a step's trajectories that did not fail (Eq. 4-5).
    _metric("counted", "role", "calls", "", "calls that rewards are means of"),
    _metric("reward", "role", "1", "higher", "mean total reward"),
    _metric("format", "role", "1", "higher", "mean format component"),
    _metric("correct", "role", "1", "higher",
            "mean correctness component, of the root or the caller"),
    _metric("expert", "role", "1", "higher",
            "mean grade of the call itself by the expert"),
    _metric("overlong", "role", "1", "lower",
            "how much of the context's costly end a call used, mean"),
    # Calls and how they ended.
    _metric("calls", "role", "calls per rollout", "",
            "mean calls in a rollout"),
    _metric("turns", "role", "turns", "", "mean turns of a call"),
    _metric("sampled", "role", "tokens", "", "mean sampled tokens of a call"),
    _metric("completed", "role", "1", "higher", "share that answered"),
    _metric("truncated", "role", "1", "lower",
            "share that ran out of turns, tokens or context"),
    _metric("malformed", "role", "1", "lower",
            "share that kept writing turns which do not parse"),
    _metric("echoed", "role", "1", "lower",
            "share of calls that returned their request, by words"),
    _metric("refused", "", "1", "lower",
            "share of delegations beyond the callers' budgets"),
    _metric("failed", "role", "calls", "lower",
            "calls lost to infrastructure; retried, never trained on"),
    _metric("rescued", "", "1", "lower",
            "share of rollouts that are spares, in place of one that failed"),
    _metric("late", "", "1", "lower",
            "share of rollouts that are spares, in place of one that was late:"
            " times their range it bounds the bias of mean rewards"),
    _metric("surplus", "", "1", "lower",
            "rollouts begun and left out of their groups, per rollout kept"),
    # Alignment and advantages.
    _metric("dropped", "role", "calls", "lower",
            "calls beyond the slots of the alignment, not trained on"),
    _metric("spread", "role", "1", "",
            "mean standard deviation of the rewards within a task"),
    _metric("outcome_share", "role", "1", "",
            "share of correctness among what makes rewards differ within"
            " tasks, |Cov(R, b2 format correct)| over the sum of all parts';"
            " of tasks whose outcomes differ"),
    _metric("grade_share", "role", "1", "",
            "likewise of the calls' own grades, |Cov(R, b3 format expert)|; of"
            " tasks whose grades differ"),
    _metric("flat_groups", "role", "1", "lower",
            "share of tasks none of whose calls has an advantage; missing where"
            " calls are compared with nothing"),
    _metric("stale", "", "tasks", "lower",
            "groups sampled from weights that were too old; tasks put back"),
    _metric("replaced", "", "tasks", "",
            "groups that taught nothing and were replaced in the step"),
    # Update; over tokens that the gradient sees: where there is neither a KL
    # term, an entropy bonus nor a critic, those of advantages that are not 0.
    _metric("loss", "policy", "1", "lower",
            "what is minimised: the negated objective (Eq. 14-19) and a"
            " critic's error, mean of the updates"),
    _metric("nll", "policy", "nats", "lower",
            "negative log-likelihood of a demonstrated token"),
    _metric("kl", "policy", "nats", "",
            "loss.kl, the divergence from the reference, mean per token"),
    _metric("old_kl", "policy", "nats", "",
            "k3 divergence from the weights before the step's updates"),
    _metric("clip_fraction", "policy", "1", "",
            "share of sampled tokens whose ratio is clipped"),
    _metric("ratio_mean", "policy", "1", "", "mean probability ratio"),
    _metric("ratio_max", "policy", "1", "", "largest probability ratio"),
    _metric("truncated_weights", "policy", "1", "lower",
            "share of importance weights cut to their cap, or rejected"),
    _metric("entropy", "policy", "nats", "",
            "mean -log-prob of a sampled token, an estimate of the entropy;"
            " the exact one where it has a coefficient"),
    _metric("value_loss", "policy", "reward^2", "lower",
            "half the squared error of the critic, mean per token"),
    _metric("logprob_gap_mean", "policy", "nats", "lower",
            "mean |sampler's - trainer's| log-prob of a sampled token"),
    _metric("logprob_gap_max", "policy", "nats", "lower",
            "largest |sampler's - trainer's| log-prob of a sampled token"),
    _metric("gradient_norm", "policy", "1", "",
            "global norm of the gradient before clipping"),
    _metric("update_norm", "policy", "1", "", "global norm of the update"),
    _metric("param_norm", "policy", "1", "", "global norm of what is trained"),
    _metric("learning_rate", "policy", "1", "", "of the step's last update"),
    _metric("shared_tokens", "policy", "1", "higher",
            "share of the trajectories' tokens that were not computed, because"
            " another one's stood for them; with batch.least_shared"),
    _metric("version", "policy", "versions", "", "that is sampled from"),
    _metric("staleness", "policy", "updates", "lower",
            "largest age of a trained trajectory's oldest token"),
    _metric("staleness_mean", "policy", "updates", "lower",
            "mean age of a trained trajectory's oldest token"),
    _metric("aged", "updates", "1", "",
            "share of trained trajectories whose oldest token has that age"),
    _metric("evicted", "policy", "sessions", "lower",
            "sessions that lost their cache to others in the step; any makes"
            " rollouts depend on timing"),
    _metric("mismatched", "policy", "sessions", "lower",
            "sessions whose tokens did not extend their cache in the step"),
    _metric("replicas", "policy", "samplers", "",
            "in other processes that helped in the step; with"
            " rollout.replicas"),
    _metric("replica_tokens", "policy", "tokens", "higher",
            "that replicas sampled in the step"),
    _metric("nonfinite", "policy", "updates", "lower",
            "updates whose loss or gradient was not finite"),
    # Between jobs, see docs/decoupled.md.
    _metric("crossed_text", "", "bytes", "",
            "of requests and reports that crossed between jobs, per call"),
    _metric("crossed_besides", "", "bytes", "lower",
            "of HTTP and JSON around them per call, and of the step's records"
            " in the bucket per trajectory"),
    # Work and its cost.
    _metric("generated_tokens", "", "tokens", "",
            "sampled in training rollouts so far"),
    _metric("evaluation_tokens", "", "tokens", "",
            "sampled in evaluations so far"),
    _metric("trained_tokens", "", "tokens", "", "trained on so far"),
    _metric("rollouts", "", "rollouts", "", "finished so far"),
    _metric("retried", "", "tasks", "lower",
            "tasks put back, a machine failed on them or they were too old"),
    _metric("waiting", "", "tasks", "lower",
            "of these, tasks not yet asked again"),
    _metric("abandoned", "", "tasks", "lower",
            "tasks that were put back too often, so far"),
    _metric("lost", "", "tasks", "lower",
            "tasks that the expert could not demonstrate, so far"),
    _metric("events", "event", "events", "",
            "of the step's agent calls; `agents.context` names them"),
    _metric("corrupt_records", "", "records", "lower",
            "checkpoints, versions, leases or records found damaged so far"),
    _metric("tokens_per_second", "phase", "tokens/s", "higher",
            "tokens generated or trained on in the phase, per second of it"),
    _metric("seconds", "phase", "s", "lower",
            "wall time of a phase; `step` is all of it but checkpoints;"
            " `update` ends when all is dispatched where max_staleness is 0, so"
            " that the rest is in the next rollouts and whatever reads weights,"
            " and when all is applied where it is not"),
    _metric("compilations", "", "programs", "lower",
            "XLA programs compiled or read from the cache so far"),
    _metric("compile_seconds", "", "s", "lower", "spent compiling so far"),
    _metric("peak_rss_bytes", "", "bytes", "lower",
            "largest resident memory of the process so far"),
))
# fmt: on


def define(name: str) -> Metric:
  """Returns the definition of a metric.

  Args:
    name: as written, `reward/main` or `compilations`.

  Returns:
    Its definition.

  Raises:
    ValueError: it is not defined, or its key is missing or unexpected.
  """
  family, slash, key = name.partition("/")
  metric = METRICS.get(family)
  if metric is None:
    raise ValueError(f"metric {name!r} is not defined in metrics.METRICS")
  if bool(metric.per) != bool(key) or bool(slash) != bool(key):
    wanted = f"{family}/<{metric.per}>" if metric.per else family
    raise ValueError(f"metric {name!r} is written as {wanted}")
  return metric


def wilson(successes: float, n: int) -> tuple[float, float]:
  r"""Computes the 95% Wilson score interval of a proportion.

  $$\frac{1}{1 + z^2/n} \left( \hat p + \frac{z^2}{2n} \pm
    z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \right)$$

  with $\hat p$ = successes / n and z = 1.96 (Wilson 1927). Unlike the normal
  approximation it stays within [0, 1] and has a width at 0 and 1.

  Args:
    successes: how many succeeded; a mean of such counts may be no whole one.
    n: how many were tried; with 0 nothing is known, the interval is (0, 1).

  Returns:
    The lower and the upper end.

  Raises:
    ValueError: n < 0, or successes outside 0..n.
  """
  if n < 0:
    raise ValueError(f"n: {n}, allowed: 0 or more")
  if not 0 <= successes <= n:
    raise ValueError(f"successes: {successes}, allowed: 0 to n = {n}")
  if n == 0:
    return 0.0, 1.0
  share, z2 = successes / n, NORMAL_QUANTILE_95**2
  centre = share + z2 / (2 * n)
  spread = math.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2)
  low, high = ((centre + sign * spread) / (1 + z2 / n) for sign in (-1, 1))
  # Rounding may leave the ends a hair off where they are exact.
  return (
      0.0 if successes == 0 else low,
      1.0 if successes == n else high,
  )


def student(values: Sequence[float]) -> tuple[float, float] | None:
  r"""Computes the 95% t interval of a mean.

  $$\bar x \pm t_{0.975, n - 1} \frac{s}{\sqrt n}$$

  with s the sample's standard deviation (Student 1908). Of runs that differ in
  their seed only, it covers the mean over all seeds, for these questions.

  Args:
    values: n of them, finite.

  Returns:
    The lower and the upper end; None for fewer than two, which tell nothing
    about their spread.
  """
  n = len(values)
  if n < 2:
    return None
  half = stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)
  return float(np.mean(values) - half), float(np.mean(values) + half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
  """How many of n questions were answered correctly.

  Attributes:
    correct: questions answered correctly.
    n: questions asked, but for those that failed.
    failed: questions left out because a machine or judge failed.
  """

  correct: int
  n: int
  failed: int

  @property
  def share(self) -> float:
    """The accuracy, 0..1; NaN where nothing was asked."""
    return self.correct / self.n if self.n else math.nan

  @property
  def interval(self) -> tuple[float, float]:
    """Its 95% Wilson interval."""
    return wilson(self.correct, self.n)

  def summary(self) -> dict[str, Any]:
    """What `summary.json` says of it, accuracy None where n is 0."""
    return {
        "accuracy": self.share if self.n else None,
        "n": self.n,
        "ci95": list(self.interval),
        "failed": self.failed,
    }


@dataclasses.dataclass
class Compilations:
  """Counts what XLA compiled.

  Attributes:
    count: programs built, whether compiled or found in the disk cache.
    cached: those of them found in the persistent cache on disk.
    seconds: spent on all of them.
  """

  count: int = 0
  cached: int = 0
  seconds: float = 0.0


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
  """Counts XLA compilations of the whole process while it is entered.

  Yields:
    The counters, which go on counting until the context is left.
  """
  counters = Compilations()

  def on_duration(event: str, duration_secs: float, **_: object) -> None:
    if event == _COMPILED:
      counters.count += 1
      counters.seconds += duration_secs

  def on_event(event: str, **_: object) -> None:
    counters.cached += event == _CACHE_HIT

  jax.monitoring.register_event_duration_secs_listener(on_duration)
  jax.monitoring.register_event_listener(on_event)
  try:
    yield counters
  finally:
    jax.monitoring.unregister_event_duration_listener(on_duration)
    jax.monitoring.unregister_event_listener(on_event)


def peak_rss_bytes() -> int:
  """Returns the largest resident memory this process has had, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
  """Returns the memory this process has now, in bytes; None but on Linux."""
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():
    return None
  return int(statm.read_text().split()[1]) * resource.getpagesize()
