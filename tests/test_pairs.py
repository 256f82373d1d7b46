"""The complete list of pairs from a cosine similarity on."""

import numpy as np
import pytest

from clip_jax.core import vectors
from clip_jax.similarity import exact, pairs


def _unit(rng, n, dim=24):
  return vectors.to_unit_length(rng.normal(size=(n, dim)).astype(np.float32)).astype(np.float16)


def _brute_force(x, rows, queries, similarity):
  """Returns {(query, row): cosine} by numpy alone."""
  a, b = queries.astype(np.float64), x[rows].astype(np.float64)
  cosine = a @ b.T / np.sqrt((a * a).sum(1)[:, None] * (b * b).sum(1))
  query, position = np.nonzero(cosine >= similarity)
  return {(q, rows[p]): cosine[q, p] for q, p in zip(query.tolist(), position.tolist())}


@pytest.mark.parametrize('similarity', [-0.2, 0.3, 0.6, 1.0])
@pytest.mark.parametrize('at_once', [7, 65_536])
def test_all_pairs_from_the_similarity_on_and_no_others(similarity, at_once, monkeypatch):
  monkeypatch.setattr(pairs, 'ROWS_AT_ONCE', at_once)
  rng = np.random.default_rng(0)
  x, queries = _unit(rng, 60), _unit(rng, 9)
  x[[3, 50]] = queries[4]  # exact copies
  rows = np.delete(np.arange(60), [5, 6, 7])
  found = {}
  for query, row, cosine in pairs.similar_pairs(x, rows, queries, similarity):
    found |= dict(zip(zip(query.tolist(), row.tolist()), cosine.tolist()))
  assert found == pytest.approx(_brute_force(x, rows, queries, similarity), abs=1e-12)
  assert found.keys() == _brute_force(x, rows, queries, similarity).keys()
  assert found[4, 3] == found[4, 50] == 1.0


def test_no_row_of_a_pair_is_below_the_bound_of_the_column():
  rng = np.random.default_rng(1)
  x, queries = _unit(rng, 500), _unit(rng, 5)
  found = exact.search_shard(x, np.ones(500, bool), exact.Queries(queries, (('b', 0, 5),)), k=0)[
    'b'
  ]
  for similarity in (0.2, 0.5):
    listed = {row for _, row in _brute_force(x, np.arange(500), queries, similarity)}
    least = pairs.least_column(queries, similarity)
    assert listed <= set(np.flatnonzero(found['similarity'] >= least).tolist())
    assert (found['similarity'] < least).any()


def test_ranks_count_from_one_within_a_query():
  assert pairs.ranks(np.array([0, 0, 2, 2, 2, 7])).tolist() == [1, 2, 1, 2, 3, 1]
  assert pairs.ranks(np.zeros(0, np.int64)).tolist() == []
