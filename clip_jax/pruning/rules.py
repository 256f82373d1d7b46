"""The pruning rules: columns over the pool in, the pool rows to keep out. No files.

Every rule is a pure function of the columns, its parameters and its seed. Ties go by pool order,
the earlier row first. To add a rule, write its function and its entry in RULES, with the words that
tables, figures and summaries have for it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core.config import Key, positive, within
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.pruning.aligned import gap_aligned, k_aligned
from clip_jax.pruning.columns import Columns, Kept, candidates_for, highest, lowest, refined
from clip_jax.pruning.controls import matched, random


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
  report = {
    'rows': len(rows),
    'not_candidates': len(rows) - len(kept),
    'repeats': int((kept[1:] == kept[:-1]).sum()),
  }
  return Kept(kept, report)


def near(columns: Columns, *, benchmarks: Sequence[str], count: int) -> Kept:
  """Keeps the `count` candidates LEAST similar to the benchmarks (the most similar are removed).

  A row's similarity is its highest to any query of any of the benchmarks.
  """
  return _least('near', columns, benchmarks, count, sign=1)


def far(columns: Columns, *, benchmarks: Sequence[str], count: int) -> Kept:
  """Keeps the `count` candidates MOST similar to the benchmarks (the least similar are removed)."""
  return _least('far', columns, benchmarks, count, sign=-1)


def _least(
  rule: str, columns: Columns, benchmarks: Sequence[str], count: int, *, sign: int
) -> Kept:
  """Keeps the `count` candidates with the lowest sign * similarity, decided exactly at the cut."""
  rows = candidates_for(columns, count)
  values = sign * highest(rule, columns.similarity, rows, benchmarks, np.maximum)
  if np.isnan(values).any():
    raise InputError(
      f"rule {rule!r} needs every row's similarity to {tuple(benchmarks)}: "
      "search with search.backend='exact'"
    )
  if count in (0, len(rows)):
    return Kept(rows[:count], {'decided_exactly': 0})
  found, decided = refined(
    values,
    lambda near_cut: sign * columns.exact_similarity(benchmarks, rows[near_cut]),
    [count - 1],
    columns.tolerance,
  )
  keep = lowest(found, count)
  report = {'decided_exactly': decided, 'similarity_at_cut': float(sign * found[keep].max())}
  return Kept(rows[keep], report)


def domain_removal(
  columns: Columns,
  *,
  codes: Array,  # [N] integers, each row's level; -1 where it has none
  names: Sequence[str],  # of the levels
  values: Sequence[str],  # the levels that go
) -> Kept:
  """Drops the candidates of some domains or classes; rows without one are kept.

  Report: dropped_by_value (name -> candidates dropped), without_value (candidates that have none).
  Raises ConfigError for a value that is no level.
  """
  for value in values:
    if value not in names:
      raise ConfigError(f'values: {value!r} is not there.{config_lib.nearest(value, names)}')
  gone = np.zeros(len(names) + 1, bool)  # the last is for rows without a level
  gone[[names.index(value) for value in values]] = True
  dropped = columns.candidates & gone[codes]
  counts = np.bincount(codes[dropped], minlength=len(names))
  report = {
    'dropped_by_value': {value: int(counts[names.index(value)]) for value in values},
    'without_value': int((columns.candidates & (codes < 0)).sum()),
  }
  return Kept(np.flatnonzero(columns.candidates & ~dropped), report)


def union(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps what any of some splits keeps. others: the rows of each, [n] int64, once."""
  return _composed(columns, others, np.logical_or)


