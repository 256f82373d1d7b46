"""Checks every name, number and reference of a config before any work.

A message about an unknown name suggests the nearest valid one.
"""

from collections.abc import Iterable, Mapping, Sequence
import os

from ml_collections import ConfigDict

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core.config import Key
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import STAGES
from clip_jax.core.types import Config
from clip_jax.data import filetree, formats, keyed_images, row_rules
from clip_jax.evaluation import class_sets
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import sscd, weights, zoo
from clip_jax.pruning import key_lists
from clip_jax.stages import benchmark_dirs, check_keys, check_splits, models

# Keys that only a dataset of format 'embeddings' reads, and image keys that it does not read.
VECTOR_KEYS = ('metadata', 'vector_key', 'vector_dim', 'any_norm', 'images')
NOT_VECTOR_KEYS = (
  'image_key',
  'caption_template',
  'caption_pattern',
  'caption_replacement',
  'caption_share',
  'labels_file',
)
# Keys that a retrieval benchmark, which has no classes, does not read.
NOT_RETRIEVAL_KEYS = (
  'classes',
  'class_mask',
  'class_set',
  'scorings',
  'average',
  'label_key',
  'labels_file',
  'caption_template',
  'few_shot',
)


def check(config: Config, names: Sequence[str] = tuple(STAGES)) -> None:
  """Raises ConfigError for the first invalid value of the config.

  names: the stages that will run; without train and evaluate, the splits need no model. The command
  evaluate runs none of them and needs no pool.
  """
  _top_level(config)
  if names or config.pool.format:
    _dataset('pool', config.pool, defaults.DATASET)
  if blocks.has_anchor(config):
    _dataset('anchor', config.anchor, defaults.DATASET)
  for name, block in config.benchmarks.items():
    check_keys.check_folder_name('benchmarks', name)
    if name in blocks.RESERVED:
      raise ConfigError(f'config.benchmarks.{name}: this name is reserved; choose another.')
    _dataset(f'benchmarks.{name}', block, defaults.BENCHMARK)
    _benchmark(config, name)
  for name in config.references:
    _reference(config, name)
  for name in config.splits:
    check_keys.check_folder_name('splits', name)
    check_splits.check(config, name)
  _domains(config)
  _planted(config)
  _embedders(config)
  _dedup(config)
  if names:
    _vectors(config)
  if ({'train', 'evaluate'} & set(names) and blocks.runs_to_train(config)) or 'train' in [
    block.source for block in (config.embedder, *config.embedders.values())
  ]:
    _model(config)
    _training(config)


def are_found(config: Config, names: Iterable[str], is_plan: bool = False) -> None:
  """Raises InputError for the first of the named datasets that is not there.

  A plan does without the files of a dataset that has a format and expected_rows.
  """
  for name in names:
    for prefix, block in blocks.flatten(blocks.datasets(config)[name]):
      unknown = [key for key in ('expected_rows', 'format') if not block[key]]
      if not blocks.is_absent(block) or (is_plan and not unknown):
        continue
      where = benchmark_dirs.flag(config, name, _source(prefix))[2:]
      several, paths = len(block.path) > 1, ', '.join(map(repr, block.path))
      advice = 'Correct the paths, or set config.root, the folder below which relative paths begin.'
      if is_plan:
        advice = f'Correct it; or give {where}{unknown[0]} to plan without the files.'
      raise InputError(
        f'{where}path: {f"none of {paths} exists" if several else f"{paths} does not exist"}. '
        f'{advice}'
      )


def _top_level(config: Config) -> None:
  """Checks the top-level keys and all blocks except those of datasets and splits."""
  declared = defaults.get_config()
  check_keys.check_block(
    'config',
    config,
    {name: Key({} if isinstance(value, ConfigDict) else value) for name, value in declared.items()},
  )
  for name, value in declared.items():
    if isinstance(value, ConfigDict) and not isinstance(config[name], ConfigDict):
      raise ConfigError(f'config.{name} must be a block of keys, got {config[name]!r}.')
  for name, keys in defaults.BLOCKS.items():
    check_keys.check_block(f'config.{name}', config[name], keys)
  for name, block in config.embedders.items():
    check_keys.check_folder_name('embedders', name)
    check_keys.check_block(f'config.embedders.{name}', block, defaults.EMBEDDER)


