"""Weights that a server has on loan: lost, given again, never mixed up."""

import asyncio

import pytest
from fake_openai import fake, honest
from test_external import SAMPLING, make, run, small

from mgrpo_jax.atomic import StorageError
from mgrpo_jax.sampler import handover


@pytest.fixture
def server():
  with fake() as made:
    yield made


async def until(condition):
  async with asyncio.timeout(20):
    while not condition():
      await asyncio.sleep(0.01)


def ask(made, count=1):
  """Tasks of so many completions at a time."""
  return [
      asyncio.create_task(made.generate([1], SAMPLING, seed))
      for seed in range(count)
  ]


def test_a_hand_over_outlives_the_call_that_began_it(server, tmp_path):
  async def work(made):
    server.label = "default"
    server.slow = {"/collective_rpc": 0.3, "/update_weight_version": 0.3}
    calls = ask(made, 3)  # on new connections, so the label is asked for
    await until(lambda: len(server.loaded) == 2)
    for one in calls:
      one.cancel()
    await asyncio.wait(calls)
    late = ask(made, 3)
    await asyncio.gather(*late)
    return made.stats()

  stats = run(make(server, tmp_path), work)
  assert stats["handovers"] == 2 and stats["cancelled"]
  assert len(server.loaded) == 2 and not server.paused


def test_older_weights_of_ours_are_replaced(server, tmp_path):
  async def work(made):
    server.label = server.label.replace("-v3", "-v2")
    await asyncio.gather(*ask(made, 3))
    server.label = server.label.replace("-v3", "-v2")
    made.update(small(1).params, 4)

  run(make(server, tmp_path), work)
  assert [path[-2:] for path in server.loaded] == ["v3", "v3", "v4"]


def test_completions_that_hang_do_not_keep_weights_back(server, tmp_path):
  async def work(made):
    server.plan = ["hang", honest, "hang", "hang", "hang"]
    server.label = "default"
    calls = ask(made, 3)
    async with asyncio.timeout(3):
      await until(lambda: len(server.loaded) == 2)
    for one in calls:
      one.cancel()
    await asyncio.wait(calls)

  run(make(server, tmp_path, max_concurrent=2, timeout=20.0), work)
  assert not server.paused


def test_nothing_is_asked_of_a_server_that_is_given_weights(server, tmp_path):
  async def work(made):
    server.label = "default"
    server.slow = {"/collective_rpc": 0.3}
    calls = ask(made, 3)
    await until(lambda: len(server.loaded) == 2)
    await asyncio.gather(*calls, *ask(made, 3))

  run(make(server, tmp_path), work)
  order = [where for _, where, _ in server.calls]
  begun = len(order) - order[::-1].index("/pause")
  assert "/v1/completions" not in order[begun : order.index("/resume", begun)]


def test_what_a_server_said_before_an_update_found_a_loss(server, tmp_path):
  async def work(made):
    server.hold.clear()
    before = len(server.asked("/v1/completions"))
    (waiting,) = ask(made)
    await until(lambda: server.running)
    server.label = "default"
    server.hold.set()
    made.update(small(1).params, 4)
    await waiting
    return len(server.asked("/v1/completions")) - before

  assert run(make(server, tmp_path), work) == 2


def test_weights_that_stay_fail_nothing(server, tmp_path, monkeypatch, caplog):
  def fail(folder, newest):
    raise StorageError("cannot remove v2")

  monkeypatch.setattr(handover, "prune", fail)

  async def work(made):
    server.label = "default"
    found = await asyncio.gather(*ask(made, 3))
    made.update(small(1).params, 4)
    return found

  assert len(run(make(server, tmp_path), work)) == 3
  assert "cannot remove v2" in caplog.text


def test_a_restart_behind_the_last_check_of_answers_shows(server, tmp_path):
  """The label is asked for once more before anything is sampled."""
  server.always = lambda body: (
      setattr(server, "label", "default") if len(server.loaded) < 2 else None
  ) or honest(body)
  run(make(server, tmp_path), lambda made: asyncio.sleep(0))
  assert len(server.loaded) == 2 and server.label.endswith("-v3")


def test_a_half_loaded_update_is_not_taken_for_done(server, tmp_path):
  async def work(made):
    server.cached = False
    with pytest.raises(RuntimeError, match="reset_prefix_cache"):
      made.update(small(1).params, 4)
    server.cached = True
    (one,) = await asyncio.gather(*ask(made))
    return one

  found = run(make(server, tmp_path), work)
  assert found.version_max == 4 and len(server.loaded) == 3


def test_published_versions_of_the_folder_stay(tmp_path):
  (tmp_path / "v1").mkdir()
  for version in (1, 2, 3):
    handover.directory(tmp_path, version).mkdir()
  handover.prune(tmp_path, 3)
  kept = sorted(path.name for path in tmp_path.iterdir())
  assert kept == ["handed-v2", "handed-v3", "v1"]
