"""Finds likely mistakes in a config, for --dry_run. They stop no run; errors are in check.py.

In: the config and, as far as they exist, the pool's index and the finished splits. Out: sentences.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array, Config
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import zoo
from clip_jax.pruning import cells
from clip_jax.stages import domains, export, models

PAPERS = 'ViT-B-16-plus-240'  # the embedder of the paper, for which dedup.threshold is


def advice(x: Experiment, names: Sequence[str]) -> list[str]:
  """Returns one sentence for each likely mistake, for the stages that would run."""
  sentences = [*unfit_threshold(x)]
  if {'train', 'evaluate', 'report'} & set(names):
    sentences += _answer(x)
  if 'train' in names:
    sentences += _batches(x)
  if 'prune' in names and is_indexed(x):
    sentences += [*_keys(x), *_domains(x)]
    if blocks.domain_source(x.config)[0] == 'column':  # others need vectors: the stage prune warns
      sentences += domains.expected_removal(x, x.config.splits)
  return sentences


def _batches(x: Experiment) -> Iterator[str]:
  """Yields the splits of the anchor alone that are smaller than a batch."""
  if not blocks.runs_to_train(x.config) or not workdir.is_ingested(x, blocks.ANCHOR):
    return
  rows, batch = len(workdir.source(x, blocks.ANCHOR)), x.config.train.batch_size
  for name, split in x.config.splits.items():
    if split.rule == 'anchor' and rows < batch:
      yield (
        f'config.splits.{name} has {rows:,} rows, less than one batch ({batch:,}), so it cannot be '
        'trained on. Lower config.train.batch_size, or give a larger anchor.'
      )


def is_indexed(x: Experiment) -> bool:
  """Returns whether the pool's index is finished and fits the config."""
  return products.status(x.workdir, x.graph.index(POOL)) == 'fits'


def _answer(x: Experiment) -> Iterator[str]:
  """Yields the splits without which the report gives no answer."""
  config = x.config
  rules = {config.splits[name].rule for name in config.splits}
  if not blocks.runs_to_train(config):
    return
  yield from _held_back(config)
  aligned = [
    name
    for name in config.splits
    if blocks.rule_of(config, name).is_aligned and not blocks.holds_back(config, name)
  ]
  if not aligned:
    return
  for rule, name, what in (
    ('all', 'base', 'the accuracy before pruning'),
    ('anchor', 'anchor_only', 'the accuracy of the anchor alone'),
  ):
    if rule not in rules:
      yield (
        f'No split has the rule {rule!r}, {what}, so the report cannot say how much {aligned[0]} '
        f"explains. Add config.splits.{name} = defaults.split(rule='{rule}')."
      )


def _held_back(config: Config) -> Iterator[str]:
  """Yields the splits that hold queries back and have no control."""
  if any(config.splits[name].rule == 'all' for name in config.splits):
    return
  for name in config.splits:
    has_random = any(block.size_of == name for block in config.splits.values())
    if blocks.holds_back(config, name) and not has_random:
      yield (
        f'config.splits.{name} holds queries back, but no split is its control, so the report '
        'cannot compare aligned with held-back queries. Add config.splits.base = '
        "defaults.split(rule='all') "
        f"or config.splits.{name}_random = defaults.split(rule='random', size_of={name!r})."
      )


def unfit_threshold(x: Experiment) -> Iterator[str]:
  """Yields the paper's threshold if it is applied to another embedder."""
  config = x.config
  d = config.dedup
  is_used = d.enabled or (config.benchmarks and not config.prune.duplicate_similarity)
  if not is_used or d.threshold != defaults.DEDUP['threshold'].default:
    return
  view = x.with_embedder(d.embedder if d.enabled else '')
  block = view.embedder_block
  if block.source == 'weights' and models.embedder_architecture(view) == zoo.by_name(PAPERS):
    return
  key = 'dedup.threshold' if d.enabled else 'prune.duplicate_similarity'
  unless = f', unless {PAPERS} made them' if block.source == 'files' else ''
  yield (
    f'config.dedup.threshold={d.threshold:g} is the paper\u2019s value for {PAPERS}, but the '
    f'vectors are of another embedder (source {block.source!r}){unless}: pairs at similarity '
    f'{1 - d.threshold:g} may be no duplicates. Set config.{key} for this embedder.'
  )


def _keys(x: Experiment) -> Iterator[str]:
  """Yields what is wrong with the keys of exports and listed splits."""
  try:
    export.check_keys(x)
  except (ConfigError, InputError) as error:
    yield str(error)
    return
  for split in _listed_splits(x):
    if missing := export.not_in_pool(x, split, export.find_listed(x, split)):
      yield f'config.splits.{split}: {missing}'


def _listed_splits(x: Experiment) -> list[str]:
  return [name for name in x.config.splits if 'file' in blocks.rule_of(x.config, name).keys]


def _domains(x: Experiment) -> Iterator[str]:
  """Yields the domains of which a split keeps no row."""
  kind, column = blocks.domain_source(x.config)
  if kind != 'column':
    return
  for split in x.config.splits:
    if gone := _gone(x, split, column):
      yield (
        f'config.splits.{split} removes 100 % of {column} {", ".join(map(repr, gone))}: this is '
        'domain removal.'
      )


def _gone(x: Experiment, split: str, column: str) -> list[str]:
  """Returns the domains that a split removes, as far as the index and split.json tell."""
  if products.status(x.workdir, x.graph.split(split)) == 'fits':
    by_domain = workdir.split_json(x, split).get('by_domain', {})
    return [name for name, figures in by_domain.items() if name and figures['share'] == 1]
  block, source = x.config.splits[split], workdir.source(x, POOL)
  levels = lambda name: cells.levels(pa.array(source.column(name), from_pandas=True))
  if block.rule == 'domain_removal' and block.column:
    codes, names = levels(block.column)
    is_kept = ~np.isin(names, list(map(str, block['values'])))[codes]  # [N]
  elif split in _listed_splits(x):
    is_kept = np.zeros(len(source), bool)
    is_kept[_rows(x, split)] = True
  else:
    return []
  codes, names = levels(column)
  left = np.bincount(codes[is_kept], minlength=len(names))
  return [name for name, count in zip(names, left, strict=True) if name and not count]


def _rows(x: Experiment, split: str) -> Array:
  try:
    return export.find_listed(x, split).rows
  except InputError:  # `_keys` says why
    return np.arange(len(workdir.source(x, POOL)))
