"""Atomic files: a file appears under its final name only when it is complete.

A file is written under a temporary name in its folder, flushed to disk, then renamed. Paths are
str, pathlib or epath, local or gs:// and s3:// (where objects always appear complete). The bytes
depend on the content alone, not on times or names.

Files of a work directory on object storage have paths in its local mirror (core/mirror.py): what is
written here is uploaded, what is read here is downloaded first. `local` must be called before a
library opens such a file by itself; `exists`, `names`, `remove` and `move` see both places.
"""

from collections.abc import Iterator
import contextlib
import errno
import fnmatch
import glob
import hashlib
import io
import json
import os
import shutil
import socket
from typing import Any
import zipfile

from etils import epath
import numpy as np

from clip_jax.core import mirror, processes
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

TEMPORARY = '.tmp-'  # prefix of every unfinished file


@contextlib.contextmanager
def atomic(path) -> Iterator[epath.Path]:
  """Yields a temporary path, and renames the file to `path` if the block ends without an error.

  After an error the temporary file is deleted. Raises InputError if the disk is full.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f'{_host_prefix()}{os.getpid()}-{path.name}'
  try:
    yield temporary
    if is_local(path):
      with open(temporary, 'rb+') as f:
        os.fsync(f.fileno())
      if (at := mirror.of(path)) is not None:
        at.publish(at.name(os.fspath(path)), os.fspath(temporary))
      else:
        os.replace(temporary, path)
    else:
      temporary.rename(path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise InputError(
        f'No space left while writing {path}. Free some space and run the same command again; '
        'finished work is kept.'
      ) from error
    raise


def is_mirrored(path) -> bool:
  """Returns whether a path is in the local mirror of a work directory on object storage."""
  return mirror.of(path) is not None


def local(path) -> str:
  """Returns the path of a file; one of a work directory on object storage is downloaded first."""
  if (at := mirror.of(path)) is not None:
    at.fetch(at.name(path))
  return os.fspath(path)


def local_folder(path) -> str:
  """Returns the path of a folder, of which every file is downloaded first."""
  if (at := mirror.of(path)) is not None:
    at.fetch_all(at.below(at.name(path)))
  return os.fspath(path)


def publish(path) -> None:
  """Uploads a finished file, or all files below a folder, if their place is object storage."""
  if (at := mirror.of(path)) is None:
    return
  if not os.path.isdir(path):
    at.publish(at.name(path))
    return
  at.publish_all(
    at.name(os.path.join(parent, name))
    for parent, _, names in os.walk(path)
    for name in names
    if not name.startswith(TEMPORARY)
  )


def refresh(folder, *, rarely: bool = False) -> None:
  """Looks again at what other machines have made in a folder of a work directory.

  rarely: at most a twentieth of the time is spent so.
  """
  at = mirror.of(folder)
  if at is not None and not (rarely and at.is_fresh()):
    at.refresh(at.name(folder))


def exists(path) -> bool:
  """Returns whether there is a file or folder."""
  if not is_local(path):
    return epath.Path(path).exists()
  at = mirror.of(path)
  return os.path.exists(path) if at is None else at.has(at.name(path))


def names(folder) -> list[str]:
  """Returns the names of the files and folders in a folder, sorted; [] if there is no folder."""
  if not is_local(folder):
    folder = epath.Path(folder)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  if (at := mirror.of(folder)) is not None:
    return sorted(at.names(at.name(folder)))
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def size(path) -> int | None:
  """Returns the bytes of a file, -1 for a folder, None if there is neither."""
  at = mirror.of(path)
  if at is not None and (entry := at.entry(at.name(path))) is not None:
    return entry.size
  if is_folder(path):
    return -1
  return os.path.getsize(path) if os.path.exists(path) else None


def is_folder(path) -> bool:
  if not is_local(path):
    return epath.Path(path).is_dir()
  at = mirror.of(path)
  return os.path.isdir(path) or (at is not None and at.is_folder(at.name(path)))


def matching(folder: str, pattern: str) -> list[str]:
  """Returns the names below a folder that a pattern of `glob` matches, sorted."""
  found = set(glob.glob(pattern, root_dir=folder))
  if (at := mirror.of(folder)) is not None:
    inside, start = at.name(folder), len(at.name(folder) + '/') if at.name(folder) else 0
    parts = pattern.split('/')
    for name in at.below(inside):
      own = name[start:].split('/')
      if len(own) == len(parts) and all(map(fnmatch.fnmatchcase, own, parts)):
        found.add('/'.join(own))
  return sorted(found)


def move(old: str, new: str) -> None:
  """Moves a file or folder, if it exists; a folder that exists at the new place is merged."""
  if (at := mirror.of(old)) is not None:
    at.move(at.name(old), at.name(new))
  elif os.path.isdir(old) and os.path.isdir(new):
    for name in os.listdir(old):
      move(os.path.join(old, name), os.path.join(new, name))
    os.rmdir(old)
  elif os.path.exists(old):
    os.makedirs(os.path.dirname(new), exist_ok=True)
    os.replace(old, new)


def remove(path) -> None:
  """Deletes a file, or a folder with all that is in it, if it exists."""
  if (at := mirror.of(path)) is not None:
    at.remove(at.name(path))
  elif os.path.isdir(path):
    shutil.rmtree(path)
  else:
    epath.Path(path).unlink(missing_ok=True)


def remove_unfinished(folder: str) -> list[str]:
  """Deletes temporary files of this machine's dead processes below a local folder; returns them."""
  removed, prefix = [], _host_prefix()
  for parent, _, names in os.walk(folder):
    for name in names:
      pid = name.removeprefix(prefix).split('-')[0] if name.startswith(prefix) else ''
      if pid.isdecimal() and processes.is_dead(int(pid)):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it first
          os.unlink(os.path.join(parent, name))
          removed.append(os.path.join(parent, name))
  return removed


