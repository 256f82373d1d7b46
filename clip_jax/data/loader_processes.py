"""Elements made by processes beside this one, in order; the big arrays come through shared memory.

Grain's own processes were tried: one that is killed ends the run, and where this process is killed
they stay for ever. Here a process that dies is replaced and its elements, pure functions of their
numbers, are made again; and as each process reads its jobs from a pipe whose other end only this
process holds, all end when it ends, however that happens. They also begin in 0.2 seconds, not 1.1,
and take 65 MB each, not 200, as they import neither Grain nor JAX (but for over a million samples).
"""

from collections.abc import Callable, Generator, Iterator
from concurrent import futures
import contextlib
import multiprocessing
from multiprocessing import connection, resource_tracker, util
import os
import pickle
import signal
import threading
import traceback
from typing import Any

from absl import logging
import numpy as np

from clip_jax.core.errors import InputError

_ATTEMPTS = 3  # deaths of a process one after another, with no element made, that end the run
_DYING_SECS = 5.0  # that a process may take from the end of its pipe to its own
_WAITING = 2  # elements of a process that wait for one of its threads, or to be taken
_ALIGNED = 64  # bytes: arrays in a slot begin at multiples of it
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def elements(
  make: Callable[[int], Any], count: int, *, processes: int, threads: int, slot_bytes: int
) -> Generator[Any]:
  """Yields make(0), make(1), ..., made ahead by processes with so many threads each.

  `make` must pickle. An element's arrays lie in shared memory, slot_bytes for each element; they
  may be used until the next element is asked for. An error of make(k) is raised in the place of
  element k. Raises InputError where processes keep dying.
  """
  workers: list[_Worker] = []
  # At the end of the program, before multiprocessing waits for processes that know of no end.
  closing = util.Finalize(None, _close, (workers,), exitpriority=10)
  try:
    for number in range(processes):
      workers.append(_Worker(make, max(threads, 1), slot_bytes, number))  # noqa: PERF401 (_close sees each)
    made: dict[int, tuple[_Worker, int, Any]] = {}
    asked = 0
    for k in range(count):
      while asked < count and any(worker.free for worker in workers):
        max(workers, key=lambda worker: len(worker.free)).give(asked)  # which has least to do
        asked += 1
      while k not in made:
        heard = connection.wait(
          [worker.connection for worker in workers]
        )  # one has made something, or died
        for worker in [worker for worker in workers if worker.connection in heard]:
          for job, slot, element in worker.receive():
            made[job] = worker, slot, element
      worker, slot, element = made.pop(k)
      if isinstance(element, BaseException):
        raise element
      yield element
      del element
      worker.free.append(slot)
  finally:
    closing()


def _close(workers: list['_Worker']) -> None:
  for worker in workers:  # which alone would end them, should a signal interrupt what follows
    worker.connection.close()
  for worker in workers:
    worker.close()