def _dataset(name: str, block: Config, declared: Mapping[str, Key]) -> None:
  where = f'config.{name}'
  path = {'path': Key(block.path)} if blocks.is_absent(block) else {}
  check_keys.check_block(where, block, {**declared, **path})
  names = (*formats.FORMATS, blocks.GLYPHS, 'concat')
  if not block.format:
    raise ConfigError(
      f'{where} has no data: give a folder or a pattern such as "DIR/*.tar", for example '
      f'--{where}.path=DIR. Its files determine the format, or choose {where}.format: '
      f'{", ".join(names)}.'
    )
  check_keys.one_of(f'{where}.format', block.format, names)
  if block.format == 'concat':
    if not block.sources:
      raise ConfigError(
        f'{where}.sources is empty: give sources=dict(name=dataset(...)) for format "concat".'
      )
    for key, part in block.sources.items():
      _dataset(f'{name}.sources.{key}', part, defaults.DATASET)
  elif block.format == 'glyphs':
    from clip_jax.demo import glyphs  # PIL, for the demo only

    check_keys.one_of(f'{where}.path', block.path or blocks.POOL, glyphs.SETS)
  elif not block.path:
    raise ConfigError(
      f'{where}.path is missing: give a folder or a pattern such as "DIR/*.tar", for example '
      f'--{where}.path=DIR.'
    )
  for key in NOT_VECTOR_KEYS if block.format == blocks.VECTORS else VECTOR_KEYS:
    if block[key] != declared[key].default:
      raise ConfigError(
        f'{where}.{key}={block[key]!r}: the format {block.format!r} does not read it. Remove it.'
      )
  if block.labels_file:
    if block.format != 'folder':
      raise ConfigError(
        f'{where}.labels_file={block.labels_file!r}: only the format folder reads this key.'
      )
    if block.label_key:
      raise ConfigError(
        f'{where}: both labels_file and label_key give labels; keep one of the two.'
      )
    if not blocks.is_absent(block) and not filetree.is_file(block.labels_file):
      raise ConfigError(f'{where}.labels_file={block.labels_file!r} does not exist.')


def _benchmark(config: Config, name: str) -> None:
  block, where = config.benchmarks[name], f'config.benchmarks.{name}'
  _retrieval(where, block)
  _few_shot(config, name)
  if block.class_set:
    for key in ('classes', 'class_mask'):
      if block[key]:
        raise ConfigError(
          f'{where}: both class_set={block.class_set!r} and {key} name classes; keep one of them.'
        )
    if block.format == 'concat':
      raise ConfigError(f'{where}.class_set: the format concat does not read it. Give `classes`.')
  known = class_sets.SCORINGS.get(block.class_set, {})
  if block.scorings and not known:
    raise ConfigError(
      f'{where}.scorings={block.scorings}: only benchmarks of a class_set '
      f'({" or ".join(class_sets.SCORINGS)}) have further scorings. Remove it.'
    )
  check_keys.check_known_names(f'{where}.scorings', block.scorings, known)
  if block.average:
    check_keys.check_folder_name('benchmarks.average', block.average)
    if block.average in config.benchmarks:
      raise ConfigError(
        f'{where}.average={block.average!r} is the name of a benchmark; choose another name.'
      )
  if len(block.classes) == 1:
    raise ConfigError(
      f'{where}.classes has only one class, {block.classes[0]!r}, so every prediction would be '
      'right. Give all classes.'
    )
  for name in block.class_mask:
    if block.classes and name not in block.classes:
      raise ConfigError(
        f'{where}.class_mask: {name!r} is not a class.'
        f'{config_lib.did_you_mean(name, block.classes)}'
      )


