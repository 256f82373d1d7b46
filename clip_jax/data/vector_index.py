"""The index of files of vectors: pairs each file with its metadata, and writes one row per vector.

In: files of vectors (vectors.py) and, optionally, parquet files of metadata with as many rows.
clip-ood's labels_<i>.npy and paths_<i>.npy count as two more columns, 'labels' and 'paths'. Out:
index-<shard>.parquet in table.py's format, with offset = the row in the file. Arrow computes on
whole columns, because there may be a billion rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import glob
import json
import os
import re
from typing import Any

from absl import logging
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.core import files, progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.data import listing, row_rules, storage, table, vectors
from clip_jax.data.row_rules import RowRules

METADATA, LABELS, PATHS = 'metadata', 'labels', 'paths'  # kinds of companion files
ALSO_KEYS = (
  'image_path',
  'id',
  'image_id',
  PATHS,
)  # key columns if those of sample_key are missing
_FOLDERS = ('img_emb', 'images', 'text_emb')  # folders of vectors that may have a sibling metadata/
_ROWS = 1 << 17  # rows in memory at once


def companions(
  vector_files: Sequence[storage.SourceFile], metadata: str = ''
) -> list[dict[str, storage.SourceFile]]:
  """Returns kind ('metadata', 'labels', 'paths') -> companion file, for each file of vectors.

  metadata: path of parquet files; '' takes those in metadata/ beside the vectors' folder, or
  parquet files with the same stems (DataComp). Files are paired by stem if all stems match, else by
  the number at the end of the stem: img_emb_3 and metadata_3, img_emb_0003 and metadata_0003.
  Raises InputError if a file of vectors has no partner, or two files have the same number.
  """
  beside: list[dict[str, storage.SourceFile]] = [{} for _ in vector_files]
  groups: dict[str, list[int]] = {}
  for i, file in enumerate(vector_files):
    groups.setdefault('' if metadata else os.path.dirname(file.path), []).append(i)
  for folder, places in groups.items():
    in_folder = [vector_files[i] for i in places]
    for kind, partners in _described(folder, metadata, in_folder).items():
      for i, partner in zip(places, _match_partners(in_folder, partners, kind), strict=True):
        beside[i][kind] = partner
  return beside


def _described(
  folder: str, metadata: str, vector_files: Sequence[storage.SourceFile]
) -> dict[str, list[storage.SourceFile]]:
  """Returns kind -> companion files of the vectors of one folder."""
  if metadata:
    try:
      return {METADATA: listing.list_files('parquet', metadata)}
    except listing.NoFiles as error:
      raise InputError(
        f'metadata={metadata!r} matches no parquet file. Correct the path.'
      ) from error
  above, name = os.path.split(folder)
  kinds = {METADATA: 'parquet', LABELS: 'npy', PATHS: 'npy'} if name in _FOLDERS else {}
  described = {kind: _listed(f'{above}/{kind}', ending) for kind, ending in kinds.items()}
  described[METADATA] = described.get(METADATA) or _listed(f'{folder}/{METADATA}', 'parquet')
  if not described[METADATA] and not any(file.path.endswith('.parquet') for file in vector_files):
    stems = set(map(_stem, vector_files))
    described[METADATA] = [file for file in _listed(folder, 'parquet') if _stem(file) in stems]
  return {kind: partners for kind, partners in described.items() if partners}


def _listed(folder: str, ending: str) -> list[storage.SourceFile]:
  if not storage.is_remote(folder) and not os.path.isdir(folder):
    return []
  try:
    inside = folder if storage.is_remote(folder) else glob.escape(folder)
    return listing.list_files('parquet', f'{inside}/*.{ending}')
  except listing.NoFiles:
    return []


def _stem(file: storage.SourceFile) -> str:
  return os.path.splitext(os.path.basename(file.path.partition('?')[0]))[0]


def _stem_number(file: storage.SourceFile) -> int | None:
  """Returns the number that ends a file's name (3 of img_emb_3.npy), None without one."""
  digits = re.search('[0-9]+$', _stem(file))
  return int(digits[0]) if digits else None


