"""Writes the report of a run: WORKDIR/report/index.html and its curves.

Command: python -m experiments.view --workdir=runs/quickstart
"""

from absl import flags

from experiments import cli

flags.DEFINE_string("workdir", "", "a run's directory")


def main() -> None:
  """Writes the report and says where it is."""
  with cli.user_errors(ModuleNotFoundError):
    from mgrpo_jax.report import page
    from mgrpo_jax.workdir import NotARunError
  with cli.user_errors(NotARunError, OSError):
    report = page.write(flags.FLAGS.workdir)
  for problem in report.problems:
    cli.say(f"skipped: {problem}")
  for picture in report.pictures:
    cli.say(str(picture))
  cli.say(f"{report.page} ({report.shown_rollouts} rollouts)")


if __name__ == "__main__":
  cli.run(main, required=("workdir",))
