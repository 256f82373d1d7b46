"""scann.py: candidates with the exact search's bits, honest recall, a clear word without ScaNN."""

import importlib.util
import sys

from by_number import ByNumber
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.similarity import exact, scann

needs_scann = pytest.mark.skipif(
  importlib.util.find_spec('scann') is None, reason='scann exists for Linux, Python < 3.14 only'
)


def clustered(rng, rows, centers, spread=0.7):
  x = centers[rng.integers(len(centers), size=rows)]
  x = x + spread * rng.standard_normal(x.shape)
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def top(pool, usable, queries, k):
  found = exact.search_shard(pool, usable, exact.Queries(queries, (('b', 0, len(queries)),)), k=k)
  return found['b']['top_similarity'], found['b']['top_row']


def recall_of(pool, usable, queries, similarity, sample=200):
  """The share of the true n nearest rows that candidates hold, over a random sample of queries;
  ties are as good.
  """
  chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
  true = top(pool, usable, queries[chosen], similarity.shape[1])[0]
  return float((similarity[chosen] >= true[:, -1:]).mean())


@needs_scann
@pytest.mark.parametrize('rows, n', [(1, 1), (3, 10), (300, 7)])
def test_a_small_pool_is_searched_by_brute_force(rows, n):
  rng = np.random.default_rng(0)
  centers = rng.standard_normal((5, 16))
  pool, queries = clustered(rng, rows, centers), clustered(rng, 70, centers)
  usable = np.ones(rows, bool)
  usable[1:2] = False
  pool[1:2] = np.nan
  similarity, row = scann.candidates(pool, usable, queries, n)
  want = top(pool, usable, queries, n)
  assert np.array_equal(similarity, want[0]) and np.array_equal(row, want[1])
  assert similarity.dtype == np.float32 and row.dtype == np.int64
  assert recall_of(pool, usable, queries, similarity, sample=20) == 1


@needs_scann
def test_an_index_finds_most_and_scores_exactly():
  rng = np.random.default_rng(0)
  centers = rng.standard_normal((60, 16))
  pool, queries = clustered(rng, scann.TREE_ROWS + 1000, centers), clustered(rng, 100, centers)
  pool[5000:5050] = pool[:50]
  usable = rng.random(len(pool)) > 0.02
  pool[~usable] = 0
  similarity, row = scann.candidates(ByNumber(pool), usable, queries, 20)
  assert similarity.shape == row.shape == (100, 20)
  want = top(pool, usable, queries, 20)
  hits = 0
  for i in range(100):
    assert len(set(row[i])) == 20 and usable[row[i]].all()
    assert (np.lexsort((row[i], -similarity[i])) == np.arange(20)).all()
    _, a, b = np.intersect1d(row[i], want[1][i], return_indices=True)
    assert np.array_equal(similarity[i][a], want[0][i][b])  # bit for bit
    hits += len(a)
  assert hits / 2000 > 0.8
  recall = recall_of(pool, usable, queries, similarity, sample=100)
  assert hits / 2000 <= recall <= hits / 2000 + 0.02  # ties count as found
  again = scann.candidates(pool, usable, queries, 20)
  assert np.array_equal(similarity, again[0]) and np.array_equal(row, again[1])
  few, rows = scann.candidates(pool, usable, queries, 2000, leaves=1000, searched=0.001)
  assert ((rows >= 0) == np.isfinite(few)).all() and (rows < 0).any()  # ScaNN found fewer
  assert recall_of(pool, usable, queries, few) < 0.5


@pytest.mark.parametrize('tile_rows', [64, 4096])
def test_scores_have_the_bits_of_the_search(tile_rows):
  rng = np.random.default_rng(0)
  centers = rng.standard_normal((5, 640))
  pool, queries = clustered(rng, 900, centers), clustered(rng, 130, centers)
  similarity, row = top(pool, np.ones(900, bool), queries, 9)
  row[3, 4], similarity[3, 4] = -1, -np.inf
  assert np.array_equal(scann.score(pool, row, queries, tile_rows=tile_rows), similarity)


def test_nothing_usable():
  x = np.float16([[1, 0]])
  similarity, row = scann.candidates(x, np.zeros(1, bool), x, 5)
  assert similarity.shape == row.shape == (1, 0)


def test_without_scann_the_message_says_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, 'scann', None)
  x = np.float16([[1, 0]])
  with pytest.raises(InputError, match="backend='exact'"):
    scann.candidates(x, np.ones(1, bool), x, 5)


@needs_scann
def test_bad_vectors_are_named():
  x = np.float16([[1, 0], [0, 0]])
  with pytest.raises(InputError, match='pool: row 1 '):
    scann.candidates(x, np.ones(2, bool), x[:1], 5)
