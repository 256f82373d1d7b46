"""A preview of every split in seconds (prune.preview): ridge regression on frozen features. It is no CLIP training.

In: the splits' rows, the embeddings of one of config.embedders. Out: WORKDIR/splits/<split>/preview.json, the
accuracy on each benchmark. A part of the stage prune.

The rows of a split that have a class are what it is trained on: by their labels, or, where a dataset has none, by the
one class name in the caption. Features are scaled by the labelled rows of all candidates and of the anchor, the same
for every split, so that splits differ by their rows alone. Classes of a benchmark are found by their names.
"""

import os
from collections.abc import Iterator

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.evaluation import preview
from clip_jax.stages import embed
from clip_jax.stages import layout

ROWS_AT_ONCE = 16_384


def product(config: ConfigDict, workdir: str, split: str) -> Product:
  """The preview of a split; of one that is drawn for each seed, of its first draw."""
  from clip_jax.stages import prune
  theirs, home = layout.under(config, workdir, config.prune.preview)
  rows = prune.rows_product(config, workdir, split, layout.seeds(config, split)[0])
  read = [part for name in [*_base(config), *config.benchmarks] for part in embed.shard_products(theirs, home, name)]
  keys = [f'benchmarks.{name}.class_mask' for name in config.benchmarks]
  return Product(f'splits/{split}/preview', layout.pick(config, ['prune.preview', *keys]),
                 {rows.name: rows.fingerprint, **layout.inputs(workdir, home, read)})


def run(config: ConfigDict, workdir: str) -> list[Product]:
  """Previews every split, where that is asked for and not done yet. Returns its products."""
  if not config.prune.preview:
    return []
  every = {split: product(config, workdir, split) for split in config.splits}
  wanted = products.missing(workdir, list(every.values()), remake=True, redo='prune')
  if wanted:
    known = _Known(config, workdir)
    splits = [split for split in every if every[split] in wanted]
    rows = {split: known.rows(split) for split in splits}
    with progress.Bar(total=sum(map(len, rows.values())), desc='preview', unit='row') as bar:
      for split in splits:
        with products.lock(workdir, every[split].name):
          path = f'splits/{split}/preview.json'
          found = known.preview(rows[split], bar)
          files.write_json(os.path.join(workdir, path), found)
          products.finish(workdir, every[split], [path])
        _say(split, found)
  return list(every.values())


def _base(config: ConfigDict) -> list[str]:
  """Returns the datasets whose rows are numbered one after the other in splits."""
  return [name for name in (layout.POOL, layout.ANCHOR, layout.PLANTED) if name in layout.datasets(config)]


