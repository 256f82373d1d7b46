"""Checks a config before any work: every name, number and reference, with the nearest valid one in the message."""

import os
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core.errors import ConfigError
from clip_jax.data import formats
from clip_jax.data import keyed_images
from clip_jax.data import planted
from clip_jax.stages import benchmark_dirs
from clip_jax.stages import check_keys
from clip_jax.stages import check_splits
from clip_jax.stages import dedup
from clip_jax.stages import embedder
from clip_jax.stages import embedders
from clip_jax.stages import ingest
from clip_jax.stages import layout

LISTS_OF_POOL = ('datacomp', 'clip_ood')  # exports that name the pool's samples only
FORMATS = (*formats.FORMATS, 'glyphs', 'concat')
# Keys that only a dataset of format 'embeddings' reads, and those that it does not: vectors come with no image.
VECTOR_KEYS = ('metadata', 'vector_key', 'vector_dim', 'any_norm', 'images')
NOT_VECTOR_KEYS = ('image_key', 'caption_template', 'caption_pattern', 'caption_replacement', 'caption_share',
                   'labels_file')


def check(config: ConfigDict) -> None:
  """Raises ConfigError for the first thing in the config that cannot work."""
  check_keys.keys(config, defaults.get_config(), 'config')
  _dataset('pool', config.pool, defaults.dataset())
  if layout.has_anchor(config):
    _dataset('anchor', config.anchor, defaults.dataset())
  for name, block in config.benchmarks.items():
    check_keys.valid_name('benchmarks', name)
    if name in layout.RESERVED:
      raise ConfigError(f'config.benchmarks.{name}: this name is taken; choose another.')
    _dataset(f'benchmarks.{name}', block, defaults.benchmark())
    _benchmark(f'config.benchmarks.{name}', block)
  for name in config.references:
    _reference(config, name)
  for name in config.splits:
    check_keys.valid_name('splits', name)
    check_splits.check(config, name)
  _planted(config)
  check_keys.one_of('config.embedder.source', config.embedder.source, embedder.SOURCES)
  check_keys.one_of('config.search.backend', config.search.backend, ('exact', 'scann'))
  _embedders(config)
  check_keys.one_of('config.engine.name', config.engine.name, ('local',))
  check_keys.one_of('config.preprocess.resize', config.preprocess.resize, ('shortest', 'squash'))
  _numbers(config)
  _dedup(config)
  _vectors(config)
  if (config.splits and layout.has_own_images(config, layout.POOL)) or 'train' in [
      block.source for block in (config.embedder, *config.embedders.values())]:
    _model(config)
    _training(config)


def _dataset(name: str, block: ConfigDict, known: ConfigDict) -> None:
  where = f'config.{name}'
  if not isinstance(block, ConfigDict):
    raise ConfigError(f'{where} must be made by defaults.dataset(...) or defaults.benchmark(...).')
  check_keys.keys(block, known, where)
  if not block.format:
    raise ConfigError(f'{where}.format is not given; have {", ".join(FORMATS)}.')
  check_keys.one_of(f'{where}.format', block.format, FORMATS)
  if block.format == 'concat':
    if not block.sources:
      raise ConfigError(f'{where}.sources is empty: format "concat" joins sources=dict(name=dataset(...)).')
    for key, part in block.sources.items():
      _dataset(f'{name}.sources.{key}', part, defaults.dataset())
  elif block.format == 'glyphs':
    from clip_jax.data import glyphs
    check_keys.one_of(f'{where}.path', block.path or layout.POOL, glyphs.SETS)
  elif not block.path:
    raise ConfigError(f'{where}.path is not given: a folder or a pattern such as "DIR/*.tar", for example '
                      f'--{where}.path=DIR.')
  for key in NOT_VECTOR_KEYS if block.format == ingest.VECTORS else VECTOR_KEYS:
    if block[key] != known[key]:
      raise ConfigError(f'{where}.{key}={block[key]!r}: the format {block.format!r} does not read it. Leave it out.')
  if block.vector_dim < 0:
    raise ConfigError(f'{where}.vector_dim={block.vector_dim} must be 0 or more.')
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


