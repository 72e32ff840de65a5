r"""Losses and advantages beside Tunix, TRL and verl: a table, and JSON.

    python -m experiments.bench.peers [--batches=20] [--seed=0] [--out=FILE]

Their functions and ours get the same random ragged batches: groups of one to
seven, groups of equal rewards, trajectories without sampled tokens, ratios up
to exp(±30). Values are compared, and gradients by log-probabilities. Columns:

  known difference  what they do otherwise, stated before anything is compared
  error             the largest relative one where ours does that, too
  as it is          the largest one otherwise

Peers that cannot be imported are named and left out. Exit code 1 where an
error exceeds its limit, 2 where there is no peer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.peers import compare
from mgrpo_jax import atomic

PEERS = ("tunix", "trl", "verl")
_PEERS = flags.DEFINE_list("peers", list(PEERS), "Which ones, of all three.")
_BATCHES = flags.DEFINE_integer("batches", 20, "Of every function, >= 1.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the batches.")
_OUT = flags.DEFINE_string("out", None, "Where the errors are written.")


def main() -> None:
  """Measures; see the module."""
  with cli.user_errors(ValueError, OSError):
    if _BATCHES.value < 1:
      raise ValueError(f"--batches must be >= 1, got {_BATCHES.value}")
    unknown = set(_PEERS.value) - set(PEERS)
    if unknown or not _PEERS.value:
      raise ValueError(f"--peers must be some of {', '.join(PEERS)}")
    peers = [found for found in map(_load, _PEERS.value) if found is not None]
    if not peers:
      raise ValueError(
          "no peer is installed; see experiments/README.md, 'Losses and"
          " advantages against other people's code'"
      )
    tables = {peer.NAME: _measure(peer) for peer in peers}
    if _OUT.value:
      setup = {
          "jax": jax.__version__,
          "batches": _BATCHES.value,
          "seed": _SEED.value,
      }
      atomic.write_json(pathlib.Path(_OUT.value), {**setup, "tables": tables})
  passed = all(row["passed"] for rows in tables.values() for row in rows)
  cli.say("\nwithin the limits" if passed else "\nABOVE THE LIMITS")
  sys.exit(0 if passed else 1)


def _load(name: str) -> Any:
  """Imports what calls a peer, or says why not."""
  try:
    return importlib.import_module(f"experiments.bench.peers.of_{name}")
  except ImportError as error:
    cli.say(f"left out: {name} ({error})")
    return None


def _measure(peer: Any) -> list[dict[str, Any]]:
  """Prints a peer's table as it is measured."""
  cli.say(f"\n{peer.NAME}\n")
  cli.say("| here | there | known difference | error | as it is |")
  cli.say("|---" * 5 + "|")
  rows = []
  for check in peer.checks():
    found = [
        check.errors(compare.draw(np.random.default_rng((_SEED.value, case))))
        for case in range(_BATCHES.value)
    ]
    ours, plain = (float(one) for one in np.max(np.array(found), axis=0))
    passed = check.limit is None or 0 <= ours <= check.limit
    rows.append(
        {
            "here": check.what,
            "there": check.peer,
            "difference": check.difference,
            "error": ours,
            "as_it_is": plain,
            "limit": check.limit,
            "passed": passed,
        }
    )
    cli.say(_line(rows[-1]))
  return rows


def _line(row: dict[str, Any]) -> str:
  """A row in Markdown."""
  mark = "" if row["passed"] else " ABOVE"
  cells: Sequence[str] = (
      row["here"],
      row["there"],
      row["difference"] or "none",
      f"{row['error']:.0e}{mark}" if row["limit"] else "not compared",
      f"{row['as_it_is']:.0e}",
  )
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  cli.run(main)
