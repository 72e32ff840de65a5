"""Emulators of S3 and of GCS, each a process on localhost.

They install from PyPI (extra `test`): moto and gcp-storage-emulator. The second
one ignores conditions, so it has no compare-and-swap, ignores the bounds of a
listing, and fails on empty values.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

BUCKET = "my-bucket"
_START = 300.0  # seconds that an emulator may take, where all is busy
# Its server keeps five connections waiting; the sixth is asked again by TCP,
# after a second. Several processes that publish have more.
_GCS = """
import socketserver, sys
from gcp_storage_emulator.__main__ import main
socketserver.TCPServer.request_queue_size = 1024
sys.exit(main())
"""


@contextlib.contextmanager
def s3() -> Iterator[str]:
  """Runs moto with an empty bucket; yields its `http://host:port`.

  It lets nobody read without credentials, so this process gets some.
  """
  os.environ.setdefault("AWS_ACCESS_KEY_ID", "emulator")
  os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "emulator")
  port = _free_port()
  command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
  with _running("moto", command, port):
    _ask(port, "PUT", f"/{BUCKET}")
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gcs() -> Iterator[str]:
  """Runs gcp-storage-emulator with an empty bucket; yields its address."""
  port = _free_port()
  command = ["-c", _GCS, "start", "--host", "127.0.0.1", "--port", str(port)]
  command += ["-M", "--default-bucket", BUCKET]
  with _running("gcp-storage-emulator", command, port):
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _running(name: str, command: Sequence[str], port: int) -> Iterator[None]:
  """Runs Python as a process while it lasts, once it answers."""
  quiet = subprocess.DEVNULL
  with subprocess.Popen(
      [sys.executable, *command], stdout=quiet, stderr=quiet
  ) as process:
    try:
      limit = time.monotonic() + _START
      while not _ask(port, "GET", "/"):
        if process.poll() is not None:
          raise RuntimeError(f"{name} ended with {process.returncode}")
        if time.monotonic() > limit:
          raise RuntimeError(f"{name} does not answer in {_START:.0f} s")
        time.sleep(0.05)
      yield
    finally:
      process.kill()


def _ask(port: int, method: str, path: str) -> bool:
  """Returns whether a server answers, whatever it says."""
  server = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
  with contextlib.closing(server):
    try:
      server.request(method, path)
      server.getresponse().read()
    except OSError:
      return False
  return True


def _free_port() -> int:
  """Returns a port that nobody listens on."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]
