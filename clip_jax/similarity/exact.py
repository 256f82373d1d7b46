"""The exact search: one pass over a pool shard against all queries of all benchmarks.

Arrays in, arrays out; no files. Similarity is the dot product of the stored float16 vectors, summed
in float32. The same (row, query) pair always has the same bits on one backend, for every tile_rows,
query_block, shard and number of threads or devices (tiles.py explains why). Decisions that must not
depend on the last bit are made in float64, in decide.py.

On a CPU the device computes the scores of a block and the maxima over groups of 16 queries and of
16 rows, in one pass each while the block is in the cache. The host reads these maxima, a 16th of
the scores, and then only the few groups that matter. GPUs and TPUs use accelerator.py instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import functools
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import accelerator, decide, tiles, top_lists


@dataclass(frozen=True, eq=False)
class Queries:
  """All benchmarks' queries, one benchmark after the other."""

  vectors: Array  # [Q, E] float16
  segments: tuple[tuple[str, int, int], ...]  # (benchmark, start, stop), none empty
  thresholds: Array | None = None  # [Q] float32 t_i; NaN for a benchmark without thresholds

  def __post_init__(self):
    if self.vectors.ndim != 2 or self.vectors.dtype != np.float16:
      raise ValueError(
        f'queries must be float16 [Q, E]; got {self.vectors.dtype} {self.vectors.shape}'
      )
    if self.thresholds is not None and self.thresholds.shape != self.vectors.shape[:1]:
      raise ValueError(
        f'thresholds {self.thresholds.shape} must be [Q] for queries [Q, E] {self.vectors.shape}'
      )
    for benchmark, start, stop in self.segments:
      if not 0 <= start < stop <= len(self.vectors):
        raise ValueError(
          f'benchmark {benchmark!r} has queries {start}..{stop} of {len(self.vectors)}; it must '
          'have at least one query'
        )


def search_shard(
  pool: Array,  # rows [n, E] float16
  usable: Array,  # [n] bool
  queries: Queries,
  *,
  k: int,
  nearest: bool = True,
  tile_rows: int = 0,
  query_block: int = 0,
  devices: Sequence | None = None,
  name: str = 'pool',
) -> dict[str, dict[str, np.ndarray]]:
  """Searches a shard once for all benchmarks.

  Returns, for each benchmark of q queries:
  similarity [n] float32, the maximum over its queries; nearest [n] int32, that query's index in the
  benchmark (ties: the lowest); excess [n] float32, the maximum of similarity - t_i (NaN without
  thresholds); unusable rows have -inf, -1, -inf.
  top_similarity [q, k'] float32, top_row [q, k'] int64: each query's nearest usable rows of this
  shard, most similar first, ties lowest row first; k' = min(k, usable rows), without padding.

  Outputs that are not requested cost nothing: k = 0, no thresholds, nearest=False (-1 everywhere).
  tile_rows and query_block (0: chosen by tiles.sizes) and devices (default: an accelerator's local
  devices, or one CPU) change only the speed.
  |similarity - exact| and |excess - exact| are at most decide.error_bound(E).
  InputError names a usable row or a query whose vector is not of unit length.
  """
  _check_shapes(pool, usable, queries.vectors)
  rows = np.flatnonzero(usable)
  tile_rows, query_block = tiles.default_sizes(tile_rows, query_block)
  accelerated = _accelerated()
  devices = tuple(devices or jax.local_devices()[: None if accelerated else 1])
  layout = _layout(queries, query_block, devices, accelerated)
  best = _Best(layout, len(rows), min(k, len(rows)))
  search = _search_scanning if accelerated else _search
  search(pool, rows, layout, best, nearest, tile_rows, name)
  top = best.tops.sorted()
  results = {}
  for i, (benchmark, start, stop) in enumerate(queries.segments):
    result: dict[str, np.ndarray] = dict(zip(_ROW_KEYS, _empty_results(len(pool))))
    for key, values in result.items():
      values[rows] = getattr(best, key)[i]
    if not layout.has_cuts[i]:
      result['excess'][:] = np.nan
    result['top_similarity'], position = top_lists.decode_entries(
      top[layout.first[i] :][: stop - start]
    )
    result['top_row'] = rows[position]
    results[benchmark] = result
  return results


