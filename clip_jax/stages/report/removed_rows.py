"""The report's section "Removed rows": pictures, captions, classes and domains of dropped rows.

In: rows.npy and split.json, the search's columns, and a sample of the pool's images and captions.
"""

from typing import Any

import numpy as np

from clip_jax.core.types import Array
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.reporting import gallery, page, removed, tables, words
from clip_jax.reporting.page import Text
from clip_jax.stages.report import contrasts
from clip_jax.stages.report.facts import Facts

WORD_SAMPLE = 2000  # captions compared, of removed and of kept rows each
NOTES = {  # column that a rule removes by -> the note below the pictures
  'excess': 'Excess: largest value over queries of the image\u2019s similarity to the query minus '
  'the similarity of the query\u2019s nearest anchor image.',
  'similarity': 'Similarity: to the nearest query.',
}


def section(facts: Facts) -> list:
  """Returns the removed rows of every split whose rule selects rows by their properties."""
  config = facts.config
  names = [name for name in config.splits if blocks.rule_of(config, name).selects]
  place = lambda name: (config.splits[name].embedder, frozenset(config.splits[name].benchmarks))
  aligned_to = {place(n) for n in contrasts.aligned(config) if not config.splits[n].dose}
  without = facts.pictures.missing_images_sentence(POOL)
  shown: list = [Text(without)] if names and without else []
  for name in names:
    if name not in facts.splits:
      shown.append(facts.missing(f'Split {name} is not drawn yet.', 'prune'))
      continue
    about, block = facts.splits[name], config.splits[name]
    controls = {
      other: control
      for other, control in facts.splits.items()
      if config.splits[other].rule == 'matched' and config.splits[other].to == name
    }
    parts = removed.blocks_of(
      about,
      name=name,
      words=contrasts.words_of(config, name),
      controls=controls,
      **_samples(facts, name),
    )
    # The points of a dose curve resemble each other, so they are collapsed.
    if block.dose and (block.dose != 1 or place(name) in aligned_to):
      parts = [
        page.Details(
          f'{name}: {about["dropped"]:,} of {about["candidates"]:,} candidates', tuple(parts)
        )
      ]
    shown += parts
  return shown


def _samples(facts: Facts, split: str) -> dict[str, Any]:
  """Returns pictures and words of a split's removed and kept rows; None if files are missing."""
  rows = facts.pool_rows(split)
  if facts.candidates is None or rows is None:
    return {'gallery': None, 'captions': None}
  is_kept = np.zeros(len(facts.candidates), bool)
  is_kept[rows] = True
  gone, kept = np.flatnonzero(facts.candidates & ~is_kept), np.flatnonzero(is_kept)
  of_gone, of_kept = (facts.pictures.captions(sample, WORD_SAMPLE) for sample in (gone, kept))
  captions = (
    {
      'removed': words.distinctive_words(of_gone, of_kept),
      'kept': words.distinctive_words(of_kept, of_gone),
      'read_removed': len(of_gone),
      'read_kept': len(of_kept),
    }
    if of_gone and of_kept
    else None
  )
  has_pictures = facts.pictures.has(POOL) and len(gone)
  return {
    'gallery': _gallery(facts, split, gone, kept) if has_pictures else None,
    'captions': captions,
  }


def _gallery(facts: Facts, split: str, gone: Array, kept: Array) -> gallery.Gallery:
  """Returns strips of rows: removed ones of high, middle and low values, and kept ones.

  Values are those of the rule's column; without one, rows are evenly spaced over the pool.
  """
  rule, count = blocks.rule_of(facts.config, split), facts.config.report.removed_images
  values = _values(facts, split)
  if values is None:
    strips = [
      (f'{title}, sampled evenly over the pool', gallery.pick_evenly(rows, count))
      for title, rows in (('removed', gone), ('kept', kept))
    ]
    lines = _levels(facts, split, np.concatenate([rows for _, rows in strips]))
  else:
    order = -values if rule.lowest_first else values
    thirds = gallery.pick_thirds(order[gone], 3 * count)
    border = _highest(order[kept], len(thirds[0]))
    strips = list(zip(rule.strips, [*(gone[third] for third in thirds), kept[border]]))
    written = tables.similarity if rule.column == 'similarity' else tables.signed
    lines = [written(float(values[row]), 4) for _, rows in strips for row in rows]
  line = iter(lines)
  shown = [
    facts.pictures.strip(title, rows, [next(line) for _ in rows])
    for title, rows in strips
    if len(rows)
  ]
  return gallery.Gallery('', tuple(shown), '' if values is None else NOTES[rule.column])


def _highest(values: Array, count: int) -> Array:  # [n] -> [count] positions, from high to low
  """Returns the positions of the highest values; non-finite values (not scored) are left out."""
  values = np.where(np.isfinite(values), values, -np.inf)
  chosen = (
    np.argpartition(-values, count - 1)[:count]
    if 0 < count < len(values)
    else np.arange(len(values))[:count]
  )
  chosen = chosen[np.lexsort((chosen, -values[chosen]))]
  return chosen[np.isfinite(values[chosen])]


def _values(facts: Facts, split: str) -> Array | None:  # [N]
  """Returns the column that a rule removes by; None without such a column or before the search."""
  column, x = blocks.rule_of(facts.config, split).column, facts.x.for_split(split)
  targets = blocks.split_targets(facts.config, split)
  if not column or not all(workdir.is_searched(x, target) for target in targets):
    return None
  return np.fmax.reduce([workdir.search_column(x, target, column) for target in targets])


def _levels(facts: Facts, split: str, rows: Array) -> list[str]:  # [n]
  """Returns the line below each row's picture: its value in the column, or its reference class."""
  x, block = facts.x, facts.config.splits[split]
  has_levels = 'levels' in blocks.rule_of(facts.config, split).needs
  if has_levels and block.column:
    return [
      '' if value is None else str(value)
      for value in workdir.source(x, POOL).column(block.column)[rows]
    ]
  if not has_levels or not workdir.is_searched(x, block.reference):
    return [''] * len(rows)
  nearest, similarity = (
    workdir.search_column(x, block.reference, name)[rows] for name in ('nearest', 'similarity')
  )
  if blocks.is_prompts(x.config, block.reference):
    names, labels = tuple(x.config.references[block.reference].classes), nearest
  else:
    names, labels = (
      workdir.class_names(x, block.reference),
      workdir.source(x, block.reference).labels[nearest],
    )
  named = [names[label] if 0 <= label < len(names) else 'other' for label in labels]
  return [
    f'{name} {tables.similarity(float(value))}' if near >= 0 else ''
    for name, value, near in zip(named, similarity, nearest)
  ]
