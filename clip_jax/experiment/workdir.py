"""What stages read of a work directory: the only place, beside the graph's names, that spells its
paths.

Functions open what is there; `is_*` tell whether it is, for the report, which reads what is
finished. Everything that an embedder makes is that of the experiment's own embedder.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import os
import zipfile

from etils import epath
import numpy as np

from clip_jax.core import files, products
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import reader, views
from clip_jax.data.embeddings import Embeddings
from clip_jax.experiment import blocks, graph
from clip_jax.experiment.base_rows import BaseRows
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment

LOCATIONS = 'files.json'  # in an index: where source files are on this machine; in no fingerprint


@dataclasses.dataclass(frozen=True)
class QueryResult:
  """queries.npz: what the search found for each query of a benchmark; NaN and -1 for those not
  searched.
  """

  anchor_similarity: Array  # [Q] float32: t_i, to the nearest anchor image; NaN without an anchor
  anchor_nearest: Array  # [Q] int64: that image's index in the anchor
  pool_similarity: Array  # [Q, k] float32, most similar first
  pool_nearest: Array  # [Q, k] int64: pool rows
  anchor_similarity_f64: Array  # [Q] float64: t_i, exact

  def nearest(self, dataset: str) -> tuple[Array, Array]:
    """Returns the similarity [Q] to the nearest row of the pool or the anchor, and that row [Q]."""
    if dataset == ANCHOR:
      return self.anchor_similarity, self.anchor_nearest
    return self.pool_similarity[:, 0], self.pool_nearest[:, 0]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """search/sizes.npz: how many candidates are over each threshold, of each benchmark and, last, of
  all together.
  """

  edges: Array  # [M] float64: the thresholds
  similarity_over: Array  # [G + 1, M] int64
  excess_over: Array  # [G + 1, M] int64
  excess_zero: Array  # [G + 1] int64: those that aligning drops, exact
  has_excess: Array  # bool: False without an anchor, where the two above hold zeros
  candidates: Array  # int64
  benchmarks: Array  # [G] names
  rows: Array  # int64: of the pool


def index_folder(x: Experiment, dataset: str) -> str:
  return x.path('ingest', dataset)


def is_ingested(x: Experiment, dataset: str) -> bool:
  """Returns whether a dataset has its whole row table."""
  return all(
    os.path.exists(os.path.join(index_folder(x, dataset), name))
    for name in ('table.npy', LOCATIONS)
  )


def source(x: Experiment, dataset: str) -> reader.Source:
  """Opens a dataset that was ingested: a Grain random access source of its samples."""
  if not is_ingested(x, dataset):
    raise InputError(
      f'{dataset} was not ingested yet in {x.workdir}: run without --stages, or add `ingest` to '
      'them.'
    )
  return x.once(f'source {dataset}', lambda: reader.Source(index_folder(x, dataset)))


def base_source(x: Experiment, planted: bool = False) -> views.Concatenation:
  """Opens the base set: the pool's rows, the anchor's, and with `planted` those of the planted
  copies.
  """
  return views.Concatenation([source(x, name) for name in _base_names(x, planted)])


def base_rows(x: Experiment, planted: bool = True) -> BaseRows:
  """Returns where each dataset's rows begin in the base set."""
  names = _base_names(x, planted)
  return BaseRows(tuple(names), tuple(len(source(x, name)) for name in names))


def _base_names(x: Experiment, planted: bool) -> list[str]:
  return [name for name in blocks.trained(x.config) if planted or name != blocks.PLANTED]


def class_names(x: Experiment, dataset: str) -> tuple[str, ...]:
  """Returns a dataset's class names in label order: the config's, else those found at ingest."""
  return tuple(blocks.datasets(x.config)[dataset].classes) or tuple(source(x, dataset).classes)


def vector_dims(x: Experiment, dataset: str) -> dict[int, int]:
  """Returns shard -> E of those shards of an indexed dataset that are vectors, but for empty
  ones.
  """
  dims = {
    shard: products.counts(x.workdir, x.graph.index_shards(dataset)[shard].name).get('dim', 0)
    for shard in x.graph.vector_shards(dataset)
  }
  return {shard: dim for shard, dim in dims.items() if dim}


