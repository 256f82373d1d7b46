"""k-means (Lloyd) over stored vectors: the clusters within which duplicates are searched.

Rows in, a KMeans out; no files. As in SemDeDup and in Mayilvahanan et al. 2024, initial centres are
random items that are pairwise dissimilar, and distance is Euclidean between unit vectors.

The result does not depend on tiles, shards or resuming. Assignments use the padded float32 dots of
tiles.py. The sums behind the centres are float64 sums of float16 numbers, which are exact in any
order (multiples of 2^-24, below 2^29), so only items that changed cluster are added and subtracted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide, tiles

CANDIDATES = 1024  # candidate rows for initial centres, compared at a time
MOST_TILES = 4  # with few centres, at most this many tiles are processed as one


@dataclass(frozen=True)
class KMeans:
  """Centres and the assignment of rows to them: the whole state that a resumed fit needs."""

  centers: Array  # [K, E] float32
  assignment: Array  # [N] int32, -1 for unusable rows
  iterations: int
  changed: int  # rows whose cluster changed in the last iteration


def fit(
  x: Vectors,  # rows [N, E] float16
  usable: Array,  # [N] bool
  *,
  clusters: int,
  seed: int,
  initial_similarity: float = 0.9,
  min_change: float = 1e-7,
  max_iterations: int = 100,
  on_iteration: Callable[[KMeans], None] = lambda state: None,
  state: KMeans | None = None,
  tile_rows: int = 0,
  center_block: int = 0,
  name: str = 'pool',
) -> KMeans:
  """Clusters the usable rows.

  K = len(result.centers) is smaller than `clusters` if there are not enough dissimilar rows (then
  logged). Stops when fewer than min_change of the assignments change, or after max_iterations.
  on_iteration gets each iteration's state; a fit that starts from one gives the same result.
  An empty cluster keeps its centre. Ties in distance: the lowest centre. tile_rows and center_block
  change only the speed; 0: chosen for the backend.
  """
  rows = np.flatnonzero(usable)
  if not len(rows):
    raise InputError(
      f'{name}: none of its {len(usable)} rows is usable, so there are no rows to cluster. Check '
      'why its samples could not be read.'
    )
  if state is None:
    chosen = initial_rows(x, rows, clusters, seed, initial_similarity, name)
    if len(chosen) < clusters:
      logging.info(
        'k-means: only %d of %d centres, because every other row of %s has a similarity of at '
        'least %g to one of them',
        len(chosen),
        clusters,
        name,
        initial_similarity,
      )
    state = KMeans(x[chosen].astype(np.float32), np.full(len(usable), -1, np.int32), 0, len(rows))
  sums = np.zeros(state.centers.shape)
  counts = np.zeros(len(sums), np.int64)
  known = rows[state.assignment[rows] >= 0]  # empty unless resumed
  for i in range(0, len(known), 4096):
    part = known[i : i + 4096]
    _add(sums, counts, x[part], state.assignment[part], 1)
  centers, assignment = state.centers, state.assignment.copy()
  enough = max(1, min_change * len(rows))
  while state.iterations < max_iterations and state.changed >= enough:
    if state.iterations:
      filled = counts > 0
      centers = centers.copy()
      centers[filled] = sums[filled] / counts[filled, None]
    changed = 0
    for tile, nearest in _nearest(x, rows, centers, tile_rows, center_block, name):
      part = rows[tile.start : tile.start + tile.count]
      moved = np.flatnonzero(nearest != assignment[part])
      vectors, before = tile.host[moved], assignment[part[moved]]
      _add(sums, counts, vectors[before >= 0], before[before >= 0], -1)
      _add(sums, counts, vectors, nearest[moved], 1)
      assignment[part[moved]] = nearest[moved]
      changed += len(moved)
    state = KMeans(centers, assignment.copy(), state.iterations + 1, changed)
    on_iteration(state)
  return state


def assign(
  x: Vectors,  # rows [N, E] float16
  usable: Array,  # [N] bool
  centers: Array,  # [K, E] float32
  *,
  on_rows: Callable[[int], None] = lambda count: None,  # called with the number of new rows done
  tile_rows: int = 0,
  center_block: int = 0,
  name: str = 'pool',
) -> np.ndarray:
  """Returns each usable row's nearest centre, [N] int32; -1 for unusable rows."""
  assignment, rows = np.full(len(usable), -1, np.int32), np.flatnonzero(usable)
  for tile, nearest in _nearest(x, rows, centers, tile_rows, center_block, name):
    assignment[rows[tile.start : tile.start + tile.count]] = nearest
    on_rows(tile.count)
  return assignment


