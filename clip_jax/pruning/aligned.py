"""The aligned rules: drop rows nearer to a query than its nearest, or k nearest, anchor rows."""

from collections.abc import Callable, Sequence
import fractions
import math

import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.pruning.columns import (
  Columns,
  Kept,
  Pairs,
  best_over_benchmarks,
  cut_at,
  mask_of_lowest,
)


def gap_aligned(
  columns: Columns,
  *,
  benchmarks: Sequence[str],
  slack: float = 0.0,
  quantile: float = 0.0,
  dose: float = 0.0,
) -> Kept:
  """Drops each row that is nearer to some query than the anchor set is, by more than a slack.

  With slack 0 and the anchor's rows appended, every query's nearest-neighbour similarity in the
  split equals that in the anchor set (Mayilvahanan et al. 2024, section 4). With several
  benchmarks, the union of their dropped rows is dropped. Rows that an approximate search did not
  score are kept and counted as `unscored`.

  quantile: the slack is the smallest excess that at least this share of the candidates does not
  exceed. dose: drops this multiple of the number of rows that slack 0 drops, rounded, in order of
  decreasing excess (ties: earlier rows first); the slack is then the largest excess that is kept.
  At most one of slack, quantile and dose may be set.

  Report: slack, the resulting slack (None: no row is kept), and aligned_dropped, the number of
  rows that slack 0 drops.
  """
  if sum(map(bool, (slack, quantile, dose))) > 1:
    raise ConfigError(f'slack={slack:g}, quantile={quantile:g}, dose={dose:g}: set only one')
  rows = np.flatnonzero(columns.candidates)
  excess, report = _excess(columns, rows, benchmarks)
  exact = lambda near_cut: columns.exact_excess(benchmarks, rows[near_cut])
  if quantile:
    over, slack, decided = _over_quantile(columns, excess, exact, quantile)
  elif dose:
    over, slack, decided = _over_dose(columns, excess, exact, dose)
  else:
    over, decided = _is_over_slack(columns, excess, exact, slack)
  aligned = over if slack == 0 and not dose else _is_over_slack(columns, excess, exact, 0.0)[0]
  report = {
    'decided_exactly': decided,
    'slack': float(slack) if np.isfinite(slack) else None,
    'aligned_dropped': int(aligned.sum()),
    **report,
  }
  return Kept(rows[~over], report)


def dropped_rows(columns: Columns, *, benchmarks: Sequence[str], slack: float = 0.0) -> Array:
  """Returns the sorted int64 candidate rows that gap_aligned drops."""
  rows = np.flatnonzero(columns.candidates)
  excess, _ = _excess(columns, rows, benchmarks)
  exact = lambda near_cut: columns.exact_excess(benchmarks, rows[near_cut])
  return rows[_is_over_slack(columns, excess, exact, slack)[0]]


def k_aligned(columns: Columns, *, benchmarks: Sequence[str], k: int) -> Kept:
  """Drops rows until, for j = 1..k, each query's j-th pool row is not nearer than its anchor row.

  t_i^(j): the similarity of query i to its j-th nearest anchor row. Each query lists its most
  similar candidates (ties: earlier rows first) until, for every j <= k, its j-th nearest other
  candidate has similarity t_i^(j) or less; it ignores the lists of other queries. The union of
  these lists over the queries of all benchmarks is dropped. The union may be larger than
  necessary, but never too small: with fewer rows, the j-th nearest is not nearer. Anchor rows do
  not count as pool rows. k = 1 is gap_aligned.

  Report: pairs (number of pairs of a query and a candidate over t_i^(k)), denser_queries (queries
  that drop more rows than those over t_i^(1)), aligned_dropped (rows that k = 1 drops), slack (0).
  """
  if not benchmarks:
    raise ConfigError("rule 'k_aligned' needs benchmarks=('name', ...)")
  if columns.recall is not None:
    raise InputError(
      "rule 'k_aligned' needs every pair over a threshold: search with search.backend='exact'"
    )
  dropped, nearer = np.zeros((2, len(columns.candidates)), bool)
  count = denser = 0
  for name in benchmarks:
    for pairs in columns.pairs(name, k):
      is_candidate = columns.candidates[pairs.row]
      pairs = Pairs(
        pairs.anchor,
        pairs.query[is_candidate],
        pairs.row[is_candidate],
        pairs.similarity[is_candidate],
      )
      first, listed = _k_lists(pairs)
      nearer[pairs.row[first]] = True
      dropped[pairs.row[listed]] = True
      count += len(pairs.row)
      denser += len(np.unique(pairs.query[listed & ~first]))
  kept = np.flatnonzero(columns.candidates & ~dropped)
  return Kept(
    kept,
    {'pairs': count, 'denser_queries': denser, 'slack': 0.0, 'aligned_dropped': int(nearer.sum())},
  )


