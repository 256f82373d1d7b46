"""core/progress.py."""

from clip_jax.core import progress


def test_seconds():
  assert [progress.seconds(x) for x in (0.4, 59, 60, 3599, 3600, float('inf'), float('nan'))] == [
      '0 s', '59 s', '1 min 0 s', '59 min 59 s', '1 h 0 min', 'unknown time', 'unknown time']


def test_track_yields_all():
  assert list(progress.track([3, 1], total=2, desc='x')) == [3, 1]
