"""Adds the benchmarks of config.benchmark_dirs to a config.

A command line cannot add keys to a config, but it can set this one. 'name=DIR,other=DIR' makes
config.benchmarks.name and config.benchmarks.other, each a copy of config.benchmark_template. If the
template has no format, the files in DIR determine it.
"""

import copy
import glob
import os
import re

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config
from clip_jax.data import filetree, folder, listing, storage, vectors

EXAMPLE = "--config.benchmark_dirs='sketch=DIR,val=DIR'"
FORMATS = (
  'embeddings',
  'webdataset',
  'parquet',
  'array_record',
)  # recognised by their files; 'folder' is recognised by its images


def resolve(config: Config, root: str = '') -> Config:
  """Returns the config plus the benchmarks of config.benchmark_dirs; unchanged if it is empty.

  root: the folder below which relative paths begin; '' is the current folder. Raises ConfigError
  for a part without '=', a repeated name, or a DIR of an unknown format.
  """
  if not config.benchmark_dirs.strip():
    return config
  resolved = config.copy_and_resolve_references()  # a copy, because the config may be locked
  resolved.unlock()
  for part in _parts(config.benchmark_dirs):
    name, equals, path = (text.strip() for text in part.partition('='))
    if not equals or not name or not path:
      raise ConfigError(
        f'config.benchmark_dirs: {part.strip()!r} is not name=DIR. Write {EXAMPLE}.'
      )
    if name in resolved.benchmarks:
      raise ConfigError(
        f'config.benchmark_dirs: two benchmarks have the name {name!r}. Rename one of them.'
      )
    block = copy.deepcopy(resolved.benchmark_template)
    path = os.path.expanduser(path)
    # An absolute path or a URL replaces the root.
    block.path = path if storage.is_remote(path) else os.path.join(root, path)
    block.format = block.format or format_of(
      f'config.benchmark_dirs: {name}', block.path, bool(block.vector_dim)
    )
    resolved.benchmarks[name] = block
  return resolved


def flag(config: Config, dataset: str, key: str) -> str:
  """Returns the flag that sets a key of a dataset.

  For a benchmark of benchmark_dirs it is a flag of the template.
  """
  if any(part.partition('=')[0].strip() == dataset for part in _parts(config.benchmark_dirs)):
    return f'--config.benchmark_template.{key}'
  group = next(
    (f'{group}.' for group in ('benchmarks', 'references') if dataset in config[group]), ''
  )
  return f'--config.{group}{dataset}.{key}'


def _parts(text: str) -> list[str]:
  """Returns the parts, separated by commas that a 'name=' follows.

  Other commas belong to a path, such as '{a,b}/*.npy'.
  """
  parts = re.split(r',(?=\s*[A-Za-z0-9_-]+\s*=)', text.rstrip(' ,') or text)
  return [part for part in parts if part.strip(' ,')] or [text]


def format_of(where: str, path: str, headerless: bool = False) -> str:
  """Returns the format of the files at a path: vectors, tars, parquet, array records or images.

  where: what names the path, for messages. headerless: files of an unknown ending are vectors.
  Raises ConfigError for no file or an unknown format.
  """
  ending, is_folder = os.path.splitext(path.partition('?')[0])[1].lower(), True
  if not storage.is_remote(path) and not os.path.isdir(path):
    is_folder = False
    matches = sorted(
      file for part in listing.expand_braces(path) for file in glob.glob(part, recursive=True)
    )
    if not matches:
      raise ConfigError(f'{where}={path!r} does not exist. Correct the path.')
    ending = os.path.splitext(matches[0])[1].lower()
  by_ending = {
    '.npy': 'embeddings',
    '.npz': 'embeddings',
    '.tar': 'webdataset',
    '.parquet': 'parquet',
    '.array_record': 'array_record',
    '.arrayrecord': 'array_record',
  }
  format_ = by_ending.get(ending) or (_inside(path) if is_folder else '')
  if not format_ and headerless:
    return 'embeddings'
  if not format_:
    raise ConfigError(
      f'{where}={path!r} has no .npy, .npz, .parquet, .tar or .array_record file and no folder of '
      'images. Correct the path, or give the format.'
    )
  if format_ == 'parquet':
    first = listing.list_files('parquet', path)[0].path
    return 'embeddings' if vectors.is_vectors(first) else 'parquet'
  return format_


def _inside(path: str) -> str:
  """Returns the format of a folder's files; '' if it is unknown."""
  for format_ in FORMATS:
    try:
      first = listing.list_files(format_, path)[0].path
    except listing.NoFiles:
      continue
    # Parquet files are listed under both formats; format_of looks at their columns.
    return 'parquet' if first.endswith('.parquet') else format_
  return 'folder' if filetree.is_folder(path) and next(folder.paths(path), None) else ''
