"""Folders of this machine."""

import contextlib
import os


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
