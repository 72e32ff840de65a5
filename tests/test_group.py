"""Where a process is in its job, and what its job needs."""

import signal
import types

import jax
import pytest

from configs import decoupled_quickstart
from experiments import hosting
from mgrpo_jax.hosts import crew, group


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ({"coordinator": "host"}, "must be HOST:PORT"),
        ({"coordinator": "host:0"}, "must be HOST:PORT"),
        ({"process": 2}, "--process=2: allowed: 0 to 1"),
        ({"process": -1}, "--process=-1: allowed: 0 to 1"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place, told):
  usual = {"coordinator": "127.0.0.1:9", "process": 0}
  with pytest.raises(ValueError, match=told):
    group.join(processes=2, silence=9, **usual | place)


def test_a_process_alone_joins_nobody_and_decides():
  group.join(coordinator="", processes=1, process=0, silence=9)
  assert group.decides() and group.open_channel(9.0) is None


def test_all_devices_of_a_job_are_its_meshs(monkeypatch):
  config = decoupled_quickstart.get_config("smoke")
  hosting.check(config, "main")  # of one process
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="main.mesh: takes 1 devices, allowed"):
    hosting.check(config, "main")
  config.policies.main.mesh.data = jax.device_count()
  hosting.check(config, "main")
  config.policies.main.sampler_tensor = jax.local_device_count() + 1
  with pytest.raises(ValueError, match="main.sampler_tensor: .* one process"):
    hosting.check(config, "main")


@pytest.mark.parametrize(
    ("code", "heeded"), [(2, []), (75, []), (143, [signal.SIGTERM]), (None, [])]
)
def test_who_was_told_ends_as_process_0_does(monkeypatch, code, heeded):
  """None: process 0 came to its end. A signal counts where it did there."""

  def assist(*_, **__):
    if code is not None:
      raise crew.DrivenError("so", code)

  monkeypatch.setattr(hosting.crew, "assist", assist)
  monkeypatch.setattr(hosting.group, "open_channel", lambda _: object())
  told = [signal.SIGTERM]
  setup = types.SimpleNamespace(
      meshes={"main": types.SimpleNamespace(learner=None)},
      method=types.SimpleNamespace(imitation_loss=None, policy_loss=None),
  )
  ended = None
  try:
    hosting.assist(setup, "main", None, patience=1.0, told=told)
  except SystemExit as error:
    ended = error.code
  assert (ended, told) == (code, heeded)
