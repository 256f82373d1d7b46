"""Scans source files: chosen samples -> rows with caption, label, group and image location.

In: the files of one shard, of any format. Out: one `Scan`, which table.py writes. Images are not
decoded.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
import re
from typing import Any, NamedTuple

from clip_jax.core.errors import InputError
from clip_jax.data import (
  captions_file,
  filetree,
  formats,
  headers,
  images,
  labels,
  row_rules,
  storage,
  table,
)
from clip_jax.data.row_rules import RowRules

_MOST_TEXT = 1 << 24  # bytes; a longer caption or json member is not text
# Bytes read to find an image's size, tried in turn. The first is what a pass over a remote tar has
# kept in memory; the second is usually enough; the third is enough for any image.
_HEADER = (1 << 12, 1 << 14, 1 << 26)


# What is counted of samples that are kept, beside NOT_UTF8 (row_rules.py).
_GREY16 = '16-bit greyscale image'  # images.py scales it to 8 bits
_FURTHER_IMAGE = 'further image of a key, not used'
_CLS_INDEX = 'number in .cls taken as an index, not as a class name'


_NO_IMAGE = 'no image'
_CAPTIONS = 'captions'  # the column that a file of captions adds to a folder's samples


_LINE_END = re.compile(r'\r\n?|\n')


class _Skip(Exception):
  """The reason why a sample is skipped."""


class _Fields(NamedTuple):
  """A sample's metadata: columns of its file, or its folder's name, and the fields of its json."""

  columns: Mapping[str, Any]  # columns of its file, or {'folder': class folder}
  # Fields of its json member, or of the column 'json'; None for a json without fields (a list, or
  # an empty file), which costs the sample only if a field is needed.
  json: Mapping[str, Any] | None


def classes(format: str, path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names that a dataset stores for its `label_key`, in label order, or ().

  path: of the dataset, or one of its files for formats with many files (parquet). The class names
  of folders come from labels.py.
  """
  return formats.by_name(format).classes(filetree.absolute(path), label_key) if label_key else ()


def scan(
  format: str,
  files: storage.SourceFile | Sequence[storage.SourceFile],
  rules: RowRules | None = None,
  *,
  root: str = '',
  is_first: bool = True,
  **fields: Any,
) -> table.Scan:
  """Returns the rows of one shard: of one source file, or of image files below `root`.

  root: the listed path of a folder dataset, else ''. rules: which samples are chosen and how their
  rows are filled; without it, `fields` are the fields of RowRules. In folders, 'folder' is also a
  column, and without a label_key the label comes from labels.py. A sample without a label has -1.
  With a file of captions, images that it does not list are not chosen; those that it lists and the
  folder lacks are skipped samples of the first shard (is_first).
  Raises ConfigError for a bad rule.
  """
  source_format, rules = formats.by_name(format), rules or RowRules(**fields)
  files = [files] if isinstance(files, storage.SourceFile) else files
  folder_label = (
    labels.labels(root, rules.classes, rules.labels_file, rules.class_folders).label_of
    if root and not rules.label_key
    else None
  )
  assert source_format.samples is not None  # vectors have an index of their own
  try:
    samples, skipped = source_format.samples(
      files,
      root,
      rules.image_endings,
      row_rules.names(rules.sample_key),
      _rule_columns(rules),
    )
    left_out = 0
    if rules.captions_file:
      every = list(samples)
      splits = tuple(map(str, rules.allowed_values.get('split', ())))
      captions = captions_file.read(rules.captions_file, root, splits)
      samples = [_with_captions(s, captions) for s in every if s.path in captions.entries]
      left_out = len(every) - len(samples)
      if is_first:
        skipped += [{'key': name, 'reason': 'no image file'} for name in captions.missing]
    return _scan(samples, skipped, rules, folder_label, left_out)
  except OSError as error:
    raise InputError(
      f'A source file cannot be read: {error}. Restore it, or correct the path of the dataset.'
    ) from error


def _scan(
  samples: Iterable[table.Sample],
  skipped: list[dict[str, str]],
  rules: RowRules,
  folder_label: Callable[[str], int | None] | None,
  left_out: int,
) -> table.Scan:
  records = []
  noted: collections.Counter[str] = collections.Counter()
  for sample in samples:
    try:
      record = _record(sample, rules, folder_label, noted)
      if record is None:
        left_out += 1
      else:
        records.append(record)
    except (_Skip, labels.NoLabel) as reason:
      skipped += _skipped(sample, str(reason), rules)
    except OSError:
      skipped.append({'key': sample.key, 'reason': 'file cannot be read'})
  return table.Scan(records, skipped, left_out, dict(noted))


