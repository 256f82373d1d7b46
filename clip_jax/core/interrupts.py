"""Ctrl-C and SIGTERM: an exception where work is in shards, a flag where a step must end first."""

from collections.abc import Callable, Iterator
import contextlib
import signal


class Interrupted(BaseException):
  """A signal asked the run to end; `status` is the exit status (130 Ctrl-C, 143 SIGTERM)."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


_received: list[int] = []  # signals so far
_deferring = False  # a block lets its step end first


def _handle(signum, frame):
  del frame
  _received.append(signum)
  if not _deferring or len(_received) > 1:  # the second signal of an impatient user does not wait
    raise Interrupted(signum)


def check() -> None:
  """Raises Interrupted where a signal came and its exception was lost.

  Python drops what is raised inside a destructor or a garbage collection callback (JAX has one),
  and a signal can arrive just there; so long work asks here now and then. Silent while a block
  defers signals.
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
  """Yields should_stop(): inside, a first signal only turns it true; at the end it is raised."""
  global _deferring
  check()
  _deferring = True
  try:
    yield lambda: bool(_received)
  finally:
    _deferring = False
  check()
