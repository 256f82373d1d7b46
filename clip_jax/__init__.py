"""Does CLIP's out-of-distribution accuracy come from train-test similarity? See README.md.

The functions of the Python API are imported at their first use, and JAX with them.
"""

import importlib

__version__ = '0.1.0'
API = {
  'load': 'models',
  'search': 'vectors',
  'duplicates': 'vectors',
  'prune': 'rules',
  'open_pool': 'files',
  'open_split': 'files',
  'read': 'files',
}  # function -> its module in clip_jax/api


def __getattr__(name: str):
  if name in API:
    return getattr(importlib.import_module(f'clip_jax.api.{API[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *API])
