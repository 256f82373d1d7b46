"""Row numbers of the base set: pool rows 0..N-1, then anchor rows, then rows of planted copies."""

import dataclasses

import numpy as np

from clip_jax.core.types import Array


@dataclasses.dataclass(frozen=True)
class BaseRows:
  """The datasets of the base set and where their rows begin."""

  names: tuple[str, ...]  # datasets, in the order of their rows
  lengths: tuple[int, ...]  # rows of each

  @property
  def dataset_starts(self) -> list[int]:  # [datasets + 1]
    return [0, *np.cumsum(self.lengths).tolist()]

  def sizes(
    self,
    rows: Array,  # [n] int64, rows of the base set, sorted
  ) -> dict[str, int]:
    """Returns dataset -> the number of rows that belong to it."""
    return dict(zip(self.names, np.diff(np.searchsorted(rows, self.dataset_starts)).tolist()))

  def rows_by_dataset(
    self,
    rows: Array,  # [n] int64, rows of the base set, sorted
  ) -> dict[str, Array]:
    """Returns dataset -> the rows that belong to it, numbered within the dataset, sorted."""
    cuts = np.searchsorted(rows, self.dataset_starts)
    return {
      name: rows[cuts[i] : cuts[i + 1]] - self.dataset_starts[i]
      for i, name in enumerate(self.names)
    }
