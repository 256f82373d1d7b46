"""Checks a config before any work: every name, number and reference, with the nearest valid one in the message."""

import math
import os
import re
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core.errors import ConfigError
from clip_jax.data import formats
from clip_jax.pruning import rules
from clip_jax.stages import embedder
from clip_jax.stages import layout

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')
KEY_FILES = ('.npy', '.parquet', '.txt')  # what the rule listed reads
FORMATS = (*formats.FORMATS, 'glyphs', 'concat')


def check(config: ConfigDict) -> None:
  """Raises ConfigError for the first thing in the config that cannot work."""
  _keys(config, defaults.get_config(), 'config')
  _dataset('pool', config.pool, defaults.dataset())
  if layout.has_anchor(config):
    _dataset('anchor', config.anchor, defaults.dataset())
  for name, block in config.benchmarks.items():
    _name('benchmarks', name)
    if name in layout.RESERVED:
      raise ConfigError(f'config.benchmarks.{name}: this name is taken; choose another.')
    _dataset(f'benchmarks.{name}', block, defaults.benchmark())
    _benchmark(f'config.benchmarks.{name}', block)
  for name in config.splits:
    _name('splits', name)
    _split(config, name)
  _one_of('config.embedder.source', config.embedder.source, embedder.SOURCES)
  _one_of('config.search.backend', config.search.backend, ('exact', 'scann'))
  _one_of('config.engine.name', config.engine.name, ('local',))
  _one_of('config.preprocess.resize', config.preprocess.resize, ('shortest', 'squash'))
  _numbers(config)
  if config.splits or config.embedder.source == 'train':
    _model(config)
    _training(config)


