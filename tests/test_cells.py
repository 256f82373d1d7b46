"""Cells: levels, bins, codes and draws inside cells against plain Python; balance by hand."""

import math
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pytest

from clip_jax.pruning import cells


@pytest.mark.parametrize(
  'column',
  [
    np.array(['b', None, 'a', 'b'], object),
    pa.array(['b', None, 'a', 'b']),
    pa.chunked_array([['b', None], ['a', 'b']]),
    pa.DictionaryArray.from_arrays(pa.array([1, None, 0, 1]), ['a', 'b']),
    pa.DictionaryArray.from_arrays(pa.array([1, 2, 0, None]), ['a', 'b', '']).take([0, 1, 2, 0]),
    pa.DictionaryArray.from_arrays(pa.array([1, None, 0, 2]), ['a', 'b', 'b']),
  ],
)
def test_levels_of_strings(column):
  codes, names = cells.levels(column)
  assert [names[code] for code in codes] == ['b', '', 'a', 'b']
  assert sorted(names) == ['', 'a', 'b']


def test_levels_of_numbers_and_of_nothing():
  codes, names = cells.levels(np.array([7, -1, 7], np.int32))
  assert [names[code] for code in codes] == ['7', '-1', '7']
  for column in (np.array([], object), np.array([], np.int32), pa.chunked_array([], pa.string())):
    codes, names = cells.levels(column)
    assert len(codes) == 0 and names == []
  codes, names = cells.levels(np.array([None, None], object))
  assert codes.tolist() == [0, 0] and names == ['']


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 6))
def test_quantile_bins(values, bins):
  ordered = sorted(values)
  edges = [ordered[-(-len(values) * j // bins) - 1] for j in range(1, bins)] if values else []
  expected = [sum(value > edge for edge in edges) for value in values]
  for dtype in (np.int64, np.float32):
    assert cells.quantile_bins(np.array(values, dtype), bins).tolist() == expected


def test_distinct_values_fall_into_equal_bins():
  values = np.random.default_rng(0).permutation(100).astype(np.float32)
  assert np.bincount(cells.quantile_bins(values, 5)).tolist() == [20] * 5


def test_codes_are_mixed_radix():
  digits = [np.array([0, 2, 1]), np.array([4, 0, 3]), np.array([1, 0, 2])]
  code = np.zeros(3, np.int64)
  for digit, radix in zip(digits, [3, 5, 3]):
    cells.add_digit(code, digit, radix)
  assert code.tolist() == [(0 * 5 + 4) * 3 + 1, (2 * 5 + 0) * 3, (1 * 5 + 3) * 3 + 2]
  assert (code // 3 // 5).tolist() == digits[0].tolist()


def draw(code, removed, order, radices=(2, 2)):
  drawn, served = cells.draw_like(np.array(code), np.array(removed, bool), np.array(order), radices)
  return np.flatnonzero(drawn).tolist(), served


def test_draws_come_from_the_own_cell_first_then_from_merged_ones_in_order():
  # Digits: (a, b, c). Removed: two of cell 000, which holds one other row.
  code = [0b000, 0b000, 0b000, 0b001, 0b010, 0b100]
  removed = [1, 1, 0, 0, 0, 0]
  assert draw(code, removed, [0, 0, 9, 9, 1, 0]) == ([2, 3], [1, 1, 0])  # gives up c before b
  assert draw(code, [1, 1, 0, 1, 0, 0], [0, 0, 9, 9, 1, 0]) == ([2, 4], [1, 0, 1])  # then b; not a


def test_lowest_order_goes_first_and_equal_order_by_position():
  assert draw([0] * 5, [1, 0, 0, 0, 0], [0, 3, 1, 2, 1])[0] == [2]
  assert draw([0] * 5, [1, 1, 0, 0, 0], [0, 0, 5, 5, 5])[0] == [2, 3]


def test_a_row_is_drawn_once_and_an_exact_cell_is_served_before_a_merged_one():
  # Cell 1 needs its only donor itself; cell 0, without donors, must not take it first.
  assert draw([0, 1, 1], [1, 1, 0], [0, 0, 0]) == ([2], [1, 0, 0])


def test_nothing_removed_and_nobody_left():
  assert draw([0, 1], [0, 0], [0, 0]) == ([], [0, 0, 0])
  assert draw([0, 1], [1, 1], [0, 0]) == ([], [0, 0, 0])
  assert draw(np.zeros(0, np.int64), [], []) == ([], [0, 0, 0])


@given(st.integers(0, 2**32 - 1))
def test_counts_of_every_cell(seed):
  """After each stage, a cell of that stage is served in full or has no rows left."""
  rng = np.random.default_rng(seed)
  code, removed = rng.integers(0, 24, 60), rng.random(60) < 0.4
  order = rng.integers(0, 20, 60)  # with ties
  radices = (2, 3)
  drawn, served = cells.draw_like(code, removed, order, radices)
  with mock.patch.object(cells, 'ROWS_AT_ONCE', 5):
    in_blocks = cells.draw_like(code, removed, order, radices)
  assert (in_blocks[0] == drawn).all() and in_blocks[1] == served
  assert not (drawn & removed).any() and drawn.sum() == sum(served)
  coarsest = code // 6
  for cell in np.unique(coarsest):
    inside = coarsest == cell
    wanted, free = removed[inside].sum(), (~removed)[inside].sum()
    assert drawn[inside].sum() == min(wanted, free)
  exact = sum(min(removed[code == c].sum(), (~removed)[code == c].sum()) for c in np.unique(code))
  assert served[0] == exact


def test_differences_by_hand():
  step = np.array([0, 0, 1, 1, 1, 1])
  numbers = {'x': np.array([0, 2, 4, 6, 5, 5]), 'same': np.ones(6), 'step': step}
  categories = {'c': np.array([0, 1, 1, 1, 2, 2]), 'split': 3 * step}
  got = cells.differences(np.array([0, 1]), np.array([2, 3]), numbers, categories)
  assert got['x'] == pytest.approx((1 - 5) / math.sqrt((1 + 1) / 2))
  assert got['same'] == 0
  assert got['step'] is None and got['split'] is None  # constant on both sides, and different
  assert got['c'] == pytest.approx(0.5 / math.sqrt((0.25 + 0) / 2))
  codes = np.array([2, 2, 2, 1, 0, 0, 1, 2])  # shares 0, 1/4, 3/4 against 1/2, 1/4, 1/4
  got = cells.differences(np.arange(4), np.arange(4, 8), {}, {'c': codes})
  assert got['c'] == pytest.approx(0.5 / math.sqrt((0 + 0.25) / 2))
  empty = np.zeros(0, np.int64)
  assert set(cells.differences(empty, np.array([1]), numbers, categories).values()) == {None}
