"""Dimension letters, declared once and used in every shape comment, and the few shared types.

B batch          T text tokens      P image patches    D model width     H attention heads
K head width     E joint embedding  C classes          M templates       V vocabulary
N pool rows      A anchor rows      Q queries          G benchmarks      S seeds
k neighbours kept per query         n, m any count of rows
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# An array in host memory; the shape and dtype stand in a comment at the signature. The rooms that
# compute on devices (models, training, similarity/accelerator.py) import jax.Array under this name.
Array = np.ndarray

# An ml_collections.ConfigDict. defaults.py declares its keys, which no checker can follow.
Config = Any


class Source(Protocol):
  """A source of samples that are read at random, by any number of threads: a Grain
  RandomAccessDataSource.

  The loader does without `many` (it then reads one by one), and without `starts` but for order
  'blocks'.
  """

  def __len__(self) -> int:
    """Returns the number of rows."""
    ...

  def __getitem__(self, row: int, /) -> dict[str, Any]:
    """Returns dict(image: bytes of its file, or pixels [H, W, 3] uint8; caption: str; label: int,
    -1 for none).
    """
    ...

  def many(self, rows: Sequence[int], /) -> list[dict[str, Any]]:
    """Returns [self[row] for row in rows]; an image may be a function that returns its pixels."""
    ...

  def caption(self, row: int, /) -> str:
    """Returns the caption of a row without reading its image."""
    ...

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    """The row at which each shard begins, and where the last ends."""
    ...


class Vectors(Protocol):
  """Rows [N, E] of an array, or of embeddings on disk (data/embeddings.py), which are read when
  asked for.
  """

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def __len__(self) -> int: ...

  def __getitem__(self, rows: Any, /) -> Array:
    """Returns the vectors of a slice or an integer array of rows: [m, E]."""
    ...
