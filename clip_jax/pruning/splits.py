"""Splits as row numbers: rows of a split, brute-force check, description, overlaps.

Base rows: pool rows are 0..N-1, anchor rows N..N+A-1, planted rows N+A and up. Arrays in, arrays
and plain dicts out; the caller reads and writes the files (rows.npy, split.json).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math

import numpy as np

from clip_jax.core.types import Array
from clip_jax.pruning import cells
from clip_jax.pruning.aligned import dropped_rows
from clip_jax.pruning.columns import ROWS_AT_ONCE, TOLERANCE, Columns

SLACKS = (-0.01, -0.005, 0.0, 0.005, 0.01)
DOMAIN_REMOVAL = 0.9  # dropping a larger share of a domain is domain removal, not alignment
CHECK_ROWS = 4096  # rows widened to float64 at a time


def base_rows(
  pool_rows: Array,  # [n] int64, sorted; repeats are kept
  pool_size: int,  # N
  anchor_rows: Array,  # [a] int64, sorted: the usable rows among the anchor's rows 0..A-1
  append_anchor: bool,
  base_size: int = 0,  # N + A, needed for planted rows
  planted_rows: Array | None = None,  # [p] int64, sorted: the usable rows among 0..P-1
) -> Array:
  """Returns a split's rows of the base set, sorted int64: pool, anchor and planted rows."""
  anchor = np.asarray(anchor_rows, np.int64) + pool_size
  return np.concatenate(
    [
      np.asarray(pool_rows, np.int64),
      anchor if append_anchor else anchor[:0],
      np.asarray([] if planted_rows is None else planted_rows, np.int64) + base_size,
    ]
  )


def rows_hash(
  rows: Array,  # [n] int64
) -> str:
  """Returns the sha256 of the rows as little-endian int64, in hex."""
  return hashlib.sha256(np.ascontiguousarray(rows, '<i8').data).hexdigest()


@dataclasses.dataclass(frozen=True)
class AlignmentClaim:
  """The similarity gap that an aligned split must have: no neighbours nearer than the anchor's.

  k = 0 (rule gap_aligned): let s and t be a query's nearest-neighbour similarities in the split and
  in the anchor set. With the anchor appended and slack <= 0, s = t (kind 'equality'); otherwise
  s - t <= slack (kind 'inequality'). k > 0 (rule k_aligned, on pool rows alone): for every j <= k,
  the j-th nearest pool row is not nearer than the j-th nearest anchor row (kind 'each of k').
  """

  benchmarks: Sequence[str]
  rows: Array  # [n] int64, sorted, unique: of the base set; with k > 0, of the pool
  append_anchor: bool
  slack: float = 0.0
  k: int = 0

  @property
  def kind(self) -> str:
    if self.k:
      return 'each of k'
    return 'equality' if self.append_anchor and self.slack <= 0 else 'inequality'


