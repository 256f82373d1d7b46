"""clip_jax.search and clip_jax.duplicates: arrays of embeddings against arrays of embeddings."""

import dataclasses
from typing import Any

from absl import logging
import numpy as np
import pyarrow as pa

from clip_jax.core import progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.data import vectors as vectors_lib
from clip_jax.similarity import exact, pairs, scann

ROWS_AT_ONCE = 1 << 18  # pool rows searched at once
MOST_PAIRS = 100_000_000  # pairs of a list of duplicates, which is in memory
RECALL_QUERIES = 256  # queries of the sample that measures ScaNN's recall


@dataclasses.dataclass(frozen=True, repr=False)
class Neighbours:
  """The result of a search of a pool of N rows by Q queries.

  Rows and queries without a usable vector (NaN, zero) hold -inf and -1.
  """

  similarity: Array  # [Q, k] float32, most similar first
  row: Array  # [Q, k] int64: pool rows; ties: lowest row first
  nearest_query: Array  # [N] int32
  max_similarity: Array  # [N] float32, to that query
  backend: str  # 'exact' or 'scann'
  recall: float | None = None  # of the k nearest rows, on sampled queries; None: exact
  notes: tuple[str, ...] = ()  # what was done to the vectors

  def __repr__(self) -> str:
    n, (q, k) = len(self.nearest_query), self.row.shape
    how = 'exact' if self.recall is None else f'approximate, recall {self.recall:.4f}'
    return f'<{k} nearest of {n:,} rows for {q:,} queries, {how}{"; ".join(("", *self.notes))}>'


def search(
  pool: Any,  # [N, E] numbers of any float dtype: NumPy, a memory map, JAX, PyTorch on the CPU
  queries: Any,  # [Q, E]
  k: int = 10,
  backend: str = 'exact',
) -> Neighbours:
  """Searches a pool for the nearest rows of every query, and for the nearest query of every row.

  Vectors are normalised in float32 and stored in float16, as in a work directory; similarity is
  the dot product of the stored vectors, in float32. 'exact' compares all pairs. 'scann' indexes the
  pool, block by block, and scores its candidates exactly: it may miss rows, `recall` says how
  many; nearest_query and max_similarity are then known for candidates only (-1 and NaN elsewhere).
  Results have min(k, usable rows) columns. Memory: one block of the pool, besides the results.
  """
  if backend not in _SEARCHES:
    raise ConfigError(f'backend={backend!r} is not known. Use one of: {", ".join(_SEARCHES)}.')
  if k < 1:
    raise ConfigError(f'k={k} must be 1 or more.')
  rows, given = _Vectors(pool, 'pool'), _Vectors(queries, 'queries')
  _check_dims(rows, given)
  vectors, usable = given.block(0, len(given))
  if not usable.any():
    raise InputError('No query has a usable vector: all hold NaN or are zero.')
  ids = np.flatnonzero(usable)
  merged = [(np.empty((len(ids), 0), np.float32), np.empty((len(ids), 0), np.int64))]
  nearest, highest = np.full(len(rows), -1, np.int32), np.full(len(rows), -np.inf, np.float32)
  sample = exact.Queries(vectors[ids], (('queries', 0, len(ids)),))
  with progress.Bar(total=len(rows), desc='search', unit='row') as bar:
    for start in range(0, len(rows), ROWS_AT_ONCE):
      block, good = rows.block(start, start + ROWS_AT_ONCE)
      part = slice(start, start + len(block))
      block_result = _SEARCHES[backend](block, good, sample, k)
      merged.append(
        (
          block_result['top_similarity'],
          np.where(block_result['top_row'] >= 0, block_result['top_row'] + start, -1),
        )
      )
      merged = [exact.merge_top(merged, k)]
      nearest[part] = np.where(block_result['nearest'] >= 0, ids[block_result['nearest']], -1)
      highest[part] = block_result['similarity']
      bar.update(len(block))
  similarity = np.full((len(given), merged[0][0].shape[1]), -np.inf, np.float32)
  row = np.full(similarity.shape, -1, np.int64)
  similarity[ids], row[ids] = merged[0]
  recall = None
  if backend != 'exact':
    recall = _recall(rows, vectors, ids, row, k)
  return Neighbours(similarity, row, nearest, highest, backend, recall, (*rows.notes, *given.notes))


def _exact_block(block: Array, usable: Array, queries: Any, k: int) -> dict[str, Array]:
  return exact.search_shard(block, usable, queries, k=k)['queries']


def _scann_block(block: Array, usable: Array, queries: Any, k: int) -> dict[str, Array]:
  similarity, row = scann.candidates(block, usable, queries.vectors, max(k, 100))
  return {
    'top_similarity': similarity[:, :k],
    'top_row': row[:, :k],
    **scann.row_columns(similarity, row, usable),
  }


_SEARCHES = {'exact': _exact_block, 'scann': _scann_block}


