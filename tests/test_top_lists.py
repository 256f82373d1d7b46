"""The lists of nearest rows against a sort of everything."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.similarity import top_lists

FLOATS = np.float32(
  [
    -np.inf,
    -1.5,
    -1e-45,
    -0.0,
    0.0,
    1e-45,
    0.25,
    np.nextafter(np.float32(0.25), np.float32(1)),
    1.1,
  ]
)


def test_a_greater_number_is_a_nearer_or_an_earlier_row():
  similarity, position = np.repeat(FLOATS, 3), np.tile([0, 7, 2**31], len(FLOATS))
  order = np.argsort(top_lists.encode_entries(similarity, position))[::-1]
  expected = np.lexsort((position, -similarity))
  np.testing.assert_array_equal(similarity[order], similarity[expected])
  np.testing.assert_array_equal(position[order], position[expected])


def test_packing_loses_nothing():
  similarity, position = top_lists.decode_entries(
    top_lists.encode_entries(FLOATS, np.arange(len(FLOATS)))
  )
  np.testing.assert_array_equal(similarity, FLOATS)  # -0 and 0 are equal
  np.testing.assert_array_equal(position, np.arange(len(FLOATS)))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1)
)
def test_lists_hold_the_nearest_rows(slots, rows, k, seed):
  rng = np.random.default_rng(seed)
  similarity = rng.choice(FLOATS[1:], (slots, rows))  # full of ties
  lists, k = top_lists.TopLists(slots, min(k, rows)), min(k, rows)
  for part in np.array_split(np.arange(rows), min(4, rows)):  # rows come in order
    slot, position = (index.ravel() for index in np.meshgrid(np.arange(slots), part, indexing='ij'))
    lists.add_pairs(slot, similarity[slot, position], position)
  found, position = top_lists.decode_entries(lists.sorted())
  expected = np.argsort(-similarity, axis=1, kind='stable')[:, :k]
  np.testing.assert_array_equal(position, expected)
  np.testing.assert_array_equal(found, np.take_along_axis(similarity, expected, 1))


@pytest.mark.parametrize('k', [1, 3])
def test_what_was_not_filled_is_minus_infinity(k):
  found, _ = top_lists.decode_entries(top_lists.TopLists(2, k).sorted())
  assert np.isneginf(found).all()
