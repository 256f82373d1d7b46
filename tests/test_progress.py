"""core/progress.py."""

from clip_jax.core import progress


def test_seconds():
  assert [progress.seconds(x) for x in (0.4, 59, 60, 3599, 3600, float('inf'), float('nan'))] == [
    '0 s',
    '59 s',
    '1 min 0 s',
    '59 min 59 s',
    '1 h 0 min',
    'unknown time',
    'unknown time',
  ]


def test_track_yields_all():
  assert list(progress.track([3, 1], total=2, desc='x')) == [3, 1]


def test_sizes_and_counts_in_words():
  assert [progress.size(n) for n in (0, 999, 6200, 1.5e6, 2e9, 3.25e12)] == [
    '0.0 kB',
    '1.0 kB',
    '6.2 kB',
    '1.5 MB',
    '2.0 GB',
    '3.2 TB',
  ]
  assert [progress.count_with_noun(n, 'shard') for n in (0, 1, 2000)] == [
    '0 shards',
    '1 shard',
    '2,000 shards',
  ]
