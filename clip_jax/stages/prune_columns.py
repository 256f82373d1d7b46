"""What the rules read of a work directory: columns over the pool, the queries, exact similarities
near a cut.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import os

import numpy as np
import pyarrow as pa

from clip_jax.core import files, products
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, ANCHOR_CLASSES, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import cells, columns, rules
from clip_jax.similarity import decide

ROWS_AT_ONCE = 65_536  # vectors that are read from the pool at a time
PAIRS_AT_ONCE = 1 << 24  # that the rule k_aligned decides at a time


class Lazy(Mapping):
  """A mapping whose values are read when they are asked for, once."""

  def __init__(self, names: Iterable[str], read: Callable[[str], Array]):
    self._names, self._read = tuple(names), functools.cache(read)

  def __getitem__(self, name: str) -> Array:
    if name not in self._names:
      raise KeyError(name)
    return self._read(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class PoolColumns:
  """The pool's columns as the experiment's embedder sees it, each read when a rule needs it, and
  once.

  candidates: [N] bool, where they are not those of this embedder: a comparison of embedders has the
  same for all.
  """

  def __init__(self, x: Experiment, candidates: Array | None = None):
    self.x = x
    self.pool, self.source = workdir.embeddings(x, POOL), workdir.source(x, POOL)
    self.anchor = workdir.embeddings(x, ANCHOR) if blocks.has_anchor(x.config) else None
    self.columns = self._columns(workdir.candidates(x) if candidates is None else candidates)
    if not self.columns.candidates.any():
      raise InputError('The pool has no candidate: no row is readable and kept by de-duplication.')

  def _columns(self, candidates: Array) -> rules.Columns:
    config = self.x.config
    used = sorted({name for split in config.splits.values() for name in split.benchmarks})
    recall = min(map(self._recall, used)) if config.search.backend == 'scann' and used else None
    column = lambda which: Lazy(used, lambda name: workdir.search_column(self.x, name, which))
    return rules.Columns(
      tolerance=max(columns.TOLERANCE, 2 * decide.error_bound(self.pool.dim)),
      candidates=candidates,
      similarity=column('similarity'),
      excess=column('excess'),
      exact_similarity=self._exact_similarity,
      exact_excess=self._exact_excess,
      pairs=self.pairs,
      recall=recall,
    )

  @functools.cached_property
  def matched_columns(self) -> rules.Columns:
    """The columns with those of the matched control; None for captions and sizes that no row
    has.
    """
    lengths = self.source.caption_lengths
    width, height = (
      np.nan_to_num(self.source.column(name).astype(np.float64)) for name in ('width', 'height')
    )
    pixels = (width * height).astype(np.int64)
    column = lambda which: workdir.search_column(self.x, ANCHOR_CLASSES, which)
    return dataclasses.replace(
      self.columns,
      anchor_class=column('nearest'),
      anchor_class_similarity=column('similarity'),
      caption_length=lengths if lengths.any() else None,
      image_pixels=pixels if pixels.any() else None,
      domain=self.domain,
    )

  @functools.cached_property
  def domain(self) -> Array | None:
    name = self.x.config.pool.domain_column
    return self.source.column(name) if name else None

  @functools.cached_property
  def classes(self):
    """The class of each pool row by name, 'other' where it has none; None where the pool has no
    classes.
    """
    classes = workdir.class_names(self.x, POOL)
    if not classes:
      return None
    labels = self.source.labels
    codes = np.where((labels >= 0) & (labels < len(classes)), labels, len(classes)).astype(np.int32)
    return pa.DictionaryArray.from_arrays(codes, [*classes, 'other'])

  @functools.lru_cache(1)  # noqa: B019 (both live as long as the stage)
  def levels(self, column: str, reference: str) -> tuple[Array, list[str]]:
    """Returns the level of each pool row, [N], -1 for none, and the levels' names, for
    domain_removal.
    """
    if column:
      codes, names = cells.levels(
        pa.array(self.source.column(column), from_pandas=True)
      )  # NaN: none
      return (np.where(codes == names.index(''), -1, codes) if '' in names else codes), names
    nearest = workdir.search_column(self.x, reference, 'nearest')
    if blocks.is_prompts(self.x.config, reference):
      return nearest, list(self.x.config.references[reference].classes)
    names = list(workdir.class_names(self.x, reference))
    labels = np.append(
      workdir.source(self.x, reference).labels, -1
    )  # the last: rows without a nearest
    codes = labels[nearest]
    return np.where(codes < len(names), codes, -1), names

  def pairs(self, benchmark: str, k: int) -> Iterator[columns.Pairs]:
    """Yields all pairs of a benchmark's queries and pool rows over the k-th anchor row's
    similarity.

    Those of some queries at a time, about PAIRS_AT_ONCE of them; each shard's file is read once for
    each part.
    """
    folder = os.path.dirname(workdir.queries_path(self.x, benchmark))
    top = files.read_npz(os.path.join(folder, f'anchor-k{k}.npz'))['similarity']
    counts = np.zeros(len(top), np.int64)
    for _, found in self._pair_files(folder, k):
      counts += np.bincount(found['query'], minlength=len(top))
    last = np.cumsum(counts) // PAIRS_AT_ONCE  # the part of each query
    for part in np.unique(last[counts > 0]):
      lo, hi = np.searchsorted(last, (part, part + 1))
      parts = []
      for start, found in self._pair_files(folder, k):
        mine = slice(*np.searchsorted(found['query'], (lo, hi)))
        parts.append(
          (
            found['query'][mine].copy(),
            found['row'][mine] + start,
            found['similarity'][mine].copy(),
          )
        )
      yield columns.Pairs(top, *(np.concatenate(column) for column in zip(*parts)))

  def _pair_files(self, folder: str, k: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields the first pool row of each shard, and its pairs, ordered by query and row."""
    for shard, start, _ in workdir.shard_slices(self.pool.starts):
      path = os.path.join(folder, f'pairs-k{k}-{shard:05d}.npz')
      if not os.path.exists(path):
        raise InputError(
          f"The pool's shard {shard} was not searched for the pairs of {os.path.basename(folder)} "
          f'with k={k} yet in {self.x.workdir}: run the stage `search` first.'
        )
      yield start, files.read_npz(path)

  def _recall(self, benchmark: str) -> float:
    recall = products.counts(self.x.workdir, self.x.graph.queries(benchmark, self.x.embedder).name)[
      'recall'
    ]
    least = self.x.config.search.min_recall
    if recall < least:
      raise InputError(
        f'ScaNN found {recall:.4f} of the true neighbours of {benchmark} on a '
        f'sample, less than config.search.min_recall={least}. Raise config.search.candidates, or '
        'use --config.search.backend=exact.'
      )
    return recall

  def _exact_similarity(self, benchmarks, rows: Array) -> Array:
    return self._in_blocks(
      rows,
      lambda vectors: np.max(
        [
          decide.exact_similarity(vectors, workdir.thresholds(self.x, name)[0])
          for name in benchmarks
        ],
        axis=0,
      ),
    )

  def _exact_excess(self, benchmarks, rows: Array) -> Array:
    return self._in_blocks(
      rows,
      lambda vectors: np.max(
        [decide.exact_excess(vectors, *workdir.thresholds(self.x, name)) for name in benchmarks],
        axis=0,
      ),
    )

  def _in_blocks(self, rows: Array, decide) -> Array:
    parts = [
      decide(self.pool.rows(rows[start : start + ROWS_AT_ONCE]))
      for start in range(0, len(rows), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
