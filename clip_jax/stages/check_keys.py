"""What every check of a config shares: known keys, known names, with the nearest valid one in the
message.
"""

from collections.abc import Iterable, Mapping, Sequence
import re

from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core.config import Key
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')


def block(where: str, got: Config, keys: Mapping[str, Key]) -> None:
  """Every key of a block must be declared in defaults.py, of its type, and have a value that it
  takes.
  """
  if not isinstance(got, ConfigDict):
    raise ConfigError(f'{where} must be a block made by defaults.py, got {got!r}.')
  if lost := [key for key in keys if key not in got]:
    raise ConfigError(
      f'{where} has no key {lost[0]!r}: a bare dict loses the defaults. Make the block with the '
      'functions of defaults.py, and then set single keys.'
    )
  for name, value in got.items():
    if name not in keys:
      raise ConfigError(f'{where}.{name} is not a config key.{config_lib.nearest(name, keys)}')
    if not isinstance(
      value, ConfigDict
    ):  # a table of names (where, sources) is checked by what reads it
      keys[name].check(f'{where}.{name}', value)
    elif keys[name].default != {}:
      raise ConfigError(f'{where}.{name} must be {type(keys[name].default).__name__}, got a block.')


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
    raise ConfigError(
      f'config.{where}.{name}: a name is letters, digits, _ and -, and begins with a letter or '
      'a digit.'
    )
