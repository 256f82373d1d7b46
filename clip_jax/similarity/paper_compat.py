"""What the published code misses: rows over a threshold that its truncation never looks at.

Arrays in, numbers out; no files. The published code (Mayilvahanan et al. 2024) keeps, of every
chunk of about a million pool rows, each query's 20,000 most similar, and drops those of them that
are over the query's threshold. A row that is over thresholds, but outside the top of every such
query, stays in its pruned pool. Exact pruning drops it; here such rows are counted.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide

CHUNK_ROWS = 1_000_000  # of the published code, about
_ROWS = 65_536  # vectors that are widened to float64 at a time
_PAIRS = 1 << 26  # similarities that are held at a time


def chunks(
  parts: Iterable[tuple[Array, int]],
  chunk_rows: int = CHUNK_ROWS,
) -> Iterator[np.ndarray]:
  """Regroups pool rows by chunks of consecutive rows: [m] int64 of each chunk that has any.

  A part is (rows [m] int64 in order, the pool row after the last one that it speaks of). Memory is
  that of one part and one chunk.
  """
  held = np.zeros(0, np.int64)
  for rows, stop in parts:
    held = np.concatenate([held, rows])
    whole, held = np.split(held, [np.searchsorted(held, stop // chunk_rows * chunk_rows)])
    if len(whole):
      yield from np.split(whole, np.flatnonzero(np.diff(whole // chunk_rows)) + 1)
  if len(held):
    yield held  # the last chunk is shorter


def missed(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [m] int64, in order: all rows of one chunk that are over some threshold
  queries: Array,  # [Q, E] float16
  thresholds: Array,  # [Q] float64, exact
  top_k: int,
) -> int:
  """How many of the rows are outside the top k, within the chunk, of every query they exceed.

  Rows more similar to a query than one that exceeds it exceed it, too: a query's top k can only
  cut where more than k rows exceed it, and only those rows count for its order. So nothing is
  computed for k rows or fewer, and no other row of the chunk is read. Exact; ties: the lowest row.
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
    for one, threshold in zip(similarity, thresholds[part]):
      over = np.flatnonzero(one > threshold)
      kept[over[np.argsort(-one[over], kind='stable')[:top_k]]] = True
  left = np.flatnonzero(~kept)  # the other queries' top k holds all rows that exceed them
  excess = decide.exact_excess(vectors[left], queries[~crowded], thresholds[~crowded])
  return int((excess <= 0).sum())
