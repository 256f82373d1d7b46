"""The results of a work directory as pyarrow tables, without its config."""

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.core import files, mirror
from clip_jax.core.errors import InputError
from clip_jax.data import table
from clip_jax.experiment.blocks import POOL

SPLIT = (
  'rule',
  'embedder',
  'candidates',
  'pool_rows',
  'anchor_rows',
  'planted_rows',
  'dropped',
  'append_anchor',
  'seed',
  'hash',
)  # keys of split.json that are columns
RESULT = (
  'n',
  'classes',
  'top1',
  'top1_low',
  'top1_high',
  'top5',
  'mean_per_class',
  'unreadable',
  'groups',
  'df',
)  # keys of a result that are columns
# Column -> measure of retrieval: 'image_to_text_recall_1' -> 'image-to-text recall@1'.
RECALLS = {
  f'{direction.replace("-", "_")}_recall_{k}': f'{direction} recall@{k}'
  for direction in ('image-to-text', 'text-to-image')
  for k in (1, 5, 10)
}
ENDS = ('', '_low', '_high')  # a value, and the ends of its interval
FEW_SHOT = {f'few_shot_{shots}': str(shots) for shots in (1, 5, 10, 25)}  # column -> shots


class Tables:
  """The tables of a work directory; each is read when it is asked for."""

  def __init__(self, workdir: str):
    self._workdir, self._name = workdir, mirror.in_words(workdir)
    if not files.exists(os.path.join(workdir, 'config.json')):
      raise InputError(f'{self._name} is no work directory: it has no config.json.')

  def __repr__(self) -> str:
    names = ', '.join(self.benchmarks) or 'none'
    return f'<clip_jax results {self._name}; benchmarks: {names}>'

  @property
  def config(self) -> dict:
    """The resolved config of the last command, as a plain dict."""
    return files.read_json(self._path('config.json'))

  @property
  def benchmarks(self) -> list[str]:
    """The names of the benchmarks in the config."""
    return list(self.config['benchmarks'])

  @property
  def splits(self) -> pa.Table:
    """One row for each finished split; `parameters` is JSON."""
    lines = []
    for name in self.config['splits']:
      if files.exists(path := self._path('splits', name, 'split.json')):
        about = files.read_json(path)
        lines.append(
          {'split': name}
          | {key: about.get(key) for key in SPLIT}
          | {'parameters': json.dumps(about['parameters'])}
        )
    return _table(lines, ('split', *SPLIT, 'parameters'))

  @property
  def results(self) -> pa.Table:
    """One row for each evaluated split, seed and benchmark; proportions in 0..1.

    Columns are keys of the results' JSON files (docs/files.md), and, each followed by the lower and
    upper end of its interval (`_low`, `_high`): `image_to_text_recall_1` to
    `text_to_image_recall_10` for retrieval, `few_shot_1` to `few_shot_25` for the few-shot probe
    with so many training images a class. They are null for benchmarks without that measure.
    """
    lines = []
    for split in self.config['splits']:
      for seed in _seeds(self._path('evaluate', split)):
        for benchmark in self.benchmarks:
          path = self._path('evaluate', split, f'seed{seed}', f'{benchmark}.json')
          if files.exists(path):
            scores = files.read_json(path)
            lines.append(
              {'split': split, 'seed': seed, 'benchmark': benchmark}
              | {key: scores.get(key) for key in RESULT}
              | _further_scores(scores)
            )
    return _table(lines, ('split', 'seed', 'benchmark', *RESULT, *_further_scores({})))

  def search(self, benchmark: str) -> pa.Table:
    """One row for each pool row: row, key, similarity, nearest (query), nearest_key, excess."""
    folder = self._path('search', self._known(benchmark))
    shards = [name for name in files.names(folder) if name.startswith('pool-') and name[-1] == 'z']
    if not shards:
      raise InputError(f'{benchmark} is not searched yet in {self._name}.')
    arrays = [files.read_npz(os.path.join(folder, name)) for name in shards]
    joined = {
      key: np.concatenate([part[key] for part in arrays])
      for key in ('similarity', 'nearest', 'excess')
    }
    keys = self._keys(POOL, len(shards))
    queries = self._keys(benchmark)
    nearest = pa.array(joined['nearest'], mask=joined['nearest'] < 0)
    return pa.table(
      {
        'row': np.arange(len(keys)),
        'key': keys,
        'similarity': joined['similarity'],
        'nearest': joined['nearest'],
        'nearest_key': queries.take(nearest),
        'excess': joined['excess'],
      }
    )

  def duplicates(self, benchmark: str) -> pa.Table:
    """The pairs of a query and a pool row that count as duplicates (docs/files.md)."""
    path = self._path('search', self._known(benchmark), 'duplicates.parquet')
    if not files.exists(path):
      raise InputError(f'{self._name} has no list of duplicates of {benchmark} yet.')
    return pq.read_table(files.local(path))

  def _known(self, benchmark: str) -> str:
    if benchmark not in self.benchmarks:
      raise InputError(
        f'{self._name} has no benchmark {benchmark!r}. It has: {", ".join(self.benchmarks)}.'
      )
    return benchmark

  def _keys(self, dataset: str, shards: int = 0) -> pa.Array:
    """Returns the keys of a dataset's rows, of its first shards (0: of all)."""
    folder = self._path('ingest', dataset)
    shards = shards or sum(
      name.startswith('index-') and name.endswith('.parquet') for name in files.names(folder)
    )
    parts = [table.read_columns(folder, shard, ['key'])['key'] for shard in range(shards)]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())

  def _path(self, *parts: str) -> str:
    return os.path.join(self._workdir, *parts)


def _further_scores(scores: dict) -> dict[str, float | None]:
  """Returns column -> value of the recalls and few-shot accuracies of a result; None if absent."""
  measures = {column: scores.get('recalls', {}).get(name) for column, name in RECALLS.items()}
  found = {
    column + end: measure and measure[end.removeprefix('_') or 'value']
    for column, measure in measures.items()
    for end in ENDS
  }
  probes = {column: scores.get('few_shot', {}).get(shots) for column, shots in FEW_SHOT.items()}
  return found | {
    column + end: probe and probe['top1' + end] for column, probe in probes.items() for end in ENDS
  }


def _table(lines: list[dict[str, Any]], columns: tuple[str, ...]) -> pa.Table:
  if not lines:
    return pa.table({name: pa.array([], pa.null()) for name in columns})
  return pa.Table.from_pylist(lines)


def _seeds(folder: str) -> list[int]:
  return sorted(
    int(name.removeprefix('seed')) for name in files.names(folder) if name.startswith('seed')
  )