def _match_partners(
  vector_files: Sequence[storage.SourceFile], partners: Sequence[storage.SourceFile], kind: str
) -> list[storage.SourceFile]:
  """Returns the partner of each file of vectors, in their order."""
  by_stem = {_stem(file): file for file in partners}
  if len(by_stem) == len(partners) and all(_stem(file) in by_stem for file in vector_files):
    return [by_stem[_stem(file)] for file in vector_files]
  if len(vector_files) == len(partners) == 1 and None in (
    _stem_number(vector_files[0]),
    _stem_number(partners[0]),
  ):
    return list(partners)
  where = os.path.dirname(partners[0].path)
  numbers = _by_number(
    partners,
    'so their pairing with the vectors is ambiguous. Give one folder of metadata, or join '
    'folders with format=concat.',
  )
  for file in vector_files:
    if _stem_number(file) not in numbers:
      span = f'they end in {min(numbers)} to {max(numbers)}' if numbers else 'none ends in a number'
      raise InputError(
        f'{file.path} has no partner in {where}: no file of {kind} there ends in the '
        f'same number ({span}). Add that file, or correct the path.'
      )
  used = _by_number(
    vector_files, f'so their {kind} are ambiguous. Join their folders with format=concat.'
  )
  if unused := sorted(set(numbers) - set(used)):
    logging.info(
      '%s: %s without vectors in this dataset, for example %s.',
      where,
      progress.count_with_noun(len(unused), 'file'),
      os.path.basename(numbers[unused[0]].path),
    )
  by_number: Mapping[int | None, storage.SourceFile] = {**numbers}
  return [by_number[_stem_number(file)] for file in vector_files]


def _by_number(listed: Sequence[storage.SourceFile], trouble: str) -> dict[int, storage.SourceFile]:
  """Returns number at the end of the stem -> file; raises InputError for a duplicate number."""
  by_number: dict[int, storage.SourceFile] = {}
  for file in listed:
    number = _stem_number(file)
    if number in by_number:
      raise InputError(
        f'{by_number[number].path} and {file.path} both end in the number {number}, {trouble}'
      )
    if number is not None:
      by_number[number] = file
  return by_number


def read_header(
  file: storage.SourceFile,
  beside: Mapping[str, storage.SourceFile],
  vector_key: str = '',
  vector_dim: int = 0,
  path: str = '',
) -> vectors.Head:
  """Returns the header of a file of vectors, whose companion files tell its number of rows.

  vector_key, vector_dim: as in vectors.read_header. path: of a local copy of the file, '' for none.
  """
  rows = 0
  if vector_dim and METADATA in beside:
    rows = _parquet(beside[METADATA]).metadata.num_rows
  elif vector_dim and beside:
    rows = len(_array(next(iter(beside.values())).path))
  return vectors.read_header(path or file.path, vector_key, vector_dim, rows)


