"""A dataset's path -> its files, in order: globs, braces, folders, here or on object storage."""

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import contextlib
import glob
import itertools
import os
import posixpath
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import formats, storage

_THREADS = 16  # questions to a remote storage at once
# What an fsspec file system says of the state of an object, the surest first.
_VERSIONS = (
  'generation',
  'ETag',
  'etag',
  'e_tag',
  'md5Hash',
  'Content-MD5',
  'Digest',
  'mtime',
  'LastModified',
  'Last-Modified',
  'last_modified',
  'updated',
  'modified',
  'created',
)


class NoFiles(InputError):
  """A path means no file at all."""


def list_files(format: str, path: str) -> list[storage.SourceFile]:
  """Returns the files of a dataset in order: natural order, braces as they are written.

  path: a file, a glob, braces ('{00000..00009}.tar', '{a,b}/*.tar') or a folder of tars, here or on
  gs://, s3:// and the like (on a web server a folder ends in '/'); for format 'folder' the folder
  of images. Raises NoFiles, an InputError, where it, or a file that braces name, is missing.
  """
  found_by = formats.get(format)
  if not path:
    raise InputError("path='' names no files. Give the path of the dataset.")
  if path.startswith('file://'):
    raise InputError(f'path={path!r}: a path on this machine is given without file://.')
  if storage.is_remote(path):
    if not found_by.remote:
      raise InputError(
        f'path={path!r}: datasets of format {format!r} are read on this machine '
        'only. Copy it here, or mount it.'
      )
    return _remote_files(path, found_by)
  path = os.path.abspath(os.path.expanduser(path))
  if found_by.find:
    found = found_by.find(path)
  else:
    patterns = (
      [path] if os.path.exists(path) else expanded(path)
    )  # a file's own name may have braces
    found = [file for pattern in patterns for file in _matches(pattern, found_by)]
  _check_once(path, found)
  fixed = (
    path
    if os.path.isdir(path)
    else os.path.dirname(path if os.path.exists(path) else re.split(r'[*?\[{]', path)[0])
  )
  # A link to nothing is listed, as a sample that cannot be read.
  stats = [os.stat(file) if os.path.exists(file) else os.lstat(file) for file in found]
  return [
    storage.SourceFile(file, os.path.relpath(file, fixed), stat.st_size, stat.st_mtime)
    for file, stat in zip(found, stats, strict=True)
  ]


def root(format: str, path: str) -> str:
  """Returns the folder from which the paths of images start, '' where images are not files."""
  return os.path.abspath(os.path.expanduser(path)) if formats.get(format).rooted else ''


def _remote_files(path: str, found_by: formats.Format) -> list[storage.SourceFile]:
  """Returns the files that a remote path, glob, braces or folder means, as `list_files` does."""
  system, web = storage.file_system(path), path.startswith('http')
  path, query = re.fullmatch(r'(.*?)(\?.*)?', path, re.DOTALL).groups('') if web else (path, '')
  patterns = expanded(path)
  with storage.naming(path):
    system.invalidate_cache()  # an object may have changed since it was listed
    if len(patterns) > _THREADS and not web:
      for folder in dict.fromkeys(map(posixpath.dirname, patterns)):
        with contextlib.suppress(OSError):
          system.ls(folder)  # is remembered there: one question instead of thousands
  with futures.ThreadPoolExecutor(_THREADS) as threads:
    matches = threads.map(
      lambda pattern: storage.with_retries(
        lambda: _remote_matches(system, pattern, query, found_by)
      ),
      patterns,
    )
    found = [info for infos in matches for info in infos]
  _check_once(path, [url for url, _ in found])
  fixed = posixpath.dirname(re.split(r'[*?\[{]', path)[0])
  if found[0][0] != path + query and found[0][0].startswith(path.rstrip('/') + '/'):
    fixed = path.rstrip('/')  # the path is a folder
  return [
    storage.SourceFile(
      url,
      url.removesuffix(query).removeprefix(fixed).lstrip('/'),
      info['size'],
      0.0,
      _version(info),
    )
    for url, info in found
  ]


def _remote_matches(
  system: Any, path: str, query: str, found_by: formats.Format
) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns (URL, what the storage says of it) of the files that a path or a glob means."""
  patterns, found = [path], {}
  with storage.naming(path):
    if not any(sign in path for sign in '*?['):
      patterns = [f'{path.rstrip("/")}/{name}' for name in found_by.patterns]
      if not path.endswith('/'):  # which is a folder, also where that is a page
        try:
          info = system.info(path + query)
          if info['type'] != 'directory':
            return [(path + query, _sized(system, path + query, info))]
        except FileNotFoundError as error:
          if storage.may_pass(error):
            raise
    for pattern in patterns:
      for name, info in system.glob(pattern, detail=True).items():
        if info['type'] != 'directory':
          found[storage.url(name, like=path) + query] = info
      if found and found_by.one_pattern:
        break
    if not found:
      raise NoFiles(f'{path!r} matches no file. Correct the path of the dataset.')
    return [(url, _sized(system, url, found[url])) for url in sorted(found, key=storage.natural)]


def _sized(system: Any, url: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns what the storage says of a file, with its size."""
  if info.get('size') is None:
    info = system.info(url)  # a page that lists files does not say it
  if info.get('size') is None:
    raise InputError(
      f'The server does not say how large {url} is, so it cannot be read in parts. '
      'Copy the dataset to another storage, or to this machine.'
    )
  return info


def _version(info: Mapping[str, Any]) -> str:
  said = next((info[name] for name in _VERSIONS if info.get(name)), '')
  return str(said.timestamp() if hasattr(said, 'timestamp') else said).strip('"')


def _check_once(path: str, found: Sequence[str]) -> None:
  if len(set(found)) < len(found):
    twice = next(file for file, count in collections.Counter(found).items() if count > 1)
    raise InputError(f'{path!r} means {twice} more than once. Correct the path of the dataset.')


def _matches(path: str, found_by: formats.Format) -> list[str]:
  """Returns the files that a path, or a glob, means; in a folder those of the format's globs."""
  if os.path.isfile(path):
    return [path]
  patterns = [path]
  if os.path.isdir(path):
    patterns = [os.path.join(glob.escape(path), name) for name in found_by.patterns]
  found: set[str] = set()
  for pattern in patterns:
    found |= set(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if found and found_by.one_pattern:
      break
  if not found and os.path.isdir(path):
    raise NoFiles(
      f'{path!r} matches no file: it is a folder without '
      f'{" or ".join(found_by.patterns)}. Correct the path of the dataset, or give a '
      'pattern.'
    )
  if not found:
    raise NoFiles(f'{path!r} matches no file. Correct the path of the dataset.')
  return sorted(found, key=storage.natural)


def expanded(path: str) -> list[str]:
  """Returns the paths that braces stand for, in the order in which a shell writes them."""
  parts = re.split(r'\{([^{}]*)\}', path)  # what is in braces comes at odd places
  return [
    ''.join(choice)
    for choice in itertools.product(
      *(_options(part) if i % 2 else [part] for i, part in enumerate(parts))
    )
  ]


def _options(text: str) -> list[str]:
  ends = re.fullmatch(r'([0-9]+)\.\.([0-9]+)', text)
  if not ends:
    return text.split(',') if ',' in text else ['{' + text + '}']
  first, last = int(ends[1]), int(ends[2])
  width = max(map(len, ends.groups())) if any(end[0] == '0' for end in ends.groups()) else 0
  step = 1 if last >= first else -1
  return [f'{number:0{width}d}' for number in range(first, last + step, step)]
