"""What the published code misses: rows over a threshold that its truncation never looks at.

Arrays in, numbers out; no files. The published code (Mayilvahanan et al. 2024) keeps, of every
chunk of about a million pool rows, each query's 20,000 most similar, and drops those of them that
are over the query's threshold. A row that is over thresholds, but outside the top of every such
query, stays in its pruned pool. Exact pruning drops it; here such rows are counted.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from clip_jax.core.types import Array
from clip_jax.similarity import decide

CHUNK_ROWS = 1_000_000  # of the published code, about
_ROWS = 65_536  # vectors that are read at a time
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
    while len(held) and (held[0] // chunk_rows + 1) * chunk_rows <= stop:
      count = np.searchsorted(held, (held[0] // chunk_rows + 1) * chunk_rows)
      yield held[:count]
      held = held[count:]
  while len(held):  # the last chunk is shorter
    count = np.searchsorted(held, (held[0] // chunk_rows + 1) * chunk_rows)
    yield held[:count]
    held = held[count:]


def missed(
    x: Array,  # rows [N, E] float16
    rows: Array,  # [m] int64, in order: all rows of one chunk that are over some threshold
    queries: Array,  # [Q, E] float16
    thresholds: Array,  # [Q] float64, exact
    top_k: int,
) -> int:
  """How many of the rows are outside the top k, within the chunk, of every query they exceed.

  Rows more similar to a query than one that exceeds it exceed it, too: a query's top k can only
  cut where more than k rows exceed it, and only those rows count for its order. So nothing is
  computed for k rows or fewer, and no other row of the chunk is read. Exact: float32 finds, float64
  decides what is near a threshold or a k-th; ties the lowest row.
  """
  if len(rows) <= top_k:
    return 0
  counts = np.zeros(len(queries), np.int64)
  for start in range(0, len(rows), _ROWS):
    counts += decide.count_at_most(x[rows[start:start + _ROWS]], queries, thresholds)
  crowded = counts > top_k  # and perhaps a few others, of which _by_top cuts nothing
  if not crowded.any():
    return 0
  cut, kept = _by_top(x, rows, queries[crowded], thresholds[crowded], top_k)
  doubtful = rows[cut & ~kept]
  if crowded.all():
    return len(doubtful)
  return len(doubtful) - _exceeding(x, doubtful, queries[~crowded], thresholds[~crowded])


def _by_top(x, rows, queries, thresholds, top_k: int) -> tuple[np.ndarray, np.ndarray]:
  """Which rows exceed some query and are outside its top k, and which inside: [m] bool each."""
  cut, kept = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
  bound = decide.error_bound(queries.shape[1])
  step = max(1, _PAIRS // len(rows))
  for i in range(0, len(queries), step):
    q = queries[i:i + step]
    scores = np.empty([len(q), len(rows)], np.float32)
    for j in range(0, len(rows), _ROWS):
      part = x[rows[j:j + _ROWS]].astype(np.float32)
      np.matmul(q.astype(np.float32), part.T, out=scores[:, j:j + len(part)])
    for query, one, threshold in zip(q, scores, thresholds[i:i + step]):
      place = np.flatnonzero(one >= threshold - bound)  # all that may be over it
      value = one[place].astype(np.float64)
      doubt = np.abs(value - threshold) <= bound
      if len(place) > top_k:  # the exact k-th lies within the bound of this one
        doubt |= np.abs(value - np.partition(value, -top_k)[-top_k]) <= 2 * bound
      value[doubt] = decide.exact_similarity(x[rows[place[doubt]]], query[None])
      place, value = place[value > threshold], value[value > threshold]
      top = np.ones(len(place), bool)
      if len(place) > top_k:
        kth = np.partition(value, -top_k)[-top_k]
        top = value > kth
        top[np.flatnonzero(value == kth)[:top_k - top.sum()]] = True  # ties: the lowest row
      kept[place[top]] = True
      cut[place[~top]] = True
  return cut, kept


def _exceeding(x, rows, queries, thresholds) -> int:
  """How many rows exceed some of these queries, exactly."""
  found, bound = 0, decide.error_bound(queries.shape[1])
  step = max(1, _PAIRS // len(queries))
  for start in range(0, len(rows), step):
    part = x[rows[start:start + step]]
    excess = queries.astype(np.float32) @ part.T.astype(np.float32)
    excess = (excess - thresholds[:, None].astype(np.float32)).max(0)
    near = np.abs(excess) <= bound
    found += int((excess > bound).sum())
    found += int((decide.exact_excess(part[near], queries, thresholds) > 0).sum())
  return found
