"""The report's section "What was removed": pictures, captions, classes and domains of the rows that splits drop.

In: rows.npy and split.json, the search's columns, the pool's images and captions, of which a sample is read.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from clip_jax.core.types import Array
from clip_jax.pruning import rules
from clip_jax.reporting import gallery
from clip_jax.reporting import page
from clip_jax.reporting import removed
from clip_jax.reporting import tables
from clip_jax.reporting import words
from clip_jax.reporting.page import Text
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_images
from clip_jax.stages import report_statistics
from clip_jax.stages.report_facts import Facts

WORD_SAMPLE = 2000  # captions of removed, and of kept, rows whose words are compared
EXCESS = 'Excess: how much nearer the image is to some query than any anchor image is to that query.'
SIMILARITY = 'Similarity: to the nearest query.'
# Rule -> the titles of the strips: of the removed rows the first, the median and the last, then the kept rows.
STRIPS = {
    'gap_aligned': ('removed, largest excess', 'removed, median', 'removed, just over the cut',
                    'kept, just under the cut'),
    'k_aligned': ('removed, largest excess', 'removed, median', 'removed, smallest excess', 'kept, largest excess'),
    'near': ('removed, most similar', 'removed, median', 'removed, just over the cut', 'kept, just under the cut'),
    'far': ('removed, least similar', 'removed, median', 'removed, just under the cut', 'kept, just over the cut')}
COMPOSED = ('union', 'intersection', 'minus')


def blocks(facts: Facts) -> list:
  """Returns what every split removed whose rule picks rows for what they are."""
  config, found = facts.config, []
  shown = [name for name in config.splits if rules.RULES[config.splits[name].rule].selects]
  pictures = report_images.Pictures(config, facts.workdir)
  aligned_to = {frozenset(config.splits[name].benchmarks) for name in report_statistics.aligned(config)
                if not config.splits[name].dose}
  if without := pictures.without(layout.POOL) if shown else '':
    found.append(Text(without))
  for name in shown:
    if name not in facts.abouts:
      found.append(facts.missing(f'{name} was not made yet.', 'prune'))
      continue
    controls = {other: about for other, about in facts.abouts.items()
                if config.splits[other].rule == 'matched' and config.splits[other].to == name}
    about = facts.abouts[name]
    said = removed.blocks_of(about, name=name, words=report_statistics.rule_words(config, name),
                             controls=controls, **_samples(facts, pictures, name))
    block = config.splits[name]  # the points of a dose curve are much alike
    folded = block.dose and (block.dose != 1 or frozenset(block.benchmarks) in aligned_to)
    found += [page.Details(f'{name}: {about["dropped"]:,} of {about["candidates"]:,} candidates', tuple(said))
              ] if folded else said
  return found


def _samples(facts: Facts, pictures: report_images.Pictures, split: str) -> dict[str, Any]:
  """Returns the pictures and the words of a split's removed and kept rows; None where files are gone."""
  rows = report_data.pool_rows(facts.config, facts.workdir, split)
  if facts.candidates is None or rows is None:
    return {'gallery': None, 'captions': None}
  is_kept = np.zeros(len(pictures.source(layout.POOL)), bool)
  is_kept[rows] = True
  gone, kept = np.flatnonzero(facts.candidates & ~is_kept), np.flatnonzero(is_kept)
  shown = _gallery(facts, pictures, split, gone, kept) if pictures.has(layout.POOL) and len(gone) else None
  return {'gallery': shown, 'captions': _captions(pictures, gone, kept)}


def _captions(pictures: report_images.Pictures, gone: Array, kept: Array) -> dict[str, Any] | None:
  here, there = (pictures.captions(rows, WORD_SAMPLE) for rows in (gone, kept))
  if not here or not there:
    return None
  return {'removed': words.telling_words(here, there), 'kept': words.telling_words(there, here),
          'read_removed': len(here), 'read_kept': len(there)}


def _gallery(facts: Facts, pictures: report_images.Pictures, split: str, gone: Array, kept: Array) -> gallery.Gallery:
  """Returns strips of one size: removed rows at both ends and the middle of what the rule looks at, and kept ones."""
  rule, count = facts.config.splits[split].rule, facts.config.report.removed_images
  values = _values(facts, split)
  if values is None:
    line = _levels(facts, pictures, split)
    strips = [(f'{what}, evenly over the pool', gallery.pick_evenly(rows, count))
              for what, rows in (('removed', gone), ('kept', kept))]
    lines = [[line(int(row)) for row in rows] for _, rows in strips]
    note = ''
  else:
    sign = -1 if rule == 'far' else 1
    thirds = gallery.pick_thirds(sign * values[gone], 3 * count)
    border = _highest(sign * values[kept], len(thirds[0]))
    strips = list(zip(STRIPS[rule], [*(gone[third] for third in thirds), kept[border]]))
    written = tables.similarity if rule in ('near', 'far') else tables.signed
    lines = [[written(float(values[row]), 4) for row in rows] for _, rows in strips]
    note = SIMILARITY if rule in ('near', 'far') else EXCESS
  shown = [pictures.strip(title, rows, below) for (title, rows), below in zip(strips, lines) if len(rows)]
  return gallery.Gallery('', tuple(shown), note)


def _highest(values: Array, count: int) -> Array:  # [n] -> [count] positions, from high to low
  """Returns the positions of the highest values; those without one (not scored) are left out."""
  values = np.where(np.isfinite(values), values, -np.inf)
  chosen = np.argpartition(-values, count - 1)[:count] if 0 < count < len(values) else np.arange(len(values))[:count]
  chosen = chosen[np.lexsort((chosen, -values[chosen]))]
  return chosen[np.isfinite(values[chosen])]


def _values(facts: Facts, split: str) -> Array | None:  # [N]
  """Returns what a rule looks at, excess or similarity; None for rules on something else, and before the search."""
  block = facts.config.splits[split]
  if block.rule not in STRIPS or not all(report_data.is_searched(facts.workdir, b) for b in block.benchmarks):
    return None
  which = 'similarity' if block.rule in ('near', 'far') else 'excess'
  return np.fmax.reduce([layout.search_column(facts.workdir, name, which) for name in block.benchmarks])


def _levels(facts: Facts, pictures: report_images.Pictures, split: str) -> Callable[[int], str]:
  """Returns what stands below a row's picture: its value in the column, or its class by the reference."""
  config, block = facts.config, facts.config.splits[split]
  if block.rule != 'domain_removal':
    return lambda row: ''
  if block.column:
    column = pictures.source(layout.POOL).column(block.column)
    return lambda row: str(column[row]) if column[row] is not None else ''
  if not report_data.is_searched(facts.workdir, block.reference):
    return lambda row: ''
  nearest = layout.search_column(facts.workdir, block.reference, 'nearest')
  similarity = layout.search_column(facts.workdir, block.reference, 'similarity')
  if layout.is_prompts(config, block.reference):
    names, labels = tuple(config.references[block.reference].classes), None
  else:
    names = layout.class_names(config, facts.workdir, block.reference)
    labels = pictures.source(block.reference).labels

  def line(row: int) -> str:
    if nearest[row] < 0:
      return ''
    label = int(nearest[row] if labels is None else labels[nearest[row]])
    name = names[label] if 0 <= label < len(names) else 'other'
    return f'{name} {tables.similarity(float(similarity[row]))}'
  return line
