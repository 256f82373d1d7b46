"""The exact search on a GPU or TPU: one program for a tile, float16 in, sums in float32.

Arrays in, arrays out; no files. A scan over the query blocks, so that the scores of a tile with all
queries are never in memory together. Plain XLA: no kernel of our own.
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
  number: Array,  # [blocks, b] int32: each query's number in its benchmark, rising
  owner: Array,  # [blocks, b / GROUP] int32: the benchmark of each group of queries, rising
  tile: Array,  # [T, E] float16
  count: Array,  # real rows
  *,
  benchmarks: int,  # S
  k: int,
  nearest: bool,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array] | None]:
  """Returns (similarity, nearest, excess), each [S, T], and, of each query, the k nearest rows'
  (similarity, position), each [blocks, b, k], ties lowest position first; None for k = 0.

  -inf, -1, -inf where a benchmark has no query here, or for what is not asked for.
  """
  unfound = jnp.full((benchmarks, len(tile)), -jnp.inf)

  def step(found, block):
    vectors, cuts, number, owner = block
    scores = tiles.dots(vectors, tile)
    groups = lambda x: x.reshape(-1, tiles.GROUP, x.shape[-1])
    best = _segment_max(groups(scores).max(1), owner, benchmarks)
    similarity, index, excess = found
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

  start = unfound, jnp.full(unfound.shape, -1, jnp.int32), unfound
  return lax.scan(step, start, (vectors, cuts, number, owner))


_NONE = 2**31 - 1


def _segment_max(x: Array, owner: Array, benchmarks: int) -> Array:  # [groups, T] -> [S, T]
  return jax.ops.segment_max(x, owner, num_segments=benchmarks, indices_are_sorted=True)


def too_large(queries: np.ndarray, devices: Sequence) -> bool:
  """Whether a copy of the queries would take more than a third of a device's memory, so that each
  device should hold some of them instead."""
  limits = [(device.memory_stats() or {}).get('bytes_limit') for device in devices]
  return len(devices) > 1 and any(limit and queries.nbytes > limit / 3 for limit in limits)
