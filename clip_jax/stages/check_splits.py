"""Checks the block of a split: the keys that its rule reads and the splits it depends on."""

import math
import os

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config
from clip_jax.data import filetree, shard_writer, table
from clip_jax.experiment import blocks
from clip_jax.pruning import key_lists, rules
from clip_jax.stages import check_keys

KEY_FILES = ('.npy', '.parquet', '.txt', '.csv')  # file types that the rule listed reads


def check(config: Config, name: str) -> None:
  """Raises ConfigError for the first invalid key of config.splits[name]."""
  block, where = config.splits[name], f'config.splits.{name}'
  declared = defaults.split_keys()
  check_keys.check_block(where, block, declared)
  check_keys.one_of(f'{where}.rule', block.rule, rules.RULES)
  rule = rules.RULES[block.rule]
  for key in declared:
    reads = (
      key in (*rule.keys, 'rule', 'seeds', 'export', 'budget')
      or (key == 'append_anchor' and rule.append_anchor is None)
      or (key == 'embedder' and 'search' in rule.needs)
    )
    if not reads and block[key] != declared[key].default:
      own = '; it has the embedder of the split `to`' if 'target' in rule.needs else ''
      raise ConfigError(
        f'{where}.{key}={block[key]!r}: the rule {block.rule!r} does not read this key (it reads '
        f'{", ".join(rule.keys) or "none"}{own if key == "embedder" else ""}).'
      )
  check_keys.check_known_names(f'{where}.benchmarks', block.benchmarks, config.benchmarks)
  if 'benchmarks' in rule.keys and not block.benchmarks:
    raise ConfigError(
      f'{where}: the rule {block.rule!r} needs benchmarks=(...); the config has '
      f'{", ".join(config.benchmarks) or "none"}.'
    )
  if problem := rule.problem(blocks.parameters(config, name)):
    raise ConfigError(f'{where}: the rule {block.rule!r}: {problem}.')
  for kind in block.export:
    check_keys.one_of(f'{where}.export', kind, (*key_lists.LISTS, *shard_writer.COPIES))
  if 'file' in rule.keys and os.path.splitext(block.file)[1].lower() not in KEY_FILES:
    raise ConfigError(f'{where}.file={block.file!r} must end in {", ".join(KEY_FILES)}.')
  key_column = config.prune.export_key
  if (
    key_column
    and (block.export or 'file' in rule.keys)
    and config.pool.format != 'concat'
    and (key_column not in ('key', *config.pool.columns))
  ):
    raise ConfigError(
      f'config.prune.export_key={key_column!r} is not a column of the index. Add it to '
      'config.pool.columns.'
    )
  if not blocks.has_anchor(config) and (
    'excess' in rule.needs or block.rule in ('anchor', 'matched')
  ):
    raise ConfigError(f'{where}: the rule {block.rule!r} needs an anchor; give config.anchor.')
  if not blocks.has_anchor(config) and blocks.holds_back(config, name):
    raise ConfigError(
      f'{where}.queries={tuple(block.queries)} holds queries back, which needs an anchor: the '
      'neighbours that they keep are counted against it. Give config.anchor, or remove queries.'
    )
  if config.search.backend == 'scann':
    aligned_amount = rule.is_aligned and (block.quantile or block.dose)
    if rule.every_row or aligned_amount:
      key = 'quantile' if block.quantile else 'dose'
      reason = f'the rule {block.rule!r}' if rule.every_row else f'{key}={block[key]:g}'
      raise ConfigError(
        f'{where}: {reason} needs the similarity of every row, but ScaNN computes only some. Use '
        '--config.search.backend=exact.'
      )
    if block.rule == 'gap_aligned' and not config.search.min_recall:
      raise ConfigError(
        f'{where}: gap_aligned misses rows with ScaNN. Set the lowest recall that you accept, for '
        'example --config.search.min_recall=0.99, or use --config.search.backend=exact.'
      )
  if 'count' in rule.needs:
    if bool(block.size) == bool(block.size_of):
      raise ConfigError(
        f'{where}: give exactly one of size= (a share, or a count above 1) and size_of= (another '
        'split).'
      )
    if not block.size >= 0 or (block.size > 1 and block.size != math.floor(block.size)):
      raise ConfigError(
        f'{where}.size={block.size} must be a share in (0, 1] or a whole number above 1.'
      )
  _aligned_keys(where, block)
  if 'scores' in rule.needs:
    _scores(config, where, block.column)
  if 'levels' in rule.needs:
    _levels(config, where, block)
  if 'clusters' in rule.needs:
    _clusters(config, where, block)
  _dependencies(config, name)


def listed_files(config: Config) -> None:
  """Raises ConfigError if a file of keys does not exist. Not in a plan, which does without."""
  for name, block in config.splits.items():
    if 'file' in blocks.rule_of(config, name).keys and not filetree.is_file(block.file):
      raise ConfigError(
        f'config.splits.{name}.file={block.file!r} does not exist; the rule {block.rule!r} needs a '
        'file of keys.'
      )


def _aligned_keys(where: str, block: Config) -> None:
  """Checks slack, quantile and dose of an aligned split; other rules keep their defaults."""
  settings = [f'{key}={block[key]:g}' for key in ('slack', 'quantile', 'dose') if block[key]]
  if len(settings) > 1:
    raise ConfigError(f'{where}: give only one of {" and ".join(settings)}; each sets the amount.')


