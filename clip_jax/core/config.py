"""Config helpers: checked keys, filling of blocks, suggestions for typos, canonical text, diffs.

They work on ml_collections' ConfigDict and on plain nested dicts.
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import json
from typing import Any, NamedTuple

from clip_jax.core.errors import ConfigError


class Key(NamedTuple):
  """A config key: its default, and a check that returns what is wrong with a value ('': nothing).

  The type of the default is the type of the key; of None, it is an optional number.
  """

  default: Any
  problem: Callable[[Any], str] | None = None

  def check(self, where: str, value: Any) -> None:
    """Raises ConfigError if the value has another type, or `problem` rejects it.

    where: the full name of the key, for the message.
    """
    if self.default is None:
      if value is not None and type(value) not in (int, float):
        raise ConfigError(f'{where} must be a number or None, got {value!r}.')
      return
    is_number = isinstance(self.default, float) and type(value) is int
    if type(value) is not type(self.default) and not is_number:
      raise ConfigError(f'{where} must be {type(self.default).__name__}, got {value!r}.')
    if self.problem and value != self.default and (problem := self.problem(value)):
      raise ConfigError(f'{where}={value!r} {problem}')


def whole(value: float) -> float | int:
  """Returns a float that is a whole number as int, any other unchanged: 1e6 for an integer key."""
  return int(value) if value.is_integer() else value


def positive(value: float) -> str:
  return '' if value > 0 else 'must be more than 0.'


def natural(value: int) -> str:
  return '' if value >= 0 else 'must be 0 or more.'


def within(low: float, high: float) -> Callable[[float], str]:
  return lambda value: '' if low <= value <= high else f'must lie in [{low}, {high}].'


def part_of_one(value: tuple) -> str:
  is_good = len(value) == 2 and all(type(bound) in (int, float) for bound in value)
  return '' if is_good and 0 <= value[0] < value[1] <= 1 else 'must be (lo, hi), 0 <= lo < hi <= 1.'


def one_of(*options: Any) -> Callable[[str], str]:
  """Returns a check that a value is one of the options.

  options: the names, or one function that returns them and is called only when needed.
  """

  def problem(value: str) -> str:
    names: Any = options[0]() if callable(options[0]) else options
    return '' if value in names else f'is not known.{did_you_mean(value, names)}'

  return problem


def fill(block, given: Mapping[str, Any], kind: str):
  """Sets the given keys of a defaults block and returns it; ConfigError names an unknown key."""
  for key, value in given.items():
    if key not in block:
      raise ConfigError(f'{kind}(...) has no key {key!r}.{did_you_mean(key, block.keys())}')
    if isinstance(value, Mapping) and not hasattr(value, 'to_dict'):
      block[key].update(value)  # keeps the ConfigDict of where= and sources=
      continue
    try:
      block[key] = value
    except TypeError as error:
      raise ConfigError(f'{kind}({key}={value!r}): {error}.') from error
  return block


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """Returns ' Did you mean ...? There are: ...', to be appended to a message on an unknown name."""
  names = sorted(filter(None, map(str, names)))
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  return f'{hint} There are: {", ".join(names) or "none"}.'


def plain(value: Any) -> Any:
  """Returns a config value as plain dicts, lists, numbers and strings, which JSON can hold."""
  if isinstance(value, Mapping) or hasattr(value, 'items'):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (tuple, list)):
    return [plain(item) for item in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ConfigError(f'A config value must be a number, a string, a bool or a tuple, got {value!r}.')


def canonical(value: Any) -> str:
  """Returns the canonical JSON text of a plain value: sorted keys, no spaces, no NaN."""
  return json.dumps(plain(value), sort_keys=True, separators=(',', ':'), allow_nan=False)


def flat(value: Any, prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': leaf} for the leaves of a nested plain dict; an empty dict is a leaf."""
  if isinstance(value, Mapping) and value:
    return {
      key: leaf
      for name, item in value.items()
      for key, leaf in flat(item, f'{prefix}.{name}' if prefix else name).items()
    }
  return {prefix: value}


def differences(old: Any, new: Any) -> list[str]:
  """Returns 'a.b: old -> new' for every leaf in which two plain values differ."""
  old, new = flat(old), flat(new)
  # An empty dict on one side needs no line of its own if the other side has leaves below it.
  for one, other in ((old, new), (new, old)):
    for key in [key for key in one if one[key] == {} and key not in other]:
      if any(name.startswith(f'{key}.' if key else '') for name in other):
        del one[key]
  missing = 'missing'
  return [
    f'{key}: {_shorten(old.get(key, missing))} -> {_shorten(new.get(key, missing))}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key, missing) != new.get(key, missing)
  ]


def _shorten(value: Any, max_chars: int = 60) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= max_chars else text[: max_chars - 3] + '...'
