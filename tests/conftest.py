"""Eight virtual devices, strict ranks, NaNs searched for, compiled once."""

import gc
import os
import pathlib
import tempfile

import pytest
from hypothesis import settings

# Read by XLA when its backend starts, which importing jax does not do yet.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by TensorStore at its first request: what hangs shall not for long.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"

settings.register_profile("thorough", max_examples=1000, deadline=None)


def pytest_configure():
  """Sets jax's switches before any test module is imported."""
  import jax

  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_debug_nans", True)
  cache = pathlib.Path(tempfile.gettempdir()) / "mgrpo_jax_test_cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def s3_endpoint():
  """An emulator of S3, a process of its own; it holds `my-bucket`."""
  pytest.importorskip("moto", reason="moto is missing: pip install -e .[test]")
  from mgrpo_jax.testing import object_servers

  with object_servers.s3() as endpoint:
    yield endpoint


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
  """A finished run of the smoke in two jobs of two processes, undisturbed."""
  from commands import ended, train_spread

  directory = tmp_path_factory.mktemp("steady")
  training = train_spread(f"--workdir={directory}", "--launch=local")
  assert ended(training) == 0
  return directory


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
  """Frees a file's compiled programs when its tests are through.

  Each one holds memory maps, of which Linux gives a process 65,530 (its
  vm.max_map_count); the whole suite needs more, and the compiler dies without
  them. A file leaves up to 5,000 behind.
  """
  yield
  import jax

  jax.clear_caches()
  gc.collect()
