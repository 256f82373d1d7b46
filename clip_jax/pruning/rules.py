"""The pruning rules: columns over the pool in, the pool rows to keep out. No files.

Every rule is a pure function of the columns, its parameters and its seed. Ties go by pool order,
the earlier row first. The columns hold float32 similarities, which differ in the last bits between
machines: rows within a tolerance of a cut are decided by exact float64 similarities instead. To add
a rule, write its function and name it in RULES.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.pruning import cells

TOLERANCE = 1e-5  # a float32 similarity is taken to be off by less than half of this, where nothing is said
MAX_UNMATCHED = 0.2  # share of removed rows without a full-cell donor from which no control exists

# Quantile bins of the matched control's numeric variables; the last variable is given up first.
BINS = {'anchor_class_similarity': 5, 'caption_length': 5, 'image_pixels': 3}

# Streams of random numbers, so that one seed gives unrelated draws to unrelated rules. They are
# not 0: SeedSequence pads with zeros, and (seed, draw, 0) would be the stream of (seed, draw).
RANDOM_STREAM, MATCHED_STREAM = 1, 2


def _not_given(benchmarks: Sequence[str], rows: Array) -> Array:
  raise ValueError(f'{len(rows)} rows lie near a cut over {tuple(benchmarks)}: '
                   'give Columns exact_similarity and exact_excess to decide them')


@dataclasses.dataclass(frozen=True)
class Columns:
  """What rules know of the N pool rows: the candidates, and columns from search and ingest."""
  candidates: Array  # [N] bool: usable and kept by de-duplication
  # benchmark -> [N] float32, the highest over its queries of sim(query, row) and of sim - t_query
  similarity: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  excess: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  # (benchmarks, rows [m] int64) -> [m] float64, the same over all queries of all these benchmarks
  exact_similarity: Callable[[Sequence[str], Array], Array] = _not_given
  exact_excess: Callable[[Sequence[str], Array], Array] = _not_given
  tolerance: float = TOLERANCE  # rows so near a cut are decided exactly; covers the error of float32
  recall: float | None = None  # measured, of an approximate search (misses are NaN); None: exact
  # For the matched control only.
  anchor_class: Array | None = None  # [N] int32, the class whose mean anchor image is nearest
  anchor_class_similarity: Array | None = None  # [N] float32, to that mean
  caption_length: Array | None = None  # [N] int32
  image_pixels: Array | None = None  # [N] int64, width times height
  domain: Array | None = None  # [N] strings or integers: domain or label, where there is one


@dataclasses.dataclass(frozen=True)
class Kept:
  """What a rule keeps: sorted int64 pool rows, and figures about the decision.

  Each row once, but for the rule 'listed': a row that a file lists twice is there twice, and is
  trained on twice an epoch.
  """
  rows: Array  # [n] int64
  report: dict = dataclasses.field(default_factory=dict)


def count_of(size: float, candidates: int) -> int:
  """Returns the rows that a split's size asks for: <= 1 a share of the candidates, > 1 a count."""
  if size > 1 and float(size).is_integer():
    return int(size)
  if 0 < size <= 1:
    return math.floor(size * candidates + 0.5)
  raise ConfigError(f'size={size}: must be a share in (0, 1] or a whole number above 1')


def keep_all(columns: Columns) -> Kept:
  """Keeps every candidate."""
  return Kept(np.flatnonzero(columns.candidates))


def keep_none(columns: Columns) -> Kept:
  """Keeps no pool row: the split is the anchor set alone."""
  return Kept(np.zeros(0, np.int64))


def listed(
    columns: Columns,
    *,
    rows: Array,  # [m] int64, sorted: the pool rows that a file names, each as often as it does
) -> Kept:
  """Keeps the candidates among the rows that a file names, with repeats."""
  are_candidates = columns.candidates[rows]
  kept = rows[are_candidates]
  report = {'rows': len(rows), 'not_candidates': len(rows) - len(kept),
            'repeats': int((kept[1:] == kept[:-1]).sum())}
  return Kept(kept, report)


def gap_aligned(columns: Columns, *, benchmarks: Sequence[str], slack: float = 0.0) -> Kept:
  """Drops each row that is nearer to some query than the anchor set is, by more than `slack`.

  With slack 0 and the anchor's rows appended, every query's nearest-neighbour similarity in the
  split equals that in the anchor set (Mayilvahanan et al. 2024, section 4). Several benchmarks:
  the union of what each drops. Rows that an approximate search did not score are kept and counted
  as `unscored`.
  """
  rows = np.flatnonzero(columns.candidates)
  over, report = _over(columns, rows, benchmarks, slack)
  return Kept(rows[~over], report)


def dropped_rows(columns: Columns, *, benchmarks: Sequence[str], slack: float = 0.0) -> Array:
  """Returns the sorted int64 candidate rows that gap_aligned drops."""
  rows = np.flatnonzero(columns.candidates)
  return rows[_over(columns, rows, benchmarks, slack)[0]]


