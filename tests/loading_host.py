"""One host of two loads a checkpoint; what it held and read, as JSON.

python tests/loading_host.py DIRECTORY ADDRESS NUMBER
"""

import json
import pathlib
import sys
import threading

import jax

from mgrpo_jax import sharding
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.load import safetensors as directories


def anonymous_bytes():
  """Memory of this process that is not a page of a file."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("RssAnon:")[1].split()[0])


def main():
  directory, address, number = sys.argv[1:]
  jax.distributed.initialize(address, 2, int(number))
  mesh = sharding.make_mesh(
      data=1, fsdp=8, tensor=1, expert=1, devices=jax.devices()
  )
  for device in jax.local_devices():
    jax.block_until_ready(jax.device_put(0.0, device))
  read, part = [], directories._part

  def counting(view, *index):
    value = part(view, *index)
    read.append(value.nbytes)
    return value

  directories._part = counting
  before, peak, done = anonymous_bytes(), 0, threading.Event()

  def watch():
    nonlocal peak
    while not done.wait(0.0005):
      peak = max(peak, anonymous_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  leaves = jax.tree.leaves(load(directory, mesh=mesh).params)
  jax.block_until_ready(leaves)
  done.set()
  watcher.join()
  held = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
  figures = {"held": held, "read": sum(read), "peak": peak - before}
  print(json.dumps(figures), flush=True)


if __name__ == "__main__":
  main()
