"""Source files -> the samples in them that count, and what each says: captions, labels, groups.

In: the files of one shard, of any format. Out: one `Scan`, which table.py writes down. No image is
decoded.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import operator
import os
import re
from typing import Any, NamedTuple

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import formats, headers, images, labels
from clip_jax.data.storage import SourceFile
from clip_jax.data.table import COLUMNS, Record, Sample, Scan

_MOST_TEXT = 1 << 24         # bytes of a caption or json member; more is no text
# Bytes read for an image's size: what the pass over a remote tar keeps of it; mostly enough; enough
# for any.
_HEADER = (1 << 12, 1 << 14, 1 << 26)


class _Skip(Exception):
  """The reason for which a sample is not used."""


class _Fields(NamedTuple):
  """What a sample says beside its members."""
  columns: Mapping[str, Any]  # of its file; the class folder
  json: Mapping[str, Any]     # of its json member, or of the column 'json'


@dataclasses.dataclass(frozen=True)
class _Rules:
  """The arguments of `scan`, made ready for use."""
  where: Mapping[str, tuple]
  part: tuple[float, float]
  group_key: str
  group_pattern: re.Pattern | None
  image_endings: tuple[str, ...]
  caption_keys: tuple[str, ...]
  caption_template: str
  caption_edit: tuple[re.Pattern, str, float] | None
  label_key: str
  classes: tuple[str, ...]
  folder_label: Callable[[str], int | None] | None  # an image's path -> its label
  columns: tuple[str, ...]
  require_caption: bool


def classes(format: str, path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names that a dataset tells of its `label_key`, in label order; () for none.

  path: the dataset's; where it may mean many files (parquet), one of them. Folders: see labels.py.
  """
  path = path if '://' in path else os.path.abspath(os.path.expanduser(path))
  return formats.get(format).classes(path, label_key) if label_key else ()


def scan(format: str, files: SourceFile | Sequence[SourceFile], *, root: str = '',
         where: Mapping[str, Any] | None = None, part: tuple[float, float] = (0.0, 1.0),
         group_key: str = '', group_pattern: str = '', image_key: str = 'jpg;jpeg;png;webp;image',
         caption_key: str = 'txt;caption;text', sample_key: str = 'key;uid',
         caption_template: str = '', caption_edit: tuple[str, str, float] | tuple[()] = (),
         label_key: str = '', labels_file: str = '', classes: Sequence[str] = (),
         columns: Sequence[str] = (), require_caption: bool = True) -> Scan:
  """Returns the rows of one shard: of one file, or of image files below `root`, the path listed.

  A key names a member by its ending ('txt', 'cls'), else a column, else a field of the json member;
  'json:NAME' is the field of the json member, or of the column 'json', else a column. In folders,
  'folder' is a column too.
  where: column -> value, or values, of the samples that count. part: samples count whose
  sha256(group) / 2^256 lies in [lo, hi). group_key: what siblings share, by default the sample's
  own key; group_pattern: regex, of which the first group (else the whole match) is kept.
  image_key, caption_key, sample_key: names with ';' between them, the first that is there counts,
  of captions the first that says something, also of a list of them. caption_template: '{}' takes
  the class name. caption_edit: (regex, replacement, share of the samples that are edited, chosen by
  their keys). label_key: of a number, or a name among `classes`; without it, a folder's class is
  what labels.py says. A sample without a label has -1. Raises ConfigError for a bad regex or column
  name.
  """
  found_by = formats.get(format)
  if taken := set(columns) & set(COLUMNS):
    raise ConfigError(f'columns names {min(taken)!r}, which every index has already: leave it out.')
  if labels_file and label_key:
    raise ConfigError(f'labels_file={labels_file!r} and label_key={label_key!r} both say what an '
                      'image shows: leave one out.')
  rules = _Rules(
      where={name: tuple(value) if isinstance(value, (tuple, list)) else (value,)
             for name, value in (where or {}).items()},
      part=tuple(part), group_key=group_key,
      group_pattern=_regex(group_pattern) if group_pattern else None,
      image_endings=_names(image_key.lower()), caption_keys=_names(caption_key),
      caption_template=caption_template,
      caption_edit=(_regex(*caption_edit[:2]), *caption_edit[1:]) if caption_edit else None,
      label_key=label_key, classes=tuple(classes),
      folder_label=labels.labels(root, classes, labels_file).of if root and not label_key else None,
      columns=tuple(columns), require_caption=require_caption)
  try:
    return _scan(*found_by.samples([files] if isinstance(files, SourceFile) else files, root,
                                   rules.image_endings, _names(sample_key), _wanted(rules)), rules)
  except OSError as error:
    raise InputError(f'A source file cannot be read: {error}. Put it back, or correct the path of '
                     'the dataset.') from error