def _over(
    columns: Columns,
    rows: Array,  # [m] int64
    benchmarks: Sequence[str],
    slack: float,
) -> tuple[Array, dict]:
  """Returns whether each row's excess is strictly over slack, [m] bool, and how it was decided."""
  exhaustive = columns.recall is None
  excess = _highest(
      'gap_aligned', columns.excess, rows, benchmarks, np.maximum if exhaustive else np.fmax)
  unscored = int(np.isnan(excess).sum())
  if unscored and exhaustive:
    reason = ('an anchor' if unscored == len(rows)
              else "search.backend='exact', or an approximate search with its measured recall")
    raise InputError(f"rule 'gap_aligned' needs {reason}: the excess of {unscored} of {len(rows)} "
                     f'candidates over {tuple(benchmarks)} is NaN')
  over = excess > slack
  near_cut = np.flatnonzero((excess >= slack - columns.tolerance) & (excess <= slack + columns.tolerance))
  if len(near_cut):
    over[near_cut] = columns.exact_excess(benchmarks, rows[near_cut]) > slack
  report = {'decided_exactly': len(near_cut)}
  if not exhaustive:
    report |= {'recall': columns.recall, 'unscored': unscored}
  return over, report


def near(columns: Columns, *, benchmarks: Sequence[str], count: int) -> Kept:
  """Keeps the `count` candidates LEAST similar to the benchmarks (the most similar are removed).

  A row's similarity is its highest to any query of any of the benchmarks.
  """
  return _least('near', columns, benchmarks, count, sign=1)


def far(columns: Columns, *, benchmarks: Sequence[str], count: int) -> Kept:
  """Keeps the `count` candidates MOST similar to the benchmarks (the least similar are removed)."""
  return _least('far', columns, benchmarks, count, sign=-1)


def _least(
    rule: str, columns: Columns, benchmarks: Sequence[str], count: int, *, sign: int) -> Kept:
  """Keeps the `count` candidates with the lowest sign * similarity, decided exactly at the cut."""
  rows = _candidates_for(columns, count)
  values = sign * _highest(rule, columns.similarity, rows, benchmarks, np.maximum)
  if np.isnan(values).any():
    raise InputError(f"rule {rule!r} needs every row's similarity to {tuple(benchmarks)}: "
                     "search with search.backend='exact'")
  if count in (0, len(rows)):
    return Kept(rows[:count], {'decided_exactly': 0})
  cut = np.partition(values, count - 1)[count - 1]
  keep = values < cut - columns.tolerance
  near_cut = np.flatnonzero(~keep & (values <= cut + columns.tolerance))
  exact = sign * columns.exact_similarity(benchmarks, rows[near_cut])
  keep[near_cut] = _lowest(exact, count - int(keep.sum()))
  report = {'decided_exactly': len(near_cut), 'similarity_at_cut': float(sign * cut)}
  return Kept(rows[keep], report)


def random(columns: Columns, *, count: int, seed: int, draw: int = 0) -> Kept:
  """Keeps `count` candidates, uniform without replacement: the control for size.

  With the same (seed, draw) a smaller split lies inside a larger one.
  """
  rows = _candidates_for(columns, count)
  order = _random_order(len(columns.candidates), seed, draw, RANDOM_STREAM)
  return Kept(rows[_lowest(order[rows], count)])


def matched(
    columns: Columns,
    *,
    removed: Array,  # [R] int64, candidates that the target split dropped
    seed: int,
    draw: int = 0,
) -> Kept:
  """Removes other candidates like `removed` in their place: the control for all but similarity.

  Cells: nearest anchor class x domain (where given) x quintile of the similarity to that class x
  quintile of the caption length x tercile of the image size, quantiles over all candidates. Each
  cell gives as many rows as it has removed ones. Cells that lack donors are merged over image
  size, then caption length, class similarity, domain; never over classes. What is missing even
  then is the shortfall, and stays.

  Report: removed, drawn, drawn_after_merging (by the variable given up last), shortfall,
  without_full_cell_donor (share of `removed`), no_matched_control (that share is over
  MAX_UNMATCHED: the rows kept are then those of the random rule at the target's size), and
  standardised_differences (of each variable, between `removed` and the rows removed here: see
  cells.differences; good below 0.1).
  """
  rows = np.flatnonzero(columns.candidates)
  is_removed = np.zeros(len(columns.candidates), bool)
  is_removed[removed] = True
  is_removed = is_removed[rows]
  if is_removed.sum() != len(removed):
    raise ValueError(f'only {is_removed.sum()} of {len(removed)} removed rows are candidates, '
                     'each counted once')
  numbers, categories = _matched_variables(columns, rows)
  digits = [*categories.values(), *map(cells.quantile_bins, numbers.values(), BINS.values())]
  radices = [*(int(codes.max(initial=0)) + 1 for codes in categories.values()), *BINS.values()]
  order = _random_order(len(columns.candidates), seed, draw, MATCHED_STREAM)[rows]
  drawn, served = cells.draw_like(
      cells.cell_codes(digits, radices), is_removed, order, radices[:0:-1])

  merged_over = [*reversed(BINS), *list(categories)[:0:-1]]
  share = 1 - served[0] / len(removed) if len(removed) else 0.0
  report = {
      'removed': len(removed),
      'drawn': sum(served),
      'drawn_after_merging': dict(zip(merged_over, served[1:], strict=True)),
      'shortfall': len(removed) - sum(served),
      'without_full_cell_donor': share,
      'no_matched_control': share > MAX_UNMATCHED,
  }
  kept = rows[~drawn]
  if report['no_matched_control']:
    kept = random(columns, count=len(rows) - len(removed), seed=seed, draw=draw).rows
    drawn = ~np.isin(rows, kept, assume_unique=True)
  report['standardised_differences'] = cells.differences(
      np.flatnonzero(is_removed), np.flatnonzero(drawn), numbers, categories)
  return Kept(kept, report)


