"""What the rules read of a work directory: columns over the pool, the queries, exact similarities near a cut."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import os

from ml_collections import ConfigDict
import numpy as np
import pyarrow as pa

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.pruning import cells
from clip_jax.pruning import columns
from clip_jax.pruning import rules
from clip_jax.stages import layout

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


class Pool:
  """The pool's columns, each read when a rule needs it, and once for all splits."""

  def __init__(self, config: ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._pool = layout.embeddings(workdir, layout.POOL)
    self._source = layout.source(workdir, layout.POOL)
    anchor = layout.embeddings(workdir, layout.ANCHOR) if layout.has_anchor(config) else None
    self._anchor = anchor
    self._anchor_rows = np.flatnonzero(anchor.usable) if anchor is not None else np.zeros(0, np.int64)
    self._base_size = len(self._pool) + (len(anchor) if anchor is not None else 0)
    self.columns = self._columns()
    if not self.columns.candidates.any():
      raise InputError('The pool has no candidate: no row is readable and kept by de-duplication.')

  def _columns(self) -> rules.Columns:
    from clip_jax.similarity import decide
    config, workdir = self._config, self._workdir
    used = sorted({name for split in config.splits.values() for name in split.benchmarks})
    recall = min(map(self._recall, used)) if config.search.backend == 'scann' and used else None
    column = lambda which: Lazy(used, lambda name: layout.search_column(workdir, name, which))
    return rules.Columns(
        tolerance=max(columns.TOLERANCE, 2 * decide.error_bound(self._pool.dim)),
        candidates=layout.candidates(config, workdir), similarity=column('similarity'), excess=column('excess'),
        exact_similarity=self._exact_similarity, exact_excess=self._exact_excess, pairs=self.pairs, recall=recall)

  @functools.cached_property
  def _matched_columns(self) -> rules.Columns:
    """The columns with those of the matched control; None for captions and sizes that no row has."""
    lengths = self._source.caption_lengths
    width, height = (np.nan_to_num(self._source.column(name).astype(np.float64)) for name in ('width', 'height'))
    pixels = (width * height).astype(np.int64)
    column = lambda which: layout.search_column(self._workdir, layout.ANCHOR_CLASSES, which)
    return dataclasses.replace(
        self.columns, anchor_class=column('nearest'), anchor_class_similarity=column('similarity'),
        caption_length=lengths if lengths.any() else None, image_pixels=pixels if pixels.any() else None,
        domain=self._domain)

  @functools.cached_property
  def _domain(self) -> Array | None:
    name = self._config.pool.domain_column
    return self._source.column(name) if name else None

  @functools.cached_property
  def _classes(self):
    """The class of each pool row by name, 'other' where it has none; None where the pool has no classes."""
    classes = layout.class_names(self._config, self._workdir, layout.POOL)
    if not classes:
      return None
    labels = self._source.labels
    codes = np.where((labels >= 0) & (labels < len(classes)), labels, len(classes)).astype(np.int32)
    return pa.DictionaryArray.from_arrays(codes, [*classes, 'other'])

  @functools.lru_cache(1)
  def _levels(self, column: str, reference: str) -> tuple[Array, list[str]]:
    """Returns the level of each pool row, [N], -1 for none, and the levels' names, for domain_removal."""
    if column:
      codes, names = cells.levels(pa.array(self._source.column(column), from_pandas=True))  # NaN: none
      return (np.where(codes == names.index(''), -1, codes) if '' in names else codes), names
    nearest = layout.search_column(self._workdir, reference, 'nearest')
    block = self._config.references[reference]
    if layout.is_prompts(self._config, reference):
      return nearest, list(block.classes)
    names = list(layout.class_names(self._config, self._workdir, reference))
    labels = np.append(layout.source(self._workdir, reference).labels, -1)  # the last: rows without a nearest
    codes = labels[nearest]
    return np.where(codes < len(names), codes, -1), names

  def pairs(self, benchmark: str, k: int) -> Iterator[columns.Pairs]:
    """Yields all pairs of a benchmark's queries and pool rows over the k-th anchor row's similarity.

    Those of some queries at a time, about PAIRS_AT_ONCE of them; each shard's file is read once for each part.
    """
    folder = os.path.join(self._workdir, 'search', benchmark)
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
        parts.append((found['query'][mine].copy(), found['row'][mine] + start, found['similarity'][mine].copy()))
      yield columns.Pairs(top, *(np.concatenate(column) for column in zip(*parts)))

  def _pair_files(self, folder: str, k: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields the first pool row of each shard, and its pairs, ordered by query and row."""
    for shard, start, _ in layout.shard_slices(self._pool.starts):
      path = os.path.join(folder, f'pairs-k{k}-{shard:05d}.npz')
      if not os.path.exists(path):
        raise InputError(f'The pool\'s shard {shard} was not searched for the pairs of {os.path.basename(folder)} '
                         f'with k={k} yet in {self._workdir}: run the stage `search` first.')
      yield start, files.read_npz(path)

  def _recall(self, benchmark: str) -> float:
    sidecar = products.read_sidecar(self._workdir, f'search/{benchmark}/queries')
    least = self._config.search.min_recall
    if sidecar['counts']['recall'] < least:
      raise InputError(f'ScaNN found {sidecar["counts"]["recall"]:.4f} of the true neighbours of {benchmark} on a '
                       f'sample, less than config.search.min_recall={least}. Raise config.search.candidates, or '
                       'use --config.search.backend=exact.')
    return sidecar['counts']['recall']

  @functools.lru_cache
  def queries(self, benchmark: str) -> tuple[Array, Array]:
    """Returns a benchmark's usable queries [q, E] float16 and their exact thresholds [q] float64."""
    embedded = layout.embeddings(self._workdir, benchmark)
    usable = embedded.usable
    found = files.read_npz(os.path.join(self._workdir, 'search', benchmark, 'queries.npz'))
    return embedded[:][usable], found['anchor_similarity_f64'][usable]

  def _exact_similarity(self, benchmarks, rows: Array) -> Array:
    from clip_jax.similarity import decide
    return self._in_blocks(rows, lambda vectors: np.max(
        [decide.exact_similarity(vectors, self.queries(name)[0]) for name in benchmarks], axis=0))

  def _exact_excess(self, benchmarks, rows: Array) -> Array:
    from clip_jax.similarity import decide
    return self._in_blocks(rows, lambda vectors: np.max(
        [decide.exact_excess(vectors, *self.queries(name)) for name in benchmarks], axis=0))

  def _in_blocks(self, rows: Array, decide) -> Array:
    parts = [decide(self._pool.rows(rows[start:start + ROWS_AT_ONCE]))
             for start in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros(0)
