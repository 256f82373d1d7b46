"""Splits as row numbers: the rows of a split, its check by brute force, its description, overlaps.

Base rows: pool rows are 0..N-1, the anchor's N..N+A-1. Arrays in, arrays and plain dicts out; the
caller reads and writes the files (rows.npy, split.json).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from clip_jax.core.types import Array
from clip_jax.pruning import cells
from clip_jax.pruning.rules import Columns, dropped_rows

SLACKS = (-0.01, -0.005, 0.0, 0.005, 0.01)
DOMAIN_REMOVAL = 0.9  # share of a domain over which dropping it is no longer alignment
CHECK_ROWS = 4096  # rows widened to float64 at a time


def base_rows(
    pool_rows: Array,  # [n] int64, sorted; repeats stay
    pool_size: int,  # N
    anchor_rows: Array,  # [a] int64, sorted: the usable ones of the anchor's own rows 0..A-1
    append_anchor: bool,
) -> Array:
  """Returns the split's rows of the base set, sorted int64: pool rows, then the anchor's."""
  anchor = np.asarray(anchor_rows, np.int64) + pool_size
  return np.concatenate([np.asarray(pool_rows, np.int64), anchor if append_anchor else anchor[:0]])


def rows_hash(
    rows: Array,  # [n] int64
) -> str:
  """Returns the sha256 of the rows as little-endian int64, in hex."""
  return hashlib.sha256(np.ascontiguousarray(rows, '<i8')).hexdigest()


def check_aligned(
    queries: Array,  # [Q, E] float16, the usable ones of one benchmark
    split_blocks: Iterable[Array],  # [b, E] float16 each: the vectors of all rows of the split
    anchor_blocks: Iterable[Array],  # [b, E] float16 each: the vectors of the usable anchor rows
    *,
    append_anchor: bool,
    slack: float = 0.0,
    sample: int = 200,
    seed: int = 0,
) -> dict:
  """Checks an aligned split by brute force in float64, on a seeded sample of the queries.

  s and t are a query's nearest-neighbour similarities in the split and in the anchor set. With the
  anchor appended and slack <= 0, s must equal t (kind 'equality'; float64 sums of products of
  float16 numbers are exact). Otherwise s - t <= slack must hold (kind 'inequality').

  Returns checked, failures (counts of queries), kind, and first_failures: up to five of {query,
  split, anchor} with the query's row and both similarities. Memory: CHECK_ROWS rows, and a block.
  """
  chosen = np.random.default_rng(seed).permutation(len(queries))[:sample]
  chosen.sort()
  vectors = np.asarray(queries[chosen], np.float64)
  in_split = _nearest_similarity(vectors, split_blocks)
  in_anchor = _nearest_similarity(vectors, anchor_blocks)
  equality = append_anchor and slack <= 0
  failed = np.flatnonzero(in_split != in_anchor if equality else in_split - in_anchor > slack)
  return {
      'checked': len(chosen),
      'failures': len(failed),
      'kind': 'equality' if equality else 'inequality',
      'first_failures': [
          {'query': int(chosen[i]), 'split': float(in_split[i]), 'anchor': float(in_anchor[i])}
          for i in failed[:5]],
  }


def _nearest_similarity(
    queries: Array,  # [q, E] float64
    blocks: Iterable[Array],  # [b, E] each
) -> Array:
  """Returns each query's highest similarity to any row of any block, [q] float64; -inf if none."""
  nearest = np.full(len(queries), -np.inf)
  for block in blocks:
    if block.ndim != 2 or block.shape[1] != queries.shape[1]:
      raise ValueError(f'blocks must be [rows, {queries.shape[1]}] like queries, got {block.shape}')
    for start in range(0, len(block), CHECK_ROWS):
      rows = np.asarray(block[start:start + CHECK_ROWS], np.float64)
      np.maximum(nearest, (queries @ rows.T).max(axis=1), out=nearest)
  return nearest