def _matched_variables(
    columns: Columns,
    rows: Array,  # [m] int64
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the numeric and the categorical variables of the matched control at these rows."""
  for name in ('anchor_class', *BINS):
    if getattr(columns, name) is None:
      raise InputError(f"rule 'matched' needs {name}: the pool must have images and captions, and "
                       'the anchor labels')
  numbers = {name: getattr(columns, name)[rows] for name in BINS}
  categories = {'anchor_class': columns.anchor_class[rows]}
  if columns.domain is not None:
    categories['domain'] = cells.levels(columns.domain)[0][rows]
  known = (categories['anchor_class'] >= 0) & np.isfinite(numbers['anchor_class_similarity'])
  if not known.all():
    raise InputError("rule 'matched' needs the nearest anchor class of every candidate, "
                     f"{(~known).sum()} have none: search with search.backend='exact'")
  return numbers, categories


def _highest(
    rule: str,
    column: Mapping[str, Array],  # benchmark -> [N] float32
    rows: Array,  # [m] int64
    benchmarks: Sequence[str],
    larger: Callable[[Array, Array], Array],
) -> Array:
  """Returns the highest value over the benchmarks, [m] float32: the larger of each two."""
  if not benchmarks:
    raise ConfigError(f"rule {rule!r} needs benchmarks=('name', ...)")
  for name in benchmarks:
    if name not in column:
      raise InputError(f'rule {rule!r} needs the search of {name!r}; have {sorted(column)}')
  highest = column[benchmarks[0]][rows]
  for name in benchmarks[1:]:
    highest = larger(highest, column[name][rows])
  return highest


def _candidates_for(columns: Columns, count: int) -> Array:
  """Returns the candidate rows, [m] int64; refuses a count above their number."""
  rows = np.flatnonzero(columns.candidates)
  if not 0 <= count <= len(rows):
    raise ConfigError(f'size asks for {count} pool rows, there are {len(rows)} candidates '
                      '(usable and kept by de-duplication)')
  return rows


def _random_order(n: int, seed: int, draw: int, stream: int) -> Array:
  """Returns a random number for each of n pool rows, [n] uint64.

  Raw numbers of a bit generator, whose stream NumPy never changes, unlike those of its samplers.
  """
  return np.random.PCG64(np.random.SeedSequence((seed, draw, stream))).random_raw(n)


def _lowest(
    values: Array,  # [n]
    count: int,
) -> Array:
  """Returns which are the `count` lowest values, [n] bool; ties go to the earlier position."""
  if count == 0:
    return np.zeros(len(values), bool)
  cut = np.partition(values, count - 1)[count - 1]
  lowest = values < cut
  lowest[np.flatnonzero(values == cut)[:count - lowest.sum()]] = True
  return lowest


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule, and what a caller must know to run it.

  keys: the keys of a split block that this rule reads (beside append_anchor and seeds).
  needs: what the caller supplies: 'search' (similarity columns), 'excess' (and so an anchor),
  'count' (from size or size_of), 'draw' (from the training seed: one draw each), 'target' (the
  rows that the split named by `to` dropped), 'anchor_classes' (the search against class means),
  'file' (the rows that the split's file names; the file counts by its content, not by its path).
  append_anchor: where the rule fixes it; None: the split's own key.
  """
  keep: Callable[..., Kept]
  keys: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  append_anchor: bool | None = None


RULES = {
    'all': Rule(keep_all),
    'anchor': Rule(keep_none, append_anchor=True),
    'pool_only': Rule(keep_all, append_anchor=False),
    'gap_aligned': Rule(gap_aligned, ('benchmarks', 'slack'), ('search', 'excess')),
    'near': Rule(near, ('benchmarks', 'size', 'size_of'), ('search', 'count')),
    'far': Rule(far, ('benchmarks', 'size', 'size_of'), ('search', 'count')),
    'random': Rule(random, ('size', 'size_of', 'seed'), ('count', 'draw')),
    'matched': Rule(matched, ('to', 'seed'), ('anchor_classes', 'target', 'draw')),
    'listed': Rule(listed, ('file',), ('file',)),
}
