r"""Keeps what the arms of a recipe came to in a small file, and compares them.

    python -m experiments.record --runs=runs/arms \
        --to=experiments/results/arms.json --machine="two cores, AVX-512"

DIR of --runs holds run directories at any depth, as one of experiments.sweep
does; those with a summary.json are read. The arm is what stands behind the
colon in the name of a run's recipe; runs of an arm may differ in their seed
only. What was in the file before is replaced. Without --runs the table of the
file is printed, as it is after every recording.
"""

from absl import flags

from experiments import cli

_RUNS = flags.DEFINE_multi_string(
    "runs",
    [],
    "directory that holds run directories, at any depth; may be repeated",
)
_TO = flags.DEFINE_string("to", "", "file of results; made, or replaced")
_MACHINE = flags.DEFINE_string(
    "machine", "", "that the runs were made on, in words"
)
_BASELINE = flags.DEFINE_string(
    "baseline", "co_train", "arm that the others are compared with"
)
_NOTE = flags.DEFINE_string("note", "", "what else to say of the runs")


def main() -> None:
  """Records, and prints the table; see the module."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    from mgrpo_jax import atomic
    from mgrpo_jax.report import results

    if not _RUNS.value:
      for flag in (_MACHINE, _BASELINE, _NOTE):
        if flag.present:
          raise ValueError(f"--{flag.name} goes with --runs only")
    else:
      if not _MACHINE.value:
        raise ValueError("--machine is required with --runs")
      found = results.collect(
          results.find(_RUNS.value),
          machine=_MACHINE.value,
          note=_NOTE.value,
          baseline=_BASELINE.value,
      )
      atomic.write_json(_TO.value, found)
    cli.say(results.markdown(results.read(_TO.value)))


if __name__ == "__main__":
  cli.run(main, required=("to",))