def _keys(got: ConfigDict, known: ConfigDict, where: str) -> None:
  """Every key of a block must be one that defaults.py knows, and of its type."""
  lost = [key for key in known if key not in got]
  if lost:
    raise ConfigError(f'{where} has no key {lost[0]!r}: a bare dict loses the defaults. Make the block with the '
                      'functions of defaults.py, and then set single keys.')
  for key, value in got.items():
    if key not in known:
      raise ConfigError(f'{where}.{key} is not a config key.{config_lib.nearest(key, known.keys())}')
    default = known[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise ConfigError(f'{where}.{key} must be a block of keys, got {value!r}.')
      if len(default) and key not in ('pool', 'anchor'):  # datasets are checked on their own
        _keys(value, default, f'{where}.{key}')
    elif type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
      raise ConfigError(f'{where}.{key} must be {type(default).__name__}, got {value!r}.')


def _dataset(name: str, block: ConfigDict, known: ConfigDict) -> None:
  where = f'config.{name}'
  if not isinstance(block, ConfigDict):
    raise ConfigError(f'{where} must be made by defaults.dataset(...) or defaults.benchmark(...).')
  _keys(block, known, where)
  if not block.format:
    raise ConfigError(f'{where}.format is not given; have {", ".join(FORMATS)}.')
  _one_of(f'{where}.format', block.format, FORMATS)
  if block.format == 'concat':
    if not block.sources:
      raise ConfigError(f'{where}.sources is empty: format "concat" joins sources=dict(name=dataset(...)).')
    for key, part in block.sources.items():
      _dataset(f'{name}.sources.{key}', part, defaults.dataset())
  elif block.format == 'glyphs':
    from clip_jax.data import glyphs
    _one_of(f'{where}.path', block.path or layout.POOL, glyphs.SETS)
  elif not block.path:
    raise ConfigError(f'{where}.path is not given: a folder or a pattern such as "DIR/*.tar", for example '
                      f'--{where}.path=DIR.')
  if block.labels_file:
    if block.format != 'folder':
      raise ConfigError(f'{where}.labels_file={block.labels_file!r}: only the format folder reads it.')
    if block.label_key:
      raise ConfigError(f'{where}: labels come from labels_file or from label_key; give one of the two.')
    if not os.path.isfile(os.path.expanduser(block.labels_file)):
      raise ConfigError(f'{where}.labels_file={block.labels_file!r} is not there.')
  low, high = block.part if len(block.part) == 2 else (1, 0)
  if not 0 <= low < high <= 1:
    raise ConfigError(f'{where}.part={block.part} must be (lo, hi) with 0 <= lo < hi <= 1.')
  if not 0 <= block.caption_share <= 1:
    raise ConfigError(f'{where}.caption_share={block.caption_share} must be a share in [0, 1].')
  for key in ('group_pattern', 'caption_pattern'):
    try:
      re.compile(block[key])
    except re.error as error:
      raise ConfigError(f'{where}.{key}={block[key]!r} is not a regular expression: {error}.') from error
  if block.caption_template and '{}' not in block.caption_template:
    raise ConfigError(f'{where}.caption_template={block.caption_template!r} has no {{}} for the class name.')


def _benchmark(where: str, block: ConfigDict) -> None:
  if len(block.classes) == 1:
    raise ConfigError(f'{where}.classes has one class, {block.classes[0]!r}: with one, every prediction is '
                      'right. Give all classes.')
  if not block.templates or any('{}' not in template for template in block.templates):
    raise ConfigError(f'{where}.templates={block.templates} must be prompts with {{}} for the class name.')
  for name in block.class_mask:
    if block.classes and name not in block.classes:
      raise ConfigError(f'{where}.class_mask: {name!r} is not a class.{config_lib.nearest(name, block.classes)}')
  if len(block.class_mask) == 1:
    raise ConfigError(f'{where}.class_mask leaves one class, {block.class_mask[0]!r}: every prediction would be '
                      'right.')


def _split(config: ConfigDict, name: str) -> None:
  block, where = config.splits[name], f'config.splits.{name}'
  if not isinstance(block, ConfigDict):
    raise ConfigError(f'{where} must be made by defaults.split(...).')
  known = defaults.split()
  _keys(block, known, where)
  _one_of(f'{where}.rule', block.rule, rules.RULES)
  rule = rules.RULES[block.rule]
  for key in known:
    reads = key in (*rule.keys, 'rule', 'seeds', 'export') or (key == 'append_anchor' and rule.append_anchor is None)
    if not reads and block[key] != known[key]:
      raise ConfigError(f'{where}.{key}={block[key]!r}: the rule {block.rule!r} does not read it (it reads '
                        f'{", ".join(rule.keys) or "nothing"}).')
  for benchmark in block.benchmarks:
    _one_of(f'{where}.benchmarks', benchmark, config.benchmarks)
  if 'benchmarks' in rule.keys and not block.benchmarks:
    raise ConfigError(f'{where}: the rule {block.rule!r} needs benchmarks=(...); have '
                      f'{", ".join(config.benchmarks) or "none"}.')
  for kind in block.export:
    _one_of(f'{where}.export', kind, layout.EXPORTS)
  if 'file' in rule.keys and not os.path.isfile(os.path.expanduser(block.file)):
    raise ConfigError(f'{where}.file={block.file!r} is not there: the rule {block.rule!r} needs a file of keys.')
  if 'file' in rule.keys and os.path.splitext(block.file)[1].lower() not in KEY_FILES:
    raise ConfigError(f'{where}.file={block.file!r} must end in {", ".join(KEY_FILES)}.')
  named = config.prune.export_key
  if named and (block.export or 'file' in rule.keys) and config.pool.format != 'concat' and (
      named not in ('key', *config.pool.columns)):
    raise ConfigError(f'config.prune.export_key={named!r} must be in config.pool.columns, or the index has no such '
                      'column.')
  if not layout.has_anchor(config) and ('excess' in rule.needs or block.rule in ('anchor', 'matched')):
    raise ConfigError(f'{where}: the rule {block.rule!r} needs an anchor; give config.anchor.')
  if config.search.backend == 'scann':
    if block.rule in ('near', 'far', 'matched'):
      raise ConfigError(f'{where}: the rule {block.rule!r} needs every row\'s similarity, which ScaNN does not '
                        'give. Use --config.search.backend=exact.')
    if block.rule == 'gap_aligned' and not config.search.min_recall:
      raise ConfigError(f'{where}: gap_aligned on ScaNN misses rows. Say which recall you accept with '
                        '--config.search.min_recall=0.99, or use --config.search.backend=exact.')
  if 'count' in rule.needs:
    if bool(block.size) == bool(block.size_of):
      raise ConfigError(f'{where}: give size= (a share, or a count above 1) or size_of= (another split), one '
                        'of the two.')
    if not block.size >= 0 or (block.size > 1 and block.size != math.floor(block.size)):
      raise ConfigError(f'{where}.size={block.size} must be a share in (0, 1] or a whole number above 1.')
  for key in ('size_of', 'to'):
    if block[key]:
      _one_of(f'{where}.{key}', block[key], config.splits)
      seen = [name]
      while seen[-1] in config.splits:  # follow who reads whom
        other = config.splits[seen[-1]]
        following = other.size_of or other.to
        if following in seen:
          raise ConfigError(f'{where}.{key}={block[key]!r} goes round in a circle: {" -> ".join([*seen, following])}.')
        seen.append(following)
  if block.rule == 'matched':
    if not block.to:
      raise ConfigError(f'{where}: the rule matched needs to= (an aligned split).')
    if config.splits[block.to].rule not in layout.ALIGNED:
      raise ConfigError(f'{where}.to={block.to!r} must be an aligned split (rule gap_aligned).')


def _numbers(config: ConfigDict) -> None:
  positive = ('embedder.image_size', 'embedder.dim', 'embedder.fit_images', 'embedder.batch_size',
              'dedup.max_iterations', 'search.top_k', 'search.tile_rows', 'search.query_block',
              'search.candidates', 'search.recall_queries', 'train.batch_size', 'train.keep_checkpoints',
              'train.log_every_steps', 'train.loader_threads', 'train.shuffle_window', 'train.fsdp',
              'evaluate.batch_size', 'glyphs.image_px', 'report.bootstrap_draws')
  for name in positive:
    block, key = name.split('.')
    if config[block][key] <= 0:
      raise ConfigError(f'config.{name}={config[block][key]} must be more than 0.')
  for block, key in (('train', 'loader_processes'), ('engine', 'workers')):
    if config[block][key] < 0:
      raise ConfigError(f'config.{block}.{key}={config[block][key]} must be 0 or more.')
  for name, low, high in (('dedup.threshold', 0, 2), ('dedup.initial_similarity', -1, 1),
                          ('search.min_recall', 0, 1), ('prune.duplicate_similarity', 0, 1)):
    block, key = name.split('.')
    if not low <= config[block][key] <= high:
      raise ConfigError(f'config.{name}={config[block][key]} must lie in [{low}, {high}].')


def embedder_weights(config: ConfigDict) -> None:
  """The embedder's weights, where it has any: a file of a kind that is read, and which model it holds.

  Not a part of `check`: the evaluate command takes a config's benchmarks and needs no embedder.
  """
  if config.embedder.source != 'weights':
    return
  from clip_jax.models import weights
  from clip_jax.stages import models
  path = embedder.weights_path(config)
  if not config.embedder.path:
    raise ConfigError('config.embedder.path is not given: a file of weights, for example '
                      '--config.embedder.path=open_clip_model.safetensors.')
  if not models.is_weights(path):
    raise ConfigError(f'config.embedder.path={config.embedder.path!r} must be a file that ends in '
                      f'{", ".join(weights.ENDINGS)}.')
  if not os.path.isfile(path):
    raise ConfigError(f'config.embedder.path={config.embedder.path!r} is not there.')
  embedder.architecture(config)


def _model(config: ConfigDict) -> None:
  from clip_jax.models import zoo
  from clip_jax.stages import models
  found = models.architecture(config)
  if config.train.patch_dropout and not isinstance(found.vision, zoo.ViTConfig):
    raise ConfigError(f'config.train.patch_dropout={config.train.patch_dropout}: the image tower of '
                      f'{config.model.name} has no patches. Set it to 0.')


def _training(config: ConfigDict) -> None:
  t = config.train
  _one_of('config.train.budget', t.budget, ('samples', 'epochs'))
  _one_of('config.train.dtype', t.dtype, ('float32', 'bfloat16'))
  _one_of('config.train.loss', t.loss, ('clip', 'siglip'))
  _one_of('config.train.remat', t.remat, ('none', 'dots', 'blocks'))
  _one_of('config.train.pack_captions', t.pack_captions, ('auto', 'always', 'never'))
  _one_of('config.train.order', t.order, ('global', 'blocks'))
  if t.order == 'blocks' and t.loader_processes:
    raise ConfigError(f'config.train.order=blocks with config.train.loader_processes={t.loader_processes}: every '
                      'process would read everything. Set loader_processes to 0 and use more loader_threads.')
  if t.jpeg_shrink and not 1 <= t.jpeg_shrink <= 8:
    raise ConfigError(f'config.train.jpeg_shrink={t.jpeg_shrink} must be 0 (off) or from 1 to 8.')
  if not 0 <= t.patch_dropout < 1:
    raise ConfigError(f'config.train.patch_dropout={t.patch_dropout} must be a share from 0 up to less than 1.')
  if t.budget == 'samples' and t.samples < t.batch_size:
    raise ConfigError(f'config.train.samples={t.samples} is less than one batch ({t.batch_size}). Set the samples '
                      'a run sees, or --config.train.budget=epochs.')
  if t.budget == 'epochs' and t.epochs <= 0:
    raise ConfigError(f'config.train.epochs={t.epochs} must be more than 0.')
  if not t.seeds or len(set(t.seeds)) != len(t.seeds) or any(type(s) is not int or s < 0 for s in t.seeds):
    raise ConfigError(f'config.train.seeds={t.seeds} must be different whole numbers from 0 up.')
  low, high = config.preprocess.crop_scale
  if not 0 < low <= high <= 1:
    raise ConfigError(f'config.preprocess.crop_scale={config.preprocess.crop_scale} must be (lo, hi) with '
                      '0 < lo <= hi <= 1.')
  known = [f'{split}/seed{seed}' for split, seed in layout.runs(config)]
  for run in t.only:
    _one_of('config.train.only', run, known)


def _one_of(where: str, value: str, names: Iterable[str] | Sequence[str]) -> None:
  names = list(names)
  if value not in names:
    raise ConfigError(f'{where}={value!r} is not known.{config_lib.nearest(str(value), names)}')


def _name(where: str, name: str) -> None:
  if not NAME.fullmatch(name):
    raise ConfigError(f'config.{where}.{name}: a name is letters, digits, _ and -, and begins with a letter or '
                      'a digit.')
