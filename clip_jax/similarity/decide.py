"""Exact float64 decisions for pairs that float32 cannot decide.

Arrays in, arrays out; no files. In float64 the dot product of two float16 vectors of norm <= 1.1 is
EXACT for any order of addition: every product is a multiple of 2^-48, and every partial sum is
below 2 and so fits 53 bits. These functions therefore give the same results on every machine.
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.types import Array
from clip_jax.similarity import tiles


def error_bound(dim: int) -> float:
  """Returns a bound on the error of a float32 similarity or excess of E-dimensional vectors.

  Products of float16 numbers are exact in float32, and no partial sum exceeds 1.1 * 1.1. On a CPU,
  each of the E additions, in any order, has a rounding error of at most 2^-24 of that. A GPU's
  tensor cores truncate instead of rounding, by 2^-23: every number that is aligned to the largest,
  and the sum of at least four products once more. These are at most 1.25 E + 1 truncations of
  2^-23, fewer than E + 4 of 2^-22. The four cover the threshold's rounding and the subtraction.
  CPU and GPU share one bound, because rows may be searched on one and decided on the other. It is
  1.9e-4 at E = 640; errors in practice are near 2e-7.
  """
  return 1.21 * (dim + 4) * 2.0**-22


def pair_dots(
  q: Array,  # [Q, E] float16
  query: Array,  # [m] int
  x: Array,  # [n, E] float16
  row: Array,  # [m] int
) -> np.ndarray:
  """Returns the exact similarities of m pairs, float64 [m]; dense sets use a matrix product."""
  queries, query_index = np.unique(query, return_inverse=True)
  rows, row_index = np.unique(row, return_inverse=True)
  q, x = q[queries].astype(np.float64), x[rows].astype(np.float64)
  if len(queries) * len(rows) < 16 * len(query):
    return (q @ x.T)[query_index, row_index]
  step = 8192  # pairs at a time, to bound memory
  return np.concatenate(
    [np.zeros(0)]
    + [
      np.einsum('me,me->m', q[query_index[i : i + step]], x[row_index[i : i + step]])
      for i in range(0, len(query), step)
    ]
  )


def update_top(
  best: np.ndarray,  # [Q, k] float64, changed in place; -inf in empty places
  row: np.ndarray,  # [Q, k] int64, changed in place
  query: Array,  # [m] int
  value: Array,  # [m] float64
  rows: Array,  # [m] int64, none of them in earlier calls
) -> None:
  """Merges pairs into each query's list of the k highest values; ties: lowest row first."""
  k = best.shape[1]
  seen = np.unique(query)
  query = np.concatenate([np.repeat(seen, k), query])
  value = np.concatenate([best[seen].ravel(), value])
  rows = np.concatenate([row[seen].ravel(), rows])
  order = np.lexsort((rows, -value, query))
  start = np.searchsorted(query[order], seen)
  kept = order[start[:, None] + np.arange(k)]
  best[seen], row[seen] = value[kept], rows[kept]


def update_best(
  best: np.ndarray,  # [Q] float64, changed in place
  nearest: np.ndarray,  # [Q] int64, changed in place
  query: Array,  # [m] int
  value: Array,  # [m] float64
  row: Array,  # [m] int64, none lower than a row of earlier calls
) -> None:
  """Updates each query's best value and nearest row; ties: the lowest row."""
  order = np.lexsort((row, -value, query))
  query, value, row = query[order], value[order], row[order]
  first = np.flatnonzero(np.diff(query, prepend=-1))
  first = first[value[first] > best[query[first]]]
  best[query[first]], nearest[query[first]] = value[first], row[first]


def exact_similarity(
  x: Array,  # [m, E] float16
  q: Array,  # [Q, E] float16
) -> np.ndarray:
  """Returns the exact maximum over queries of the similarity, [m] float64."""
  return exact_excess(x, q, np.zeros(len(q)))


def exact_excess(
  x: Array,  # [m, E] float16
  q: Array,  # [Q, E] float16
  t: Array,  # [Q] float64, exact thresholds
) -> np.ndarray:
  """Returns the exact maximum over queries of similarity - t_i, [m] float64.

  A value above 0 means that the row is nearer to some query than any anchor image.
  """
  best, t = np.full(len(x), -np.inf), np.asarray(t)
  for i in range(0, len(x), 2048):
    rows = x[i : i + 2048].astype(np.float64)
    for j in range(0, len(q), 2048):
      excess = q[j : j + 2048].astype(np.float64) @ rows.T - t[j : j + 2048, None]
      np.maximum(best[i : i + 2048], excess.max(0), out=best[i : i + 2048])
  return best


def count_over(
  x: Array,  # rows [m, E] float16
  q: Array,  # [Q, E] float16
  t: Array,  # [Q] float64, exact thresholds
  margins: Sequence[float] = (0.0, 0.02),
  *,
  tile_rows: int = 0,
  query_block: int = 0,
  name: str = 'removed rows',
) -> np.ndarray:
  """Returns the exact number of rows with similarity > t_i - margin, [Q, len(margins)] int64.

  float32 decides pairs farther from the cut than the error bound, float64 decides the others.
  """
  tile_rows, query_block = tiles.default_sizes(tile_rows, query_block)
  cut = np.asarray(t, np.float64)[:, None] - np.asarray(margins, np.float64)  # [Q, margins]
  doubt = error_bound(x.shape[1])
  low, high = (cut - doubt).astype(np.float32), (cut + doubt).astype(np.float32)
  counts = np.zeros(cut.shape, np.int64)
  if not len(q):
    return counts
  numbers, _ = tiles.query_blocks([len(q)], query_block)
  blocks = [
    (block, *jax.device_put((q[block].astype(np.float32), low[block], high[block])))
    for block in numbers
  ]

  def scored_blocks():
    for tile in tiles.walk(x, np.arange(len(x)), tile_rows, name):
      for block, vectors, lows, highs in blocks:
        yield tile, block, *_count_block(vectors, tile.device, lows, highs, tile.count)

  for tile, block, clear, doubtful, scores in tiles.one_ahead(scored_blocks()):
    real = block[: block[-1] - block[0] + 1]  # without the padding, which repeats the last query
    counts[real] += np.asarray(clear)[: len(real)]
    for margin in range(len(margins)):
      query = real[np.asarray(doubtful)[: len(real), margin] > 0]
      seen = np.asarray(scores)[query - block[0], : tile.count] if len(query) else np.empty((0, 0))
      pair, position = np.nonzero(
        (seen > low[query, margin, None]) & (seen <= high[query, margin, None])
      )
      query = query[pair]
      over = pair_dots(q, query, tile.host, position) > cut[query, margin]
      np.add.at(counts[:, margin], query, over)
  return counts


@jax.jit
def _count_block(queries, tile, low, high, rows):
  """Returns counts of pairs over `high`, and between `low` and `high`, and similarities [b, T].

  queries [b, E], tile [T, E], low and high [b, margins], rows without padding; counts are
  [b, margins] each.
  """
  scores = tiles.dots(queries, tile)
  real = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < rows
  margins = range(low.shape[1])
  over_high = jnp.stack([((scores > high[:, i : i + 1]) & real).sum(1) for i in margins], 1)
  over_low = jnp.stack([((scores > low[:, i : i + 1]) & real).sum(1) for i in margins], 1)
  return over_high, over_low - over_high, scores
