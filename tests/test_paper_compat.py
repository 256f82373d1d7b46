"""paper_compat.py against the published way itself: the top k of each query and chunk, then the
threshold.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.similarity import paper_compat


def unit(rng, rows, dim=8):
  x = rng.standard_normal((rows, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def brute_force(x, queries, thresholds, top_k, chunk_rows):
  """Returns (rows over a threshold, those of them that no top k holds), by the published steps."""
  over = missed = 0
  for start in range(0, len(x), chunk_rows):
    part = x[start : start + chunk_rows].astype(np.float64)
    similarity = queries.astype(np.float64) @ part.T  # exact
    dropped = np.zeros(len(part), bool)
    for one, threshold in zip(similarity, thresholds):
      top = np.argsort(-one, kind='stable')[:top_k]
      dropped[top[one[top] > threshold]] = True
    exact = (similarity > thresholds[:, None]).any(0)
    over += exact.sum()
    missed += (exact & ~dropped).sum()
  return over, missed


@settings(deadline=None, max_examples=25)
@given(
  seed=st.integers(0, 999),
  rows=st.integers(1, 120),
  queries=st.integers(1, 5),
  top_k=st.integers(1, 12),
  chunk_rows=st.integers(7, 90),
  shard=st.integers(1, 60),
  spread=st.floats(-0.6, 0.6),
)
def test_as_many_as_by_brute_force(seed, rows, queries, top_k, chunk_rows, shard, spread):
  rng = np.random.default_rng(seed)
  x, q = unit(rng, rows), unit(rng, queries)
  x[rng.integers(0, rows, rows // 3)] = x[0]  # ties
  thresholds = rng.uniform(spread, 0.9, queries)
  flagged = np.flatnonzero((x.astype(np.float64) @ q.astype(np.float64).T > thresholds).any(1))
  parts = [
    (flagged[(flagged >= i) & (flagged < i + shard)], min(i + shard, rows))
    for i in range(0, rows, shard)
  ]
  chunks = list(paper_compat.regroup_rows(parts, chunk_rows))
  assert sum(map(len, chunks)) == len(flagged) and all(
    len(set(c // chunk_rows)) == 1 for c in chunks
  )
  found = sum(paper_compat.count_missed(x, chunk, q, thresholds, top_k) for chunk in chunks)
  assert (len(flagged), found) == brute_force(x, q, thresholds, top_k, chunk_rows)


def test_few_rows_need_no_vectors():
  class Never:
    def __getitem__(self, rows):
      raise AssertionError('read')

  q = unit(np.random.default_rng(0), 3)
  assert paper_compat.count_missed(Never(), np.arange(20), q, np.zeros(3), 20) == 0
  with pytest.raises(AssertionError, match='read'):
    paper_compat.count_missed(Never(), np.arange(21), q, np.zeros(3), 20)


def test_blocks_change_nothing(monkeypatch):
  rng = np.random.default_rng(3)
  x, q = unit(rng, 400), unit(rng, 9)
  thresholds = np.linspace(-0.2, 0.4, 9)
  flagged = np.flatnonzero((x.astype(np.float64) @ q.astype(np.float64).T > thresholds).any(1))
  want = paper_compat.count_missed(x, flagged, q, thresholds, 30)
  assert want > 50 and want == brute_force(x, q, thresholds, 30, 400)[1]
  monkeypatch.setattr(paper_compat, '_ROWS', 64)
  monkeypatch.setattr(paper_compat, '_PAIRS', 900)
  assert paper_compat.count_missed(x, flagged, q, thresholds, 30) == want


def test_what_float32_leaves_open_is_decided(monkeypatch):
  rng = np.random.default_rng(5)
  x, q = unit(rng, 300), unit(rng, 20)
  x[rng.integers(0, 300, 100)] = x[7]  # ties at thresholds and at a k-th
  thresholds = (q.astype(np.float64) @ x.astype(np.float64).T)[:, 7] - np.where(
    np.arange(20) % 2, 0, 0.3
  )
  flagged = np.flatnonzero((x.astype(np.float64) @ q.astype(np.float64).T > thresholds).any(1))
  want = brute_force(x, q, thresholds, 60, 300)[1]
  for bound in (1e-6, 0.01, 0.3):  # the wider, the less float32 decides
    monkeypatch.setattr(paper_compat.decide, 'error_bound', lambda dim: bound)
    assert paper_compat.count_missed(x, flagged, q, thresholds, 60) == want > 10


def test_chunks_hold_one_chunk_at_a_time():
  seen = []

  def parts():
    for i in range(0, 100, 10):
      seen.append(i)
      yield np.arange(i, i + 10), i + 10

  first = next(paper_compat.regroup_rows(parts(), 25))
  assert first.tolist() == list(range(25)) and seen == [0, 10, 20]
  assert [len(c) for c in paper_compat.regroup_rows([(np.arange(95), 100)], 25)] == [25, 25, 25, 20]
  assert list(paper_compat.regroup_rows([(np.zeros(0, np.int64), 50)], 25)) == []
