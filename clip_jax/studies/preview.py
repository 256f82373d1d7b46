"""Previews every split in seconds by ridge regression on frozen features, without CLIP training.

In (prune.preview): the splits' rows, the embeddings of one of config.embedders.
Out: WORKDIR/splits/<split>/preview.json, the accuracy on each benchmark. If each seed has its own
rows, the first draw is used.

The regression trains on the rows of a split that have a class: the label or, in a dataset without
labels, the only class name in the caption. Features are scaled by the labelled rows of all
candidates and of the anchor, the same for every split, so that splits differ by their rows only.
Classes of a benchmark are matched by name.
"""

from collections.abc import Callable, Iterator
import itertools
from typing import TYPE_CHECKING

from absl import logging
import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.evaluation import ridge
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, PLANTED, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.reporting import second_looks
from clip_jax.reporting.page import Text

if TYPE_CHECKING:
  from clip_jax.stages.report.facts import Facts

ROWS_AT_ONCE = 16_384  # feature rows in memory


def products(graph: Graph) -> dict[str, list[Product]]:
  """Adds a preview of each split to the stage prune."""
  config, embedder = graph.config, graph.config.prune.preview
  if not embedder:
    return {}
  keys = blocks.pick_keys(
    config,
    ['prune.preview', *(f'benchmarks.{name}.class_mask' for name in blocks.classified(config))],
  )
  features = [
    part
    for name in (*blocks.base_datasets(config), *blocks.classified(config))
    for part in graph.embeddings(name, embedder)
  ]
  return {
    'prune': [
      Product(
        f'splits/{split}/preview',
        'preview',
        (split,),
        keys,
        (graph.rows(split, blocks.seeds(config, split)[0]), *features),
        batch='splits/preview',
        is_cheap=True,
      )
      for split in config.splits
    ]
  }


def preview_splits(x: Experiment, todo: list[Product]) -> Made:
  """Trains on the labelled rows of each split and measures accuracy on every benchmark."""
  features = _Features(x)
  rows = {
    split: files.read_npy(workdir.rows_path(x, split, blocks.seeds(x.config, split)[0]), mmap=True)
    for (split,) in (product.subject for product in todo)
  }
  with progress.Bar(total=sum(map(len, rows.values())), desc='preview', unit='row') as bar:
    for product in todo:
      (split,) = product.subject
      about = features.preview_of(rows[split], bar.update)
      files.write_json(x.path(f'{product.name}.json'), about)
      yield product, [f'{product.name}.json'], {}
      scores = [
        f'{name} {100 * score["top1"]:.1f} %'
        for name, score in about['benchmarks'].items()
        if score['top1'] is not None
      ]
      logging.debug(
        '%s, %s: %s, trained on the %s of %s rows that have a class.',
        ridge.NAME,
        split,
        ', '.join(scores) or 'no score',
        f'{about["labelled"]:,}',
        f'{about["rows"]:,}',
      )


