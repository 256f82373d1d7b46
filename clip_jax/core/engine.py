"""Runs a function over the parts of a stage: in this process, in several, or in threads.

The function writes files that depend on its job alone, so jobs may run in any order and again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
from concurrent.futures import process
import multiprocessing
from multiprocessing import resource_tracker
import os
import signal
import threading
from typing import TypeVar

from clip_jax.core import interrupts, progress
from clip_jax.core.errors import InputError

J = TypeVar('J')
R = TypeVar('R')


def finished(
  function: Callable[[J], R], jobs: Sequence[J], *, workers: int, desc: str, unit: str
) -> Iterator[tuple[int, R]]:
  """Yields (i, function(jobs[i])) as soon as each job ends, in any order, and shows progress.

  The caller can record each result at once, so a kill loses only the running jobs. If a job raises,
  the running jobs end and their results are lost, the others are cancelled, and the error is
  raised here. A failed job is not started again (remote reads have retries: data/storage.py).

  Args:
    function: must pickle, as the jobs must.
    jobs: the arguments.
    workers: worker processes; 0 runs the jobs in this process.
    desc: name of the work in the progress bar.
    unit: name of a job there, in the singular.

  Raises:
    InputError: a worker process was killed.
  """
  if not workers or len(jobs) < 2:
    yield from progress.track(enumerate(map(function, jobs)), total=len(jobs), desc=desc, unit=unit)
    return
  yield from progress.track(
    _in_processes(function, jobs, workers), total=len(jobs), desc=desc, unit=unit
  )


def in_threads(function: Callable[[J], R], jobs: Iterable[J], *, at_once: int) -> Iterator[R]:
  """Yields function(job) as soon as each job ends, in any order; up to `at_once` run together.

  For jobs that spend their time outside of Python. If a job raises, or a signal arrives, no other
  job starts, the running ones end, and the error is raised here. A second signal ends the process.
  """
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    running = set()
    try:
      for job in jobs:
        running.add(pool.submit(function, job))
        if len(running) == at_once:
          done, running = concurrent.futures.wait(running, return_when='FIRST_COMPLETED')
          yield from (future.result() for future in done)
      yield from (future.result() for future in concurrent.futures.as_completed(running))
    except interrupts.Interrupted as signal:
      if interrupts.is_urgent():
        os._exit(signal.status)  # the threads may be in the middle of a long step
      raise


def _in_processes(
  function: Callable[[J], R], jobs: Sequence[J], workers: int
) -> Iterator[tuple[int, R]]:
  """Runs jobs in processes.

  A terminal or a batch system sends signals to all processes: workers block them and end their
  jobs, and at most the next one in the queue. At a second signal, this process kills them.
  """
  context = multiprocessing.get_context('spawn')  # fork is unsafe with JAX's threads
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(jobs)), mp_context=context, initializer=_exit_with_parent
  )
  try:
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
      numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for future in concurrent.futures.as_completed(numbers):
      yield numbers.pop(future), future.result()
  except process.BrokenProcessPool as error:
    raise InputError(
      'A worker process was killed, perhaps because memory ran out. Run the same command again, '
      'with fewer engine.workers if memory is short; finished shards are kept.'
    ) from error
  finally:
    try:
      pool.shutdown(cancel_futures=True)
    except interrupts.Interrupted:
      for worker in multiprocessing.active_children():
        worker.kill()
      raise


def _exit_with_parent() -> None:
  """Makes a worker exit when its parent process is killed; otherwise it would wait forever."""

  def wait():
    parent = multiprocessing.parent_process()
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
