"""Locks of a work directory: files that a process holds while it makes a product.

They are kernel locks (flock): they end with their process, even if it is killed. On object storage
they are leases (core/leases.py).
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import json
import os
import socket
import time
from typing import Any

from clip_jax.core import interrupts, leases, mirror
from clip_jax.core.errors import InputError
from clip_jax.core.leases import LOCK, Busy

REPLACED = 'replaced'  # products that --redo moved away, kept until they are made again


@contextlib.contextmanager
def lock(
  workdir: str, name: str, shared: bool = False, patient: bool = True
) -> Iterator[Callable[[str], int]]:
  """Holds the lock WORKDIR/<name>.lock while the block runs; yields note(making).

  note writes into the file what is made now, and returns how many processes in a row were killed
  while they made just that: a killed process leaves the file, all others remove it.

  It is a kernel lock (flock): it is released when the process ends, even by a kill, and child
  processes do not inherit it. shared: other processes may have it, too, if theirs is shared.
  patient: of a lease, see leases.held. Raises Busy, naming the holder, if another process has it.
  """
  if (at := mirror.of(workdir)) is not None:
    with leases.held(at, name, shared=shared, patient=patient) as noted:
      yield noted
    return
  path = os.path.join(workdir, name + LOCK)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  descriptor = None
  try:
    with interrupts.together():
      descriptor = _flock(path, shared)
      if descriptor is not None:
        _held.add(descriptor)
    if descriptor is None:
      raise Busy(
        f'{name} in {workdir} is being made by {_holder(path)} (lock: {path}). Wait until it ends, '
        'or stop it; then run the same command again. To share the work, start all with '
        '--config.engine.name=shared.'
      )
    holder = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    }
    before = _read(path)  # of a killed process
    _write(descriptor, before | holder)

    def note(making: str) -> int:
      killed = before.get('killed', 0) + 1 if before.get('making') == making else 0
      _write(descriptor, {**holder, 'making': making, 'killed': killed})
      return killed

    yield note
  finally:
    if descriptor in _held:  # not so in a forked child, which does not hold the lock
      with interrupts.together():
        _held.remove(descriptor)
        if not shared or _is_alone(descriptor):
          _remove_lock_file(path, descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def locks(workdir: str, names: Iterable[str]) -> Iterator[None]:
  """Holds several locks, also while `move_aside` moves their folders; raises as `lock` does."""
  names = sorted(set(names))
  with contextlib.ExitStack() as stack:
    for name in names:
      stack.enter_context(lock(workdir, name))
    try:
      yield
    finally:
      for name in names:
        with contextlib.suppress(OSError):  # it was not moved
          os.unlink(os.path.join(workdir, REPLACED, name + LOCK))


def is_taken(workdir: str, name: str) -> bool:
  """Returns whether a lock's file exists."""
  if (at := mirror.of(workdir)) is not None:
    return at.objects.read(name + LOCK) is not None
  return os.path.exists(os.path.join(workdir, name + LOCK))


def lock_files(workdir: str, folder: str) -> list[str]:
  """Returns the names of the locks whose files exist below a folder of the work directory.

  A file without a holder is of a killed process.
  """
  if (at := mirror.of(workdir)) is not None:
    every = at.objects.below(at.name(os.path.join(workdir, folder)))
    return [name.removesuffix(LOCK) for name in every if name.endswith(LOCK)]
  return [
    os.path.relpath(os.path.join(parent, name), workdir).removesuffix(LOCK)
    for parent, _, names in os.walk(os.path.join(workdir, folder))
    for name in names
    if name.endswith(LOCK)
  ]


_held: set[int] = set()  # file descriptors of the locks that this process holds


def _let_go() -> None:
  """Closes the locks in a forked child: otherwise it would hold them after its parent's end.

  Programs that are started (exec) do not get them, because they are opened with O_CLOEXEC.
  """
  while _held:
    os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _remove_lock_file(path: str, descriptor: int) -> None:
  """Removes a held lock's file, unless --redo moved it away and another process made a new one.

  It is removed before the lock is released: a process that opens the path later gets a new file.
  """
  with contextlib.suppress(FileNotFoundError):
    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
      os.unlink(path)


def _flock(path: str, shared: bool) -> int | None:
  """Returns a locked file descriptor of `path`, or None if another process has the lock."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
      fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
          return descriptor
      os.close(descriptor)  # the previous holder removed the file after it was opened here: retry
    except BlockingIOError:
      os.close(descriptor)
      return None
    except OSError as error:
      os.close(descriptor)
      raise InputError(
        f'{path} cannot be locked ({error.strerror}): the file system has no locks (flock). Choose '
        'a --workdir on another disk, or mount this one with locks.'
      ) from error


def _is_alone(descriptor: int) -> bool:
  """Returns whether a shared lock has no other holder; it is no longer shared then."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _holder(path: str) -> str:
  """Returns who holds a lock, in words."""
  try:
    return 'process {pid} on {host} since {time}'.format(**_read(path))
  except KeyError:  # it has ended, or is writing the file
    return 'another process'


def _read(path: str) -> dict[str, Any]:
  """Returns what is in a lock's file, {} if that is nothing whole."""
  try:
    with open(path) as f:
      return dict(json.load(f))
  except (OSError, ValueError, TypeError):
    return {}


def _write(descriptor: int, content: dict[str, Any]) -> None:
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, json.dumps(content).encode(), 0)
