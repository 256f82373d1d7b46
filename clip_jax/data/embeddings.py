"""The embeddings of one dataset on disk, in shards.

In: WORKDIR/embeddings/<dataset>/00000.npy [n, E] float16 and usable-00000.npy [n] bool, ... Shards
are memory-mapped. Rows are numbered over all shards, in index order.
"""

import functools
import os

import numpy as np

from clip_jax.core import files
from clip_jax.core.types import Array

_MAPPED = 1024  # shards


class Embeddings:
  """A read-only view of all shards of a dataset's embeddings.

  The latest shards stay mapped. One of a work directory on object storage is downloaded when it is
  used, and may go when it is no longer mapped.
  """

  def __init__(self, directory: str, shards: int):
    self._directory = directory
    self._usable = [
      files.read_npy(os.path.join(directory, f'usable-{i:05d}.npy')) for i in range(shards)
    ]
    self.starts = np.cumsum([0] + [len(shard) for shard in self._usable])  # [shards + 1]
    self._vectors = functools.lru_cache(maxsize=_MAPPED)(self._open)

  def _open(self, i: int) -> Array:
    return files.read_npy(os.path.join(self._directory, f'{i:05d}.npy'), mmap=True)

  def __len__(self) -> int:
    return int(self.starts[-1])

  @property
  def dim(self) -> int:
    return self._vectors(0).shape[1]

  @property
  def shape(self) -> tuple[int, int]:
    return len(self), self.dim

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float16)

  def shard(self, i: int) -> tuple[Array, Array]:
    """Returns the vectors [n, E] float16 (memory-mapped) and the usable mask [n] of shard i."""
    return self._vectors(i), self._usable[i]

  @property
  def usable(self) -> Array:  # [N] bool
    return np.concatenate(self._usable) if self._usable else np.zeros(0, bool)

  def rows(self, rows: Array) -> Array:  # [m] int64 -> [m, E] float16
    """Returns the vectors of the given rows, in that order."""
    rows = np.asarray(rows, np.int64)
    out = np.zeros((len(rows), self.dim), np.float16)
    shard = np.searchsorted(self.starts, rows, side='right') - 1
    for i in np.unique(shard):
      in_shard = shard == i
      out[in_shard] = self._vectors(i)[rows[in_shard] - self.starts[i]]
    return out

  def __getitem__(self, index) -> Array:
    """Returns rows by slice, integer array or integer, like a memory map."""
    if isinstance(index, slice):
      return self.rows(np.arange(*index.indices(len(self))))
    return self.rows(index) if np.ndim(index) else self.rows(np.array([index]))[0]
