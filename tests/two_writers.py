"""One of the two processes of a job that publishes its first weights.

python two_writers.py BUCKET COORDINATOR PROCESS MODE

MODE is `publish` (a whole version, then the difference to it, which both read
into another mesh), `adapter` (what is published is an adapter, which process 0
then merges), `full` (process 1 can
write no file of the first attempt) or `killed` (process 1 dies in the midst of
writing). Prints what happened as JSON.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import resource
import signal
import sys
import tempfile

import jax
import numpy as np

from mgrpo_jax.hosts import group

PATIENCE = 900  # seconds; machines that run tests are busy, or paused
POLICY, BASE, VERSION = "main", 0, 1
COUNTED = collections.Counter()


def main():
  url, coordinator, process, mode = sys.argv[1:]
  cache = pathlib.Path(tempfile.gettempdir()) / "mgrpo_jax_tiny_cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
  group.join(
      coordinator=coordinator,
      processes=2,
      process=int(process),
      silence=10 if mode == "killed" else 300,
  )
  print(json.dumps(work(url, mode)), flush=True)


def work(url, mode):
  """Does this process's part; what it imports uses devices at once."""
  from mgrpo_jax import sharding, store
  from mgrpo_jax.decoupled.run import restricted
  from mgrpo_jax.plan import Adaptation
  from mgrpo_jax.policy.lora import LoRA
  from mgrpo_jax.testing.setup import small_setup

  adapted = LoRA(rank=2, alpha=6.0, targets=("query", "output", "down"))
  adaptation = Adaptation(lora=adapted, base="tiny")
  mesh = functools.partial(sharding.make_mesh, data=1, expert=1)
  everywhere = sharding.Meshes(
      learner=mesh(fsdp=2, tensor=2, devices=jax.devices()),
      sampler=sharding.sampler_mesh(jax.local_devices()[:1]),
  )
  setup = small_setup(
      seed=0,
      imitation_steps=1,
      steps=3,
      sizes={POLICY: {"num_heads": 2, "num_kv_heads": 2}},
      meshes=dict.fromkeys(("main", "researcher"), everywhere),
      adaptations={POLICY: adaptation} if mode == "adapter" else {},
  )
  setup = dataclasses.replace(restricted(setup, POLICY), whole_every=2)
  count(mode)
  bucket = store.open(url)
  expected = jax.tree.map(np.array, setup.policies[POLICY].params)
  if jax.process_index():
    told = assist(setup, bucket)
  else:
    told = lead(setup, bucket, after_base=mode == "publish")
  found = {
      "told": told,
      "written": COUNTED["written", f"policies/{POLICY}/v{VERSION}"],
      "written before": COUNTED["written", f"policies/{POLICY}/v{BASE}"],
  }
  if mode == "publish":
    other = mesh(fsdp=4, tensor=1, devices=jax.devices())
    found |= read(setup, bucket, other, expected)
  return found


def count(mode):
  """Counts bytes; breaks process 1's first writing, if it is to."""
  from mgrpo_jax.arrays import Arrays

  write, fetch = Arrays.write_parts, Arrays.read_parts
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)

  def writing(arrays, folder, parts):
    COUNTED["writes"] += 1
    breaks = jax.process_index() == 1 and COUNTED["writes"] == 1
    if breaks and mode == "killed":
      some = dict(list(parts.items())[: len(parts) // 2])
      write(arrays, folder, some)
      os.kill(os.getpid(), signal.SIGKILL)
    if breaks and mode == "full":
      resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
      write(arrays, folder, parts)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    size = sum(one.nbytes for one in parts.values())
    COUNTED["written", folder] += size

  def reading(arrays, folder, wanted, seen):
    found = fetch(arrays, folder, wanted, seen)
    COUNTED["read", folder] += sum(one.nbytes for one in found.values())
    return found

  Arrays.write_parts, Arrays.read_parts = writing, reading


def lead(setup, bucket, *, after_base):
  """Publishes, if wanted other weights before; again, where that failed."""
  from mgrpo_jax import atomic
  from mgrpo_jax.environments import Reach
  from mgrpo_jax.hosts.driver import Driver
  from mgrpo_jax.hosts.ending import driving
  from mgrpo_jax.publisher import Publisher
  from mgrpo_jax.resources import Resources

  channel = group.open_channel(PATIENCE)
  with driving(channel):
    elsewhere = dict.fromkeys(setup.elsewhere, None)  # nobody is called
    resources = Resources(
        setup,
        bucket,
        Reach(training=elsewhere, testing=elsewhere),
        functools.partial(Driver, channel=channel),
    )
    publisher, told = Publisher(resources), None
    if after_base:
      learner = resources.learners[POLICY]
      state = learner.whole
      other = jax.tree.map(lambda leaf: leaf * 0.999, state.params)
      learner.take(dataclasses.replace(state, params=other))
      publisher.publish([POLICY], BASE, last=True)
      learner.take(state)
    try:
      publisher.publish([POLICY], VERSION, last=True)
    except atomic.StorageError as error:
      told = [str(error), sorted(bucket.list(f"policies/{POLICY}/LATEST"))]
      bucket.settle()
      told.append(bucket.list("policies"))
      publisher.publish([POLICY], VERSION, last=True)
    resources.read_published()
    resources.writer.close()
  return told


def assist(setup, bucket):
  """Does as process 0 says."""
  from mgrpo_jax.hosts import crew
  from mgrpo_jax.resources import make_learner

  crew.assist(
      group.open_channel(PATIENCE),
      mesh=setup.meshes[POLICY].learner,
      make=functools.partial(make_learner, setup, POLICY),
      objectives={
          "imitate": setup.method.imitation_loss,
          "reinforce": setup.method.policy_loss,
      },
      store=bucket,
  )


def read(setup, bucket, mesh, expected):
  """Reads what was published into another mesh of both processes."""
  from mgrpo_jax import publish, sharding
  from mgrpo_jax.policy.params import param_specs

  like = sharding.shapes(param_specs(setup.policies[POLICY].config), mesh)
  found = publish.read(bucket, POLICY, VERSION, like=like).params
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  same = all(
      np.array_equal(shard.data, whole[shard.index])
      for leaf, whole in pairs
      for shard in leaf.addressable_shards
  )
  placed = jax.tree.map(lambda leaf: leaf.sharding, found)
  as_asked = placed == jax.tree.map(lambda leaf: leaf.sharding, like)
  total = sum(one.nbytes for one in jax.tree.leaves(expected))
  return {
      "same": same and as_asked,
      "read": COUNTED["read", f"policies/{POLICY}/v{VERSION}"],
      "read before": COUNTED["read", f"policies/{POLICY}/v{BASE}"],
      "total": total,
  }


if __name__ == "__main__":
  main()
