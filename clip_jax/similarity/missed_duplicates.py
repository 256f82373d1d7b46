"""De-duplication within clusters against exhaustive search: recall, precision, chains.

Rows and clusterings in, counts out; no files. Near-duplicates in different clusters are never
compared. To measure how many are missed, a random sample of rows is compared with ALL rows: a
clustering finds a pair if both rows are in one cluster. Pairs within a sample alone would be too
few: only the square of its share of all pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math

import jax
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide, kmeans, tiles

Z = 1.959963984540054  # normal quantile of a 95 % interval
EDGES = 1 << 22  # pairs held before they are reduced to fewer pairs that join the same groups


@dataclass(frozen=True)
class Clustering:
  """The sampled rows and their pairs under one clustering."""

  clusters: int
  found: int  # pairs within one cluster
  recall: float  # of all pairs; NaN without pairs
  low: float  # its 95 % interval
  high: float
  dropped: int  # sampled rows with an earlier duplicate in their cluster
  precision: float  # share of the dropped rows that exhaustive search drops too; NaN without any


@dataclass(frozen=True)
class MissedDuplicates:
  """The result of exhaustive search for the sample, and of each clustering in the given order."""

  pairs: int  # near-duplicate pairs with at least one sampled row
  dropped_exhaustive: int  # sampled rows with an earlier duplicate anywhere
  clusterings: tuple[Clustering, ...]
  components: int  # groups of rows that these pairs join, directly or through other rows
  sizes: dict[int, int]  # rows of a group, unsampled rows included -> number of groups
  through_dropped: int  # dropped sampled rows of which no kept earlier row is a duplicate


def measure(
  x: Vectors,  # rows [N, E] float16
  usable: Array,  # [N] bool
  sample: Array,  # [S] int64, ascending: usable rows drawn at random
  clusterings: Sequence[Array],  # centres, each [K, E] float32
  *,
  threshold: float,  # 1 - similarity
  keep: Array,  # [N] bool: rows kept by de-duplication
  priority: Array | None = None,  # [N]: see duplicates.py
  on_rows: Callable[[int], None] = lambda count: None,  # called with the number of new rows done
  tile_rows: int = 0,
  query_block: int = 0,
  name: str = 'pool',
) -> MissedDuplicates:
  """Compares the sampled rows with all usable rows; `keep` is from the last clustering.

  A pair of two sampled rows counts once. The interval is Wilson's, for (sum n)^2 / sum n^2
  observations, where n is the number of pairs of each row: rows were sampled, not pairs, and the
  pairs of a row are often found or missed together.
  """
  tile_rows, query_block = tiles.default_sizes(tile_rows, query_block)
  centers = [kmeans.Centers(each) for each in clusterings]
  rank = np.zeros(len(usable)) if priority is None else priority
  cut, slack = 1 - threshold, 2 * decide.error_bound(x.shape[1])
  numbers, _ = tiles.query_blocks([len(sample)], query_block)
  blocks = [_Block(x, sample, number, centers) for number in numbers]
  pairs, pairs_of = 0, np.zeros(len(sample), np.int64)
  found_of = np.zeros(len(centers), np.int64)
  earlier_of, kept_of = np.zeros((2, len(sample)), bool)
  dropped = np.zeros((len(centers), len(sample)), bool)
  joined = np.zeros((2, 0), np.int64)
  rows = np.flatnonzero(usable)

  def scored_blocks():
    for tile in tiles.walk(x, rows, tile_rows, name):
      for block in blocks:
        yield tile, block, *_cosines(block.device, block.inverse, tile.device)

  at = None
  for tile, block, maxima, scores in tiles.one_ahead(scored_blocks()):
    if tile is not at:
      at, nearest = tile, None
      on_rows(tile.count)
    least = np.full(len(maxima), np.inf)  # excludes padding queries
    least[: block.count] = cut - slack
    query, position, _ = tiles.pairs_over(maxima, scores, tile.count, least)
    other = rows[tile.start + position]
    real = sample[block.start + query] != other  # excludes the pair of a row with itself
    query, position, other = query[real], position[real], other[real]
    if not len(query):
      continue
    exact = decide.pair_dots(block.host, query, tile.host, position)
    squares = np.square(tile.host[position], dtype=np.float64).sum(1)
    over = exact / np.sqrt(block.squares[query] * squares) > cut
    query, position, other = query[over], position[over], other[over]
    if nearest is None:
      nearest = [np.asarray(each.nearest(tile.device)) for each in centers]
    sampled = block.start + query
    sampled_row = sample[sampled]
    once = (sampled_row < other) | ~_is_in_sample(other, sample)
    pairs += int(once.sum())
    np.add.at(pairs_of, sampled, 1)
    earlier = (rank[other] > rank[sampled_row]) | (
      (rank[other] == rank[sampled_row]) & (other < sampled_row)
    )
    earlier_of[sampled[earlier]] = True
    kept_of[sampled[earlier & keep[other]]] = True
    for i, each in enumerate(nearest):
      same = block.nearest[i][query] == each[position]
      found_of[i] += (same & once).sum()
      dropped[i, sampled[same & earlier]] = True
    joined = np.concatenate([joined, np.stack([sampled_row, other])[:, once]], 1)
    if joined.shape[1] > EDGES:
      joined = _joining_pairs(joined)

  is_dropped = ~keep[sample]
  dropped[-1] = is_dropped
  sizes = _components(joined)[2]
  observations = pairs_of.sum() ** 2 / max(np.square(pairs_of).sum(), 1)
  return MissedDuplicates(
    pairs,
    int(earlier_of.sum()),
    tuple(
      Clustering(
        len(each),
        int(found),
        _share(int(found), pairs),
        *wilson(_share(int(found), pairs), observations),
        int(lost.sum()),
        _share(int((lost & earlier_of).sum()), int(lost.sum())),
      )
      for each, found, lost in zip(clusterings, found_of, dropped)
    ),
    len(sizes),
    {int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True))},
    int((is_dropped & earlier_of & ~kept_of).sum()),
  )


def wilson(
  share: float,  # in [0, 1], or NaN
  observations: float,
) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a share; NaN without observations."""
  if not observations > 0:
    return math.nan, math.nan
  square = Z * Z / observations
  middle = (share + square / 2) / (1 + square)
  half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
  low, high = float(middle - half), float(middle + half)
  return max(0.0, min(low, share)), min(1.0, max(high, share))