def shard_slices(starts: Array) -> Iterator[tuple[int, int, int]]:  # [shards + 1]
  """Yields (shard, first row, row after the last)."""
  for shard in range(len(starts) - 1):
    yield shard, int(starts[shard]), int(starts[shard + 1])


def embeddings_path(x: Experiment, dataset: str, shard: int) -> str:
  return x.home('embeddings', dataset, f'{shard:05d}.npy')


def is_embedded(x: Experiment, dataset: str) -> bool:
  """Returns whether every shard of an ingested dataset has its embeddings."""
  return is_ingested(x, dataset) and all(
    os.path.exists(embeddings_path(x, dataset, shard))
    for shard in range(len(source(x, dataset).starts) - 1)
  )


def embeddings(x: Experiment, dataset: str) -> Embeddings:
  """Opens a dataset's embeddings. Raises InputError where a shard is missing."""
  if not is_embedded(x, dataset):
    raise InputError(
      f'{dataset} is not wholly embedded in {x.workdir}: run the stage `embed` first.'
    )
  folder = os.path.dirname(embeddings_path(x, dataset, 0))
  return x.once(
    f'embeddings {dataset}', lambda: Embeddings(folder, len(source(x, dataset).starts) - 1)
  )


def in_anchor(x: Experiment) -> Array:  # [N] bool
  """Returns which pool rows are the same sample (file and offset) as an anchor row."""
  pool = source(x, POOL)
  return (
    pool.same_samples(source(x, ANCHOR))
    if blocks.has_anchor(x.config)
    else np.zeros(len(pool), bool)
  )


def keep_path(x: Experiment) -> str:
  return x.path('dedup', 'keep.npy')


def has_candidates(x: Experiment) -> bool:
  """Returns whether it is known which pool rows may be in a split."""
  return is_embedded(x, POOL) and (not x.config.dedup.enabled or os.path.exists(keep_path(x)))


def candidates(x: Experiment) -> Array:  # [N] bool
  """Returns which pool rows may be in a split: usable, kept by de-duplication, and not an anchor
  row too.
  """
  mask = embeddings(x, POOL).usable & ~in_anchor(x)
  return mask & np.load(keep_path(x)) if x.config.dedup.enabled else mask


def dedup_audit(x: Experiment) -> dict:
  """Returns what de-duplication overlooks, {} where that was not counted."""
  return read_json(x, 'dedup', 'audit.json')


def search_path(x: Experiment, target: str, shard: int) -> str:
  return x.home('search', target, f'pool-{shard:05d}.npz')


def is_searched(x: Experiment, target: str) -> bool:
  """Returns whether every pool shard was searched with a target."""
  return is_ingested(x, POOL) and all(
    os.path.exists(search_path(x, target, shard))
    for shard in range(len(source(x, POOL).starts) - 1)
  )


