"""Number of rows over every threshold: the sizes of splits before pruning.

Arrays in, arrays out; no files. A split's size is then a look-up: gap-aligned with slack s drops
the rows with excess > s, near-pruned at similarity s drops the rows with similarity > s, and
far-pruned keeps these.
"""

from collections.abc import Callable, Iterable

import numpy as np

from clip_jax.core.types import Array

EDGES = np.arange(-1000, 1001) / 1000  # [M] float64; by division, edges equal literals like 0.005
ZERO = 1000  # position of the edge 0


def count_over_edges(values: Array) -> np.ndarray:  # [n] float32, no NaN -> [M] int64
  """Returns the number of values strictly over each edge."""
  return len(values) - np.searchsorted(np.sort(values), EDGES, side='right')


def is_over_zero(
  excess: Array,  # [n] float32, with errors below the tolerance
  tolerance: float,
  exact: Callable[[Array], Array],  # positions [m] int64 -> [m] float64, the exact excess
) -> np.ndarray:
  """Returns which rows have an excess over 0, [n] bool; `exact` decides values near 0."""
  is_over = excess > 0
  doubt = np.flatnonzero(np.abs(excess) <= tolerance)
  if len(doubt):
    is_over[doubt] = exact(doubt) > 0
  return is_over


def count_candidates(
  parts: Iterable[tuple[Array, Array | None, Array | None]],
  benchmarks: int,  # G
) -> dict[str, np.ndarray]:
  """Returns counts over all parts of a pool, for each benchmark and (last row) for all together.

  A part is (similarity [G, n] float32, excess [G, n] float32, dropped [G, n] bool) of candidates.
  dropped is exact: excess > 0. Without an anchor, excess and dropped are None. All benchmarks
  together use the highest similarity and excess of each row. Memory: one part.

  Returns edges [M] float64; similarity_over and excess_over [G + 1, M] int64, the number of rows
  strictly over each edge; excess_zero [G + 1] int64, the number that gap-aligned pruning drops
  (equal to excess_over at edge 0); has_excess (False: excess_over and excess_zero are zeros);
  candidates, the number of rows.
  """
  shape = benchmarks + 1, len(EDGES)
  similar, exceeding = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
  zero, candidates, has_excess = np.zeros(benchmarks + 1, np.int64), 0, False
  for similarity, excess, dropped in parts:
    candidates += similarity.shape[1]
    _add(similar, similarity)
    if excess is not None and dropped is not None:
      has_excess = True
      _add(exceeding, excess)
      zero[:-1] += dropped.sum(1)
      zero[-1] += dropped.any(0).sum()
  exceeding[:, ZERO] = zero
  return {
    'edges': EDGES,
    'similarity_over': similar,
    'excess_over': exceeding,
    'excess_zero': zero,
    'has_excess': np.array(has_excess),
    'candidates': np.array(candidates),
  }


def _add(counts: np.ndarray, values: Array) -> None:  # [G + 1, M] in place, [G, n]
  for count_of, column in zip(counts, values):
    count_of += count_over_edges(column)
  counts[-1] += count_over_edges(values.max(0))
