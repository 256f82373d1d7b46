"""Where things lie in a work directory, and how they are opened: the one place that spells its paths."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES = 'pool', 'anchor', 'glyphs', 'anchor_classes'
RESERVED = (POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES)  # names that no benchmark may have
DRAWN_PER_SEED = ('random', 'matched')             # rules with one draw for each training seed
EXPORTS = ('datacomp', 'keys', 'clip_ood', 'webdataset', 'array_record')  # what a split can be written as
ALIGNED = ('gap_aligned',)                         # rules that promise the anchor's similarity gap
# Config keys that change what a training run learns, beside the model, the preprocessing and the seed.
RECIPE = tuple(f'train.{key}' for key in (
    'batch_size', 'learning_rate', 'warmup_steps', 'weight_decay', 'beta1', 'beta2', 'eps', 'dtype', 'loss',
    'patch_dropout'))
# Those that came later: a key counts only where it is not its default, so that older runs stay as they are.
LATER = {'train.order': 'global', 'train.jpeg_shrink': 0.0}


_REMEMBERED: dict[tuple, Any] = {}


def remembered(function: Callable) -> Callable:
  """Makes a function of (config, workdir, ...) answer from memory until `forget`: products read one another's,

  so without this the listing of the source files would be done again for each of them.
  """
  @functools.wraps(function)
  def wrapped(config: ConfigDict, workdir: str, *more):
    key = (function, id(config), workdir, *more)
    if key not in _REMEMBERED:
      _REMEMBERED[key] = function(config, workdir, *more)
    return _REMEMBERED[key]
  return wrapped


def forget() -> None:
  """Drops what is remembered: at the start of a command, where a config or the files may be others."""
  _REMEMBERED.clear()


def has_anchor(config: ConfigDict) -> bool:
  return bool(config.anchor.format)


def datasets(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns name -> block of every dataset: pool, anchor (where there is one), the benchmarks."""
  anchor = {ANCHOR: config.anchor} if has_anchor(config) else {}
  return {POOL: config.pool, **anchor, **{name: config.benchmarks[name] for name in config.benchmarks}}


def seeds(config: ConfigDict, split: str) -> tuple[int, ...]:
  return tuple(config.splits[split].seeds) or tuple(config.train.seeds)


def is_drawn(config: ConfigDict, split: str) -> bool:
  return config.splits[split].rule in DRAWN_PER_SEED


def draws(config: ConfigDict, split: str) -> list[str]:
  """Returns the names of the split's row files: 'rows', or 'rows-seed<k>' for each training seed."""
  if is_drawn(config, split):
    return [f'rows-seed{seed}' for seed in seeds(config, split)]
  return ['rows']


def rows_name(config: ConfigDict, split: str, seed: int) -> str:
  """Returns the product that holds the rows on which (split, seed) trains."""
  return f'splits/{split}/' + (f'rows-seed{seed}' if is_drawn(config, split) else 'rows')


def runs(config: ConfigDict) -> list[tuple[str, int]]:
  """Returns every (split, seed) that the config trains; the first seeds of all splits come first."""
  pairs = [(order, split, seed) for split in config.splits for order, seed in enumerate(seeds(config, split))]
  names = list(config.splits)
  return [(split, seed) for _, split, seed in sorted(pairs, key=lambda p: (p[0], names.index(p[1])))]


def run_folder(split: str, seed: int) -> str:
  return f'train/{split}/seed{seed}'


def source(workdir: str, dataset: str):
  """Opens a dataset that was ingested: a Grain random access source of its samples."""
  from clip_jax.data import reader
  folder = os.path.join(workdir, 'ingest', dataset)
  if not os.path.exists(os.path.join(folder, 'table.npy')):
    raise InputError(f'{dataset} was not ingested yet in {workdir}: run without --stages, or add '
                     '`ingest` to them.')
  return reader.Source(folder)


