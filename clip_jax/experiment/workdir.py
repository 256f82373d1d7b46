"""Reads the files of a work directory.

Only this file, graph.py and result_tables.py know its paths.

x: the experiment; products of an embedder are those of x.embedder. The functions is_* and has_*
return whether files exist: the report shows only what is finished.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import os
from typing import Any
import zipfile

import numpy as np

from clip_jax.core import files, products
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import reader, row_rules, table, views
from clip_jax.data.embeddings import Embeddings
from clip_jax.experiment import blocks, graph
from clip_jax.experiment.base_rows import BaseRows
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment

LOCATIONS = 'files.json'  # in an index: paths of the source files on this machine, not a product


@dataclasses.dataclass(frozen=True)
class QueryResult:
  """queries.npz: the search results of each query of a benchmark; NaN and -1 if not searched."""

  anchor_similarity: Array  # [Q] float32: t_i, to the nearest anchor row; NaN without an anchor
  anchor_nearest: Array  # [Q] int64: that anchor row
  pool_similarity: Array  # [Q, k] float32, most similar first
  pool_nearest: Array  # [Q, k] int64: pool rows
  anchor_similarity_f64: Array  # [Q] float64: t_i, exact
  key: Array | None = None  # [Q] str; None in files of an older version

  def among(self, which: Array) -> 'QueryResult':  # which: [Q] bool
    """Returns the results of some queries."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return dataclasses.replace(
      self, **{name: value[which] for name, value in values.items() if value is not None}
    )

  def nearest(self, dataset: str) -> tuple[Array, Array]:
    """Returns the similarity [Q] to the nearest row of the pool or the anchor, and that row [Q]."""
    if dataset == ANCHOR:
      return self.anchor_similarity, self.anchor_nearest
    return self.pool_similarity[:, 0], self.pool_nearest[:, 0]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """search/sizes.npz: candidates over each of M thresholds, by benchmark; the last row is all."""

  edges: Array  # [M] float64: the thresholds
  similarity_over: Array  # [G + 1, M] int64: candidates with similarity over the threshold
  excess_over: Array  # [G + 1, M] int64: candidates with excess over the threshold
  excess_zero: Array  # [G + 1] int64: candidates with excess > 0, which gap_aligned drops; exact
  has_excess: Array  # bool: False without an anchor; then the two arrays above are zero
  candidates: Array  # int64: number of candidates
  benchmarks: Array  # [G] names
  rows: Array  # int64: number of pool rows


def cache_folder(x: Experiment) -> str:
  """Returns the local folder of copies of remote files, and of temporary files."""
  return os.path.abspath(os.path.expanduser(x.config.cache_dir or x.path('cache')))


def index_folder(x: Experiment, dataset: str) -> str:
  return x.path('ingest', dataset)


def is_ingested(x: Experiment, dataset: str) -> bool:
  """Returns whether the index of a dataset is complete."""
  return all(
    files.exists(os.path.join(index_folder(x, dataset), name)) for name in ('table.npy', LOCATIONS)
  )


def source(x: Experiment, dataset: str) -> reader.Source:
  """Opens an ingested dataset as a source of samples (core/types.py, Source)."""
  if not is_ingested(x, dataset):
    raise InputError(
      f'{dataset} is not ingested yet in {x.workdir}. Run without --stages, or add `ingest` to '
      '--stages.'
    )
  return x.cached(f'source {dataset}', lambda: reader.Source(index_folder(x, dataset)))


def base_source(x: Experiment, planted: bool = False) -> views.Concatenation:
  """Opens the base set: pool, anchor and, with `planted`, the planted copies."""
  return views.Concatenation([source(x, name) for name in _base_names(x, planted)])


def base_rows(x: Experiment, planted: bool = True) -> BaseRows:
  """Returns the datasets of the base set and where their rows begin."""
  names = _base_names(x, planted)
  return BaseRows(tuple(names), tuple(len(source(x, name)) for name in names))


def _base_names(x: Experiment, planted: bool) -> list[str]:
  return [name for name in blocks.base_datasets(x.config) if planted or name != blocks.PLANTED]


def keys(x: Experiment, dataset: str) -> Array:  # [n] str
  """Returns the keys of a dataset's rows."""
  return np.array(source(x, dataset).column('key'), np.str_)


def groups(x: Experiment, benchmark: str) -> Array | None:  # [n] str
  """Returns the group of every image of a benchmark; None if every image is its own group."""
  block = x.config.benchmarks[benchmark]
  return source(x, benchmark).column('group') if block.group_key or block.group_pattern else None


