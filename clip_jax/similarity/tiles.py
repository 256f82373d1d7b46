"""Stored vectors in tiles on the device, and the dot product of all float32 similarities.

float16 rows in, float32 similarities out; the caller maps the files.

Shapes are padded to multiples of 64: for such shapes, the matrix product of a backend adds the E
products of a (query, row) pair in one fixed order, for every tile, block, shard and number of
threads. For smaller shapes it uses other loops, and the last bits change.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array, Vectors

PAD = 64  # rows and queries are padded to multiples of this: see above
GROUP = 16  # rows, or queries, per group maximum; only groups whose maximum matters are read
NORMS = (0.9, 1.1)  # allowed norms of unit vectors; float16 norms are off by up to 1e-3


class Tile(NamedTuple):
  """`count` real rows from position `start` of the row list; padding repeats the last row."""

  start: int
  count: int
  host: np.ndarray  # [T, E] float16
  device: jax.Array  # [T, E] float32, or the dtype given to walk()


def padded(count: int, most: int) -> int:
  """Returns the padded size of `count` rows: 64 times a power of two, at most `most` rounded up.

  Powers of two keep the number of compiled shapes small when shards differ in length.
  """
  most = -(-most // PAD) * PAD
  return min(most, PAD << (-(-count // PAD) - 1).bit_length())


def default_sizes(tile_rows: int, query_block: int) -> tuple[int, int]:
  """Returns both sizes, with 0 replaced by the backend's default; they change only the speed.

  CPU: a block of scores, [512, 2048] float32, is 4 MiB and stays in the cache from the product to
  the maxima; half or twice either size is equally fast. Accelerators need larger products.
  """
  rows, block = (2048, 512) if jax.default_backend() == 'cpu' else (32_768, 2048)
  return tile_rows or rows, query_block or block


def walk(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [n] int64, the rows to visit, in this order
  tile_rows: int,
  name: str,  # the name of the rows in errors
  *,
  devices: Sequence = (None,),  # devices that get tiles in turn; None: the default device
  dtype=np.float32,  # of Tile.device
) -> Iterator[Tile]:
  """Yields the rows tile by tile; raises InputError for a row that is not a unit vector.

  A thread reads the next tile in advance, because reading a memory map waits for the disk.
  """
  if x.dtype != np.float16:
    raise ValueError(f'{name}: vectors must be float16 [N, E]; got {x.dtype} {x.shape}')
  step = padded(tile_rows, tile_rows)
  parts = [rows[start : start + step] for start in range(0, len(rows), step)]

  def read(part: np.ndarray) -> np.ndarray:
    size = padded(len(part), step)
    return np.asarray(x[np.pad(part, (0, size - len(part)), mode='edge')])

  late = None  # norms are checked one tile later, so that the device does not wait for the host
  with futures.ThreadPoolExecutor(1) as reader:
    reading = [reader.submit(read, part) for part in parts[:1]]
    for i, part in enumerate(parts):
      host = reading.pop().result()
      reading = [reader.submit(read, following) for following in parts[i + 1 : i + 2]]
      device, norms = _load(jax.device_put(host, devices[i % len(devices)]), dtype)
      if late is not None:
        check_norms(*late, name)
      late = norms, part
      yield Tile(i * step, len(part), host, device)
  if late is not None:
    check_norms(*late, name)


def check_norms(norms: Array, rows: Array, name: str) -> None:  # [>= n] float32, [n] int64
  """Raises InputError unless the first n norms are those of unit vectors."""
  norms = np.asarray(norms)[: len(rows)]
  bad = np.flatnonzero(~((norms >= NORMS[0]) & (norms <= NORMS[1])))  # includes NaN
  if len(bad):
    raise InputError(
      f'{name}: row {rows[bad[0]]} is marked usable, but its vector has norm {norms[bad[0]]:g} '
      f'instead of 1 ({len(bad)} such rows in this tile). '
      'Embed that shard again, or mark the row unusable.'
    )


def query_blocks(
  sizes: Sequence[int],  # number of queries of each benchmark, all > 0, in order
  query_block: int,  # maximum size of a block, rounded up to a multiple of 64
) -> tuple[np.ndarray, np.ndarray]:
  """Arranges all queries in blocks of equal size, the size with the least padding.

  Returns the query in each slot [blocks, b] int64 and the benchmark of each GROUP of slots
  [blocks, b / GROUP] int64. Equal sizes need one compiled shape. Each benchmark starts a new group,
  and padding repeats its last query: this changes no maximum, and the lowest number wins a tie.
  """
  groups = [-(-size // GROUP) for size in sizes]
  total = sum(groups) * GROUP

  def cost(block: int) -> int:  # in padded queries; the start of a block costs about 24
    return -(-total // block) * (block + 24)

  block = min(range(PAD, -(-query_block // PAD) * PAD + 1, PAD), key=cost)
  groups[-1] += -total % block // GROUP
  starts = np.cumsum([0, *sizes])
  query = np.concatenate(
    [
      start + np.minimum(np.arange(count * GROUP), size - 1)
      for start, size, count in zip(starts, sizes, groups)
    ]
  )
  return query.reshape(-1, block), np.repeat(np.arange(len(sizes)), groups).reshape(
    -1, block // GROUP
  )


def one_ahead(items: Iterable, depth: int = 1) -> Iterator:
  """Yields each item after the next `depth` items are computed.

  The device computes an item while the host reads an earlier one. Use depth = number of devices.
  """
  pending = collections.deque()
  for item in items:
    pending.append(item)
    if len(pending) > depth:
      yield pending.popleft()
  yield from pending


@functools.partial(jax.jit, static_argnames='dtype')
def _load(
  x: jax.Array, dtype
) -> tuple[jax.Array, jax.Array]:  # [T, E] float16 -> [T, E], norms [T] float32
  exact = x.astype(jnp.float32)
  return x.astype(dtype), jnp.sqrt((exact * exact).sum(1))


def dots(queries: jax.Array, rows: jax.Array) -> jax.Array:  # [b, E], [T, E] -> [b, T] float32
  """Returns float32 dot products; HIGHEST keeps GPUs from rounding float32 to TF32."""
  return lax.dot_general(
    queries,
    rows,
    (((1,), (1,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def lowest_argmax(
  scores: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # [b, T] -> [T] maximum, [T] int32
  """Returns the maximum over the first axis and its lowest index; argmax is slower on a CPU."""
  best = scores.max(0)
  index = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  return best, jnp.where(scores == best[None], index, scores.shape[0]).min(0)


def group_maxima(scores: jax.Array) -> jax.Array:  # [b, T] -> [b, T / GROUP]
  """Returns maxima of groups of GROUP rows, T / GROUP apart, which keeps the last axis long.

  Padding is included: it repeats a row, so it does not change a query's maximum.
  """
  return scores.reshape(scores.shape[0], GROUP, -1).max(1)


@jax.jit
def grouped_dots(queries: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns group maxima [b, T / GROUP] and similarities [b, T] float32."""
  scores = dots(queries, rows)
  return group_maxima(scores), scores


