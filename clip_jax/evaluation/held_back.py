"""Aligned against held-back queries: did the model need the neighbours, or images like these?

In: 0/1 correctness [S, Q] of a split P, pruned by the aligned queries A only, and of its control C;
which queries are aligned. Out: frozen results. No files.

The queries are split at random, by group, so A and the held-back queries U differ by chance alone
before the removal. P removed the neighbours of A, and those of U only where they are the same rows.
If P loses on A and not on U, the model needed the neighbours themselves. If it loses on both alike,
it needed images like these. The only assumption is that U's own neighbours mostly stayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip_jax.core.types import Array
from clip_jax.evaluation import causal, statistics
from clip_jax.evaluation.statistics import Estimate

NARROW = 0.9  # level of the intervals that show equivalence
MARGIN = 0.02  # largest negligible difference, a proportion: 2 points
FEWEST_GROUPS = 10  # on each side; below, counts only
# Share of the rows near held-back queries, or of these queries' mean excess. If more went, the
# comparison cannot tell. In the first demo, with real handwriting, 89 % of the rows went.
MOST_GONE = 0.8

DOMAIN, INSTANCE, UNDETERMINED, CANNOT_TELL = 'domain', 'instance', 'undetermined', 'cannot tell'


@dataclass(frozen=True)
class Side:
  """The queries of one side: the aligned (A) or the held-back (U) ones."""

  images: int
  groups: int
  right_pruned: int  # correct answers of P, over all seeds
  right_control: int  # correct answers of C, over all seeds
  # D: mean over images and seeds of correct(P) - correct(C); None below FEWEST_GROUPS
  difference: Estimate | None
  narrow: Estimate | None  # D with its 90 % interval

  @property
  def is_lost(self) -> bool:
    """Whether the 95 % interval of D lies below 0 (three or more seeds)."""
    d = self.difference
    return d is not None and d.method == 'crossed' and d.high < 0


@dataclass(frozen=True)
class Comparison:
  """D(A), D(U) and AU = D(A) - D(U) of one split against one control, on one benchmark."""

  aligned: Side
  held_back: Side
  seeds: int
  contrast: Estimate | None  # AU, class-standardised; None if reason is not ''
  narrow: Estimate | None  # AU with its 90 % interval, for equivalence
  used: float  # share of the aligned queries whose class also has held-back queries
  reason: str  # '' or 'not estimable: ...'
  share_gone: float | None  # as in `compare`
  conclusion: str = UNDETERMINED  # 'domain' | 'instance' | 'undetermined' | 'cannot tell'

  @property
  def is_equivalent(self) -> bool:
    """Whether the 90 % interval of AU lies inside +-MARGIN (three or more seeds)."""
    au = self.narrow
    return au is not None and au.method == 'crossed' and au.low > -MARGIN and au.high < MARGIN


def compare(
  pruned: Array,  # [S, Q] bool: the split P
  control: Array,  # [S, Q] bool: C: base, or random rows of equal size
  aligned: Array,  # [Q] bool: A; the other queries are U
  label: Array,  # [Q] int
  *,
  # Share of the rows near held-back queries, or of these queries' mean excess, whichever is larger;
  # None if no row was near them.
  share_gone: float | None,
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Comparison:
  """Compares the loss of a split on its aligned queries with that on its held-back queries.

  D(G) is the mean over i in G and seeds of correct(P) - correct(C), with the crossed interval. AU
  is the contrast of both, in which U gets the class mix of A; classes without both kinds are left
  out. Below FEWEST_GROUPS groups on a side, only counts are given.
  """
  pruned, control = statistics.matrix(pruned), statistics.matrix(control)
  aligned, label = np.asarray(aligned, bool), np.asarray(label)
  if pruned.shape != control.shape or not aligned.shape == label.shape == pruned.shape[1:]:
    raise ValueError(
      f'pruned {pruned.shape} and control {control.shape} must hold the same seeds and images, and '
      f'aligned {aligned.shape} and label {label.shape} one value per image'
    )
  group = statistics.group_index(groups, len(aligned))
  if shared := np.intersect1d(group[aligned], group[~aligned]).size:
    raise ValueError(f'{shared} groups have both aligned and held-back queries')
  difference, arms = pruned - control, ~aligned
  weights = causal.class_weights(aligned, ~aligned, label)
  reason = _not_estimable(weights, aligned, group)
  au, narrow = (
    None if reason else statistics.contrast(difference, weights, arms, group, width)
    for width in (level, NARROW)
  )
  used = np.count_nonzero(weights[aligned]) / max(int(aligned.sum()), 1)
  result = Comparison(
    _side(pruned, control, aligned, group, level),
    _side(pruned, control, ~aligned, group, level),
    len(pruned),
    au,
    narrow,
    used,
    reason,
    share_gone,
  )
  return replace(result, conclusion=conclusion_of(result))


def conclusion_of(result: Comparison) -> str:
  """Returns the conclusion.

  - 'cannot tell': more than MOST_GONE of what was near the held-back queries went, too.
  - 'domain': both sides lost, and AU is equivalent to 0: the loss is the domain's (or size's).
  - 'instance': A lost and U did not: the model needed the neighbours themselves. The whole interval
    of AU must be below 0, too: that one interval excludes 0 and another does not is no difference.
  - 'undetermined': otherwise, and below three seeds or FEWEST_GROUPS groups.
  """
  if result.share_gone is not None and result.share_gone > MOST_GONE:
    return CANNOT_TELL
  au = result.contrast
  if au is None or not result.aligned.is_lost:
    return UNDETERMINED
  if result.held_back.is_lost:
    return DOMAIN if result.is_equivalent else UNDETERMINED
  return INSTANCE if au.high < 0 else UNDETERMINED


def _side(
  pruned: np.ndarray,  # [S, Q]
  control: np.ndarray,  # [S, Q]
  which: np.ndarray,  # [Q] bool
  group: np.ndarray,  # [Q]
  level: float,
) -> Side:
  units = len(np.unique(group[which]))
  difference = (pruned - control)[:, which]
  estimate, narrow = (
    statistics.crossed_interval(difference, group[which], width) if units >= FEWEST_GROUPS else None
    for width in (level, NARROW)
  )
  return Side(
    int(which.sum()),
    units,
    int(pruned[:, which].sum()),
    int(control[:, which].sum()),
    estimate,
    narrow,
  )


def _not_estimable(weights: np.ndarray, aligned: np.ndarray, group: np.ndarray) -> str:
  """Returns why there is no contrast, or ''."""
  used = [len(np.unique(group[side & (weights > 0)])) for side in (aligned, ~aligned)]
  if min(used) >= FEWEST_GROUPS:
    return ''
  return (
    f'not estimable: {used[0]} aligned and {used[1]} held-back groups in classes that have both; '
    f'each needs {FEWEST_GROUPS}'
  )
