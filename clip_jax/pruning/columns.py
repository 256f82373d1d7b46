"""Inputs and outputs of the rules: columns over the N pool rows, kept rows, exact cuts.

The columns hold float32 similarities, whose last bits differ between machines. Rows within a
tolerance of a cut are therefore decided by exact float64 similarities. Ties go by pool order, the
earlier row first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses

import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array

TOLERANCE = 1e-5  # default; errors of float32 similarities are below half of it
# Dot products of float16 unit vectors differ from their cosine by less: each norm is off by 1e-3.
NORMS = 2.1e-3
ROWS_AT_ONCE = 1 << 20  # rows of which 8 bytes each are held beside a column


def _not_given(benchmarks: Sequence[str], rows: Array) -> Array:
  raise ValueError(
    f'float32 cannot decide whether {len(rows)} rows are over a threshold of {tuple(benchmarks)}. '
    'Give Columns the functions exact_similarity and exact_excess, which compute in float64.'
  )


@dataclasses.dataclass(frozen=True)
class Pairs:
  """All pairs of a query and a pool row that is nearer than the query's k-th anchor row."""

  anchor: Array  # [Q, k] float64, t_i^(1) >= ... >= t_i^(k), exact; NaN for unusable queries
  query: Array  # [m] integers below Q
  row: Array  # [m] int64, of the pool; ascending for each query
  similarity: Array  # [m] float64, exact, > t_i^(k)


def _no_pairs(benchmark: str, k: int) -> Iterable[Pairs]:
  raise ValueError(f'pass pairs to Columns: k={k} needs the pairs of {benchmark!r}')


@dataclasses.dataclass(frozen=True)
class Columns:
  """Inputs of the rules for the N pool rows: the candidates, and columns of search and ingest."""

  candidates: Array  # [N] bool: usable and kept by de-duplication
  # benchmark -> [N] float32: maximum over its queries of sim(query, row), and of sim - t_query
  similarity: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  excess: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  # (benchmarks, rows [m] int64) -> [m] float64, the same maximum over the queries of all benchmarks
  exact_similarity: Callable[[Sequence[str], Array], Array] = _not_given
  exact_excess: Callable[[Sequence[str], Array], Array] = _not_given
  # (benchmarks, rows [m] int64, cosine) -> [m] bool: whether a row has at least this exact cosine
  # similarity to a query; None: the column decides
  reaches: Callable[[Sequence[str], Array, float], Array] | None = None
  # Rows this close to a cut are decided exactly. At least twice the error of a float32 value: one
  # error of the row, and one of the cut if it is the value of another row.
  tolerance: float = TOLERANCE
  # (benchmark, k) -> parts of the pairs that k_aligned reads; each query's pairs are in one part
  pairs: Callable[[str, int], Iterable[Pairs]] = _no_pairs
  recall: float | None = None  # of an approximate search (missed rows are NaN); None: exact search
  # For the matched control only.
  anchor_class: Array | None = None  # [N] integers, the class whose mean anchor image is nearest
  anchor_class_similarity: Array | None = None  # [N] float32, to that mean
  caption_length: Array | None = None  # [N] integers
  image_pixels: Array | None = None  # [N] integers, width times height
  # [N] bool, whether the caption names the nearest class; None if the classes have no names
  caption_names_class: Array | None = None
  domain: Array | None = None  # [N] strings or integers; None if no domain is known


@dataclasses.dataclass(frozen=True)
class Kept:
  """The sorted int64 pool rows that a rule keeps, and a report of its decision.

  Rows are unique except for the rule 'listed': a row that a file lists twice occurs twice, and is
  trained on twice per epoch.
  """

  rows: Array  # [n] int64
  report: dict = dataclasses.field(default_factory=dict)


def best_over_benchmarks(
  rule: str,
  column: Mapping[str, Array],  # benchmark -> [N] float32
  rows: Array,  # [m] int64
  benchmarks: Sequence[str],
  larger: Callable[[Array, Array], Array],
) -> Array:
  """Returns each row's highest value over the benchmarks, [m] float32, by `larger`."""
  if not benchmarks:
    raise ConfigError(f"rule {rule!r} needs benchmarks=('name', ...)")
  for name in benchmarks:
    if name not in column:
      raise InputError(f'rule {rule!r} needs the search of {name!r}; have {sorted(column)}')
  highest = column[benchmarks[0]][rows]
  for name in benchmarks[1:]:
    highest = larger(highest, column[name][rows])
  return highest