def check_aligned(
  promises: Mapping[str, AlignmentClaim],  # split -> its promise
  queries: Mapping[str, Array],  # benchmark -> [Q, E] float16, usable queries only
  blocks: Iterable[tuple[Array, Array]],  # base rows [b] int64 and their vectors [b, E] float16
  anchor_blocks: Iterable[Array],  # [b, E] float16 each: the vectors of the usable anchor rows
  *,
  sample: int = 200,
  seed: int = 0,
  tolerance: float = TOLERANCE,
) -> dict[str, dict[str, dict]]:
  """Checks aligned splits by brute force, on a seeded sample of each benchmark's queries.

  All splits are checked in one pass over the blocks, which hold the rows of all splits, each once,
  in any order. The check is exact: float32 finds the pairs within the tolerance of a limit, float64
  decides them; its sums of products of float16 numbers are exact.

  Returns split -> benchmark -> checked, failures (counts of queries), kind, and first_failures: up
  to five of {query, split, anchor}: the query's row and the highest similarities in both, -inf if
  the split has no row near the required similarity; with k > 0 also j, the first rank that is too
  near. Memory: CHECK_ROWS rows, and a block.
  """
  chosen = _samples(queries, sample, seed)
  vectors = np.concatenate([queries[name][rows] for name, rows in chosen.items()])
  starts = dict(zip(chosen, np.cumsum([0, *map(len, chosen.values())]).tolist()))
  places = {name: slice(starts[name], starts[name] + len(rows)) for name, rows in chosen.items()}
  anchor = _highest(vectors, anchor_blocks, max(max(p.k, 1) for p in promises.values()), tolerance)
  # split -> [q, k] float64: highest similarities; [q] float64: lower ones cannot break the promise
  best, least = {}, {}
  for split, promise in promises.items():
    best[split] = np.full([len(vectors), max(promise.k, 1)], -np.inf)
    least[split] = np.full(len(vectors), np.inf)
    margin = (promise.slack if promise.kind == 'inequality' else 0.0) - tolerance
    for name in promise.benchmarks if len(promise.rows) else ():
      least[split][places[name]] = anchor[places[name], max(promise.k, 1) - 1] + margin
  lowest = np.min(list(least.values()), axis=0)
  single, double = vectors.astype(np.float32), vectors.astype(np.float64)
  for numbers, scores, rows in _scored(single, blocks):
    query, row = np.nonzero(scores >= lowest[:, None])
    high, number = scores[query, row], numbers[row]
    for split, promise in promises.items():
      limit = np.maximum(least[split], best[split][:, -1] - tolerance)
      positions = np.flatnonzero(high >= limit[query])
      positions = positions[_are_in(number[positions], promise.rows)]
      if len(positions):
        exact = _exact(double, query[positions], rows, row[positions])
        best[split] = _merged(best[split], query[positions], exact)
  return {
    split: {
      name: _failures(
        promise,
        chosen[name],
        *(similarities[places[name]] for similarities in (best[split], anchor)),
      )
      for name in promise.benchmarks
    }
    for split, promise in promises.items()
  }


def _samples(queries: Mapping[str, Array], sample: int, seed: int) -> dict[str, Array]:
  """Returns a sorted random sample of rows of each benchmark's queries."""
  return {
    name: np.sort(np.random.default_rng(seed).permutation(len(vectors))[:sample])
    for name, vectors in queries.items()
  }


def _failures(promise: AlignmentClaim, rows: Array, best: Array, anchor: Array) -> dict:
  """Returns the check's result for queries, from their highest similarities, [q, k] float64."""
  anchor = anchor[:, : best.shape[1]]
  over = best != anchor if promise.kind == 'equality' else best - anchor > promise.slack
  j = over.argmax(axis=1)
  bad = np.flatnonzero(over.any(axis=1))
  return {
    'checked': len(rows),
    'failures': len(bad),
    'kind': promise.kind,
    'first_failures': [
      {
        'query': int(rows[i]),
        'split': float(best[i, j[i]]),
        'anchor': float(anchor[i, j[i]]),
        **({'j': int(j[i]) + 1} if promise.k else {}),
      }
      for i in bad[:5]
    ],
  }


def _are_in(
  values: Array,  # [m] int64
  rows: Array,  # [n] int64, sorted
) -> Array:
  """Returns whether each value is among the rows, [m] bool."""
  if not len(rows):
    return np.zeros(len(values), bool)
  return rows[np.minimum(np.searchsorted(rows, values), len(rows) - 1)] == values


def _scored(
  queries: Array,  # [q, E] float32
  blocks: Iterable[tuple[Array, Array]],  # numbers [b] and vectors [b, E] float16
) -> Iterator[tuple[Array, Array, Array]]:
  """Yields numbers [c], similarities [q, c] float32, vectors [c, E], with c <= CHECK_ROWS."""
  for numbers, block in blocks:
    if block.ndim != 2 or block.shape[1] != queries.shape[1]:
      raise ValueError(f'blocks must be [rows, {queries.shape[1]}] like queries, got {block.shape}')
    for start in range(0, len(block), CHECK_ROWS):
      rows = block[start : start + CHECK_ROWS]
      yield numbers[start : start + CHECK_ROWS], queries @ rows.astype(np.float32).T, rows


