"""The controls: random rows, and rows that resemble the removed ones except in similarity."""

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
  order = random_order(len(columns.candidates), seed, draw, RANDOM_STREAM)
  return Kept(rows[mask_of_lowest(order[rows], count)])


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
  rows = np.flatnonzero(columns.candidates)
  is_removed = np.zeros(len(columns.candidates), bool)
  is_removed[removed] = True
  is_removed = is_removed[rows]
  if is_removed.sum() != len(removed):
    raise ValueError(
      f'only {is_removed.sum()} of {len(removed)} removed rows are distinct candidates'
    )
  numbers, categories = _matched_variables(columns, rows)
  digits = numbers | categories
  digits |= {name: cells.quantile_bins(numbers[name], bins) for name, bins in BINS.items()}
  variables = [name for name in VARIABLES if name in digits]
  sizes = {name: int(codes.max(initial=0)) + 1 for name, codes in categories.items()}
  sizes |= {'caption_names_class': 2, **BINS}
  radices = [sizes[name] for name in variables]
  order = random_order(len(columns.candidates), seed, draw, MATCHED_STREAM)[rows]
  codes = cells.cell_codes([digits[name] for name in variables], radices)
  drawn, served = cells.draw_like(codes, is_removed, order, radices[:0:-1])
  by_chance = mask_of_lowest(
    random_order(len(columns.candidates), seed, draw, RANDOM_STREAM)[rows], len(removed)
  )
  _, (served_by_chance,) = cells.draw_like(codes, by_chance, order, ())

  share, share_by_chance = (
    1 - number / len(removed) if len(removed) else 0.0 for number in (served[0], served_by_chance)
  )
  report = {
    'removed': len(removed),
    'drawn': sum(served),
    'drawn_after_merging': dict(zip(variables[:0:-1], served[1:], strict=True)),
    'shortfall': len(removed) - sum(served),
    'without_full_cell_donor': share,
    'random_without_full_cell_donor': share_by_chance,
    'no_matched_control': share > MAX_UNMATCHED,
  }
  kept = rows[~drawn]
  if report['no_matched_control']:
    kept = random(columns, count=len(rows) - len(removed), seed=seed, draw=draw).rows
    drawn = ~np.isin(rows, kept, assume_unique=True)
  for key, others in (('standardised_differences', drawn), ('differences_before', ~is_removed)):
    report[key] = cells.differences(
      np.flatnonzero(is_removed), np.flatnonzero(others), numbers, categories
    )
  return Kept(kept, report)


def _matched_variables(
  columns: Columns,
  rows: Array,  # [m] int64
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the numeric and the categorical variables of the matched control at these rows."""
  for name in ('anchor_class', *BINS):
    if getattr(columns, name) is None:
      raise InputError(
        f"rule 'matched' needs {name}: the pool must have images and captions, and the anchor must "
        'have labels'
      )
  numbers = {name: getattr(columns, name)[rows] for name in BINS}
  categories = {'anchor_class': np.asarray(columns.anchor_class)[rows]}
  if columns.domain is not None:
    categories['domain'] = cells.levels(columns.domain)[0][rows]
  if columns.caption_names_class is not None:
    numbers['caption_names_class'] = columns.caption_names_class[rows].astype(np.int8)
  known = (categories['anchor_class'] >= 0) & np.isfinite(numbers['anchor_class_similarity'])
  if not known.all():
    raise InputError(
      "rule 'matched' needs the nearest anchor class of every candidate, but "
      f"{(~known).sum()} have none: search with search.backend='exact'"
    )
  return numbers, categories
