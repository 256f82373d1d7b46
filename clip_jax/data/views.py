"""Views of sources: rows chosen from one, several after one another. No sample is copied."""

import bisect
from collections.abc import Sequence
import itertools
import operator
import os
from typing import Any

import numpy as np

from clip_jax.core.types import Array


class Subset:
  """Some rows of a source, in the order of `rows`: integers [n], or the .npy file that holds them.

  A file is memory-mapped, and mapped anew where the view is unpickled.
  """

  def __init__(self, source, rows: Array | str | os.PathLike):
    self._source = source
    self._given = rows if isinstance(rows, np.ndarray) else os.fspath(rows)
    loaded = np.load(rows, mmap_mode='r') if isinstance(self._given, str) else rows
    self._rows = loaded.view(np.ndarray)  # [n]; np.memmap's own indexing is slow
    if self._rows.ndim != 1 or self._rows.dtype.kind not in 'iu':
      raise ValueError(f'rows must be integers [n], got {self._rows.dtype} {self._rows.shape}')

  def __reduce__(self):
    return Subset, (self._source, self._given)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[self._row(index)]

  def caption(self, index: int) -> str:
    return self._source.caption(self._row(index))

  def _row(self, index: int) -> int:
    return int(self._rows[_checked(index, len(self))])


class Concatenation:
  """The rows of several sources, one source after the other."""

  def __init__(self, sources: Sequence[Any]):
    self._sources = tuple(sources)
    self._starts = [0, *itertools.accumulate(map(len, self._sources))]

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, index: int) -> dict[str, Any]:
    source, row = self._find(index)
    return source[row]

  def caption(self, index: int) -> str:
    source, row = self._find(index)
    return source.caption(row)

  def _find(self, index: int) -> tuple[Any, int]:
    index = _checked(index, len(self))
    i = bisect.bisect_right(self._starts, index) - 1
    return self._sources[i], index - self._starts[i]


def _checked(index: int, length: int) -> int:
  index = operator.index(index)
  if not 0 <= index < length:
    raise IndexError(f'index {index} of {length} rows')
  return index
