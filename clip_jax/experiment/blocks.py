"""Queries on the config: its datasets, embedders, splits and runs. Pure functions of the config."""

from collections.abc import Sequence
import hashlib
from typing import Any

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.core import sharding
from clip_jax.core.types import Config
from clip_jax.data import row_rules
from clip_jax.evaluation import class_sets
from clip_jax.pruning import rules

POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES, PLANTED, SIZES = (
  'pool',
  'anchor',
  'glyphs',
  'anchor_classes',
  'planted',
  'sizes',
)
# Names that no benchmark and no reference may have.
RESERVED = (POOL, ANCHOR, GLYPHS, ANCHOR_CLASSES, PLANTED, SIZES)
# The datasets of the base set, in the order of their rows. Their samples need a caption.
TRAINED = (POOL, ANCHOR, PLANTED)
# The column that the stage embed computes for the rule column: cosine similarity of image and
# caption by the main embedder. DataComp's CLIP score.
IMAGE_TEXT = 'image_text_similarity'
# Joins the name of a benchmark and a range of its queries in the name of a search target; no name
# in the config may contain it.
RANGE = '@'
VECTORS = 'embeddings'  # the format of datasets whose files are vectors
# Values of prune.domains that are no reference.
DOMAINS = ('auto', 'column', 'clusters', 'none')
# Config keys that change the result of a training run, besides model, preprocessing and seed.
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


def has_model(config: Config) -> bool:
  """Returns whether config.model names a model or gives numbers; without one nothing is trained."""
  return any(config.model.values())


def has_anchor(config: Config) -> bool:
  """Returns whether an anchor is configured. One of vectors also needs a path."""
  return bool(config.anchor.format) and (
    config.anchor.format != VECTORS or bool(config.anchor.path)
  )


def datasets(config: Config) -> dict[str, Config]:
  """Returns name -> block of every dataset.

  Order: pool, anchor (if any), benchmarks, references (but not prompts), planted copies. The copies
  come last because they are made from the index of a benchmark.
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
  """Returns the block of the planted copies, which the stage ingest writes as tars."""
  return defaults.dataset(
    format=PLANTED,
    label_key='label',
    group_key='group',
    columns=('query', 'kind', 'copy'),
    classes=given_classes(config.benchmarks[config.planted.benchmark]),
  )


def base_datasets(config: Config) -> list[str]:
  """Returns the datasets of the base set, in the order of its rows."""
  return [name for name in TRAINED if name in datasets(config)]


def flatten(block: Config, prefix: str = '') -> list[tuple[str, Config]]:
  """Returns (prefix, block) of each source of a dataset: several for 'concat', otherwise one."""
  if block.format != 'concat':
    return [(prefix, block)]
  return [
    pair
    for name in sorted(block.sources)
    for pair in flatten(block.sources[name], f'{prefix}{name}/')
  ]


def source_blocks(config: Config, dataset: str) -> list[Config]:
  """Returns the blocks of the sources of a dataset."""
  return [block for _, block in flatten(datasets(config)[dataset])]


def has_own_images(config: Config, dataset: str) -> bool:
  """Returns whether a dataset has images, not vectors only. Training and evaluation need them."""
  return all(block.format != VECTORS for block in source_blocks(config, dataset))


def is_labelled(block: Config) -> bool:
  """Returns whether the block of a dataset says that its samples have labels."""
  return all(
    part.label_key != row_rules.NO_LABELS and (part.label_key or part.format in ('folder', GLYPHS))
    for _, part in flatten(block)
  )


def is_absent(block: Config) -> bool:
  """Returns whether the files of a source are not there, and only a plan can do without them.

  Its path is then still the tuple of all alternatives (stages/dataset_paths.py).
  """
  return not isinstance(block.path, str)


def expected_rows(block: Config) -> int:
  """Returns the rows that the block of a dataset, or of all its sources, expects; 0: unknown."""
  each = [part.expected_rows for _, part in flatten(block)]
  return block.expected_rows or (sum(each) if all(each) else 0)


def class_set(block: Config) -> class_sets.ClassSet | None:
  """Returns the published classes that a benchmark's block names; None for other datasets."""
  is_published = 'class_set' in block and block.class_set  # a key of benchmarks only
  return class_sets.by_name(block.class_set) if is_published else None


def is_retrieval(block: Config) -> bool:
  """Returns whether the block of a dataset is that of a retrieval benchmark, without classes."""
  return 'task' in block and block.task == defaults.RETRIEVAL  # a key of benchmarks only


def classified(config: Config) -> list[str]:
  """Returns the benchmarks with classes: all but those of retrieval."""
  return [name for name, block in config.benchmarks.items() if not is_retrieval(block)]


def given_classes(block: Config) -> tuple[str, ...]:
  """Returns the class names that a dataset's block gives, in label order; () if it gives none."""
  found = class_set(block)
  return found.names if found else tuple(block.classes)


def is_prompts(config: Config, reference: str) -> bool:
  """Returns whether a reference is prompts, encoded by the text tower, and not a dataset."""
  return config.references[reference].format == 'prompts'


