"""Counts rows over a threshold that the published code keeps, because of its top-k truncation.

Arrays in, numbers out; no files. The published code (Mayilvahanan et al. 2024) considers, in every
chunk of about a million pool rows, only each query's 20,000 most similar rows, and drops those over
the query's threshold. A row over thresholds, but outside the top 20,000 of every such query, stays
in its pruned pool. Exact pruning drops it; this module counts such rows.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide

CHUNK_ROWS = 1_000_000  # approximate chunk size of the published code
_ROWS = 65_536  # vectors widened to float64 at a time
_PAIRS = 1 << 26  # similarities in memory at a time


def regroup_rows(
  parts: Iterable[tuple[Array, int]],
  chunk_rows: int = CHUNK_ROWS,
) -> Iterator[np.ndarray]:
  """Regroups pool rows by chunks of consecutive rows: yields [m] int64 of each non-empty chunk.

  A part is (rows [m] int64 in ascending order, end of the part's range of pool rows). Memory: one
  part and one chunk.
  """
  held = np.zeros(0, np.int64)
  for rows, stop in parts:
    held = np.concatenate([held, rows])
    whole, held = np.split(held, [np.searchsorted(held, stop // chunk_rows * chunk_rows)])
    if len(whole):
      yield from np.split(whole, np.flatnonzero(np.diff(whole // chunk_rows)) + 1)
  if len(held):
    yield held  # the last chunk is shorter


def count_missed(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [m] int64, ascending: all rows of one chunk that are over some threshold
  queries: Array,  # [Q, E] float16
  thresholds: Array,  # [Q] float64, exact
  top_k: int,
) -> int:
  """Returns the number of rows outside the top k of every query whose threshold they exceed.

  If a row exceeds a query's threshold, all rows more similar to that query exceed it too. A query's
  top k within the chunk therefore truncates only if more than k rows exceed its threshold, and only
  those rows matter for its order. So k rows or fewer need no computation, and no other row of the
  chunk is read. Exact; ties: the lowest row.
  """
  if len(rows) <= top_k:
    return 0
  vectors = x[rows]
  crowded = decide.count_over(vectors, queries, thresholds, margins=(0.0,))[:, 0] > top_k
  if not crowded.any():
    return 0
  kept = np.zeros(len(rows), bool)
  step = max(1, _PAIRS // len(rows))
  for part in np.split(np.flatnonzero(crowded), range(step, crowded.sum(), step)):
    q = queries[part].astype(np.float64)
    similarity = np.concatenate(
      [
        q @ vectors[i : i + _ROWS].astype(np.float64).T  # exact: see decide.py
        for i in range(0, len(rows), _ROWS)
      ],
      axis=1,
    )
    for row, threshold in zip(similarity, thresholds[part]):
      over = np.flatnonzero(row > threshold)
      kept[over[np.argsort(-row[over], kind='stable')[:top_k]]] = True
  left = np.flatnonzero(
    ~kept
  )  # the top k of the other queries holds all rows over their thresholds
  excess = decide.exact_excess(vectors[left], queries[~crowded], thresholds[~crowded])
  return int((excess <= 0).sum())
