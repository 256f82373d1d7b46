"""What rules decide on: columns over the N pool rows, what a rule keeps, exact order at a cut.

The columns hold float32 similarities, which differ in the last bits between machines: rows within a
tolerance of a cut are decided by exact float64 similarities instead. Ties go by pool order, the
earlier row first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses

import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array

TOLERANCE = 1e-5  # where nothing is said: float32 similarities are off by less than half of it


def _not_given(benchmarks: Sequence[str], rows: Array) -> Array:
  raise ValueError(
    f'{len(rows)} rows lie near a cut over {tuple(benchmarks)}: '
    'give Columns exact_similarity and exact_excess to decide them'
  )


@dataclasses.dataclass(frozen=True)
class Pairs:
  """All pairs of some queries of a benchmark and pool rows, nearer than the k-th anchor row."""

  anchor: Array  # [Q, k] float64, t_i^(1) >= ... >= t_i^(k), exact; NaN for unusable queries
  query: Array  # [m] integers below Q
  row: Array  # [m] int64, of the pool; ascending for each query
  similarity: Array  # [m] float64, exact, > t_i^(k)


def _no_pairs(benchmark: str, k: int) -> Iterable[Pairs]:
  raise ValueError(f'give Columns pairs: k={k} needs those of {benchmark!r}')


@dataclasses.dataclass(frozen=True)
class Columns:
  """What rules know of the N pool rows: the candidates, and columns from search and ingest."""

  candidates: Array  # [N] bool: usable and kept by de-duplication
  # benchmark -> [N] float32, the highest over its queries of sim(query, row) and of sim - t_query
  similarity: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  excess: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  # (benchmarks, rows [m] int64) -> [m] float64, the same over all queries of all these benchmarks
  exact_similarity: Callable[[Sequence[str], Array], Array] = _not_given
  exact_excess: Callable[[Sequence[str], Array], Array] = _not_given
  # Rows so near a cut are decided exactly: at least twice what a float32 value can be off, once for
  # the row and once for the cut, where that is the value of another row.
  tolerance: float = TOLERANCE
  # (benchmark, k) -> what k_aligned reads; the pairs of a query are all in one part
  pairs: Callable[[str, int], Iterable[Pairs]] = _no_pairs
  recall: float | None = None  # measured, of an approximate search (misses are NaN); None: exact
  # For the matched control only.
  anchor_class: Array | None = None  # [N] int32, the class whose mean anchor image is nearest
  anchor_class_similarity: Array | None = None  # [N] float32, to that mean
  caption_length: Array | None = None  # [N] int32
  image_pixels: Array | None = None  # [N] int64, width times height
  domain: Array | None = None  # [N] strings or integers: domain or label, where there is one


@dataclasses.dataclass(frozen=True)
class Kept:
  """What a rule keeps: sorted int64 pool rows, and figures about the decision.

  Each row once, but for the rule 'listed': a row that a file lists twice is there twice, and is
  trained on twice an epoch.
  """

  rows: Array  # [n] int64
  report: dict = dataclasses.field(default_factory=dict)


def highest(
  rule: str,
  column: Mapping[str, Array],  # benchmark -> [N] float32
  rows: Array,  # [m] int64
  benchmarks: Sequence[str],
  larger: Callable[[Array, Array], Array],
) -> Array:
  """Returns the highest value over the benchmarks, [m] float32: the larger of each two."""
  if not benchmarks:
    raise ConfigError(f"rule {rule!r} needs benchmarks=('name', ...)")
  for name in benchmarks:
    if name not in column:
      raise InputError(f'rule {rule!r} needs the search of {name!r}; have {sorted(column)}')
  highest = column[benchmarks[0]][rows]
  for name in benchmarks[1:]:
    highest = larger(highest, column[name][rows])
  return highest


def candidates_for(columns: Columns, count: int) -> Array:
  """Returns the candidate rows, [m] int64; refuses a count above their number."""
  rows = np.flatnonzero(columns.candidates)
  if not 0 <= count <= len(rows):
    raise ConfigError(
      f'size asks for {count} pool rows, there are {len(rows)} candidates '
      '(usable and kept by de-duplication)'
    )
  return rows


def random_order(n: int, seed: int, draw: int, stream: int) -> Array:
  """Returns a random number for each of n pool rows, [n] uint64.

  Raw numbers of a bit generator, whose stream NumPy never changes, unlike those of its samplers.
  """
  return np.random.PCG64(np.random.SeedSequence((seed, draw, stream))).random_raw(n)


def lowest(
  values: Array,  # [n]
  count: int,
) -> Array:
  """Returns which are the `count` lowest values, [n] bool; ties go to the earlier position."""
  if count == 0:
    return np.zeros(len(values), bool)
  cut = np.partition(values, count - 1)[count - 1]
  lowest = values < cut
  lowest[np.flatnonzero(values == cut)[: count - lowest.sum()]] = True
  return lowest


def refined(
  values: Array,  # [n] float32, off by less than half of the tolerance
  exact: Callable[[Array], Array],  # positions [m] -> [m] float64, their exact values
  places: Sequence[int],  # in ascending order of the values, each in [0, n)
  tolerance: float,
) -> tuple[Array, int]:
  """Returns [n] float64 that decide exactly at these places of the order, and how many are exact.

  The exact value v at such a place, all that equals it, and who lies below or above it, are those
  of the exact values. For v lies within half a tolerance of the value at the same place of
  `values`, and all that lies within a tolerance of that is made exact.
  """
  found = values.astype(np.float64)
  near_cut = np.zeros(len(values), bool)
  ordered = np.partition(values, sorted(set(places)))
  for place in places:
    near_cut |= np.abs(found - float(ordered[place])) <= tolerance
  near_cut = np.flatnonzero(near_cut)
  found[near_cut] = exact(near_cut)
  return found, len(near_cut)