class _Features:
  """The features and classes of the base set and of the benchmarks, opened once for all splits."""

  def __init__(self, x: Experiment):
    config, view = x.config, x.with_embedder(x.config.prune.preview)
    self._x, self._base = x, workdir.base_rows(x)
    self._vectors = {
      name: workdir.embeddings(view, name)
      for name in (*self._base.names, *blocks.classified(config))
    }
    names = {
      dataset: [ridge.plain_name(name) for name in workdir.class_names(x, dataset)]
      for dataset in self._vectors
    }
    self._number = {
      name: i for i, name in enumerate(dict.fromkeys(itertools.chain.from_iterable(names.values())))
    }
    self._codes = {
      dataset: np.array([self._number[name] for name in classes], np.int32)
      for dataset, classes in names.items()
    }
    self._classes_by: dict[str, str] = {}  # dataset -> 'labels' or 'captions'
    self._class = np.concatenate(
      [self._classes(name) for name in self._base.names]
    )  # [rows of the base set] int32
    labelled = np.flatnonzero(self._class >= 0)
    if PLANTED in self._base.names:
      labelled = labelled[labelled < self._base.dataset_starts[-2]]
    if not len(labelled):
      raise InputError(
        'No row of the pool or the anchor has a class, by label or by caption, so prune.preview '
        'cannot be trained. Give classes and label_key, or set --config.prune.preview=.'
      )
    self._has_rows = np.bincount(self._class[labelled], minlength=len(self._number)) > 0  # [C] bool
    self._scale = ridge.fit_scale(vectors for vectors, _ in self._parts(labelled))

  def _classes(self, dataset: str) -> Array:  # [n] int32
    """Returns each row's class, by label or by caption; -1 for none and for non-candidates."""
    source, usable = workdir.source(self._x, dataset), self._vectors[dataset].usable
    if dataset == POOL:
      usable &= workdir.candidates(self._x)
    if len(self._codes[dataset]) and (source.labels >= 0).any():
      self._classes_by[dataset] = 'labels'
      return np.where(usable, self._labels(dataset), -1)
    self._classes_by[dataset] = 'captions'
    with_classes = [name for name in (ANCHOR, POOL) if len(self._codes.get(name, ()))]
    wanted = {
      code
      for name in with_classes[:1] or blocks.classified(self._x.config)
      for code in self._codes[name].tolist()
    }
    rows, classes = np.flatnonzero(usable), np.full(len(source), -1, np.int32)
    classes[rows] = ridge.caption_classes(
      map(source.caption, rows.tolist()),
      {name: code for name, code in self._number.items() if code in wanted},
    )
    return classes

  def _labels(self, dataset: str) -> Array:  # [n] int32
    """Returns each row's class by its label, -1 if the label has no class name."""
    labels, codes = (
      workdir.source(self._x, dataset).labels,
      np.append(self._codes[dataset], np.int32(-1)),
    )
    return codes[np.where((labels >= 0) & (labels < len(codes) - 1), labels, -1)]

  def _parts(self, rows: Array) -> Iterator[tuple[Array, Array]]:
    """Yields the features [b, E] float16 and classes [b] of sorted, labelled base set rows."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
      part = rows[start : start + ROWS_AT_ONCE]
      vectors = [
        self._vectors[name].rows(own) for name, own in self._base.rows_by_dataset(part).items()
      ]
      yield np.concatenate(vectors), self._class[part]

  def preview_of(self, rows: Array, on_rows: Callable[[int], None]) -> dict:
    """Trains on the labelled ones of a split's rows; returns the contents of preview.json."""
    labelled, scores = rows[self._class[rows] >= 0], {}
    on_rows(len(rows) - len(labelled))

    def counted() -> Iterator[tuple[Array, Array]]:
      for vectors, classes in self._parts(labelled):
        yield vectors, classes
        on_rows(len(vectors))

    if len(labelled):
      weights = ridge.fit(counted(), self._scale, len(self._number))
      scores = {name: self._accuracy(name, weights) for name in blocks.classified(self._x.config)}
    return {
      'kind': ridge.NAME,
      'embedder': self._x.config.prune.preview,
      'features': self._vectors[POOL].dim,
      'rows': len(rows),
      'labelled': len(labelled),
      'classes_by': self._classes_by,
      'l2': ridge.L2,
      'benchmarks': scores,
    }

  def _accuracy(self, benchmark: str, weights: Array) -> dict:
    """Returns the accuracy on the images whose class has training rows.

    Unreadable images count as wrong.
    """
    from clip_jax.evaluation import statistics  # imports SciPy

    block, vectors, codes = (
      self._x.config.benchmarks[benchmark],
      self._vectors[benchmark],
      self._codes[benchmark],
    )
    truth = self._labels(benchmark)
    images = np.flatnonzero((truth >= 0) & self._has_rows[truth])
    allowed = np.unique(codes[self._has_rows[codes]])
    if block.class_mask:
      masked = map(ridge.plain_name, block.class_mask)
      allowed = np.intersect1d(
        allowed, [self._number[name] for name in masked if name in self._number]
      )
    about = {
      'images': len(truth),
      'n': len(images),
      'classes': len(allowed),
      'of_classes': len(codes),
    }
    if len(allowed) < 2 or not len(images):  # accuracy needs two classes
      return about | {'n': 0} | dict.fromkeys(('top1', 'low', 'high', 'groups', 'df'))
    predicted = np.concatenate(
      [
        ridge.predict(vectors.rows(images[i : i + ROWS_AT_ONCE]), self._scale, weights, allowed)
        for i in range(0, len(images), ROWS_AT_ONCE)
      ]
    )
    correct = (predicted == truth[images]) & vectors.usable[images]
    groups = workdir.groups(self._x, benchmark)
    interval = statistics.image_interval(correct, None if groups is None else groups[images])
    numbers = {
      'top1': interval.value,
      'low': interval.low,
      'high': interval.high,
      'groups': interval.groups,
      'df': interval.df,
    }
    return about | {key: value if np.isfinite(value) else None for key, value in numbers.items()}


def section(facts: 'Facts') -> tuple[str, str, str, list] | None:
  """Returns the section on the ridge preview of every split."""
  config = facts.x.config
  if not config.prune.preview or not config.splits:
    return None
  previews = {
    split: about
    for split in config.splits
    if (about := workdir.read_json(facts.x, 'splits', split, 'preview.json'))
  }
  page_blocks = second_looks.preview_blocks(previews) or [
    facts.missing('The splits have no preview.', 'prune')
  ]
  missing = [split for split in config.splits if split not in previews]
  if previews and missing:
    page_blocks.append(Text(f'Splits without a preview: {progress.join_names(missing)}.', 'muted'))
  left_out = [name for name in config.benchmarks if name not in blocks.classified(config)]
  if left_out:
    page_blocks.append(
      Text(f'Left out, because retrieval has no classes: {progress.join_names(left_out)}.', 'muted')
    )
  return 'preview', second_looks.PREVIEW_TITLE, 'Preview', page_blocks


MAKERS = {'preview': preview_splits}