def class_names(x: Experiment, dataset: str) -> tuple[str, ...]:
  """Returns a dataset's class names in label order: from the config, else from its index."""
  given = blocks.given_classes(blocks.datasets(x.config)[dataset])
  return given or tuple(source(x, dataset).classes)


def vector_dims(x: Experiment, dataset: str) -> dict[int, int]:
  """Returns shard -> E for the nonempty shards of an indexed dataset that are vectors."""
  dims = {
    shard: products.counts(x.workdir, x.graph.index_shards(dataset)[shard].name).get('dim', 0)
    for shard in x.graph.vector_shards(dataset)
  }
  return {shard: dim for shard, dim in dims.items() if dim}


def shard_slices(starts: Array) -> Iterator[tuple[int, int, int]]:  # [shards + 1]
  """Yields (shard, first row, row after the last)."""
  for shard in range(len(starts) - 1):
    yield shard, int(starts[shard]), int(starts[shard + 1])


def rows_by_shard(
  x: Experiment,
  dataset: str,
  rows: Array,  # [n] int64, sorted
) -> Iterator[tuple[int, int, int, Array]]:
  """Yields (shard, its first row, its number of rows, the `rows` inside it, counted from 0)."""
  if not len(rows):
    return
  starts = source(x, dataset).starts
  low, high = np.searchsorted(starts, rows[[0, -1]], side='right')
  for shard in range(int(low) - 1, int(high)):
    start, stop = starts[shard : shard + 2].tolist()
    first, last = np.searchsorted(rows, (start, stop))
    if last > first:
      yield shard, start, stop - start, rows[first:last] - start


def sample_table(
  x: Experiment,
  dataset: str,
  rows: Array,  # [n] int64, sorted
  columns: Sequence[str] = ('key', 'caption'),
) -> Any:
  """Returns a pyarrow table of rows: columns of their index, and `file`, the source file.

  `file` is relative to the dataset's path, as the index's stamps name it. Shards without a column
  hold null.
  """
  import pyarrow as pa

  sources, parts = x.graph.shards(dataset), []
  for shard, _, _, own in rows_by_shard(x, dataset, rows):
    index = table.read_columns(index_folder(x, dataset), shard, [*columns, 'path']).take(own)
    name = sources[shard].prefix + sources[shard].files[0].name if sources[shard].files else ''
    file = index['path'] if 'path' in index.column_names else pa.repeat(name, len(own))
    parts.append(
      pa.table(
        {name: index[name] for name in columns if name in index.column_names} | {'file': file}
      )
    )
  empty = pa.table({name: pa.array([], pa.string()) for name in (*columns, 'file')})
  return pa.concat_tables([empty, *parts], promote_options='default') if parts else empty


def embeddings_path(x: Experiment, dataset: str, shard: int) -> str:
  return x.embedder_path('embeddings', dataset, f'{shard:05d}.npy')


def image_text_path(x: Experiment, shard: int) -> str:
  """Returns the path of the image-text similarities [n] float32 of a pool shard."""
  return x.path('embeddings', POOL, f'image-text-{shard:05d}.npy')


def is_embedded(x: Experiment, dataset: str) -> bool:
  """Returns whether every shard of an ingested dataset has its embeddings."""
  return is_ingested(x, dataset) and all(
    files.exists(embeddings_path(x, dataset, shard))
    for shard in range(len(source(x, dataset).starts) - 1)
  )


def embeddings(x: Experiment, dataset: str) -> Embeddings:
  """Opens the embeddings of a dataset. Raises InputError if a shard is missing."""
  if not is_embedded(x, dataset):
    raise InputError(
      f'The embeddings of {dataset} in {x.workdir} are incomplete. Run the stage `embed` first.'
    )
  folder = os.path.dirname(embeddings_path(x, dataset, 0))
  return x.cached(
    f'embeddings {dataset}', lambda: Embeddings(folder, len(source(x, dataset).starts) - 1)
  )


def in_anchor(x: Experiment) -> Array:  # [N] bool
  """Returns which pool rows are also anchor rows: same file and offset."""
  pool = source(x, POOL)
  if not blocks.has_anchor(x.config):
    return np.zeros(len(pool), bool)
  return pool.same_samples(source(x, ANCHOR))


def keep_path(x: Experiment) -> str:
  return x.path('dedup', 'keep.npy')


def has_candidates(x: Experiment) -> bool:
  """Returns whether `candidates` can be computed: the pool is embedded and de-duplicated."""
  return is_embedded(x, POOL) and (not x.config.dedup.enabled or files.exists(keep_path(x)))


