"""The row table of a dataset: one row a sample, saying in which file and at which bytes it lies.

In: the scans of the dataset's shards (data/sources.py). Out, in the dataset's folder:
index-<shard>.parquet and skipped-<shard>.json for people and joins; table.npy, captions.bin,
starts.npy [shards + 1] and files.json, from which reader.Source reads samples at random; where
images are files also paths.bin and path_ends.npy [rows]. pyarrow is imported inside functions:
processes of the loader do without it.
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
COLUMNS = tuple(_TYPES)  # of every index; path only where images are files
_BATCH = 1 << 16  # rows of an index in memory at a time


class Sample(NamedTuple):  # like Record: a frozen dataclass takes four times as long to make
  """What a source format finds under one key: its members by their ending, not read yet."""

  key: str
  members: Mapping[str, tuple[int, int]]  # ending, such as 'jpg' -> (offset, length), bytes
  read: Callable[[str, int], bytes]  # (ending, most bytes) -> the beginning of that member
  folder: str = ''  # format 'folder': the class folder, '' in the root itself
  path: str = ''  # format 'folder': of the image, relative to the root
  fields: Mapping[str, Any] = types.MappingProxyType({})  # columns beside the members


class Record(NamedTuple):
  """One row of an index."""

  key: str
  caption: str
  label: int  # -1: none
  group: str  # siblings (one photo, one writer) share it
  offset: int  # of the image in its file, bytes
  length: int  # of the image, bytes
  width: int  # pixels, from the image's header; 0 where that cannot be read
  height: int
  columns: dict[str, Any]  # the chosen json columns
  path: str = ''  # relative to the root, where the image is a file
  type: str = ''  # of the image, by its header: 'jpeg', 'png', ...; '' where it says none


@dataclasses.dataclass(frozen=True)
class Scan:
  """What one shard holds: a sample is a record, or listed in skipped, or it was not asked for."""

  records: list[Record]
  skipped: list[dict[str, str]]  # {'key', 'reason'} of each sample, or file, that cannot be used
  left_out: int = 0  # samples that `where` and `part` do not ask for


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
  }


def assemble(
  directory: str, shards: Sequence[Mapping[str, str]], classes: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
  """Makes the table of a dataset out of the index files of all its shards, in their order.

  shards: {'format', 'root', 'path', 'image_key'} of each: the path of its file, '' where images are
  files below root. Shards of several sources, of any formats, make one dataset. classes: the class
  names of each shard in label order, () where it has none. Returns counts, and the files made.
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
  made = ['table.npy', 'captions.bin', 'starts.npy', 'files.json']
  if not all(shard['path'] for shard in shards):
    made += _write_paths(directory, shards, sizes)
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
    'files': made,
  }


def _write_paths(
  directory: str, shards: Sequence[Mapping[str, str]], sizes: Sequence[int]
) -> list[str]:
  """Writes the paths of all rows as one text, and where each ends; returns the files made."""
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
        paths, stops = _joined(batch['path'], written)
        text.write(paths)
        ends.write(stops.tobytes())
        written += len(paths)
  return ['path_ends.npy', 'paths.bin']


def index_file(directory: str, shard: int) -> str:
  return os.path.join(directory, f'index-{shard:05d}.parquet')


def read_columns(directory: str, shard: int, columns: list[str]):
  """Returns columns of an index file, those that it has, as a pyarrow table."""
  return _open_index(directory, shard).read(columns)


def batches(directory: str, shard: int, columns: list[str]) -> Iterator[Any]:
  """Yields columns of an index file as pyarrow record batches: memory does not grow with it."""
  with _open_index(directory, shard) as index:
    yield from index.iter_batches(_BATCH, columns=columns)


def read_key(directory: str, shard: int, row: int) -> str:
  """Returns the key of a row of a shard; only the part of its index where that lies is read."""
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
  """Returns a pyarrow column: integers, else numbers, else text (JSON of what is no text)."""
  import pyarrow as pa

  values = [None if value != value else value for value in values]  # NaN is no value
  there = [value for value in values if value is not None]
  if not there:
    return pa.nulls(len(values))
  if all(type(value) is int and -(2**63) <= value < 2**63 for value in there):
    return pa.array(values, pa.int64())
  if all(type(value) is float or type(value) is int and abs(value) <= 2**53 for value in there):
    return pa.array([None if value is None else float(value) for value in values], pa.float64())
  return pa.array(
    [value if value is None or isinstance(value, str) else json.dumps(value) for value in values],
    pa.string(),
  )


def _rows(directory: str, shard: int, written: int) -> Iterator[tuple[Array, bytes]]:
  """Yields a shard's rows of the table, and their captions, which begin at byte `written`."""
  for batch in batches(directory, shard, ['offset', 'length', 'label', 'caption']):
    rows = np.zeros(batch.num_rows, TABLE_DTYPE)
    for name in ('offset', 'length', 'label'):
      rows[name] = batch[name].to_numpy()
    rows['shard'] = shard
    captions, ends = _joined(batch['caption'], written)
    rows['caption_length'] = np.diff(ends, prepend=written)
    rows['caption_offset'] = ends - rows['caption_length']
    yield rows, captions
    written += len(captions)


def _open_index(directory: str, shard: int):
  import pyarrow.parquet as pq  # costs 0.1 s to import, and workers of the loader do not need it

  return pq.ParquetFile(index_file(directory, shard))


def _joined(texts: Any, written: int) -> tuple[bytes, Array]:  # [n] int64
  """Returns the texts of a pyarrow array as one, and where each ends, from byte `written` on."""
  import pyarrow as pa

  parts = texts.cast(pa.binary()).to_pylist()
  return b''.join(parts), written + np.cumsum([len(part) for part in parts], dtype='<i8')


def _class_list(classes: Sequence[Sequence[str]]) -> list[str]:
  """Returns the one list of class names that all shards agree on."""
  lists = {tuple(names) for names in classes if names}
  if len(lists) > 1:
    first, second, *_ = sorted(lists)
    raise InputError(
      f'The sources of one dataset have different classes, {first[:5]} ... and '
      f'{second[:5]} ..., so a label would mean two things. Give all the same.'
    )
  return list(lists.pop()) if lists else []