def _recall(rows: '_Vectors', vectors: Array, ids: Array, row: Array, k: int) -> float:
  """Returns the share of the exact k nearest rows that are in `row`, for sampled queries."""
  chosen = np.random.default_rng(0).choice(ids, min(RECALL_QUERIES, len(ids)), replace=False)
  sample = exact.Queries(vectors[chosen], (('queries', 0, len(chosen)),))
  merged = [(np.empty((len(chosen), 0), np.float32), np.empty((len(chosen), 0), np.int64))]
  for start in range(0, len(rows), ROWS_AT_ONCE):
    block_result = _exact_block(*rows.block(start, start + ROWS_AT_ONCE), sample, k)
    merged.append((block_result['top_similarity'], block_result['top_row'] + start))
    merged = [exact.merge_top(merged, k)]
  true = merged[0][1]
  hits = sum(len(np.intersect1d(a, b)) for a, b in zip(true, row[chosen]))
  recall = hits / max(true.size, 1)
  logging.info('search: ScaNN found %.4f of the %d nearest rows of sampled queries.', recall, k)
  return recall


def duplicates(
  pool: Any,  # [N, E] numbers of any float dtype
  queries: Any,  # [Q, E]
  similarity: float = 0.95,
) -> Any:
  """Returns all pairs of a query and a pool row with at least this cosine similarity.

  A pyarrow table with the columns query (int64), row (int64) and similarity (float64), by query,
  most similar first. Vectors are stored as in `search`; the cosine is exact, and 1 for equal
  stored vectors. Rows with NaN or zero are in no pair.
  """
  if not -1 <= similarity <= 1:
    raise ConfigError(f'similarity={similarity} must lie in [-1, 1].')
  rows, given = _Vectors(pool, 'pool'), _Vectors(queries, 'queries')
  _check_dims(rows, given)
  vectors, usable = given.block(0, len(given))
  ids, number = np.flatnonzero(usable), 0
  parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
  with progress.Bar(total=len(rows), desc='duplicates', unit='row') as bar:
    for start in range(0, len(rows) if len(ids) else 0, ROWS_AT_ONCE):
      block, good = rows.block(start, start + ROWS_AT_ONCE)
      for query, row, cosine in pairs.similar_pairs(
        block, np.flatnonzero(good), vectors[ids], similarity
      ):
        parts.append((ids[query], start + row, cosine))
        number += len(query)
        if number > MOST_PAIRS:
          raise InputError(
            f'More than {MOST_PAIRS:,} pairs have a similarity of {similarity:g} or more. Raise '
            'similarity.'
          )
      bar.update(len(block))
  query, row, cosine = (np.concatenate(part) for part in zip(*parts))
  order = np.lexsort((row, -cosine, query))
  return pa.table({'query': query[order], 'row': row[order], 'similarity': cosine[order]})


class _Vectors:
  """Vectors of any float dtype, normalised block by block."""

  def __init__(self, vectors: Any, name: str):
    if not hasattr(vectors, 'shape'):
      vectors = np.asarray(vectors)
    if len(vectors.shape) != 2:
      raise InputError(f'{name} must be an array [rows, numbers]; got {list(vectors.shape)}.')
    if not min(vectors.shape):
      raise InputError(f'{name} is empty: {list(vectors.shape)}.')
    self._vectors, self._name = vectors, name
    self._least, self._most, self._bad = np.inf, 0.0, 0
    self.dim = int(vectors.shape[1])

  def __len__(self) -> int:
    return int(self._vectors.shape[0])

  def block(self, start: int, stop: int) -> tuple[Array, Array]:
    """Returns rows as unit vectors, float16, and whether each is usable."""
    block = np.asarray(self._vectors[start:stop])
    if (
      block.dtype.kind not in 'fiuV' or block.dtype.kind == 'V' and 'float' not in str(block.dtype)
    ):
      raise InputError(f'{self._name} must hold numbers; got {block.dtype}.')
    with np.errstate(over='ignore', invalid='ignore'):
      norm = np.linalg.norm(block.astype(np.float32), axis=1)
    unit, bad = vectors_lib.to_unit_float16(block, any_norm=True)
    unit[bad] = 0
    good = norm[~bad]
    if len(good):
      self._least, self._most = min(self._least, good.min()), max(self._most, good.max())
    self._bad += int(bad.sum())
    return unit, ~bad

  @property
  def notes(self) -> tuple[str, ...]:
    """What was done, in words; () if all vectors had unit length. Complete after the last block."""
    notes = []
    if self._bad:
      notes.append(f'{self._name}: {self._bad:,} rows with NaN or zero were left out')
    if self._most > 1.001 or self._least < 0.999:
      notes.append(f'{self._name} was normalised (norms {self._least:.3g} to {self._most:.3g})')
    for note in notes:
      logging.info('%s.', note)
    return tuple(notes)


def _check_dims(pool: _Vectors, queries: _Vectors) -> None:
  if pool.dim != queries.dim:
    raise InputError(
      f'The pool has vectors of {pool.dim} numbers, the queries of {queries.dim}: they are of '
      'different embedders and cannot be compared.'
    )