def searched_embedders(config: Config) -> set[str]:
  """Returns the names in config.embedders whose search splits or prune.sensitivity read."""
  return {
    *config.prune.sensitivity,
    *(split.embedder for split in config.splits.values() if split.embedder),
  }


def further_embedders(config: Config, stage: str = 'embed') -> list[str]:
  """Returns the names in config.embedders for which a stage runs, in their order.

  dedup.embedder and prune.preview: stages embedder and embed; those of splits and
  prune.sensitivity: also search.
  """
  names = searched_embedders(config)
  if stage != 'search':
    names |= {config.prune.preview, config.dedup.embedder if config.dedup.enabled else ''}
  return [
    name for name in config.embedders if name in names and stage in ('embedder', 'embed', 'search')
  ]


def embedded_datasets(config: Config, embedder: str = '') -> list[str]:
  """Returns the datasets that an embedder embeds.

  The main embedder: all; one used by de-duplication only: pool and anchor; others: all but
  references.
  """
  names = list(datasets(config))
  if not embedder or embedder in (*searched_embedders(config), config.prune.preview):
    return [name for name in names if not embedder or name not in config.references]
  return [name for name in names if name in (POOL, ANCHOR)]


def targets(config: Config, embedder: str = '') -> list[str]:
  """Returns the targets of the search.

  They are benchmarks, ranges of a benchmark's queries, classes of a labelled anchor, references.
  """
  names = list(dict.fromkeys([*config.benchmarks, *rule_targets(config, embedder)]))
  if has_anchor(config) and is_labelled(config.anchor):
    names.append(ANCHOR_CLASSES)
  return names if embedder else [*names, *config.references]


def rule_targets(config: Config, embedder: str = '') -> list[str]:
  """Returns the search targets that rules read of an embedder, each once.

  prune.sensitivity applies the rules of the main embedder's splits to further embedders as well.
  """
  read = {embedder} | ({''} if embedder in config.prune.sensitivity else set())
  splits = [split for split, block in config.splits.items() if block.embedder in read]
  return list(dict.fromkeys(name for split in splits for name in split_targets(config, split)))


def split_targets(config: Config, split: str) -> tuple[str, ...]:
  """Returns the search targets whose queries count for a split, one for each of its benchmarks."""
  block = config.splits[split]
  low, high = map(float, block.queries)
  return tuple(
    f'{name}{RANGE}{low!r}_{high!r}' if holds_back(config, split) else name
    for name in block.benchmarks
  )


def benchmark_of(target: str) -> str:
  """Returns the benchmark of a search target: 'sketch' of 'sketch@0.0_0.5' and of 'sketch'."""
  return target.partition(RANGE)[0]


def query_range(target: str) -> tuple[float, float]:
  """Returns the range of the queries that a search target holds: (0, 1) for all."""
  low, _, high = target.partition(RANGE)[2].partition('_')
  return (float(low), float(high)) if high else (0.0, 1.0)


def holds_back(config: Config, split: str) -> bool:
  """Returns whether some queries of a split's benchmarks do not count for pruning."""
  return tuple(config.splits[split].queries) != (0, 1)


def uses_weights_file(embedder: Config) -> bool:
  """Returns whether an embedder block reads its weights from the file embedder.path."""
  return embedder.source in ('weights', 'sscd')


def duplicate_similarity(config: Config, embedder: str = '') -> float:
  """Returns an embedder's cosine similarity from which two images count as duplicates.

  dedup.threshold holds for the embedder of de-duplication. If the main embedder is another one,
  prune.duplicate_similarity must be given (the config check requires it).
  """
  own_threshold = embedder and embedder == config.dedup.embedder
  return (0 if own_threshold else config.prune.duplicate_similarity) or 1 - config.dedup.threshold


def rule_of(config: Config, split: str) -> rules.Rule:
  """Returns the rule of a split."""
  return rules.RULES[config.splits[split].rule]


def parameters(config: Config, split: str) -> dict:
  """Returns the keys that the rule of a split reads, with plain values."""
  return {key: plain(config.splits[split][key]) for key in rule_of(config, split).keys}


def holds_planted(config: Config, split: str) -> bool:
  """Returns whether a split contains the planted copies of test images."""
  return rule_of(config, split).planted


def appends_anchor(config: Config, split: str) -> bool:
  """Returns whether a split contains the anchor's rows."""
  fixed = rule_of(config, split).append_anchor
  return has_anchor(config) and (config.splits[split].append_anchor if fixed is None else fixed)


def seeds(config: Config, split: str) -> tuple[int, ...]:
  """Returns the training seeds of a split."""
  return tuple(config.splits[split].seeds) or tuple(config.train.seeds)


def budget(config: Config, split: str) -> str:
  """Returns the budget of a split's runs: 'samples' or 'epochs'."""
  return config.splits[split].budget or config.train.budget


def splits_needed_by(config: Config, split: str) -> list[str]:
  """Returns the splits on which a split depends, through its keys size_of, to and of."""
  block = config.splits[split]
  return [name for name in (block.size_of, block.to, *block.of) if name]


