"""Reads the inputs of the rules from a work directory.

They are columns over the pool, the queries, and exact similarities near a threshold.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import os
import re

from absl import logging
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_jax.core import files, products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.data import table
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, ANCHOR_CLASSES, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import captions, columns, rules
from clip_jax.similarity import decide, kmeans, pairs
from clip_jax.stages import check_keys, domains, prune_clusters

ROWS_AT_ONCE = 65_536  # vectors read from the pool at once
COLUMNS_HELD = 2  # of 4 bytes a row; with many benchmarks, all columns would fill the memory
PAIRS_AT_ONCE = 1 << 24  # pairs that the rule k_aligned decides at once


class Lazy(Mapping):
  """A mapping that reads each value at its first use, and holds the last few."""

  def __init__(self, names: Iterable[str], read: Callable[[str], Array]):
    self._names, self._read = tuple(names), functools.lru_cache(COLUMNS_HELD)(read)

  def __getitem__(self, name: str) -> Array:
    if name not in self._names:
      raise KeyError(name)
    return self._read(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class PoolColumns:
  """The pool's columns for the experiment's embedder, each read once, when a rule needs it.

  candidates: [N] bool; None for the embedder's own. A comparison of embedders uses the same
  candidates for all.
  """

  def __init__(self, x: Experiment, candidates: Array | None = None):
    self.x = x
    self.main = x.with_embedder('')  # whose references and clusters are the domains
    self.pool, self.source = workdir.embeddings(x, POOL), workdir.source(x, POOL)
    self.anchor = workdir.embeddings(x, ANCHOR) if blocks.has_anchor(x.config) else None
    self.columns = self._columns(workdir.candidates(x) if candidates is None else candidates)
    if not self.columns.candidates.any():
      raise InputError(prune_clusters.NO_CANDIDATE)

  def _columns(self, candidates: Array) -> rules.Columns:
    config = self.x.config
    used = sorted(blocks.rule_targets(config, self.x.embedder))
    recall = min(map(self._recall, used)) if config.search.backend == 'scann' and used else None
    column = lambda which: Lazy(used, lambda name: workdir.search_column(self.x, name, which))
    return rules.Columns(
      tolerance=max(columns.TOLERANCE, 2 * decide.error_bound(self.pool.dim)),
      candidates=candidates,
      similarity=column('similarity'),
      excess=column('excess'),
      exact_similarity=self._exact_similarity,
      exact_excess=self._exact_excess,
      reaches=self._reaches,
      pairs=self.pairs,
      recall=recall,
    )

  @functools.cached_property
  def matched_columns(self) -> rules.Columns:
    """The columns plus those of the matched control; None for a column without any value."""
    lengths, pixels = columns.narrow(self.source.caption_lengths), self._image_pixels()
    column = lambda which: workdir.search_column(self.x, ANCHOR_CLASSES, which)
    return dataclasses.replace(
      self.columns,
      anchor_class=columns.narrow(column('nearest')),
      anchor_class_similarity=column('similarity'),
      caption_length=lengths if lengths.any() else None,
      image_pixels=pixels if pixels.any() else None,
      caption_names_class=self.caption_names_class if lengths.any() else None,
      domain=self.domain,
    )

  def _image_pixels(self) -> Array:
    """Returns the width times height of each pool row's image, [N] int32, or int64 if needed."""
    parts, folder = [np.zeros(0, np.int32)], workdir.index_folder(self.x, POOL)
    for shard in range(len(self.source.starts) - 1):
      index = table.read_columns(folder, shard, ['width', 'height'])
      width, height = (
        np.nan_to_num(index[name].to_numpy().astype(np.float64)) for name in ('width', 'height')
      )
      pixels = (width * height).astype(np.int64)
      is_small = pixels.max(initial=0) < 2**31
      parts.append(pixels.astype(np.int32) if is_small else pixels)
    return np.concatenate(parts)

  @functools.cached_property
  def domain(self):
    """Each pool row's domain, null where it has none; None if no domain is known."""
    levels = domains.levels_of(self.main, POOL)
    if levels is None:
      return None
    codes, names = levels
    codes = columns.narrow(codes, len(names))  # one more is the level of rows without a domain
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names)

  @functools.cached_property
  def caption_names_class(self) -> Array | None:
    """Whether each pool row's caption names its nearest anchor class, [N] bool.

    None if the anchor's classes have no names, or only wnids or numbers.
    """
    names = workdir.class_names(self.x, ANCHOR)
    if not names or check_keys.are_codes(names):
      return None
    nearest = workdir.search_column(self.x, ANCHOR_CLASSES, 'nearest')
    parts, folder = [np.zeros(0, bool)], workdir.index_folder(self.x, POOL)
    for shard, start, stop in workdir.shard_slices(self.source.starts):
      texts = table.read_columns(folder, shard, ['caption'])['caption'].to_pylist()
      parts.append(captions.name_their_class(texts, nearest[start:stop], names))
    return np.concatenate(parts)

  @functools.cached_property
  def classes(self):
    """Each pool row's class name, 'other' for unlabelled rows; None for a pool without classes."""
    classes = workdir.class_names(self.x, POOL)
    if not classes:
      return None
    labels = self.source.labels
    codes = np.where((labels >= 0) & (labels < len(classes)), labels, len(classes)).astype(np.int32)
    return pa.DictionaryArray.from_arrays(codes, [*classes, 'other'])

  @functools.lru_cache(1)  # noqa: B019 (both live as long as the stage)
  def levels(self, column: str, reference: str) -> tuple[Array, list[str]]:
    """Returns the domain or class of each pool row, a number into the names, and the names.

    The numbers are [N]; -1 for none.
    """
    return domains.pool_levels(self.main, column, reference)

  def numbers(self, column: str) -> Array:
    """Returns a numeric column of the pool, [N] float64; NaN for rows without a value."""
    if column == blocks.IMAGE_TEXT:
      paths = (workdir.image_text_path(self.x, i) for i in range(len(self.pool.starts) - 1))
      return np.concatenate([files.read_npy(path) for path in paths], dtype=np.float64)
    values = self.source.column(column)
    if values.dtype.kind not in 'iufb':
      example = next((value for value in values if value is not None), None)
      raise InputError(
        f'The column {column!r} of the pool holds {example!r}, which is no number. The rule '
        "'column' needs a column of numbers."
      )
    return values.astype(np.float64, copy=False)

  def captions_with(self, words: tuple[str, ...]) -> Array:
    """Returns whether each pool row's caption has one of the words as whole words, [N] bool."""
    listed = '|'.join(re.escape(word.strip()) for word in words)
    pattern = rf'(?:^|[^\pL\pN_])(?:{listed})(?:[^\pL\pN_]|$)'
    parts, folder = [np.zeros(0, bool)], workdir.index_folder(self.x, POOL)
    for shard in range(len(self.source.starts) - 1):
      captions = table.read_columns(folder, shard, ['caption'])['caption']
      matches = pc.match_substring_regex(captions, pattern, ignore_case=True)
      parts.append(matches.fill_null(False).to_numpy().astype(bool))
    return np.concatenate(parts)

  def clusters_of(self, split: str) -> tuple[Array, Array]:
    """Returns the cluster of each candidate, [N] int32, and of each reference image, [R] int32.

    Other rows of the pool hold -1; reference images without a usable vector are left out.
    """
    block, name = self.x.config.splits[split], blocks.cluster_reference(self.x.config, split)
    reference = workdir.embeddings(self.x, name)
    if not reference.usable.any():
      raise InputError(
        f'config.splits.{split}: no image of {name} has a usable vector, so none chooses a '
        'cluster. Check why its samples could not be read.'
      )
    candidates = int(self.columns.candidates.sum())
    if block.clusters > candidates:
      raise ConfigError(
        f'config.splits.{split}.clusters={block.clusters:,} is more than the {candidates:,} '
        'candidates of the pool. Give fewer clusters.'
      )
    if name in self.x.config.benchmarks:
      logging.warning(
        'split %s: test images of %s choose its clusters. Accuracy on %s is then no result on '
        'unseen data.',
        split,
        name,
        name,
      )
    centers, assignment = self._clusters(block.clusters, block.seed)
    nearest = kmeans.assign(reference, reference.usable, centers, name=name)
    return assignment, nearest[reference.usable]

  @functools.lru_cache  # noqa: B019 (both live as long as the stage)
  def _clusters(self, clusters: int, seed: int) -> tuple[Array, Array]:
    return prune_clusters.fit(self.pool, self.columns.candidates, clusters, seed)

  def pairs(self, target: str, k: int) -> Iterator[columns.Pairs]:
    """Yields all pairs of a query and a pool row nearer than the query's k-th anchor row.

    The queries are those of the target. Each part holds all pairs of some queries, about
    PAIRS_AT_ONCE pairs, and reads the files of all shards.
    """
    folder = os.path.dirname(workdir.queries_path(self.x, blocks.benchmark_of(target)))
    counted = workdir.queries_in(self.x, target)
    top = files.read_npz(os.path.join(folder, f'anchor-k{k}.npz'))['similarity']
    counts = np.zeros(len(top), np.int64)
    for _, arrays in self._pair_files(folder, k):
      counts += np.bincount(arrays['query'], minlength=len(top))
    part_of_query = np.cumsum(counts) // PAIRS_AT_ONCE
    for part in np.unique(part_of_query[counts > 0]):
      lo, hi = np.searchsorted(part_of_query, (part, part + 1))
      parts = []
      for start, arrays in self._pair_files(folder, k):
        span = slice(*np.searchsorted(arrays['query'], (lo, hi)))
        parts.append(
          (
            arrays['query'][span].copy(),
            arrays['row'][span] + start,
            arrays['similarity'][span].copy(),
          )
        )
      query, row, similarity = (np.concatenate(column) for column in zip(*parts))
      keep = counted[query]
      yield columns.Pairs(top, query[keep], row[keep], similarity[keep])

  def _pair_files(self, folder: str, k: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields for each shard its first pool row and its pairs, ordered by query and row."""
    for shard, start, _ in workdir.shard_slices(self.pool.starts):
      path = os.path.join(folder, f'pairs-k{k}-{shard:05d}.npz')
      if not files.exists(path):
        raise InputError(
          f'{self.x.workdir} has no pairs of pool shard {shard} with {os.path.basename(folder)} '
          f'for k={k}. Run the stage `search` first.'
        )
      yield start, files.read_npz(path)

  def _recall(self, target: str) -> float:
    """Returns ScaNN's recall for a benchmark; raises InputError below config.search.min_recall."""
    benchmark = blocks.benchmark_of(target)
    recall = products.counts(self.x.workdir, self.x.graph.queries(benchmark, self.x.embedder).name)[
      'recall'
    ]
    least = self.x.config.search.min_recall
    if recall < least:
      raise InputError(
        f'The recall of ScaNN for {benchmark}, on sampled queries, is {recall:.4f}, less than '
        f'config.search.min_recall={least}. Raise config.search.candidates, or use '
        '--config.search.backend=exact.'
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

  def _reaches(self, benchmarks, rows: Array, similarity: float) -> Array:
    reached = np.zeros(len(self.pool), bool)
    for name in benchmarks:
      queries = workdir.embeddings(self.x, name)
      vectors = queries[:][queries.usable]
      for _, row, _ in pairs.similar_pairs(
        self.pool, rows, vectors, similarity, name='embeddings/pool'
      ):
        reached[row] = True
    return reached[rows]

  def _exact_excess(self, benchmarks, rows: Array) -> Array:
    return self._in_blocks(
      rows,
      lambda vectors: np.max(
        [decide.exact_excess(vectors, *workdir.thresholds(self.x, name)) for name in benchmarks],
        axis=0,
      ),
    )

  def _in_blocks(self, rows: Array, compute) -> Array:
    parts = [
      compute(self.pool.rows(rows[start : start + ROWS_AT_ONCE]))
      for start in range(0, len(rows), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
