"""k-means (Lloyd) over stored vectors: the clusters within which duplicates are searched.

Rows in, a KMeans out; no files. As in SemDeDup and in Mayilvahanan et al. 2024, initial centres are
random items that are pairwise dissimilar, and distance is Euclidean between unit vectors.

The result does not depend on tiles, shards or resuming. Assignments use the padded float32 dots of
tiles.py. The sums behind the centres are float64 sums of float16 numbers, which are exact in any
order (multiples of 2^-24, below 2^29), so only items that changed cluster are added and subtracted.

Several processes can cluster together, each its part of the rows (Part), to the same bits, because
sums of their sums are exact, too. Each holds the centres, old and new, its sums behind them (16
bytes x K x E, 0.5 GB for 50,000 x 640), and its own rows. In each iteration it gives the sums to
all others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
EXCHANGED = 2**24  # bytes that a part gives to the others at a time


class Part(NamedTuple):
  """One of the processes that cluster together, each with as many rows; default: the only one.

  gather gets an array [...] and returns those of all parts, [count, ...], bit for bit. It waits for
  the other parts, which call it at the same places with arrays of the same shape and dtype.
  """

  index: int = 0
  count: int = 1
  gather: Callable[[Array], Array] = lambda array: array[None]

  def own(self, rows: int) -> slice:
    """Returns which of the rows are this part's, one after the other; none, perhaps."""
    size = -(-rows // self.count)
    return slice(min(self.index * size, rows), min((self.index + 1) * size, rows))

  def whole(self, mine: Array, rows: int) -> Array:  # [own rows] -> [rows]
    """Returns, in part 0, the arrays of all parts as one; an empty array in the others."""
    if self.count == 1:
      return mine
    size = -(-rows // self.count)
    mine = np.pad(mine, (0, size - len(mine)))
    found = np.empty((0 if self.index else self.count, size), mine.dtype)
    for block in _blocks(mine):
      found[:, block] = self.gather(mine[block])[: len(found)]
    return found.reshape(-1)[:rows]

  def from_first(self, array: Array, wanted: slice) -> Array:  # [n, ...] -> [wanted rows, ...]
    """Returns rows of part 0's array; those of the others only tell its shape and dtype."""
    found = np.empty_like(array[wanted])
    for block in _blocks(array):
      first, stop = max(block.start, wanted.start), min(block.stop, wanted.stop)
      rows = self.gather(array[block])[0]
      if first < stop:
        found[first - wanted.start : stop - wanted.start] = rows[
          first - block.start : stop - block.start
        ]
    return found


def _blocks(array: Array) -> Iterator[slice]:
  """Yields slices of at most EXCHANGED bytes of an array's rows."""
  rows = max(1, EXCHANGED // max(1, array[:1].nbytes))
  for start in range(0, len(array), rows):
    yield slice(start, min(start + rows, len(array)))


@dataclass(frozen=True)
class KMeans:
  """Centres and the assignment of rows to them: the whole state that a resumed fit needs."""

  centers: Array  # [K, E] float32
  assignment: Array  # [N] int32, -1 for unusable rows; or of a part's own rows
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
  part: Part = Part(),
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

  part: the states of on_iteration and the result have the assignment of the part's own rows, which
  part.whole completes; all other arguments are those of all rows. Part 0 alone chooses the initial
  centres; `state` is part 0's, with the whole assignment, and the others' is not read.
  """
  own, total = part.own(len(usable)), int(np.count_nonzero(usable))
  if state is None and not part.index:
    state = _initial(x, usable, clusters, seed, initial_similarity, name)
  state = _from_first(state, part, len(usable), x.shape[1])
  centers, assignment = state.centers, state.assignment
  rows = own.start + np.flatnonzero(usable[own])
  sums = np.zeros(centers.shape)
  counts = np.zeros(len(sums), np.int64)
  known = rows[assignment[rows - own.start] >= 0]  # empty unless resumed
  for i in range(0, len(known), 4096):
    block = known[i : i + 4096]
    _add(sums, counts, x[block], assignment[block - own.start], 1)
  enough = max(1, min_change * total)
  while state.iterations < max_iterations and state.changed >= enough:
    if state.iterations:
      centers = _means(centers, sums, counts, part)
    changed = 0
    for tile, nearest in _nearest(x, rows, centers, tile_rows, center_block, name):
      places = rows[tile.start : tile.start + tile.count] - own.start
      moved = np.flatnonzero(nearest != assignment[places])
      vectors, before = tile.host[moved], assignment[places[moved]]
      _add(sums, counts, vectors[before >= 0], before[before >= 0], -1)
      _add(sums, counts, vectors, nearest[moved], 1)
      assignment[places[moved]] = nearest[moved]
      changed += len(moved)
    changed = int(part.gather(np.array([changed])).sum())
    state = KMeans(centers, assignment.copy(), state.iterations + 1, changed)
    on_iteration(state)
  return state


def assign(
  x: Vectors,  # rows [N, E] float16
  usable: Array,  # [N] bool
  centers: Array,  # [K, E] float32
  *,
  on_rows: Callable[[int], None] = lambda count: None,  # called with the number of new rows done
  part: Part = Part(),
  tile_rows: int = 0,
  center_block: int = 0,
  name: str = 'pool',
) -> np.ndarray:
  """Returns the nearest centre of each of the part's rows, [n] int32; -1 for unusable rows."""
  own = part.own(len(usable))
  assignment = np.full(own.stop - own.start, -1, np.int32)
  rows = own.start + np.flatnonzero(usable[own])
  for tile, nearest in _nearest(x, rows, centers, tile_rows, center_block, name):
    assignment[rows[tile.start : tile.start + tile.count] - own.start] = nearest
    on_rows(tile.count)
  return assignment


def _initial(x, usable, clusters, seed, similarity, name) -> KMeans:
  """Returns the state before the first iteration."""
  rows = np.flatnonzero(usable)
  if not len(rows):
    raise InputError(
      f'{name}: none of its {len(usable)} rows is usable, so there are no rows to cluster. Check '
      'why its samples could not be read.'
    )
  chosen = initial_rows(x, rows, clusters, seed, similarity, name)
  if len(chosen) < clusters:
    logging.info(
      'k-means: only %d of %d centres, because every other row of %s has a similarity of at '
      'least %g to one of them',
      len(chosen),
      clusters,
      name,
      similarity,
    )
  return KMeans(x[chosen].astype(np.float32), np.full(len(usable), -1, np.int32), 0, len(rows))


def _from_first(state: KMeans | None, part: Part, rows: int, dim: int) -> KMeans:
  """Returns a copy of part 0's state in all parts, each with the assignment of its own rows."""
  head = np.zeros(3, np.int64)
  if state is not None and not part.index:
    head[:] = len(state.centers), state.iterations, state.changed
  clusters, iterations, changed = part.gather(head)[0].tolist()
  if state is None or part.index:
    state = KMeans(np.zeros((clusters, dim), np.float32), np.zeros(rows, np.int32), 0, 0)
  return KMeans(
    part.from_first(state.centers, slice(0, clusters)),
    part.from_first(state.assignment, part.own(rows)),
    iterations,
    changed,
  )


def _means(
  centers: Array,  # [K, E] float32, those of clusters without rows
  sums: Array,  # [K, E] float64, the part's
  counts: Array,  # [K] int64, the part's
  part: Part,
) -> np.ndarray:
  """Returns the centres [K, E] float32 of the rows of all parts."""
  centers, counts = centers.copy(), part.gather(counts).sum(0)
  for block in _blocks(sums):
    total, filled = part.gather(sums[block]).sum(0), counts[block] > 0
    centers[block][filled] = total[filled] / counts[block][filled, None]
  return centers


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
