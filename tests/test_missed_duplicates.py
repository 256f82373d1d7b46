"""missed_duplicates.py against all pairs in a loop and against what de-duplication drops."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from test_duplicates import within_clusters

from clip_jax.similarity import kmeans, missed_duplicates

SEEDS = st.integers(0, 2**32 - 1)


def pool(rng, rows, dim=6):
  """Unit vectors, a good part of them near or exact copies of others."""
  x = rng.standard_normal((rows, dim))
  copies = rng.random(rows) < 0.5
  x[copies] = x[rng.integers(rows, size=copies.sum())]
  x += rng.choice([0, 0.1], size=(rows, 1)) * rng.standard_normal((rows, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def groups(rows, pairs):
  """Sizes of the connected groups of at least two rows, by following the pairs."""
  label = list(range(rows))
  for a, b in pairs:
    old, new = label[b], label[a]
    label = [new if each == old else each for each in label]
  return [size for size in np.unique(label, return_counts=True)[1] if size > 1]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.booleans(), st.booleans())
def test_against_all_pairs(seed, whole, ranked):
  rng = np.random.default_rng(seed)
  x, threshold = pool(rng, 150), 0.03
  usable = rng.random(150) > 0.1
  x[~usable] = np.nan  # never looked at
  priority = rng.integers(4, size=150) if ranked else None
  rows = np.flatnonzero(usable)
  sample = rows if whole else np.sort(rng.choice(rows, 40, replace=False))
  fits = [kmeans.fit(x, usable, clusters=k, seed=0) for k in (1, 3, 9)]
  keep, _ = within_clusters(x, usable, fits[-1].assignment, threshold=threshold, priority=priority)
  got = missed_duplicates.measure(
    x,
    usable,
    sample,
    [fit.centers for fit in fits],
    threshold=threshold,
    keep=keep,
    priority=priority,
    tile_rows=64,
    query_block=64,
  )
  v = np.where(usable[:, None], x, np.float16(1)).astype(np.float64)
  squares = (v * v).sum(1)
  similar = v @ v.T / np.sqrt(squares[:, None] * squares) > 1 - threshold
  pairs = [
    (i, j) for i in rows for j in rows if i < j and similar[i, j] and (i in sample or j in sample)
  ]
  place = np.empty(150, int)
  place[np.lexsort((np.arange(150), -(np.zeros(150) if priority is None else priority)))] = (
    np.arange(150)
  )
  before = {j: [i for i in rows if place[i] < place[j] and similar[i, j]] for j in sample}
  assert got.pairs == len(pairs)
  assert got.dropped_exhaustive == sum(map(bool, before.values()))
  for fit, found in zip(fits, got.clusterings):
    cluster = fit.assignment
    assert found.clusters == len(fit.centers)
    assert found.found == sum(cluster[i] == cluster[j] for i, j in pairs)
    assert found.dropped == sum(any(cluster[i] == cluster[j] for i in before[j]) for j in sample)
    if pairs:
      assert found.recall == found.found / len(pairs)
      assert found.low <= found.recall <= found.high
    assert found.precision == 1 or not found.dropped
  assert got.clusterings[0].found == got.pairs  # one cluster is exhaustive
  assert got.clusterings[-1].dropped == (~keep[sample]).sum()
  want = groups(150, pairs)
  assert got.components == len(want)
  assert got.sizes == {size: want.count(size) for size in set(want)}
  assert got.through_dropped == sum(
    not keep[j] and bool(before[j]) and not keep[before[j]].any() for j in sample
  )


def test_a_row_lost_through_a_chain_is_counted():
  angle = np.deg2rad([0, 10, 20])  # neighbours are similar, the outer two are not
  x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float16)
  rows, threshold = np.ones(3, bool), 1 - np.cos(np.deg2rad(15))
  keep, _ = within_clusters(x, rows, np.zeros(3, np.int32), threshold=threshold)
  got = missed_duplicates.measure(
    x, rows, np.arange(3), [x[:1].astype(np.float32)], threshold=threshold, keep=keep
  )
  assert (got.pairs, got.through_dropped, got.sizes) == (2, 1, {3: 1})


def test_groups_stay_the_same_however_often_pairs_are_reduced(monkeypatch):
  x = pool(np.random.default_rng(0), 300)
  args = x, np.ones(300, bool), np.arange(0, 300, 2), [x[:1].astype(np.float32)]
  want = missed_duplicates.measure(*args, threshold=0.03, keep=np.arange(300) % 3 > 0)
  assert want.through_dropped
  monkeypatch.setattr(missed_duplicates, 'EDGES', 3)
  got = missed_duplicates.measure(*args, threshold=0.03, keep=np.arange(300) % 3 > 0, tile_rows=64)
  assert repr(got) == repr(want)


def test_no_pair_is_no_recall():
  x = np.eye(8, dtype=np.float16)
  got = missed_duplicates.measure(
    x,
    np.ones(8, bool),
    np.arange(4),
    [x[:2].astype(np.float32)],
    threshold=0.1,
    keep=np.ones(8, bool),
  )
  (found,) = got.clusterings
  assert got.pairs == 0 and np.isnan([found.recall, found.low, found.high, found.precision]).all()


def test_many_copies_of_one_row_say_little():
  """A row with 99 copies has 99 pairs, and was drawn once."""
  x = np.repeat(np.float16([[0.6, 0.8]]), 100, axis=0)
  for rows, low in ((1, 0.2065), (100, 0.9630)):
    got = missed_duplicates.measure(
      x,
      np.ones(100, bool),
      np.arange(rows),
      [x[:1].astype(np.float32)],
      threshold=0.1,
      keep=np.arange(100) == 0,
    )
    assert got.pairs == (99 if rows == 1 else 4950) and got.clusterings[0].recall == 1
    assert got.clusterings[0].low == pytest.approx(low, abs=1e-4)
    assert got.dropped_exhaustive == got.clusterings[0].dropped == rows - 1


@pytest.mark.parametrize(
  'share, n, low, high', [(0.5, 100, 0.4038, 0.5962), (1, 10, 0.7225, 1), (0, 10, 0, 0.2775)]
)
def test_wilson(share, n, low, high):  # published values
  assert missed_duplicates.wilson(share, n) == (
    pytest.approx(low, abs=1e-4),
    pytest.approx(high, abs=1e-4),
  )
