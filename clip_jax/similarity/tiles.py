"""Stored vectors in tiles on the device, and the one dot product behind every float32 similarity.

float16 rows in, float32 similarities out; reads no file itself (a caller maps them).

Why everything is padded to multiples of 64: for such shapes the matrix product of one backend adds
the E products of a (query, row) pair in one fixed order, whatever the tile, the block, the shard or
the number of threads. For smaller shapes it switches to other loops, and the last bits change.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

PAD = 64  # rows and queries come in multiples of this: see above
GROUP = 16  # rows behind one group maximum; a group that beats a query's cut is looked at
NORMS = (0.9, 1.1)  # a unit vector in float16 is off by up to 1e-3; anything beyond is not one


class Shards:
  """Memory-mapped float16 shards as one [N, E] array: `.shape`, `len`, and rows by number.

  Every function here takes such an object, or a plain array, where it says "rows".
  """

  def __init__(self, shards: Sequence[Array]):  # each [n, E] float16
    self._shards = list(shards)
    self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
    kinds = {(shard.shape[1], str(shard.dtype)) for shard in self._shards}
    if len(kinds) != 1 or 'float16' not in str(kinds):
      raise ValueError(f'shards must all be float16 [n, E] with one E; got {sorted(kinds)}')
    self.shape = int(self._starts[-1]), self._shards[0].shape[1]
    self.dtype = np.dtype(np.float16)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Array) -> np.ndarray:  # [m] int, any order -> [m, E] float16
    rows = np.asarray(rows)
    out = np.empty((len(rows), self.shape[1]), np.float16)
    shard = np.searchsorted(self._starts, rows, 'right') - 1
    for s in np.unique(shard):
      out[shard == s] = self._shards[s][rows[shard == s] - self._starts[s]]
    return out


class Tile(NamedTuple):
  """`count` real rows from position `start` of the row list; padding repeats the last row."""

  start: int
  count: int
  host: np.ndarray  # [T, E] float16
  device: Array  # [E, T] float32


def padded(count: int, most: int) -> int:
  """The padded size of `count` rows: 64 times a power of two, at most `most` rounded up to 64s.

  Powers of two keep the number of compiled shapes small when shards differ in length.
  """
  most = -(-most // PAD) * PAD
  return min(most, PAD << (-(-count // PAD) - 1).bit_length())


def walk(
    x: Array,  # rows [N, E] float16
    rows: Array,  # [n] int64, the rows to visit, in this order
    tile_rows: int,
    name: str,  # what the rows are called in an error
) -> Iterator[Tile]:
  """Walks over the rows tile by tile. InputError names a row that is not a unit vector."""
  if x.dtype != np.float16:
    raise ValueError(f'{name}: vectors must be float16 [N, E]; got {x.dtype} {x.shape}')
  late = None  # norms are looked at one tile late: the device need not wait for the host
  step = padded(tile_rows, tile_rows)
  for start in range(0, len(rows), step):
    part = rows[start:start + step]
    size = padded(len(part), step)
    host = np.asarray(x[np.pad(part, (0, size - len(part)), mode='edge')])
    device, norms = _load(host)
    if late is not None:
      check_norms(*late, name)
    late = norms, part
    yield Tile(start, len(part), host, device)
  if late is not None:
    check_norms(*late, name)


def check_norms(norms: Array, rows: Array, name: str) -> None:  # [>= n] float32, [n] int64
  """InputError unless all of the first n norms are those of unit vectors."""
  norms = np.asarray(norms)[:len(rows)]
  bad = np.flatnonzero(~((norms >= NORMS[0]) & (norms <= NORMS[1])))  # NaN is bad, too
  if len(bad):
    raise InputError(
        f'{name}: row {rows[bad[0]]} is marked usable, but its vector has norm {norms[bad[0]]:g} '
        f'and must be of unit length ({len(bad)} such rows near it). '
        'Embed that shard again, or mark the row unusable.')


def query_blocks(
    sizes: Sequence[int],  # queries of each benchmark, all > 0
    query_block: int,  # at most this many in a block, rounded up to 64s
) -> list[np.ndarray]:
  """For each benchmark its padded query numbers [blocks, b], b the size that wastes least.

  One size for all benchmarks means one compiled shape. Padding repeats a benchmark's last query: a
  repeated query changes no maximum, and the lowest number wins a tie.
  """
  def cost(block: int) -> int:  # padded rows; starting a block costs as much as some 24 rows
    return sum(-(-size // block) * (block + 24) for size in sizes)
  block = min(range(PAD, -(-query_block // PAD) * PAD + 1, PAD), key=cost)
  return [
      np.minimum(np.arange(-(-size // block) * block), size - 1).reshape(-1, block)
      for size in sizes]


def one_ahead(items: Iterable) -> Iterator:
  """Yields each item after the next is made: the device is at one while the host reads another."""
  items = iter(items)
  item = next(items, None)
  for following in items:
    yield item
    item = following
  if item is not None:
    yield item


@jax.jit
def _load(x: Array) -> tuple[Array, Array]:  # [T, E] float16 -> [E, T] and [T], float32
  x = x.astype(jnp.float32)
  return x.T, jnp.sqrt((x * x).sum(1))


def dots(queries: Array, tile: Array) -> Array:  # [b, E], [E, T] float32 -> [b, T] float32
  """Every float32 similarity is made here. HIGHEST: a GPU would otherwise round inputs to TF32."""
  return lax.dot(queries, tile, precision=lax.Precision.HIGHEST)


def lowest_argmax(scores: Array) -> tuple[Array, Array]:  # [b, T] -> [T] maximum, [T] int32
  """Maximum over the major axis and its lowest index; argmax itself is twice as slow on a CPU."""
  best = scores.max(0)
  index = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  return best, jnp.where(scores == best[None], index, scores.shape[0]).min(0)


def group_maxima(scores: Array, count: Array) -> Array:  # [b, T], real rows -> [b, T / GROUP]
  """Maxima of groups of GROUP rows, which lie T / GROUP apart to keep the minor axis long."""
  real = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < count
  return jnp.where(real, scores, -jnp.inf).reshape(scores.shape[0], GROUP, -1).max(1)


@jax.jit
def grouped_dots(queries: Array, tile: Array, count: Array) -> tuple[Array, Array]:
  """[b, E], [E, T], real rows -> group maxima [b, T / GROUP] and similarities [b, T], float32."""
  scores = dots(queries, tile)
  return group_maxima(scores, count), scores


def over(
    maxima: Array,  # [b, T / GROUP] float32
    scores: Array,  # [b, T] float32
    count: int,  # real rows
    cut: np.ndarray,  # [b] float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All pairs with a score > cut: query [m] (ascending), position in the tile [m], score [m].

  Only groups whose maximum is over the cut are looked at; without any, `scores` is not fetched.
  """
  query, group = np.nonzero(np.asarray(maxima) > cut[:, None])
  if not len(query):
    return query, group, np.empty(0, np.float32)
  scores = np.asarray(scores)
  values = scores.reshape(len(scores), GROUP, -1)[query, :, group]  # [m, GROUP]
  position = np.arange(GROUP) * (scores.shape[1] // GROUP) + group[:, None]  # [m, GROUP]
  hit = (values > cut[query, None]) & (position < count)
  return query[np.nonzero(hit)[0]], position[hit], values[hit]
