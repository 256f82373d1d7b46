"""core/progress.py and core/engine.py."""

import os

import pytest

from clip_jax.core import engine
from clip_jax.core import progress


def test_seconds():
  assert [progress.seconds(x) for x in (0.4, 59, 60, 3599, 3600, float('inf'), float('nan'))] == [
      '0 s', '59 s', '1 min 0 s', '59 min 59 s', '1 h 0 min', 'unknown time', 'unknown time']


def test_track_yields_all():
  assert list(progress.track([3, 1], total=2, desc='x')) == [3, 1]


def _square(x):
  if x == 13:
    raise ValueError('thirteen')
  return x * x, os.getpid()


@pytest.mark.parametrize('workers', [0, 2])
def test_engine_keeps_the_order(workers):
  results = list(engine.run(_square, list(range(8)), workers=workers, desc='x', unit='job'))
  assert [value for value, _ in results] == [x * x for x in range(8)]
  assert (os.getpid() in {pid for _, pid in results}) == (workers == 0)


@pytest.mark.parametrize('workers', [0, 2])
def test_engine_raises_what_a_job_raises(workers):
  with pytest.raises(ValueError, match='thirteen'):
    list(engine.run(_square, [1, 13, 2], workers=workers, desc='x', unit='job'))