def _reference(config: ConfigDict, name: str) -> None:
  """One of config.references: a dataset of labelled examples, or prompts."""
  block, where = config.references[name], f'config.references.{name}'
  check_keys.valid_name('references', name)
  if name in layout.RESERVED or name in config.benchmarks:
    raise ConfigError(f'{where}: this name is taken{" by a benchmark" if name in config.benchmarks else ""}; choose '
                      'another.')
  if not isinstance(block, ConfigDict):
    raise ConfigError(f'{where} must be made by defaults.reference(...).')
  if config.search.backend != 'exact':
    raise ConfigError(f'{where}: every pool row is compared with a reference, and config.search.backend='
                      f'{config.search.backend!r} does not. Use --config.search.backend=exact.')
  if not layout.is_prompts(config, name):
    _dataset(f'references.{name}', block, defaults.reference())
    return
  check_keys.keys(block, defaults.reference(), where)
  if len(block.classes) < 2 or len(set(block.classes)) < len(block.classes):
    raise ConfigError(f'{where}.classes={block.classes} must be two or more different names: the nearest prompt says '
                      'which one a row is.')
  if not block.templates or any('{}' not in template for template in block.templates):
    raise ConfigError(f'{where}.templates={block.templates} must be prompts with {{}} for the class name.')
  if config.embedder.source not in ('train', 'weights'):
    raise ConfigError(f'{where}: prompts need an embedder with a text tower, and config.embedder.source='
                      f'{config.embedder.source!r} has none. Use weights or train, or give labelled examples.')


def _planted(config: ConfigDict) -> None:
  """The copies of test images, and the splits that hold them."""
  block, where = config.planted, 'config.planted'
  for name in config.splits:
    if layout.holds_planted(config, name):
      if not block.benchmark:
        raise ConfigError(f'config.splits.{name}: the rule planted needs copies to hold; give {where}.benchmark.')
      for kind in config.splits[name].export:
        if kind in LISTS_OF_POOL:
          raise ConfigError(f'config.splits.{name}.export: {kind!r} lists keys of the pool, which cannot name '
                            'planted copies: who reads it would train without them. Use keys, webdataset or '
                            'array_record.')
  if not block.benchmark:
    return
  check_keys.one_of(f'{where}.benchmark', block.benchmark, config.benchmarks)
  if config.embedder.source == 'files':
    raise ConfigError(f'{where}.benchmark={block.benchmark!r}: copies are made of images and embedded, and here are '
                      'vectors only. Set it to \'\'.')
  if not 0 < block.share <= 1:
    raise ConfigError(f'{where}.share={block.share} must be a share of the queries in (0, 1].')
  if block.copies < 1:
    raise ConfigError(f'{where}.copies={block.copies} must be 1 or more.')
  if not block.kinds:
    raise ConfigError(f'{where}.kinds is empty; have {", ".join(planted.KINDS)}.')
  for kind in block.kinds:
    check_keys.one_of(f'{where}.kinds', kind, planted.KINDS)
  if '{}' not in block.caption_template:
    raise ConfigError(f'{where}.caption_template={block.caption_template!r} has no {{}} for the class name.')