def _with_captions(sample: table.Sample, captions: captions_file.Captions) -> table.Sample:
  entry = captions.entries[sample.path]
  return sample._replace(fields={_CAPTIONS: list(entry.captions), 'split': entry.split})


def _skipped(sample: table.Sample, reason: str, rules: RowRules) -> list[dict[str, str]]:
  """Returns the entries of a skipped sample.

  A tar's key ends at the first dot, so 'shot_1.0.jpg' and 'shot_1.1.jpg' share the key 'shot_1'.
  Each of these images is an entry if the key has no other image, otherwise the entry says how many
  images the key has.
  """
  images_of_key = _images_of_key(sample, rules)
  if reason == _NO_IMAGE and images_of_key:
    return [
      {'key': f'{sample.key}.{ending}', 'reason': 'several dots in the name'}
      for ending in images_of_key
    ]
  count = f' ({len(images_of_key)} images)' if len(images_of_key) > 1 else ''
  return [{'key': f'{sample.key}{count}', 'reason': reason}]


def _images_of_key(sample: table.Sample, rules: RowRules) -> list[str]:
  """Returns the endings of a sample's members that are images by the part after the last dot."""
  endings = rules.image_endings
  return [name for name in sample.members if name.rpartition('.')[2] in endings]


def _rule_columns(rules: RowRules) -> tuple[str, ...]:
  """Returns the names of all columns that the rules may need."""
  keys = [*rules.where, rules.group_key, rules.label_name, *rules.columns]
  keys += ['class_name'] if rules.caption_template else row_rules.names(rules.caption_key)
  if any(key.startswith('json:') for key in keys):
    keys.append('json')
  return tuple(dict.fromkeys(key.removeprefix('json:') for key in keys if key))


def _record(
  sample: table.Sample,
  rules: RowRules,
  folder_label: Callable[[str], int | None] | None,
  noted: collections.Counter[str],
) -> table.Record | None:
  """Returns the row of a sample, or None if the rules do not choose it.

  folder_label: path of an image -> its label, or None if its class is not chosen. noted: counts the
  peculiarities of the returned row. Raises _Skip or NoLabel if the sample cannot be used.
  """
  columns = {'folder': sample.folder, **sample.fields} if sample.path else sample.fields
  fields = _Fields(columns, _json(sample))
  for name, allowed in rules.allowed_values.items():
    if _needed(sample, fields, name) not in allowed:
      return None
  group = sample.key
  if rules.group_key:
    group = _needed(sample, fields, rules.group_key)
  group = rules.group(_replace_surrogates(group if isinstance(group, str) else json.dumps(group)))
  if not rules.in_part(group):
    return None
  endings = (os.path.splitext(sample.path)[1][1:].lower(),) if sample.path else rules.image_endings
  ending = next((ending for ending in endings if ending in sample.members), None)
  if ending is None:
    raise _Skip(_NO_IMAGE)
  offset, length = sample.members[ending]
  if length >= 2**31:
    raise _Skip('image too large')
  value: Any = _value(sample, fields, rules.label_name) if rules.label_name else None
  is_cls_index = _is_cls_index(sample, rules, value)
  if folder_label:
    label = folder_label(sample.path)
  else:
    label = rules.label(int(value) if is_cls_index else value)
  if label is None:
    return None
  if label == row_rules.BAD_LABEL:
    raise _Skip('bad label')
  kind, width, height, is_grey16 = _header(sample, ending, length)
  caption, is_text = _caption(sample, fields, label, rules)
  columns = {name: _replace_surrogates(_value(sample, fields, name)) for name in rules.columns}
  for note, count in {
    row_rules.NOT_UTF8: not is_text,
    _GREY16: is_grey16,
    _CLS_INDEX: is_cls_index and value in rules.classes,
    _FURTHER_IMAGE: sum('.' in name for name in _images_of_key(sample, rules)),
  }.items():
    if count:
      noted[note] += int(count)
  return table.Record(
    sample.key, caption, label, group, offset, length, width, height, columns, sample.path, kind
  )


def _is_cls_index(sample: table.Sample, rules: RowRules, value: Any) -> bool:
  """Returns whether a label is a number in a member .cls, where it is an index of the classes.

  This holds also if the class names are numbers. In other members and columns, a text that is a
  class name is a class name.
  """
  return (
    rules.label_name.lower() == 'cls'
    and 'cls' in sample.members
    and bool(re.fullmatch('[0-9]{1,9}', value))
  )


