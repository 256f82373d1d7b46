"""The aligned rules: drop what is nearer to a query than the anchor is, by one row or by k rows."""

from collections.abc import Callable, Sequence
import fractions
import math

import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.pruning.columns import Columns, Kept, Pairs, highest, lowest, refined


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
  split equals that in the anchor set (Mayilvahanan et al. 2024, section 4). Several benchmarks:
  the union of what each drops. Rows that an approximate search did not score are kept and counted
  as `unscored`.

  quantile: the slack is the smallest excess that at least this share of the candidates does not
  exceed. dose: drops this many times what slack 0 drops, rounded, the rows of largest excess first
  and of equal ones the earlier; the slack is then the largest excess that is kept. Give one of
  slack, quantile and dose.

  Report: slack, the one that results (None: nothing is kept), and aligned_dropped, what slack 0
  drops.
  """
  if sum(map(bool, (slack, quantile, dose))) > 1:
    raise ConfigError(f'slack={slack:g}, quantile={quantile:g}, dose={dose:g}: give one of them')
  rows = np.flatnonzero(columns.candidates)
  excess, report = _excess(columns, rows, benchmarks)
  exact = lambda near_cut: columns.exact_excess(benchmarks, rows[near_cut])
  if quantile:
    over, slack, decided = _over_quantile(columns, excess, exact, quantile)
  elif dose:
    over, slack, decided = _over_dose(columns, excess, exact, dose)
  else:
    over, decided = _over(columns, excess, exact, slack)
  aligned = over if slack == 0 and not dose else _over(columns, excess, exact, 0.0)[0]
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
  return rows[_over(columns, excess, exact, slack)[0]]


def k_aligned(columns: Columns, *, benchmarks: Sequence[str], k: int) -> Kept:
  """Drops rows until no query has nearer pool rows than anchor rows, for its k nearest of each.

  t_i^(j): the similarity of query i to its j-th nearest anchor row. Each query, on its own, drops
  its most similar candidates, of equal ones the earlier first, until for every j <= k its j-th
  nearest kept candidate is at t_i^(j) or below; it does not count what other queries drop. What is
  dropped is the union of these lists over the queries of all benchmarks. The union may be more
  than is necessary, and never too little: with fewer rows, the j-th nearest is no nearer. The
  anchor's rows do not count on the pool's side. k = 1 is gap_aligned.

  Report: pairs (of queries and candidates over t_i^(k)), denser_queries (those that drop more than
  what is over t_i^(1)), aligned_dropped (what k = 1 drops), slack (0).
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
      mine = columns.candidates[pairs.row]
      pairs = Pairs(pairs.anchor, pairs.query[mine], pairs.row[mine], pairs.similarity[mine])
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
  """Returns which pairs are over t_i^(1), and which their queries drop, [m] bool each.

  After a query has dropped its d most similar rows, its j-th nearest is the (d + j)-th of all. That
  is at t^(j) or below when no more than d + j - 1 rows are over t^(j): d is the largest excess of
  these counts over j - 1.
  """
  first, listed = np.zeros((2, len(pairs.row)), bool)
  order = np.argsort(pairs.query, kind='stable')  # rows of a query stay in the order of the pool
  queries, starts = np.unique(pairs.query[order], return_index=True)
  places = np.arange(pairs.anchor.shape[1])
  for query, mine in zip(queries, np.split(order, starts[1:])):
    similarity = pairs.similarity[mine]
    over = similarity[:, None] > pairs.anchor[query]  # [pairs of the query, k]
    first[mine] = over[:, 0]
    listed[mine] = lowest(-similarity, max((over.sum(axis=0) - places).max(), 0))
  return first, listed


def _excess(columns: Columns, rows: Array, benchmarks: Sequence[str]) -> tuple[Array, dict]:
  """Returns each row's highest excess, [m] float32, and what an approximate search lacks."""
  exhaustive = columns.recall is None
  excess = highest(
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


def _over(
  columns: Columns,
  excess: Array,  # [m] float32
  exact: Callable[[Array], Array],  # positions -> [p] float64
  slack: float,
) -> tuple[Array, int]:
  """Returns whether each excess is strictly over slack, [m] bool, and how many are exact."""
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
  """Returns what is over this quantile of the excess, [m] bool, the slack, how many are exact."""
  _every_row(columns, 'quantile')
  if not 0 < quantile <= 1:
    raise ConfigError(f'quantile={quantile:g} must be a share in (0, 1]')
  if not len(excess):
    return np.zeros(0, bool), 0.0, 0
  place = math.ceil(fractions.Fraction(str(quantile)) * len(excess)) - 1
  found, decided = refined(excess, exact, [place], columns.tolerance)
  slack = float(np.partition(found, place)[place])
  return found > slack, slack, decided


def _over_dose(
  columns: Columns, excess: Array, exact: Callable[[Array], Array], dose: float
) -> tuple[Array, float, int]:
  """Returns the rows of largest excess, [m] bool, the slack, how many are exact."""
  _every_row(columns, 'dose')
  if not dose > 0:
    raise ConfigError(f'dose={dose:g} must be more than 0')
  aligned, decided = _over(columns, excess, exact, 0.0)
  count = math.floor(dose * int(aligned.sum()) + 0.5)
  if count > len(excess):
    raise ConfigError(
      f'dose={dose:g} asks to drop {count} rows, {dose:g} times the '
      f'{aligned.sum()} that slack 0 drops; there are {len(excess)} candidates. '
      'Give a smaller dose'
    )
  if count == len(excess):
    return np.ones(count, bool), -math.inf, decided
  found, decided = refined(  # at the first that stays
    -excess, lambda near_cut: -exact(near_cut), [count], columns.tolerance
  )
  return lowest(found, count), -float(np.partition(found, count)[count]), decided


def _every_row(columns: Columns, key: str) -> None:
  if columns.recall is not None:
    raise InputError(
      f"rule 'gap_aligned' with {key} needs every row's excess: search with search.backend='exact'"
    )
