"""size_curves.py against counting, threshold by threshold."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.similarity import size_curves


def parts_of(similarity, excess, exact, cuts):
  """Cuts [G, N] columns into parts, as a search's shards are."""
  for start, stop in zip([0, *cuts], [*cuts, similarity.shape[1]]):
    some = slice(start, stop)
    if excess is None:
      yield similarity[:, some], None, None
      continue
    dropped = [
      size_curves.is_over_zero(excess[g, some], 1e-5, lambda m, g=g: exact[g, some][m])
      for g in range(len(excess))
    ]
    yield similarity[:, some], excess[:, some], np.stack(dropped)


@given(
  seed=st.integers(0, 999),
  benchmarks=st.integers(1, 3),
  rows=st.integers(0, 60),
  cut=st.integers(0, 60),
)
def test_counts_are_those_of_every_threshold(seed, benchmarks, rows, cut):
  rng = np.random.default_rng(seed)
  # Values on edges, between them, beyond them; the error of float32 hides the sign near 0.
  exact = rng.choice(
    [-1.2, -0.5, -0.01, -1e-7, 0, 1e-7, 0.005, 0.0051, 0.9, 1.05], (benchmarks, rows)
  )
  excess = (exact + rng.uniform(-3e-7, 3e-7, exact.shape)).astype(np.float32)
  similarity = rng.choice(np.arange(-1000, 1001) / 1000, (benchmarks, rows)).astype(np.float32)
  found = size_curves.count_candidates(
    parts_of(similarity, excess, exact, [min(cut, rows)]), benchmarks
  )
  assert found['candidates'] == rows and found['has_excess']
  assert found['edges'][0] == -1 and found['edges'][-1] == 1 and len(found['edges']) == 2001
  for g in range(benchmarks + 1):
    pick = slice(None) if g == benchmarks else slice(g, g + 1)
    assert found['excess_zero'][g] == (exact[pick] > 0).any(0).sum()
    for i in rng.choice(2001, 25):
      edge = found['edges'][i]
      over = (exact if i == 1000 else excess.astype(np.float64)) > edge
      assert found['excess_over'][g, i] == over[pick].any(0).sum()
      assert (
        found['similarity_over'][g, i] == (similarity[pick].astype(np.float64) > edge).any(0).sum()
      )
    assert (np.diff(found['excess_over'][g]) <= 0).all()


def test_without_an_anchor_there_is_no_excess():
  similarity = np.float32([[0.5, 0.7], [0.6, 0.1]])
  found = size_curves.count_candidates(parts_of(similarity, None, None, [1]), 2)
  assert (
    not found['has_excess'] and not found['excess_over'].any() and not found['excess_zero'].any()
  )
  assert found['similarity_over'][:, 1000 + 550].tolist() == [1, 1, 2]


def test_edges_are_the_numbers_that_one_writes():
  for slack in (-0.01, -0.005, 0.0, 0.005, 0.01, 0.124, 0.876):
    assert slack in size_curves.EDGES
  assert size_curves.EDGES[size_curves.ZERO] == 0


def test_only_rows_near_zero_are_decided_exactly():
  asked = []

  def exact(rows):
    asked.extend(rows.tolist())
    return np.float64([1e-9, -1e-9])

  found = size_curves.is_over_zero(np.float32([-0.5, -1e-6, 1e-6, 0.5]), 1e-5, exact)
  assert asked == [1, 2] and found.tolist() == [False, True, False, True]
  with pytest.raises(ZeroDivisionError):
    size_curves.is_over_zero(np.zeros(1, np.float32), 0.0, lambda rows: 1 / 0)
  assert not size_curves.is_over_zero(np.float32([-1]), 1e-5, lambda rows: 1 / 0).any()
