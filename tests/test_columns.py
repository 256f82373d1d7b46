"""What rules decide on: exact order at a cut, from float32 values that are a little off."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.pruning import columns


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.data())
def test_refined_values_decide_as_the_exact_ones(seed, n, data):
  rng = np.random.default_rng(seed)
  exact = rng.integers(0, 4, n) / 4 + rng.integers(0, 3, n) * 1e-6
  values = (exact + rng.uniform(-4.8e-6, 4.8e-6, n)).astype(np.float32)
  places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=2))
  asked = []

  def decide(rows):
    asked.extend(rows.tolist())
    return exact[rows]

  found, count = columns.recompute_near_cuts(values, decide, places, columns.TOLERANCE)
  assert count == len(asked) == len(set(asked))
  for place in places:
    cut = np.sort(exact)[place]
    assert np.sort(found)[place] == cut
    assert ((found < cut) == (exact < cut)).all() and ((found == cut) == (exact == cut)).all()


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
