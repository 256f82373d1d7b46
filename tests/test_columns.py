"""What rules decide on: exact order at a cut, from float32 values that are a little off."""

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.pruning import columns


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.data())
def test_a_cut_decides_as_the_exact_values(seed, n, data):
  rng = np.random.default_rng(seed)
  exact = rng.integers(0, 4, n) / 4 + rng.integers(0, 3, n) * 1e-6
  values = (exact + rng.uniform(-4.8e-6, 4.8e-6, n)).astype(np.float32)
  place = data.draw(st.integers(0, n - 1))
  with mock.patch.object(columns, 'ROWS_AT_ONCE', 7):
    cut = columns.cut_at(values, exact.__getitem__, place, columns.TOLERANCE)
  limit = np.sort(exact)[place]
  assert cut.value(place) == limit and (exact[cut.near] == cut.exact).all()
  above = ~cut.below
  above[cut.near] = cut.exact > limit
  assert (above == (exact > limit)).all()
  for count in (place, place + 1):
    assert (cut.lowest(count) == columns.mask_of_lowest(exact, count)).all()


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 50))
def test_random_numbers_belong_to_rows_of_the_pool(candidates, block):
  mask = np.array(candidates, bool)
  whole = columns.random_order(np.ones(len(mask), bool), 3, 1, 2)
  with mock.patch.object(columns, 'ROWS_AT_ONCE', block):
    assert (columns.random_order(mask, 3, 1, 2) == whole[mask]).all()
  assert len(set(whole.tolist())) == len(whole)


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
def test_the_lowest_and_ties_to_the_earlier(values, data):
  count = data.draw(st.integers(0, len(values)))
  order = sorted(range(len(values)), key=lambda i: (values[i], i))
  found = columns.mask_of_lowest(np.array(values, float), count)
  assert np.flatnonzero(found).tolist() == sorted(order[:count])


def test_what_is_not_given_is_named():
  known = columns.Columns(np.ones(3, bool))
  with pytest.raises(ValueError, match="k=2 needs the pairs of 'val'"):
    known.pairs('val', 2)
  with pytest.raises(ValueError, match='exact_excess'):
    known.exact_excess(('val',), np.arange(2))
  with pytest.raises(ConfigError, match='asks for 4 pool rows, there are 3'):
    columns.candidates_for(known, 4)
