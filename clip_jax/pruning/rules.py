"""The pruning rules: columns over the pool in, the pool rows to keep out. No files.

Every rule is a pure function of the columns, its parameters and its seed. Ties go by pool order,
the earlier row first. To add a rule, write its function and its entry in RULES, with its
description for tables, figures and summaries.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core import progress
from clip_jax.core.config import Key, natural, part_of_one, positive, within
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.pruning.aligned import gap_aligned, k_aligned
from clip_jax.pruning.columns import (
  NORMS,
  Columns,
  Kept,
  best_over_benchmarks,
  candidates_for,
  cut_at,
  mask_of_lowest,
)
from clip_jax.pruning.controls import matched, random

# k-means of the rule clusters: rows fitted per cluster, and iterations. The defaults of Faiss, by
# which DataComp clusters its pool (max_points_per_centroid and niter in faiss/Clustering.h).
CLUSTER_ROWS, CLUSTER_ITERATIONS = 256, 25


def count_of(size: float, candidates: int) -> int:
  """Returns the number of rows of a size: <= 1 is a share of the candidates, > 1 a count."""
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
  rows: Array,  # [m] int64, sorted: the pool rows that a file lists, with repeats
) -> Kept:
  """Keeps the candidates among the rows that a file lists, with repeats."""
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

  A row's similarity is its maximum over all queries of all benchmarks.
  """
  return _keep_lowest('near', columns, benchmarks, count, sign=1)


def far(columns: Columns, *, benchmarks: Sequence[str], count: int) -> Kept:
  """Keeps the `count` candidates MOST similar to the benchmarks (the least similar are removed)."""
  return _keep_lowest('far', columns, benchmarks, count, sign=-1)


def _keep_lowest(
  rule: str, columns: Columns, benchmarks: Sequence[str], count: int, *, sign: int
) -> Kept:
  """Keeps the `count` candidates with the lowest sign * similarity, decided exactly at the cut."""
  rows = candidates_for(columns, count)
  values = best_over_benchmarks(rule, columns.similarity, rows, benchmarks, np.maximum)
  values *= np.float32(sign)
  if np.isnan(values).any():
    raise InputError(
      f"rule {rule!r} needs every row's similarity to {tuple(benchmarks)}: "
      "search with search.backend='exact'"
    )
  if count in (0, len(rows)):
    return Kept(rows[:count], {'decided_exactly': 0})
  cut = cut_at(
    values,
    lambda near_cut: sign * columns.exact_similarity(benchmarks, rows[near_cut]),
    count - 1,
    columns.tolerance,
  )
  report = {
    'decided_exactly': len(cut.near),
    'similarity_at_cut': float(sign * cut.value(count - 1)),
  }
  return Kept(rows[cut.lowest(count)], report)


def below(columns: Columns, *, benchmarks: Sequence[str], similarity: float) -> Kept:
  """Keeps the candidates that are less similar than `similarity` to every query.

  The dropped rows are those that the search lists as duplicates at this similarity, which is a
  cosine: the dot product divided by both norms.
  """
  rows = np.flatnonzero(columns.candidates)
  values = best_over_benchmarks('below', columns.similarity, rows, benchmarks, np.maximum)
  if np.isnan(values).any():
    raise InputError(
      f"rule 'below' needs every row's similarity to {tuple(benchmarks)}: "
      "search with search.backend='exact'"
    )
  over, near_cut = values >= similarity, np.zeros(0, np.int64)
  if columns.reaches is not None:
    near_cut = np.flatnonzero(np.abs(values - similarity) <= NORMS + columns.tolerance)
    over[near_cut] = columns.reaches(benchmarks, rows[near_cut], similarity)
  return Kept(rows[~over], {'decided_exactly': len(near_cut)})


