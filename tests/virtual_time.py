"""An event loop whose clock jumps to the next timer instead of waiting."""

import asyncio
import selectors


class _Impatient(selectors.DefaultSelector):
  """Never waits; adds what it was told to wait to its clock."""

  def __init__(self):
    super().__init__()
    self.now = 0.0

  def select(self, timeout=None):
    found = super().select(0)
    if not found and timeout:
      self.now += timeout
    return found


def run(work):
  """Like `asyncio.run`, in no time; nothing may wait for a thread or socket.

  Args:
    work: coroutine whose waits are all timers.

  Returns:
    Its result.
  """
  selector = _Impatient()
  loop = asyncio.SelectorEventLoop(selector)
  loop.time = lambda: selector.now
  with asyncio.Runner(loop_factory=lambda: loop) as runner:
    # `Runner.run` makes a repr of what it returns (CPython).
    return runner.get_loop().run_until_complete(work)
