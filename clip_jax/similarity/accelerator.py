"""The exact search on a GPU or TPU: one program per tile, float16 input, float32 sums.

Arrays in, arrays out; no files. The program scans over query blocks, so that the scores of a tile
with all queries are never in memory at once. It is plain XLA, without custom kernels.
"""

from collections.abc import Sequence
import functools

import jax
from jax import Array, lax
import jax.numpy as jnp
import numpy as np

from clip_jax.similarity import tiles


@functools.partial(jax.jit, static_argnames=('benchmarks', 'k', 'nearest'))
def scan(
  vectors: Array,  # [blocks, b, E] float16
  cuts: Array | None,  # [blocks, b] float32
  number: Array,  # [blocks, b] int32: each query's index in its benchmark, ascending
  owner: Array,  # [blocks, b / GROUP] int32: the benchmark of each group of queries, ascending
  tile: Array,  # [T, E] float16
  count: Array,  # rows without padding
  *,
  benchmarks: int,  # S
  k: int,
  nearest: bool,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array] | None]:
  """Returns the best values of each row, and the k nearest rows of each query.

  The first are (similarity, nearest, excess), each [S, T]: -inf, -1, -inf for a benchmark without
  queries in these blocks, or for columns that are not requested. The second are (similarity,
  position), each [blocks, b, k], ties by lowest position, or None for k = 0.
  """
  empty = jnp.full((benchmarks, len(tile)), -jnp.inf)

  def step(best_so_far, block):
    vectors, cuts, number, owner = block
    scores = tiles.dots(vectors, tile)
    groups = lambda x: x.reshape(-1, tiles.GROUP, x.shape[-1])
    best = _segment_max(groups(scores).max(1), owner, benchmarks)
    similarity, index, excess = best_so_far
    if nearest:
      hit = groups(scores) == best[owner][:, None]
      lowest = jnp.where(hit, number.reshape(-1, tiles.GROUP, 1), _NONE).min(1)
      lowest = -_segment_max(-lowest, owner, benchmarks)
      index = jnp.where(best > similarity, lowest, index)
    if cuts is not None:
      excess = jnp.maximum(
        excess, _segment_max(groups(scores - cuts[:, None]).max(1), owner, benchmarks)
      )
    top = None
    if k:
      real = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < count
      top = lax.top_k(jnp.where(real, scores, -jnp.inf), k)
    return (jnp.maximum(similarity, best), index, excess), top

  start = empty, jnp.full(empty.shape, -1, jnp.int32), empty
  return lax.scan(step, start, (vectors, cuts, number, owner))


_NONE = 2**31 - 1


def _segment_max(x: Array, owner: Array, benchmarks: int) -> Array:  # [groups, T] -> [S, T]
  return jax.ops.segment_max(x, owner, num_segments=benchmarks, indices_are_sorted=True)


def too_large(queries: np.ndarray, devices: Sequence) -> bool:
  """Returns whether a copy of the queries exceeds a third of a device's memory.

  If it does, the queries should be split over the devices.
  """
  limits = [(device.memory_stats() or {}).get('bytes_limit') for device in devices]
  return len(devices) > 1 and any(limit and queries.nbytes > limit / 3 for limit in limits)