def describe_aligned(
    columns: Columns,
    kept: Array,  # [n] int64, the pool rows that the aligned split keeps
    *,
    benchmarks: Sequence[str],
    removed_over: Mapping[str, Array],  # benchmark -> [Q] integers, removed rows with sim > t_i
    anchor_cosine: Mapping[str, Array],  # benchmark -> [Q] float, t_i divided by both norms
    duplicate_similarity: float,
    label: Array | None = None,  # [N] strings or integers; None where unknown
    domain: Array | None = None,  # [N]
) -> dict:
  """Returns the figures that are printed with every aligned split.

  dropped, dropped_share (of the candidates), by_class and by_domain (level -> candidates, dropped,
  share), dropped_at_slack (slack -> rows; copies of anchor images tie at t_i, so the count at 0 is
  fragile by nature), queries (benchmark -> queries; hit: those with a removed neighbour nearer than
  t_i; leaked: those whose t_i is at or over duplicate_similarity, already leaked through the
  anchor; and the shares of both), and warnings (sentences).
  """
  dropped = np.array(columns.candidates, bool)
  dropped[kept] = False
  candidates, count = int(np.sum(columns.candidates)), int(dropped.sum())
  by_domain = _shares(domain, columns.candidates, dropped)
  warnings = [
      f'{figures["share"]:.1%} of domain {name!r} is gone: this is domain removal, not alignment'
      for name, figures in by_domain.items()
      if name and figures['share'] > DOMAIN_REMOVAL]
  if count > candidates / 2:
    warnings.append(f'{count} of {candidates} candidates are dropped, more than half')
  return {
      'dropped': count,
      'dropped_share': count / candidates if candidates else 0.0,
      'by_class': _shares(label, columns.candidates, dropped),
      'by_domain': by_domain,
      'dropped_at_slack': {
          f'{slack:g}': len(dropped_rows(columns, benchmarks=benchmarks, slack=slack))
          for slack in SLACKS},
      'queries': {
          name: _query_figures(removed_over[name], anchor_cosine[name], duplicate_similarity)
          for name in benchmarks},
      'warnings': warnings,
  }


def _shares(
    column: Array | None,  # [N]
    candidates: Array,  # [N] bool
    dropped: Array,  # [N] bool
) -> dict:
  """Returns, for each level that has candidates: their number, those dropped, and the share."""
  if column is None:
    return {}
  codes, names = cells.levels(column)
  n = np.bincount(codes[candidates], minlength=len(names)).tolist()
  gone = np.bincount(codes[dropped], minlength=len(names)).tolist()
  return {
      names[i]: {'candidates': n[i], 'dropped': gone[i], 'share': gone[i] / n[i]}
      for i in sorted(range(len(names)), key=names.__getitem__) if n[i]}


def _query_figures(
    removed_over: Array,  # [Q] integers
    anchor_cosine: Array,  # [Q] float
    duplicate_similarity: float,
) -> dict:
  n = len(removed_over)
  hit = int((removed_over > 0).sum())
  leaked = int((anchor_cosine >= duplicate_similarity).sum())
  return {'queries': n, 'hit': hit, 'hit_share': hit / max(n, 1),
          'leaked': leaked, 'leaked_share': leaked / max(n, 1)}


def overlap(
    splits: Mapping[str, Array],  # name -> [n] int64 rows; a row that is there twice counts once
) -> tuple[list[str], Array, Array]:
  """Returns the names, [S, S] |A and B| / |A or B|, and [S, S] |A and B| / |A| (A is the row).

  Give pool rows: anchor rows are in every split and would make all of them look alike. Of an empty
  split all (none) of the rows are in B: both figures are then 1 against another empty one, and the
  second is 1 against any.
  """
  size = max((int(rows.max()) + 1 for rows in splits.values() if len(rows)), default=0)
  packed = [_bits(rows, size) for rows in splits.values()]
  shared = np.array([[np.bitwise_count(a & b).sum() for b in packed] for a in packed], np.int64)
  shared = shared.reshape(len(packed), len(packed))
  counts = shared.diagonal()
  either = counts[:, None] + counts[None, :] - shared
  jaccard = np.where(either > 0, shared / np.maximum(either, 1), 1.0)
  inside = np.where(counts[:, None] > 0, shared / np.maximum(counts[:, None], 1), 1.0)
  return list(splits), jaccard, inside


def _bits(
    rows: Array,  # [n] int64
    size: int,
) -> Array:
  """Returns the rows as a packed bit mask, [ceil(size / 8)] uint8."""
  mask = np.zeros(size, bool)
  mask[rows] = True
  return np.packbits(mask)