def _highest(
  queries: Array,  # [q, E] float16
  blocks: Iterable[Array],  # [b, E] float16 each
  k: int,
  tolerance: float,
) -> Array:
  """Returns each query's k highest similarities to rows of any block, [q, k] float64, descending.

  Exact if float32 errors are below half the tolerance; -inf if there are fewer than k rows.
  """
  best = np.full([len(queries), k], -np.inf)
  double = queries.astype(np.float64)
  numbered = ((np.arange(len(block)), block) for block in blocks)
  for _, scores, rows in _scored(queries.astype(np.float32), numbered):
    least = scores.max(axis=1) if k == 1 else best[:, -1]  # lower scores are not among the highest
    if np.isneginf(least).any():
      place = max(len(rows) - k, 0)
      least = np.partition(scores, place, axis=1)[:, place]
    least = np.maximum(least, best[:, -1]) - tolerance
    query, row = np.nonzero(scores >= least[:, None])
    best = _merged(best, query, _exact(double, query, rows, row))
  return best


def _exact(queries: Array, query: Array, rows: Array, row: Array) -> Array:
  """Returns the exact similarities of m pairs, [m] float64, CHECK_ROWS pairs at a time."""
  parts = [slice(start, start + CHECK_ROWS) for start in range(0, len(query), CHECK_ROWS)]
  return np.concatenate(
    [np.zeros(0)]
    + [
      np.einsum('me,me->m', queries[query[part]], rows[row[part]].astype(np.float64))
      for part in parts
    ]
  )


def _merged(
  best: Array,  # [q, k] float64, descending
  query: Array,  # [m] integers, sorted
  values: Array,  # [m] float64
) -> Array:
  """Returns the k highest of each query's previous and new values, descending."""
  k = best.shape[1]
  order = np.lexsort((-values, query))
  query, values = query[order], values[order]
  place = np.arange(len(query)) - np.searchsorted(query, query)
  first = place < k
  new = np.full_like(best, -np.inf)
  new[query[first], place[first]] = values[first]
  return -np.sort(-np.concatenate([best, new], axis=1), axis=1)[:, :k]


def expected_share(
  queries: int,  # Q, of one domain
  anchor_images: int,  # m, of the same domain
) -> float:
  """Returns the share of a domain that alignment is expected to remove: 1 - exp(-Q / m).

  It holds for exchangeable images, whatever the pool's size (see "Domains, and what alignment does
  to them" of the method; at Q / m = 0.5 it gives 39 %, where 35 to 40 % were measured). Without an
  anchor image it is 1.
  """
  return 1 - math.exp(-queries / anchor_images) if anchor_images else 1.0


def anchor_images_for(
  queries: int,
  share: float = 0.5,  # in (0, 1)
) -> int:
  """Returns the fewest in-domain anchor images with an expected share of at most `share`."""
  return math.ceil(-queries / math.log1p(-share))


def dropped_at_slack(columns: Columns, benchmarks: Sequence[str]) -> dict[str, int]:
  """Returns the number of rows that gap_aligned drops at each of SLACKS; keys like '0.005'."""
  return {
    f'{slack:g}': len(dropped_rows(columns, benchmarks=benchmarks, slack=slack)) for slack in SLACKS
  }