def write(
  directory: str,
  shard: int,
  file: storage.SourceFile,
  beside: Mapping[str, storage.SourceFile],
  rules: RowRules = RowRules(),
  *,
  vector_key: str = '',
  vector_dim: int = 0,
) -> dict[str, Any]:
  """Writes index-<shard>.parquet and skipped-<shard>.json of a file of vectors; returns the counts.

  The rules apply to the columns of the metadata, or of the file itself if it is a parquet file;
  rules for images and for generated captions are ignored. A row without a value in a column of
  `where` is left out. Rows with a label outside the classes are skipped, as in other formats.
  vector_key, vector_dim: as in vectors.read_header. Raises InputError if the metadata and the
  vectors differ in their number of rows, or if a needed column is missing or has an unusable type.
  """
  header = read_header(file, beside, vector_key, vector_dim)
  rows = _Rows(file, beside, header)
  keys = (*row_rules.names(rules.sample_key), *ALSO_KEYS)
  key = row_rules.first_of(keys, {name: rows.column(name) for name in keys if rows.has(name)}) or ''
  captions = [
    name for name in row_rules.names(rules.caption_key.replace('json:', '')) if rows.has(name)
  ]
  sizes = {
    side: next((name for name in (side, f'original_{side}') if rows.has(name)), '')
    for side in ('width', 'height')
  }
  needed = [*rules.where, *filter(None, (rules.group_key, rules.label_name))]
  for name in needed:
    rows.check(name)
  skipped, left_out, written, lost = [], 0, 0, 0
  writer = None
  with files.atomic(table.index_file(directory, shard)) as path:
    try:
      for start, batch in rows.batches(
        [*filter(None, [key, *sizes.values()]), *captions, *needed, *rules.columns]
      ):
        index, label, has_lost = _index(file, shard, start, batch, rules, key, captions, sizes)
        chosen = _chosen_rows(batch, index['group'].combine_chunks(), rules)
        bad = chosen & (label == row_rules.BAD_LABEL)
        skipped += [
          {'key': key, 'reason': 'bad label'} for key in index.filter(bad)['key'].to_pylist()
        ]
        index = index.filter(chosen & ~bad)
        lost += int((has_lost & chosen & ~bad).sum())
        writer = writer or pq.ParquetWriter(os.fspath(path), index.schema, compression='zstd')
        writer.write_table(index)
        left_out, written = left_out + int((~chosen).sum()), written + len(index)
    finally:
      if writer:
        writer.close()
  files.write_json(table.skipped_file(directory, shard), skipped)
  return {
    'rows': written,
    'skipped': len(skipped),
    'left_out': left_out,
    'dim': header.dim,
    'reasons': {'bad label': len(skipped)} if skipped else {},
    **({'noted': {row_rules.NOT_UTF8: lost}} if lost else {}),
  }


