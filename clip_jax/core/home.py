"""The folder of the user's own."""

import os


def cache() -> str:
  """Returns the folder in which what can be had again is kept: $XDG_CACHE_HOME/clip_jax."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'clip_jax')