def search_arrays(x: Experiment, target: str, shard: int, names: Sequence[str]) -> list[Array]:
  """Returns some arrays of a shard's search; only they are read."""
  path = search_path(x, target, shard)
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return [arrays[name] for name in names]
  except FileNotFoundError:
    raise InputError(
      f"The pool's shard {shard} was not searched with {target} yet in {x.workdir}: run the stage "
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
  return x.home('search', benchmark, 'queries.npz')


def query_result(x: Experiment, benchmark: str) -> QueryResult | None:
  """Returns what the search found for a benchmark's queries, None before the search."""
  path = queries_path(x, benchmark)
  return QueryResult(**files.read_npz(path)) if os.path.exists(path) else None


def thresholds(x: Experiment, benchmark: str) -> tuple[Array, Array]:
  """Returns a benchmark's usable queries [q, E] float16 and their exact thresholds [q] float64."""

  def read():
    embedded = embeddings(x, benchmark)
    usable = embedded.usable
    return embedded[:][usable], files.read_npz(queries_path(x, benchmark))['anchor_similarity_f64'][
      usable
    ]

  return x.once(f'thresholds {benchmark}', read)


def cosine(
  x: Experiment,
  benchmark: str,
  dataset: str,
  similarity: Array,  # [Q] of the stored vectors
  nearest: Array,  # [Q] int64
) -> Array:
  """Returns the similarities divided by both stored vectors' norms, [Q], NaN where there is none.

  A float16 vector's norm is off by up to 1e-3, which would blur a duplicate threshold.
  """
  out = np.full(len(similarity), np.nan)
  has = np.flatnonzero(np.isfinite(similarity) & (nearest >= 0))
  query = embeddings(x, benchmark).rows(has).astype(np.float64)
  other = embeddings(x, dataset).rows(nearest[has]).astype(np.float64)
  out[has] = similarity[has] / (np.linalg.norm(query, axis=1) * np.linalg.norm(other, axis=1))
  return out


def sizes(x: Experiment) -> Sizes | None:
  """Returns how many candidates the rules would drop, None before that is counted."""
  path = x.path('search', f'{blocks.SIZES}.npz')
  return Sizes(**files.read_npz(path)) if os.path.exists(path) else None


def truncation(x: Experiment, benchmark: str) -> dict:
  """Returns what the published truncation misses of a benchmark, {} where that was not counted."""
  return read_json(x, 'search', benchmark, 'paper.json')


def rows_path(x: Experiment, split: str, seed: int) -> str:
  """Returns the path of the rows on which (split, seed) trains."""
  return x.path(graph.rows_name(x.config, split, seed) + '.npy')


def pool_rows(x: Experiment, split: str, seed: int) -> Array:
  """Returns the pool rows among those of (split, seed), sorted."""
  rows = np.load(rows_path(x, split, seed))
  return rows[: np.searchsorted(rows, len(source(x, POOL)))]


def split_path(x: Experiment, split: str, name: str) -> str:
  """Returns the path of a file of a split: split.json, queries-<benchmark>.npz."""
  return x.path('splits', split, name)


def split_json(x: Experiment, split: str) -> dict:
  """Returns what is known of a split, {} before it is made."""
  return read_json(x, 'splits', split, 'split.json')


def split_queries(x: Experiment, split: str, benchmark: str) -> dict[str, Array] | None:
  """Returns how many rows that an aligned split removed are near each query (-1: not searched),
  None before that.
  """
  path = split_path(x, split, f'queries-{benchmark}.npz')
  return files.read_npz(path) if os.path.exists(path) else None


def run_folder(split: str, seed: int) -> str:
  return f'train/{split}/seed{seed}'


def metrics_path(x: Experiment, split: str, seed: int) -> str:
  return x.path(run_folder(split, seed), 'metrics.jsonl')


def result_path(x: Experiment, split: str, seed: int, benchmark: str, ending: str) -> str:
  return x.path('evaluate', split, f'seed{seed}', benchmark + ending)


def result(
  x: Experiment, split: str, seed: int, benchmark: str
) -> tuple[dict, dict[str, Array]] | None:
  """Returns the scores of a run on a benchmark, and its answer for every image; None before it is
  evaluated.
  """
  scores, arrays = (result_path(x, split, seed, benchmark, ending) for ending in ('.json', '.npz'))
  is_evaluated = os.path.exists(scores) and os.path.exists(arrays)
  return (files.read_json(scores), files.read_npz(arrays)) if is_evaluated else None


def skipped(x: Experiment, dataset: str) -> list[dict]:
  """Returns the samples of a dataset that became no row: key and reason of each."""
  paths = sorted(epath.Path(index_folder(x, dataset)).glob('skipped-*.json'))
  return [sample for path in paths for sample in files.read_json(path)]


def embedder_json(x: Experiment) -> dict:
  """Returns what the embedder is, {} before it is made."""
  return read_json(x, 'embedder', 'embedder.json')


def versions(x: Experiment) -> dict:
  """Returns the packages and devices of the last start, {} before there is one."""
  return read_json(x, 'versions.json')


def times(x: Experiment) -> dict:
  """Returns the command of the last start, and the seconds of each stage in all starts; {} before a
  stage ends.
  """
  return read_json(x, 'times.json')


def read_json(x: Experiment, *parts: str) -> dict:
  """Returns a JSON file of the work directory, {} where it is not there."""
  path = x.path(*parts)
  return files.read_json(path) if os.path.exists(path) else {}


def finished(x: Experiment) -> dict[str, str]:
  """Returns the fingerprints of all finished products by name."""
  return {name: sidecar['fingerprint'] for name, sidecar in products.sidecars(x.workdir).items()}
