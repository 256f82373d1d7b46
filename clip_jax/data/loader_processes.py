"""Computes elements in worker processes, in order; large arrays come through shared memory.

Grain's own worker processes (mp_prefetch) were measured again with Grain 0.2.18, the newest release
on 2026-11-29, whose batches are made in shared memory: the same samples of 96 px to 64 px, two
workers on two busy cores, interleaved, five repeats. Time of the workers' processors for a sample:
149 us here, 170 with Grain and an element per run, 222 with an element per sample and Grain's
batches; of this process 4, 11 and 12 us. Samples a second by the minimum of the repeats: 1, 0.89
and 0.82. A worker takes 68 MB (PSS) here and 149 with Grain, because it imports Grain and JAX;
here it does so only for more than a million samples.

Two faults are the larger reason, and both were seen again: the death of a worker ends Grain's run,
and if this process is killed, Grain's workers run on and their shared memory stays. Here a dead
worker is replaced and its elements, pure functions of their numbers, are computed again. Each
worker reads its jobs from a pipe whose other end only this process holds, so all workers end with
this process.
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

_ATTEMPTS = 3  # deaths of a worker in a row, without an element between, that end the run
_DYING_SECS = 5.0  # wait for a worker to exit after its pipe was closed
_WAITING = 2  # slots of a worker beyond its threads, for queued or finished elements
_ALIGNED = 64  # bytes; alignment of arrays in a slot
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def elements(
  make: Callable[[int], Any], count: int, *, processes: int, threads: int, slot_bytes: int
) -> Generator[Any]:
  """Yields make(0), make(1), ..., prefetched by worker processes with `threads` threads each.

  `make` must be picklable. The arrays of an element lie in shared memory, slot_bytes for each
  element, and are valid until the next element is requested. An error of make(k) is raised in place
  of element k. Raises InputError if workers die repeatedly.
  """
  workers: list[_Worker] = []
  # Runs at exit, before multiprocessing would wait for the workers for ever.
  closing = util.Finalize(None, _close_workers, (workers,), exitpriority=10)
  try:
    for number in range(processes):
      workers.append(_Worker(make, max(threads, 1), slot_bytes, number))  # noqa: PERF401 (_close_workers sees each)
    finished: dict[int, tuple[_Worker, int, Any]] = {}
    requested = 0
    for k in range(count):
      while requested < count and any(worker.free for worker in workers):
        max(workers, key=lambda worker: len(worker.free)).request(requested)  # the least busy one
        requested += 1
      while k not in finished:
        # Ready: a worker has finished an element, or died.
        ready = connection.wait([worker.connection for worker in workers])
        for worker in [worker for worker in workers if worker.connection in ready]:
          for job, slot, element in worker.receive_element():
            finished[job] = worker, slot, element
      worker, slot, element = finished.pop(k)
      if isinstance(element, BaseException):
        raise element
      yield element
      del element
      worker.free.append(slot)
  finally:
    closing()


def _close_workers(workers: list['_Worker']) -> None:
  for worker in workers:  # first all pipes: this alone ends the workers if a signal interrupts us
    worker.connection.close()
  for worker in workers:
    worker.close()


class _Worker:
  """Controls one worker process from this process: its jobs, its slots, and its restart."""

  def __init__(self, make: Callable[[int], Any], threads: int, slot_bytes: int, number: int):
    # Not fork, which is unsafe with JAX's threads.
    self._context = multiprocessing.get_context('spawn')
    self._make, self._threads, self._number = make, threads, number
    # Unnamed shared memory: the system frees it even if a process is killed.
    self._slots = [self._context.RawArray('b', slot_bytes) for _ in range(threads + _WAITING)]
    self.free = list(range(len(self._slots)))
    self._jobs: dict[int, int] = {}  # element -> slot, of pending elements
    self._deaths = 0
    self._process: Any = None  # of the context's own class
    self._start()

  def _start(self) -> None:
    self.connection, worker_end = self._context.Pipe()
    arguments = worker_end, self._make, self._slots, self._threads
    self._process = self._context.Process(
      target=_worker_loop, args=arguments, daemon=True, name=f'loader-{self._number}'
    )
    with _quiet_start():
      self._process.start()
    worker_end.close()

  def request(self, k: int) -> None:
    slot = self.free.pop()
    self._jobs[k] = slot
    with contextlib.suppress(OSError):  # the worker died; `receive` handles that
      self.connection.send((k, slot))

  def receive_element(self) -> list[tuple[int, int, Any]]:
    """Returns [(number, slot, element or exception)] of a finished element; [] if it died."""
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
    """Replaces a dead process by a new one with the same jobs."""
    pid = self._process.pid
    self._process.join(_DYING_SECS)  # to get its own exit status, not that of the kill below
    self.close()
    status = self._process.exitcode or 0
    names = {number.value: number.name for number in signal.Signals}
    how = names.get(-status, f'signal {-status}') if status < 0 else f'status {status}'
    self._deaths += 1
    if self._deaths >= _ATTEMPTS:
      advice = (
        'Probably memory ran out: set fewer train.loader_processes or a smaller train.cache_mb.'
        if status == -signal.SIGKILL
        else 'Set train.loader_processes=0 to see the error.'
      )
      raise InputError(
        f'Loader process {self._number} ended with {how} {self._deaths} times in a '
        f'row, without a result. {advice}'
      )
    why = ' (probably out of memory)' if status == -signal.SIGKILL else ''
    logging.warning(
      'Loader process %d (pid %d) ended with %s%s; a new one computes its %d elements again.',
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
    """Kills the process at once; it writes no files."""
    self.connection.close()
    self._process.kill()
    self._process.join()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
  """Processes started inside ignore Ctrl-C and SIGTERM, and JAX in them uses CPUs only.

  A terminal or a job sends signals to all processes; this process handles them and ends the others.
  """
  resource_tracker.ensure_running()  # started later, it would unblock the signals
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


def _worker_loop(
  jobs: connection.Connection, make: Callable[[int], Any], slots: list[Any], threads: int
) -> None:
  """The main loop of a worker process: computes requested elements until its pipe is closed."""
  lock = threading.Lock()

  def compute_into_slot(k: int, slot: int) -> None:
    data, sizes = _packed(make, k, _memory(slots[slot]))
    with lock, contextlib.suppress(OSError):  # the pipe is closed; the loop below ends
      jobs.send((k, data, sizes))

  pool = futures.ThreadPoolExecutor(threads)
  try:
    while True:
      pool.submit(compute_into_slot, *jobs.recv())
  except (EOFError, OSError):
    os._exit(0)  # without waiting for pending elements


def _packed(make: Callable[[int], Any], k: int, slot: memoryview) -> tuple[bytes, list[int]]:
  """Returns the pickle of make(k) and the sizes of its arrays, which are copied to the slot."""
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
  except BaseException as error:  # raised again in the process that requested the element
    return _packed_error(error), []


def _packed_error(error: BaseException) -> bytes:
  """Returns a pickle of an error, with this process's traceback as a note."""
  text = ''.join(traceback.format_exception(error))
  try:
    error.add_note(text)
    data = pickle.dumps(error)
    pickle.loads(data)
    return data
  except Exception:  # an exception may fail to pickle or to unpickle, with any error
    return pickle.dumps(RuntimeError(text))


def _memory(slot: Any) -> memoryview:
  return np.frombuffer(slot, np.uint8).data


def _padded(size: int) -> int:
  return -(-size // _ALIGNED) * _ALIGNED
