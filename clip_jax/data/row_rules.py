"""The rules that choose samples of a dataset and fill their rows, for every source format."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import functools
import hashlib
import operator
import re
from typing import Any

from clip_jax.core.errors import ConfigError
from clip_jax.data.labels import ClassFolders
from clip_jax.data.table import COLUMNS

NO_LABEL, BAD_LABEL = -1, -2
NO_LABELS = 'none'  # the label_key of a dataset without labels
NOT_UTF8 = 'caption not UTF-8'
LOST = ('\ufffd', '\0')  # signs of lost characters: bytes that are not UTF-8, and UTF-16 as bytes
NO_TEXT = '\0\ufffd \t\r\n'  # a caption of these characters alone is empty


@dataclasses.dataclass(frozen=True)
class RowRules:
  """The keys of a dataset block that choose and describe samples; ConfigError for a bad value.

  A key names a member by its ending ('txt', 'cls'), else a column, else a field of the json member.
  'json:NAME' is a field of the json member or of the column 'json', else a column. image_key,
  caption_key and sample_key are lists of names separated by ';': the first existing one counts.
  """

  # column -> value, or values, of the chosen samples
  where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  part: tuple[float, float] = (0.0, 1.0)  # chosen: low <= sha256(group) / 2^256 < high
  group_key: str = ''  # shared by related samples; '' uses the sample's own key
  group_pattern: str = ''  # regex; its first group, else the whole match, is the group
  image_key: str = 'jpg;jpeg;png;webp;image'
  caption_key: str = 'txt;caption;text'  # the first non-empty text counts, also within a list
  sample_key: str = 'key;uid'
  caption_template: str = ''  # '{}' becomes the class name; '' uses the sample's own caption
  # (regex, replacement, share of the samples that are edited, chosen by their keys)
  caption_edit: tuple[str, str, float] | tuple[()] = ()
  label_key: str = ''  # of a label number, or a name in `classes`; 'none': no labels
  labels_file: str = ''  # format 'folder': the path of a file of labels (labels.py)
  classes: Sequence[str] = ()  # class names in label order
  class_folders: ClassFolders | None = None  # format 'folder': those of a published benchmark
  columns: Sequence[str] = ()  # more columns of the index
  require_caption: bool = True
  # The caption is all captions of the sample, one a line; an empty line is an empty caption.
  all_captions: bool = False
  captions_file: str = ''  # format 'folder': the path of a file of captions (captions_file.py)

  def __post_init__(self):
    if taken := set(self.columns) & set(COLUMNS):
      raise ConfigError(f'Remove {min(taken)!r} from columns, because every index has this column.')
    if self.labels_file and self.label_key:
      raise ConfigError(
        f'labels_file={self.labels_file!r} and label_key={self.label_key!r} both give labels: '
        'remove one of them.'
      )
    regex(self.group_pattern)
    regex(*self.caption_edit[:2])

  @functools.cached_property
  def allowed_values(self) -> dict[str, tuple]:
    """Column -> values of the chosen samples."""
    return {
      name: tuple(value) if isinstance(value, (tuple, list)) else (value,)
      for name, value in self.where.items()
    }

  @functools.cached_property
  def image_endings(self) -> tuple[str, ...]:
    """The names in image_key, in lower case."""
    return image_names(self.image_key)

  @property
  def label_name(self) -> str:
    """The name of the member, column or field of the label; '' for no labels."""
    return '' if self.label_key == NO_LABELS else self.label_key

  def in_part(self, group: str) -> bool:
    low, high = self.part
    return (low, high) == (0, 1) or low <= fraction(group) < high

  def group(self, text: str) -> str:
    """Returns the part of a text that matches `group_pattern`, or the text if nothing matches.

    If the pattern has a group, the result is the match of its first group.
    """
    match = regex(self.group_pattern).search(text) if self.group_pattern else None
    return match[1 if match.re.groups and match[1] is not None else 0] if match else text

  def label(self, value: Any) -> int:
    """Returns the label of a value, NO_LABEL for no value, BAD_LABEL for an unknown class."""
    if value is None or value != value:  # NaN marks a missing value in tables of numbers
      return NO_LABEL
    if value in self.classes:
      return self.classes.index(value)
    if isinstance(value, float) and value.is_integer():  # integers with gaps are stored as floats
      value = int(value)
    try:
      index: Any = value
      label = int(value) if isinstance(value, str) else operator.index(index)
    except (ValueError, TypeError):
      return BAD_LABEL
    return label if NO_LABEL <= label < (len(self.classes) or 2**31) else BAD_LABEL


@functools.cache
def image_names(image_key: str) -> tuple[str, ...]:
  """Returns the names in an image_key, in lower case; the default has 'avif', too.

  The default itself does not name it, because image_key is in the fingerprint of every index.
  """
  return (*names(image_key.lower()), *(['avif'] if image_key == RowRules.image_key else []))


@functools.cache
def names(keys: str) -> tuple[str, ...]:
  """Returns the names in a key such as 'txt;caption'."""
  return tuple(filter(None, map(str.strip, keys.split(';'))))


def has_lost_characters(caption: str) -> bool:
  """Returns whether a text was not UTF-8, or came with its characters lost."""
  return any(sign in caption for sign in LOST)


def matched(wanted: Collection[str], present: Collection[str]) -> dict[str, str]:
  """Returns wanted name -> column, for the wanted names that are present.

  A name without a column of its own matches the only column that differs in case alone.
  """
  columns = {name: name for name in wanted if name in present}
  for name in wanted:
    alike = [column for column in present if column.lower() == name.lower()]
    if len(alike) == 1:
      columns.setdefault(name, alike[0])
  return columns


def first_of(wanted: Sequence[str], columns: Mapping[str, str]) -> str | None:
  """Returns the first wanted name with a column of its own, else the first with any, else None.

  columns: the result of `matched`.
  """
  matches = [name for name in wanted if name in columns]
  return next((name for name in matches if columns[name] == name), next(iter(matches), None))


def fraction(text: str) -> float:
  """Returns sha256(text) / 2^256, a number in [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest(), 'big') / 2**256


def counts_for_pruning(group: str, queries: tuple[float, float]) -> bool:
  """Returns whether the queries of a group are aligned: their fraction lies in [low, high).

  The hash is not that of `part`, so a range of queries does not depend on the part of the files
  that a benchmark takes.
  """
  low, high = queries
  return low <= fraction(f'queries:{group}') < high


@functools.cache
def regex(pattern: str = '', replacement: str = '') -> re.Pattern:
  """Returns a compiled pattern; raises ConfigError if it, or its replacement, is invalid."""
  try:
    compiled = re.compile(pattern)
    compiled.sub(replacement, '')  # fails for a reference to a missing group
    return compiled
  except (re.error, IndexError) as error:
    raise ConfigError(
      f'The regular expression {pattern!r} with replacement {replacement!r} is invalid: {error}. '
      'Correct it.'
    ) from error