def pairs_over(
  maxima: jax.Array,  # [b, T / GROUP] float32
  scores: jax.Array,  # [b, T] float32
  count: int,  # rows without padding
  cut: np.ndarray,  # [b] float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns all pairs with a score > cut, unordered: query, position in the tile, score, each [m].

  Only groups whose maximum is over the cut are read; without any, `scores` is not copied.
  """
  width = maxima.shape[1]
  query, group = np.divmod(np.flatnonzero(np.asarray(maxima) > cut[:, None]), width)
  if not len(query):
    return query, group, np.empty(0, np.float32)
  place = query * scores.shape[1] + group + np.arange(GROUP)[:, None] * width  # [GROUP, m]
  values = np.asarray(scores).ravel().take(place)
  member, pair = np.divmod(np.flatnonzero(values > cut[query]), len(query))
  position = member * width + group[pair]
  real = position < count
  return query[pair[real]], position[real], values[member, pair][real]


def kth_lower_bound(maxima: jax.Array, scores: jax.Array, count: int, k: int) -> np.ndarray:
  """Returns a value that at least k of the tile's rows reach, for each query: [b] float32.

  The k-th largest group maximum is such a value, and cheaper than the k-th score. In a padded tile,
  a row's score can be in two groups, so it is used there only for k = 1.
  """
  values = np.asarray(maxima)
  if k > values.shape[1] or (k > 1 and count < scores.shape[1]):
    values = np.asarray(scores)[:, :count]
  return np.partition(values, -k, axis=1)[:, -k]
