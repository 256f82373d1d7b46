"""Runs the shards of a stage: each is a pure function of its job to files, so they may run anywhere, in any order."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from clip_jax.core import progress

J = TypeVar('J')
R = TypeVar('R')


def run(function: Callable[[J], R], jobs: Sequence[J], *, workers: int, desc: str, unit: str) -> Iterator[R]:
  """Yields function(job) for every job, in the order of the jobs, showing progress.

  workers: processes beside this one; 0 runs the jobs here. The function and the jobs must pickle. An
  error in a job is raised here and stops those that have not begun.
  """
  if not workers or len(jobs) < 2:
    yield from progress.track(map(function, jobs), total=len(jobs), desc=desc, unit=unit)
    return
  context = multiprocessing.get_context('spawn')  # fork and JAX's threads do not go together
  pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)
  try:
    yield from progress.track(pool.map(function, jobs), total=len(jobs), desc=desc, unit=unit)
  finally:
    pool.shutdown(cancel_futures=True)
