"""Writes the report of a run, or says what lies in a bucket.

Commands:
  python -m experiments.view --workdir=runs/quickstart
  python -m experiments.view --bucket=gs://bucket/run

The first writes WORKDIR/report/index.html and its curves. The second prints
versions, members, replicas and leases: how far each is behind the newest (lag),
for whom a job waits, and how many keys lie in each folder. It only reads, also
while a run is under way. A run's own bucket is WORKDIR/bucket.
"""

import time

from absl import flags

from experiments import cli

flags.DEFINE_string("workdir", "", "a run's directory")
flags.DEFINE_string("bucket", "", "URL of a bucket, or the path of a folder")


def _report() -> None:
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


def _inspect() -> None:
  """Prints what lies in the bucket."""
  from mgrpo_jax import store
  from mgrpo_jax.report import bucket

  url = flags.FLAGS.bucket
  with cli.user_errors(ValueError, OSError):
    opened = store.open(url) if "://" in url else store.open_folder(url)
    found = bucket.look(opened, now=time.time())
  if not (found.records or found.run):
    cli.fail(f"--bucket={url}: nothing lies there")
  if "bucket" in found.records and not found.run:
    cli.fail(
        f"--bucket={url}: is no bucket but a run's directory, which keeps one:"
        f" {url.rstrip('/')}/bucket"
    )
  cli.say(bucket.text(found))


def main() -> None:
  """Does what was asked for."""
  if flags.FLAGS.workdir and flags.FLAGS.bucket:
    cli.fail("--workdir and --bucket: allowed: one of them")
  if not (flags.FLAGS.workdir or flags.FLAGS.bucket):
    cli.fail("--workdir is required, or --bucket in its place")
  if flags.FLAGS.bucket:
    _inspect()
  else:
    _report()


if __name__ == "__main__":
  cli.run(main)