class _Worker:
  """This process's side of one other process: its jobs, its slots, and a new start if it dies."""

  def __init__(self, make: Callable[[int], Any], threads: int, slot_bytes: int, number: int):
    # Not fork, which does not go together with JAX's threads.
    self._context = multiprocessing.get_context('spawn')
    self._make, self._threads, self._number = make, threads, number
    # Memory without a name: nothing is left behind, whichever process is killed.
    self._slots = [self._context.RawArray('b', slot_bytes) for _ in range(threads + _WAITING)]
    self.free = list(range(len(self._slots)))
    self._jobs: dict[int, int] = {}  # element -> slot, of those that are being made
    self._deaths = 0
    self._process = None
    self._start()

  def _start(self) -> None:
    self.connection, theirs = self._context.Pipe()
    arguments = theirs, self._make, self._slots, self._threads
    self._process = self._context.Process(
      target=_work, args=arguments, daemon=True, name=f'loader-{self._number}'
    )
    with _quiet_start():
      self._process.start()
    theirs.close()

  def give(self, k: int) -> None:
    slot = self.free.pop()
    self._jobs[k] = slot
    with contextlib.suppress(OSError):  # it has died: `receive` finds that out
      self.connection.send((k, slot))

  def receive(self) -> list[tuple[int, int, Any]]:
    """Returns (element's number, slot, element or exception) of one that was made, if any was."""
    try:
      k, data, sizes = self.connection.recv()
    except (EOFError, OSError):
      self._replace()
      return []
    self._deaths = 0
    slot = self._jobs.pop(k)
    parts, at = [], 0
    for size in sizes:
      parts.append(_memory(self._slots[slot])[at : at + size])
      at += _padded(size)
    return [(k, slot, pickle.loads(data, buffers=parts))]

  def _replace(self) -> None:
    """Starts a new process in place of one that died, with the same jobs."""
    pid = self._process.pid
    self._process.join(_DYING_SECS)  # its own status is wanted, not that of the kill
    self.close()
    status = self._process.exitcode
    names = {number.value: number.name for number in signal.Signals}
    how = names.get(-status, f'signal {-status}') if status < 0 else f'status {status}'
    self._deaths += 1
    if self._deaths >= _ATTEMPTS:
      advice = (
        'Most likely memory runs out: set fewer train.loader_processes or a smaller train.cache_mb.'
        if status == -signal.SIGKILL
        else 'Set train.loader_processes=0 to see what fails.'
      )
      raise InputError(
        f'Loader process {self._number} ended with {how} {self._deaths} times in a '
        f'row, with nothing made. {advice}'
      )
    why = ' (does memory run out?)' if status == -signal.SIGKILL else ''
    logging.warning(
      'Loader process %d (pid %d) ended with %s%s; a new one makes its %d elements again.',
      self._number,
      pid,
      how,
      why,
      len(self._jobs),
    )
    self._start()
    for job in self._jobs.items():
      with contextlib.suppress(OSError):
        self.connection.send(job)

  def close(self) -> None:
    """Ends the process at once: it writes nothing."""
    self.connection.close()
    self._process.kill()
    self._process.join()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
  """A process that is started inside never hears Ctrl-C or SIGTERM, and JAX in it sees CPUs only.

  A signal to all processes of a terminal or a job is for this one to answer, which ends the others.
  """
  resource_tracker.ensure_running()  # or its own start would unblock the signals
  platforms = os.environ.get('JAX_PLATFORMS')
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  try:
    yield
  finally:
    if platforms is None:
      del os.environ['JAX_PLATFORMS']
    else:
      os.environ['JAX_PLATFORMS'] = platforms
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work(
  jobs: connection.Connection, make: Callable[[int], Any], slots: list[Any], threads: int
) -> None:
  """The life of a process: makes what it is asked for, until nobody asks any more."""
  lock = threading.Lock()

  def one(k: int, slot: int) -> None:
    data, sizes = _packed(make, k, _memory(slots[slot]))
    with lock, contextlib.suppress(OSError):  # nobody listens any more: the loop below ends
      jobs.send((k, data, sizes))

  pool = futures.ThreadPoolExecutor(threads)
  try:
    while True:
      pool.submit(one, *jobs.recv())
  except (EOFError, OSError):
    os._exit(0)  # without waiting for elements that nobody wants


def _packed(make: Callable[[int], Any], k: int, slot: memoryview) -> tuple[bytes, list[int]]:
  """Returns make(k) as a pickle without its arrays, which go into the slot, and their sizes."""
  try:
    element, buffers = make(k), []
    data = pickle.dumps(element, 5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    if sum(_padded(part.nbytes) for part in parts) > len(slot):
      return pickle.dumps(element, 5), []
    at = 0
    for part in parts:
      slot[at : at + part.nbytes] = part
      at += _padded(part.nbytes)
    return data, [part.nbytes for part in parts]
  except BaseException as error:  # whatever it is, it is raised where the elements are asked for
    return _packed_error(error), []


def _packed_error(error: BaseException) -> bytes:
  """A pickle of an error, with the traceback that only its own process knows."""
  text = ''.join(traceback.format_exception(error))
  try:
    error.add_note(text)
    data = pickle.dumps(error)
    pickle.loads(data)
    return data
  except Exception:  # an exception class may refuse either way in any manner
    return pickle.dumps(RuntimeError(text))


def _memory(slot: Any) -> memoryview:
  return memoryview(np.frombuffer(slot, np.uint8))


def _padded(size: int) -> int:
  return -(-size // _ALIGNED) * _ALIGNED
