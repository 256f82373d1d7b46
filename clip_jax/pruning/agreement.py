"""How far two embedders agree on a split: which rows both remove, how they rank the candidates.

Cosines of different embedders are not comparable, so beside each one's own rule the same number of
removed rows is compared. Arrays in, numbers out; no files.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from clip_jax.core.types import Array
from clip_jax.pruning.columns import Columns, highest
from clip_jax.pruning.rules import RULES, far, near

EXAMPLES = 12  # rows named of each kind of disagreement


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Two embedders' decisions on the same candidates; `here` is the one whose split it is."""

  removed_here: int
  removed_there: int  # by the same rule
  both: int  # rows that both remove
  same_count_both: int  # rows removed here that are among as many that go first there
  spearman: float  # rank correlation of all candidates' values; NaN where one is constant
  rows_only_here: Array  # [up to EXAMPLES] int64, the highest values here first
  rows_only_there: Array  # [up to EXAMPLES] int64, the highest values there first

  @property
  def only_here(self) -> int:
    return self.removed_here - self.both

  @property
  def only_there(self) -> int:
    return self.removed_there - self.both


def compare(
  rows: Array,  # [n] int64, the candidates
  here: Array,  # [n] bool, which of them the split removes
  there: Array,  # [n] bool, which the same rule removes with the other embedder
  same_count: Array,  # [n] bool, as many as in `here`: those that go first there
  value_here: Array,  # [n] float, by which the rule decides: the higher, the sooner a row goes
  value_there: Array,  # [n] float
) -> Agreement:
  """Compares the decisions of two embedders."""
  return Agreement(
    int(here.sum()),
    int(there.sum()),
    int((here & there).sum()),
    int((here & same_count).sum()),
    spearman(value_here, value_there),
    rows[_highest(here & ~there, value_here)],
    rows[_highest(there & ~here, value_there)],
  )


def _highest(
  which: Array,  # [n] bool
  value: Array,  # [n]
) -> Array:
  """Returns the places of the highest values among some, descending; ties: the earlier place."""
  places = np.flatnonzero(which)
  if len(places) > EXAMPLES:  # only what can be among them is sorted
    cut = np.partition(value[places], -EXAMPLES)[-EXAMPLES]
    places = places[value[places] >= cut]
  return places[np.argsort(-value[places], kind='stable')[:EXAMPLES]]


def jaccard(both: int, either: int) -> float:
  """Returns both / either; 1 where neither removes a row."""
  return both / either if either else 1.0


def spearman(
  a: Array,  # [n]
  b: Array,  # [n]
) -> float:
  """Returns the rank correlation of two columns, ties by their mean rank.

  NaN where a column is constant or has fewer than two rows. Two sorts: seconds for millions.
  """
  if len(a) != len(b):
    raise ValueError(f'two columns of the same rows are needed, got {len(a)} and {len(b)} values')
  middle = (len(a) - 1) / 2
  a, b = mean_ranks(a) - middle, mean_ranks(b) - middle
  scale = np.sqrt(a @ a) * np.sqrt(b @ b)
  return float(np.clip(a @ b / scale, -1, 1)) if scale else float('nan')


def mean_ranks(
  values: Array,  # [n], no NaN
) -> Array:
  """Returns the ranks from 0, [n] float64; equal values share the mean of their ranks."""
  if np.isnan(values).any():
    raise ValueError('a value that is NaN has no rank')
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts + 1) / 2)[place]


def removal_order(
  columns: Columns,
  rule: str,  # one that is a cut through its column: RULES[rule].compared
  *,
  benchmarks: Sequence[str],
) -> Array:  # [n] float32, of the candidates
  """Returns what a rule decides by: the higher, the sooner a row is removed."""
  about, rows = RULES[rule], np.flatnonzero(columns.candidates)
  values = highest(rule, getattr(columns, about.column), rows, benchmarks, np.maximum)
  return -values if about.lowest_first else values


def going_first(
  columns: Columns,
  rule: str,  # as above
  *,
  benchmarks: Sequence[str],
  count: int,
) -> Array:
  """Returns the `count` candidates that a rule removes first, [n] bool; decided exactly at the
  cut.
  """
  about, rows = RULES[rule], np.flatnonzero(columns.candidates)
  if about.column == 'excess':  # near, with the excess in place of the similarity
    columns = dataclasses.replace(
      columns, similarity=columns.excess, exact_similarity=columns.exact_excess
    )
  keep = far if about.lowest_first else near
  kept = keep(columns, benchmarks=benchmarks, count=len(rows) - count).rows
  return ~np.isin(rows, kept, assume_unique=True)
