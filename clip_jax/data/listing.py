"""A dataset's path -> its files, in order: globs, braces, folders."""

import collections
from collections.abc import Sequence
import glob
import itertools
import os
import re

from clip_jax.core.errors import InputError
from clip_jax.data import formats
from clip_jax.data.storage import SourceFile
from clip_jax.data.storage import natural


def list_files(format: str, path: str) -> list[SourceFile]:
  """Returns the files of a dataset in order: natural order, braces as they are written.

  path: a file, a glob, braces ('{00000..00009}.tar', '{a,b}/*.tar') or a folder of tars; for format
  'folder' the folder of images. Raises InputError where it, or a file that braces name, is missing.
  """
  found_by = formats.get(format)
  if not path or '://' in path:
    raise InputError(f'path={path!r} is not on this machine, and samples are read at random places '
                     'of their files. Give a local or mounted path.')
  path = os.path.abspath(os.path.expanduser(path))
  if found_by.find:
    found = found_by.find(path)
  else:
    found = [file for pattern in _braces(path) for file in _matches(pattern, found_by.patterns)]
  if len(set(found)) < len(found):
    twice = next(file for file, count in collections.Counter(found).items() if count > 1)
    raise InputError(f'{path!r} means {twice} more than once. Correct the path of the dataset.')
  fixed = path if os.path.isdir(path) else os.path.dirname(
      path if os.path.exists(path) else re.split(r'[*?\[{]', path)[0])
  stats = map(os.stat, found)
  return [SourceFile(file, os.path.relpath(file, fixed), stat.st_size, stat.st_mtime)
          for file, stat in zip(found, stats, strict=True)]


def root(format: str, path: str) -> str:
  """Returns the folder from which the paths of images start, '' where images are not files."""
  return os.path.abspath(os.path.expanduser(path)) if formats.get(format).rooted else ''


def _matches(path: str, inside: Sequence[str]) -> list[str]:
  """Returns the files that a path, or a glob, means; inside: globs of what counts in a folder."""
  if os.path.isfile(path):
    return [path]
  patterns = [path]
  if os.path.isdir(path):
    patterns = [os.path.join(glob.escape(path), name) for name in inside]
  found = {file for pattern in patterns for file in glob.glob(pattern, recursive=True)}
  found = sorted(filter(os.path.isfile, found), key=natural)
  if not found:
    raise InputError(f'{" or ".join(map(repr, patterns))} matches no file. Correct the path of the '
                     'dataset.')
  return found


def _braces(path: str) -> list[str]:
  """Returns the paths that braces stand for, in the order in which a shell writes them."""
  if os.path.exists(path):
    return [path]
  parts = re.split(r'\{([^{}]*)\}', path)  # what is in braces comes at odd places
  return [''.join(choice) for choice in itertools.product(
      *(_options(part) if i % 2 else [part] for i, part in enumerate(parts)))]


def _options(text: str) -> list[str]:
  ends = re.fullmatch(r'([0-9]+)\.\.([0-9]+)', text)
  if not ends:
    return text.split(',') if ',' in text else ['{' + text + '}']
  first, last = int(ends[1]), int(ends[2])
  width = max(map(len, ends.groups())) if any(end[0] == '0' for end in ends.groups()) else 0
  step = 1 if last >= first else -1
  return [f'{number:0{width}d}' for number in range(first, last + step, step)]
