"""The same splits under further embedders (prune.sensitivity): how far they agree on what is removed.

In: the splits' rows, the searches of the main embedder and of each further one. Out:
WORKDIR/splits/sensitivity.json. A part of the stage prune.
"""

import dataclasses
import math
import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.pruning import agreement
from clip_jax.pruning import columns
from clip_jax.stages import layout
from clip_jax.stages import search

RULES = ('gap_aligned', 'near', 'far')  # of the splits that are compared: those that are a cut through one column
NAME = 'splits/sensitivity'
INTERVAL = '95 %, by Wilson, as if the rows that either removes were independent draws'


def product(config: ConfigDict, workdir: str) -> Product | None:
  """The comparison of all splits; None where it is not asked for, or no split can be compared."""
  names = compared(config)
  if not config.prune.sensitivity or not names:
    return None
  from clip_jax.stages import prune
  inputs = {}
  for split in names:
    made = prune.rows_product(config, workdir, split, layout.seeds(config, split)[0])
    inputs[made.name] = made.fingerprint
  benchmarks = sorted({name for split in names for name in config.splits[split].benchmarks})
  homes = [layout.under(config, workdir, name) for name in config.prune.sensitivity]
  for theirs, home in [(config, workdir), *homes]:
    every = search.pass_products(theirs, home)
    parts = [part for name in benchmarks for part in (*every[name][0], every[name][1])]
    inputs |= layout.inputs(workdir, home, parts)
  return Product(NAME, layout.pick(config, ['prune.sensitivity']), inputs)


def compared(config: ConfigDict) -> list[str]:
  """Returns the splits that are compared.

  Not the doses: another share of the same cut, which under another embedder may be more rows than there are.
  """
  return [split for split, block in config.splits.items() if block.rule in RULES and block.dose in (0.0, 1.0)]


def run(config: ConfigDict, workdir: str) -> list[Product]:
  """Compares the splits, where that is asked for and not done yet. Returns its products."""
  wanted = product(config, workdir)
  if wanted is None:
    if config.prune.sensitivity:
      logging.info('sensitivity: the config has no split of rule %s to compare.', ', '.join(RULES))
    return []
  if products.missing(workdir, [wanted], remake=True, redo='prune:sensitivity'):
    with products.lock(workdir, NAME):
      found = _compare(config, workdir)
      files.write_json(os.path.join(workdir, f'{NAME}.json'), found)
      products.finish(workdir, wanted, [f'{NAME}.json'])
    _say(found)
  return [wanted]


def _compare(config: ConfigDict, workdir: str) -> dict:
  from clip_jax.stages import prune
  here = prune.Base(config, workdir)
  every: dict[str, list[dict]] = {split: [] for split in compared(config)}
  for name in config.prune.sensitivity:
    theirs, home = layout.under(config, workdir, name)
    # The same splits over this embedder's columns; which rows are candidates is not its affair.
    theirs = layout.with_keys(theirs, dedup=layout.with_keys(theirs.dedup, enabled=False),
                              splits=ConfigDict({split: config.splits[split] for split in every}))
    there = prune.Base(theirs, home)
    there.columns = dataclasses.replace(there.columns, candidates=here.columns.candidates)
    for split, found in every.items():
      found.append({'embedder': name, **_of_split(config, split, here, there)})
  return {'embedders': ['', *config.prune.sensitivity], 'candidates': int(here.columns.candidates.sum()),
          'interval': INTERVAL, 'splits': every}


def _of_split(config: ConfigDict, split: str, here, there) -> dict:
  block, seed = config.splits[split], layout.seeds(config, split)[0]
  rows = np.flatnonzero(here.columns.candidates)
  removed = np.isin(rows, here.removed(split, seed), assume_unique=True)
  first = agreement.going_first(there.columns, block.rule, benchmarks=tuple(block.benchmarks),
                                count=int(removed.sum()))
  if block.rule == 'gap_aligned':
    theirs = ~np.isin(rows, there.keep(split, seed).rows, assume_unique=True)
  else:
    theirs = first  # these rules say how many rows are removed
  found = agreement.compare(rows, removed, theirs, first, _values(block, here.columns, rows),
                            _values(block, there.columns, rows))
  own, own_interval = _overlap(found.both, found.removed_here + found.removed_there - found.both)
  same, same_interval = _overlap(found.same_count_both, 2 * found.removed_here - found.same_count_both)
  return {'removed_here': found.removed_here, 'removed_there': found.removed_there,
          'jaccard': own, 'jaccard_interval': own_interval,
          'same_count_jaccard': same, 'same_count_interval': same_interval,
          'spearman': None if math.isnan(found.spearman) else found.spearman,
          'only_here': found.only_here, 'only_there': found.only_there,
          'rows_only_here': found.rows_only_here.tolist(), 'rows_only_there': found.rows_only_there.tolist()}


def _values(block: ConfigDict, known: columns.Columns, rows: Array) -> Array:
  """Returns what a rule decides by, the higher the sooner a row is removed, [n] float32."""
  column = known.excess if block.rule == 'gap_aligned' else known.similarity
  values = columns.highest(block.rule, column, rows, tuple(block.benchmarks), np.maximum)
  return -values if block.rule == 'far' else values


def _overlap(both: int, either: int) -> tuple[float, list[float] | None]:
  """Returns the share that two sets have in common, and its interval; none of two empty sets."""
  from clip_jax.evaluation import statistics
  if not either:
    return agreement.jaccard(both, either), None
  found = statistics.image_interval(np.arange(either) < both)
  return agreement.jaccard(both, either), [found.low, found.high]


def _say(found: dict) -> None:
  for split, rows in found['splits'].items():
    for row in rows:
      correlation = 'none' if row['spearman'] is None else f'{row["spearman"]:.2f}'
      logging.info('sensitivity, %s: %s removes %s rows, the main embedder %s; at the same count they share %.0f %% '
                   'of what either removes; rank correlation %s.', split, row['embedder'],
                   f'{row["removed_there"]:,}', f'{row["removed_here"]:,}', 100 * row['same_count_jaccard'],
                   correlation)
