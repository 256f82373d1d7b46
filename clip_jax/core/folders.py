"""Folders of this machine."""

from collections.abc import Iterable
import contextlib
import os
import time

_IN_USE_SECS = 60.0  # a file that was used in this time stays


def cache() -> str:
  """Returns the folder of the user's in which what can be had again is kept."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'clip_jax')


def size_below(folder: str) -> int:
  """Returns the bytes of all files below a local folder; other processes may delete some now."""
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.path.getsize(os.path.join(parent, name))
  return total


def delete_oldest(paths: Iterable[str], size: float) -> int:
  """Deletes files, least recently used first, until `size` bytes are free; returns their bytes.

  A file was used when it was changed last (os.utime). Those used within a minute stay, because
  their path may have been given out and not yet opened. Other processes may delete files now, too.
  """
  found = []
  for path in paths:
    with contextlib.suppress(FileNotFoundError):
      about = os.stat(path)
      found.append((about.st_mtime, path, about.st_size))
  freed = 0
  for used, path, bytes_of_file in sorted(found):
    if freed >= size or used > time.time() - _IN_USE_SECS:
      break
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    freed += bytes_of_file
  return freed
