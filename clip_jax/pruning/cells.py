"""Draws rows that resemble given rows: cells of alike rows, draws within cells, balance of a draw.

Arrays in, arrays out; no files. The matched control uses these functions. A cell is one int64
number in a mixed radix. Cells are merged from the least significant digit on, by integer division.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clip_jax.core.types import Array

ROWS_AT_ONCE = 1 << 20  # rows that are searched for donors at a time


def levels(
  column: Any,  # [n] strings or integers, of NumPy or pyarrow; None if unknown
) -> tuple[Array, list[str]]:
  """Returns each row's level, [n] int32, and the levels' names; unknown values are level ''.

  A pyarrow DictionaryArray of distinct names keeps its codes, which costs no pass over strings.
  """
  if isinstance(column, pa.DictionaryArray):
    names = [*column.dictionary.to_pylist(), *([''] if column.null_count else [])]
    if len(set(names)) == len(names):
      return column.indices.fill_null(len(names) - 1).to_numpy(), names
  chunks = pa.table({'level': column})['level']  # a ChunkedArray for every kind of input
  encoded = chunks.cast(pa.large_string()).fill_null('').dictionary_encode().combine_chunks()
  return encoded.indices.to_numpy(), encoded.dictionary.to_pylist()


def quantile_bins(
  values: Array,  # [n]
  bins: int,
) -> Array:
  """Returns the bin of each row, [n] uint8 in [0, bins): the number of edges strictly below it.

  Edge j is the smallest value that at least j / bins of the rows do not exceed. Edges are observed
  values and equal values share a bin, so rounding has no influence.
  """
  n = len(values)
  if n == 0:
    return np.zeros(0, np.uint8)
  places = -(-n * np.arange(1, bins) // bins) - 1
  result = np.zeros(n, np.uint8)
  for edge in np.partition(values, places)[places]:
    result += values > edge
  return result


def add_digit(
  codes: Array,  # [n] int32 or int64
  digit: Array,  # [n] integers in [0, radix)
  radix: int,
) -> None:
  """Appends a least significant digit to the codes, in place; code // radix drops it again."""
  codes *= radix
  codes += digit


def draw_like(
  code: Array,  # [n] cells, integers
  removed: Array,  # [n] bool
  order: Array,  # [n] random numbers: rows with lower numbers are drawn first
  radices: Sequence[int],  # of the digits that may be merged over, in order of merging
) -> tuple[Array, list[int]]:
  """Draws, for each removed row, another row of the same cell at random.

  Where a cell has too few other rows, one variable after another is ignored, in the order of
  `radices`, and the missing rows are drawn from the larger cells that result.

  Returns drawn [n] bool, never a removed row, and the number drawn at each stage
  ([1 + len(radices)]: in full cells, after the first merge, ...). Ties in `order` go by position.
  """
  drawn = np.zeros(len(code), bool)
  cells, missing = np.unique(code[removed], return_counts=True)
  served, width = [], 1
  for radix in (1, *radices):
    width *= radix
    cells, starts = np.unique(cells // radix, return_index=True)
    missing = np.add.reduceat(missing, starts) if len(starts) else missing
    place, cell = _lowest_in_cells(code, width, ~(removed | drawn), order, cells, missing)
    drawn[place] = True
    served.append(len(place))
    missing = missing - np.bincount(cell, minlength=len(cells))
    cells, missing = cells[missing > 0], missing[missing > 0]
  return drawn, served


def _lowest_in_cells(
  code: Array,  # [n] integers
  width: int,  # a row's cell is code // width
  free: Array,  # [n] bool: the rows that may be taken
  order: Array,  # [n]
  cells: Array,  # [m] integers, sorted
  counts: Array,  # [m] int64
) -> tuple[Array, Array]:
  """Returns up to counts[j] free positions of lowest order in each cells[j], and their j.

  Memory: a few numbers for each of the rows asked for, not n.
  """
  kind = np.int32 if len(code) < 2**31 else np.int64
  place, cell = np.zeros(0, kind), np.zeros(0, np.int32)
  if len(cells) == 0:
    return place, cell
  most = int(1.25 * counts.sum()) + ROWS_AT_ONCE
  # In a cell that has enough rows a further row must be below the highest of them.
  is_full, highest = np.zeros(len(cells), bool), np.zeros(len(cells), order.dtype)
  for start in range(0, len(code), ROWS_AT_ONCE):
    rows = start + np.flatnonzero(free[start : start + ROWS_AT_ONCE])
    own = code[rows] // width
    near = np.minimum(np.searchsorted(cells, own), len(cells) - 1).astype(np.int32)
    wanted = (cells[near] == own) & ((order[rows] < highest[near]) | ~is_full[near])
    place, cell = np.append(place, rows[wanted].astype(kind)), np.append(cell, near[wanted])
    if len(place) > most:
      place, cell = _lowest(place, cell, order, counts)
      sizes = np.bincount(cell, minlength=len(cells))
      is_full, highest = sizes == counts, order[place[np.cumsum(sizes) - 1]]
  return _lowest(place, cell, order, counts)


def _lowest(place: Array, cell: Array, order: Array, counts: Array) -> tuple[Array, Array]:
  """Returns the counts[j] positions of lowest order in each cell j, by cell and order, and their j.

  Ties go by their sequence.
  """
  by_cell = np.lexsort((order[place], cell))
  place, cell = place[by_cell], cell[by_cell]
  del by_cell
  rank = np.arange(len(place), dtype=place.dtype)
  rank -= np.searchsorted(cell, np.arange(len(counts))).astype(place.dtype)[cell]
  taken = rank < counts[cell]
  return place[taken], cell[taken]


def differences(
  left: Array,  # [a] int64 rows, or a mask of a rows, [n] bool
  right: Array,  # [b] int64 rows, or a mask of b rows
  numbers: Mapping[str, Array],  # name -> [n]
  categories: Mapping[str, Array],  # name -> [n] integers >= 0
) -> dict[str, float | None]:
  """Returns the standardised mean difference of each variable between two sets of rows.

  Number: (mean of left - mean of right) / sqrt(mean of the two variances, each divided by n).
  Category: the largest absolute difference over its levels, each level as a 0/1 number.
  0 if the sets agree exactly; None if a set is empty, or if both are constant and differ.
  """
  sizes = [int(rows.sum()) if rows.dtype == bool else len(rows) for rows in (left, right)]
  if 0 in sizes:
    return dict.fromkeys([*numbers, *categories])
  result = {}
  for name, values in numbers.items():
    (mean, variance), (other, other_variance) = (
      _moments(values[rows].astype(np.float64)) for rows in (left, right)
    )
    result[name] = _standardised(mean - other, (variance + other_variance) / 2)
  for name, codes in categories.items():
    size = int(codes.max()) + 1
    a, b = (
      np.bincount(codes[rows], minlength=size) / count for rows, count in zip((left, right), sizes)
    )
    shares = zip(a - b, (a * (1 - a) + b * (1 - b)) / 2, strict=True)
    by_level = [_standardised(abs(gap), variance) for gap, variance in shares]
    known = [value for value in by_level if value is not None]
    result[name] = max(known) if len(known) == len(by_level) else None
  return result


def _moments(values: Array) -> tuple[Any, Any]:  # [n] float64, overwritten
  """Returns the mean and the variance, to the last bit as NumPy does, which takes a copy."""
  mean = values.mean()
  values -= mean
  values *= values
  return mean, values.mean()


def _standardised(gap: float, variance: float) -> float | None:
  if gap == 0:
    return 0.0
  return float(gap / np.sqrt(variance)) if variance > 0 else None
