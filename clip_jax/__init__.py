"""Does CLIP's out-of-distribution accuracy come from train-test similarity? See README.md.

The Python API: load, search, duplicates, prune, open_pool and read (clip_jax/api.py). They are
imported at their first use, and JAX with them.
"""

import importlib

__version__ = '0.1.0'
API = ('duplicates', 'load', 'open_pool', 'prune', 'read', 'search')


def __getattr__(name: str):
  if name in API:
    return getattr(importlib.import_module('clip_jax.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *API])
