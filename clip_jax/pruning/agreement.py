"""Agreement of two embedders on a split: rows that both remove, rank correlation of candidates.

Cosines of different embedders are not comparable, so splits are compared by each embedder's own
rule and also at an equal number of removed rows. Arrays in, numbers out; no files.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from clip_jax.core.types import Array
from clip_jax.pruning.columns import Columns, best_over_benchmarks
from clip_jax.pruning.rules import RULES, far, near

EXAMPLES = 12  # example rows of each kind of disagreement


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Two embedders' decisions on the same candidates: `here` the split's own, `there` another."""

  removed_here: int
  removed_there: int  # by the same rule
  both: int  # rows that both remove
  same_count_both: int  # rows that both remove if `there` removes removed_here rows
  spearman: float  # rank correlation of all candidates' values; NaN if one column is constant
  rows_only_here: Array  # [up to EXAMPLES] int64, the highest values of `here` first
  rows_only_there: Array  # [up to EXAMPLES] int64, the highest values of `there` first

  @property
  def only_here(self) -> int:
    return self.removed_here - self.both

  @property
  def only_there(self) -> int:
    return self.removed_there - self.both


def compare(
  rows: Array,  # [n] int64, the candidates
  removed: Array,  # [n] bool, candidates that the split removes
  removed_other: Array,  # [n] bool, candidates that the same rule removes with the other embedder
  same_count: Array,  # [n] bool, as many as in `removed`: those the other embedder removes first
  value: Array,  # [n] float, the rule's value: rows of higher values are removed first
  value_other: Array,  # [n] float
) -> Agreement:
  """Compares the decisions of two embedders."""
  return Agreement(
    int(removed.sum()),
    int(removed_other.sum()),
    int((removed & removed_other).sum()),
    int((removed & same_count).sum()),
    spearman(value, value_other),
    rows[_highest(removed & ~removed_other, value)],
    rows[_highest(removed_other & ~removed, value_other)],
  )


def _highest(
  which: Array,  # [n] bool
  value: Array,  # [n]
) -> Array:
  """Returns positions of the highest values in `which`, descending; ties: earlier position."""
  places = np.flatnonzero(which)
  if len(places) > EXAMPLES:  # avoids a sort of all values
    cut = np.partition(value[places], -EXAMPLES)[-EXAMPLES]
    places = places[value[places] >= cut]
  return places[np.argsort(-value[places], kind='stable')[:EXAMPLES]]


def jaccard(both: int, either: int) -> float:
  """Returns both / either; 1 if neither embedder removes a row."""
  return both / either if either else 1.0


def spearman(
  a: Array,  # [n]
  b: Array,  # [n]
) -> float:
  """Returns Spearman's rank correlation of two columns; ties get their mean rank.

  NaN if a column is constant or has fewer than two rows. Two sorts: seconds for millions of rows.
  """
  if len(a) != len(b):
    raise ValueError(f'the columns must have equal lengths, got {len(a)} and {len(b)} values')
  middle = (len(a) - 1) / 2
  a, b = mean_ranks(a) - middle, mean_ranks(b) - middle
  scale = np.sqrt(a @ a) * np.sqrt(b @ b)
  return float(np.clip(a @ b / scale, -1, 1)) if scale else float('nan')


def mean_ranks(
  values: Array,  # [n], no NaN
) -> Array:
  """Returns the ranks from 0, [n] float64; equal values share the mean of their ranks."""
  if np.isnan(values).any():
    raise ValueError('cannot rank NaN')
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts + 1) / 2)[place]


def removal_order(
  columns: Columns,
  rule: str,  # a rule with RULES[rule].compared
  *,
  benchmarks: Sequence[str],
) -> Array:  # [n] float32, of the candidates
  """Returns the values a rule decides by; rows of higher values are removed first."""
  about, rows = RULES[rule], np.flatnonzero(columns.candidates)
  values = best_over_benchmarks(rule, getattr(columns, about.column), rows, benchmarks, np.maximum)
  return -values if about.lowest_first else values


def going_first(
  columns: Columns,
  rule: str,  # a rule with RULES[rule].compared
  *,
  benchmarks: Sequence[str],
  count: int,
) -> Array:
  """Returns the `count` candidates that a rule removes first, [n] bool; exact at the cut."""
  about, rows = RULES[rule], np.flatnonzero(columns.candidates)
  if about.column == 'excess':  # the rule `near` on the excess instead of the similarity
    columns = dataclasses.replace(
      columns, similarity=columns.excess, exact_similarity=columns.exact_excess
    )
  keep = far if about.lowest_first else near
  kept = keep(columns, benchmarks=benchmarks, count=len(rows) - count).rows
  return ~np.isin(rows, kept, assume_unique=True)
