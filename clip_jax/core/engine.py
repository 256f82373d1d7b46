"""Runs a function over the shards of a stage, in this process or in several.

The function writes files that depend on its job alone, so jobs may run in any order and again.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures import process
import multiprocessing
import os
import threading
from typing import TypeVar

from clip_jax.core import progress
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


def _in_processes(
  function: Callable[[J], R], jobs: Sequence[J], workers: int
) -> Iterator[tuple[int, R]]:
  context = multiprocessing.get_context('spawn')  # fork is unsafe with JAX's threads
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(jobs)), mp_context=context, initializer=_exit_with_parent
  )
  try:
    numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
    for future in concurrent.futures.as_completed(numbers):
      yield numbers.pop(future), future.result()
  except process.BrokenProcessPool as error:
    raise InputError(
      'A worker process was killed, perhaps because memory ran out. Run the same command again, '
      'with fewer engine.workers if memory is short; finished shards are kept.'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
  """Makes a worker exit when its parent process is killed; otherwise it would wait forever."""

  def wait():
    parent = multiprocessing.parent_process()
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