def candidates(x: Experiment) -> Array:  # [N] bool
  """Returns which pool rows may be in a split: usable, kept by de-duplication, no anchor row."""
  mask = embeddings(x, POOL).usable & ~in_anchor(x)
  return mask & files.read_npy(keep_path(x)) if x.config.dedup.enabled else mask


def dedup_audit(x: Experiment) -> dict:
  """Returns the de-duplication audit (duplicates that clustering misses), {} if there is none."""
  return read_json(x, 'dedup', 'audit.json')


def search_path(x: Experiment, target: str, shard: int) -> str:
  return x.embedder_path('search', target, f'pool-{shard:05d}.npz')


def is_searched(x: Experiment, target: str) -> bool:
  """Returns whether all pool shards have search results for a target."""
  return is_ingested(x, POOL) and all(
    files.exists(search_path(x, target, shard)) for shard in range(len(source(x, POOL).starts) - 1)
  )


def search_arrays(x: Experiment, target: str, shard: int, names: Sequence[str]) -> list[Array]:
  """Returns the named arrays of a search shard; the others are not read."""
  path = search_path(x, target, shard)
  try:
    with np.load(files.local(path), allow_pickle=False) as arrays:
      return [arrays[name] for name in names]
  except FileNotFoundError:
    raise InputError(
      f'Pool shard {shard} has no search results for {target} in {x.workdir}. Run the stage '
      '`search` first.'
    ) from None
  except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(
      f'{path} cannot be read ({error}). Make it again with --redo=search:{target}.'
    ) from error


def search_column(x: Experiment, target: str, column: str) -> Array:  # [N]
  """Returns one column of the search over all pool rows: similarity, nearest or excess."""
  shards = range(len(source(x, POOL).starts) - 1)
  return np.concatenate([search_arrays(x, target, shard, [column])[0] for shard in shards])


def queries_path(x: Experiment, benchmark: str) -> str:
  return x.embedder_path('search', benchmark, 'queries.npz')


def query_result(x: Experiment, benchmark: str) -> QueryResult | None:
  """Returns the search results of a benchmark's queries, None before the search."""
  path = queries_path(x, benchmark)
  return QueryResult(**files.read_npz(path)) if files.exists(path) else None


def thresholds(x: Experiment, target: str) -> tuple[Array, Array]:
  """Returns the usable queries [q, E] float16 of a target, and their exact thresholds [q] float64.

  target: a benchmark, or a range of its queries.
  """

  def read():
    benchmark = blocks.benchmark_of(target)
    vectors = embeddings(x, benchmark)
    exact = files.read_npz(queries_path(x, benchmark))['anchor_similarity_f64']
    counted = vectors.usable & queries_in(x, target)
    return vectors[:][counted], exact[counted]

  return x.cached(f'thresholds {target}', read)


def queries_in(x: Experiment, target: str) -> Array:  # [Q] bool
  """Returns which queries of a benchmark a target holds; whole groups, drawn by a hash of each."""
  benchmark, span = blocks.benchmark_of(target), blocks.query_range(target)
  if span == (0, 1):
    return np.ones(len(source(x, benchmark)), bool)
  groups = source(x, benchmark).column('group')
  is_counted = {group: row_rules.counts_for_pruning(group, span) for group in set(groups)}
  return np.array([is_counted[group] for group in groups], bool)


def cosine(
  x: Experiment,
  benchmark: str,
  dataset: str,
  similarity: Array,  # [Q] dot products of the stored vectors
  nearest: Array,  # [Q] int64, rows of the dataset
) -> Array:
  """Returns cosine similarities [Q] float64 between queries and rows; NaN where there is none.

  The dot products are divided by both norms: a norm in float16 is off by up to 1e-3, which would
  shift a duplicate threshold.
  """
  result = np.full(len(similarity), np.nan)
  valid = np.flatnonzero(np.isfinite(similarity) & (nearest >= 0))
  query = embeddings(x, benchmark).rows(valid).astype(np.float64)
  row = embeddings(x, dataset).rows(nearest[valid]).astype(np.float64)
  result[valid] = similarity[valid] / (np.linalg.norm(query, axis=1) * np.linalg.norm(row, axis=1))
  return result


def duplicates_path(x: Experiment, benchmark: str) -> str:
  """Returns the path of the list of a benchmark's duplicates in the pool."""
  return x.path('search', benchmark, 'duplicates.parquet')