def _retrieval(where: str, block: Config) -> None:
  """Checks the keys of a retrieval benchmark, and that no other benchmark has its keys."""
  if not blocks.is_retrieval(block):
    if block.captions:
      raise ConfigError(
        f'{where}.captions={block.captions!r}: only retrieval reads this key. Set '
        f"{where}.task to 'retrieval', or remove it."
      )
    return
  for key in NOT_RETRIEVAL_KEYS:
    if block[key] not in (defaults.BENCHMARK[key].default, row_rules.NO_LABELS):
      raise ConfigError(
        f'{where}.{key}={block[key]!r}: retrieval has no classes and does not read it. Remove it.'
      )
  if block.format in ('concat', blocks.GLYPHS):
    raise ConfigError(
      f'{where}.format={block.format!r} has one caption an image. Retrieval reads folder, '
      'webdataset, parquet, tfds and array_record.'
    )
  if not block.captions:
    return
  if block.format != 'folder':
    raise ConfigError(
      f'{where}.captions={block.captions!r}: only the format folder reads this key. Tars and '
      'tables hold their captions, see caption_key.'
    )
  if not blocks.is_absent(block) and not filetree.is_file(block.captions):
    raise ConfigError(
      f'{where}.captions={block.captions!r} does not exist, nor a file of this name beside the '
      f'images in {block.path!r}. Correct the path.'
    )


def _few_shot(config: Config, name: str) -> None:
  """Checks the training set that a benchmark's few-shot probe names."""
  block, where = config.benchmarks[name], f'config.benchmarks.{name}.few_shot'
  if not block.few_shot:
    return
  labelled = [
    other
    for other, dataset in blocks.datasets(config).items()
    if other not in (blocks.POOL, blocks.PLANTED, name)
    and blocks.is_labelled(dataset)
    and blocks.has_own_images(config, other)
  ]
  if block.few_shot == blocks.ANCHOR and not blocks.has_anchor(config):
    raise ConfigError(
      f"{where}='anchor', but the config has no anchor. Give its files, for example "
      '--config.anchor.path=DIR, or remove this key.'
    )
  check_keys.one_of(where, block.few_shot, labelled)


def _reference(config: Config, name: str) -> None:
  """Checks one block of config.references: a dataset of labelled examples, or prompts."""
  block, where = config.references[name], f'config.references.{name}'
  check_keys.check_folder_name('references', name)
  if name in blocks.RESERVED or name in config.benchmarks:
    raise ConfigError(
      f'{where}: this name is {"a benchmark" if name in config.benchmarks else "reserved"}; '
      'choose another.'
    )
  if config.search.backend != 'exact':
    raise ConfigError(
      f'{where}: config.search.backend={config.search.backend!r} does not compare every pool row '
      'with a reference. Use --config.search.backend=exact.'
    )
  if not blocks.is_prompts(config, name):
    _dataset(f'references.{name}', block, defaults.REFERENCE)
    return
  check_keys.check_block(where, block, defaults.REFERENCE)
  if len(block.classes) < 2 or len(set(block.classes)) < len(block.classes):
    raise ConfigError(
      f'{where}.classes={block.classes} must be two or more different names: each pool row gets '
      'the class of its nearest prompt.'
    )
  if config.embedder.source not in ('train', 'weights'):
    raise ConfigError(
      f'{where}: prompts need a text tower, but config.embedder.source='
      f'{config.embedder.source!r} has none. Use weights or train, or give labelled examples.'
    )


def _domains(config: Config) -> None:
  """Checks what gives pool rows their domain."""
  chosen, column = config.prune.domains, config.pool.domain_column
  check_keys.one_of('config.prune.domains', chosen, (*blocks.DOMAINS, *config.references))
  if chosen == 'column' and not column:
    raise ConfigError(
      "config.prune.domains='column', but config.pool.domain_column is empty. Name a column of "
      'config.pool.columns.'
    )
  if column:
    check_splits.check_column(config, 'config.pool.domain_column', column)