def _numbers(config: ConfigDict) -> None:
  positive = ('embedder.image_size', 'embedder.dim', 'embedder.fit_images', 'embedder.batch_size',
              'dedup.max_iterations', 'search.top_k',
              'search.candidates', 'search.recall_queries', 'train.batch_size', 'train.keep_checkpoints',
              'train.log_every_steps', 'train.loader_threads', 'train.shuffle_window', 'train.fsdp',
              'evaluate.batch_size', 'glyphs.image_px', 'report.bootstrap_draws')
  for name in positive:
    block, key = name.split('.')
    if config[block][key] <= 0:
      raise ConfigError(f'config.{name}={config[block][key]} must be more than 0.')
  for block, key in (('train', 'loader_processes'), ('engine', 'workers'), ('search', 'tile_rows'),
                     ('search', 'query_block'), ('search', 'paper_top_k'), ('dedup', 'sample_rows'),
                     ('dedup', 'audit_rows')):
    if config[block][key] < 0:
      raise ConfigError(f'config.{block}.{key}={config[block][key]} must be 0 or more.')
  for name, low, high in (('dedup.threshold', 0, 2), ('dedup.initial_similarity', -1, 1),
                          ('search.min_recall', 0, 1), ('prune.duplicate_similarity', 0, 1)):
    block, key = name.split('.')
    if not low <= config[block][key] <= high:
      raise ConfigError(f'config.{name}={config[block][key]} must lie in [{low}, {high}].')


def _vectors(config: ConfigDict) -> None:
  """Vectors from files fit the embedders that need no image of them, and exports that copy no image."""
  given = [name for name in layout.datasets(config) if not layout.has_own_images(config, name)]
  source = config.embedder.source
  if source == embedder.FILES:
    for name, dataset in layout.datasets(config).items():
      if other := [part.format for _, part in layout.flatten(dataset) if part.format != ingest.VECTORS]:
        raise ConfigError(f'config.embedder.source=files takes the vectors of every dataset from files, and {name} is '
                          f'of format {other[0]!r}. Give its vectors (format=embeddings), or the weights that made '
                          'the others: --config.embedder.source=weights.')
  elif given and source != 'weights':
    raise ConfigError(f'config.embedder.source={source}: {given[0]} holds vectors of another embedder (format '
                      'embeddings), which cannot be compared with its own. Use --config.embedder.source=files, or '
                      'weights, those that made the vectors.')
  for name in given:
    for prefix, block in layout.flatten(layout.datasets(config)[name]):
      if block.images and not keyed_images.is_there(block.images):
        flag = benchmark_dirs.flag(config, name, f'sources.{prefix[:-1]}.images' if prefix else 'images')
        raise ConfigError(f'{flag}={block.images} is no folder of images, and no tars. Correct it, or leave it out.')
  if layout.POOL in given:
    for name, split in config.splits.items():
      if copies := [kind for kind in split.export if kind in ('webdataset', 'array_record')]:
        raise ConfigError(f'config.splits.{name}.export: {copies[0]} copies images, and the pool has none (format '
                          'embeddings). Export datacomp, keys or clip_ood.')
    if not (config.benchmarks or config.splits or config.references):
      raise ConfigError('There is nothing to compare the pool with. Name benchmarks, for example '
                        "--config.benchmark_dirs='sketch=DIR,val=DIR'.")


def stages(config: ConfigDict, names: Sequence[str]) -> None:
  """Raises ConfigError where a stage that will run needs images that are not there."""
  reads = {'train': [layout.POOL, *([layout.ANCHOR] if layout.has_anchor(config) else [])],
           'evaluate': list(config.benchmarks)}
  if not config.splits:
    return
  for stage, datasets in reads.items():
    for name in datasets if stage in names else ():
      if not layout.has_own_images(config, name):
        raise ConfigError(f'{name} has no images (format embeddings), which the stage {stage} needs for the config\'s '
                          'splits. Leave it out: --stages=ingest,embedder,embed,dedup,search,prune,report.')