def _scan(samples: Iterable[Sample], skipped: list[dict[str, str]], rules: _Rules) -> Scan:
  records, left_out = [], 0
  for sample in samples:
    try:
      record = _record(sample, rules)
      if record is None:
        left_out += 1
      else:
        records.append(record)
    except _Skip as skip:
      skipped.append({'key': sample.key, 'reason': str(skip)})
    except OSError:
      skipped.append({'key': sample.key, 'reason': 'file cannot be read'})
  return Scan(records, skipped, left_out)


def _names(keys: str) -> tuple[str, ...]:
  return tuple(filter(None, map(str.strip, keys.split(';'))))


def _wanted(rules: _Rules) -> tuple[str, ...]:
  """Returns the names of all columns that the rules may ask for."""
  keys = [*rules.where, rules.group_key, rules.label_key, *rules.columns]
  keys += ['class_name'] if rules.caption_template else rules.caption_keys
  if any(key.startswith('json:') for key in keys):
    keys.append('json')
  return tuple(dict.fromkeys(key.removeprefix('json:') for key in keys if key))


def _record(sample: Sample, rules: _Rules) -> Record | None:
  """Returns a sample's row, None where it is not asked for. Raises _Skip where it is of no use."""
  fields = _Fields({'folder': sample.folder} if sample.path else sample.fields, _json(sample))
  for name, allowed in rules.where.items():
    value = _value(sample, fields, name)
    if value is None:
      raise _Skip(f'no {name}')
    if value not in allowed:
      return None
  group = _group(sample, fields, rules)
  if rules.part != (0, 1) and not rules.part[0] <= _fraction(group) < rules.part[1]:
    return None
  endings = (os.path.splitext(sample.path)[1][1:].lower(),) if sample.path else rules.image_endings
  ending = next((ending for ending in endings if ending in sample.members), None)
  if ending is None:
    raise _Skip('no image')
  offset, length = sample.members[ending]
  if length >= 2**31:
    raise _Skip('image too large')
  label = _label(sample, fields, rules)
  if label is None:
    return None
  kind, width, height = _header(sample, ending, length)
  caption = _caption(sample, fields, label, rules)
  columns = {name: _clean(_value(sample, fields, name)) for name in rules.columns}
  return Record(sample.key, caption, label, group, offset, length, width, height, columns,
                sample.path, kind)


def _json(sample: Sample) -> Mapping[str, Any]:
  if 'json' in sample.members:
    text = _text(sample, 'json')
  else:
    text = sample.fields.get('json')
    if not isinstance(text, str):
      return text if isinstance(text, dict) else {}
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):  # nesting without end
    value = None
  if not isinstance(value, dict):
    raise _Skip('bad json')
  return value


def _value(sample: Sample, fields: _Fields, key: str) -> Any:
  """Returns a text member, or a column, or a json field, or None."""
  if key in sample.members and key != 'json':
    return _text(sample, key).strip()
  name = key.removeprefix('json:')
  first, second = (fields.columns, fields.json) if key == name else (fields.json, fields.columns)
  value = first.get(name)
  value = second.get(name) if value is None else value
  if isinstance(value, str) and len(value) > _MOST_TEXT:
    raise _Skip(f'{name} too long')
  return None if value != value else value  # NaN is how tables of numbers say that there is none


