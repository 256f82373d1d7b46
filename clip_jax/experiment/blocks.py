"""What a config asks for, in the words of the experiment: its datasets, its splits, its runs.

Pure in the config.
"""

from collections.abc import Sequence

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core.types import Config
from clip_jax.pruning import rules

POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES, PLANTED, SIZES = (
  'pool',
  'anchor',
  'glyphs',
  'anchor_classes',
  'planted',
  'sizes',
)
RESERVED = (
  POOL,
  ANCHOR,
  GLYPHS,
  ANCHOR_CLASSES,
  PLANTED,
  SIZES,
)  # names that no benchmark and no reference may have
TRAINED = (
  POOL,
  ANCHOR,
  PLANTED,
)  # datasets whose samples need a caption; the base set has their rows in this order
VECTORS = 'embeddings'  # the format whose files are vectors
# Config keys that change what a training run learns, beside the model, the preprocessing and the
# seed.
RECIPE = tuple(
  f'train.{key}'
  for key in (
    'batch_size',
    'learning_rate',
    'warmup_steps',
    'weight_decay',
    'beta1',
    'beta2',
    'eps',
    'dtype',
    'loss',
    'patch_dropout',
    'order',
    'jpeg_shrink',
  )
)


def has_anchor(config: Config) -> bool:
  """Returns whether an anchor is configured: an audit's has the format of vectors and may have no
  path.
  """
  return bool(config.anchor.format) and (
    config.anchor.format != VECTORS or bool(config.anchor.path)
  )


def datasets(config: Config) -> dict[str, Config]:
  """Returns name -> block of every dataset: pool, anchor (if any), benchmarks, references of
  samples, planted copies.

  The copies of a benchmark that are planted come last: they are drawn once that benchmark is
  indexed.
  """
  anchor = {ANCHOR: config.anchor} if has_anchor(config) else {}
  return {
    POOL: config.pool,
    **anchor,
    **{name: config.benchmarks[name] for name in config.benchmarks},
    **{name: config.references[name] for name in config.references if not is_prompts(config, name)},
    **({PLANTED: _planted_block(config)} if config.planted.benchmark else {}),
  }


def _planted_block(config: Config) -> Config:
  """Returns the block of the dataset of planted copies, which are tars that the stage ingest
  draws.
  """
  return defaults.dataset(
    format=PLANTED,
    label_key='label',
    group_key='group',
    columns=('query', 'kind', 'copy'),
    classes=tuple(config.benchmarks[config.planted.benchmark].classes),
  )


def trained(config: Config) -> list[str]:
  """Returns the datasets of the base set, in the order of its rows."""
  return [name for name in TRAINED if name in datasets(config)]


def flatten(block: Config, prefix: str = '') -> list[tuple[str, Config]]:
  """Returns (prefix, block) of each source of a dataset; one for any format but 'concat'."""
  if block.format != 'concat':
    return [(prefix, block)]
  return [
    pair for name in block.sources for pair in flatten(block.sources[name], f'{prefix}{name}/')
  ]


def parts(config: Config, dataset: str) -> list[Config]:
  """Returns the blocks of the sources of a dataset."""
  return [block for _, block in flatten(datasets(config)[dataset])]


def has_own_images(config: Config, dataset: str) -> bool:
  """Returns whether a dataset is images, as training and evaluation need; vectors alone are not."""
  return all(block.format != VECTORS for block in parts(config, dataset))


def is_labelled(block: Config) -> bool:
  """Returns whether the samples of a dataset have labels, as far as its block says."""
  return all(part.label_key or part.format in ('folder', GLYPHS) for _, part in flatten(block))


def is_prompts(config: Config, reference: str) -> bool:
  """Returns whether a reference is prompts, which the embedder's text tower encodes: no dataset."""
  return config.references[reference].format == 'prompts'


def further_embedders(config: Config, stage: str = 'embed') -> list[str]:
  """Returns which of config.embedders a stage runs for, in their order.

  dedup.embedder: embedder, embed of pool and anchor; prune.preview: embedder, embed;
  prune.sensitivity: search, too.
  """
  names = set(config.prune.sensitivity)
  if stage != 'search':
    names |= {config.prune.preview, config.dedup.embedder if config.dedup.enabled else ''}
  return [
    name for name in config.embedders if name in names and stage in ('embedder', 'embed', 'search')
  ]


def embedded_datasets(config: Config, embedder: str = '') -> list[str]:
  """Returns the datasets that an embedder embeds: one that only de-duplication uses embeds pool and
  anchor.
  """
  names = list(datasets(config))
  if not embedder or embedder in (*config.prune.sensitivity, config.prune.preview):
    return [name for name in names if not embedder or name not in config.references]
  return [name for name in names if name in (POOL, ANCHOR)]


