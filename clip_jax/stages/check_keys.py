"""What every check of a config shares: known keys, known names, with the nearest valid one in the message."""

from collections.abc import Iterable, Sequence
import re

from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core.errors import ConfigError

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')


def keys(got: ConfigDict, known: ConfigDict, where: str) -> None:
  """Every key of a block must be one that defaults.py knows, and of its type."""
  lost = [key for key in known if key not in got]
  if lost:
    raise ConfigError(f'{where} has no key {lost[0]!r}: a bare dict loses the defaults. Make the block with the '
                      'functions of defaults.py, and then set single keys.')
  for key, value in got.items():
    if key not in known:
      raise ConfigError(f'{where}.{key} is not a config key.{config_lib.nearest(key, known.keys())}')
    default = known[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise ConfigError(f'{where}.{key} must be a block of keys, got {value!r}.')
      if len(default) and key not in ('pool', 'anchor'):  # datasets are checked on their own
        keys(value, default, f'{where}.{key}')
    elif type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
      raise ConfigError(f'{where}.{key} must be {type(default).__name__}, got {value!r}.')


def one_of(where: str, value: str, names: Iterable[str] | Sequence[str]) -> None:
  names = list(names)
  if value not in names:
    raise ConfigError(f'{where}={value!r} is not known.{config_lib.nearest(str(value), names)}')


def different(where: str, given: Sequence[str], names: Iterable[str]) -> None:
  """Raises ConfigError for a name that is not known, or that is there twice."""
  for name in given:
    one_of(where, name, names)
  if len(set(given)) < len(given):
    raise ConfigError(f'{where}={tuple(given)} names one twice.')


def valid_name(where: str, name: str) -> None:
  if not NAME.fullmatch(name):
    raise ConfigError(f'config.{where}.{name}: a name is letters, digits, _ and -, and begins with a letter or '
                      'a digit.')
