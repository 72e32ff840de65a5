"""What a client did wrong, or what stands in its way, as OpenAI says it."""

from __future__ import annotations

from typing import Any

_SHOWN = 80  # characters of a value


class RequestError(Exception):
  """A request that gets an error in place of an answer.

  Attributes:
    status: of HTTP.
    message: what, where, allowed values.
    param: the field that is wrong; None where none is.
    code: a word for programs, or None.
    retry_after: seconds until it makes sense to ask again, or None.
  """

  def __init__(
      self,
      status: int,
      message: str,
      *,
      param: str | None = None,
      code: str | None = None,
      retry_after: int | None = None,
  ) -> None:
    """Keeps what is told; see the attributes."""
    super().__init__(message)
    self.status = status
    self.message = message
    self.param = param
    self.code = code
    self.retry_after = retry_after

  @property
  def headers(self) -> dict[str, str]:
    """Headers that belong to it."""
    if self.status == 401:
      return {"WWW-Authenticate": "Bearer"}
    if self.retry_after is not None:
      return {"Retry-After": str(self.retry_after)}
    return {}

  def body(self) -> dict[str, Any]:
    """The error object of OpenAI's interface."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    fallback = "server_error" if self.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": self.message,
            "type": kinds.get(self.status, fallback),
            "param": self.param,
            "code": self.code,
        }
    }


def wrong(field: str, value: Any, allowed: str) -> RequestError:
  """The error of a field with a value that is not allowed.

  Args:
    field: its path in the request, `messages[2].role`.
    value: what it has.
    allowed: what it may have.

  Returns:
    The error, status 400.
  """
  shown = repr(value)
  if len(shown) > _SHOWN:
    shown = shown[: _SHOWN - 1] + "…"
  return RequestError(400, f"{field}: {shown}, allowed: {allowed}", param=field)