def describe_aligned(
  columns: Columns,
  kept: Array,  # [n] int64, the pool rows that the aligned split keeps
  *,
  benchmarks: Sequence[str],
  dropped_at: Mapping[str, int],  # result of dropped_at_slack
  removed_over: Mapping[str, Array],  # benchmark -> [Q] integers, removed rows with sim > t_i
  anchor_cosine: Mapping[str, Array],  # benchmark -> [Q] float, t_i divided by both norms
  duplicate_similarity: float,
  label: Array | None = None,  # [N] strings or integers; entries may be None
  domain: Array | None = None,  # [N]
) -> dict:
  """Returns the figures that are reported for every aligned split.

  dropped, dropped_share (of the candidates), by_class and by_domain (level -> candidates, dropped,
  share), dropped_at_slack (slack -> rows; copies of anchor images tie at t_i, so the count at 0 is
  fragile by nature), queries (benchmark -> queries; hit: queries with a removed neighbour nearer
  than t_i; leaked: queries whose t_i is at least duplicate_similarity, already leaked through the
  anchor; and the shares of both), and warnings (sentences).
  """
  dropped = np.array(columns.candidates, bool)
  dropped[kept] = False
  candidates, count = int(np.sum(columns.candidates)), int(dropped.sum())
  by_domain = shares(domain, columns.candidates, dropped)
  warnings = [
    f'{100 * figures["share"]:.1f} % of domain {name!r} is removed: this is domain removal, not '
    'alignment'
    for name, figures in by_domain.items()
    if name and figures['share'] > DOMAIN_REMOVAL
  ]
  if count > candidates / 2:
    warnings.append(f'more than half of the candidates are dropped: {count:,} of {candidates:,}')
  return {
    'dropped': count,
    'dropped_share': count / candidates if candidates else 0.0,
    'by_class': shares(label, columns.candidates, dropped),
    'by_domain': by_domain,
    'dropped_at_slack': dict(dropped_at),
    'queries': {
      name: _query_figures(removed_over[name], anchor_cosine[name], duplicate_similarity)
      for name in benchmarks
    },
    'warnings': warnings,
  }


def shares(
  column: Array | None,  # [N]
  candidates: Array,  # [N] bool
  dropped: Array,  # [N] bool
) -> dict:
  """Returns level -> candidates, dropped and share, for each level that has candidates."""
  if column is None:
    return {}
  codes, names = cells.levels(column)
  n, gone = (_counts(codes, mask, len(names)) for mask in (candidates, dropped))
  return {
    names[i]: {'candidates': n[i], 'dropped': gone[i], 'share': gone[i] / n[i]}
    for i in sorted(range(len(names)), key=names.__getitem__)
    if n[i]
  }


def _counts(
  codes: Array,  # [N] integers below `levels`
  mask: Array,  # [N] bool
  levels: int,
) -> list[int]:
  """Returns the rows of each level among those of the mask, in constant memory."""
  counts = np.zeros(levels, np.int64)
  for start in range(0, len(codes), ROWS_AT_ONCE):
    block = slice(start, start + ROWS_AT_ONCE)
    counts += np.bincount(codes[block][mask[block]], minlength=levels)
  return counts.tolist()


def _query_figures(
  removed_over: Array,  # [Q] integers
  anchor_cosine: Array,  # [Q] float
  duplicate_similarity: float,
) -> dict:
  n = len(removed_over)
  hit = int((removed_over > 0).sum())
  leaked = int((anchor_cosine >= duplicate_similarity).sum())
  return {
    'queries': n,
    'hit': hit,
    'hit_share': hit / max(n, 1),
    'leaked': leaked,
    'leaked_share': leaked / max(n, 1),
  }


def overlap(
  splits: Mapping[str, Array],  # name -> [n] int64 rows, sorted; repeats count once
) -> tuple[list[str], Array, Array]:
  """Returns the names, [S, S] |A and B| / |A or B|, and [S, S] |A and B| / |A| (A is the row).

  Pass pool rows only: anchor rows are in every split and would increase every overlap. For an empty
  A, the second figure is 1 for every B; the first is 1 if B is empty too.
  """
  size = max((int(rows[-1]) + 1 for rows in splits.values() if len(rows)), default=0)
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
