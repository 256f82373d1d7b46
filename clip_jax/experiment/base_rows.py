"""Rows of the base set: the pool's are 0..N-1, the anchor's follow, and then those of planted
copies.
"""

import dataclasses

import numpy as np

from clip_jax.core.types import Array


@dataclasses.dataclass(frozen=True)
class BaseRows:
  """Where each dataset's rows begin in the base set."""

  names: tuple[str, ...]
  lengths: tuple[int, ...]

  @property
  def starts(self) -> list[int]:  # [datasets + 1]
    return [0, *np.cumsum(self.lengths).tolist()]

  def own(
    self,
    rows: Array,  # [n] int64, sorted
  ) -> dict[str, Array]:
    """Returns dataset -> its own rows among rows of the base set, sorted."""
    cuts = np.searchsorted(rows, self.starts)
    return {name: rows[cuts[i] : cuts[i + 1]] - self.starts[i] for i, name in enumerate(self.names)}
