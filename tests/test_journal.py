import io
import time

import pytest

from mgrpo_jax import atomic, checkpoint, metrics, workdir
from mgrpo_jax.journal import Journal


@pytest.fixture
def opened(tmp_path, monkeypatch):
  """A journal whose last checkpoint fails late, and what it says."""
  stream = io.StringIO()
  with metrics.count_compilations() as compiled:
    journal = Journal(
        workdir.Workdir(tmp_path),
        total_steps=1,
        limits={},
        keep_checkpoints=1,
        stream=stream,
        started=time.monotonic(),
        compiled=compiled,
    )

  def close(self):
    raise checkpoint.CheckpointError("checkpoint 7: disk full")

  monkeypatch.setattr(checkpoint.Checkpoints, "close", close)
  return journal, stream


def test_a_checkpoint_that_fails_at_the_end_is_an_error(opened):
  journal, _ = opened
  with pytest.raises(checkpoint.CheckpointError, match="checkpoint 7"):
    with journal:
      pass


@pytest.mark.parametrize(
    "error", [atomic.StorageError("policies: disk full"), KeyboardInterrupt()]
)
def test_what_fails_first_is_what_is_raised(opened, error):
  journal, stream = opened
  with pytest.raises(type(error)) as caught:
    with journal:
      raise error
  assert caught.value is error
  assert stream.getvalue() == "closing: checkpoint 7: disk full\n"


def test_one_failure_is_told_once(opened):
  journal, stream = opened
  with pytest.raises(checkpoint.CheckpointError):
    with journal:
      raise checkpoint.CheckpointError("checkpoint 7: disk full")
  assert stream.getvalue() == ""


def test_a_run_that_resumes_says_from_where(opened, monkeypatch, tmp_path):
  journal, stream = opened
  kept = checkpoint.Checkpoint(
      step=6, states={}, host={"totals": {}}, skipped=()
  )
  monkeypatch.setattr(
      checkpoint.Checkpoints, "restore", lambda self, like: kept
  )
  with pytest.raises(checkpoint.CheckpointError, match="disk full"):
    with journal:
      assert journal.restore({}) is kept
  first = stream.getvalue().splitlines()[0]
  assert first == (
      f"goes on after step 7, from the checkpoint of {tmp_path}/checkpoints"
  )


def test_a_new_run_says_nothing_of_checkpoints(opened, monkeypatch):
  journal, stream = opened
  with pytest.raises(checkpoint.CheckpointError, match="disk full"):
    with journal:
      assert journal.restore({}) is None
  assert "goes on" not in stream.getvalue()
