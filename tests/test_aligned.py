"""The aligned rules against their definition, on exact similarities full of ties."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from worlds import NAMES, candidate_list, make_world

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.pruning import aligned, rules

seeds = st.integers(0, 2**32 - 1)


some_names = st.sampled_from([('sketch',), ('val',), NAMES])


@given(seeds, some_names, st.sampled_from([-0.25, 0.0, 1e-9, 0.25]))
def test_gap_aligned_drops_what_is_strictly_over_for_any_query(seed, names, slack):
  columns, exact, t = make_world(seed)
  kept = []
  for row in candidate_list(columns):
    over = [exact[name][row, i] - t[name][i] > slack for name in names for i in range(3)]
    if not any(over):
      kept.append(row)
  result = rules.gap_aligned(columns, benchmarks=names, slack=slack)
  assert result.rows.tolist() == kept
  assert result.rows.dtype == np.int64
  dropped = aligned.dropped_rows(columns, benchmarks=names, slack=slack)
  assert sorted(kept + dropped.tolist()) == candidate_list(columns)


@given(seeds)
def test_combined_is_the_union_of_drops(seed):
  columns, _, _ = make_world(seed)
  one, two, both = (
    set(aligned.dropped_rows(columns, benchmarks=names).tolist())
    for names in (('sketch',), ('val',), NAMES)
  )
  assert both == one | two


def test_gap_aligned_of_an_approximate_search_keeps_and_counts_what_was_not_scored():
  nan = np.nan
  columns = rules.Columns(
    np.ones(5, bool),
    excess={
      'val': np.array([nan, 0.5, -0.5, nan, nan], np.float32),
      'sketch': np.array([nan, nan, 0.5, -0.5, nan], np.float32),
    },
    recall=0.9,
  )
  result = rules.gap_aligned(columns, benchmarks=('val', 'sketch'))
  assert result.rows.tolist() == [0, 3, 4]
  assert result.report == {
    'decided_exactly': 0,
    'recall': 0.9,
    'unscored': 2,
    'slack': 0.0,
    'aligned_dropped': 2,
  }


def test_quantile_and_dose_need_every_row():
  columns = rules.Columns(np.ones(2, bool), excess={'val': np.zeros(2, np.float32)}, recall=0.9)
  for given_ in ({'quantile': 0.5}, {'dose': 1.0}):
    with pytest.raises(InputError, match="search.backend='exact'"):
      rules.gap_aligned(columns, benchmarks=('val',), **given_)
  with pytest.raises(InputError, match="search.backend='exact'"):
    rules.k_aligned(columns, benchmarks=('val',), k=2)


def four(excess=(0.5, 0.25, 0.25, -0.5), candidates=(1, 1, 1, 1)):
  excess = np.array(excess)
  return rules.Columns(
    np.array(candidates, bool),
    excess={'val': excess.astype(np.float32)},
    exact_excess=lambda names, rows: excess[rows],
  )


@pytest.mark.parametrize(
  'given_, kept, slack',
  [
    ({}, [3], 0.0),
    ({'slack': 0.25}, [1, 2, 3], 0.25),
    ({'slack': -0.5}, [3], -0.5),
    ({'slack': -1.0}, [], -1.0),
    ({'quantile': 1.0}, [0, 1, 2, 3], 0.5),
    ({'quantile': 0.75}, [1, 2, 3], 0.25),
    ({'quantile': 0.5}, [1, 2, 3], 0.25),
    ({'quantile': 0.25}, [3], -0.5),
    ({'dose': 0.1}, [0, 1, 2, 3], 0.5),
    ({'dose': 0.25}, [1, 2, 3], 0.25),
    ({'dose': 0.6}, [2, 3], 0.25),  # of equal ones the earlier goes
    ({'dose': 1.0}, [3], -0.5),
    ({'dose': 1.34}, [], None),
  ],
)
def test_what_is_dropped_and_the_slack_that_results(given_, kept, slack):
  found = rules.gap_aligned(four(), benchmarks=('val',), **given_)
  assert found.rows.tolist() == kept
  assert found.report['slack'] == slack and found.report['aligned_dropped'] == 3


def test_doses_and_quantiles_that_cannot_be():
  with pytest.raises(ConfigError, match=r'dose=100 asks to drop 300 rows.*3 that slack 0.*4 cand'):
    rules.gap_aligned(four(), benchmarks=('val',), dose=100)
  for given_ in (
    {'dose': -1.0},
    {'quantile': 1.5},
    {'quantile': -0.5},
    {'slack': 0.1, 'dose': 1.0},
    {'quantile': 0.1, 'dose': 1.0},
  ):
    with pytest.raises(ConfigError):
      rules.gap_aligned(four(), benchmarks=('val',), **given_)
  nothing_over = four((-1, -2, -3, -4))
  found = rules.gap_aligned(nothing_over, benchmarks=('val',), dose=5.0)
  assert len(found.rows) == 4 and found.report['slack'] == -1
  nobody = four(candidates=(0, 0, 0, 0))
  for given_ in ({'dose': 2.0}, {'quantile': 0.5}, {}):
    assert rules.gap_aligned(nobody, benchmarks=('val',), **given_).rows.tolist() == []


def test_float32_alone_would_choose_another_quantile_and_another_dose():
  exact = np.array([1e-9, 0.0, 2e-9, 3e-9])
  columns = rules.Columns(
    np.ones(4, bool),
    excess={'val': np.array([4e-7, 3e-7, 2e-7, 1e-7], np.float32)},
    exact_excess=lambda names, rows: exact[rows],
  )
  found = rules.gap_aligned(columns, benchmarks=('val',), quantile=0.5)
  assert found.rows.tolist() == [0, 1] and found.report['slack'] == 1e-9
  found = rules.gap_aligned(columns, benchmarks=('val',), dose=0.5)  # of the three over 0: two
  assert found.rows.tolist() == [0, 1] and found.report['slack'] == 1e-9


def test_a_quantile_is_a_decimal_share():
  """0.07 * 100 is 7.000000000000001 in float64; the 7th of 100 is meant."""
  columns = four(tuple(range(100)), (1,) * 100)
  found = rules.gap_aligned(columns, benchmarks=('val',), quantile=0.07)
  assert found.report['slack'] == 6.0
