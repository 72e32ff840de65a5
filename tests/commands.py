"""Commands of experiments/ as a user gives them, and how they end."""

import json
import os
import pathlib
import subprocess
import sys

import jax

_CLOSING = 90  # seconds: launchers give what they started a minute
ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"
SMOKE = "--config=configs/decoupled_quickstart.py:smoke"
# Two processes a job, of which each has two of the policy's four devices.
SPREAD = [
    "--hosts=2",
    *(
        f"--config.policies.{policy}.mesh.{axis}=2"
        for policy in ("main", "researcher")
        for axis in ("fsdp", "tensor")
    ),
]


def environment(devices=1):
  """A user's, of so many devices. Programs are compiled once for all tests."""
  own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  if devices > 1:
    own["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  return own | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
      "PYTHONPATH": str(ROOT),
  }


def start(*arguments, devices=1, **streams):
  """Starts Python."""
  return subprocess.Popen(
      [sys.executable, *arguments],
      cwd=ROOT,
      text=True,
      env=environment(devices),
      **streams,
  )


def train_spread(*arguments):
  """Starts to train the smoke, each policy's job in two processes."""
  return start("-m", "experiments.train", SMOKE, *SPREAD, *arguments)


def ended(process, seconds=600):
  """The code with which a command ends, and with it all that it started."""
  try:
    return process.wait(seconds)
  finally:
    end(process)


def end(process):
  """Ends a command that may still run, and with it all that it started."""
  process.terminate()
  try:
    process.wait(_CLOSING)
  finally:
    process.kill()


def assert_ended_alike(directory, other):
  """Two runs in jobs: the same parameters bit for bit, the same summary."""
  for policy, folder in (("main", ""), ("researcher", "jobs/researcher/")):
    file = f"{folder}policies/{policy}/model.safetensors"
    assert (directory / file).read_bytes() == (other / file).read_bytes()
  actual, expected = (
      json.loads((root / "summary.json").read_text())
      for root in (directory, other)
  )
  for name in ("seed", "steps", "eval", "tokens"):
    assert actual[name] == expected[name]


def python(*arguments, timeout=120):
  """Runs Python to its end."""
  return subprocess.run(
      [sys.executable, *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=timeout,
      env=environment(),
      check=False,
  )


def command(name, *arguments, timeout=120):
  """Runs a command of experiments/ to its end."""
  return python("-m", f"experiments.{name}", *arguments, timeout=timeout)


def refused(result):
  """The one line of a refusal."""
  assert result.returncode == 2, result.stderr
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1, result.stderr
  assert lines[0].startswith("error: ")
  assert not result.stdout
  return lines[0]