def _planted(config: Config) -> None:
  """Checks the planted copies of test images and the splits that contain them."""
  block, where = config.planted, 'config.planted'
  for name in config.splits:
    if blocks.holds_planted(config, name):
      if not block.benchmark:
        raise ConfigError(
          f'config.splits.{name}: the rule planted needs {where}.benchmark, the images to copy.'
        )
      for kind in config.splits[name].export:
        if kind in key_lists.OF_POOL:
          raise ConfigError(
            f'config.splits.{name}.export: {kind!r} lists keys of the pool only, so training on '
            'it would miss the planted copies. Use keys, webdataset or array_record.'
          )
  if not block.benchmark:
    return
  check_keys.one_of(f'{where}.benchmark', block.benchmark, config.benchmarks)
  if blocks.is_retrieval(config.benchmarks[block.benchmark]):
    raise ConfigError(
      f'{where}.benchmark={block.benchmark!r}: retrieval has no class names for the captions of '
      'the copies. Plant a benchmark with classes.'
    )
  if config.embedder.source == 'files':
    raise ConfigError(
      f'{where}.benchmark={block.benchmark!r}: planted copies need images, but '
      "config.embedder.source=files gives vectors only. Set it to ''."
    )


def _vectors(config: Config) -> None:
  """Checks that no embedder and no export needs images of a dataset that has vectors only."""
  vector_datasets = [
    name for name in blocks.datasets(config) if not blocks.has_own_images(config, name)
  ]
  source = config.embedder.source
  if source == 'files':
    for name, dataset in blocks.datasets(config).items():
      if other := [
        part.format for _, part in blocks.flatten(dataset) if part.format != blocks.VECTORS
      ]:
        raise ConfigError(
          f'config.embedder.source=files needs vector files of every dataset, but {name} has '
          f'format {other[0]!r}. Give its vectors (format=embeddings), or the weights that made '
          'the other vectors: --config.embedder.source=weights. If all are images, '
          'set embedder.source=weights or, without weights, --config.embedder.source=hog.'
        )
  elif vector_datasets and not blocks.uses_weights_file(config.embedder):
    raise ConfigError(
      f'config.embedder.source={source}: {vector_datasets[0]} holds vectors of another embedder '
      '(format embeddings), which are not comparable. Use --config.embedder.source=files, or '
      'weights, with the weights that made the vectors. If the files are images, set the format of '
      f'{vector_datasets[0]}: webdataset, parquet or folder.'
    )
  for name in vector_datasets:
    for prefix, block in blocks.flatten(blocks.datasets(config)[name]):
      if block.images and not blocks.is_absent(block) and not keyed_images.exists(block.images):
        flag = benchmark_dirs.flag(
          config, name, f'sources.{prefix[:-1]}.images' if prefix else 'images'
        )
        raise ConfigError(
          f'{flag}={block.images} is neither a folder of images nor tars. Correct or remove it.'
        )
  if blocks.POOL in vector_datasets:
    for name, split in config.splits.items():
      if copies := [kind for kind in split.export if kind in ('webdataset', 'array_record')]:
        raise ConfigError(
          f'config.splits.{name}.export: {copies[0]} copies images, but the pool has none (format '
          'embeddings). Export datacomp, keys or clip_ood.'
        )
    if not (config.benchmarks or config.splits or config.references):
      raise ConfigError(
        'The config has no benchmarks, splits or references. Name benchmarks, for example '
        "--config.benchmark_dirs='sketch=DIR,val=DIR'."
      )


