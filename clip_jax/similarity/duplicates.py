"""De-duplication inside clusters: SemDeDup with a pool order, as in Mayilvahanan et al. 2024.

Rows and their clusters in, a mask out; no files.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.types import Array
from clip_jax.similarity import decide
from clip_jax.similarity import tiles


def within_clusters(
    x: Array,  # rows [N, E] float16
    usable: Array,  # [N] bool
    assignment: Array,  # [N] int32 cluster of each row
    *,
    threshold: float,  # 1 - similarity; the paper's is 0.124
    block_rows: int = 2048,
    name: str = 'pool',
) -> tuple[np.ndarray, np.ndarray]:
  """Drops a row if an earlier row of its cluster, kept or not, is > 1 - threshold similar to it.

  Returns keep [N] bool (False for unusable rows) and duplicate_of [N] int64: a dropped row's most
  similar earlier row of the cluster (ties: the lowest), -1 elsewhere. Similarity is divided by both
  norms, since float16 vectors are up to 1e-3 off unit length. float32 finds the candidates, and
  float64 decides; memory is one [block_rows, block_rows] block, whatever the size of a cluster.
  """
  if assignment.shape != usable.shape or usable.shape != (x.shape[0],):
    raise ValueError(f'rows [N, E] {x.shape}, usable [N] {usable.shape} and assignment [N] '
                     f'{assignment.shape} must agree in N')
  cut = 1 - threshold
  slack = 2 * decide.error_bound(x.shape[1])
  seen = np.full(len(usable), -np.inf, np.float32)  # float32 maximum over the blocks so far
  best = np.full(len(usable), -np.inf)
  duplicate_of = np.full(len(usable), -1)
  for later, earlier, maxima, scores in tiles.one_ahead(
      _block_pairs(x, usable, assignment, block_rows, name)):
    rows, others = later.rows, earlier.rows
    seen[rows] = np.maximum(seen[rows], np.asarray(maxima).max(1)[:len(rows)])
    least = np.full(len(maxima), np.inf)  # no pair of a padding row
    least[:len(rows)] = np.maximum(seen[rows], cut) - slack
    query, position, _ = tiles.over(maxima, scores, len(others), least)
    exact = decide.pair_dots(later.host, query, earlier.host, position)
    exact /= np.sqrt(later.squares[query] * earlier.squares[position])
    decide.update_best(best, duplicate_of, rows[query], exact, others[position])
  duplicate = best > cut
  duplicate_of[~duplicate] = -1
  return usable & ~duplicate, duplicate_of


class _Block(NamedTuple):
  """Some of a cluster's rows, from its `start`-th on; padding repeats the last one."""

  start: int
  rows: np.ndarray  # [count] int64
  host: np.ndarray  # [T, E] float16
  squares: np.ndarray  # [T] float64 squared norms, exact
  device: Array  # [T, E] float32
  inverse: Array  # [T] float32, 1 / norm


def _load(x: Array, rows: np.ndarray, start: int, block_rows: int, name: str) -> _Block:
  rows = rows[start:start + block_rows]
  size = tiles.padded(len(rows), block_rows)
  host = np.asarray(x[np.pad(rows, (0, size - len(rows)), mode='edge')])
  squares = np.square(host, dtype=np.float64).sum(1)
  norms = np.sqrt(squares)
  tiles.check_norms(norms, rows, name)
  return _Block(start, rows, host, squares, *jax.device_put(
      (host.astype(np.float32), (1 / norms).astype(np.float32))))


def _block_pairs(x, usable, assignment, block_rows, name) -> Iterator[tuple]:
  """Yields (later block, earlier or same block, group maxima, similarities) of every cluster."""
  rows = np.flatnonzero(usable)
  rows = rows[np.argsort(assignment[rows], kind='stable')]
  first = np.flatnonzero(np.diff(assignment[rows], prepend=-1))
  block_rows = tiles.padded(block_rows, block_rows)
  for cluster in np.split(rows, first[1:]):
    for i in range(0, len(cluster) if len(cluster) > 1 else 0, block_rows):
      later = _load(x, cluster, i, block_rows, name)
      for j in range(0, i + 1, block_rows):
        earlier = later if i == j else _load(x, cluster, j, block_rows, name)
        yield later, earlier, *_similarities(
            later.device, later.inverse, earlier.device, earlier.inverse, i - j, len(earlier.rows))


@jax.jit
def _similarities(later, later_inverse, earlier, earlier_inverse, distance, count):
  """[b, E], [b], [T, E], [T] -> group maxima and cosines [b, T]; -inf unless the row is earlier."""
  scores = tiles.dots(later, earlier.T) * later_inverse[:, None] * earlier_inverse[None]
  row = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + distance
  scores = jnp.where(row > lax.broadcasted_iota(jnp.int32, scores.shape, 1), scores, -jnp.inf)
  return tiles.group_maxima(scores, count), scores