def _text(sample: Sample, ending: str) -> str:
  if sample.members[ending][1] > _MOST_TEXT:
    raise _Skip(f'{ending} too long')
  data = sample.read(ending, _MOST_TEXT).removeprefix(codecs.BOM_UTF8)
  return data.decode('utf-8', 'replace')


def _clean(value: Any) -> Any:
  """Returns a text without halves of surrogate pairs, which JSON may hold and UTF-8 may not."""
  if not isinstance(value, str) or value.isascii():
    return value
  return value.encode('utf-8', 'replace').decode()


def _group(sample: Sample, fields: _Fields, rules: _Rules) -> str:
  value = _value(sample, fields, rules.group_key) if rules.group_key else sample.key
  if value is None:
    raise _Skip(f'no {rules.group_key}')
  group = _clean(value if isinstance(value, str) else json.dumps(value))
  match = rules.group_pattern.search(group) if rules.group_pattern else None
  return match[1 if match.re.groups and match[1] is not None else 0] if match else group


def _label(sample: Sample, fields: _Fields, rules: _Rules) -> int | None:
  """Returns a sample's label, -1 for none; None where its class is not asked for."""
  if rules.folder_label:
    try:
      return rules.folder_label(sample.path)
    except labels.NoLabel as error:
      raise _Skip(str(error)) from None
  if not rules.label_key:
    return -1
  value = _value(sample, fields, rules.label_key)
  if value is None:
    return -1
  if value in rules.classes:
    return rules.classes.index(value)
  if isinstance(value, float) and value.is_integer():  # so a column with gaps keeps its numbers
    value = int(value)
  try:
    label = int(value) if isinstance(value, str) else operator.index(value)
  except (ValueError, TypeError):
    raise _Skip('bad label') from None
  if not -1 <= label < (len(rules.classes) or 2**31):
    raise _Skip('bad label')
  return label


def _caption(sample: Sample, fields: _Fields, label: int, rules: _Rules) -> str:
  if rules.caption_template:
    name = _value(sample, fields, 'class_name') or sample.folder
    if 0 <= label < len(rules.classes):
      name = rules.classes[label]
    if not name:
      raise _Skip('no class name')
    caption = rules.caption_template.replace('{}', str(name))
  else:
    values = (_value(sample, fields, key) for key in rules.caption_keys)
    texts = (text for value in values for text in (value if isinstance(value, list) else [value]))
    caption = next((text.strip() for text in texts if isinstance(text, str) and text.strip()), '')
  if rules.caption_edit:
    pattern, replacement, share = rules.caption_edit
    if _fraction(f'caption_edit:{sample.key}') < share:  # not the hash by which `part` chooses
      caption = pattern.sub(replacement, caption)
  if not caption and rules.require_caption:
    raise _Skip('no caption')
  return _clean(caption)


def _header(sample: Sample, ending: str, length: int) -> tuple[str, int, int]:
  """Returns (type, width, height) of an image by its first bytes; ('', 0, 0) for none."""
  for most in _HEADER:
    try:
      return headers.header(sample.read(ending, most))
    except images.UnreadableImage:
      if length <= most:
        break
  return '', 0, 0


def _fraction(text: str) -> float:
  """Returns a number in [0, 1) that is a text's own, on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest(), 'big') / 2**256


def _regex(pattern: str, replacement: str = '') -> re.Pattern:
  try:
    regex = re.compile(pattern)
    regex.sub(replacement, '')  # a reference to a group that is not there fails here
    return regex
  except (re.error, IndexError) as error:
    raise ConfigError(f'The regular expression {pattern!r}, replaced by {replacement!r}, is wrong: '
                      f'{error}. Correct it.') from error
