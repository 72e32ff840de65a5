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
