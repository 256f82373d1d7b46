"""How far two embedders agree, against SciPy and against what sets say."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from clip_jax.pruning import agreement
from clip_jax.pruning.columns import Columns


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40))
def test_rank_correlation_is_scipys_with_many_ties(pairs):
  a, b = np.array(pairs, np.float32).T
  assert agreement.mean_ranks(a).tolist() == (stats.rankdata(a) - 1).tolist()
  if len(set(a)) > 1 and len(set(b)) > 1:
    assert agreement.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
  else:
    assert np.isnan(agreement.spearman(a, b))


def test_rank_correlation_of_the_same_of_the_opposite_and_of_next_to_nothing():
  a = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  assert agreement.spearman(a, np.exp(a)) == pytest.approx(1)
  assert agreement.spearman(a, -a) == pytest.approx(-1)
  assert np.isnan(agreement.spearman(a[:1], a[:1])) and np.isnan(agreement.spearman(a[:0], a[:0]))
  assert agreement.spearman(np.array([-np.inf, 0, 1]), np.array([-np.inf, 5, 9])) == pytest.approx(
    1
  )


def test_a_value_that_is_nan_is_refused_and_columns_of_two_lengths():
  with pytest.raises(ValueError, match='NaN'):
    agreement.spearman(np.array([0, np.nan]), np.array([0, 1.0]))
  with pytest.raises(ValueError, match='got 2 and 3'):
    agreement.spearman(np.zeros(2), np.zeros(3))


def test_decisions_against_sets():
  rng = np.random.default_rng(1)
  rows = np.sort(rng.choice(1000, 400, replace=False))
  here, there, first = (rng.random(400) < share for share in (0.3, 0.4, 0.3))
  value_here, value_there = rng.integers(0, 30, (2, 400)).astype(np.float32)
  found = agreement.compare(rows, here, there, first, value_here, value_there)
  a, b, c = (set(rows[mask].tolist()) for mask in (here, there, first))
  assert (found.removed_here, found.removed_there, found.both) == (len(a), len(b), len(a & b))
  assert (found.only_here, found.only_there, found.same_count_both) == (
    len(a - b),
    len(b - a),
    len(a & c),
  )
  value = dict(zip(rows.tolist(), value_here.tolist()))
  assert found.rows_only_here.tolist() == sorted(a - b, key=lambda row: (-value[row], row))[:12]
  value = dict(zip(rows.tolist(), value_there.tolist()))
  assert found.rows_only_there.tolist() == sorted(b - a, key=lambda row: (-value[row], row))[:12]


def test_two_that_remove_the_same_differ_in_no_row():
  rows, mask, value = np.arange(5), np.array([1, 0, 1, 0, 0], bool), np.arange(5.0)
  found = agreement.compare(rows, mask, mask, mask, value, value)
  assert found.only_here == found.only_there == 0 and found.spearman == pytest.approx(1)
  assert not len(found.rows_only_here) and not len(found.rows_only_there)
  assert agreement.jaccard(found.both, 2) == 1
  assert agreement.jaccard(0, 0) == 1 and agreement.jaccard(0, 3) == 0


def columns(values, kind, candidates=None) -> Columns:
  """Columns of one benchmark whose float32 values are exact."""
  values = np.asarray(values, np.float32)
  exact = lambda _, rows: values[rows].astype(np.float64)
  return Columns(
    np.ones(len(values), bool) if candidates is None else candidates,
    **{kind: {'b': values}},
    **{f'exact_{kind}': exact},
  )


@pytest.mark.parametrize(
  'rule, kind, wanted',
  [
    ('gap_aligned', 'excess', [1, 4]),
    ('near', 'similarity', [1, 4]),
    ('far', 'similarity', [0, 2]),
  ],
)
def test_what_goes_first(rule, kind, wanted):
  known = columns([-0.5, 0.4, -0.2, 0.1, 0.3], kind)
  found = agreement.going_first(known, rule, benchmarks=('b',), count=2)
  assert np.flatnonzero(found).tolist() == wanted
  assert agreement.going_first(known, rule, benchmarks=('b',), count=0).sum() == 0
  assert agreement.going_first(known, rule, benchmarks=('b',), count=5).all()


def test_only_candidates_go_and_the_cut_is_decided_exactly():
  values = np.array([0.5, 0.3, 0.3, 0.1], np.float32)
  exact = {0: 0.5, 1: 0.3, 2: 0.3 + 1e-7, 3: 0.1}
  known = Columns(
    np.array([0, 1, 1, 1], bool),
    excess={'b': values},
    exact_excess=lambda _, rows: np.array([exact[row] for row in rows]),
  )
  found = agreement.going_first(known, 'gap_aligned', benchmarks=('b',), count=1)
  assert found.tolist() == [False, True, False]  # of the candidates 1, 2, 3
