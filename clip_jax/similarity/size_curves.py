"""How many rows lie over a threshold, for all thresholds at once: sizes before anything is pruned.

Arrays in, arrays out; no files. A split's size is then a look-up: gap-aligned with slack s drops
the rows with an excess > s, near-pruned at similarity s drops those with a similarity > s, and
far-pruned keeps them.
"""

from collections.abc import Callable, Iterable

import numpy as np

from clip_jax.core.types import Array

EDGES = (
  np.arange(-1000, 1001) / 1000
)  # [M] float64; a quotient, so that an edge is the literal 0.005
ZERO = 1000  # the edge 0


def over(values: Array) -> np.ndarray:  # [n] float32, no NaN -> [M] int64
  """How many values are strictly over each edge."""
  return len(values) - np.searchsorted(np.sort(values), EDGES, side='right')


def over_zero(
  excess: Array,  # [n] float32, off by less than the tolerance
  tolerance: float,
  exact: Callable[[Array], Array],  # positions [m] int64 -> [m] float64, the exact excess
) -> np.ndarray:
  """Which rows have an excess strictly over 0, [n] bool: those near 0 are decided by `exact`."""
  found = excess > 0
  doubt = np.flatnonzero(np.abs(excess) <= tolerance)
  if len(doubt):
    found[doubt] = exact(doubt) > 0
  return found


def count(
  parts: Iterable[tuple[Array, Array | None, Array | None]],
  benchmarks: int,  # G
) -> dict[str, np.ndarray]:
  """Counts over all parts of a pool, of each benchmark and (the last row) of all together.

  A part is (similarity [G, n] float32, excess [G, n] float32, dropped [G, n] bool) of some
  candidates, where dropped says exactly which have an excess > 0; excess and dropped are None
  where there is no anchor. Several benchmarks together: the highest similarity and excess of each
  row. Memory is that of one part.

  Returns edges [M] float64; similarity_over and excess_over [G + 1, M] int64, the rows strictly
  over each edge; excess_zero [G + 1] int64, those that gap-aligned pruning drops (the edge 0 of
  excess_over is the same number); has_excess (False: those two hold zeros); candidates, how many
  rows were seen.
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
  for one, column in zip(counts, values):
    one += over(column)
  counts[-1] += over(values.max(0))