def column(
  columns: Columns,
  *,
  scores: Array,  # [N] float64, NaN where a row has no value
  at_least: float | None = None,
  top: float = 0.0,
  quantile: float = 0.0,
) -> Kept:
  """Keeps the candidates with high values of a numeric column; rows without a value are dropped.

  One of: at_least, the lowest value that is kept; top, the share of the candidates (<= 1) or the
  number of rows (> 1) with the highest values (ties: earlier rows first); quantile, keeps the rows
  from this quantile of the candidates' values on (0.7 keeps three tenths, and ties).

  Report: without_value (candidates without a value), value_at_cut (the lowest kept value, None if
  no row is kept).
  """
  candidates, known = int(columns.candidates.sum()), columns.candidates & ~np.isnan(scores)
  values = scores[known]
  if top:
    count = count_of(top, candidates)
    if count > len(values):
      raise ConfigError(
        f'top={top:g} asks for {count:,} rows, but only {len(values):,} candidates have a value'
      )
    keep = mask_of_lowest(np.negative(values, out=values), count)
  elif quantile:
    place = math.floor(quantile * len(values))  # rows below the cut, without ties
    place = min(place, len(values) - 1)
    keep = values >= np.partition(values, place)[place] if len(values) else values > 0
  else:
    assert at_least is not None  # checked before any work
    keep = values >= at_least
  without_value = candidates - len(values)
  del values
  known[known] = keep
  kept = np.flatnonzero(known)
  return Kept(
    kept,
    {
      'without_value': without_value,
      'value_at_cut': float(scores[kept].min()) if len(kept) else None,
    },
  )


def domain_removal(
  columns: Columns,
  *,
  codes: Array,  # [N] integers, each row's level; -1 for a row without a level
  names: Sequence[str],  # of the levels
  values: Sequence[str],  # the levels to drop
) -> Kept:
  """Drops the candidates of the given domains or classes; rows without one are kept.

  Report: dropped_by_value (name -> candidates dropped), without_value (candidates without a
  level). Raises ConfigError for a value that is no level.
  """
  for value in values:
    if value not in names:
      raise ConfigError(
        f'values: {value!r} is no value of the column and no class of the reference.'
        f'{config_lib.did_you_mean(value, names)}'
      )
  gone = np.zeros(len(names) + 1, bool)  # the last entry is for rows without a level
  gone[[names.index(value) for value in values]] = True
  dropped = columns.candidates & gone[codes]
  counts = np.bincount(codes[dropped], minlength=len(names))
  report = {
    'dropped_by_value': {value: int(counts[names.index(value)]) for value in values},
    'without_value': int((columns.candidates & (codes < 0)).sum()),
  }
  return Kept(np.flatnonzero(columns.candidates & ~dropped), report)


def caption(
  columns: Columns,
  *,
  matches: Array,  # [N] bool: the caption has one of the words
) -> Kept:
  """Keeps the candidates whose caption has one of some words."""
  return Kept(np.flatnonzero(columns.candidates & matches))


def clusters(
  columns: Columns,
  *,
  clusters: int,  # K
  assignment: Array,  # [N] int32 in [0, K): the cluster of each candidate; other rows: any value
  reference: Array,  # [R] int32 in [0, K): the nearest cluster of each reference image
) -> Kept:
  """Keeps the candidates whose cluster is the nearest one of at least one reference image.

  This is the image-based filter of DataComp (Gadre et al. 2023, section 4.1, "Image-based
  filtering"). Report: clusters (K), clusters_kept (the nearest of some reference image),
  reference_rows (R).
  """
  is_kept = np.zeros(clusters, bool)
  is_kept[reference] = True
  rows = np.flatnonzero(columns.candidates)
  report = {
    'clusters': clusters,
    'clusters_kept': int(is_kept.sum()),
    'reference_rows': len(reference),
  }
  return Kept(rows[is_kept[assignment[rows]]], report)


