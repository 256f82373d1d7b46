"""duplicates.py against the definition, written out pair by pair in exact arithmetic."""

from by_number import ByNumber
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.similarity import duplicates

SEEDS = st.integers(0, 2**32 - 1)


def clustered(rng, rows, dim=6, spread=0.3):
  """Unit vectors around three centres, a third of them exact copies of another."""
  centers = rng.standard_normal((3, dim))
  assignment = rng.integers(3, size=rows).astype(np.int32)
  x = centers[assignment] + spread * rng.standard_normal((rows, dim))
  x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
  copies = rng.random(rows) < 0.3
  x[copies] = x[rng.integers(rows, size=copies.sum())]
  return x, assignment


def within_clusters(x, usable, assignment, **kwargs):
  """What all blocks lose together: keep [N] bool, duplicate_of [N] int64."""
  keep, duplicate_of = np.array(usable), np.full(len(usable), -1)
  for part in duplicates.dropped(x, usable, assignment, **kwargs):
    keep[part.rows], duplicate_of[part.rows] = False, part.duplicate_of
  return keep, duplicate_of


def cosines(x):  # [n, n] float64: the dots are exact, so any machine rounds alike
  x = x.astype(np.float64)
  squares = (x * x).sum(1)
  return (x @ x.T) / np.sqrt(squares[:, None] * squares)


def by_definition(x, usable, assignment, threshold):
  similarity = cosines(np.where(usable[:, None], x, np.float16(1)))
  keep, duplicate_of = usable.copy(), np.full(len(x), -1)
  for j in np.flatnonzero(usable):
    earlier = [i for i in range(j) if usable[i] and assignment[i] == assignment[j]]
    best = max(earlier, key=lambda i: (similarity[i, j], -i), default=None)
    if best is not None and similarity[best, j] > 1 - threshold:
      keep[j], duplicate_of[j] = False, best
  return keep, duplicate_of


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 64, 65, 200]), st.sampled_from([0.124, 0.01, 0.5]))
def test_rule_in_blocks(seed, rows, threshold):
  rng = np.random.default_rng(seed)
  x, assignment = clustered(rng, rows)
  usable = rng.random(rows) > 0.1
  assignment[~usable], x[~usable] = -1, np.nan  # never looked at
  keep, duplicate_of = within_clusters(x, usable, assignment, threshold=threshold, block_rows=64)
  want = by_definition(x, usable, assignment, threshold)
  assert np.array_equal(keep, want[0]) and np.array_equal(duplicate_of, want[1])
  assert keep.dtype == bool and duplicate_of.dtype == np.int64


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_pairs_at_the_threshold_are_decided_exactly(seed):
  """The cut is some row's highest cosine, or a float64 step beside it: float32 cannot tell."""
  rng = np.random.default_rng(seed)
  x, assignment = clustered(rng, 60, spread=0.1)
  assignment[:] = 0
  row = rng.integers(1, 60)
  similarity = cosines(x)[row, :row].max()
  threshold = 1 - np.nextafter(similarity, rng.choice([-9, similarity, 9]))
  got = within_clusters(x, np.ones(60, bool), assignment, threshold=threshold)
  want = by_definition(x, np.ones(60, bool), assignment, threshold)
  assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


def test_norms_are_divided_out():
  """0.96 long and 3 % apart: the plain dot product would miss it, and find itself too small."""
  x = np.float16([[0.96, 0], [0.96, 0.03], [0, 1]])
  keep, duplicate_of = within_clusters(x, np.ones(3, bool), np.zeros(3, np.int32), threshold=0.05)
  assert keep.tolist() == [True, False, True] and duplicate_of.tolist() == [-1, 0, -1]


def test_dropped_rows_still_drop_others():
  angle = np.deg2rad([0, 10, 20])  # neighbours are similar, the outer two are not
  x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float16)
  keep, duplicate_of = within_clusters(
    x, np.ones(3, bool), np.zeros(3, np.int32), threshold=1 - np.cos(np.deg2rad(15))
  )
  assert keep.tolist() == [True, False, False] and duplicate_of.tolist() == [-1, 0, 1]


def test_block_size_and_shards_change_nothing():
  rng = np.random.default_rng(0)
  x, assignment = clustered(rng, 700, dim=96, spread=0.5)
  usable = rng.random(700) > 0.1
  want = within_clusters(x, usable, assignment, threshold=0.124)
  for rows, block in [(x, 64), (ByNumber(x), 100)]:
    got = within_clusters(rows, usable, assignment, threshold=0.124, block_rows=block)
    assert np.array_equal(want[0], got[0]) and np.array_equal(want[1], got[1])


def test_a_cluster_of_copies_keeps_the_first():
  x = np.repeat(np.float16([[0.6, 0.8]]), 500, axis=0)
  keep, duplicate_of = within_clusters(
    x, np.ones(500, bool), np.zeros(500, np.int32), threshold=0.124, block_rows=128
  )
  assert keep.tolist() == [True] + 499 * [False]
  assert (duplicate_of[1:] == 0).all()


def test_bad_input():
  x = np.float16([[1, 0], [0, 3]])
  with pytest.raises(InputError, match='shard 2: row 1 '):
    within_clusters(x, np.ones(2, bool), np.zeros(2, np.int32), threshold=0.1, name='shard 2')
  with pytest.raises(ValueError, match='agree in N'):
    within_clusters(x, np.ones(2, bool), np.zeros(3, np.int32), threshold=0.1)
  keep, _ = within_clusters(x, np.zeros(2, bool), np.zeros(2, np.int32), threshold=0.1)
  assert not keep.any()