def embedder_of(config: Config, split: str) -> str:
  """Returns the embedder of a split's similarities: a name in config.embedders, '' the main one.

  A matched control and a join have the embedder that the splits named in `to` and `of` share.
  """
  block = config.splits[split]
  named = {embedder_of(config, other) for other in (block.to, *block.of) if other}
  return block.embedder or (named.pop() if len(named) == 1 else '')


def cluster_reference(config: Config, split: str) -> str:
  """Returns the dataset whose images choose the clusters of a split of the rule clusters."""
  return config.splits[split].reference or ANCHOR


def domain_source(config: Config) -> tuple[str, str]:
  """Returns what gives a pool row its domain (config.prune.domains), as a kind and a name.

  ('column', its name) | ('reference', its name) | ('clusters', '') | ('', ''), no domain is known.
  The images of a reference that chooses clusters (rule clusters) are no domains.
  """
  chosen, column = config.prune.domains, config.pool.domain_column
  if chosen in ('auto', 'column') and column:
    return 'column', column
  if chosen not in DOMAINS:
    return 'reference', chosen
  choose_clusters = {
    split.reference for split in config.splits.values() if split.rule == 'clusters'
  }
  references = [
    name
    for name, block in config.references.items()
    if is_prompts(config, name) or (is_labelled(block) and name not in choose_clusters)
  ]
  if chosen == 'auto' and references:
    return 'reference', min(references, key=lambda name: is_prompts(config, name))  # the first
  if chosen in ('auto', 'clusters') and any(
    compares_domains(config, name) for name in config.splits
  ):
    return 'clusters', ''
  return '', ''


def compares_domains(config: Config, split: str) -> bool:
  """Returns whether a split is aligned or matched: its rows are compared by their domains."""
  rule = rule_of(config, split)
  return rule.is_aligned or 'anchor_classes' in rule.needs


def needs_image_text(config: Config) -> bool:
  """Returns whether a split selects rows by their image-text similarity."""
  return any(
    split.rule == 'column' and split.column == IMAGE_TEXT for split in config.splits.values()
  )


def in_order(config: Config) -> list[str]:
  """Returns the splits in an order in which each comes after those it depends on."""
  ordered: list[str] = []

  def visit(name: str) -> None:
    for other in splits_needed_by(config, name):
      if other not in ordered:
        visit(other)
    if name not in ordered:
      ordered.append(name)

  for name in config.splits:
    visit(name)
  return ordered


def is_drawn(config: Config, split: str) -> bool:
  """Returns whether each seed of a split has its own rows: by its rule or a joined split's."""
  joined = [split]
  for name in joined:  # the list grows; each split is added once
    joined += [other for other in config.splits[name].of if other not in joined]
  return any(rule_of(config, name).is_drawn for name in joined)


def seed_of(config: Config, split: str, other: str, seed: int) -> int:
  """Returns the seed of the rows of split `other` on which (split, seed) depends.

  It is the same seed if `other` has it, else the first seed of `other`. A split that is not drawn
  has one file of rows, which uses its first seed.
  """
  seed = seed if is_drawn(config, split) else seeds(config, split)[0]
  return seed if seed in seeds(config, other) else seeds(config, other)[0]


def row_file_seeds(config: Config, split: str) -> list[int]:
  """Returns the seeds for which a split has a file of rows: only the first if it is not drawn."""
  return list(seeds(config, split)) if is_drawn(config, split) else [seeds(config, split)[0]]


def runs_to_train(config: Config) -> list[tuple[str, int]]:
  """Returns every (split, seed) to train, first seeds first.

  [] if the pool is vectors only, or if the config has no model.
  """
  if not has_own_images(config, POOL) or not has_model(config):
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


def pick_keys(config: Config, names: Sequence[str]) -> dict:
  """Returns {'train.seeds': value, ...} for dotted keys; the value of a block is a plain dict."""
  picked = {}
  for name in names:
    value = config
    for part in name.split('.'):
      value = value[part]
    picked[name] = plain(value)
  return picked


def recipe(config: Config) -> list[str]:
  """Returns the keys of RECIPE, and those that other keys give an effect on the result."""
  t, more = config.train, []
  if t.order != 'global':
    more.append('train.shuffle_window')
  if t.patch_dropout and t.microbatches > 1:  # each microbatch draws its own patches
    more.append('train.microbatches')
  more += [f'train.{key}' for key in ('clip_norm', 'ema_decay') if t[key]]  # 0: no part of a key
  if t.loss_precision != 'float32':
    more.append('train.loss_precision')
  return [*RECIPE, *more]


def mesh(config: Config) -> Any:
  """Returns the mesh of training, as sharding.mesh."""
  return sharding.mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def common_digest(config: Config) -> str:
  """Returns a hash of all keys that processes must share to work together."""
  names = ('train', 'mesh', 'model', 'preprocess', 'dedup')
  shared = {name: config[name].to_dict() for name in names}
  return hashlib.sha256(config_lib.canonical(config_lib.plain(shared)).encode()).hexdigest()
