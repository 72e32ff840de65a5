"""Just enough of GCS, with generations, to run a store against."""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any


class GCS(http.server.BaseHTTPRequestHandler):
  """The JSON API: get, upload, delete, list, on a dictionary."""

  protocol_version = "HTTP/1.1"
  objects: dict[str, tuple[int, bytes]]
  lock: threading.Lock

  def log_message(self, format: str, *args: Any) -> None:
    """Keeps quiet."""

  def body(self) -> bytes:
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def reply(self, code: int, data: bytes = b"", **headers: str) -> None:
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)

  def split(self) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(self.path)
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    return urllib.parse.unquote(parts.path), dict(query)

  def put(self, key: str, data: bytes, generation: str | None) -> int:
    """Returns the new generation, 0 where the wanted one is not there."""
    with self.lock:
      now = self.objects.get(key, (0, b""))[0]
      if generation is not None and int(generation) != now:
        return 0
      new = max([0, *(g for g, _ in self.objects.values())]) + 1
      self.objects[key] = (new, data)
      return new

  def do_GET(self) -> None:
    path, query = self.split()
    match = re.match(r"/storage/v1/b/([^/]+)/o(?:/(.*))?$", path)
    assert match, path
    bucket, key = match.groups()
    if key:
      found = self.objects.get(f"{bucket}/{key}")
      if found is None:
        self.reply(404, b"{}")
      else:
        self.reply(200, found[1], x_goog_generation=str(found[0]))
      return
    prefix = f"{bucket}/{query.get('prefix', '')}"
    items = [
        {"name": k.partition("/")[2], "size": str(len(v[1]))}
        for k, v in sorted(self.objects.items())
        if k.startswith(prefix)
        and query.get("startOffset", "") <= k.partition("/")[2]
        and k.partition("/")[2] < query.get("endOffset", "\x7f")
    ]
    self.reply(200, json.dumps({"items": items}).encode())

  def do_POST(self) -> None:
    path, query = self.split()
    match = re.match(r"/upload/storage/v1/b/([^/]+)/o$", path)
    assert match, path
    key = f"{match[1]}/{query['name']}"
    new = self.put(key, self.body(), query.get("ifGenerationMatch"))
    answer = {"name": query["name"], "generation": str(new)}
    self.reply(200 if new else 412, json.dumps(answer).encode())

  def do_DELETE(self) -> None:
    path, query = self.split()
    match = re.match(r"/storage/v1/b/([^/]+)/o/(.*)$", path)
    assert match, path
    key = f"{match[1]}/{match[2]}"
    wanted = query.get("ifGenerationMatch")
    with self.lock:
      now = self.objects.get(key, (0, b""))[0]
      if wanted is not None and int(wanted) != now:
        self.reply(412)
      else:
        self.objects.pop(key, None)
        self.reply(204 if now else 404)


@contextlib.contextmanager
def serve() -> Iterator[str]:
  """Runs an emulator; yields its endpoint."""
  handler = type("GCS", (GCS,), {"objects": {}, "lock": threading.Lock()})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