def _levels(config: Config, where: str, block: Config) -> None:
  """Checks the source of a row's domain or class, and the values that are dropped."""
  if bool(block.column) == bool(block.reference):
    raise ConfigError(
      f"{where}: give exactly one of column= (of the pool's index) and reference= (of "
      'config.references).'
    )
  if not block['values'] or any(value in ('', None) for value in block['values']):
    raise ConfigError(
      f'{where}.values={block["values"]} must name what to drop: '
      f'{"classes of the reference" if block.reference else "values of the column"}.'
    )
  if len({str(value) for value in block['values']}) < len(block['values']):
    raise ConfigError(f'{where}.values={block["values"]} contains a value twice.')
  if block.column:
    check_column(config, f'{where}.column', block.column)
  if block.reference:
    check_keys.one_of(f'{where}.reference', block.reference, config.references)
    classes = config.references[block.reference].classes
    for value in block['values'] if classes else ():
      check_keys.one_of(f'{where}.values', str(value), classes)


def _clusters(config: Config, where: str, block: Config) -> None:
  """Checks the dataset whose images choose the clusters."""
  if not block.reference and not blocks.has_anchor(config):
    raise ConfigError(
      f'{where}: the rule {block.rule!r} needs images that choose the clusters. Give an anchor '
      '(--config.anchor.path=DIR), or reference=, one of config.references or config.benchmarks.'
    )
  if block.reference:
    check_keys.one_of(
      f'{where}.reference', block.reference, (*config.references, *config.benchmarks)
    )
  if block.reference in config.references and blocks.is_prompts(config, block.reference):
    raise ConfigError(
      f'{where}.reference={block.reference!r} holds prompts. The rule {block.rule!r} needs images.'
    )


def check_pool_size(config: Config, rows: int) -> None:
  """Raises ConfigError for a split with more clusters than the pool has rows."""
  for name, block in config.splits.items():
    if block.clusters > rows:
      raise ConfigError(
        f'config.splits.{name}.clusters={block.clusters:,} is more than the {rows:,} rows of the '
        'pool. Give fewer clusters.'
      )


def _scores(config: Config, where: str, column: str) -> None:
  """Checks the column of numbers of the rule column."""
  if column != blocks.IMAGE_TEXT:
    check_column(config, f'{where}.column', column, blocks.IMAGE_TEXT)
  elif config.embedder.source not in ('train', 'weights'):
    raise ConfigError(
      f'{where}.column={column!r} compares images with captions, but config.embedder.source='
      f"{config.embedder.source!r} has no text tower. Use 'weights' or 'train'."
    )


def check_column(config: Config, where: str, column: str, *others: str) -> None:
  """Checks that the pool's index has a column; `others` are named in the message too."""
  if config.pool.format != 'concat':  # each source may have other columns
    known = dict.fromkeys([*config.pool.columns, *table.COLUMNS, *others])
    check_keys.one_of(where, column, known)


def _dependencies(config: Config, name: str) -> None:
  """Checks the splits that a split depends on: they exist, fit its rule and form no cycle."""
  block, where = config.splits[name], f'config.splits.{name}'
  rule = rules.RULES[block.rule]
  for key in ('size_of', 'to'):
    if block[key]:
      check_keys.one_of(f'{where}.{key}', block[key], config.splits)
      budgets = [blocks.budget(config, split) for split in (name, block[key])]
      if budgets[0] != budgets[1]:
        raise ConfigError(
          f'{where} has the budget {budgets[0]!r}, but {block[key]}, whose control it is, '
          f'{budgets[1]!r}. Set budget={budgets[1]!r}.'
        )
  check_keys.check_known_names(f'{where}.of', block.of, config.splits)
  if 'others' in rule.needs and len(block.of) < 2:
    raise ConfigError(
      f'{where}.of={block.of} must name two or more splits for the rule {block.rule!r} to join.'
    )
  cycle = _cycle(config, name)
  if cycle:
    raise ConfigError(f'{where}: circular dependency between splits: {" -> ".join(cycle)}.')
  if 'target' in rule.needs:
    selects = [other for other, candidate in rules.RULES.items() if candidate.selects]
    if not block.to:
      raise ConfigError(
        f'{where}: the rule matched needs to=, the split whose removed rows it matches.'
      )
    if config.splits[block.to].rule not in selects:
      raise ConfigError(
        f'{where}.to={block.to!r} has the rule {config.splits[block.to].rule!r}; it must be a '
        f'split of one of the rules {", ".join(selects)}.'
      )


def _cycle(config: Config, name: str) -> list[str]:
  """Returns a dependency path from a split back to itself; [] if there is none."""
  dependent, todo = {}, [name]  # split -> a split that depends on it
  while todo:
    split = todo.pop()
    for other in blocks.splits_needed_by(config, split):
      if other in config.splits and other not in dependent:
        dependent[other] = split
        todo.append(other)
  if name not in dependent:
    return []
  path = [name, dependent[name]]
  while path[-1] != name:
    path.append(dependent[path[-1]])
  return path[::-1]
