"""Checks the block of a split: the keys that its rule reads, and the splits that it is made
from.
"""

import math
import os

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config
from clip_jax.data import shard_writer, table
from clip_jax.experiment import blocks
from clip_jax.pruning import key_lists, rules
from clip_jax.stages import check_keys

KEY_FILES = ('.npy', '.parquet', '.txt')  # what the rule listed reads


def check(config: Config, name: str) -> None:
  block, where = config.splits[name], f'config.splits.{name}'
  known = defaults.split_keys()
  check_keys.block(where, block, known)
  check_keys.one_of(f'{where}.rule', block.rule, rules.RULES)
  rule = rules.RULES[block.rule]
  for key in known:
    reads = key in (*rule.keys, 'rule', 'seeds', 'export') or (
      key == 'append_anchor' and rule.append_anchor is None
    )
    if not reads and block[key] != known[key].default:
      raise ConfigError(
        f'{where}.{key}={block[key]!r}: the rule {block.rule!r} does not read it (it reads '
        f'{", ".join(rule.keys) or "nothing"}).'
      )
  check_keys.different(f'{where}.benchmarks', block.benchmarks, config.benchmarks)
  if 'benchmarks' in rule.keys and not block.benchmarks:
    raise ConfigError(
      f'{where}: the rule {block.rule!r} needs benchmarks=(...); have '
      f'{", ".join(config.benchmarks) or "none"}.'
    )
  for kind in block.export:
    check_keys.one_of(f'{where}.export', kind, (*key_lists.LISTS, *shard_writer.COPIES))
  if 'file' in rule.keys and not os.path.isfile(os.path.expanduser(block.file)):
    raise ConfigError(
      f'{where}.file={block.file!r} is not there: the rule {block.rule!r} needs a file of keys.'
    )
  if 'file' in rule.keys and os.path.splitext(block.file)[1].lower() not in KEY_FILES:
    raise ConfigError(f'{where}.file={block.file!r} must end in {", ".join(KEY_FILES)}.')
  named = config.prune.export_key
  if (
    named
    and (block.export or 'file' in rule.keys)
    and config.pool.format != 'concat'
    and (named not in ('key', *config.pool.columns))
  ):
    raise ConfigError(
      f'config.prune.export_key={named!r} must be in config.pool.columns, or the index has no such '
      'column.'
    )
  if not blocks.has_anchor(config) and (
    'excess' in rule.needs or block.rule in ('anchor', 'matched')
  ):
    raise ConfigError(f'{where}: the rule {block.rule!r} needs an anchor; give config.anchor.')
  if config.search.backend == 'scann':
    if rule.every_row or block.quantile or block.dose:
      key = 'quantile' if block.quantile else 'dose'
      what = f'the rule {block.rule!r}' if rule.every_row else f'{key}={block[key]:g}'
      raise ConfigError(
        f"{where}: {what} needs every row's similarity, which ScaNN does not "
        'give. Use --config.search.backend=exact.'
      )
    if block.rule == 'gap_aligned' and not config.search.min_recall:
      raise ConfigError(
        f'{where}: gap_aligned on ScaNN misses rows. Say which recall you accept with '
        '--config.search.min_recall=0.99, or use --config.search.backend=exact.'
      )
  if 'count' in rule.needs:
    if bool(block.size) == bool(block.size_of):
      raise ConfigError(
        f'{where}: give size= (a share, or a count above 1) or size_of= (another split), one '
        'of the two.'
      )
    if not block.size >= 0 or (block.size > 1 and block.size != math.floor(block.size)):
      raise ConfigError(
        f'{where}.size={block.size} must be a share in (0, 1] or a whole number above 1.'
      )
  _aligned_keys(where, block)
  if 'levels' in rule.needs:
    _levels(config, where, block)
  _others(config, name)


def _aligned_keys(where: str, block: Config) -> None:
  """What says how much an aligned split drops; of other rules these keys are at their defaults."""
  given = [f'{key}={block[key]:g}' for key in ('slack', 'quantile', 'dose') if block[key]]
  if len(given) > 1:
    raise ConfigError(
      f'{where}: {" and ".join(given)} each say how much is dropped; give one of them.'
    )


def _levels(config: Config, where: str, block: Config) -> None:
  """What says of which domain or class a row is, and which of them go."""
  if bool(block.column) == bool(block.reference):
    raise ConfigError(
      f"{where}: give column= (of the pool's index) or reference= (one of config.references), one "
      'of the two.'
    )
  if not block['values'] or any(value in ('', None) for value in block['values']):
    raise ConfigError(
      f'{where}.values={block["values"]} must name what is dropped: '
      f'{"classes of the reference" if block.reference else "values of the column"}.'
    )
  if len({str(value) for value in block['values']}) < len(block['values']):
    raise ConfigError(f'{where}.values={block["values"]} names a value twice.')
  if block.column and config.pool.format != 'concat':  # its sources have columns of their own
    check_keys.one_of(
      f'{where}.column', block.column, dict.fromkeys([*config.pool.columns, *table.COLUMNS])
    )
  if block.reference:
    check_keys.one_of(f'{where}.reference', block.reference, config.references)
    classes = config.references[block.reference].classes
    for value in block['values'] if classes else ():
      check_keys.one_of(f'{where}.values', str(value), classes)


def _others(config: Config, name: str) -> None:
  """The splits that a split is made from: they are there, no circle, and of use to its rule."""
  block, where = config.splits[name], f'config.splits.{name}'
  rule = rules.RULES[block.rule]
  for key in ('size_of', 'to'):
    if block[key]:
      check_keys.one_of(f'{where}.{key}', block[key], config.splits)
  check_keys.different(f'{where}.of', block.of, config.splits)
  if 'others' in rule.needs and len(block.of) < 2:
    raise ConfigError(
      f'{where}.of={block.of} must name two or more splits, which the rule {block.rule!r} joins.'
    )
  circle = _circle(config, name)
  if circle:
    raise ConfigError(f'{where}: circular dependency between splits: {" -> ".join(circle)}.')
  if 'target' in rule.needs:
    selects = [other for other, made in rules.RULES.items() if made.selects]
    if not block.to:
      raise ConfigError(
        f'{where}: the rule matched needs to= (a split whose removed rows are imitated).'
      )
    if config.splits[block.to].rule not in selects:
      raise ConfigError(
        f'{where}.to={block.to!r} must be a split that removes rows for what they are, of rule '
        f'{", ".join(selects)}; it is of rule {config.splits[block.to].rule!r}.'
      )


def _circle(config: Config, name: str) -> list[str]:
  """Returns a way from a split back to itself, along what each is made from; [] where there is
  none.
  """
  came, todo = {}, [name]  # split -> who is made from it
  while todo:
    split = todo.pop()
    for other in blocks.read_splits(config, split):
      if other in config.splits and other not in came:
        came[other] = split
        todo.append(other)
  if name not in came:
    return []
  path = [name, came[name]]
  while path[-1] != name:
    path.append(came[path[-1]])
  return path[::-1]
