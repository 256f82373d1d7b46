"""Functions that all checks of a config share: known keys, known names, valid names."""

from collections.abc import Iterable, Mapping, Sequence
import re

from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core.config import Key
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Config

_CODE = re.compile(r'n\d{8}|\d+')  # a wnid or a number
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')


def check_block(where: str, values: Config, keys: Mapping[str, Key]) -> None:
  """Raises ConfigError for a key not declared in defaults.py or a value of a wrong type or range.

  `where` is the block's name in messages.
  """
  if not isinstance(values, ConfigDict):
    raise ConfigError(f'{where} must be a block made by defaults.py, got {values!r}.')
  if missing := [key for key in keys if key not in values]:
    raise ConfigError(
      f'{where} has no key {missing[0]!r}: a bare dict has no defaults. Make the block with the '
      'functions of defaults.py, then set single keys.'
    )
  for name, value in values.items():
    if name not in keys:
      raise ConfigError(f'{where}.{name} is not a config key.{config_lib.did_you_mean(name, keys)}')
    # A table of names (where, sources) is checked by the code that reads it.
    if not isinstance(value, ConfigDict):
      keys[name].check(f'{where}.{name}', value)
    elif keys[name].default != {}:
      raise ConfigError(f'{where}.{name} must be {type(keys[name].default).__name__}, got a block.')


def one_of(where: str, value: str, names: Iterable[str] | Sequence[str]) -> None:
  """Raises ConfigError, with the nearest valid name, if the value is not one of the names."""
  names = list(names)
  if value not in names:
    raise ConfigError(
      f'{where}={value!r} is not known.{config_lib.did_you_mean(str(value), names)}'
    )


def check_known_names(where: str, values: Sequence[str], names: Iterable[str]) -> None:
  """Raises ConfigError for an unknown or a repeated name."""
  for name in values:
    one_of(where, name, names)
  if len(set(values)) < len(values):
    raise ConfigError(f'{where}={tuple(values)} contains a name twice.')


def check_folder_name(where: str, name: str) -> None:
  """Raises ConfigError for a name that cannot be a folder name and a flag."""
  if not NAME.fullmatch(name):
    raise ConfigError(
      f'config.{where}.{name}: a name may contain letters, digits, _ and -, and must begin with a '
      'letter or a digit.'
    )


def are_codes(names: Iterable[str]) -> bool:
  """Returns whether all class names are wnids or numbers, which no caption holds."""
  return all(map(_CODE.fullmatch, names))


def prompt_names(flag: str, names: Sequence[str], given: Sequence[str]) -> None:
  """Raises ConfigError if class names that the config does not give are wnids or numbers.

  flag: the flag of the key `classes`; names: the names that prompts would hold; given: the key's
  value, which may hold such names.
  """
  if names and not given and are_codes(names):
    raise ConfigError(
      f'{flag} is missing: the source names its classes {names[0]!r} to {names[-1]!r}, and prompts '
      'would hold these wnids or numbers. Give the words, in label order; or these names, if you '
      'mean them.'
    )