def targets(config: Config, embedder: str = '') -> list[str]:
  """Returns what the pool is searched with: benchmarks, the classes of a labelled anchor,
  references.
  """
  names = list(config.benchmarks)
  if has_anchor(config) and is_labelled(config.anchor):
    names.append(ANCHOR_CLASSES)
  return names if embedder else [*names, *config.references]


def duplicate_similarity(config: Config, embedder: str = '') -> float:
  """Returns the cosine similarity to an embedder from which two images count as duplicates.

  dedup.threshold is that of the embedder that de-duplicates; the config check asks for the other
  one.
  """
  own_threshold = embedder and embedder == config.dedup.embedder
  return (0 if own_threshold else config.prune.duplicate_similarity) or 1 - config.dedup.threshold


def rule_of(config: Config, split: str) -> rules.Rule:
  """Returns the rule of a split."""
  return rules.RULES[config.splits[split].rule]


def parameters(config: Config, split: str) -> dict:
  """Returns the keys of a split that its rule reads, as plain values."""
  return {key: plain(config.splits[split][key]) for key in rule_of(config, split).keys}


def holds_planted(config: Config, split: str) -> bool:
  """Returns whether a split holds planted copies of test images."""
  return rule_of(config, split).planted


def appends_anchor(config: Config, split: str) -> bool:
  """Returns whether a split has the anchor's rows."""
  fixed = rule_of(config, split).append_anchor
  return has_anchor(config) and (config.splits[split].append_anchor if fixed is None else fixed)


def seeds(config: Config, split: str) -> tuple[int, ...]:
  """Returns the training seeds of a split."""
  return tuple(config.splits[split].seeds) or tuple(config.train.seeds)


def read_splits(config: Config, split: str) -> list[str]:
  """Returns the splits that a split is made from: whose size it has, whose control it is, which it
  joins.
  """
  block = config.splits[split]
  return [name for name in (block.size_of, block.to, *block.of) if name]


def in_order(config: Config) -> list[str]:
  """Returns the splits so that each comes after those that it is made from."""
  done: list[str] = []

  def visit(name: str) -> None:
    for other in read_splits(config, name):
      if other not in done:
        visit(other)
    if name not in done:
      done.append(name)

  for name in config.splits:
    visit(name)
  return done


def is_drawn(config: Config, split: str) -> bool:
  """Returns whether each training seed has rows of its own: a drawn rule, or a join with a split of
  one.
  """
  joined = [split]
  for name in joined:  # it grows; each split once, as there may be many ways to it
    joined += [other for other in config.splits[name].of if other not in joined]
  return any(rule_of(config, name).drawn for name in joined)


def seed_of(config: Config, split: str, other: str, seed: int) -> int:
  """Returns the seed whose draw of another split counts for (split, seed): the same where it has
  it, else its first.

  A split that is not drawn itself (near, of the size of a random one) has one seed to go by: its
  first.
  """
  seed = seed if is_drawn(config, split) else seeds(config, split)[0]
  return seed if seed in seeds(config, other) else seeds(config, other)[0]


def draws(config: Config, split: str) -> list[int]:
  """Returns the seeds of which a split has a file of rows each; one that is not drawn has one file:
  its first seed.
  """
  return list(seeds(config, split)) if is_drawn(config, split) else [seeds(config, split)[0]]


def runs(config: Config) -> list[tuple[str, int]]:
  """Returns every (split, seed) that the config trains, the first seeds of all splits first; of
  vectors, none.
  """
  if not has_own_images(config, POOL):
    return []
  pairs = [
    (order, split, seed)
    for split in config.splits
    for order, seed in enumerate(seeds(config, split))
  ]
  return [(split, seed) for _, split, seed in sorted(pairs, key=lambda pair: pair[0])]


def plain(block) -> dict:
  """Returns a config block as a plain nested dict."""
  return config_lib.plain(block.to_dict() if hasattr(block, 'to_dict') else block)


def pick(config: Config, names: Sequence[str]) -> dict:
  """Returns {'train.seeds': value, ...} for dotted keys; a block counts with all that is in it."""
  picked = {}
  for name in names:
    value = config
    for part in name.split('.'):
      value = value[part]
    picked[name] = plain(value)
  return picked


def recipe(config: Config) -> list[str]:
  """Returns the config keys of the recipe that count."""
  return [*RECIPE, *(['train.shuffle_window'] if config.train.order != 'global' else [])]