def intersection(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps what all of some splits keep. others: as of `union`."""
  return _composed(columns, others, np.logical_and)


def minus(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps what the first split keeps and none of the further ones. others: as of `union`."""
  return _composed(columns, others, np.greater)  # of two bools: the first and not the second


def _composed(
  columns: Columns, others: Sequence[Array], join: Callable[[Array, Array], Array]
) -> Kept:
  masks = np.zeros((2, len(columns.candidates)), bool)
  masks[0][others[0]] = True
  for rows in others[1:]:
    masks[1] = False
    masks[1][rows] = True
    masks[0] = join(*masks)
  return Kept(np.flatnonzero(masks[0]))


def _listed(names: Sequence[Any], word: str = 'and') -> str:
  """Returns 'a, b and c'."""
  *first, last = map(str, names) if names else ['']
  return f'{", ".join(first)} {word} {last}' if first else last


def _gap_aligned_words(of: Mapping[str, Any]) -> str:
  slack = of['slack']
  cut = f', by more than {slack:g}'.replace('-', '\u2212') if slack else ''
  if of['dose']:
    cut = f', {100 * of["dose"]:g} % of the number that slack 0 removes, largest excess first'
  elif of['quantile']:
    cut = f', by more than the {100 * of["quantile"]:g} % quantile of the excess'
  queries = f'a query of {_listed(of["benchmarks"])}'
  return f'without what is nearer to {queries} than any anchor image is{cut}'


def _domain_words(of: Mapping[str, Any]) -> str:
  values = _listed(of['values'])
  rows = (
    f'rows whose {of["column"]} is {values}'
    if of['column']
    else f'rows that are {values} by the nearest example of {of["reference"] or "a reference"}'
  )
  return f'domain removal, not alignment: without {rows}'


def _minus_words(of: Mapping[str, Any]) -> str:
  first, *others = of['of']
  return f'what {first} keeps and {_listed(others)} {"does" if len(others) < 2 else "do"} not'


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule, what a caller must know to run it, and how it is shown.

  keys: the keys of a split block that this rule reads (beside append_anchor and seeds).
  needs: what the caller supplies: 'search' (similarity columns), 'excess' (and so an anchor),
  'pairs' (of k_aligned), 'levels' (`codes` and `names`, from a column or a reference), 'count'
  (from size or size_of), 'draw' (from the training seed: one draw each), 'target' (the rows that
  the split named by `to` dropped), 'others' (the rows that the splits named by `of` keep),
  'anchor_classes' (the search against class means), 'file' (the rows that the split's file names;
  the file counts by its content, not by its path).
  append_anchor: where the rule fixes it; None: the split's own key.
  planted: whether the planted rows belong to the split.
  every_row: whether an approximate search, which does not score every row, will not do.
  selects: whether a matched control can imitate it: it drops candidates for what they are.
  label: a few words for legends and tables.
  words: the values of `keys` -> what a split of this rule is, in a sentence without a full stop.
  column: what the rule removes by, 'excess' or 'similarity'; '' for rules on something else.
  lowest_first: whether it removes what is lowest in that column first, not what is highest.
  strips: titles of the pictures of removed rows (the first to go, the median, the last) and of the
  kept rows that would have gone next; () without a column.
  compared: whether it is one cut through its column, which other embedders can make, too.
  """

  keep: Callable[..., Kept]
  keys: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  append_anchor: bool | None = None
  planted: bool = False
  every_row: bool = False
  selects: bool = False
  _: dataclasses.KW_ONLY
  label: str
  words: Callable[[Mapping[str, Any]], str]
  column: str = ''
  lowest_first: bool = False
  strips: tuple[str, ...] = ()
  compared: bool = False

  @property
  def drawn(self) -> bool:
    """Whether there is a draw of its own for each training seed."""
    return 'draw' in self.needs

  @property
  def aligned(self) -> bool:
    """Whether it drops rows for being nearer to a query than the anchor's rows are."""
    return 'excess' in self.needs

  @property
  def sized(self) -> bool:
    """Whether the config asks for a size: accuracy is drawn as a curve over it."""
    return 'size' in self.keys


# The keys of a split block that rules read, each declared once. A rule names those that it reads.
KEYS = {
  'benchmarks': Key(
    ()
  ),  # whose queries count (gap_aligned, near, far); several: their union, their max
  'size': Key(0.0),  # near, far, random: rows kept; <= 1 a share of the candidates, > 1 a count
  'size_of': Key(''),  # near, far, random: as many as that split keeps
  # matched: the split whose removed rows are imitated (aligned, near, far, a domain removal, a
  # join, listed)
  'to': Key(''),
  'slack': Key(
    0.0, within(-2, 2)
  ),  # gap_aligned: drop only what is more than this over the anchor's similarity
  # gap_aligned: the slack is this quantile of the candidates' excess (0.9: a tenth of them goes, or
  # a little less); 0: not given
  'quantile': Key(0.0, within(0, 1)),
  # gap_aligned: drops so many times what slack 0 does, the largest excess first; 0: not given
  'dose': Key(0.0, within(0, 1000)),
  # k_aligned: the j-th nearest pool row is no nearer than the j-th nearest anchor row, for every j
  # up to k
  'k': Key(1, positive),
  'reference': Key(
    ''
  ),  # domain_removal: one of config.references: its nearest example says a row's class
  'column': Key(''),  # domain_removal: or a column of the pool's index that says it
  'values': Key(()),  # domain_removal: the classes, or the column's values, that are dropped
  'of': Key(
    ()
  ),  # union, intersection, minus: the splits that are joined; minus: the first without the others
  'seed': Key(0),  # random, matched: of the draw, together with the training seed
  'file': Key(
    ''
  ),  # listed: the samples, by key: DataComp's uid .npy, int64 .npy, or parquet of keys
}

# In the order of legends. A rule has its colour by its place: new ones go to the end.
RULES = {
  'all': Rule(
    keep_all, label='base (the whole pool)', words=lambda of: 'the whole pool and the anchor'
  ),
  'anchor': Rule(
    keep_none, append_anchor=True, label='anchor only', words=lambda of: 'the anchor rows alone'
  ),
  'pool_only': Rule(
    keep_all,
    append_anchor=False,
    label='pool without the anchor',
    words=lambda of: 'the pool without the anchor rows',
  ),
  'gap_aligned': Rule(
    gap_aligned,
    ('benchmarks', 'slack', 'quantile', 'dose'),
    ('search', 'excess'),
    selects=True,
    label='gap-aligned',
    words=_gap_aligned_words,
    column='excess',
    compared=True,
    strips=(
      'removed, largest excess',
      'removed, median',
      'removed, just over the cut',
      'kept, just under the cut',
    ),
  ),
  'matched': Rule(
    matched,
    ('to', 'seed'),
    ('anchor_classes', 'target', 'draw'),
    every_row=True,
    label='matched control',
    words=lambda of: (
      f'control: as many rows removed as in {of["to"]}, alike but not the similar ones'
    ),
  ),
  'random': Rule(
    random,
    ('size', 'size_of', 'seed'),
    ('count', 'draw'),
    label='random',
    words=lambda of: 'random rows: the control for size',
  ),
  'near': Rule(
    near,
    ('benchmarks', 'size', 'size_of'),
    ('search', 'count'),
    every_row=True,
    selects=True,
    label='near-pruned (most similar removed)',
    column='similarity',
    compared=True,
    words=lambda of: f'near-pruned (most similar removed), by {_listed(of["benchmarks"])}',
    strips=(
      'removed, most similar',
      'removed, median',
      'removed, just over the cut',
      'kept, just under the cut',
    ),
  ),
  'far': Rule(
    far,
    ('benchmarks', 'size', 'size_of'),
    ('search', 'count'),
    every_row=True,
    selects=True,
    label='far-pruned (most similar kept)',
    column='similarity',
    lowest_first=True,
    compared=True,
    words=lambda of: f'far-pruned (most similar kept), by {_listed(of["benchmarks"])}',
    strips=(
      'removed, least similar',
      'removed, median',
      'removed, just under the cut',
      'kept, just over the cut',
    ),
  ),
  'listed': Rule(
    listed,
    ('file',),
    ('file',),
    selects=True,
    label='listed in a file',
    words=lambda of: 'the pool rows that a file lists',
  ),
  'k_aligned': Rule(
    k_aligned,
    ('benchmarks', 'k'),
    ('search', 'excess', 'pairs'),
    every_row=True,
    selects=True,
    label='aligned to k neighbours',
    column='excess',
    words=lambda of: (
      f'no query of {_listed(of["benchmarks"])} has nearer pool images than anchor '
      f'images, for its {of["k"]} nearest of each'
    ),
    strips=(
      'removed, largest excess',
      'removed, median',
      'removed, smallest excess',
      'kept, largest excess',
    ),
  ),
  'domain_removal': Rule(
    domain_removal,
    ('reference', 'column', 'values'),
    ('levels',),
    selects=True,
    label='domain removal (not alignment)',
    words=_domain_words,
  ),
  'union': Rule(
    union,
    ('of',),
    ('others',),
    selects=True,
    label='union of splits',
    words=lambda of: f'what {_listed(of["of"], "or")} keeps',
  ),
  'intersection': Rule(
    intersection,
    ('of',),
    ('others',),
    selects=True,
    label='intersection of splits',
    words=lambda of: f'what {_listed(of["of"])} keep, every one of them',
  ),
  'minus': Rule(
    minus, ('of',), ('others',), selects=True, label='a split without others', words=_minus_words
  ),
  'planted': Rule(
    keep_all,
    planted=True,
    label='base with planted copies of test images',
    words=lambda of: 'base, and planted copies of test images: a positive control',
  ),
}
