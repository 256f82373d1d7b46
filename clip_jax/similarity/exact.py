"""The exact search: one pass over a pool shard against all queries of all benchmarks.

Arrays in, arrays out; no files. Similarity is the dot product of the stored float16 vectors, added
up in float32; the same (row, query) pair has the same bits wherever it is reported, for every
tile_rows, query_block, shard and number of threads of one backend (tiles.py says why).
Decisions that must not hang on a last bit are made in decide.py, in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.similarity import decide
from clip_jax.similarity import tiles


_ROW_KEYS = ('similarity', 'nearest', 'excess')


@dataclass(frozen=True, eq=False)
class Queries:
  """All benchmarks' queries, one benchmark after the other."""

  vectors: Array  # [Q, E] float16
  segments: tuple[tuple[str, int, int], ...]  # (benchmark, start, stop), none empty
  thresholds: Array | None = None  # [Q] float32 t_i; NaN for a benchmark without

  def __post_init__(self):
    if self.vectors.ndim != 2 or self.vectors.dtype != np.float16:
      raise ValueError('queries must be float16 [Q, E]; got '
                       f'{self.vectors.dtype} {self.vectors.shape}')
    if self.thresholds is not None and self.thresholds.shape != self.vectors.shape[:1]:
      raise ValueError(f'thresholds {self.thresholds.shape} must be [Q] for queries [Q, E] '
                       f'{self.vectors.shape}')
    for benchmark, start, stop in self.segments:
      if not 0 <= start < stop <= len(self.vectors):
        raise ValueError(f'benchmark {benchmark!r} has queries {start}..{stop} of '
                         f'{len(self.vectors)}; it must have at least one')


class _Block(NamedTuple):
  """Some queries of one benchmark on the device: number start.. of it."""

  benchmark: str
  start: int
  last: bool  # closes the benchmark
  vectors: Array  # [b, E] float32
  thresholds: Array  # [b] float32


def search_shard(
    pool: Array,  # rows [n, E] float16
    usable: Array,  # [n] bool
    queries: Queries,
    *,
    k: int,
    tile_rows: int = 4096,
    query_block: int = 512,
    name: str = 'pool',
) -> dict[str, dict[str, np.ndarray]]:
  """Searches a shard once for all benchmarks; for each benchmark of q queries it returns

  similarity [n] float32, the maximum over its queries; nearest [n] int32, that query's index in the
  benchmark (ties: the lowest); excess [n] float32, the maximum of similarity - t_i (NaN without
  thresholds); unusable rows hold -inf, -1, -inf.
  top_similarity [q, k'] float32, top_row [q, k'] int64: each query's nearest usable rows of this
  shard, most similar first, ties lowest row first; k' = min(k, usable rows), so nothing is padded.

  |similarity - exact| and |excess - exact| are at most decide.error_bound(E).
  InputError names a usable row or a query whose vector is not of unit length.
  """
  _check_shapes(pool, usable, queries.vectors)
  rows = np.flatnonzero(usable)
  blocks = _cached_blocks(queries, query_block)
  results = {benchmark: dict(zip(_ROW_KEYS, _unfound(len(pool))))
             for benchmark, _, _ in queries.segments}
  tops = {block.benchmark: np.full((block.start + len(block.vectors), min(k, len(rows))), _NOTHING)
          for block in blocks}  # a benchmark's last block gives its padded size

  for tile, block, found, maxima, scores in tiles.one_ahead(
      _search_tiles(pool, rows, blocks, tile_rows, name)):
    _update_top(tops[block.benchmark][block.start:][:len(block.vectors)], maxima, scores, tile)
    if block.last:
      for key, value in zip(_ROW_KEYS, found):
        results[block.benchmark][key][rows[tile.start:][:tile.count]] = (
            np.asarray(value)[:tile.count])

  for benchmark, start, stop in queries.segments:
    result = results[benchmark]
    if queries.thresholds is None or np.isnan(queries.thresholds[start:stop]).any():
      result['excess'][:] = np.nan
    result['top_similarity'], position = _unpack(
        np.sort(tops[benchmark][:stop - start], axis=1)[:, ::-1])
    result['top_row'] = rows[position]
  return results