def _json(sample: table.Sample) -> Mapping[str, Any] | None:
  """Returns the fields of a sample's json, None if it has none; raises _Skip if it is damaged."""
  if 'json' in sample.members:
    text = _caption_text(sample, 'json')
  else:
    text = sample.fields.get('json')
    if not isinstance(text, str):
      return text if isinstance(text, dict) else {}
  try:
    value = json.loads(text) if text.strip() else None
  except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
    raise _Skip('bad json') from error
  return value if isinstance(value, dict) else None


def _value(sample: table.Sample, fields: _Fields, key: str) -> Any:
  """Returns the value of a text member, a column or a json field, or None."""
  member = key.lower()  # as the endings are
  if member in sample.members and member != 'json':
    return _caption_text(sample, member).strip()
  name = key.removeprefix('json:')
  value = fields.columns.get(name) if key == name else None
  if value is None:
    if fields.json is None:
      raise _Skip('bad json')
    value = fields.json.get(name)
  value = fields.columns.get(name) if value is None else value
  if isinstance(value, str) and len(value) > _MOST_TEXT:
    raise _Skip(f'{name} too long')
  return None if value != value else value  # NaN marks a missing value in tables of numbers


def _needed(sample: table.Sample, fields: _Fields, key: str) -> Any:
  """Returns the value of a key that a sample must have; raises _Skip if it is missing."""
  value = _value(sample, fields, key)
  if value is None:
    raise _Skip(f'no {key}')
  return value


def _caption_text(sample: table.Sample, ending: str) -> str:
  if sample.members[ending][1] > _MOST_TEXT:
    raise _Skip(f'{ending} too long')
  return storage.decode_text(sample.read(ending, _MOST_TEXT))


def _replace_surrogates(value: Any) -> Any:
  """Replaces lone surrogates in a text, which are valid in JSON but not in UTF-8."""
  if not isinstance(value, str) or value.isascii():
    return value
  return value.encode('utf-8', 'replace').decode()


def _caption(
  sample: table.Sample, fields: _Fields, label: int, rules: RowRules
) -> tuple[str, bool]:
  """Returns the caption, and False if it, or a text before it, has characters that were lost."""
  is_text = True
  if rules.caption_template:
    if 0 <= label < len(rules.classes):
      name = rules.classes[label]
    else:
      name = _value(sample, fields, 'class_name') or sample.folder
    if not name:
      raise _Skip('no class name')
    caption = rules.caption_template.replace('{}', str(name))
  elif rules.all_captions:
    caption = _all_captions(sample, fields, rules)
    is_text = not row_rules.has_lost_characters(caption)
  else:
    values = (_value(sample, fields, key) for key in row_rules.names(rules.caption_key))
    texts = (text for value in values for text in (value if isinstance(value, list) else [value]))
    caption = ''
    for text in (text.strip() for text in texts if isinstance(text, str)):
      is_text &= not row_rules.has_lost_characters(text)
      if text.strip(row_rules.NO_TEXT):
        caption = text
        break
  if rules.caption_edit:
    pattern, replacement, share = rules.caption_edit
    # The prefix makes this hash independent of the hash that `part` uses.
    if row_rules.fraction(f'caption_edit:{sample.key}') < share:
      caption = row_rules.regex(pattern, replacement).sub(replacement, caption)
  if not caption and rules.require_caption:
    raise _Skip('no caption' if is_text else row_rules.NOT_UTF8)
  return _replace_surrogates(caption), is_text


def _all_captions(sample: table.Sample, fields: _Fields, rules: RowRules) -> str:
  """Returns the captions of a sample, one a line, from the first key that has any; '' for none.

  A text has one caption a line, a list one an element.
  """
  for key in [_CAPTIONS] if rules.captions_file else row_rules.names(rules.caption_key):
    value = _value(sample, fields, key)
    texts = _LINE_END.split(value) if isinstance(value, str) else value
    if not isinstance(texts, list):
      continue
    lines = [
      ' '.join(_LINE_END.split(text)).strip() if isinstance(text, str) else '' for text in texts
    ]
    if any(line.strip(row_rules.NO_TEXT) for line in lines):
      return '\n'.join(lines)
  return ''


def _header(sample: table.Sample, ending: str, length: int) -> tuple[str, int, int, bool]:
  """Returns (type, width, height, is 16-bit greyscale) from an image's first bytes.

  The result is ('', 0, 0, False) for an unreadable image.
  """
  for most in _HEADER:
    try:
      data = sample.read(ending, most)
      return *headers.header(data), headers.is_grey16(data)
    except images.UnreadableImage:
      if length <= most:
        break
  return '', 0, 0, False