class _Block:
  """A block of sampled rows on the device; padding repeats the last row."""

  def __init__(self, x, sample, number, centers):
    self.start = int(number[0])
    self.count = int(number[-1]) - self.start + 1
    self.host = np.asarray(x[sample[number]])  # [b, E] float16
    self.squares = np.square(self.host, dtype=np.float64).sum(1)
    self.device, self.inverse = jax.device_put(
      (self.host.astype(np.float32), (1 / np.sqrt(self.squares)).astype(np.float32))
    )
    self.nearest = [np.asarray(each.nearest(self.device)) for each in centers]  # each [b]


@jax.jit
def _cosines(queries, inverse, rows):
  """Returns group maxima and cosines [b, T]; queries [b, E], inverse norms [b], rows [T, E]."""
  scores = tiles.dots(queries, rows) * inverse[:, None]
  scores = scores * jax.lax.rsqrt((rows * rows).sum(1))[None]
  return tiles.group_maxima(scores), scores


def _is_in_sample(
  rows: np.ndarray, sample: np.ndarray
) -> np.ndarray:  # [m], [S] ascending -> [m] bool
  return sample[np.minimum(np.searchsorted(sample, rows), len(sample) - 1)] == rows


def _components(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the rows of pairs [2, m] in ascending order, each row's group, and group sizes."""
  nodes, edges = np.unique(pairs, return_inverse=True)
  edges = edges.reshape(2, -1)
  graph = sparse.coo_matrix(
    (np.ones(edges.shape[1], bool), tuple(edges)), shape=(len(nodes), len(nodes))
  )
  if not len(nodes):
    return nodes, nodes, nodes
  label = csgraph.connected_components(graph, directed=False)[1]
  return nodes, label, np.bincount(label)


def _joining_pairs(pairs: np.ndarray) -> np.ndarray:  # [2, m] -> [2, at most as many as rows]
  """Returns a minimal set of pairs that joins the same groups."""
  nodes, label, _ = _components(pairs)
  head = nodes[np.unique(label, return_index=True)[1]][label]
  return np.stack([head, nodes])[:, head != nodes]


def _share(part: int, whole: int) -> float:
  return float(part / whole) if whole else math.nan
