"""Which samples of a dataset become rows, and what each row says: the rules that every source
format shares.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import operator
import re
from typing import Any

from clip_jax.core.errors import ConfigError
from clip_jax.data.table import COLUMNS

NO_LABEL, BAD_LABEL = -1, -2


@dataclasses.dataclass(frozen=True)
class RowRules:
  """The keys of a dataset block that choose samples and describe them. Raises ConfigError for a bad
  one.

  A key names a member by its ending ('txt', 'cls'), else a column, else a field of the json member;
  'json:NAME' is the field of the json member, or of the column 'json', else a column. image_key,
  caption_key and sample_key are names with ';' between them: the first that is there counts.
  """

  where: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )  # column -> value, or values, of what counts
  part: tuple[float, float] = (
    0.0,
    1.0,
  )  # samples count whose sha256(group) / 2^256 lies in [low, high)
  group_key: str = ''  # what siblings share; '' takes the sample's own key
  group_pattern: str = ''  # regex of which the first group, else the whole match, is kept
  image_key: str = 'jpg;jpeg;png;webp;image'
  caption_key: str = (
    'txt;caption;text'  # the first that says something counts, also of a list of them
  )
  sample_key: str = 'key;uid'
  caption_template: str = ''  # '{}' takes the class name; '' takes the sample's own caption
  # (regex, replacement, share of the samples that are edited, chosen by their keys)
  caption_edit: tuple[str, str, float] | tuple[()] = ()
  label_key: str = ''  # of a number, or a name among `classes`
  labels_file: str = ''  # format 'folder': the path of a file of labels (labels.py)
  classes: Sequence[str] = ()  # class names in label order
  columns: Sequence[str] = ()  # more columns of the index
  require_caption: bool = True

  def __post_init__(self):
    if taken := set(self.columns) & set(COLUMNS):
      raise ConfigError(
        f'columns names {min(taken)!r}, which every index has already: leave it out.'
      )
    if self.labels_file and self.label_key:
      raise ConfigError(
        f'labels_file={self.labels_file!r} and label_key={self.label_key!r} both say what an image '
        'shows: leave one out.'
      )
    regex(self.group_pattern)
    regex(*self.caption_edit[:2])

  @functools.cached_property
  def allowed(self) -> dict[str, tuple]:
    """Column -> the values of the samples that count."""
    return {
      name: tuple(value) if isinstance(value, (tuple, list)) else (value,)
      for name, value in self.where.items()
    }

  def in_part(self, group: str) -> bool:
    low, high = self.part
    return (low, high) == (0, 1) or low <= fraction(group) < high

  def group(self, text: str) -> str:
    """Returns what `group_pattern` keeps of a text: the first group of a match, else the match,
    else the text.
    """
    match = regex(self.group_pattern).search(text) if self.group_pattern else None
    return match[1 if match.re.groups and match[1] is not None else 0] if match else text

  def label(self, value: Any) -> int:
    """Returns the label that a value means, NO_LABEL for no value, BAD_LABEL for what is none of
    the classes.
    """
    if value is None or value != value:  # NaN is how tables of numbers say that there is none
      return NO_LABEL
    if value in self.classes:
      return self.classes.index(value)
    if isinstance(value, float) and value.is_integer():  # so a column with gaps keeps its numbers
      value = int(value)
    try:
      label = int(value) if isinstance(value, str) else operator.index(value)
    except (ValueError, TypeError):
      return BAD_LABEL
    return label if NO_LABEL <= label < (len(self.classes) or 2**31) else BAD_LABEL


@functools.cache
def names(keys: str) -> tuple[str, ...]:
  """Returns the names in a key such as 'txt;caption'."""
  return tuple(filter(None, map(str.strip, keys.split(';'))))


def fraction(text: str) -> float:
  """Returns a number in [0, 1) that is a text's own, on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest(), 'big') / 2**256


@functools.cache
def regex(pattern: str = '', replacement: str = '') -> re.Pattern:
  """Returns a compiled pattern; raises ConfigError where it, or its replacement, is wrong."""
  try:
    compiled = re.compile(pattern)
    compiled.sub(replacement, '')  # a reference to a group that is not there fails here
    return compiled
  except (re.error, IndexError) as error:
    raise ConfigError(
      f'The regular expression {pattern!r}, replaced by {replacement!r}, is wrong: {error}. '
      'Correct '
      'it.'
    ) from error