def has_duplicate(x: Experiment, benchmark: str, kind: str = '') -> Array | None:  # [Q] bool
  """Returns which queries have a duplicate in the pool; None before the list is made.

  kind: 'exact' for these only.
  """
  import pyarrow.parquet as pq

  if not files.exists(duplicates_path(x, benchmark)):
    return None
  mask = np.zeros(len(source(x, benchmark)), bool)
  with pq.ParquetFile(files.local(duplicates_path(x, benchmark))) as stored:
    for batch in stored.iter_batches(columns=['query_row', 'kind']):
      rows = batch['query_row'].to_numpy()
      mask[rows[batch['kind'].to_numpy(zero_copy_only=False) == kind] if kind else rows] = True
  return mask


def threshold_counts(x: Experiment) -> Sizes | None:
  """Returns the counts of candidates over each threshold, None before they are counted."""
  path = x.path('search', f'{blocks.SIZES}.npz')
  return Sizes(**files.read_npz(path)) if files.exists(path) else None


def truncation(x: Experiment, benchmark: str) -> dict:
  """Returns what the published truncation misses for a benchmark, {} if that was not counted."""
  return read_json(x, 'search', benchmark, 'paper.json')


def rows_path(x: Experiment, split: str, seed: int) -> str:
  """Returns the path of the rows on which (split, seed) trains."""
  return x.path(graph.rows_name(x.config, split, seed) + '.npy')


def pool_rows(x: Experiment, split: str, seed: int) -> Array:
  """Returns the pool rows on which (split, seed) trains, sorted [n] int64, memory-mapped."""
  rows = files.read_npy(rows_path(x, split, seed), mmap=True)
  return rows[: np.searchsorted(rows, len(source(x, POOL)))]


def split_path(x: Experiment, split: str, name: str) -> str:
  """Returns the path of a file of a split: split.json, queries-<benchmark>.npz."""
  return x.path('splits', split, name)


def split_json(x: Experiment, split: str) -> dict:
  """Returns the split.json of a split, {} before it is made."""
  return read_json(x, 'splits', split, 'split.json')


def split_queries(x: Experiment, split: str, benchmark: str) -> dict[str, Array] | None:
  """Returns the counts [Q] of rows that an aligned split removed around each query.

  removed_over: over the query's threshold; removed_near: near it or over. -1: query not searched.
  Returns None before the split is made.
  """
  path = split_path(x, split, f'queries-{benchmark}.npz')
  return files.read_npz(path) if files.exists(path) else None


def run_folder(split: str, seed: int) -> str:
  return f'train/{split}/seed{seed}'


def metrics_path(x: Experiment, split: str, seed: int) -> str:
  return x.path(run_folder(split, seed), 'metrics.jsonl')


def result_path(x: Experiment, split: str, seed: int, benchmark: str, ending: str) -> str:
  return x.path('evaluate', split, f'seed{seed}', benchmark + ending)


def result(
  x: Experiment, split: str, seed: int, benchmark: str
) -> tuple[dict, dict[str, Array]] | None:
  """Returns the scores of a run on a benchmark and its predictions; None before the evaluation."""
  scores, arrays = (result_path(x, split, seed, benchmark, ending) for ending in ('.json', '.npz'))
  is_evaluated = files.exists(scores) and files.exists(arrays)
  return (files.read_json(scores), files.read_npz(arrays)) if is_evaluated else None


def skipped_samples(x: Experiment, dataset: str) -> list[dict]:
  """Returns the skipped samples of a dataset, each with its key and reason."""
  folder = index_folder(x, dataset)
  paths = [os.path.join(folder, name) for name in files.matching(folder, 'skipped-*.json')]
  return [sample for path in paths for sample in files.read_json(path)]


def embedder_json(x: Experiment) -> dict:
  """Returns the description of the embedder, {} before it is made."""
  path = x.embedder_path('embedder', 'embedder.json')
  return files.read_json(path) if files.exists(path) else {}


def versions(x: Experiment) -> dict:
  """Returns the packages and devices of the last command, {} before the first."""
  return read_json(x, 'versions.json')


def stage_seconds(x: Experiment) -> dict:
  """Returns the last command, and the seconds of each stage over all commands; {} if none ran."""
  return read_json(x, 'times.json')


def read_json(x: Experiment, *parts: str) -> dict:
  """Returns a JSON file of the work directory, {} if it does not exist."""
  path = x.path(*parts)
  return files.read_json(path) if files.exists(path) else {}


def finished_fingerprints(x: Experiment) -> dict[str, str]:
  """Returns the fingerprints of all finished products by name."""
  return {name: sidecar['fingerprint'] for name, sidecar in products.sidecars(x.workdir).items()}
