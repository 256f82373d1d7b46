"""Runs the shards of a stage: each is a pure function of its job to files, so they may run
anywhere, in any order.
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
  """Yields (i, function(jobs[i])) for every job, as they finish, showing progress.

  workers: processes beside this one; 0 runs the jobs here. The function and the jobs must pickle.
  An error in a job is raised here and stops those that have not begun. What each job made can be
  recorded at once, so that a kill loses nothing but the jobs under way.
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
  context = multiprocessing.get_context('spawn')  # fork and JAX's threads do not go together
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent
  )
  try:
    numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
    for future in concurrent.futures.as_completed(numbers):
      yield numbers.pop(future), future.result()
  except process.BrokenProcessPool as error:
    raise InputError(
      'A worker process was ended from outside, perhaps because memory ran out. Run the same '
      'command '
      'again, with fewer engine.workers if memory is short; it goes on from here.'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
  """Ends a worker when the process that started it is killed: it would wait for jobs without
  end.
  """

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