def embeddings(workdir: str, dataset: str):
  """Opens a dataset's embeddings. Raises InputError where a shard is missing."""
  from clip_jax.data.embeddings import Embeddings
  folder = os.path.join(workdir, 'embeddings', dataset)
  shards = len(source(workdir, dataset).starts) - 1
  missing = [i for i in range(shards) if not os.path.exists(os.path.join(folder, f'{i:05d}.npy'))]
  if missing:
    raise InputError(f'{dataset} has no embeddings of shard {missing[0]} in {workdir}: run the stage '
                     '`embed` first.')
  return Embeddings(folder, shards)


def candidates(config: ConfigDict, workdir: str) -> Array:  # [N] bool
  """Returns which pool rows may be in a split: usable, kept by de-duplication, and not an anchor row too."""
  mask = embeddings(workdir, POOL).usable & ~in_anchor(config, workdir)
  if config.dedup.enabled:
    path = os.path.join(workdir, 'dedup', 'keep.npy')
    if not os.path.exists(path):
      raise InputError(f'{workdir} has no de-duplication yet: run the stage `dedup` first, or set '
                       '--config.dedup.enabled=False.')
    mask &= np.load(path)
  return mask


def in_anchor(config: ConfigDict, workdir: str) -> Array:  # [N] bool
  """Returns which pool rows are the same sample (file and offset) as an anchor row."""
  pool = source(workdir, POOL)
  if not has_anchor(config):
    return np.zeros(len(pool), bool)
  return pool.same_samples(source(workdir, ANCHOR))


def search_file(workdir: str, benchmark: str, shard: int) -> str:
  return os.path.join(workdir, 'search', benchmark, f'pool-{shard:05d}.npz')


def search_column(workdir: str, benchmark: str, column: str) -> Array:  # [N]
  """Returns one column of the search over all pool rows: similarity, nearest or excess."""
  shards = len(source(workdir, POOL).starts) - 1
  parts = []
  for shard in range(shards):
    path = search_file(workdir, benchmark, shard)
    if not os.path.exists(path):
      raise InputError(f'The pool\'s shard {shard} was not searched with {benchmark} yet in {workdir}: '
                       'run the stage `search` first.')
    with np.load(path) as arrays:
      parts.append(arrays[column])
  return np.concatenate(parts)


def split_rows(config: ConfigDict, workdir: str, split: str, seed: int) -> str:
  """Returns the path of the rows on which (split, seed) trains."""
  path = os.path.join(workdir, rows_name(config, split, seed) + '.npy')
  if not os.path.exists(path):
    raise InputError(f'The split {split} has no rows in {workdir} yet: run the stage `prune` first.')
  return path


def class_names(config: ConfigDict, workdir: str, dataset: str) -> tuple[str, ...]:
  """Returns a dataset's class names in label order: the config's, else those found at ingest."""
  given = datasets(config)[dataset].classes
  return tuple(given) or tuple(source(workdir, dataset).classes)


def plain(block) -> dict:
  """Returns a config block as a plain nested dict."""
  return config_lib.plain(block.to_dict() if hasattr(block, 'to_dict') else block)


def pick(config: ConfigDict, names: Sequence[str]) -> dict:
  """Returns {'train.seeds': value, ...} for dotted keys; a block counts with all that is in it."""
  found = {}
  for name in names:
    value = config
    for part in name.split('.'):
      value = value[part]
    found[name] = plain(value)
  return found


def recipe(config: ConfigDict) -> list[str]:
  """Returns the config keys of the recipe that count."""
  later = [name for name, default in LATER.items() if pick(config, [name])[name] != default]
  if 'train.order' in later:
    later.append('train.shuffle_window')
  return [*RECIPE, *later]


def shard_slices(starts: Array) -> Iterator[tuple[int, int, int]]:  # [shards + 1]
  """Yields (shard, first row, row after the last)."""
  for shard in range(len(starts) - 1):
    yield shard, int(starts[shard]), int(starts[shard + 1])
