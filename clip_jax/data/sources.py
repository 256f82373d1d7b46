"""Scans source files: chosen samples -> rows with caption, label, group and image location.

In: the files of one shard, of any format. Out: one `Scan`, which table.py writes. Images are not
decoded.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
from typing import Any, NamedTuple

from clip_jax.core.errors import InputError
from clip_jax.data import formats, headers, images, labels, row_rules, storage, table
from clip_jax.data.row_rules import RowRules

_MOST_TEXT = 1 << 24  # bytes; a longer caption or json member is not text
# Bytes read to find an image's size, tried in turn. The first is what a pass over a remote tar has
# kept in memory; the second is usually enough; the third is enough for any image.
_HEADER = (1 << 12, 1 << 14, 1 << 26)


class _Skip(Exception):
  """The reason why a sample is skipped."""


class _Fields(NamedTuple):
  """A sample's metadata: columns of its file, or its folder's name, and the fields of its json."""

  columns: Mapping[str, Any]  # columns of its file, or {'folder': class folder}
  json: Mapping[str, Any]  # fields of its json member, or of the column 'json'


def classes(format: str, path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names that a dataset stores for its `label_key`, in label order, or ().

  path: of the dataset, or one of its files for formats with many files (parquet). The class names
  of folders come from labels.py.
  """
  path = path if '://' in path else os.path.abspath(os.path.expanduser(path))
  return formats.by_name(format).classes(path, label_key) if label_key else ()


def scan(
  format: str,
  files: storage.SourceFile | Sequence[storage.SourceFile],
  rules: RowRules | None = None,
  *,
  root: str = '',
  **fields: Any,
) -> table.Scan:
  """Returns the rows of one shard: of one source file, or of image files below `root`.

  root: the listed path of a folder dataset, else ''. rules: which samples are chosen and how their
  rows are filled; without it, `fields` are the fields of RowRules. In folders, 'folder' is also a
  column, and without a label_key the label comes from labels.py. A sample without a label has -1.
  Raises ConfigError for a bad rule.
  """
  source_format, rules = formats.by_name(format), rules or RowRules(**fields)
  files = [files] if isinstance(files, storage.SourceFile) else files
  folder_label = (
    labels.labels(root, rules.classes, rules.labels_file).label_of
    if root and not rules.label_key
    else None
  )
  assert source_format.samples is not None  # vectors have an index of their own
  try:
    samples, skipped = source_format.samples(
      files,
      root,
      row_rules.names(rules.image_key.lower()),
      row_rules.names(rules.sample_key),
      _rule_columns(rules),
    )
    return _scan(samples, skipped, rules, folder_label)
  except OSError as error:
    raise InputError(
      f'A source file cannot be read: {error}. Restore it, or correct the path of the dataset.'
    ) from error


def _scan(
  samples: Iterable[table.Sample],
  skipped: list[dict[str, str]],
  rules: RowRules,
  folder_label: Callable[[str], int | None] | None,
) -> table.Scan:
  records, left_out = [], 0
  for sample in samples:
    try:
      record = _record(sample, rules, folder_label)
      if record is None:
        left_out += 1
      else:
        records.append(record)
    except (_Skip, labels.NoLabel) as reason:
      skipped.append({'key': sample.key, 'reason': str(reason)})
    except OSError:
      skipped.append({'key': sample.key, 'reason': 'file cannot be read'})
  return table.Scan(records, skipped, left_out)


def _rule_columns(rules: RowRules) -> tuple[str, ...]:
  """Returns the names of all columns that the rules may need."""
  keys = [*rules.where, rules.group_key, rules.label_key, *rules.columns]
  keys += ['class_name'] if rules.caption_template else row_rules.names(rules.caption_key)
  if any(key.startswith('json:') for key in keys):
    keys.append('json')
  return tuple(dict.fromkeys(key.removeprefix('json:') for key in keys if key))


