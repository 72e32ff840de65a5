"""The border of every command: flags in, one line and exit code 2 on misuse."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import pathlib
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import flags

if typing.TYPE_CHECKING:
  import ml_collections

USAGE_ERROR = 2
BROKEN = 75  # what failed may pass: the same command may go on (EX_TEMPFAIL)
BROKEN_PIPE = 128 + signal.SIGPIPE
INTERRUPTED = 128 + signal.SIGINT  # as shells do
TERMINATED = 128 + signal.SIGTERM
_interruption = INTERRUPTED
_ends = threading.Event()  # set once it is clear with which code

TOKEN_ADVICE = (
    "give the same token to all jobs and replicas by --token_file=FILE (openssl"
    " rand -hex 16 > FILE makes one) or MGRPO_JOBS_TOKEN"
)


def fail(message: str, code: int = USAGE_ERROR) -> None:
  """Ends the process with one line and an exit code."""
  with contextlib.suppress(OSError):  # the code says it, too
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  sys.exit(code)


def tell(line: str) -> None:
  """Prints a line beside what the command came to say.

  Args:
    line: for stderr.
  """
  print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
  """Prints what a command came to say; where it cannot, ends the process.

  Args:
    text: for stdout.

  Raises:
    SystemExit: nobody reads any more (quiet, the code of SIGPIPE), or stdout
      cannot be written (one line, code 2).
  """
  with _stdout():
    print(text, flush=True)


@contextlib.contextmanager
def _stdout() -> Iterator[None]:
  """Ends the process where stdout cannot be written inside."""
  try:
    yield
  except OSError as error:
    # What is still buffered would fail once more when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
      sys.exit(BROKEN_PIPE)
    fail(f"cannot write to stdout: {_one_line(error)}")


@contextlib.contextmanager
def user_errors(
    *kinds: type[Exception], code: int = USAGE_ERROR
) -> Iterator[None]:
  """Turns exceptions of these kinds, raised inside, into one line and exit 2.

  Args:
    *kinds: exception types that mean wrong input or a wrong environment here.
    code: to exit with, where it is not that of a usage error.

  Yields:
    Nothing.
  """
  try:
    yield
  except kinds as error:
    fail(_one_line(error), code)


def secret(file: str, name: str) -> str:
  """Reads a token, which no list of processes then shows.

  Args:
    file: that holds it and nothing else but blanks.
    name: of the setting that named the file.

  Returns:
    The token.

  Raises:
    ValueError: the file cannot be read or is empty.
  """
  try:
    token = pathlib.Path(file).read_text("utf-8").strip()
  except (OSError, ValueError) as error:
    raise ValueError(f"{name}: cannot be read: {error}") from error
  if not token:
    raise ValueError(f"{name}: {file} is empty")
  return token


def check_exposure(host: str, token: str, how: str) -> None:
  """Checks that nobody but this machine is served without a token.

  Args:
    host: address or name that is listened at.
    token: that clients must send; empty for none.
    how: a token is given to this command.

  Raises:
    ValueError: others can reach it and there is no token, or it is too short.
  """
  from mgrpo_jax.serving import limits

  try:
    limits.check_exposure(host, token)
  except ValueError as error:
    raise ValueError(f"{error}; {how}") from error


def out_file(text: str) -> pathlib.Path:
  """Reads the path of a file that is written when all is done.

  Args:
    text: as the user gave it.

  Returns:
    The path.

  Raises:
    ArgumentTypeError: its directory is not there, or it is a directory itself.
  """
  path = pathlib.Path(text)
  if not path.absolute().parent.is_dir():
    raise argparse.ArgumentTypeError(f"{path.parent} is not a directory")
  if path.is_dir():
    raise argparse.ArgumentTypeError(f"{path} is a directory")
  return path


def need(package: str) -> None:
  """Raises ModuleNotFoundError where a package is not installed.

  Args:
    package: as it is imported; it is not imported here.
  """
  if importlib.util.find_spec(package) is None:
    raise ModuleNotFoundError(name=package)


def _one_line(error: Exception) -> str:
  """Says what went wrong, and where the system knows it."""
  if isinstance(error, ModuleNotFoundError):
    return (
        f"the package {error.name!r} is missing: pip install -e . installs"
        " what mgrpo_jax needs"
    )
  if isinstance(error, OSError) and error.strerror:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}"
  return str(error) or type(error).__name__


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; a mistake ends the process with one line.

  Args:
    argv: the command line, program name first.

  Returns:
    What is left beside the flags, program name first.
  """
  with flag_errors():
    return flags.FLAGS(list(argv))
  raise AssertionError("fail() does not return")


