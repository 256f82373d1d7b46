"""tiles.py: padding, blocks, and dot products whose bits depend on their two vectors only."""

import threading

import jax
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.similarity import tiles


def unit(rng, n, dim):
  x = rng.standard_normal((n, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(
  'count, most, want',
  [
    (1, 4096, 64),
    (64, 4096, 64),
    (65, 4096, 128),
    (3000, 4096, 4096),
    (4096, 4096, 4096),
    (130, 192, 192),
    (1, 1, 64),
    (100, 100, 128),
  ],
)
def test_padded_sizes(count, most, want):
  assert tiles.padded(count, most) == want


@pytest.mark.parametrize(
  'sizes, query_block',
  [
    ([1], 512),
    ([600, 620, 10], 512),
    ([1000], 1),
    ([64, 65, 63], 64),
    ([50_000, 7_500], 512),
    ([1, 1, 1, 200], 128),
  ],
)
def test_query_blocks_cover_each_benchmark_once_and_then_repeat_its_last(sizes, query_block):
  query, owner = tiles.query_blocks(sizes, query_block)
  assert query.shape[1] % 64 == 0 and query.shape[1] <= max(64, query_block)
  assert owner.shape == (len(query), query.shape[1] // tiles.GROUP)
  of = np.repeat(owner.ravel(), tiles.GROUP)
  start = 0
  for benchmark, size in enumerate(sizes):
    slots = query.ravel()[of == benchmark]
    assert (slots[:size] == start + np.arange(size)).all()
    assert (slots[size:] == start + size - 1).all()
    start += size


def test_query_blocks_waste_little():
  sizes = [600, 620, 640, 600, 660, 10]
  assert tiles.query_blocks(sizes, 512)[0].size < 1.1 * sum(sizes)


@pytest.mark.parametrize('backend, want', [('cpu', (2048, 512)), ('gpu', (32_768, 2048))])
def test_sizes_follow_the_backend_unless_they_are_set(monkeypatch, backend, want):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  assert tiles.default_sizes(0, 0) == want
  assert tiles.default_sizes(640, 0) == (640, want[1]) and tiles.default_sizes(0, 64) == (
    want[0],
    64,
  )


def test_walk_visits_rows_in_order_and_pads_with_the_last():
  x = unit(np.random.default_rng(0), 300, 7)
  rows = np.array([5, 1, 299] + list(range(150)))
  seen = list(tiles.walk(x, rows, 64, 'pool'))
  assert [(tile.start, tile.count) for tile in seen] == [(0, 64), (64, 64), (128, 25)]
  assert np.array_equal(np.concatenate([tile.host[: tile.count] for tile in seen]), x[rows])
  assert (seen[2].host[25:] == x[rows[-1]]).all()
  for tile in seen:
    assert np.array_equal(np.asarray(tile.device), tile.host.astype(np.float32))


@pytest.mark.parametrize('value', [np.nan, np.inf, 0, 2])
@pytest.mark.parametrize('row', [0, 70, 199])
def test_walk_names_a_row_that_is_no_unit_vector(value, row):
  x = unit(np.random.default_rng(0), 200, 7)
  x[row] *= value
  with pytest.raises(InputError, match=f'anchor: row {row} .* norm'):
    list(tiles.walk(x, np.arange(200), 64, 'anchor'))
  list(tiles.walk(x, np.delete(np.arange(200), row), 64, 'anchor'))  # not visited, not an error


def test_walk_wants_float16():
  with pytest.raises(ValueError, match='float32'):
    list(tiles.walk(np.zeros((3, 2), np.float32), np.arange(3), 64, 'pool'))


def test_walk_sends_tiles_to_the_devices_in_turn_and_in_the_type_asked_for():
  x, devices = unit(np.random.default_rng(0), 200, 7), jax.local_devices()[:2]
  seen = list(tiles.walk(x, np.arange(200), 64, 'pool', devices=devices, dtype=np.float16))
  assert [tile.device.devices() for tile in seen] == [{devices[i % 2]} for i in range(4)]
  assert all(np.array_equal(tile.device, tile.host) for tile in seen)
  assert seen[0].device.dtype == np.float16


class Slow:
  """Rows that remember which were read, and can fail."""

  dtype, shape = np.dtype(np.float16), (256, 2)

  def __init__(self):
    self.read, self.second = [], threading.Event()

  def __getitem__(self, rows):
    if 200 in rows:
      raise OSError('the disk is gone')
    self.read.append(int(rows[0]))
    if len(self.read) == 2:
      self.second.set()
    return np.tile(np.float16([1, 0]), (len(rows), 1))


def test_walk_reads_the_next_tile_meanwhile_and_passes_its_error_on():
  rows = Slow()
  walk = tiles.walk(rows, np.arange(256), 64, 'pool')
  next(walk)
  assert rows.second.wait(60)
  assert rows.read == [0, 64]  # one ahead, not more
  with pytest.raises(OSError, match='disk'):
    list(walk)


def test_one_ahead_makes_the_next_item_first():
  made = []

  def items():
    for i in range(4):
      made.append(i)
      yield i

  seen = [(item, len(made)) for item in tiles.one_ahead(items())]
  assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
  assert list(tiles.one_ahead([])) == [] and list(tiles.one_ahead([7])) == [7]
  made.clear()
  assert [(item, len(made)) for item in tiles.one_ahead(items(), 3)] == [
    (0, 4),
    (1, 4),
    (2, 4),
    (3, 4),
  ]


@pytest.mark.parametrize('dim', [1, 3, 17, 64, 100, 640])
def test_bits_of_a_dot_depend_on_its_vectors_only(dim):
  """Shapes, positions and neighbours change nothing, as long as both sides come in 64s."""
  rng = np.random.default_rng(dim)
  x, q = unit(rng, 1024, dim).astype(np.float32), unit(rng, 256, dim).astype(np.float32)
  dots = jax.jit(tiles.dots)
  whole = np.asarray(dots(q, x))
  for b, t in [(64, 64), (64, 1024), (192, 320), (256, 64)]:
    i, j = rng.permutation(256)[:b], rng.permutation(1024)[:t]
    assert np.array_equal(np.asarray(dots(q[i], x[j])), whole[np.ix_(i, j)]), (b, t)


def test_lowest_argmax_takes_the_first_of_ties():
  scores = np.float32([[0, 3, -1], [2, 3, -1], [2, 1, -1]])
  best, index = tiles.lowest_argmax(scores)
  assert np.array_equal(best, [2, 3, -1]) and np.array_equal(index, [1, 0, 0])


@pytest.mark.parametrize('count', [1, 64, 100, 128])
def test_over_finds_what_a_comparison_finds(count):
  scores = np.random.default_rng(0).integers(0, 50, (64, 128)).astype(np.float32)
  cut = np.linspace(-1, 51, 64).astype(np.float32)
  maxima = tiles.group_maxima(scores)
  query, position, value = tiles.pairs_over(maxima, scores, count, cut)
  assert len(query) == len(set(zip(query, position)))
  assert set(zip(query, position)) == set(zip(*np.nonzero(scores[:, :count] > cut[:, None])))
  assert np.array_equal(value, scores[query, position])