class _Known:
  """Features and classes of the base set and of the benchmarks, opened once for all splits."""

  def __init__(self, config: ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    _, home = layout.under(config, workdir, config.prune.preview)
    self._vectors = {name: layout.embeddings(home, name) for name in [*_base(config), *config.benchmarks]}
    self._starts = np.cumsum([0] + [len(self._vectors[name]) for name in _base(config)])
    names = {dataset: [preview.plain_name(name) for name in layout.class_names(config, workdir, dataset)]
             for dataset in self._vectors}
    self._names = {name: i for i, name in enumerate(dict.fromkeys(name for some in names.values() for name in some))}
    self._codes = {dataset: np.array([self._names[name] for name in some], np.int32)
                   for dataset, some in names.items()}
    self._told = {}  # dataset -> 'labels' or 'captions'
    self._class = np.concatenate([self._classes(name) for name in _base(config)])  # [rows of the base set] int32
    counted = np.flatnonzero(self._class >= 0)
    counted = counted[counted < sum(len(self._vectors[name]) for name in _base(config) if name != layout.PLANTED)]
    if not len(counted):
      raise InputError('No row of the pool or the anchor has a class, by label or by caption, so prune.preview has '
                       'nothing to learn. Give classes and label_key, or set --config.prune.preview=.')
    self._seen = np.bincount(self._class[counted], minlength=len(self._names)) > 0  # [C] bool
    self._scale = preview.fit_scale(x for x, _ in self._blocks(counted))

  def _classes(self, dataset: str) -> Array:  # [n] int32
    """Returns the class of each row that a split may have, -1 for none: by its label, else by its caption."""
    source, usable = layout.source(self._workdir, dataset), self._vectors[dataset].usable
    if dataset == layout.POOL:
      usable &= layout.candidates(self._config, self._workdir)
    if len(self._codes[dataset]) and (source.labels >= 0).any():
      self._told[dataset] = 'labels'
      return np.where(usable, self._labelled(dataset), -1)
    self._told[dataset] = 'captions'
    with_classes = [name for name in (layout.ANCHOR, layout.POOL) if len(self._codes.get(name, ()))]
    sought = {code for name in with_classes[:1] or self._config.benchmarks for code in self._codes[name].tolist()}
    rows, classes = np.flatnonzero(usable), np.full(len(source), -1, np.int32)
    classes[rows] = preview.caption_classes(map(source.caption, rows.tolist()),
                                            {name: code for name, code in self._names.items() if code in sought})
    return classes

  def _labelled(self, dataset: str) -> Array:  # [n] int32
    """Returns the class of each row by its label, -1 where it has none among the names."""
    labels, codes = layout.source(self._workdir, dataset).labels, np.append(self._codes[dataset], np.int32(-1))
    return codes[np.where((labels >= 0) & (labels < len(codes) - 1), labels, -1)]

  def rows(self, split: str) -> Array:  # [n] int64 of the base set
    seed = layout.seeds(self._config, split)[0]
    return np.load(layout.split_rows(self._config, self._workdir, split, seed))

  def _blocks(self, rows: Array) -> Iterator[tuple[Array, Array]]:
    """Yields the features [b, E] float16 and the classes [b] of some labelled rows, sorted."""
    names = _base(self._config)
    for start in range(0, len(rows), ROWS_AT_ONCE):
      part = rows[start:start + ROWS_AT_ONCE]
      cuts = np.searchsorted(part, self._starts)
      parts = [self._vectors[name].rows(part[cuts[i]:cuts[i + 1]] - self._starts[i]) for i, name in enumerate(names)]
      yield np.concatenate(parts), self._class[part]

  def preview(self, rows: Array, bar: progress.Bar) -> dict:
    """Trains on the labelled ones among some rows; returns what preview.json holds."""
    labelled = rows[self._class[rows] >= 0]
    bar.update(len(rows) - len(labelled))
    found = {}
    if len(labelled):
      def seen():
        for x, classes in self._blocks(labelled):
          yield x, classes
          bar.update(len(x))
      weights = preview.fit(seen(), self._scale, len(self._names))
      found = {name: self._accuracy(name, weights) for name in self._config.benchmarks}
    return {'kind': preview.NAME, 'embedder': self._config.prune.preview, 'features': self._vectors[layout.POOL].dim,
            'rows': len(rows), 'labelled': len(labelled), 'classes_by': self._told, 'l2': preview.L2,
            'benchmarks': found}

  def _accuracy(self, benchmark: str, weights: Array) -> dict:
    """Returns the accuracy over the images whose class has rows; an image that cannot be read is wrong."""
    from clip_jax.evaluation import statistics
    block, vectors, codes = self._config.benchmarks[benchmark], self._vectors[benchmark], self._codes[benchmark]
    truth = self._labelled(benchmark)
    images = np.flatnonzero((truth >= 0) & self._seen[truth])
    allowed = np.unique(codes[self._seen[codes]])
    if block.class_mask:
      masked = map(preview.plain_name, block.class_mask)
      allowed = np.intersect1d(allowed, [self._names[name] for name in masked if name in self._names])
    about = {'images': len(truth), 'n': len(images), 'classes': len(allowed), 'of_classes': len(codes)}
    if len(allowed) < 2 or not len(images):  # nothing to tell apart
      return about | {'n': 0, 'top1': None, 'low': None, 'high': None}
    predicted = np.concatenate([
        preview.predict(vectors.rows(images[i:i + ROWS_AT_ONCE]), self._scale, weights, allowed)
        for i in range(0, len(images), ROWS_AT_ONCE)])
    correct = (predicted == truth[images]) & vectors.usable[images]
    groups = layout.source(self._workdir, benchmark).column('group')[images] if block.group_key else None
    interval = statistics.image_interval(correct, groups)
    numbers = {'top1': interval.value, 'low': interval.low, 'high': interval.high}
    return about | {key: None if np.isnan(value) else value for key, value in numbers.items()}


def _say(split: str, found: dict) -> None:
  scores = [f'{name} {100 * one["top1"]:.1f} %' for name, one in found['benchmarks'].items()
            if one['top1'] is not None]
  logging.info('%s, %s: %s, from %s of %s rows, that have a class.', preview.NAME, split,
               ', '.join(scores) or 'nothing to score', f'{found["labelled"]:,}', f'{found["rows"]:,}')
