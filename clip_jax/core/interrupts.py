"""Ctrl-C and SIGTERM: raised as an exception, or deferred until a training step has ended."""

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading


class Interrupted(BaseException):
  """A signal stopped the run. `status` is the exit status: 130 for Ctrl-C, 143 for SIGTERM."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


_received: list[int] = []  # signal numbers so far
_deferring = 0  # blocks of deferred() that run now, in all threads
_lock = threading.Lock()


def _handle(signum, frame):
  del frame
  _received.append(signum)
  if not _deferring or is_urgent():  # a second signal is never deferred
    raise Interrupted(signum)


def check() -> None:
  """Raises Interrupted if a signal arrived; does nothing inside `deferred`.

  Long work calls this now and then: Python drops an exception raised inside a destructor or a
  garbage collection callback (JAX has one), so the one from the signal handler can get lost.
  """
  if not _deferring:
    _raise_received()


def _raise_received() -> None:
  if _received:
    raise Interrupted(_received[0])


def receive(signum: int) -> None:
  """Notes a signal that arrived at another process of the same work."""
  if signum and not _received:
    _received.append(signum)


def is_urgent() -> bool:
  """Returns whether a second signal arrived: the process is to end at once."""
  return len(_received) > 1


def install() -> None:
  """Makes SIGINT and SIGTERM raise Interrupted in the main thread."""
  _received.clear()
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, _handle)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Lets a signal that arrives during a short block raise after it: all of the block is done."""
  global _deferring
  before = len(_received)
  with _lock:
    _deferring += 1
  try:
    yield
  finally:
    with _lock:
      _deferring -= 1
  if len(_received) > before:
    _raise_received()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
  """Defers a first signal to the end of the block; yields should_stop(): its number, 0 before it.

  Several threads may be in such blocks at once: each ends its own step.
  """
  global _deferring
  _raise_received()
  with _lock:
    _deferring += 1
  try:
    yield lambda: _received[0] if _received else 0
  finally:
    with _lock:
      _deferring -= 1
  _raise_received()
