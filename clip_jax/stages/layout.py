"""Where things lie in a work directory, and how they are opened: the one place that spells its paths."""

import functools
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array

POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES, PLANTED = 'pool', 'anchor', 'glyphs', 'anchor_classes', 'planted'
SIZES = 'sizes'  # search/sizes.npz
RESERVED = (POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES, PLANTED, SIZES)  # names that no benchmark and no reference may have
DRAWN_PER_SEED = ('random', 'matched')             # rules with one draw for each training seed
EXPORTS = ('datacomp', 'keys', 'clip_ood', 'webdataset', 'array_record')  # what a split can be written as
EMBEDDERS = products.EMBEDDERS                     # folder of config.embedders: each a work directory of its own
TRAINED = (POOL, ANCHOR, PLANTED)                   # datasets whose samples need a caption; base rows, in this order
ALIGNED = ('gap_aligned', 'k_aligned')             # rules that promise the anchor's similarity gap
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
  """Returns whether there is an anchor: an audit's has the format of vectors, and no path where there is none."""
  return bool(config.anchor.format) and (config.anchor.format != 'embeddings' or bool(config.anchor.path))


def datasets(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns name -> block of every dataset: pool, anchor (where there is one), benchmarks, references of samples.

  The copies of a benchmark that are planted come last: they are drawn when it is indexed.
  """
  anchor = {ANCHOR: config.anchor} if has_anchor(config) else {}
  return {POOL: config.pool, **anchor, **{name: config.benchmarks[name] for name in config.benchmarks},
          **{name: config.references[name] for name in config.references if not is_prompts(config, name)},
          **({PLANTED: planted_block(config)} if config.planted.benchmark else {})}


def planted_block(config: ConfigDict) -> ConfigDict:
  """Returns the block of the dataset of planted copies, which are tars that the stage ingest draws."""
  return defaults.dataset(format=PLANTED, label_key='label', group_key='group', columns=('query', 'kind', 'copy'),
                          classes=tuple(config.benchmarks[config.planted.benchmark].classes))


def holds_planted(config: ConfigDict, split: str) -> bool:
  """Returns whether a split holds planted copies of test images."""
  return config.splits[split].rule == PLANTED


def flatten(block: ConfigDict, prefix: str = '') -> list[tuple[str, ConfigDict]]:
  """Returns (prefix, block) of each source of a dataset; one for any format but 'concat'."""
  if block.format != 'concat':
    return [(prefix, block)]
  return [pair for name in block.sources for pair in flatten(block.sources[name], f'{prefix}{name}/')]


def has_own_images(config: ConfigDict, dataset: str) -> bool:
  """Returns whether a dataset is images, as training and evaluation need; vectors alone are not."""
  return all(block.format != 'embeddings' for _, block in flatten(datasets(config)[dataset]))


def is_prompts(config: ConfigDict, reference: str) -> bool:
  """Returns whether a reference is prompts, which the embedder's text tower encodes: no dataset."""
  return config.references[reference].format == 'prompts'


def under(config: ConfigDict, workdir: str, name: str) -> tuple[ConfigDict, str]:
  """Returns the config and the work directory of one of config.embedders, for the stages embedder, embed and search.

  WORKDIR/embedders/<name>/ is laid out as WORKDIR is; its `ingest` is a link to WORKDIR/ingest. The config has
  this embedder in place of the main one, and nothing that only the main one is for: splits, references. The same
  arguments give the same config, so that `remembered` knows it again. Nothing is written.
  """
  return _config_of(config, workdir, name), os.path.join(workdir, EMBEDDERS, name)


@remembered
def _config_of(config: ConfigDict, workdir: str, name: str) -> ConfigDict:
  del workdir
  own = {'duplicate_similarity': 0.0} if name == config.dedup.embedder else {}  # dedup.threshold is its own
  return with_keys(config, embedder=config.embedders[name], embedders=ConfigDict(), splits=ConfigDict(),
                   references=ConfigDict(), dedup=with_keys(config.dedup, embedder=''),
                   search=with_keys(config.search, paper_top_k=0),
                   prune=with_keys(config.prune, sensitivity=(), preview='', **own))


def with_keys(block: ConfigDict, **given) -> ConfigDict:
  """Returns a copy of a block, or of a config, with some keys set; the blocks in it are shared, not copied."""
  found = ConfigDict(sort_keys=False)
  for key in block:
    found[key] = given.get(key, block[key])
  return found


def whose(workdir: str) -> str:
  """Returns ' (<name>)' in a work directory of config.embedders, '' in a main one: for what a stage says."""
  name = products.embedder_of(workdir)
  return f' ({name})' if name else ''


def duplicate_similarity(config: ConfigDict) -> float:
  """Returns the cosine similarity from which two images count as duplicates to the main embedder.

  `check` sees to it that this is not the threshold of another one's de-duplication.
  """
  return config.prune.duplicate_similarity or 1 - config.dedup.threshold


def dedup_home(config: ConfigDict, workdir: str) -> tuple[ConfigDict, str]:
  """Returns the config and the work directory whose pool embeddings de-duplication compares: see `under`."""
  return under(config, workdir, config.dedup.embedder) if config.dedup.embedder else (config, workdir)


def inputs(workdir: str, home: str, parts: Sequence[Product]) -> dict[str, str]:
  """Returns what a product of `workdir` reads of products that lie in `home`, that one or one `under` it.

  name -> fingerprint. The names are as seen from `workdir`, so that a changed embedding is noticed, and --redo finds
  who follows.
  """
  prefix = '' if home == workdir else f'{EMBEDDERS}/{os.path.basename(home)}/'
  return {prefix + part.name: part.fingerprint for part in parts}


def seeds(config: ConfigDict, split: str) -> tuple[int, ...]:
  return tuple(config.splits[split].seeds) or tuple(config.train.seeds)


def reads(config: ConfigDict, split: str) -> list[str]:
  """Returns the splits that a split is made from: whose size it has, whose control it is, which it joins."""
  block = config.splits[split]
  return [name for name in (block.size_of, block.to, *block.of) if name]


def is_drawn(config: ConfigDict, split: str) -> bool:
  """Returns whether each training seed has rows of its own: a drawn rule, or a join with a split of one."""
  joined = [split]
  for name in joined:  # it grows
    joined += [other for other in config.splits[name].of if other not in joined]
  return any(config.splits[name].rule in DRAWN_PER_SEED for name in joined)


def draws(config: ConfigDict, split: str) -> list[str]:
  """Returns the names of the split's row files: 'rows', or 'rows-seed<k>' for each training seed."""
  if is_drawn(config, split):
    return [f'rows-seed{seed}' for seed in seeds(config, split)]
  return ['rows']


def rows_name(config: ConfigDict, split: str, seed: int) -> str:
  """Returns the product that holds the rows on which (split, seed) trains."""
  return f'splits/{split}/' + (f'rows-seed{seed}' if is_drawn(config, split) else 'rows')


def runs(config: ConfigDict) -> list[tuple[str, int]]:
  """Returns every (split, seed) that the config trains, the first seeds of all splits first; of vectors, none."""
  if not has_own_images(config, POOL):
    return []
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


def search_arrays(workdir: str, benchmark: str, shard: int, names: Sequence[str]) -> list[Array]:
  """Returns some arrays of a shard's search; only they are read."""
  path = search_file(workdir, benchmark, shard)
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return [arrays[name] for name in names]
  except FileNotFoundError:
    raise InputError(f'The pool\'s shard {shard} was not searched with {benchmark} yet in {workdir}: '
                     'run the stage `search` first.') from None
  except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f'{path} cannot be read ({error}). Make it again with --redo=search:{benchmark}.') from error


def search_column(workdir: str, benchmark: str, column: str) -> Array:  # [N]
  """Returns one column of the search over all pool rows: similarity, nearest or excess."""
  starts, found = source(workdir, POOL).starts, None
  for shard, start, stop in shard_slices(starts):
    part, = search_arrays(workdir, benchmark, shard, [column])
    found = np.empty(int(starts[-1]), part.dtype) if found is None else found
    found[start:stop] = part
  return found


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
