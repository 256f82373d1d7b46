"""Views of sources without copies: a subset of the rows of one, or several concatenated."""

import bisect
from collections.abc import Sequence
import itertools
import operator
import os
from typing import Any

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array, Source

_CHECKED = 1 << 20  # rows checked at once


def read_samples(source: Source, indices: Sequence[int]) -> list[dict[str, Any]]:
  """Returns samples of a source in the given order, by source.read_samples if it exists."""
  if hasattr(source, 'read_samples'):
    return source.read_samples(indices)
  return [source[index] for index in indices]


class Subset:
  """A subset of a source, in the order of `rows`: integers [n], or the .npy file that holds them.

  A repeated row is several samples. A file is memory-mapped, and mapped again when the view is
  unpickled. Raises InputError for a row outside the source: the first and the last are checked at
  once, others when they are read, because there may be 10^8 of them.
  """

  def __init__(self, source: Source, rows: Array | str | os.PathLike):
    self._source, self._most = source, len(source)
    self._given = rows if isinstance(rows, np.ndarray) else os.fspath(rows)
    loaded = rows if isinstance(rows, np.ndarray) else files.read_npy(self._given, mmap=True)
    self._rows = loaded.view(np.ndarray)  # [n]; indexing an np.memmap is slow
    if self._rows.ndim != 1 or self._rows.dtype.kind not in 'iu':
      raise ValueError(f'rows must be integers [n], got {self._rows.dtype} {self._rows.shape}')
    if len(self):
      self._row(0), self._row(len(self) - 1)

  def __reduce__(self):
    return Subset, (self._source, self._given)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[self._row(index)]

  def read_samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    return read_samples(self._source, list(map(self._row, indices)))

  def caption(self, index: int) -> str:
    return self._source.caption(self._row(index))

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    """The start of each source shard's rows, and the end; InputError if rows are not sorted."""
    for i in range(0, len(self), _CHECKED):  # in parts: all rows may not fit in memory
      part = self._rows[max(i - 1, 0) : i + _CHECKED]
      if (part[1:] < part[:-1]).any():
        raise InputError(
          f'{self._name()} are not sorted, so they cannot be read in blocks. '
          'Sort the rows, or set train.order=global.'
        )
    return np.searchsorted(self._rows, self._source.starts.astype(self._rows.dtype))

  def _row(self, index: int) -> int:
    row = int(self._rows[_check_index(index, len(self))])
    if not 0 <= row < self._most:
      raise InputError(
        f'{self._name()} have row {row} at index {index}, but the source has only '
        f'{self._most} rows. Compute them again from this source.'
      )
    return row

  def _name(self) -> str:
    return f'The rows in {self._given}' if isinstance(self._given, str) else 'The rows of a subset'


class Concatenation:
  """The rows of several sources, one source after the other."""

  def __init__(self, sources: Sequence[Source]):
    self._sources = tuple(sources)
    self._starts = [0, *itertools.accumulate(map(len, self._sources))]

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, index: int) -> dict[str, Any]:
    source, row = self._find(index)
    return source[row]

  def read_samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    ordered: list[Any] = [None] * len(indices)
    source_of = (
      np.searchsorted(self._starts, [_check_index(index, len(self)) for index in indices], 'right')
      - 1
    )
    for i in np.unique(source_of).tolist():
      places = np.flatnonzero(source_of == i).tolist()
      samples = read_samples(
        self._sources[i], [int(indices[place]) - self._starts[i] for place in places]
      )
      for place, sample in zip(places, samples, strict=True):
        ordered[place] = sample
    return ordered

  def caption(self, index: int) -> str:
    source, row = self._find(index)
    return source.caption(row)

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    """The start of each shard of each source, and the end of the last."""
    parts = [start + source.starts[:-1] for start, source in zip(self._starts, self._sources)]
    return np.concatenate([*parts, self._starts[-1:]]).astype(np.int64)

  def _find(self, index: int) -> tuple[Source, int]:
    index = _check_index(index, len(self))
    i = bisect.bisect_right(self._starts, index) - 1
    return self._sources[i], index - self._starts[i]


def _check_index(index: int, length: int) -> int:
  index = operator.index(index)
  if not 0 <= index < length:
    raise IndexError(f'index {index} is out of range: there are {length} rows')
  return index