def initial_rows(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [n] int64, the usable ones
  clusters: int,
  seed: int,
  similarity: float,
  name: str = 'pool',
) -> np.ndarray:
  """Returns up to `clusters` rows with pairwise similarity below `similarity`, [K] int64.

  Rows are visited in random order; a row dissimilar to all earlier centres becomes a centre. One
  pass is enough: a row that was rejected once would be rejected again.
  """
  order = np.random.default_rng(seed).permutation(rows)
  size = tiles.default_sizes(0, 0)[1]
  chosen = np.empty(0, np.int64)
  taken = np.empty((0, x.shape[1]), np.float16)  # their vectors
  blocks = []  # the same on the device, [size, E] float32 each
  for tile in tiles.walk(x, order, CANDIDATES, name):
    candidates, vectors = order[tile.start : tile.start + tile.count], tile.host[: tile.count]
    nearest = jnp.full(len(tile.device), -jnp.inf)
    for block in blocks:
      nearest = _max_dots(block, tile.device, nearest)
    nearest = np.asarray(nearest)[: tile.count].astype(np.float64)
    doubtful = np.abs(nearest - similarity) <= decide.error_bound(x.shape[1])
    if doubtful.any():
      nearest[doubtful] = decide.exact_similarity(vectors[doubtful], taken)
    free = np.flatnonzero(nearest < similarity)
    new = free[_dissimilar(vectors[free], similarity)][: clusters - len(chosen)]
    full = len(chosen) // size
    chosen = np.concatenate([chosen, candidates[new]])
    if len(chosen) == clusters:
      break
    taken = np.concatenate([taken, vectors[new]])
    blocks[full:] = [
      jax.device_put(np.resize(taken[i : i + size], (size, x.shape[1])).astype(np.float32))
      for i in range(full * size, len(chosen), size)
    ]
  return chosen


def _dissimilar(vectors: np.ndarray, similarity: float) -> list[int]:  # [m, E] float16
  """Returns positions of vectors dissimilar to all earlier returned ones, greedily in order."""
  vectors = vectors.astype(np.float64)
  with np.errstate(invalid='ignore'):  # NaN vectors: walk() raises an error that names the row
    similar = vectors @ vectors.T >= similarity  # exact: see decide.py
  taken, refused = [], np.zeros(len(vectors), bool)
  for i in range(len(vectors)):
    if not refused[i]:
      taken.append(i)
      refused |= similar[i]
  return taken


def _add(
  sums: np.ndarray,  # [K, E] float64, changed in place
  counts: np.ndarray,  # [K] int64, changed in place
  vectors: np.ndarray,  # [m, E] float16
  cluster: np.ndarray,  # [m] int
  sign: int,
) -> None:
  """Adds vectors to their clusters (sign 1) or subtracts them (-1), exactly in any order.

  A sparse product sums them without a sort by cluster, six times as fast.
  """
  clusters, which = np.unique(cluster, return_inverse=True)
  counts[clusters] += sign * np.bincount(which, minlength=len(clusters))
  members = sparse.csr_matrix(
    (np.full(len(which), float(sign)), which, np.arange(len(which) + 1)),
    shape=(len(which), len(clusters)),
  )
  sums[clusters] += members.T @ vectors.astype(np.float64)


def _nearest(x, rows, centers, tile_rows, center_block, name) -> Iterator[tuple]:
  """Yields (tile, [count] int32 nearest centre), in the order of the rows.

  With few centres a tile takes more time on the host than on the device, and its scores do not fill
  the cache: tiles of up to four times the rows halve the time (25 and 125 centres, E = 64).
  """
  few = 1 if tile_rows else MOST_TILES
  tile_rows, center_block = tiles.default_sizes(tile_rows, center_block)
  tile_rows *= max(1, min(few, center_block // len(centers)))
  devices = jax.local_devices()
  centers_on = {device: Centers(centers, center_block, device) for device in devices}

  def scored_blocks():
    for tile in tiles.walk(x, rows, tile_rows, name, devices=devices):
      yield tile, centers_on[tile.device.device].nearest(tile.device)

  for tile, nearest in tiles.one_ahead(scored_blocks(), len(devices)):
    yield tile, np.asarray(nearest)[: tile.count]


class Centers:
  """Centres on a device, in blocks."""

  def __init__(self, centers: Array, center_block: int = 0, device=None):  # [K, E] float32
    half = (0.5 * np.square(centers, dtype=np.float64).sum(1)).astype(np.float32)
    numbers, _ = tiles.query_blocks([len(centers)], tiles.default_sizes(0, center_block)[1])
    self._blocks = [
      (np.int32(i[0]), *jax.device_put((centers[i], half[i]), device)) for i in numbers
    ]

  def nearest(self, rows: jax.Array) -> jax.Array:  # [T, E] float32 on the device -> [T] int32
    """Returns each row's nearest centre: argmin |x - c|^2 is argmax of x.c - |c|^2 / 2."""
    best: Any = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int32)
    for start, block, halves in self._blocks:
      best = _nearest_block(block, rows, halves, start, *best)
    return best[1]


@jax.jit
def _nearest_block(centers, rows, half, start, score, nearest):  # [b, E], [T, E], [b], [], [T] x 2
  best, index = tiles.lowest_argmax(tiles.dots(centers, rows) - half[:, None])
  return jnp.maximum(best, score), jnp.where(best > score, start + index, nearest)


@jax.jit
def _max_dots(queries, rows, nearest):  # [b, E], [T, E], [T] -> [T]
  return jnp.maximum(nearest, tiles.dots(queries, rows).max(0))