def merge_top(
    parts: Sequence[tuple[Array, Array]],  # each [Q, k_i] float32 and [Q, k_i] int64 pool rows
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest of several shards' lists: [Q, min(k, all)], most similar first, ties lowest row
  first. Merging is associative; entries padded with -inf come last."""
  similarity = np.concatenate([part[0] for part in parts], axis=1)
  row = np.concatenate([part[1] for part in parts], axis=1)
  order = np.lexsort((row, -similarity), axis=1)[:, :k]
  return np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)


def thresholds(
    anchor: Array,  # rows [A, E] float16
    usable: Array,  # [A] bool
    queries: Array,  # [Q, E] float16
    *,
    tile_rows: int = 4096,
    query_block: int = 512,
    name: str = 'anchor',
) -> tuple[np.ndarray, np.ndarray]:
  """t_i, query i's similarity to its nearest anchor image (Mayilvahanan et al. 2024), and which.

  Returns [Q] float64, exact, and [Q] int64 anchor rows (ties: the lowest). The float32 pass only
  finds the candidates: all within twice its error bound of the maximum are computed in float64.
  """
  _check_shapes(anchor, usable, queries)
  rows = np.flatnonzero(usable)
  if not len(rows):
    raise InputError(f'{name}: none of its {len(usable)} rows is usable, so that no query has a '
                     'threshold. Check why its samples could not be read.')
  blocks = _blocks(Queries(queries, (('', 0, len(queries)),)), query_block)
  slack = 2 * decide.error_bound(queries.shape[1])
  seen = np.full(blocks[-1].start + len(blocks[-1].vectors), -np.inf, np.float32)
  best = np.full(len(queries), -np.inf)
  nearest = np.full(len(queries), -1)

  def passes():
    for tile in tiles.walk(anchor, rows, tile_rows, name):
      for block in blocks:
        yield tile, block, *tiles.grouped_dots(block.vectors, tile.device, tile.count)

  for tile, block, maxima, scores in tiles.one_ahead(passes()):
    part = seen[block.start:][:len(block.vectors)]
    np.maximum(part, np.asarray(maxima).max(1), out=part)
    query, position, _ = tiles.over(maxima, scores, tile.count, part.astype(np.float64) - slack)
    query += block.start
    real = query < len(queries)  # a block's padding is no query
    query, position = query[real], position[real]
    exact = decide.pair_dots(queries, query, tile.host, position)
    decide.update_best(best, nearest, query, exact, rows[tile.start + position])
  return best, nearest


def _check_shapes(x: Array, usable: Array, queries: Array) -> None:
  if x.shape[1] != queries.shape[1] or usable.shape != (x.shape[0],):
    raise ValueError(f'rows [n, E] {x.shape}, usable [n] {usable.shape} and queries [Q, E] '
                     f'{queries.shape} must agree in n and E')


def _blocks(queries: Queries, query_block: int) -> list[_Block]:
  """The queries on the device, padded."""
  vectors = np.asarray(queries.vectors).astype(np.float32)
  cuts = queries.thresholds
  cuts = np.full(len(vectors), np.nan, np.float32) if cuts is None else np.asarray(cuts, np.float32)
  tiles.check_norms(np.linalg.norm(vectors, axis=1), np.arange(len(vectors)), 'queries')
  numbers = tiles.query_blocks([stop - start for _, start, stop in queries.segments], query_block)
  return [
      _Block(benchmark, int(block[0]), i == len(blocks) - 1,
             *jax.device_put((vectors[start + block], cuts[start + block])))
      for (benchmark, start, _), blocks in zip(queries.segments, numbers)
      for i, block in enumerate(blocks)]


_cached_blocks = functools.lru_cache(maxsize=1)(_blocks)  # one upload for all shards of a search


def _search_tiles(
    pool: Array, rows: Array, blocks: list[_Block], tile_rows: int, name: str) -> Iterator[tuple]:
  """Yields (tile, block, (similarity, nearest, excess) so far, group maxima, similarities)."""
  for tile in tiles.walk(pool, rows, tile_rows, name):
    for block in blocks:
      if block.start == 0:
        found = _unfound(tile.device.shape[1])
      *found, maxima, scores = _search_block(
          block.vectors, tile.device, block.thresholds, np.int32(block.start), tile.count, *found)
      yield tile, block, found, maxima, scores


def _unfound(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # for _ROW_KEYS, each [n]
  return (np.full(n, -np.inf, np.float32), np.full(n, -1, np.int32),
          np.full(n, -np.inf, np.float32))


@jax.jit
def _search_block(queries, tile, cuts, start, count, similarity, nearest, excess):
  """[b, E], [E, T], [b], first query, real rows, [T] so far -> [T] x 3, [b, T / GROUP], [b, T]."""
  scores = tiles.dots(queries, tile)
  best, index = tiles.lowest_argmax(scores)
  nearest = jnp.where(best > similarity, start + index, nearest)  # > : an earlier block wins a tie
  return (jnp.maximum(best, similarity), nearest,
          jnp.maximum(excess, (scores - cuts[:, None]).max(0)),
          tiles.group_maxima(scores, count), scores)


# A top list holds one uint64 a row: the similarity in the upper half, and in the lower one the
# position counted from the end: a greater number is a nearer row, or an equally near earlier one.
_LAST = np.uint32(0xFFFFFFFF)


def _pack(similarity: np.ndarray, position: np.ndarray) -> np.ndarray:  # float32, int -> uint64
  bits = (similarity + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0
  ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
  return ordered.astype(np.uint64) << 32 | (_LAST - position.astype(np.uint32))


def _unpack(top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # uint64 -> float32, int64
  ordered = (top >> 32).astype(np.uint32)
  bits = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
  return bits.view(np.float32), (_LAST - top.astype(np.uint32)).astype(np.int64)


_NOTHING = _pack(np.float32([-np.inf]), np.array([_LAST]))[0]


def _update_top(top: np.ndarray, maxima: Array, scores: Array, tile: tiles.Tile) -> None:
  """Takes a tile's rows into the lists, [b, k] uint64 in place; column 0 holds each query's k-th.

  A row must beat the k-th: rows come in order, so a later one loses a tie.
  """
  k = top.shape[1]
  if not k:
    return
  cut = _unpack(top[:, 0])[0]
  if np.isneginf(cut[0]) and k <= tile.count:  # a list's first tile: only its own k best matter
    kth = np.partition(np.asarray(scores)[:, :tile.count], -k, axis=1)[:, -k]
    cut = np.nextafter(kth, np.float32(-np.inf))
  query, position, similarity = tiles.over(maxima, scores, tile.count, cut)
  if not len(query):
    return
  queries, first, count = np.unique(query, return_index=True, return_counts=True)
  wide = np.full((len(queries), k + count.max()), _NOTHING)
  wide[:, :k] = top[queries]
  column = k + np.arange(len(query)) - np.repeat(first, count)
  wide[np.repeat(np.arange(len(queries)), count), column] = _pack(similarity, tile.start + position)
  top[queries] = np.partition(wide, -k, axis=1)[:, -k:]