class _Rows:
  """The metadata columns of a file of vectors, read in batches."""

  def __init__(
    self, file: storage.SourceFile, beside: Mapping[str, storage.SourceFile], header: vectors.Head
  ):
    self._file, self._rows = file, header.rows
    self._metadata = beside.get(METADATA) or (file if header.kind == 'parquet' else None)
    schema = _parquet(self._metadata).schema_arrow if self._metadata else []
    self._types = {field.name: field.type for field in schema if field.name != header.name}
    self._arrays = {kind: _array(beside[kind].path) for kind in (LABELS, PATHS) if kind in beside}
    counts = {beside[kind].path: len(array) for kind, array in self._arrays.items()}
    if self._metadata:
      counts[self._metadata.path] = _parquet(self._metadata).metadata.num_rows
    for path, rows in counts.items():
      if rows != self._rows:
        raise InputError(
          f'{path} describes {rows:,} rows, but {file.path} has {self._rows:,} '
          'vectors: the files do not belong together, or one is cut short. Restore the right files.'
        )

  def has(self, name: str) -> bool:
    return bool(self.column(name))

  def column(self, name: str) -> str:
    """Returns the column of a name, which may differ in case if no other does; '' for none."""
    return row_rules.matched([name], [*self._types, *self._arrays]).get(name, '')

  def check(self, name: str) -> None:
    """Raises InputError if the needed column `name` is missing."""
    if not self.has(name):
      file = self._metadata.path if self._metadata else f'{self._file.path}, which has no metadata,'
      columns = ', '.join([*self._types, *self._arrays]) or 'none'
      raise InputError(
        f'{file} has no column {name!r}, which the dataset needs; its columns: {columns}.'
      )

  def batches(self, names: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """Yields (first row, column -> arrow array) of at most _ROWS rows; at least one batch."""
    columns = {name: self.column(name) for name in names if self.has(name)}
    read = [name for name, column in columns.items() if column in self._types]
    start = 0
    if read and self._metadata:
      stored = list(dict.fromkeys(columns[name] for name in read))
      parts = (
        {name: batch.column(columns[name]) for name in read}
        for batch in _parquet(self._metadata).iter_batches(_ROWS, columns=stored)
      )
    else:
      parts = ({} for _ in range(0, self._rows, _ROWS))
    empty = {name: pa.array([], self._types[columns[name]]) for name in read}
    for part in parts if self._rows else [empty]:
      size = len(part[read[0]]) if read else min(_ROWS, self._rows - start)
      more = {
        name: pa.array(self._arrays[column][start : start + size])
        for name, column in columns.items()
        if name not in read
      }
      yield start, {'': pa.nulls(size), **part, **more}
      start += size


def _parquet(file: storage.SourceFile):
  try:
    return pq.ParquetFile(storage.open_stream(file.path), pre_buffer=False)
  except (pa.ArrowInvalid, OSError) as error:
    raise InputError(
      f'{file.path} cannot be read as parquet ({str(error).splitlines()[0]}). Replace '
      'it with the complete file.'
    ) from error


def _array(path: str) -> Array:  # [n]
  """Returns clip-ood's labels or paths as int64 or str, without unpickling."""
  try:
    with storage.open_stream(path) as f:
      array = np.lib.format.read_array(f, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise InputError(
      f'{path} cannot be read ({error}). Save integers or text with np.save, and no Python objects.'
    ) from error
  if array.ndim != 1 or array.dtype.kind not in 'iuUS':
    raise InputError(
      f'{path} has {array.dtype} {array.shape}; it must be one-dimensional, of integers or text.'
    )
  return array.astype(str) if array.dtype.kind in 'SU' else array.astype(np.int64)


def _index(
  file: storage.SourceFile,
  shard: int,
  start: int,
  batch: dict,
  rules: RowRules,
  key_column: str,
  captions: Sequence[str],
  sizes: Mapping[str, str],
) -> tuple[pa.Table, Array, Array]:
  """Returns the index of a batch of rows, their labels [n] int64, and which captions have lost
  characters [n] bool.

  key_column: '' builds keys from the file's name and the row. captions: columns; the first
  non-empty one counts. sizes: 'width' and 'height' -> a column, '' for none.
  """
  size = len(batch[''])
  name = file.name.encode('utf-8', 'backslashreplace').decode()  # may be invalid UTF-8
  row = pa.array(np.arange(start, start + size, dtype=np.int64))
  key = pc.binary_join_element_wise(pa.scalar(name), row.cast(pa.string()), '/')
  if key_column:
    key = pc.coalesce(_text_column(file, key_column, batch), key)
  caption, has_lost = pa.nulls(size, pa.string()), np.zeros(size, bool)
  for name in captions:
    text = pc.utf8_trim_whitespace(_caption_text(file, name, batch))
    lost = pc.or_(*(pc.match_substring(text, sign) for sign in row_rules.LOST))
    has_lost |= pc.and_(pc.is_null(caption), pc.fill_null(lost, False)).to_numpy(
      zero_copy_only=False
    )
    is_empty = pc.equal(pc.utf8_trim(text, row_rules.NO_TEXT), '')
    caption = pc.coalesce(caption, pc.if_else(is_empty, None, text))
  group = pc.coalesce(_text_column(file, rules.group_key, batch), key) if rules.group_key else key
  label = np.full(size, row_rules.NO_LABEL)
  if rules.label_name:
    label = _labels(file, rules.label_name, batch, rules)
  columns = {
    'key': key,
    'caption': pc.fill_null(caption, ''),
    'label': pa.array(np.maximum(label, row_rules.NO_LABEL).astype(np.int32)),
    'group': _mapped(group, rules.group, 'string') if rules.group_pattern else group,
    'shard': pa.array(np.full(size, shard, np.int32)),
    'offset': row,
    'length': pa.array(np.zeros(size, np.int32)),
    **{
      side: pa.array(_pixels(file, name, batch) if name else np.zeros(size, np.int32))
      for side, name in sizes.items()
    },
    'type': pa.repeat('', size),
  }
  columns |= {
    name: _column(batch[name]) if name in batch else pa.nulls(size) for name in rules.columns
  }
  return pa.table(columns), label, has_lost


def _chosen_rows(batch: dict, group: pa.Array, rules: RowRules) -> Array:
  """Returns the mask of rows that `where` and `part` choose, [n] bool."""
  mask = np.ones(len(group), bool)
  for name, values in rules.allowed_values.items():
    try:
      wanted = pa.array(values, batch[name].type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:
      raise ConfigError(
        f'`where` has {name}={list(values)}, but that column holds {batch[name].type}: '
        f'{str(error).splitlines()[0]}.'
      ) from error
    mask &= pc.is_in(batch[name], wanted).to_numpy(zero_copy_only=False)
  if tuple(rules.part) != (0, 1):
    mask &= _mapped(group, rules.in_part, 'bool').to_numpy(zero_copy_only=False)
  return mask


def _mapped(values: pa.Array, function: Callable[[Any], Any], kind: str) -> pa.Array:
  """Returns function(value) of every value of an arrow array, null for null.

  The function is called once for equal values.
  """
  coded = values.dictionary_encode()
  return pa.array(map(function, coded.dictionary.to_pylist()), kind).take(coded.indices)


def _text_column(file: storage.SourceFile, name: str, batch: dict) -> pa.Array:
  """Returns a column as text, null for missing values."""
  kind = batch[name].type
  if pa.types.is_dictionary(kind):
    return batch[name].dictionary_decode().cast(pa.string())
  if pa.types.is_nested(kind):
    raise InputError(
      f'{file.name}: its column {name!r} holds {kind}, which is not text. Name another column.'
    )
  try:
    return batch[name].cast(pa.string())
  except pa.ArrowInvalid as error:
    raise InputError(
      f'{file.name}: its column {name!r} is not UTF-8 text ({error}). Name another column.'
    ) from error


def _caption_text(file: storage.SourceFile, name: str, batch: dict) -> pa.Array:
  """Returns a column as text, as `_text` does; bytes that are not UTF-8 are read as in tars."""
  values = batch[name]
  if pa.types.is_dictionary(values.type):
    values = values.dictionary_decode()
  kind = values.type
  if not (pa.types.is_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_binary(kind)):
    return _text_column(file, name, batch)
  data = values.cast(pa.large_binary())
  try:
    return data.cast(pa.large_string()).cast(pa.string())
  except pa.ArrowInvalid:
    texts = (None if value is None else storage.decode_text(value) for value in data.to_pylist())
    return pa.array(texts, pa.string())


def _labels(
  file: storage.SourceFile, name: str, batch: dict, rules: RowRules
) -> Array:  # [n] int64
  values, kind = batch[name], batch[name].type
  if pa.types.is_floating(kind):
    values = values.cast(pa.float64())
  elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
    values = _text_column(file, name, batch)
  label = _mapped(values, rules.label, 'int64')
  return pc.fill_null(label, row_rules.NO_LABEL).to_numpy(zero_copy_only=False)


def _pixels(file: storage.SourceFile, name: str, batch: dict) -> Array:  # [n] int32
  kind = batch[name].type
  if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
    raise InputError(f'{file.name}: its column {name!r} holds {kind}, not a number of pixels.')
  number = pc.fill_null(batch[name].cast(pa.float64(), safe=False), 0)
  number = number.to_numpy(zero_copy_only=False)
  return np.clip(np.nan_to_num(number), 0, 2**31 - 1).astype(np.int32)


def _column(values):
  """Returns a chosen column in the types of the index: int64, else float64, else text."""
  kind = values.type
  if pa.types.is_dictionary(kind):
    return _column(values.dictionary_decode())
  if pa.types.is_integer(kind) and kind != pa.uint64():
    return values.cast(pa.int64())
  if pa.types.is_floating(kind):
    numbers = values.cast(pa.float64())
    return pc.if_else(pc.is_nan(numbers), None, numbers)
  if pa.types.is_null(kind):
    return values
  if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
    return pa.array(
      [None if value is None else json.dumps(value, default=str) for value in values.to_pylist()],
      pa.string(),
    )
  return values.cast(pa.string())
