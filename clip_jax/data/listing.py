"""Lists the files of a dataset from its path: globs, braces, folders, local or remote."""

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import contextlib
import glob
import os
import posixpath
import re
from typing import Any

import braceexpand

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, formats, storage


class NoFiles(InputError):
  """The error for a path that matches no file."""


def list_files(format: str, path: str) -> list[storage.SourceFile]:
  """Returns the files of a dataset: in natural order, but braces in their written order.

  path: a file, a glob, braces ('{00000..00009}.tar', '{a,b}/*.tar') or a folder of tars, local or
  on gs://, s3:// and the like; for format 'folder', the folder of images. Raises NoFiles, an
  InputError, if the path or a file named by braces is missing.
  """
  source_format = formats.by_name(format)
  if not path:
    raise InputError("path='' names no files. Give the path of the dataset.")
  if path.startswith('file://'):
    raise InputError(f'path={path!r}: give a path on this machine without file://.')
  if storage.is_remote(path):
    filetree.forget(path)
  if source_format.find:
    return filetree.source_files(*source_format.find(filetree.absolute(path)))
  if storage.is_remote(path):
    return _remote_files(path, source_format)
  path = filetree.absolute(path)
  # An existing file may have braces in its name.
  patterns = [path] if os.path.exists(path) else expand_braces(path)
  matched = [file for pattern in patterns for file in _matches(pattern, source_format)]
  _check_once(path, matched)
  fixed = (
    path
    if os.path.isdir(path)
    else os.path.dirname(path if os.path.exists(path) else re.split(r'[*?\[{]', path)[0])
  )
  return [filetree.source_file(file, os.path.relpath(file, fixed)) for file in matched]


def root(format: str, path: str) -> str:
  """Returns the folder to which image paths are relative, '' if images are not files."""
  return filetree.absolute(path) if formats.by_name(format).rooted else ''


def exists(path: str) -> bool:
  """Returns whether a path is an existing file or folder, or a pattern that matches one."""
  if not storage.is_remote(path):
    path = os.path.expanduser(path)
    return os.path.exists(path) or any(
      glob.glob(pattern, recursive=True)[:1]
      for pattern in expand_braces(path)
      if any(sign in path for sign in '*?[{')
    )
  fixed, mark, query = path.partition('?') if path.startswith('http') else (path, '', '')
  return any(_exists(pattern, mark + query) for pattern in expand_braces(fixed))


def _exists(url: str, query: str) -> bool:
  if not any(sign in url for sign in '*?['):
    return filetree.info(url + query) is not None or filetree.is_folder(url)

  def ask() -> bool:
    with storage.errors_with_path(url):
      return bool(storage.file_system(url).glob(url))

  return storage.with_retries(ask)


def _remote_files(path: str, source_format: formats.Format) -> list[storage.SourceFile]:
  """Returns the files of a remote path, glob, braces or folder, as `list_files` does."""
  system, web = storage.file_system(path), path.startswith('http')
  path, mark, query = path.partition('?') if web else (path, '', '')
  query = mark + query
  patterns = expand_braces(path)
  with storage.errors_with_path(path):
    if len(patterns) > storage.THREADS and not web:
      for folder in dict.fromkeys(map(posixpath.dirname, patterns)):
        with contextlib.suppress(OSError):
          system.ls(folder)  # fsspec caches the listing: one request instead of thousands
  with futures.ThreadPoolExecutor(storage.THREADS) as threads:
    matches = threads.map(
      lambda pattern: storage.with_retries(
        lambda: _remote_matches(system, pattern, query, source_format)
      ),
      patterns,
    )
    matched = [info for infos in matches for info in infos]
  _check_once(path, [url for url, _ in matched])
  fixed = posixpath.dirname(re.split(r'[*?\[{]', path)[0])
  if matched[0][0] != path + query and matched[0][0].startswith(path.rstrip('/') + '/'):
    fixed = path.rstrip('/')  # the path is a folder
  return [
    storage.SourceFile(
      url,
      url.removesuffix(query).removeprefix(fixed).lstrip('/'),
      info['size'],
      0.0,
      filetree.version(info),
    )
    for url, info in matched
  ]


def _remote_matches(
  system: Any, path: str, query: str, source_format: formats.Format
) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns (URL, info of the storage) of the files that a path or a glob matches."""
  patterns, infos = [path], {}
  with storage.errors_with_path(path):
    if not any(sign in path for sign in '*?['):
      patterns = [f'{path.rstrip("/")}/{name}' for name in source_format.patterns]
      if not path.endswith('/'):  # '/' marks a folder, even if the server answers with a page
        info = filetree.info(path + query)
        if info is not None and info['type'] != 'directory':
          return [(path + query, _with_size(system, path + query, info))]
    for pattern in patterns:
      for name, info in system.glob(pattern, detail=True).items():
        if info['type'] != 'directory':
          infos[storage.url(name, like=path) + query] = info
      if infos and source_format.one_pattern:
        break
    if not infos:
      raise NoFiles(f'{path!r} matches no file. Correct the path of the dataset.')
    return [
      (url, _with_size(system, url, infos[url])) for url in sorted(infos, key=storage.natural_key)
    ]


def _with_size(system: Any, url: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the storage's info of a file; raises InputError if its size is unknown."""
  if info.get('size') is None:
    info = system.info(url)  # an HTML listing has no sizes
  if info.get('size') is None:
    raise InputError(
      f'The server does not report the size of {url}, so it cannot be read in parts. '
      'Copy the dataset to another storage, or to this machine.'
    )
  return info


def _check_once(path: str, matched: Sequence[str]) -> None:
  if len(set(matched)) < len(matched):
    twice = next(file for file, count in collections.Counter(matched).items() if count > 1)
    raise InputError(f'{path!r} matches {twice} more than once. Correct the path of the dataset.')


def _matches(path: str, source_format: formats.Format) -> list[str]:
  """Returns the files that a path or a glob matches; for a folder, those of the format's globs."""
  if os.path.isfile(path):
    return [path]
  patterns = [path]
  if os.path.isdir(path):
    patterns = [os.path.join(glob.escape(path), name) for name in source_format.patterns]
  matched: set[str] = set()
  for pattern in patterns:
    matched |= set(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if matched and source_format.one_pattern:
      break
  if not matched and os.path.isdir(path):
    raise NoFiles(
      f'{path!r} matches no file: it is a folder without '
      f'{" or ".join(source_format.patterns)}. Correct the path of the dataset, or give a '
      'pattern.'
    )
  if not matched:
    raise NoFiles(f'{path!r} matches no file. Correct the path of the dataset.')
  return sorted(matched, key=storage.natural_key)


def expand_braces(path: str) -> list[str]:
  """Returns the paths to which braces expand, in the order of a shell."""
  try:
    return list(braceexpand.braceexpand(path, escape=False))
  except ValueError:  # a brace without its counterpart
    return [path]
