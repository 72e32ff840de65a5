"""What two versions of a policy would take if only changes were published.

    python -m experiments.bench.delta --bucket=RUN/bucket --policy=main

Of each pair of neighbouring versions that the bucket keeps: bytes as they are
published (float32), compressed, as bfloat16, and the difference to the version
before (exclusive or of the bits, bytes of equal significance side by side),
compressed. Compression is zlib's at its quickest.
"""

import json
import time
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from absl import flags

from experiments import cli
from mgrpo_jax import publish, store

_BUCKET = flags.DEFINE_string("bucket", "", "URL of a bucket, or a folder")
_POLICY = flags.DEFINE_string("policy", "", "whose versions")


def read(bucket: store.Store, policy: str, number: int) -> np.ndarray:
  """Returns all parameters of a version, one after the other, float32."""
  path = f"policies/{policy}/v{number}"
  manifest = json.loads(bucket.get(f"{path}/manifest.json") or b"{}")
  arrays = bucket.read_arrays(path, manifest["arrays"])
  return np.concatenate([array.reshape(-1) for array in arrays.values()])


def packed(words: np.ndarray) -> int:
  """Returns the size in bytes of words, planes of bytes first, compressed."""
  planes = words.view(np.uint8).reshape(words.size, words.itemsize).T
  return len(zlib.compress(np.ascontiguousarray(planes).data, 1))


def sizes(before: np.ndarray, after: np.ndarray) -> Mapping[str, float]:
  """Returns what each way would take, and how much of the weights changed."""
  short = [
      a.astype(ml_dtypes.bfloat16).view(np.uint16) for a in (before, after)
  ]
  whole = [a.view(np.uint32) for a in (before, after)]
  begun = time.perf_counter()
  difference = packed(whole[0] ^ whole[1])
  seconds = time.perf_counter() - begun
  return {
      "float32": after.nbytes,
      "float32, compressed": packed(whole[1]),
      "difference, compressed": difference,
      "bfloat16": short[1].nbytes,
      "bfloat16, compressed": packed(short[1]),
      "bfloat16 difference, compressed": packed(short[0] ^ short[1]),
      "share of float32 that changed": float(np.mean(whole[0] != whole[1])),
      "share of bfloat16 that changed": float(np.mean(short[0] != short[1])),
      "MB/s that the difference is made at": after.nbytes / 1e6 / seconds,
  }


def main() -> None:
  """Prints a column for each pair of versions."""
  url, policy = _BUCKET.value, _POLICY.value
  with cli.user_errors(ValueError, OSError):
    bucket = store.open(url) if "://" in url else store.open_folder(url)
    numbers = publish.versions(bucket, policy)
    versions = [read(bucket, policy, number) for number in numbers]
  pairs = list(zip(versions, versions[1:], strict=False))
  if not pairs:
    cli.fail(
        f"{url} keeps {len(versions)} versions of {policy}; two are needed"
    )
  names = [f"v{n}" for n in numbers[1:]]
  found = [sizes(*pair) for pair in pairs]
  cli.say(f"| {policy} | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
  for what in found[0]:
    cells = [
        f"{row[what]:,.3g}" if row[what] < 1e3 else f"{row[what]:,.0f}"
        for row in found
    ]
    cli.say(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
  cli.run(main, required=("bucket", "policy"))
