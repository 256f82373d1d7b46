"""The locks of a work directory on object storage, where nothing ends with its process.

The object NAME.lock says who makes what. Its holder writes it again every BEAT_SECS. Another
process takes it over when it has not changed for TTL_SECS by the clock of that process alone, so
that the clocks of machines need not agree; of a dead process of its own machine, at once. Every
write names the one before (a conditional put): of several takers one succeeds, and a holder that
was silent for too long, asleep or without network, finds that it lost the lease, publishes nothing
more and ends.

Shared leases are objects in the folder NAME.shared, one a holder. Who wants a shared or an
exclusive lease writes its own first and then looks for those of the other kind, so that one of two
at the same time sees the other.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import signal
import socket
import threading
import time
from typing import Any
import uuid

from absl import logging

from clip_jax.core import interrupts, mirror, objects, processes
from clip_jax.core.errors import InputError

LOCK = mirror.LEASE
BEAT_SECS = 10.0
TTL_SECS = 60.0
_POLL_SECS = 1.0


class Busy(InputError):
  """Another process makes the product now."""


class Lease:
  """A lease that this process holds."""

  def __init__(self, at: mirror.Mirror, key: str, content: dict[str, Any], tag: str):
    self.at, self.key, self.content, self._tag = at, key, content, tag
    self._guard, self._at = threading.Lock(), time.monotonic()

  def write(self, **news: Any) -> None:
    """Writes the lease again; if another process has it, this one ends."""
    with self._guard:
      self.content = {**self.content, **news, 'beat': self.content['beat'] + 1}
      try:
        self._tag = self.at.objects.write(self.key, _bytes(self.content), if_tag=self._tag)
        self._at = time.monotonic()
      except objects.Changed:
        self._lose('another process has it now')
      except InputError as error:
        if time.monotonic() - self._at > TTL_SECS - BEAT_SECS:
          self._lose(
            f'it could not be written for {TTL_SECS - BEAT_SECS:.0f} s: {error}'.rstrip('.')
          )

  def confirm(self) -> None:
    """Writes the lease again if it is so old that another process may have it now."""
    if time.monotonic() - self._at > TTL_SECS - BEAT_SECS:
      self.write()

  def _lose(self, why: str) -> None:
    if not self.at.lost:
      self.at.lost = f'The lease {self.at.url}/{self.key} was lost, because {why}'
      logging.error('%s. This command ends; run it again.', self.at.lost)
      os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def held(
  at: mirror.Mirror, name: str, *, shared: bool, patient: bool
) -> Iterator[Callable[[str], int]]:
  """Holds a lease while the block runs; yields note(making), as locks.lock does.

  patient: watches a lease that another process has for up to TTL_SECS, to see whether it is alive;
  else it counts as alive until this process has watched it for so long over several calls.
  Raises Busy, naming the holder.
  """
  key = f'{name}.shared/{uuid.uuid4().hex}{LOCK}' if shared else name + LOCK
  lease, before = _taken(at, key, name, patient)
  try:
    with _beating(lease):
      _wait_for_others(at, name, shared, patient)

      def note(making: str) -> int:
        killed = before.get('killed', 0) + 1 if before.get('making') == making else 0
        lease.write(making=making, killed=killed)
        return killed

      yield note
  finally:  # without beats, which would miss the lease
    if not at.lost:
      with contextlib.suppress(InputError):  # without network, others wait for TTL_SECS
        at.objects.delete([key])


def _taken(at: mirror.Mirror, key: str, name: str, patient: bool) -> tuple[Lease, dict]:
  """Returns the lease, taken, and what a dead holder left in it."""
  content = {
    'host': socket.gethostname(),
    'boot': _boot(),
    'pid': os.getpid(),
    'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    'id': uuid.uuid4().hex,
    'beat': 0,
  }
  while True:
    before, tag = _wait_for(at, key, name, patient)
    with contextlib.suppress(objects.Changed):  # another one was faster
      return Lease(at, key, content, at.objects.write(key, _bytes(content), if_tag=tag)), before


def _wait_for(at: mirror.Mirror, key: str, name: str, patient: bool) -> tuple[dict, str]:
  """Returns what a dead holder left in a lease, and its tag; ({}, '') if nobody has it.

  Raises Busy if its holder is alive.
  """
  is_said = False
  while (found := at.objects.read(key)) is not None:
    content, tag = _content(found[0]), found[1]
    last, since = _seen.get((at.url, key), ('', 0.0))
    is_new = last != tag
    if is_new:
      _seen[at.url, key] = tag, time.monotonic()
    if _ended_here(content) or (not is_new and time.monotonic() - since > TTL_SECS):
      return content, tag
    if not patient or (is_new and last):  # it changed: alive
      raise Busy(
        f'{name} in {at.url} is being made by {_holder(content)} (lock: {at.url}/{key}). Wait '
        'until it ends, or stop it; then run the same command again. To share the work, start all '
        'with --config.engine.name=shared.'
      )
    if not is_said:
      logging.info(
        '%s has a lease of %s; waiting up to %.0f s to see whether it is alive.',
        name,
        _holder(content),
        TTL_SECS,
      )
      is_said = True
    interrupts.check()
    time.sleep(_POLL_SECS)
  _seen.pop((at.url, key), None)
  return {}, ''


def _wait_for_others(at: mirror.Mirror, name: str, shared: bool, patient: bool) -> None:
  """Returns when no lease of the other kind has a living holder; raises Busy if one has."""
  if shared:
    _wait_for(at, name + LOCK, name, patient)
    return
  others = sorted(at.objects.below(f'{name}.shared'))
  for other in others:
    with contextlib.suppress(Busy):
      _wait_for(at, other, name, False)  # all are watched from now on
  for other in others:
    if _wait_for(at, other, name, patient)[1]:
      at.objects.delete([other])  # nobody takes it over


_seen: dict[tuple[str, str], tuple[str, float]] = {}  # lease -> its tag, and since when it has it


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
  """Writes a lease every BEAT_SECS in a thread."""
  ended = threading.Event()

  def beat() -> None:
    while not ended.wait(BEAT_SECS):
      lease.write()

  thread = threading.Thread(target=beat, daemon=True)
  lease.at.before_writes.append(lease.confirm)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    lease.at.before_writes.remove(lease.confirm)


def _ended_here(content: dict) -> bool:
  """Returns whether the holder was a process of this machine that has ended."""
  here = content.get('host') == socket.gethostname() and content.get('boot') == _boot()
  return here and processes.is_dead(content['pid'])


def _boot() -> str:
  """Returns what names this start of this machine, '' where it is not known (containers differ)."""
  with contextlib.suppress(OSError), open('/proc/sys/kernel/random/boot_id') as f:
    return f'{f.read().strip()} {os.stat("/proc/self/ns/pid").st_ino}'
  return ''


def _holder(content: dict) -> str:
  try:
    return 'process {pid} on {host} since {time}'.format(**content)
  except KeyError:
    return 'another process'


def _content(data: bytes) -> dict:
  with contextlib.suppress(ValueError, TypeError):
    return dict(json.loads(data))
  return {}


def _bytes(content: dict) -> bytes:
  return json.dumps(content).encode()
