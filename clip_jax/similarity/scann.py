"""Approximate search with ScaNN: candidates from an index over the pool, scored exactly afterwards.

Rows in, arrays out; no files. ScaNN holds its rows in memory as float32. If they do not fit, index
shard by shard and merge with exact.merge_top.
ScaNN has no seed. By default it initialises k-means at random, so that each build finds other rows.
With k-means++, all repeated builds in our tests found the same rows for any number of threads, but
ScaNN's documentation does not guarantee this.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.similarity import exact, tiles

TREE_ROWS = 20_000  # ScaNN recommends brute force for fewer rows


def candidates(
  pool: Array,  # rows [N, E] float16
  usable: Array,  # [N] bool
  queries: Array,  # [Q, E] float16
  n: int,
  *,
  leaves: int | None = None,
  searched: float = 0.25,
  name: str = 'pool',
) -> tuple[np.ndarray, np.ndarray]:
  """Returns approximately the n nearest usable rows of each query.

  These are [Q, n'] float32 similarities and [Q, n'] int64 pool rows, most similar first, ties
  lowest row first, n' = min(n, usable rows), padded with -inf and -1 if ScaNN finds fewer. `leaves`
  is the number of k-means cells (default: the square root of the number of rows), `searched` the
  share of cells that a query searches; pools below TREE_ROWS rows are searched by ScaNN's brute
  force. Similarities are those of exact.search_shard, bit for bit.
  """
  if not usable.any():
    return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
  built = index(pool, usable, n, leaves=leaves, searched=searched, name=name)
  return search(built, pool, queries, n, name=name)


class Index(NamedTuple):
  """An index over the usable rows of a pool."""

  searcher: Any
  rows: np.ndarray  # [m] int64


def index(
  pool: Array,  # rows [N, E] float16
  usable: Array,  # [N] bool
  n: int,  # most neighbours that a search asks for
  *,
  leaves: int | None = None,
  searched: float = 0.25,
  name: str = 'pool',
) -> Index:
  """Builds an index over the usable rows; arguments as in `candidates`."""
  rows = np.flatnonzero(usable)
  return Index(_build(_load(pool, rows, name), min(n, len(rows)), leaves, searched), rows)


def search(
  built: Index,
  pool: Array,  # rows [N, E] float16
  queries: Array,  # [Q, E] float16
  n: int,
  *,
  name: str = 'pool',
) -> tuple[np.ndarray, np.ndarray]:
  """Returns approximately the n nearest rows of each query, as `candidates` does."""
  n = min(n, len(built.rows))
  position, distance = built.searcher.search_batched_parallel(np.asarray(queries, np.float32))
  nearest = np.where(np.isnan(distance), -1, built.rows[position])  # ScaNN pads with NaN
  return exact.merge_top([(score(pool, nearest, queries, name=name), nearest)], n)


def row_columns(
  similarity: Array,  # [Q, n] float32, of `candidates`
  row: Array,  # [Q, n] int64
  usable: Array,  # [N] bool
  thresholds: Array | None = None,  # [Q] float32; NaN where a query has none
) -> dict[str, np.ndarray]:
  """Returns the columns of exact.search_shard for the candidates: similarity, nearest and excess.

  Rows that are no candidate of any query hold NaN, -1 and NaN; unusable rows -inf, -1 and -inf.
  """
  query, rank = np.nonzero(row >= 0)
  rows, scores = row[query, rank], similarity[query, rank]
  best = np.lexsort((query, -scores, rows))  # per row: highest score first, ties by query
  scored, first = np.unique(rows[best], return_index=True)
  columns = {
    'similarity': np.full(len(usable), np.nan, np.float32),
    'nearest': np.full(len(usable), -1, np.int32),
    'excess': np.full(len(usable), np.nan, np.float32),
  }
  columns['similarity'][scored] = scores[best][first]
  columns['nearest'][scored] = query[best][first]
  if thresholds is not None:
    over = np.full(len(usable), -np.inf, np.float32)
    with np.errstate(invalid='ignore'):  # thresholds are NaN without an anchor
      np.maximum.at(over, rows, scores - thresholds[query])
    columns['excess'][scored] = over[scored]
  for key in ('similarity', 'excess'):
    columns[key][~usable] = -np.inf
  return columns


def score(
  pool: Array,  # rows [N, E] float16
  rows: Array,  # [Q, n] int64, -1: no row
  queries: Array,  # [Q, E] float16
  *,
  tile_rows: int = 4096,
  name: str = 'pool',
) -> np.ndarray:
  """Returns similarities of given pairs, [Q, n] float32, -inf for -1.

  They have the same bits as the exact search, because they use the same padded product: 64 queries
  against all rows that belong to any of them.
  """
  out = np.full(rows.shape, -np.inf, np.float32)
  for i in range(0, len(queries), tiles.PAD):
    part = rows[i : i + tiles.PAD]
    block = np.resize(np.arange(i, i + len(part)), tiles.PAD)
    block = jax.device_put(queries[block].astype(np.float32))
    named = np.unique(part[part >= 0])
    for tile in tiles.walk(pool, named, tile_rows, name):
      scores = np.asarray(_dots(block, tile.device))
      position = np.searchsorted(named, part) - tile.start
      query, column = np.nonzero((part >= 0) & (position >= 0) & (position < tile.count))
      out[i + query, column] = scores[query, position[query, column]]
  return out


_dots = jax.jit(tiles.dots)


def _load(pool: Array, rows: np.ndarray, name: str) -> np.ndarray:  # -> [m, E] float32
  out = np.empty((len(rows), pool.shape[1]), np.float32)
  for i in range(0, len(rows), 65_536):
    part = out[i : i + 65_536]
    part[:] = pool[rows[i : i + len(part)]]
    tiles.check_norms(np.linalg.norm(part, axis=1), rows[i : i + len(part)], name)
  return out


def _build(vectors: np.ndarray, n: int, leaves: int | None, searched: float):
  try:
    import scann
  except ImportError as error:
    raise InputError(
      "search.backend='scann' needs the package scann, which exists only for Linux and Python < "
      "3.14. Install it, or use backend='exact', which works everywhere."
    ) from error
  builder: Any = scann.scann_ops_pybind.builder(vectors, n, 'dot_product')
  if len(vectors) < TREE_ROWS:
    return builder.score_brute_force().build()
  leaves = leaves or round(len(vectors) ** 0.5)
  return (
    builder.tree(
      leaves, max(1, round(searched * leaves)), training_sample_size=250_000, random_init=False
    )
    .score_ah(2, anisotropic_quantization_threshold=0.2)  # both values: recommended by ScaNN
    .reorder(min(4 * n, len(vectors)))
    .build()
  )