def _record(
  sample: table.Sample, rules: RowRules, folder_label: Callable[[str], int | None] | None
) -> table.Record | None:
  """Returns the row of a sample, or None if the rules do not choose it.

  folder_label: path of an image -> its label, or None if its class is not chosen. Raises _Skip or
  NoLabel if the sample cannot be used.
  """
  fields = _Fields({'folder': sample.folder} if sample.path else sample.fields, _json(sample))
  for name, allowed in rules.allowed_values.items():
    if _needed(sample, fields, name) not in allowed:
      return None
  group = sample.key
  if rules.group_key:
    group = _needed(sample, fields, rules.group_key)
  group = rules.group(_replace_surrogates(group if isinstance(group, str) else json.dumps(group)))
  if not rules.in_part(group):
    return None
  endings = (
    (os.path.splitext(sample.path)[1][1:].lower(),)
    if sample.path
    else row_rules.names(rules.image_key.lower())
  )
  ending = next((ending for ending in endings if ending in sample.members), None)
  if ending is None:
    raise _Skip('no image')
  offset, length = sample.members[ending]
  if length >= 2**31:
    raise _Skip('image too large')
  if folder_label:
    label = folder_label(sample.path)
  else:
    label = rules.label(_value(sample, fields, rules.label_key) if rules.label_key else None)
  if label is None:
    return None
  if label == row_rules.BAD_LABEL:
    raise _Skip('bad label')
  kind, width, height = _header(sample, ending, length)
  caption = _caption(sample, fields, label, rules)
  columns = {name: _replace_surrogates(_value(sample, fields, name)) for name in rules.columns}
  return table.Record(
    sample.key, caption, label, group, offset, length, width, height, columns, sample.path, kind
  )


def _json(sample: table.Sample) -> Mapping[str, Any]:
  if 'json' in sample.members:
    text = _caption_text(sample, 'json')
  else:
    text = sample.fields.get('json')
    if not isinstance(text, str):
      return text if isinstance(text, dict) else {}
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):  # RecursionError: nested too deep
    value = None
  if not isinstance(value, dict):
    raise _Skip('bad json')
  return value


def _value(sample: table.Sample, fields: _Fields, key: str) -> Any:
  """Returns the value of a text member, a column or a json field, or None."""
  if key in sample.members and key != 'json':
    return _caption_text(sample, key).strip()
  name = key.removeprefix('json:')
  first, second = (fields.columns, fields.json) if key == name else (fields.json, fields.columns)
  value = first.get(name)
  value = second.get(name) if value is None else value
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
  data = sample.read(ending, _MOST_TEXT).removeprefix(codecs.BOM_UTF8)
  return data.decode('utf-8', 'replace')


def _replace_surrogates(value: Any) -> Any:
  """Replaces lone surrogates in a text, which are valid in JSON but not in UTF-8."""
  if not isinstance(value, str) or value.isascii():
    return value
  return value.encode('utf-8', 'replace').decode()


def _caption(sample: table.Sample, fields: _Fields, label: int, rules: RowRules) -> str:
  if rules.caption_template:
    name = _value(sample, fields, 'class_name') or sample.folder
    if 0 <= label < len(rules.classes):
      name = rules.classes[label]
    if not name:
      raise _Skip('no class name')
    caption = rules.caption_template.replace('{}', str(name))
  else:
    values = (_value(sample, fields, key) for key in row_rules.names(rules.caption_key))
    texts = (text for value in values for text in (value if isinstance(value, list) else [value]))
    caption = next((text.strip() for text in texts if isinstance(text, str) and text.strip()), '')
  if rules.caption_edit:
    pattern, replacement, share = rules.caption_edit
    # The prefix makes this hash independent of the hash that `part` uses.
    if row_rules.fraction(f'caption_edit:{sample.key}') < share:
      caption = row_rules.regex(pattern, replacement).sub(replacement, caption)
  if not caption and rules.require_caption:
    raise _Skip('no caption')
  return _replace_surrogates(caption)


def _header(sample: table.Sample, ending: str, length: int) -> tuple[str, int, int]:
  """Returns (type, width, height) from an image's first bytes, ('', 0, 0) if unreadable."""
  for most in _HEADER:
    try:
      return headers.header(sample.read(ending, most))
    except images.UnreadableImage:
      if length <= most:
        break
  return '', 0, 0