def merge_top(
  parts: Sequence[tuple[Array, Array]],  # each [Q, k_i] float32 and [Q, k_i] int64 pool rows
  k: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Merges several shards' lists of nearest rows: [Q, min(k, all)], most similar first.

  Ties: lowest row first. Merging is associative; entries padded with -inf are last.
  """
  similarity = np.concatenate([part[0] for part in parts], axis=1)
  row = np.concatenate([part[1] for part in parts], axis=1)
  order = np.lexsort((row, -similarity), axis=1)[:, :k]
  return np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)


def thresholds(
  anchor: Vectors,  # rows [A, E] float16
  usable: Array,  # [A] bool
  queries: Array,  # [Q, E] float16
  *,
  tile_rows: int = 0,
  query_block: int = 0,
  name: str = 'anchor',
) -> tuple[np.ndarray, np.ndarray]:
  """Returns t_i, query i's similarity to its nearest anchor image, and that anchor row.

  These are [Q] float64, exact, and [Q] int64 (ties: the lowest). t_i: Mayilvahanan et al. 2024.
  """
  similarity, row = anchor_top(
    anchor, usable, queries, 1, tile_rows=tile_rows, query_block=query_block, name=name
  )
  return similarity[:, 0], row[:, 0]


def anchor_top(
  anchor: Vectors,  # rows [A, E] float16
  usable: Array,  # [A] bool
  queries: Array,  # [Q, E] float16
  k: int,
  *,
  tile_rows: int = 0,
  query_block: int = 0,
  name: str = 'anchor',
) -> tuple[np.ndarray, np.ndarray]:
  """Returns similarities and rows of each query's k nearest anchor images.

  These are [Q, k] float64, exact and descending, and [Q, k] int64 (ties: lowest row first). The
  float32 pass only finds the candidates: all within twice its error bound of the k-th are computed
  in float64. InputError if fewer than k rows are usable.
  """
  _check_shapes(anchor, usable, queries)
  rows = np.flatnonzero(usable)
  if not len(rows):
    raise InputError(
      f'{name}: none of its {len(usable)} rows is usable, so no query has a threshold. Check why '
      'its samples could not be read.'
    )
  if k > len(rows):
    raise InputError(
      f'{name}: only {len(rows)} of its {len(usable)} rows are usable, fewer than k={k}. Use a '
      'smaller k.'
    )
  slack = 2 * decide.error_bound(queries.shape[1])
  best = np.full((len(queries), k), -np.inf)
  nearest = np.full((len(queries), k), -1)
  for tile, start, maxima, scores in _scored(anchor, rows, queries, tile_rows, query_block, name):
    block_best = best[start:][: len(maxima)]  # shorter than the block, whose padding is no query
    cut = np.full(len(maxima), np.inf)
    cut[: len(block_best)] = block_best.min(1) - slack
    if k <= tile.count and np.isneginf(cut).any():
      cut = np.maximum(cut, tiles.kth_lower_bound(maxima, scores, tile.count, k) - slack)
    query, position, _ = tiles.pairs_over(maxima, scores, tile.count, cut)
    query += start
    exact = decide.pair_dots(queries, query, tile.host, position)
    decide.update_top(best, nearest, query, exact, rows[tile.start + position])
  return best, nearest


def pairs_over(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [n] int64, ascending: the rows to compare
  queries: Array,  # [Q, E] float16
  cut: Array,  # [Q] float64; NaN: no pairs of this query
  *,
  tile_rows: int = 0,
  query_block: int = 0,
  name: str = 'pool',
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields all pairs with an exact similarity > cut, tile by tile.

  Each item is (query [m] int64, row [m] int64, similarity [m] float64), ordered by query and row;
  rows ascend from tile to tile. float32 finds the candidates, float64 decides. Memory: one tile's
  pairs.
  """
  low = np.asarray(cut, np.float64) - decide.error_bound(queries.shape[1])
  low = np.nextafter(low.astype(np.float32), np.float32(-np.inf))
  parts = []
  for tile, start, maxima, scores in _scored(x, rows, queries, tile_rows, query_block, name):
    least = np.full(len(maxima), np.float32(np.inf))
    least[: len(low) - start] = low[start:][: len(maxima)]
    query, position, _ = tiles.pairs_over(maxima, scores, tile.count, least)
    query += start
    similarity = decide.pair_dots(queries, query, tile.host, position)
    over = similarity > cut[query]
    parts.append((query[over], rows[tile.start + position[over]], similarity[over]))
    if start + len(maxima) >= len(queries):
      query, row, similarity = (np.concatenate(part) for part in zip(*parts))
      order = np.lexsort((row, query))
      yield query[order], row[order], similarity[order]
      parts = []


def _check_shapes(x: Vectors, usable: Array, queries: Array) -> None:
  if x.shape[1] != queries.shape[1] or usable.shape != (x.shape[0],):
    raise ValueError(
      f'rows [n, E] {x.shape}, usable [n] {usable.shape} and queries [Q, E] '
      f'{queries.shape} must agree in n and E'
    )


def _scored(x, rows, queries, tile_rows, query_block, name) -> Iterator[tuple]:
  """Yields (tile, the block's first query, group maxima, scores) for every tile and block."""
  tile_rows, query_block = tiles.default_sizes(tile_rows, query_block)
  vectors = queries.astype(np.float32)
  tiles.check_norms(np.linalg.norm(vectors, axis=1), np.arange(len(vectors)), 'queries')
  numbers, _ = tiles.query_blocks([len(queries)], query_block)
  blocks = [(block[0], jax.device_put(vectors[block])) for block in numbers]

  def scored_blocks():
    for tile in tiles.walk(x, rows, tile_rows, name):
      for start, block in blocks:
        yield tile, start, *tiles.grouped_dots(block, tile.device)

  return tiles.one_ahead(scored_blocks())


def _accelerated() -> bool:
  backend = jax.default_backend()
  _log_backend(backend, len(jax.local_devices()))
  return backend != 'cpu'


@functools.cache
def _log_backend(backend: str, devices: int) -> None:  # once
  if backend == 'cpu':
    logging.debug('search: float32 products on the CPU, lists of nearest rows on the host.')
  else:
    logging.debug(
      'search: float16 products, summed in float32, on %d %s device%s.',
      devices,
      backend,
      's' if devices > 1 else '',
    )


class _Place(NamedTuple):
  """The query blocks that one device holds."""

  device: object
  first: int  # the first block's number
  vectors: Sequence[Array]  # each [b, E]; one array on an accelerator
  cuts: Sequence[Array] | None  # each [b] float32
  number: Array  # [blocks, b] int32
  owner: Array  # [blocks, b / GROUP] int32


@dataclass(frozen=True, eq=False)
class _Layout:
  """Queries in blocks, and the benchmark and query of each slot (a position in a block)."""

  first: np.ndarray  # [benchmarks] int64: each benchmark's first slot
  has_cuts: np.ndarray  # [benchmarks] bool
  number: np.ndarray  # [blocks, b] int32: each slot's query, its index within its benchmark
  runs: list[list[tuple[int, int, int]]]  # of each block: (benchmark, first group, stop group)
  places: list[_Place]
  spread: bool  # whether the blocks are split over the places; else each place holds all


@functools.lru_cache(maxsize=1)  # one upload for all shards of a search
def _layout(queries: Queries, query_block: int, devices: tuple, accelerated: bool) -> _Layout:
  x = queries.vectors
  tiles.check_norms(np.linalg.norm(x.astype(np.float32), axis=1), np.arange(len(x)), 'queries')
  edges = np.array([segment[1:] for segment in queries.segments])
  sizes = edges[:, 1] - edges[:, 0]
  slots, owner = tiles.query_blocks(sizes.tolist(), query_block)
  benchmark_of = np.repeat(owner, tiles.GROUP, axis=1)  # [blocks, b] each slot's benchmark
  number = (slots - np.cumsum([0, *sizes])[benchmark_of]).astype(np.int32)
  query = number + edges[benchmark_of, 0]
  cuts, has_cuts = None, np.zeros(len(edges), bool)
  if queries.thresholds is not None:
    has_cuts = np.array([not np.isnan(queries.thresholds[a:b]).any() for a, b in edges])
    cuts = np.asarray(queries.thresholds, np.float32)[query] if has_cuts.any() else None
  vectors = x.astype(np.float16 if accelerated else np.float32)[query]
  spread = accelerated and accelerator.too_large(vectors, devices)
  parts = (
    np.array_split(np.arange(len(query)), len(devices))
    if spread
    else ([np.arange(len(query))] * len(devices))
  )
  put = jax.device_put if accelerated else lambda x, device: [jax.device_put(i, device) for i in x]
  return _Layout(
    np.flatnonzero(np.diff(benchmark_of.ravel(), prepend=-1)),
    has_cuts,
    number,
    [_owner_runs(block) for block in owner],
    [
      _Place(
        device,
        part[0],
        put(vectors[part], device),
        None if cuts is None else put(cuts[part], device),
        number[part],
        owner[part].astype(np.int32),
      )
      for device, part in zip(devices, parts)
      if len(part)
    ],
    spread,
  )


def _owner_runs(owner: np.ndarray) -> list[tuple[int, int, int]]:  # [groups], ascending
  edges = [*np.flatnonzero(np.diff(owner, prepend=-1)), len(owner)]
  return [(int(owner[a]), int(a), int(b)) for a, b in zip(edges, edges[1:])]


def _tiles_on_devices(
  pool, rows, layout, tile_rows, name, dtype
) -> Iterator[tuple[tiles.Tile, _Place]]:
  """Yields (tile, place) on the same device.

  Each tile goes to the next device in turn or, if the queries are split, to all devices.
  """
  devices = [place.device for place in layout.places]
  walk = tiles.walk(
    pool, rows, tile_rows, name, dtype=dtype, devices=devices[:1] if layout.spread else devices
  )
  for i, tile in enumerate(walk):
    if not layout.spread:
      yield tile, layout.places[i % len(devices)]
      continue
    for place in layout.places:
      yield tile._replace(device=jax.device_put(tile.device, place.device)), place


def _search(pool, rows, layout, best, nearest, tile_rows, name) -> None:
  def scored_blocks():
    for tile, place in _tiles_on_devices(pool, rows, layout, tile_rows, name, np.float32):
      cuts = place.cuts or [None] * len(place.vectors)
      for i, (vectors, cut) in enumerate(zip(place.vectors, cuts), place.first):
        yield tile, i, *_score_block(vectors, tile.device, cut, bool(best.tops.k), nearest)

  for tile, i, columns, excess, maxima, scores in tiles.one_ahead(scored_blocks()):
    best.take_groups(tile, layout.runs[i], layout.number[i], columns, excess, scores, nearest)
    if best.tops.k:
      best.tops.add_tile(i * layout.number.shape[1], tile, maxima, scores)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _score_block(queries, tile, cuts, top: bool, nearest: bool):
  """Returns the scores of a block of queries [b, E] with a tile [T, E], and their group maxima.

  These are maxima over GROUP queries, [b / GROUP, T], of scores and of scores - cuts; maxima over
  GROUP rows, [b, T / GROUP]; and scores, [b, T]. Outputs that are not requested are None.
  """
  scores = tiles.dots(queries, tile)
  columns = lambda x: x.reshape(-1, tiles.GROUP, x.shape[1]).max(1)
  return (
    columns(scores),
    None if cuts is None else columns(scores - cuts[:, None]),
    tiles.group_maxima(scores) if top else None,
    scores if top or nearest else None,
  )


def _search_scanning(pool, rows, layout, best, nearest, tile_rows, name) -> None:
  def scored_blocks():
    for tile, place in _tiles_on_devices(pool, rows, layout, tile_rows, name, np.float16):
      yield (
        tile,
        place,
        *accelerator.scan(
          place.vectors,
          place.cuts,
          place.number,
          place.owner,
          tile.device,
          tile.count,
          benchmarks=len(layout.first),
          k=min(best.tops.k, len(tile.host)),
          nearest=nearest,
        ),
      )

  for tile, place, columns, top in tiles.one_ahead(scored_blocks(), len(layout.places)):
    best.take_rows(tile, *columns)
    if best.tops.k:
      similarity, position = (np.asarray(x).reshape(-1, x.shape[-1]) for x in top)
      slot = place.first * layout.number.shape[1] + np.arange(len(similarity))
      good = position < tile.count
      slot = np.broadcast_to(slot[:, None], position.shape)[good]
      best.tops.add_pairs(slot, similarity[good], tile.start + position[good])


class _Best:
  """The best values so far of each of n usable rows for each of S benchmarks."""

  def __init__(self, layout: _Layout, n: int, k: int):
    self.similarity, self.nearest, self.excess = _empty_results((len(layout.first), n))
    self.tops = top_lists.TopLists(layout.number.size, k)

  def take_groups(self, tile, runs, number, columns, excess, scores, nearest) -> None:
    """Merges outputs of _score_block. Blocks are in order; the earlier block wins a tie."""
    rows = slice(tile.start, tile.start + tile.count)
    columns = np.asarray(columns)[:, : tile.count]
    for benchmark, first, last in runs:
      best, now = columns[first:last].max(0), self.similarity[benchmark, rows]
      if nearest:
        row = np.flatnonzero(best > now)
        group = first + _first_equal(columns[first:last], best)[row]
        values = np.asarray(scores).reshape(-1, tiles.GROUP, scores.shape[1])[group, :, row]
        member = (values == best[row, None]).argmax(1)
        self.nearest[benchmark, tile.start + row] = number[group * tiles.GROUP + member]
      np.maximum(now, best, out=now)
      if excess is not None:
        now = self.excess[benchmark, rows]
        np.maximum(now, np.asarray(excess)[first:last, : tile.count].max(0), out=now)

  def take_rows(self, tile, similarity, nearest, excess) -> None:  # each [S, T]
    rows = slice(tile.start, tile.start + tile.count)
    similarity, nearest, excess = (
      np.asarray(x)[:, : tile.count] for x in (similarity, nearest, excess)
    )
    better = similarity > self.similarity[:, rows]
    self.nearest[:, rows][better] = nearest[better]
    for now, new in ((self.similarity[:, rows], similarity), (self.excess[:, rows], excess)):
      np.maximum(now, new, out=now)


def _first_equal(groups: np.ndarray, best: np.ndarray) -> np.ndarray:  # [g, T], [T] -> [T] int
  """Returns the first group that has the maximum; three times as fast as argmax on this axis."""
  number = np.arange(len(groups), dtype=np.int16)[:, None]
  return np.where(groups == best, number, np.int16(len(groups))).min(0).astype(np.int64)


_ROW_KEYS = ('similarity', 'nearest', 'excess')


def _empty_results(shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # for _ROW_KEYS
  return (
    np.full(shape, -np.inf, np.float32),
    np.full(shape, -1, np.int32),
    np.full(shape, -np.inf, np.float32),
  )
