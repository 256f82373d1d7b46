"""De-duplication within clusters: SemDeDup with an order, as in Mayilvahanan et al. 2024.

Rows and their clusters in, dropped rows out; no files.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide, tiles


class Dropped(NamedTuple):
  """The rows that one block drops: a pure function of the rows, independent of other blocks."""

  blocks: int  # number of finished blocks, this one included
  rows: np.ndarray  # [m] int64, the block's dropped rows
  duplicate_of: np.ndarray  # [m] int64


def dropped(
  x: Vectors,  # rows [N, E] float16
  usable: Array,  # [N] bool
  assignment: Array,  # [N] int32 cluster of each row
  *,
  threshold: float,  # 1 - similarity; the paper's is 0.124
  priority: Array | None = None,  # [N] number; None: pool order
  start: int = 0,  # number of blocks finished earlier, which are skipped
  block_rows: int = 2048,
  name: str = 'pool',
) -> Iterator[Dropped]:
  """Drops a row if an earlier row of its cluster, kept or not, is > 1 - threshold similar to it.

  "Earlier" means pool order or, with a priority, highest priority first and pool order among
  equals. duplicate_of: the dropped row's most similar earlier row of the cluster (ties: the
  earliest). Yields block by block, so that a caller can stop and resume.

  Chains: dropped rows also drop others, so duplicate_of may be a dropped row. The chain of
  duplicate_of goes to ever earlier rows and ends at a kept row, which may not be similar to the
  first. A chain can therefore drop a row to which no kept row is similar (missed_duplicates.py
  counts these rows).

  Similarity is divided by both norms, since norms of float16 vectors are off by up to 1e-3. float32
  finds the candidates, float64 decides. Memory, besides the order of the rows, is one
  [block_rows, block_rows] block for any size of cluster.
  """
  if assignment.shape != usable.shape or usable.shape != (x.shape[0],):
    raise ValueError(
      f'rows [N, E] {x.shape}, usable [N] {usable.shape} and assignment [N] '
      f'{assignment.shape} must agree in N'
    )
  cut = 1 - threshold
  slack = 2 * decide.error_bound(x.shape[1])
  for later, earlier, best, maxima, scores in tiles.one_ahead(
    _block_pairs(x, usable, assignment, priority, start, block_rows, name)
  ):
    count = len(later.rows)
    np.maximum(best.seen, np.asarray(maxima).max(1)[:count], out=best.seen)
    least = np.full(len(maxima), np.inf)  # excludes padding rows
    least[:count] = np.where(best.similarity < 1, np.maximum(best.seen, cut) - slack, np.inf)
    query, position, _ = tiles.pairs_over(maxima, scores, len(earlier.rows), least)
    exact = decide.pair_dots(later.host, query, earlier.host, position)
    exact /= np.sqrt(later.squares[query] * earlier.squares[position])
    # Caps cosines at 1, so that rounding does not let a later copy beat the first one.
    decide.update_best(
      best.similarity, best.place, query, np.minimum(exact, 1), earlier.place + position
    )
    if earlier.place == later.place:  # the block itself is the last of its earlier blocks
      is_dropped = np.flatnonzero(best.similarity > cut)
      yield Dropped(best.block + 1, later.rows[is_dropped], best.order[best.place[is_dropped]])


class _Best(NamedTuple):
  """The most similar earlier rows of one block's rows, so far."""

  block: int
  order: np.ndarray  # [n] int64, the cluster's rows in their order
  seen: np.ndarray  # [count] float32, maximum
  similarity: np.ndarray  # [count] float64, exact if it may be over the cut
  place: np.ndarray  # [count] int64, that row's position in `order`


class _Block(NamedTuple):
  """Consecutive rows of a cluster from position `place` on; padding repeats the last row."""

  place: int
  rows: np.ndarray  # [count] int64
  host: np.ndarray  # [T, E] float16
  squares: np.ndarray  # [T] float64 squared norms, exact
  device: jax.Array  # [T, E] float32
  inverse: jax.Array  # [T] float32, 1 / norm


def _load(x: Vectors, rows: np.ndarray, place: int, block_rows: int, name: str) -> _Block:
  rows = rows[place : place + block_rows]
  size = tiles.padded(len(rows), block_rows)
  host = np.asarray(x[np.pad(rows, (0, size - len(rows)), mode='edge')])
  squares = np.square(host, dtype=np.float64).sum(1)
  norms = np.sqrt(squares)
  tiles.check_norms(norms, rows, name)
  return _Block(
    place,
    rows,
    host,
    squares,
    *jax.device_put((host.astype(np.float32), (1 / norms).astype(np.float32))),
  )


def ordered(
  rows: Array,  # [n] int64, ascending
  assignment: Array,  # [N] int32
  priority: Array | None,  # [N]
) -> np.ndarray:
  """Returns the rows sorted by cluster and, within a cluster, by priority or pool order."""
  if priority is not None:
    rows = rows[np.argsort(-priority[rows], kind='stable')]
  return rows[np.argsort(assignment[rows], kind='stable')]


def _block_pairs(x, usable, assignment, priority, start, block_rows, name) -> Iterator[tuple]:
  """Yields (later block, earlier block or the same, its best, group maxima, similarities)."""
  rows = ordered(np.flatnonzero(usable), assignment, priority)
  edges = np.flatnonzero(np.diff(assignment[rows], prepend=-1, append=-1))  # cluster boundaries
  block_rows = tiles.padded(block_rows, block_rows)
  block = -1
  for first, stop in zip(edges[:-1], edges[1:]):
    cluster = rows[first:stop]
    for i in range(0, len(cluster), block_rows):
      block += 1
      if block < start or len(cluster) == 1:
        continue
      later = _load(x, cluster, i, block_rows, name)
      count = len(later.rows)
      best = _Best(
        block,
        cluster,
        np.full(count, -np.inf, np.float32),
        np.full(count, -np.inf),
        np.full(count, -1),
      )
      for j in range(0, i + 1, block_rows):
        if i != j and (best.similarity == 1).all():
          continue  # every row already has an exact copy: no row is nearer
        earlier = later if i == j else _load(x, cluster, j, block_rows, name)
        yield (
          later,
          earlier,
          best,
          *_similarities(later.device, later.inverse, earlier.device, earlier.inverse, i - j),
        )


def blocks(
  usable: Array,  # [N] bool
  assignment: Array,  # [N] int32
  block_rows: int = 2048,
) -> int:
  """Returns the number of blocks of `dropped`, including those of clusters of one row."""
  sizes = np.bincount(assignment[usable])
  return int((-(-sizes // tiles.padded(block_rows, block_rows))).sum())


@jax.jit
def _similarities(later, later_inverse, earlier, earlier_inverse, distance):
  """Returns group maxima and cosines [b, T], -inf for pairs whose row is not earlier."""
  scores = tiles.dots(later, earlier) * later_inverse[:, None] * earlier_inverse[None]
  row = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + distance
  scores = jnp.where(row > lax.broadcasted_iota(jnp.int32, scores.shape, 1), scores, -jnp.inf)
  return tiles.group_maxima(scores), scores