@contextlib.contextmanager
def flag_errors(what: str = "") -> Iterator[None]:
  """Turns what parsing flags and recipes raises inside into one line, exit 2.

  Args:
    what: is read, where that is not the command's own --config.

  Yields:
    Nothing.
  """
  source = what or "--config"
  try:
    yield
  except flags.Error as error:
    if "Traceback" in str(error):  # a recipe's, quoted whole
      fail(f"cannot read {source}: {last_line(error)}")
    fail(str(error))
  except (
      AttributeError,
      KeyError,
  ) as error:  # a key that the config does not have
    reason: object = error
    while isinstance(reason, Exception) and reason.args:
      reason = reason.args[0]  # a KeyError would quote its message
    reason = str(reason).replace("\n", ". ")
    fail(f"unknown config key {reason}" + (f", in {what}" if what else ""))
  except IndexError as error:  # curriculum[9]=…
    fail(f"cannot read {source}: config key: {last_line(error)}")
  except SyntaxError as error:  # in the recipe
    fail(f"cannot read {source}: {error}")
  except (OSError, TypeError, ValueError, ImportError) as error:
    fail(f"cannot read {source}: {last_line(error)}")


def config_of(holder: typing.Any) -> ml_collections.ConfigDict:
  """Gives the recipe of a flag; one that cannot be read ends the process.

  Args:
    holder: what `config_flags.DEFINE_config_file` returned.

  Returns:
    The config.
  """
  with flag_errors():
    holder.value.get("name")  # a file that is missing raises only here
    return holder.value
  raise AssertionError("fail() does not return")


def last_line(error: Exception) -> str:
  """Finds the line of a long message that names the cause.

  Args:
    error: whose message may quote a traceback first.

  Returns:
    The last line that is not empty; the error's name where none is.
  """
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1] if lines else type(error).__name__


def interruption() -> int:
  """Gives the code of a command that is interrupted: of Ctrl-C or SIGTERM."""
  return _interruption


def run(
    main: Callable[[], None],
    *,
    required: Sequence[str] = (),
    resumes: bool = False,
) -> None:
  """Parses flags and runs a command.

  Args:
    main: the command; reads its flags from `absl.flags.FLAGS`.
    required: flags that must be given.
    resumes: whether the same command goes on where this one was interrupted.

  Raises:
    SystemExit: code 2 after one line, on wrong input.
  """
  global _interruption
  _interruption = INTERRUPTED
  _ends.clear()
  _open_streams()
  if {"--help", "-h"} & set(sys.argv[1:]):
    say(_help())
    return
  rest = parse(sys.argv)
  if len(rest) > 1:
    fail(f"unexpected argument {rest[1]!r}; flags look like --name=value")
  for name in required:
    if not getattr(flags.FLAGS, name):
      fail(f"--{name} is required")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # libraries' chatter
  os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
  for library in ("checkpoint", "publish"):  # commands say what was skipped
    logging.getLogger(f"mgrpo_jax.{library}").setLevel(logging.ERROR)

  def terminate(number: int, frame: object) -> None:
    """Ends as Ctrl-C does, so that files are closed and engines stop."""
    del number, frame
    global _interruption
    _interruption = TERMINATED
    signal.raise_signal(signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As shells start what is to run beside them. It is held back instead: as
    # asyncio must find a handler, by which SIGTERM ends a run in order.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, terminate)
  sys.unraisablehook = _interrupt_again
  try:
    main()
    with _stdout():
      sys.stdout.flush()
  except KeyboardInterrupt:
    _ends.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hint = "; the same command continues" if resumes else ""
    with contextlib.suppress(OSError):  # nobody reads it
      tell(f"interrupted{hint}")
    # What is left may take long: who is told again ends at once.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_interruption))
    # Python 3.11 ends by SIGINT, whatever the code, after a KeyboardInterrupt
    # that passed through an `exec`, as dataclasses have; until another `exec`.
    exec("")
    sys.exit(_interruption)


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
  """Repeats a Ctrl-C that came in a callback, where Python drops it."""

  def interrupt() -> None:
    if not _ends.is_set():
      os.kill(os.getpid(), signal.SIGINT)

  if issubclass(lost.exc_type, KeyboardInterrupt):
    again = threading.Timer(0.05, interrupt)
    again.daemon = True
    again.start()
  else:
    sys.__unraisablehook__(lost)


def _open_streams() -> None:
  """Gives the streams that the shell closed, None to Python, to /dev/null."""
  for name in ("stdin", "stdout", "stderr"):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, "r+"))


def _help() -> str:
  """What the command does, and the flags that it defines itself."""
  module = sys.modules["__main__"]
  own = flags.FLAGS.get_flags_for_module("__main__") or (
      flags.FLAGS.get_flags_for_module(sys.argv[0])
  )
  lines = [(module.__doc__ or "").strip(), "", "Flags:"]
  for flag in sorted(own, key=lambda one: one.name):
    default = f" (default {flag.default})" if flag.default else ""
    lines.append(f"  --{flag.name}: {flag.help}{default}")
  return "\n".join(lines)