def union(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps rows that at least one of the other splits keeps; others: [n] int64 rows each, unique."""
  return _composed(columns, others, np.logical_or)


def intersection(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps rows that all other splits keep; `others` as in `union`."""
  return _composed(columns, others, np.logical_and)


def minus(columns: Columns, *, others: Sequence[Array]) -> Kept:
  """Keeps rows of the first split that no further split keeps; `others` as in `union`."""
  return _composed(columns, others, np.greater)  # on booleans: a and not b


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


def _some(words: Sequence[str]) -> str:
  """Returns up to three words in prose, and the number of the others."""
  if len(words) <= 3:
    return progress.join_names(words, 'or')
  return f'{", ".join(words[:3])} or one of {len(words) - 3:,} other words'


def _queries(of: Mapping[str, Any]) -> str:
  """Returns the benchmarks in prose, and the share of their queries that counts if it is not 1."""
  low, high = of['queries']
  share = f' ({100 * (high - low):g} % of the query groups count)'
  return progress.join_names(of['benchmarks']) + ('' if (low, high) == (0, 1) else share)


def _gap_aligned_words(of: Mapping[str, Any]) -> str:
  slack = of['slack']
  cut = f', by more than {slack:g}'.replace('-', '\u2212') if slack else ''
  if of['dose']:
    cut = f'; {100 * of["dose"]:g} % of the number that slack 0 removes, largest excess first'
  elif of['quantile']:
    cut = f', by more than the {100 * of["quantile"]:g} % quantile of the excess'
  return f'without rows that are nearer to a query of {_queries(of)} than any anchor image{cut}'


def _column_words(of: Mapping[str, Any]) -> str:
  if of['at_least'] is not None:
    return f'rows whose {of["column"]} is {of["at_least"]:g} or more'
  if of['quantile']:
    return f'rows whose {of["column"]} is at or over its {100 * of["quantile"]:g} % quantile'
  amount = f'the {100 * of["top"]:g} % of rows' if of['top'] <= 1 else f'{of["top"]:,.0f} rows'
  return f'{amount} with the highest {of["column"]}'


def _one_amount(*names: str) -> Callable[[Mapping[str, Any]], str]:
  """Returns a check that exactly one of several keys is set."""

  def problem(of: Mapping[str, Any]) -> str:
    given = [name for name in names if of[name] is not None and of[name] != KEYS[name].default]
    return '' if len(given) == 1 else f'give exactly one of {progress.join_names(names)}'

  return problem


def _domain_words(of: Mapping[str, Any]) -> str:
  values = progress.join_names(of['values'])
  rows = (
    f'rows whose {of["column"]} is {values}'
    if of['column']
    else f'rows classified as {values} by the nearest example of {of["reference"] or "a reference"}'
  )
  return f'domain removal, not alignment: without {rows}'


def _clusters_words(of: Mapping[str, Any]) -> str:
  images = f'an image of {of["reference"]}' if of['reference'] else 'an anchor image'
  return f'rows of the k-means clusters (of {of["clusters"]:,}) that are the nearest of {images}'


def _minus_words(of: Mapping[str, Any]) -> str:
  first, *others = of['of']
  verb = 'does' if len(others) < 2 else 'do'
  return f'rows that {first} keeps and {progress.join_names(others)} {verb} not'


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule with its requirements and its description.

  - keys: the keys of a split block that this rule reads (besides append_anchor and seeds).
  - needs: inputs that the caller supplies: 'search' (similarity columns), 'excess' (needs an
    anchor), 'pairs' (of k_aligned), 'levels' (`codes` and `names`, from a column or a reference),
    'scores' (the numbers of a column of the index), 'matches' (whether each caption has one of
    `words`), 'clusters' (`assignment` and `reference`: the k-means cluster of each candidate and of
    each reference image), 'count' (from size or size_of), 'draw' (one draw per training seed),
    'target' (the rows dropped by the split named in `to`), 'others' (the rows kept by the splits
    named in `of`), 'anchor_classes' (the search against class means), 'file' (the rows that the
    split's file lists; the file's content counts, not its path).
  - append_anchor: the rule's fixed value; None: the split's own key.
  - planted: whether the split contains the planted rows.
  - every_row: whether the rule needs every row's score, so that an approximate search is not
    enough.
  - selects: whether the rule selects rows by their properties; a matched control can imitate it.
  - label: a short name for legends and tables.
  - words: the values of `keys` -> a description of the split, without a full stop.
  - column: the column that the rule removes by, 'excess' or 'similarity'; '' for other rules.
  - lowest_first: whether rows of low values are removed first, instead of high values.
  - strips: titles of the pictures of removed rows (removed first, median, removed last) and of the
    kept rows nearest to the cut; () without a column.
  - compared: whether the rule is one cut through its column, so that embedders can be compared.
  - problem: the values of `keys` -> what is wrong with them, '' for nothing.
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
  problem: Callable[[Mapping[str, Any]], str] = lambda of: ''

  @property
  def is_drawn(self) -> bool:
    """Whether each training seed has its own draw."""
    return 'draw' in self.needs

  @property
  def is_aligned(self) -> bool:
    """Whether the rule drops rows that are nearer to a query than the anchor's rows."""
    return 'excess' in self.needs

  @property
  def has_size(self) -> bool:
    """Whether the split has a size in the config; the report plots accuracy against it."""
    return 'size' in self.keys


# The keys of a split block, each declared once; every rule names the keys that it reads.
KEYS = {
  # gap_aligned, k_aligned, near, far: the benchmarks whose queries count; of several, the union of
  # the dropped rows (aligned) or the maximum similarity (near, far)
  'benchmarks': Key(()),
  # gap_aligned, k_aligned, near, far: (lo, hi): only the queries with
  # sha256('queries:' + group) / 2^256 in [lo, hi) count: the aligned queries. The others are held
  # back; the report compares both kinds.
  'queries': Key((0.0, 1.0), part_of_one),
  'size': Key(0.0),  # near, far, random: rows kept; <= 1 a share of the candidates, > 1 a count
  'size_of': Key(''),  # near, far, random: a split that sets the number of rows kept
  # matched: the split whose removed rows are imitated (aligned, near, far, a domain removal, a
  # join, listed)
  'to': Key(''),
  # gap_aligned: drop only rows whose similarity exceeds the anchor's by more than this
  'slack': Key(0.0, within(-2, 2)),
  # gap_aligned: the slack is this quantile of the candidates' excess (0.9: drops a tenth of them,
  # or slightly less). column: rows from this quantile of its values on are kept. 0: not set
  'quantile': Key(0.0, within(0, 1)),
  # below: rows with at least this cosine similarity to a query are dropped
  'similarity': Key(0.0, within(-1, 1)),
  # column: the lowest value that is kept; None: not set
  'at_least': Key(None),
  'top': Key(0.0),  # column: rows of the highest values kept; <= 1 a share, > 1 a count; 0: not set
  # gap_aligned: drops this multiple of the number of rows that slack 0 drops, largest excess first;
  # 0: not set
  'dose': Key(0.0, within(0, 1000)),
  # k_aligned: for every j up to k, the j-th nearest pool row is not nearer than the j-th nearest
  # anchor row
  'k': Key(1, positive),
  # domain_removal: one of config.references, whose nearest example sets a row's class.
  # clusters: the dataset whose images choose the clusters: '' is the anchor, else one of
  # config.references (which the search also compares with the pool) or config.benchmarks. With a
  # benchmark, test images choose the training data: accuracy on it is no result on unseen data
  'reference': Key(''),
  # clusters: number of k-means clusters of the candidates (DataComp: 100,000)
  'clusters': Key(0, natural),
  # domain_removal: or a column of the pool's index with the class. column: a column of numbers of
  # the index, or 'image_text_similarity', which the stage embed computes (DataComp's CLIP score)
  'column': Key(''),
  # caption: words or phrases, one of which a caption must have; whole words, case does not matter
  'words': Key(()),
  'values': Key(()),  # domain_removal: the classes, or values of the column, that are dropped
  # union, intersection, minus: the splits that are joined; minus: the first without the others
  'of': Key(()),
  # random, matched: seed of the draw, together with the training seed. clusters: of k-means
  'seed': Key(0),
  # listed: a file of sample keys: DataComp's uid .npy, int64 .npy, or parquet of keys
  'file': Key(''),
}

# In the order of legends. The position sets a rule's colour: add new rules at the end.
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
    ('benchmarks', 'queries', 'slack', 'quantile', 'dose'),
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
      f'matched control: without as many other rows as {of["to"]} removes, alike except in '
      'similarity'
    ),
  ),
  'random': Rule(
    random,
    ('size', 'size_of', 'seed'),
    ('count', 'draw'),
    label='random',
    words=lambda of: 'random rows, the control for size',
  ),
  'near': Rule(
    near,
    ('benchmarks', 'queries', 'size', 'size_of'),
    ('search', 'count'),
    every_row=True,
    selects=True,
    label='near-pruned (most similar removed)',
    column='similarity',
    compared=True,
    words=lambda of: f'near-pruned (most similar removed), by {_queries(of)}',
    strips=(
      'removed, most similar',
      'removed, median',
      'removed, just over the cut',
      'kept, just under the cut',
    ),
  ),
  'far': Rule(
    far,
    ('benchmarks', 'queries', 'size', 'size_of'),
    ('search', 'count'),
    every_row=True,
    selects=True,
    label='far-pruned (most similar kept)',
    column='similarity',
    lowest_first=True,
    compared=True,
    words=lambda of: f'far-pruned (most similar kept), by {_queries(of)}',
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
    ('benchmarks', 'queries', 'k'),
    ('search', 'excess', 'pairs'),
    every_row=True,
    selects=True,
    label='aligned to k neighbours',
    column='excess',
    words=lambda of: (
      f'aligned for the {of["k"]} nearest images of each query of {_queries(of)}: no '
      'pool image is nearer than the anchor image of the same rank'
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
    words=lambda of: f'rows that {progress.join_names(of["of"], "or")} keeps',
  ),
  'intersection': Rule(
    intersection,
    ('of',),
    ('others',),
    selects=True,
    label='intersection of splits',
    words=lambda of: f'rows that {progress.join_names(of["of"])} all keep',
  ),
  'minus': Rule(
    minus, ('of',), ('others',), selects=True, label='a split without others', words=_minus_words
  ),
  'planted': Rule(
    keep_all,
    planted=True,
    label='base with planted copies of test images',
    words=lambda of: 'base with planted copies of test images: a positive control',
  ),
  'below': Rule(
    below,
    ('benchmarks', 'similarity'),
    ('search',),
    every_row=True,
    selects=True,
    label='decontaminated (similar rows removed)',
    words=lambda of: (
      f'without rows that are {of["similarity"]:g} or more similar to a query of '
      f'{progress.join_names(of["benchmarks"])}'
    ),
    column='similarity',
    problem=lambda of: '' if of['similarity'] else 'give similarity=, for example 0.95',
    strips=(
      'removed, most similar',
      'removed, median',
      'removed, just over the cut',
      'kept, just under the cut',
    ),
  ),
  'column': Rule(
    column,
    ('column', 'at_least', 'top', 'quantile'),
    ('scores',),
    selects=True,
    label='highest values of a column',
    words=_column_words,
    problem=lambda of: (
      _one_amount('at_least', 'top', 'quantile')(of) if of['column'] else 'give column='
    ),
  ),
  'caption': Rule(
    caption,
    ('words',),
    ('matches',),
    selects=True,
    label='captions with given words',
    words=lambda of: f'rows whose caption has {_some(of["words"])}',
    problem=lambda of: (
      '' if of['words'] and all(str(word).strip() for word in of['words']) else 'give words=(...)'
    ),
  ),
  'clusters': Rule(
    clusters,
    ('clusters', 'reference', 'seed'),
    ('clusters',),
    selects=True,
    label='clusters of reference images',
    words=_clusters_words,
    problem=lambda of: '' if of['clusters'] else 'give clusters=, for example 100_000',
  ),
}