def _host_prefix() -> str:
  return f'{TEMPORARY}{socket.gethostname()}-'


def write_bytes(path, data: bytes) -> None:
  with atomic(path) as temporary:
    temporary.write_bytes(data)


def write_json(path, value: Any) -> None:
  """Writes indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
  write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + '\n').encode())


def read_json(path) -> Any:
  """Returns the JSON value of a file. Raises InputError if it does not parse."""
  try:
    return json.loads(epath.Path(local(path)).read_text())
  except ValueError as error:
    raise InputError(f'{path} is not valid JSON ({error}). Restore it, or delete it.') from error


def read_npy(path, mmap: bool = False) -> np.ndarray:
  """Returns the array of an npy file; mmap: as a view of the file, which stays on disk."""
  return np.load(local(path), mmap_mode='r' if mmap else None, allow_pickle=False)


def write_npy(path, array: Array) -> None:
  with atomic(path) as temporary, temporary.open('wb') as f:
    np.save(f, np.asarray(array), allow_pickle=False)


def write_npz(path, **arrays: Array) -> None:
  """Writes an uncompressed npz. Equal arrays give equal bytes: numpy dates members 1980-01-01."""
  with atomic(path) as temporary, temporary.open('wb') as f:
    np.savez(f, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})


def read_npz(path) -> dict[str, np.ndarray]:
  """Returns all arrays of an npz file. Raises InputError if it is damaged."""
  try:
    with np.load(io.BytesIO(epath.Path(local(path)).read_bytes()), allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
    raise InputError(f'{path} cannot be read ({error}). Make it again with --redo.') from error


def write_parquet(path, table) -> None:
  """Writes a pyarrow table."""
  import pyarrow.parquet as pq  # the import takes 0.1 s

  with atomic(path) as temporary, temporary.open('wb') as f:
    pq.write_table(table, f, compression='zstd')


def sha256(path) -> str:
  """Returns the sha256 (hex) of a file's content."""
  digest = hashlib.sha256()
  with epath.Path(local(path)).open('rb') as f:
    while block := f.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def is_local(path) -> bool:
  return '://' not in os.fspath(path)


def free_bytes(path) -> int | None:
  """Returns the free bytes of the disk that holds `path`, None for object storage."""
  if not is_local(path) or is_mirrored(path):
    return None
  folder = os.path.abspath(path)
  while not os.path.exists(folder):
    folder = os.path.dirname(folder)
  return shutil.disk_usage(folder).free


def check_space(path, needed: int, what: str) -> None:
  """Raises InputError if the disk of `path` has fewer than `needed` bytes free.

  what: what needs them, the first words of the message.
  """
  free = free_bytes(path)
  if free is not None and free < needed:
    raise InputError(
      f'{what} needs about {needed / 1e6:,.0f} MB in {path}, but only {free / 1e6:,.0f} MB are '
      'free. Free some space, or choose another --workdir.'
    )
