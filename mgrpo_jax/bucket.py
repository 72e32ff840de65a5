"""Addresses of buckets: a URL becomes what TensorStore opens.

    file:///absolute/folder
    memory://name                one per name and process
    gs://bucket/folder
    s3://bucket/folder

Emulators on localhost are reached by naming their endpoint:

    gs://bucket/folder?endpoint=http://localhost:4443
    s3://bucket/folder?endpoint=http://localhost:9000&region=us-east-1

An option that is unknown, empty or there twice is refused; a question mark or a
hash of a path is written %3F and %23.

TensorStore reads the GCS endpoint from the environment once, so one process
talks to one GCS endpoint, which it sends no Google credentials where it is
plain http. S3 credentials are looked for where AWS's own tools look; an
emulator gets those of the environment, or none.

TensorStore waits for ever for a server that has gone quiet, unless the
environment says otherwise before its first request; so it does, for at most
`QUIET` seconds, where TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS is not set.
"""

import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

OPTIONS: dict[str, set[str]] = {  # what a URL of each scheme may say
    "file": set(),
    "memory": set(),
    "gs": {"endpoint"},
    "s3": {"endpoint", "region"},
}
QUIET = 20  # seconds without a byte until a connection counts as dead
_GCS_ENDPOINT = "TENSORSTORE_GCS_HTTP_URL"
_GCS_TOKEN = "GOOGLE_AUTH_TOKEN_FOR_TESTING"
_CURL = "TENSORSTORE_CURL_"
_ENDPOINT = re.compile(r"https?://[^/@?#\s]+(/[^@?#\s]*)?")


def spec(url: str) -> dict[str, Any]:
  """Returns the TensorStore key-value store that a URL names.

  Args:
    url: see above.

  Returns:
    JSON with `driver`, `path` and what else the driver wants.

  Raises:
    ValueError: the scheme, the path or an option is not one of these.
  """
  parts, shown = _parts(url), _shown(url)
  if parts.scheme not in OPTIONS or "#" in url:
    allowed = ", ".join(f"{scheme}://" for scheme in OPTIONS)
    raise ValueError(
        f"url: {shown} must start with one of {allowed} and have no #"
    )
  if parts.scheme in ("gs", "s3") and (not parts.netloc or "@" in parts.netloc):
    raise ValueError(f"url: {shown} must name a bucket, {parts.scheme}://NAME")
  options = _options(url, parts)
  if parts.scheme in ("gs", "s3"):
    os.environ.setdefault(f"{_CURL}LOW_SPEED_TIME_SECONDS", str(QUIET))
    os.environ.setdefault(f"{_CURL}LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault(f"{_CURL}CONNECT_TIMEOUT_SECONDS", str(QUIET))
  build = {"file": _file, "memory": _memory, "gs": _gcs, "s3": _s3}
  return build[parts.scheme](parts, options)


def normal(url: str) -> str:
  """Writes a bucket's URL in one way: no slashes at the end of its path.

  Args:
    url: see above; what is none is left as it is.

  Returns:
    The URL of the same bucket.
  """
  plain, mark, options = url.partition("?")
  bare = plain.rstrip("/")
  return f"{plain if bare.endswith(':') else bare}{mark}{options}"


def _parts(url: str) -> urllib.parse.SplitResult:
  """Takes a URL apart; Python would leave out some of what is not printed."""
  if not url.isprintable():
    raise ValueError(f"url: {_shown(url)} has characters that are not printed")
  try:
    return urllib.parse.urlsplit(url)
  except ValueError as error:
    raise ValueError(f"url: {_shown(url)}: {error}") from error


def _options(url: str, parts: urllib.parse.SplitResult) -> dict[str, str]:
  """Reads what follows the question mark, if there is one."""
  if "?" not in url:
    return {}
  shown, options = _shown(url), dict[str, str]()
  for field in parts.query.split("&"):
    name, _, value = map(urllib.parse.unquote_plus, field.partition("="))
    if name not in OPTIONS[parts.scheme]:
      known = " or ".join(sorted(OPTIONS[parts.scheme])) or "none (? is %3F)"
      raise ValueError(
          f"url: unknown option {name!r} in {shown}, allowed: {known}"
      )
    if not value:
      raise ValueError(f"url: option {name!r} is empty in {shown}")
    if name in options:
      raise ValueError(f"url: option {name!r} stands twice in {shown}")
    options[name] = value
  if not _ENDPOINT.fullmatch(options.get("endpoint", "http://none")):
    raise ValueError(
        f"url: option 'endpoint' in {shown} must be http://HOST:PORT or"
        " https://HOST:PORT"
    )
  return options


def _shown(url: str) -> str:
  """A URL as errors show it: without what may be a secret."""
  plain, mark, _ = url.partition("?")
  plain = re.sub(r"//[^/]*@", "//...@", plain)
  return repr(f"{plain}?..." if mark else plain)


def _file(parts: Any, options: Mapping[str, str]) -> dict[str, Any]:
  """Returns the spec of a local folder."""
  del options
  path = _unquoted(parts.path).rstrip("/")
  if parts.netloc not in ("", "localhost") or not path.startswith("/"):
    raise ValueError("url: file:// needs an absolute path, file:///folder")
  return {"driver": "file", "path": f"{path}/"}


def _memory(parts: Any, options: Mapping[str, str]) -> dict[str, Any]:
  """Returns the spec of a bucket in memory, one per name and process."""
  del options
  return {"driver": "memory", "path": _folder(parts.netloc + parts.path)}


def _gcs(parts: Any, options: Mapping[str, str]) -> dict[str, Any]:
  """Returns the spec of a bucket on Google Cloud Storage."""
  endpoint = options.get("endpoint")
  if endpoint:
    before = os.environ.setdefault(_GCS_ENDPOINT, endpoint)
    if before != endpoint:
      raise ValueError(
          f"url: this process already uses the GCS endpoint {before}, not "
          f"{endpoint}"
      )
    if endpoint.startswith("http://"):
      os.environ.setdefault(_GCS_TOKEN, "none")
  path = _folder(parts.path)
  return {"driver": "gcs", "bucket": parts.netloc, "path": path}


def _s3(parts: Any, options: Mapping[str, str]) -> dict[str, Any]:
  """Returns the spec of a bucket on S3."""
  path = _folder(parts.path)
  spec: dict[str, Any] = {
      "driver": "s3",
      "bucket": parts.netloc,
      "path": path,
      "use_conditional_write": True,  # else TensorStore looks before it writes
  }
  if "endpoint" in options:
    known = "AWS_ACCESS_KEY_ID" in os.environ
    spec |= {
        "endpoint": options["endpoint"],
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "environment" if known else "anonymous"},
    }
  if "region" in options:
    spec["aws_region"] = options["region"]
  return spec


def _folder(path: str) -> str:
  """Returns a path as TensorStore wants folders: `a/b/`, empty for the root."""
  path = _unquoted(path).strip("/")
  return f"{path}/" if path else ""


def _unquoted(path: str) -> str:
  """Decodes a path; TensorStore takes no other paths than UTF-8."""
  try:
    return urllib.parse.unquote(path, errors="strict")
  except UnicodeDecodeError as error:
    raise ValueError(f"url: the path {path!r} is not UTF-8") from error
