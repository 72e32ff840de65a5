"""One process of a job of several, of a whole run in miniature.

python tiny_hosts.py DIRECTORY BUCKET POLICY COORDINATOR PROCESSES PROCESS

Its mesh has four devices, two pieces of the weights and two of their heads.
POLICY may be `all`: then the run is in one process.
"""

import functools
import json
import os
import pathlib
import sys
import tempfile

import jax

from mgrpo_jax import sharding
from mgrpo_jax.hosts import group

SEED, STEPS = 3, 3
PATIENCE = 900  # seconds; machines that run tests are busy, or paused
POLICIES = ("main", "researcher")
SIZES = {"data": 1, "fsdp": 2, "tensor": 2, "expert": 1}


def meshes():
  """A mesh over all processes; each samples on devices of its own."""
  learner = sharding.make_mesh(**SIZES, devices=jax.devices())
  sampler = sharding.sampler_mesh(jax.local_devices()[:1])
  return sharding.Meshes(learner=learner, sampler=sampler)


def main():
  directory, bucket, policy, coordinator, processes, process = sys.argv[1:]
  cache = pathlib.Path(tempfile.gettempdir()) / "mgrpo_jax_tiny_cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  number = 4 // int(processes)
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={number}"
  group.join(
      coordinator=coordinator,
      processes=int(processes),
      process=int(process),
      silence=PATIENCE,
  )
  train(directory, bucket, policy)


def train(directory, bucket, policy):
  """Does this process's part; what it imports uses devices at once."""
  import tiny_job
  from delegating import delegating_setup

  from mgrpo_jax import store
  from mgrpo_jax.decoupled.run import restricted
  from mgrpo_jax.hosts import crew
  from mgrpo_jax.hosts.ending import driving
  from mgrpo_jax.resources import make_learner

  setup = delegating_setup(
      seed=SEED,
      imitation_steps=1,
      steps=STEPS,
      sizes=dict.fromkeys(POLICIES, {"num_heads": 2, "num_kv_heads": 2}),
      meshes=dict.fromkeys(POLICIES, meshes()),
  )
  channel = group.open_channel(PATIENCE)
  if jax.process_index():
    setup = restricted(setup, policy)
    method = setup.method
    crew.assist(
        channel,
        mesh=setup.meshes[policy].learner,
        make=functools.partial(make_learner, setup, policy),
        objectives={
            "imitate": method.imitation_loss,
            "reinforce": method.policy_loss,
        },
        store=store.open(bucket),
    )
    return
  with driving(channel):
    summary = tiny_job.train(
        pathlib.Path(directory),
        bucket,
        policy,
        setup,
        stream=sys.stderr,
        patience=PATIENCE,
        channel=channel,
    )
  print(json.dumps(summary))


if __name__ == "__main__":
  main()
