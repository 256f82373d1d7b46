import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.data import order


def _places(chosen, positions):
  if isinstance(chosen, order.Global):
    return np.array([chosen.place(position) for position in positions])
  seen = [(position, chosen.window(position)) for position in positions]
  return np.array([window.places[position - window.start] for position, window in seen])


def _blocks(sizes, window, seed=0, most=order.BLOCK):
  starts = order.block_starts(np.cumsum([0, *sizes]), most)
  return order.Blocks(starts, seed, window), starts


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12))
def test_blocks_cut_every_shard_evenly_and_cross_none(sizes, most):
  borders = np.cumsum([0, *sizes])
  starts = order.block_starts(borders, most)
  assert starts.dtype == np.int64 and set(borders) <= set(starts)
  assert starts[0] == 0 and starts[-1] == sum(sizes)
  lengths = np.diff(starts)
  assert ((lengths > 0) & (lengths <= most)).all()
  for size, low, high in zip(sizes, borders, borders[1:]):
    inside = np.diff([*starts[(starts >= low) & (starts < high)], high])
    if size:
      assert len(inside) == -(-size // most) and inside.max() - inside.min() <= 1


@settings(deadline=None)
@given(
  st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
  st.integers(1, 8),
  st.integers(1, 100),
  st.integers(0, 3),
)
def test_every_epoch_of_blocks_is_a_permutation_and_a_window_its_blocks(sizes, most, window, seed):
  blocks, starts = _blocks(sizes, window, seed, most)
  n = sum(sizes)
  places = _places(blocks, range(3 * n)).reshape(3, n)
  assert (np.sort(places, 1) == np.arange(n)).all()
  at = 0
  while at < 3 * n:
    found = blocks.window(at)
    assert found.start == at and found.stop == at + len(found.places) <= (at // n + 1) * n
    assert len(found.places) < window + most
    assert blocks.window(found.stop - 1).start == at
    whole = np.searchsorted(starts, found.places, 'right') - 1
    for block in np.unique(whole):  # with a sample of a block, all of it
      assert (whole == block).sum() == starts[block + 1] - starts[block]
    at = found.stop


def test_an_order_depends_on_nothing_but_its_arguments():
  one, _ = _blocks([700, 0, 900], 256, 5, 64)
  positions = np.random.default_rng(0).integers(0, 5000, 300).tolist()
  other, _ = _blocks([700, 0, 900], 256, 5, 64)
  expected = _places(one, range(5000))[positions]
  assert (_places(other, positions) == expected).all()
  known = order.Blocks(order.block_starts(np.array([0, 5, 9]), 3), 1, 4)  # as it was first made
  assert _places(known, range(18)).tolist() == KNOWN


KNOWN = [4, 3, 8, 7, 2, 0, 1, 6, 5, 7, 2, 3, 8, 4, 0, 5, 1, 6]


def test_seeds_and_epochs_and_windows_are_unrelated():
  n = 4000
  orders = [
    part
    for seed in range(3)
    for part in _places(_blocks([n], 500, seed, 50)[0], range(2 * n)).reshape(2, n)
  ]
  for a, b in itertools.combinations(orders, 2):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.5 and (a == b).sum() < 15
    neighbours = set(zip(a, a[1:]))  # of the same window both times, or they were not mixed
    assert len(neighbours & set(zip(b, b[1:]))) < 15
  for a in orders:  # inside a window nothing is left of the source's order
    first = a[:500]
    assert abs(np.corrcoef(first[:-1] % 50, first[1:] % 50)[0, 1]) < 0.2


def test_memory_grows_with_blocks_only_and_windows_are_found_at_once():
  n = 200_000_000
  blocks = order.Blocks(order.block_starts(np.arange(0, n + 1, 10_000)), 0, 8192)
  found = blocks.window(5 * n + n // 2)
  assert found.start <= 5 * n + n // 2 < found.stop and 6000 < len(found.places) < 8192 + 1024
  assert len(np.unique(found.places // 1000)) <= 9
  assert len(np.unique(found.places)) == len(found.places)
  assert _places(blocks, [2**45])[0] < n


def test_a_window_of_nothing_is_refused():
  with pytest.raises(ValueError, match='at least 1'):
    _blocks([10], 0)


def test_a_global_order_is_a_permutation_in_each_epoch():
  for n in (1, 7, 100):
    places = _places(order.Global(n, 0), range(4 * n)).reshape(4, n)
    assert (np.sort(places, 1) == np.arange(n)).all()
