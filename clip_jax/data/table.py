"""The row table of a dataset: one row per sample, with its file, byte offset and length.

In: the scans of the dataset's shards (data/sources.py). Out, in the dataset's folder:
index-<shard>.parquet and skipped-<shard>.json, for people and joins; table.npy, captions.bin,
starts.npy [shards + 1] and files.json, for random access by reader.Source; for folders of image
files also paths.bin and path_ends.npy [rows]. pyarrow is imported inside functions, because loader
processes do not need it.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import os
import types
from typing import Any, NamedTuple

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

TABLE_DTYPE = np.dtype(
  [
    ('shard', '<i4'),
    ('offset', '<i8'),
    ('length', '<i4'),
    ('caption_offset', '<i8'),
    ('caption_length', '<i4'),
    ('label', '<i4'),
  ]
)
_TYPES = {
  'key': 'string',
  'caption': 'string',
  'label': 'int32',
  'group': 'string',
  'shard': 'int32',
  'offset': 'int64',
  'length': 'int32',
  'width': 'int32',
  'height': 'int32',
  'type': 'string',
  'path': 'string',
}
COLUMNS = tuple(_TYPES)  # of every index; 'path' only for folders of image files
_BATCH = 1 << 16  # index rows in memory at a time


class Sample(NamedTuple):  # NamedTuple: a frozen dataclass takes four times as long to create
  """A sample of a source file: one key and its members by ending, not yet read."""

  key: str
  members: Mapping[str, tuple[int, int]]  # ending, such as 'jpg' -> (offset, length), bytes
  read: Callable[[str, int], bytes]  # (ending, maximum bytes) -> the first bytes of that member
  folder: str = ''  # format 'folder': the class folder, '' in the root itself
  path: str = ''  # format 'folder': path of the image, relative to the root
  fields: Mapping[str, Any] = types.MappingProxyType({})  # columns beside the members


class Record(NamedTuple):
  """One row of an index."""

  key: str
  caption: str
  label: int  # -1: none
  group: str  # shared by related samples (one photo, one writer)
  offset: int  # of the image in its file, bytes
  length: int  # of the image, bytes
  width: int  # pixels, from the image's header; 0 if the header is unreadable
  height: int
  columns: dict[str, Any]  # the chosen json columns
  path: str = ''  # of an image file, relative to the root
  type: str = ''  # image type from the header: 'jpeg', 'png', ...; '' if unknown


@dataclasses.dataclass(frozen=True)
class Scan:
  """The samples of one shard; each is a record, skipped, or left out."""

  records: list[Record]
  skipped: list[dict[str, str]]  # {'key', 'reason'} of each unusable sample or file
  left_out: int = 0  # number of samples that `where` and `part` do not choose
  # Peculiarity of records -> number of records, such as {'caption not UTF-8': 2}
  noted: Mapping[str, int] = dataclasses.field(default_factory=dict)


def write_shard(directory: str, shard: int, scan: Scan) -> dict[str, Any]:
  """Writes index-<shard>.parquet and skipped-<shard>.json; returns the counts."""
  import pyarrow as pa

  r, reasons = scan.records, collections.Counter(entry['reason'] for entry in scan.skipped)
  columns = {
    name: pa.array([shard if name == 'shard' else getattr(record, name) for record in r], kind)
    for name, kind in _TYPES.items()
  }
  if not any(record.path for record in r):
    del columns['path']
  for name in dict.fromkeys(name for record in r for name in record.columns):
    columns[name] = _column([record.columns.get(name) for record in r])
  files.write_parquet(index_file(directory, shard), pa.table(columns))
  files.write_json(skipped_file(directory, shard), scan.skipped)
  return {
    'rows': len(r),
    'skipped': len(scan.skipped),
    'left_out': scan.left_out,
    'reasons': dict(sorted(reasons.items())),
    **({'noted': dict(sorted(scan.noted.items()))} if scan.noted else {}),
  }


def assemble(
  directory: str, shards: Sequence[Mapping[str, str]], classes: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
  """Writes the table of a dataset from the index files of all its shards, in order.

  shards: {'format', 'root', 'path', 'image_key'} of each; path: of the shard's file, absolute or
  from the directory, '' if images are files below root. A dataset may have shards of several
  sources and formats. classes: the class names of each shard in label order, () for none. Returns
  counts and the names of written files.
  """
  sizes = [_open_index(directory, i).metadata.num_rows for i in range(len(shards))]
  reasons, unlabelled, written = collections.Counter(), 0, 0
  with (
    files.atomic(os.path.join(directory, 'table.npy')) as table_path,
    files.atomic(os.path.join(directory, 'captions.bin')) as text_path,
    table_path.open('wb') as table,
    text_path.open('wb') as text,
  ):
    np.lib.format.write_array_header_1_0(
      table, {'descr': TABLE_DTYPE.descr, 'fortran_order': False, 'shape': (sum(sizes),)}
    )
    for i in range(len(shards)):
      for rows, captions in _rows(directory, i, written):
        table.write(rows.tobytes())
        text.write(captions)
        written += len(captions)
        unlabelled += int((rows['label'] < 0).sum())
      reasons.update(entry['reason'] for entry in files.read_json(skipped_file(directory, i)))
  file_names = ['table.npy', 'captions.bin', 'starts.npy', 'files.json']
  if not all(shard['path'] for shard in shards):
    file_names += _write_paths(directory, shards, sizes)
  files.write_npy(os.path.join(directory, 'starts.npy'), np.cumsum([0, *sizes], dtype=np.int64))
  files.write_json(
    os.path.join(directory, 'files.json'),
    {'shards': [dict(shard) for shard in shards], 'classes': _class_list(classes)},
  )
  return {
    'rows': sum(sizes),
    'shards': len(shards),
    'skipped': reasons.total(),
    'reasons': dict(sorted(reasons.items())),
    'unlabelled': unlabelled,
    'files': file_names,
  }


def read_files(directory: str) -> dict[str, Any]:
  """Returns files.json: the shards, as in `assemble` but with absolute paths, and the classes."""
  found = files.read_json(os.path.join(directory, 'files.json'))
  for shard in found['shards']:
    if shard['path'] and files.is_local(shard['path']) and not os.path.isabs(shard['path']):
      shard['path'] = os.path.normpath(os.path.join(directory, shard['path']))
  return found


def _write_paths(
  directory: str, shards: Sequence[Mapping[str, str]], sizes: Sequence[int]
) -> list[str]:
  """Writes the paths of all rows as one text, and the end of each; returns the file names."""
  written = 0
  with (
    files.atomic(os.path.join(directory, 'path_ends.npy')) as ends_path,
    files.atomic(os.path.join(directory, 'paths.bin')) as text_path,
    ends_path.open('wb') as ends,
    text_path.open('wb') as text,
  ):
    np.lib.format.write_array_header_1_0(
      ends, {'descr': '<i8', 'fortran_order': False, 'shape': (sum(sizes),)}
    )
    for i, shard in enumerate(shards):
      if shard['path']:
        ends.write(np.full(sizes[i], written, '<i8').tobytes())
        continue
      for batch in batches(directory, i, ['path']):
        paths, stops = _join_texts(batch['path'], written)
        text.write(paths)
        ends.write(stops.tobytes())
        written += len(paths)
  return ['path_ends.npy', 'paths.bin']


def index_file(directory: str, shard: int) -> str:
  return os.path.join(directory, f'index-{shard:05d}.parquet')


def read_columns(directory: str, shard: int, columns: list[str]):
  """Returns the given columns of an index file as a pyarrow table, without those it lacks."""
  return _open_index(directory, shard).read(columns)


def column_type(directory: str, shard: int, column: str):
  """Returns the pyarrow type of a column of an index file, None if it has no such column."""
  schema = _open_index(directory, shard).schema_arrow
  return schema.field(column).type if column in schema.names else None


def batches(directory: str, shard: int, columns: list[str]) -> Iterator[Any]:
  """Yields columns of an index file as pyarrow record batches, in constant memory."""
  with _open_index(directory, shard) as index:
    yield from index.iter_batches(_BATCH, columns=columns)


def read_key(directory: str, shard: int, row: int) -> str:
  """Returns the key of a row of a shard; reads one row group of its index only."""
  with _open_index(directory, shard) as index:
    for group in range(index.num_row_groups):
      size = index.metadata.row_group(group).num_rows
      if row < size:
        return index.read_row_group(group, ['key'])['key'][row].as_py()
      row -= size
  raise IndexError(f'row {row} is not in {index_file(directory, shard)}')


def skipped_file(directory: str, shard: int) -> str:
  return os.path.join(directory, f'skipped-{shard:05d}.json')


def _column(values: list[Any]):
  """Returns a pyarrow column: int64, else float64, else text (other values as JSON)."""
  import pyarrow as pa

  values = [None if value != value else value for value in values]  # NaN counts as missing
  known = [value for value in values if value is not None]
  if not known:
    return pa.nulls(len(values))
  if all(type(value) is int and -(2**63) <= value < 2**63 for value in known):
    return pa.array(values, pa.int64())
  if all(type(value) is float or type(value) is int and abs(value) <= 2**53 for value in known):
    return pa.array([None if value is None else float(value) for value in values], pa.float64())
  return pa.array(
    [value if value is None or isinstance(value, str) else json.dumps(value) for value in values],
    pa.string(),
  )


def _rows(directory: str, shard: int, written: int) -> Iterator[tuple[Array, bytes]]:
  """Yields (table rows, caption bytes) of a shard; the captions begin at byte `written`."""
  for batch in batches(directory, shard, ['offset', 'length', 'label', 'caption']):
    rows = np.zeros(batch.num_rows, TABLE_DTYPE)
    for name in ('offset', 'length', 'label'):
      rows[name] = batch[name].to_numpy()
    rows['shard'] = shard
    captions, ends = _join_texts(batch['caption'], written)
    rows['caption_length'] = np.diff(ends, prepend=written)
    rows['caption_offset'] = ends - rows['caption_length']
    yield rows, captions
    written += len(captions)


def _open_index(directory: str, shard: int):
  import pyarrow.parquet as pq  # takes 0.1 s to import, and loader processes do not need it

  return pq.ParquetFile(files.local(index_file(directory, shard)))


def _join_texts(texts: Any, written: int) -> tuple[bytes, Array]:  # [n] int64
  """Returns the joined texts of a pyarrow array, and the end of each, counted from `written`."""
  import pyarrow as pa

  parts = texts.cast(pa.binary()).to_pylist()
  return b''.join(parts), written + np.cumsum([len(part) for part in parts], dtype='<i8')


def _class_list(classes: Sequence[Sequence[str]]) -> list[str]:
  """Returns the class names of the dataset; raises InputError if shards have different ones."""
  lists = {tuple(names) for names in classes if names}
  if len(lists) > 1:
    first, second, *_ = sorted(lists)
    raise InputError(
      f'The sources of one dataset have different classes, {first[:5]} ... and '
      f'{second[:5]} ..., so a label would be ambiguous. Give all sources the same classes.'
    )
  return list(lists.pop()) if lists else []
