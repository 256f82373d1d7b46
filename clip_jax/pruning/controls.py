"""The controls: random rows, and rows that resemble the removed ones except in similarity."""

from collections.abc import Mapping
import math

import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.pruning import cells
from clip_jax.pruning.columns import Columns, Kept, candidates_for, mask_of_lowest, random_order

# With a larger share of removed rows without a full-cell donor, no matched control exists.
MAX_UNMATCHED = 0.2

# Quantile bins of the matched control's numeric variables.
BINS = {'anchor_class_similarity': 5, 'caption_length': 5, 'image_pixels': 3}

# The variables of a cell. Cells merge over the last one first, never over the first.
VARIABLES = (
  'anchor_class',
  'domain',
  'anchor_class_similarity',
  'caption_names_class',
  'caption_length',
  'image_pixels',
)

# Streams of random numbers, so that the rules' draws are independent for the same seed. Not 0:
# SeedSequence pads with zeros, so (seed, draw, 0) would equal the stream of (seed, draw).
RANDOM_STREAM, MATCHED_STREAM = 1, 2


def random(columns: Columns, *, count: int, seed: int, draw: int = 0) -> Kept:
  """Keeps `count` candidates, uniform without replacement, as the control for size.

  With the same (seed, draw), a smaller split is a subset of a larger one.
  """
  rows = candidates_for(columns, count)
  lowest = mask_of_lowest(random_order(columns.candidates, seed, draw, RANDOM_STREAM), count)
  return Kept(rows[lowest])


def matched(
  columns: Columns,
  *,
  removed: Array,  # [R] int64, candidates that the target split dropped
  seed: int,
  draw: int = 0,
) -> Kept:
  """Removes other candidates that resemble `removed`, as the control for all but similarity.

  Cells: nearest anchor class x domain (if known) x quintile of the similarity to that class x
  whether the caption names that class (if classes have names) x quintile of the caption length x
  tercile of the image size, quantiles over all candidates. In each cell, as many other rows are
  drawn as it has removed rows. Cells without enough donors are merged over the last of these, then
  the one before; never over classes. Rows without a donor even then are the shortfall; nothing is
  removed for them.

  Report: removed, drawn, drawn_after_merging (by the last variable merged over), shortfall,
  without_full_cell_donor (share of `removed`), no_matched_control (this share exceeds
  MAX_UNMATCHED; the rows kept are then those of the random rule at the target's size),
  random_without_full_cell_donor (the same share if as many random rows were removed),
  standardised_differences (of each variable, between `removed` and the drawn rows: see
  cells.differences; good below 0.1), and differences_before (the same between `removed` and all
  other candidates).
  """
  candidates = columns.candidates
  is_removed = np.zeros(len(candidates), bool)
  is_removed[removed] = True
  if (distinct := (is_removed & candidates).sum()) != len(removed):
    raise ValueError(f'only {distinct} of {len(removed)} removed rows are distinct candidates')
  # In this order, and without row numbers, since each number of 8 bytes a row counts here.
  by_chance = mask_of_lowest(random_order(candidates, seed, draw, RANDOM_STREAM), len(removed))
  numbers, categories = _matched_variables(columns)
  codes, radices = _cells(candidates, numbers, categories)
  order = random_order(candidates, seed, draw, MATCHED_STREAM)
  drawn, served = cells.draw_like(
    codes, is_removed[candidates], order, list(radices.values())[:0:-1]
  )
  _, (served_by_chance,) = cells.draw_like(codes, by_chance, order, ())
  del codes, order

  share, share_by_chance = (
    1 - number / len(removed) if len(removed) else 0.0 for number in (served[0], served_by_chance)
  )
  report = {
    'removed': len(removed),
    'drawn': sum(served),
    'drawn_after_merging': dict(zip(list(radices)[:0:-1], served[1:], strict=True)),
    'shortfall': len(removed) - sum(served),
    'without_full_cell_donor': share,
    'random_without_full_cell_donor': share_by_chance,
    'no_matched_control': share > MAX_UNMATCHED,
  }
  is_kept = candidates.copy()
  is_kept[candidates] = ~drawn
  if report['no_matched_control']:
    size = len(drawn) - len(removed)
    is_kept[:] = False
    is_kept[random(columns, count=size, seed=seed, draw=draw).rows] = True
  others = {
    'standardised_differences': candidates & ~is_kept,
    'differences_before': candidates & ~is_removed,
  }
  for key, mask in others.items():
    report[key] = cells.differences(is_removed, mask, numbers, categories)
  return Kept(np.flatnonzero(is_kept), report)


def _cells(
  candidates: Array,  # [N] bool
  numbers: Mapping[str, Array],  # [N] each
  categories: Mapping[str, Array],  # [N] each
) -> tuple[Array, dict[str, int]]:
  """Returns the cell of each of the m candidates, [m] int32 if that is enough, else int64.

  Also returns variable -> its number of levels. One variable is held at a time.
  """
  columns, radices = {**numbers, **categories}, {}
  for name in filter(columns.__contains__, VARIABLES):
    radices[name] = BINS.get(name) or (
      2 if name in numbers else int(columns[name].max(initial=0, where=candidates)) + 1
    )
  kind = np.int32 if math.prod(radices.values()) < 2**31 else np.int64
  codes = np.zeros(int(candidates.sum()), kind)
  for name, radix in radices.items():
    digit = columns[name][candidates]
    cells.add_digit(codes, cells.quantile_bins(digit, radix) if name in BINS else digit, radix)
  return codes, radices


def _matched_variables(columns: Columns) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the numeric and the categorical variables of the matched control, [N] each."""
  for name in ('anchor_class', *BINS):
    if getattr(columns, name) is None:
      raise InputError(
        f"rule 'matched' needs {name}: the pool must have images and captions, and the anchor must "
        'have labels'
      )
  numbers = {name: getattr(columns, name) for name in BINS}
  categories = {'anchor_class': np.asarray(columns.anchor_class)}
  if columns.domain is not None:
    categories['domain'] = cells.levels(columns.domain)[0]
  if columns.caption_names_class is not None:
    numbers['caption_names_class'] = columns.caption_names_class
  known = (categories['anchor_class'] >= 0) & np.isfinite(numbers['anchor_class_similarity'])
  if unknown := int((columns.candidates & ~known).sum()):
    raise InputError(
      "rule 'matched' needs the nearest anchor class of every candidate, but "
      f"{unknown} have none: search with search.backend='exact'"
    )
  return numbers, categories