def _k_lists(pairs: Pairs) -> tuple[Array, Array]:
  """Returns the pairs over t_i^(1), and the pairs that their queries drop, [m] bool each.

  After a query has dropped its d most similar rows, its j-th nearest row is the (d + j)-th of all
  rows. Its similarity is at most t^(j) if at most d + j - 1 rows are over t^(j). So d is the
  maximum over j of (number of rows over t^(j)) - (j - 1).
  """
  first, listed = np.zeros((2, len(pairs.row)), bool)
  order = np.argsort(pairs.query, kind='stable')  # keeps the rows of a query in pool order
  queries, starts = np.unique(pairs.query[order], return_index=True)
  places = np.arange(pairs.anchor.shape[1])
  for query, positions in zip(queries, np.split(order, starts[1:])):
    similarity = pairs.similarity[positions]
    over = similarity[:, None] > pairs.anchor[query]  # [pairs of the query, k]
    first[positions] = over[:, 0]
    listed[positions] = mask_of_lowest(-similarity, max((over.sum(axis=0) - places).max(), 0))
  return first, listed


def _excess(columns: Columns, rows: Array, benchmarks: Sequence[str]) -> tuple[Array, dict]:
  """Returns each row's highest excess, [m] float32, and an approximate search's report."""
  exhaustive = columns.recall is None
  excess = best_over_benchmarks(
    'gap_aligned', columns.excess, rows, benchmarks, np.maximum if exhaustive else np.fmax
  )
  unscored = int(np.isnan(excess).sum())
  if unscored and exhaustive:
    reason = (
      'an anchor'
      if unscored == len(rows)
      else "search.backend='exact', or an approximate search with its measured recall"
    )
    raise InputError(
      f"rule 'gap_aligned' needs {reason}: the excess of {unscored} of {len(rows)} "
      f'candidates over {tuple(benchmarks)} is NaN'
    )
  return excess, {} if exhaustive else {'recall': columns.recall, 'unscored': unscored}


def _is_over_slack(
  columns: Columns,
  excess: Array,  # [m] float32
  exact: Callable[[Array], Array],  # positions -> [p] float64
  slack: float,
) -> tuple[Array, int]:
  """Returns whether each excess is over slack, [m] bool, and the number decided exactly."""
  over = excess > slack
  near_cut = np.flatnonzero(
    (excess >= slack - columns.tolerance) & (excess <= slack + columns.tolerance)
  )
  if len(near_cut):
    over[near_cut] = exact(near_cut) > slack
  return over, len(near_cut)


def _over_quantile(
  columns: Columns, excess: Array, exact: Callable[[Array], Array], quantile: float
) -> tuple[Array, float, int]:
  """Returns rows over a quantile of the excess, [m] bool, the slack, the number decided exactly."""
  _every_row(columns, 'quantile')
  if not 0 < quantile <= 1:
    raise ConfigError(f'quantile={quantile:g} must be a share in (0, 1]')
  if not len(excess):
    return np.zeros(0, bool), 0.0, 0
  place = math.ceil(fractions.Fraction(str(quantile)) * len(excess)) - 1
  cut = cut_at(excess, exact, place, columns.tolerance)
  slack, over = cut.value(place), ~cut.below
  over[cut.near] = cut.exact > slack
  return over, slack, len(cut.near)


def _over_dose(
  columns: Columns, excess: Array, exact: Callable[[Array], Array], dose: float
) -> tuple[Array, float, int]:
  """Returns the rows of largest excess, [m] bool, the slack, the number decided exactly."""
  _every_row(columns, 'dose')
  if not dose > 0:
    raise ConfigError(f'dose={dose:g} must be more than 0')
  aligned, decided = _is_over_slack(columns, excess, exact, 0.0)
  count = math.floor(dose * int(aligned.sum()) + 0.5)
  if count > len(excess):
    raise ConfigError(
      f'dose={dose:g} asks to drop {count} rows, {dose:g} times the {aligned.sum()} that slack 0 '
      f'drops, but there are {len(excess)} candidates. Set a smaller dose'
    )
  if count == len(excess):
    return np.ones(count, bool), -math.inf, decided
  cut = cut_at(  # exact at the first row that is kept
    -excess, lambda near_cut: -exact(near_cut), count, columns.tolerance
  )
  return cut.lowest(count), -cut.value(count), len(cut.near)


def _every_row(columns: Columns, key: str) -> None:
  if columns.recall is not None:
    raise InputError(
      f"rule 'gap_aligned' with {key} needs every row's excess: search with search.backend='exact'"
    )