def _embedders(config: ConfigDict) -> None:
  """The further embedders, and who uses them."""
  for name, block in config.embedders.items():
    check_keys.valid_name('embedders', name)
    where = f'config.embedders.{name}'
    if not isinstance(block, ConfigDict):
      raise ConfigError(f'{where} must be made by defaults.embedder(...).')
    check_keys.keys(block, defaults.embedder(), where)
    check_keys.one_of(f'{where}.source', block.source, embedder.SOURCES)
    if block.source == 'files':
      raise ConfigError(f'{where}.source=files: the vectors on disk are those of config.embedder. To compare them with '
                        'other vectors, use two work directories.')
    for key in ('image_size', 'dim', 'fit_images', 'batch_size'):
      if block[key] <= 0:
        raise ConfigError(f'{where}.{key}={block[key]} must be more than 0.')
  p = config.prune
  users = [('dedup.embedder', config.dedup.embedder), ('prune.preview', p.preview),
           *(('prune.sensitivity', name) for name in p.sensitivity)]
  for key, name in users:
    if name:
      check_keys.one_of(f'config.{key}', name, config.embedders)
      for dataset in layout.datasets(config):
        if not layout.has_own_images(config, dataset):
          raise ConfigError(f'config.{key}={name!r}: {dataset} is vectors (format embeddings), and a further embedder '
                            'needs images. Leave it out, or give images.')
  if config.dedup.embedder and config.benchmarks and not p.duplicate_similarity:
    raise ConfigError(f'config.dedup.threshold={config.dedup.threshold} is for similarities of config.dedup.embedder='
                      f'{config.dedup.embedder!r}, not for those that the search finds. Say from which one of these '
                      'two images count as duplicates, for example --config.prune.duplicate_similarity=0.95.')
  if len(set(p.sensitivity)) != len(p.sensitivity):
    raise ConfigError(f'config.prune.sensitivity={p.sensitivity} names an embedder twice.')
  if p.sensitivity and config.search.backend != 'exact':
    raise ConfigError('config.prune.sensitivity compares every candidate, which ScaNN does not score. Use '
                      '--config.search.backend=exact.')


def _dedup(config: ConfigDict) -> None:
  d = config.dedup
  if not d.enabled:
    return
  check_keys.one_of('config.dedup.survivor', d.survivor, dedup.SURVIVORS)
  if d.clusters < 0:
    raise ConfigError(f'config.dedup.clusters={d.clusters} must be 0 (one for every 8,000 rows) or more.')
  if 0 < d.sample_rows < d.clusters:
    raise ConfigError(f'config.dedup.sample_rows={d.sample_rows} must be at least config.dedup.clusters={d.clusters}: '
                      'every cluster needs a row to start from.')
  block, where = config.embedder, 'config.embedder'
  if d.embedder in config.embedders:
    block, where = config.embedders[d.embedder], f'config.embedders.{d.embedder}'
  if d.survivor == 'best' and block.source not in ('train', 'weights'):
    raise ConfigError(f"config.dedup.survivor='best' compares images with captions, and {where}.source="
                      f"{block.source!r} has no text tower. Use 'train' or 'weights', here or by "
                      'config.dedup.embedder, or another survivor.')
  if d.survivor == 'largest' and config.pool.format == 'embeddings':
    raise ConfigError("config.dedup.survivor='largest' needs the images' sizes, and config.pool is vectors only. Use "
                      "'first' or 'longest'.")


def embedder_weights(config: ConfigDict) -> None:
  """The embedders' weights, where they have any: a file of a kind that is read, and which model it holds.

  Not a part of `check`: the evaluate command takes a config's benchmarks and needs no embedder.
  """
  _embedder_weights(config)
  for name in embedders.used(config):
    try:
      _embedder_weights(layout.under(config, '', name)[0])
    except ConfigError as error:
      raise ConfigError(str(error).replace('config.embedder.', f'config.embedders.{name}.')) from error


def _embedder_weights(config: ConfigDict) -> None:
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
  check_keys.one_of('config.train.budget', t.budget, ('samples', 'epochs'))
  check_keys.one_of('config.train.dtype', t.dtype, ('float32', 'bfloat16'))
  check_keys.one_of('config.train.loss', t.loss, ('clip', 'siglip'))
  check_keys.one_of('config.train.remat', t.remat, ('none', 'dots', 'blocks'))
  check_keys.one_of('config.train.pack_captions', t.pack_captions, ('auto', 'always', 'never'))
  check_keys.one_of('config.train.order', t.order, ('global', 'blocks'))
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
    check_keys.one_of('config.train.only', run, known)
