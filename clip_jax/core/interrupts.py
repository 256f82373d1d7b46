"""Ctrl-C and SIGTERM: raised as an exception, or deferred until a training step has ended."""

from collections.abc import Callable, Iterator
import contextlib
import signal


class Interrupted(BaseException):
  """A signal stopped the run. `status` is the exit status: 130 for Ctrl-C, 143 for SIGTERM."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


_received: list[int] = []  # signal numbers so far
_deferring = False  # True inside deferred()


def _handle(signum, frame):
  del frame
  _received.append(signum)
  if not _deferring or len(_received) > 1:  # a second signal is never deferred
    raise Interrupted(signum)


def check() -> None:
  """Raises Interrupted if a signal arrived; does nothing inside `deferred`.

  Long work calls this now and then: Python drops an exception raised inside a destructor or a
  garbage collection callback (JAX has one), so the one from the signal handler can get lost.
  """
  if _received and not _deferring:
    raise Interrupted(_received[0])


def install() -> None:
  """Makes SIGINT and SIGTERM raise Interrupted in the main thread."""
  _received.clear()
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Defers a first signal to the end of the block; yields should_stop(), True once it arrived."""
  global _deferring
  check()
  _deferring = True
  try:
    yield lambda: bool(_received)
  finally:
    _deferring = False
  check()
