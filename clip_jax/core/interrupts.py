"""Ctrl-C and SIGTERM: an exception where work is in shards, a flag where a step must end first."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Interrupted(BaseException):
  """A signal asked the run to end; `status` is the exit status (130 Ctrl-C, 143 SIGTERM)."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


_deferred: list[int] | None = None  # signals received while a block defers them


def _handle(signum, frame):
  del frame
  if _deferred is None:
    raise Interrupted(signum)
  if _deferred:  # the second signal of an impatient user
    raise Interrupted(signum)
  _deferred.append(signum)


def install() -> None:
  """Makes SIGINT and SIGTERM raise Interrupted in the main thread."""
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Yields should_stop(): inside, a first signal only turns it true; at the end it is raised."""
  global _deferred
  received = _deferred = []
  try:
    yield lambda: bool(received)
  finally:
    _deferred = None
  if received:
    raise Interrupted(received[0])