def stages(config: Config, names: Sequence[str]) -> None:
  """Raises ConfigError if a stage that will run needs images of a dataset that has none."""
  reads = {
    'train': [blocks.POOL, *([blocks.ANCHOR] if blocks.has_anchor(config) else [])],
    'evaluate': list(config.benchmarks),
  }
  if not config.splits:
    return
  for stage, datasets in reads.items():
    for name in datasets if stage in names else ():
      if not blocks.has_own_images(config, name):
        raise ConfigError(
          f'{name} has no images (format embeddings), but the stage {stage} needs them for the '
          "config's splits. Skip this stage: "
          '--stages=ingest,embedder,embed,dedup,search,prune,report.'
        )
    if stage in names and not blocks.has_model(config):
      raise ConfigError(
        f'The stage {stage} needs a model: set config.model.name, for example to ViT-B-32, or the '
        'numbers of config.model. Without a model and --stages, nothing is trained.'
      )


def prompts(x: Experiment, names: Sequence[str]) -> None:
  """Raises ConfigError if prompts or captions of the stages would name wnids or numbers.

  It reads the lists of source files; class names that only the samples hold are known after ingest.
  """
  if not blocks.runs_to_train(x.config):
    return
  datasets = list(x.config.benchmarks) if 'evaluate' in names else []
  datasets += blocks.base_datasets(x.config) if 'train' in names else []
  for name in datasets:
    for shard in x.graph.shards(name):
      if name in x.config.benchmarks or shard.block.caption_template:
        flag = benchmark_dirs.flag(x.config, name, f'{_source(shard.prefix)}classes')
        check_keys.prompt_names(flag, shard.classes, shard.block.classes)


def _source(prefix: str) -> str:
  """Returns 'sources.name.' for the prefix 'name/' of a source in a concat."""
  return ''.join(f'sources.{name}.' for name in prefix.split('/') if name)


def _embedders(config: Config) -> None:
  """Checks the further embedders and the keys that name them."""
  for name, block in config.embedders.items():
    if block.source == 'files':
      raise ConfigError(
        f'config.embedders.{name}.source=files: vector files belong to config.embedder only. To '
        'compare them with other vectors, use two work directories.'
      )
  p = config.prune
  users = [
    ('dedup.embedder', config.dedup.embedder),
    ('prune.preview', p.preview),
    *(('prune.sensitivity', name) for name in p.sensitivity),
    *((f'splits.{split}.embedder', block.embedder) for split, block in config.splits.items()),
  ]
  for key, name in users:
    if name:
      check_keys.one_of(f'config.{key}', name, config.embedders)
      for dataset in blocks.datasets(config):
        if not blocks.has_own_images(config, dataset):
          raise ConfigError(
            f'config.{key}={name!r}: a further embedder needs images, but {dataset} has vectors '
            'only (format embeddings). Remove this key, or give images.'
          )
  if config.dedup.embedder and config.benchmarks and not p.duplicate_similarity:
    raise ConfigError(
      f'config.dedup.threshold={config.dedup.threshold} applies to similarities of '
      f'config.dedup.embedder={config.dedup.embedder!r}, but the search uses config.embedder. Set '
      'its duplicate threshold, for example --config.prune.duplicate_similarity=0.95.'
    )
  if len(set(p.sensitivity)) != len(p.sensitivity):
    raise ConfigError(f'config.prune.sensitivity={p.sensitivity} names an embedder twice.')
  if p.sensitivity and config.search.backend != 'exact':
    raise ConfigError(
      'config.prune.sensitivity compares all candidates, but ScaNN does not score all of them. Use '
      '--config.search.backend=exact.'
    )


def _dedup(config: Config) -> None:
  d = config.dedup
  if not d.enabled:
    return
  if 0 < d.sample_rows < d.clusters:
    raise ConfigError(
      f'config.dedup.sample_rows={d.sample_rows} must be at least '
      f'config.dedup.clusters={d.clusters}: each cluster starts from a sampled row.'
    )
  block, where = config.embedder, 'config.embedder'
  if d.embedder in config.embedders:
    block, where = config.embedders[d.embedder], f'config.embedders.{d.embedder}'
  if d.survivor == 'best' and block.source not in ('train', 'weights'):
    raise ConfigError(
      f"config.dedup.survivor='best' compares images with captions, but {where}.source="
      f"{block.source!r} has no text tower. Use 'train' or 'weights', here or in "
      'config.dedup.embedder, or another survivor.'
    )
  if d.survivor == 'largest' and config.pool.format == 'embeddings':
    raise ConfigError(
      "config.dedup.survivor='largest' needs image sizes, but config.pool has vectors only. Use "
      "'first' or 'longest'."
    )


