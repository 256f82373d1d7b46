"""config.benchmark_dirs: more benchmarks, named on the command line, where no keys can be added to
a config.

'name=DIR,other=DIR' makes config.benchmarks.name and config.benchmarks.other, each like
config.benchmark_template; what lies in DIR says the format, where the template does not.
"""

import copy
import glob
import os
import re

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config
from clip_jax.data import folder, listing, storage, vectors

EXAMPLE = "--config.benchmark_dirs='sketch=DIR,val=DIR'"
FORMATS = (
  'embeddings',
  'webdataset',
  'parquet',
  'array_record',
)  # told by their files; folders by their images


def resolve(config: Config) -> Config:
  """Returns a config with the benchmarks of config.benchmark_dirs; the same one where there are
  none.

  Raises ConfigError for a part without '=', a name that is there already, a DIR in which nothing is
  known.
  """
  if not config.benchmark_dirs.strip():
    return config
  found = config.copy_and_resolve_references()  # it may be locked
  found.unlock()
  for part in _parts(config.benchmark_dirs):
    name, equals, path = (text.strip() for text in part.partition('='))
    if not equals or not name or not path:
      raise ConfigError(
        f'config.benchmark_dirs: {part.strip()!r} is not name=DIR. Write {EXAMPLE}.'
      )
    if name in found.benchmarks:
      raise ConfigError(
        f'config.benchmark_dirs: there are two benchmarks named {name!r}. Give each its own name.'
      )
    block = copy.deepcopy(found.benchmark_template)
    block.path = os.path.expanduser(path)
    block.format = block.format or format_of(name, block.path, bool(block.vector_dim))
    found.benchmarks[name] = block
  return found


def flag(config: Config, dataset: str, key: str) -> str:
  """Returns the flag that sets a key of a dataset; a benchmark of benchmark_dirs has it from the
  template.
  """
  if any(part.partition('=')[0].strip() == dataset for part in _parts(config.benchmark_dirs)):
    return f'--config.benchmark_template.{key}'
  group = next(
    (f'{group}.' for group in ('benchmarks', 'references') if dataset in config[group]), ''
  )
  return f'--config.{group}{dataset}.{key}'


def _parts(text: str) -> list[str]:
  """Returns the parts between commas; a comma that no 'name=' follows belongs to a path, as in
  '{a,b}/*.npy'.
  """
  parts = re.split(r',(?=\s*[A-Za-z0-9_-]+\s*=)', text.rstrip(' ,') or text)
  return [part for part in parts if part.strip(' ,')] or [text]


def format_of(name: str, path: str, headerless: bool = False) -> str:
  """Returns the format of a benchmark by what lies at a path: vectors, tars, or images in folders.

  headerless: files of an unknown ending are vectors, too. Raises ConfigError where nothing is known
  there.
  """
  ending, is_folder = os.path.splitext(path.partition('?')[0])[1].lower(), True
  if not storage.is_remote(path) and not os.path.isdir(path):
    is_folder = False
    found = sorted(
      file for part in listing.expanded(path) for file in glob.glob(part, recursive=True)
    )
    if not found:
      raise ConfigError(f'config.benchmark_dirs: {name}={path!r} is not there. Correct the path.')
    ending = os.path.splitext(found[0])[1].lower()
  known = {
    '.npy': 'embeddings',
    '.npz': 'embeddings',
    '.tar': 'webdataset',
    '.parquet': 'parquet',
    '.array_record': 'array_record',
    '.arrayrecord': 'array_record',
  }
  format_ = known.get(ending) or (_inside(path) if is_folder else '')
  if not format_ and headerless:
    return 'embeddings'
  if not format_:
    raise ConfigError(
      f'config.benchmark_dirs: {name}={path!r} holds no .npy, .npz, .parquet, .tar or '
      '.array_record '
      'file, and no folder of images. Correct the path, or say what it is in '
      '--config.benchmark_template.format.'
    )
  if format_ == 'parquet':
    first = listing.list_files('parquet', path)[0].path
    return 'embeddings' if vectors.is_vectors(first) else 'parquet'
  return format_


def _inside(path: str) -> str:
  """Returns the format of what a folder holds, '' where it is none."""
  for format_ in FORMATS:
    try:
      first = listing.list_files(format_, path)[0].path
    except listing.NoFiles:
      continue
    # A folder of parquet files is listed as vectors, too: what is in them says which they are.
    return 'parquet' if first.endswith('.parquet') else format_
  if not storage.is_remote(path) and os.path.isdir(path) and next(folder.paths(path), None):
    return 'folder'
  return ''
