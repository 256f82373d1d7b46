"""Resolves the paths of all datasets when a command starts.

A relative path begins at config.root. Of a tuple of alternatives the first that exists is chosen.
An optional dataset of which no path exists is left out. A dataset without a format gets that of its
files. benchmark_dirs.py adds its benchmarks first. A dataset that is not there keeps the tuple of
its paths (blocks.is_absent): a plan (--dry_run, --graph) counts its expected_rows, a run stops
(check.are_found).
"""

import collections
from collections.abc import Mapping
import os

from absl import logging

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config
from clip_jax.data import filetree, listing, row_rules, storage
from clip_jax.experiment import blocks
from clip_jax.stages import benchmark_dirs

_FURTHER_PATHS = ('labels_file', 'metadata', 'images')  # keys of a dataset that name one path


def resolve(config: Config, is_plan: bool = False) -> Config:
  """Returns the config with the benchmarks of benchmark_dirs and with one path for each dataset.

  Relative paths of weights (embedders) and of lists (splits) begin at config.root, too. Logs the
  optional datasets that are left out. Raises ConfigError if config.root does not exist (not in a
  plan), or if every benchmark is optional and none exists.
  """
  root = filetree.absolute(config.root) if config.root else ''
  if root and not is_plan and not filetree.is_folder(root):
    raise ConfigError(f'config.root={config.root!r} is not a folder. Correct the path.')
  resolved = benchmark_dirs.resolve(config, root).copy_and_resolve_references()
  resolved.unlock()
  if resolved.pool.optional:
    raise ConfigError('config.pool.optional=True: an experiment needs its pool. Remove this key.')
  _locate('config.pool', resolved.pool, root, is_plan)
  if not _locate('config.anchor', resolved.anchor, root, is_plan):
    logging.info('Not found, left out: the anchor (%s).', places(resolved.anchor, root))
    resolved.anchor.format = ''
  absent: dict[str, Config] = {}
  for group in ('benchmarks', 'references'):
    for name, block in list(resolved[group].items()):
      if not _locate(f'config.{group}.{name}', block, root, is_plan):
        absent[name] = block
        del resolved[group][name]
  if absent and config.benchmarks and not resolved.benchmarks:
    first = next(iter(absent))
    count = len(config.benchmarks)
    raise ConfigError(
      f'None of the {count} benchmarks exists below {root or os.getcwd()}; for example '
      f'{first} would be {places(absent[first], root)}. Give the folder of the benchmarks, '
      f'--config.root=DIR, or the path of one, --config.benchmarks.{first}.path=DIR.'
    )
  if absent:
    logging.info('Not found, left out: %s.', ', '.join(_grouped(config, absent)))
  for block in (resolved.embedder, *resolved.embedders.values()):
    block.path = below(root, block.path) if block.path else ''
  for block in resolved.splits.values():
    block.file = below(root, block.file) if block.file else ''
  return resolved


def _grouped(config: Config, absent: Mapping[str, Config]) -> list[str]:
  """Returns the names of absent datasets; those that are averaged count under their common name."""
  group = lambda block: block.average if 'average' in block else ''
  groups = collections.Counter(filter(None, map(group, absent.values())))
  every = collections.Counter(map(group, config.benchmarks.values()))
  return [
    *(name for name, block in absent.items() if not group(block)),
    *(f'{name} ({count} of {every[name]} benchmarks)' for name, count in groups.items()),
  ]


def _locate(where: str, block: Config, root: str, is_plan: bool) -> bool:
  """Sets path and format of a dataset; returns False if it is optional and no path exists."""
  if block.format == 'concat':
    for name, part in list(block.sources.items()):
      if not _locate(f'{where}.sources.{name}', part, root, is_plan):
        logging.info('Not found, left out: the source %s of %s.', name, where)
        del block.sources[name]
    return bool(block.sources) or not block.optional
  if block.format == blocks.GLYPHS or not block.path:
    return not block.optional
  if not all(type(path) is str and path for path in _alternatives(block)):
    raise ConfigError(f'{where}.path={block.path!r} must be a path, or a tuple of paths.')
  for key in _FURTHER_PATHS:
    if block[key]:
      block[key] = below(root, block[key])
  choice = [below(root, path) for path in _alternatives(block)]
  is_looked_up = len(choice) > 1 or block.optional or is_plan  # else listing its files complains
  existing = next(filter(listing.exists, choice), '') if is_looked_up else ''
  if not existing and block.optional:
    return False
  if not existing and is_looked_up:
    block.path = tuple(choice)
    return True
  block.path = existing or choice[0]
  if blocks.is_retrieval(block):
    block.captions = _captions(block, root)
    if not (block.label_key or block.labels_file):
      block.label_key = row_rules.NO_LABELS  # a folder's class folders are no classes here
  if not block.format:
    path = os.path.expanduser(block.path)  # not a URL
    block.format = benchmark_dirs.format_of(f'{where}.path', path, bool(block.vector_dim))
  return True


def _captions(block: Config, root: str) -> str:
  """Returns the path of a file of captions: beside the images, else below the root; '' for none."""
  if not block.captions:
    return ''
  folders = [block.path, filetree.parent(block.path)]
  choice = [below(folder, block.captions) for folder in folders]
  return next(filter(filetree.is_file, choice), below(root, block.captions))


def below(root: str, path: str) -> str:
  """Returns a path below the root; absolute paths, '~' and URLs are returned unchanged."""
  if not root or storage.is_remote(path) or path.startswith(('/', '~', 'file://')):
    return path
  return os.path.join(root, path)


def _alternatives(block: Config) -> tuple[str, ...]:
  return (block.path,) if isinstance(block.path, str) else tuple(block.path)


def places(block: Config, root: str) -> str:
  """Returns the alternative paths of a dataset, in words."""
  return ' or '.join(below(root, path) for path in _alternatives(block)) or 'no path'