def embedder_weights(x: Experiment, is_plan: bool = False) -> None:
  """Checks that the weights file of each embedder exists and holds a supported model.

  A plan does without the file if the model has a name. Not a part of `check`: the evaluate command
  uses a config without its embedder.
  """
  for name in ('', *blocks.further_embedders(x.config)):
    view, where = x.with_embedder(name), f'config.embedders.{name}' if name else 'config.embedder'
    if not blocks.uses_weights_file(view.embedder_block):
      continue
    setting, path = view.embedder_block.path, models.weights_path(view)
    if not setting:
      raise ConfigError(
        f'{where}.path is missing: give a weights file, for example '
        f'--{where}.path=open_clip_model.safetensors.'
      )
    if not models.is_weights(path):
      raise ConfigError(f'{where}.path={setting!r} must end in {", ".join(weights.ENDINGS)}.')
    if not os.path.isfile(path):
      if is_plan and (view.embedder_block.name or view.embedder_block.source == 'sscd'):
        continue
      without = f' To plan without it, give {where}.name, its open_clip model.' if is_plan else ''
      raise ConfigError(f'{where}.path={setting!r} does not exist.{without}')
    if view.embedder_block.source == 'sscd':
      sscd.refuse_torchscript(path)
      continue
    models.embedder_architecture(view)
    has_prompts = any(blocks.is_prompts(x.config, reference) for reference in x.config.references)
    d = x.config.dedup
    if (has_prompts and not name) or (d.survivor == 'best' and d.embedder == name):
      models.check_tokenizer(view)


def _model(config: Config) -> None:
  vision = models.architecture(config).vision
  if config.train.patch_dropout and not isinstance(vision, zoo.ViTConfig):
    raise ConfigError(
      f'config.train.patch_dropout={config.train.patch_dropout}: the image tower of '
      f'{config.model.name} has no patches. Set it to 0.'
    )

  if config.train.microbatches > 1 and isinstance(vision, zoo.ResNetConfig):
    raise ConfigError(
      f'config.train.microbatches={config.train.microbatches}: the batch norms of '
      f'{config.model.name} take the whole batch. Set it to 1.'
    )


def _training(config: Config) -> None:
  t = config.train
  if t.order == 'blocks' and t.loader_processes:
    raise ConfigError(
      f'config.train.order=blocks with config.train.loader_processes={t.loader_processes}: each '
      'process would read all data. Set loader_processes to 0 and use more loader_threads.'
    )
  if t.keep_best and (
    t.keep_best not in config.benchmarks or blocks.is_retrieval(config.benchmarks[t.keep_best])
  ):
    raise ConfigError(
      f'config.train.keep_best={t.keep_best!r} must be a benchmark with classes.'
      f'{config_lib.did_you_mean(t.keep_best, config.benchmarks)}'
    )
  if config.evaluate.ema and not t.ema_decay:
    raise ConfigError(
      'config.evaluate.ema=True needs moving averages: set config.train.ema_decay, such as 0.999.'
    )
  budgets = {blocks.budget(config, split) for split in config.splits} or {t.budget}
  if 'samples' in budgets and t.samples < t.batch_size:
    raise ConfigError(
      f'config.train.samples={t.samples} is less than one batch ({t.batch_size}). Set the samples '
      'per run, or --config.train.budget=epochs.'
    )
  if 'epochs' in budgets and t.epochs <= 0:
    raise ConfigError(f'config.train.epochs={t.epochs} must be more than 0.')
  runs = [f'{split}/seed{seed}' for split, seed in blocks.runs_to_train(config)]
  for run in t.only:
    check_keys.one_of('config.train.only', run, runs)