def narrow(
  numbers: Array,  # [n] integers
  highest: int = 0,  # a number that the type must hold, too
) -> Array:
  """Returns the same integers in the smallest signed type that holds them."""
  low, high = numbers.min(initial=-1), numbers.max(initial=highest)
  kinds = (np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
  return numbers.astype(next(kind.dtype for kind in kinds if kind.min <= low and high <= kind.max))


def candidates_for(columns: Columns, count: int) -> Array:
  """Returns the candidate rows, [m] int64; raises ConfigError if `count` exceeds their number."""
  rows = np.flatnonzero(columns.candidates)
  if not 0 <= count <= len(rows):
    raise ConfigError(
      f'size asks for {count} pool rows, there are {len(rows)} candidates '
      '(usable and kept by de-duplication)'
    )
  return rows


def random_order(
  candidates: Array,  # [N] bool
  seed: int,
  draw: int,
  stream: int,
) -> Array:
  """Returns a random number for each of the m candidates among the N pool rows, [m] uint64.

  A row's number depends on its place in the pool, not on the candidates. These are raw numbers of a
  bit generator: NumPy never changes their stream, unlike its samplers'.
  """
  bits = np.random.PCG64(np.random.SeedSequence((seed, draw, stream)))
  order, end = np.zeros(int(candidates.sum()), np.uint64), 0
  for start in range(0, len(candidates), ROWS_AT_ONCE):
    chosen = candidates[start : start + ROWS_AT_ONCE]
    numbers = bits.random_raw(len(chosen))[chosen]
    order[end : end + len(numbers)] = numbers
    end += len(numbers)
  return order


def mask_of_lowest(
  values: Array,  # [n]
  count: int,
) -> Array:
  """Returns a mask of the `count` lowest values, [n] bool; ties go to the earlier position."""
  if count == 0:
    return np.zeros(len(values), bool)
  cut = np.partition(values, count - 1)[count - 1]
  lowest = values < cut
  lowest[np.flatnonzero(values == cut)[: count - lowest.sum()]] = True
  return lowest


@dataclasses.dataclass(frozen=True)
class Cut:
  """Values about one place of their order, which the exact values near it decide.

  In the order of exact values, the m near values follow those below and come before all others.
  """

  below: Array  # [n] bool
  near: Array  # [m] positions, ascending
  exact: Array  # [m] float64: their exact values

  def value(self, place: int) -> float:
    """Returns the exact value at a place of the order; only at the place of the cut."""
    place -= int(self.below.sum())
    return float(np.partition(self.exact, place)[place])

  def lowest(self, count: int) -> Array:
    """Returns a mask of the `count` lowest values, [n] bool; ties go to the earlier position.

    count: the place of the cut, or one more.
    """
    lowest = self.below.copy()
    lowest[self.near[mask_of_lowest(self.exact, count - int(self.below.sum()))]] = True
    return lowest


def cut_at(
  values: Array,  # [n] float32, off by less than half of the tolerance
  exact: Callable[[Array], Array],  # positions [m] -> [m] float64, their exact values
  place: int,  # in ascending order of the values, in [0, n)
  tolerance: float,
) -> Cut:
  """Returns which values are below a place of the order, and exact values of those near it.

  The value at the place of the exact values is within half a tolerance of that of `values`, so all
  values farther than a tolerance from the latter are surely below or above it.
  """
  middle = float(np.partition(values, place)[place])
  parts = [np.zeros(0, np.int64)]
  for start in range(0, len(values), ROWS_AT_ONCE):
    part = values[start : start + ROWS_AT_ONCE].astype(np.float64)
    parts.append(start + np.flatnonzero(np.abs(part - middle) <= tolerance))
  near = np.concatenate(parts)
  below = values < middle
  below[near] = False
  return Cut(below, near, exact(near))
