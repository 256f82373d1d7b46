"""Dimension letters, which every shape comment uses, and the shared types.

B batch          T text tokens      P image patches    D model width     H attention heads
K head width     E joint embedding  C classes          M templates       V vocabulary
N pool rows      A anchor rows      Q queries          G benchmarks      S seeds
k neighbours kept per query         n, m any count of rows
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# An array in host memory; a comment in the signature gives shape and dtype. Packages that compute
# on devices (models, training, similarity/accelerator.py) import jax.Array under this name.
Array = np.ndarray

# An ml_collections.ConfigDict with the keys of defaults.py; type checkers cannot check them.
Config = Any


class Source(Protocol):
  """Samples with thread-safe random access: a Grain RandomAccessDataSource.

  For the loader, `read_samples` is optional (without it, rows are read one by one), and `starts` is
  needed only for order 'blocks'.
  """

  def __len__(self) -> int:
    """Returns the number of rows."""
    ...

  def __getitem__(self, row: int, /) -> dict[str, Any]:
    """Returns the sample of a row as a dict.

    image: bytes of an image file, or pixels [height, width, 3] uint8; caption: str; label: int, -1
    for none.
    """
    ...

  def read_samples(self, rows: Sequence[int], /) -> list[dict[str, Any]]:
    """Returns [self[row] for row in rows]; an image may also be a function returning pixels."""
    ...

  def caption(self, row: int, /) -> str:
    """Returns the caption of a row without reading its image."""
    ...

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    """The first row of each shard; the last entry is the number of rows."""
    ...


class Vectors(Protocol):
  """Vectors [N, E]: an array, or embeddings on disk (data/embeddings.py), read on access."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def __len__(self) -> int: ...

  def __getitem__(self, rows: Any, /) -> Array:
    """Returns the vectors of a slice or an integer array of rows: [m, E]."""
    ...
