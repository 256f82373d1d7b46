"""Local copies of remote files whose readers need a file on this machine.

A copy's name holds a hash of the URL and of the object's state, so a changed object is copied
again. Nothing else stores where copies are: each machine makes its own. Beyond a limit the least
recently used ones go.
"""

from collections.abc import Mapping
import dataclasses
import fcntl
import hashlib
import os
import re

from clip_jax.core import files, folders, progress
from clip_jax.core.errors import InputError
from clip_jax.data import filetree, storage

# Environment variables, because processes inherit them: a folder, and bytes.
_FOLDER, _LIMIT = 'CLIP_JAX_COPIES', 'CLIP_JAX_COPIES_BYTES'
_NAME = re.compile(r'[0-9a-f]{16}-.*(?<!\.lock)')  # of a copy
_AT_ONCE = 1 << 25  # bytes of a file, fetched in ranges at once
_RANGES = 4


def folder() -> str:
  """Returns the folder of copies: that of `keep_in`, else one in the user's cache."""
  return os.environ.get(_FOLDER) or os.path.join(folders.cache(), 'copies')


def keep_in(path: str, limit: int = 0) -> None:
  """Sets the folder of copies, and how many bytes of them stay, for this process and its children.

  limit: 0: all. It does not count the latest copy, nor those used within a minute.
  """
  os.environ[_FOLDER] = os.path.abspath(os.path.expanduser(path))
  os.environ[_LIMIT] = str(limit)


def local_copy(file: storage.SourceFile) -> str:
  """Returns the local path of a source file; a remote file is copied to `folder()`.

  Open it soon: a copy that was not asked for within a minute may go. It gets its name only when it
  is complete; of several processes one copies. Raises InputError if the storage sends fewer bytes.
  """
  if not storage.is_remote(file.path):
    return file.path
  cache = folder()
  stamp = hashlib.sha256(f'{file.path} {file.stamp}'.encode()).hexdigest()[:16]
  path = os.path.join(cache, f'{stamp}-{os.path.basename(file.name.partition("?")[0])}')
  if _is_complete(path, file):
    os.utime(path)  # it was used now
    return path
  os.makedirs(cache, exist_ok=True)
  with open(f'{path}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not _is_complete(path, file):
      _make_room(cache, file.size)
      _copy(file, path)
  return path


def of(path: str) -> str:
  """Returns the local path of a file that a user named; a remote one is copied."""
  if not storage.is_remote(path):
    return os.path.expanduser(path)
  return local_copy(filetree.source_file(path))


def copied(file: storage.SourceFile) -> storage.SourceFile:
  """Returns a source file with the path of its local copy."""
  return dataclasses.replace(file, path=local_copy(file))


def stored(file: storage.SourceFile) -> dict[str, str | int]:
  """Returns what the row table stores of a file for `opened`."""
  return {'size': file.size, 'version': file.version} if storage.is_remote(file.path) else {}


def opened(where: Mapping) -> str:
  """Returns the local path of a file of the row table, whose entry has `path` and `stored`."""
  path = where['path']
  if not storage.is_remote(path):
    return path
  name = filetree.base_name(path)
  return local_copy(storage.SourceFile(path, name, where['size'], 0.0, where['version']))


def _make_room(cache: str, size: int) -> None:
  limit = int(os.environ.get(_LIMIT, 0))
  if limit and (excess := folders.size_below(cache) + size - limit) > 0:
    with os.scandir(cache) as found:
      paths = [entry.path for entry in found if entry.is_file() and _NAME.fullmatch(entry.name)]
    folders.delete_oldest(paths, excess)


def _is_complete(path: str, file: storage.SourceFile) -> bool:
  return os.path.exists(path) and os.path.getsize(path) == file.size


def _copy(file: storage.SourceFile, path: str) -> None:
  files.check_space(path, file.size, f'The copy of {file.path}')
  source = storage.open_file(file.path)
  with (
    files.atomic(path) as temporary,
    temporary.open('wb') as f,
    progress.Bar(total=file.size, desc=f'copy {os.path.basename(file.name)}', unit='byte') as bar,
  ):
    step = _AT_ONCE // _RANGES
    for start in range(0, file.size, _AT_ONCE):
      end = min(start + _AT_ONCE, file.size)
      ranges = [(at, min(step, end - at)) for at in range(start, end, step)]
      for (at, length), data in zip(ranges, source.read_many(ranges), strict=True):
        if len(data) != length:
          raise InputError(
            f'{file.path} ends at byte {at + len(data):,} of {file.size:,}: it '
            'changed after it was listed. Run the same command again.'
          )
        f.write(data)
        bar.update(length)
