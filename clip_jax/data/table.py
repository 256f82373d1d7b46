"""The row table of a dataset: one row a sample, saying in which file and at which bytes it lies.

In: the scans of the dataset's shards (data/sources.py). Out, in the dataset's folder:
index-<shard>.parquet and skipped-<shard>.json for people and joins; table.npy, captions.bin,
starts.npy [shards + 1] and files.json, from which `Source` reads samples at random.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import mmap
import operator
import os
from typing import Any

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

TABLE_DTYPE = np.dtype([('shard', '<i4'), ('offset', '<i8'), ('length', '<i4'),
                        ('caption_offset', '<i8'), ('caption_length', '<i4'), ('label', '<i4')])
COLUMNS = ('key', 'caption', 'label', 'group', 'shard', 'offset', 'length', 'width', 'height',
           'path')  # of every index; path only where images are files
_OPEN_FILES = 128  # source files that one Source keeps open


@dataclasses.dataclass(frozen=True)
class Sample:
  """What a source format finds under one key: its members by their ending, not read yet."""
  key: str
  members: Mapping[str, tuple[int, int]]  # ending, such as 'jpg' -> (offset, length), bytes
  read: Callable[[str, int], bytes]       # (ending, most bytes) -> the beginning of that member
  folder: str = ''                        # format 'folder': the class folder, '' in the root itself
  path: str = ''                          # format 'folder': of the image, relative to the root


@dataclasses.dataclass(frozen=True)
class Record:
  """One row of an index."""
  key: str
  caption: str
  label: int               # -1: none
  group: str               # siblings (one photo, one writer) share it
  offset: int              # of the image in its file, bytes
  length: int              # of the image, bytes
  width: int               # pixels, from the image's header; 0 where that cannot be read
  height: int
  columns: dict[str, Any]  # the chosen json columns
  path: str = ''           # relative to the root, where the image is a file


@dataclasses.dataclass(frozen=True)
class Scan:
  """What one shard holds: a sample is a record, or listed in skipped, or it was not asked for."""
  records: list[Record]
  skipped: list[dict[str, str]]  # {'key', 'reason'} of each sample, or file, that cannot be used
  left_out: int = 0              # samples that `where` and `part` do not ask for


def write_shard(directory: str, shard: int, scan: Scan) -> dict[str, Any]:
  """Writes index-<shard>.parquet and skipped-<shard>.json; returns the counts."""
  import pyarrow as pa  # costs 0.1 s to import, and workers of the loader do not need it
  r = scan.records
  columns = {
      'key': pa.array([record.key for record in r], pa.string()),
      'caption': pa.array([record.caption for record in r], pa.string()),
      'label': pa.array([record.label for record in r], pa.int32()),
      'group': pa.array([record.group for record in r], pa.string()),
      'shard': pa.array([shard] * len(r), pa.int32()),
      'offset': pa.array([record.offset for record in r], pa.int64()),
      'length': pa.array([record.length for record in r], pa.int32()),
      'width': pa.array([record.width for record in r], pa.int32()),
      'height': pa.array([record.height for record in r], pa.int32()),
  }
  if any(record.path for record in r):
    columns['path'] = pa.array([record.path for record in r], pa.string())
  for name in dict.fromkeys(name for record in r for name in record.columns):
    columns[name] = _column([record.columns.get(name) for record in r])
  files.write_parquet(_index(directory, shard), pa.table(columns))
  files.write_json(_skipped(directory, shard), scan.skipped)
  return {'rows': len(r), 'skipped': len(scan.skipped), 'left_out': scan.left_out,
          'reasons': _count(scan.skipped)}


def assemble(directory: str, shards: Sequence[Mapping[str, str]],
             classes: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
  """Makes the table of a dataset out of the index files of all its shards, in their order.

  shards: {'format', 'root', 'path'} of each: the path of its tar, '' where images are files below
  root. Shards of several sources, of any formats, make one dataset. classes: the class names of
  each shard in label order, () where it has none. Returns counts, and the files made.
  """
  import pyarrow.parquet as pq
  sizes = [pq.read_metadata(_index(directory, i)).num_rows for i in range(len(shards))]
  skipped = [entry for i in range(len(shards)) for entry in files.read_json(_skipped(directory, i))]
  unlabelled = written = 0
  with (files.atomic(os.path.join(directory, 'table.npy')) as table_path,
        files.atomic(os.path.join(directory, 'captions.bin')) as text_path,
        table_path.open('wb') as table, text_path.open('wb') as text):
    np.lib.format.write_array_header_1_0(table, {
        'descr': TABLE_DTYPE.descr, 'fortran_order': False, 'shape': (sum(sizes),)})
    for i in range(len(shards)):
      rows, captions = _rows(directory, i, written)
      table.write(rows.tobytes())
      text.write(captions)
      written += len(captions)
      unlabelled += int((rows['label'] < 0).sum())
  files.write_npy(os.path.join(directory, 'starts.npy'), np.cumsum([0, *sizes], dtype=np.int64))
  files.write_json(os.path.join(directory, 'files.json'), {
      'shards': [dict(shard) for shard in shards], 'classes': _class_list(classes)})
  return {'rows': sum(sizes), 'shards': len(shards), 'skipped': len(skipped),
          'reasons': _count(skipped), 'unlabelled': unlabelled,
          'files': ['table.npy', 'captions.bin', 'starts.npy', 'files.json']}


class Source:
  """A dataset on disk, read at random: a Grain RandomAccessDataSource.

  Any number of threads may read. A pickle holds the folder's name only. The table and the captions
  are memory-mapped; at most _OPEN_FILES source files are open.
  """

  def __init__(self, directory: str):
    self._directory = os.fspath(directory)
    self._opened = functools.lru_cache(_OPEN_FILES)(File)
    self._path_lists: dict[int, list[str]] = {}

  def __reduce__(self):
    return Source, (self._directory,)

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, row: int) -> dict[str, Any]:
    """Returns dict(image: the bytes of the file, caption: str, label: int, -1 for none)."""
    shard, offset, length, caption_offset, caption_length, label = self._row(row)
    return {'image': self._image(row, shard, offset, length), 'label': label,
            'caption': self._captions[caption_offset:caption_offset + caption_length].decode()}

  def caption(self, row: int) -> str:
    """Returns the caption of a row without reading its image."""
    _, _, _, offset, length, _ = self._row(row)
    return self._captions[offset:offset + length].decode()

  @property
  def labels(self) -> Array:  # [n] int32
    return np.ascontiguousarray(self._table['label'])

  @property
  def caption_lengths(self) -> Array:  # [n] int32, bytes of UTF-8
    return np.ascontiguousarray(self._table['caption_length'])

  @functools.cached_property
  def starts(self) -> Array:  # [shards + 1] int64
    return np.load(os.path.join(self._directory, 'starts.npy'))

  @property
  def classes(self) -> tuple[str, ...]:
    """The class names in label order, () where none are known."""
    return tuple(self._files['classes'])

  def column(self, name: str) -> Array:  # [n]
    """Returns a column of the index: numbers (NaN for none), or objects, str (None for none)."""
    import pyarrow as pa
    parts = [_read(self._directory, shard, [name]) for shard in range(len(self._files['shards']))]
    if not any(part.column_names for part in parts):
      raise InputError(f'{self._directory} has no column {name!r}: name it in the `columns` of the '
                       'dataset.')
    parts = [part[name] if part.column_names else pa.chunked_array([pa.nulls(part.num_rows)])
             for part in parts]
    kinds = {part.type for part in parts} - {pa.null()}  # shards without a value have no type
    if len(kinds) != 1:
      kinds = {pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()}
    kind, = kinds
    column = pa.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind)
    if kind != pa.string():
      return column.to_numpy()
    codes = column.combine_chunks().dictionary_encode()  # equal texts share one str
    words = np.array([*codes.dictionary.to_pylist(), None], object)
    return words[codes.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]

  def same_samples(self, other: 'Source') -> Array:  # [n] bool
    """Returns which rows are a sample of `other` too: the same bytes of the same file."""
    theirs = collections.defaultdict(list)
    for shard in range(len(other.starts) - 1):
      path, places = other._places(shard)
      theirs[path].append(places)
    mask = np.zeros(len(self), bool)
    for shard in range(len(self.starts) - 1):
      path, places = self._places(shard)
      if path in theirs:
        rows = slice(self.starts[shard], self.starts[shard + 1])
        mask[rows] = np.isin(places, np.concatenate(theirs[path]))
    return mask

  def _places(self, shard: int) -> tuple[str, Array]:
    """Returns a shard's file, or folder, and where its samples are in it: offsets, or paths."""
    where = self._files['shards'][shard]
    if not where['path']:
      return where['root'], np.array(self._paths(shard), np.str_)
    return where['path'], self._table['offset'][self.starts[shard]:self.starts[shard + 1]]

  def _row(self, row: int) -> tuple[int, int, int, int, int, int]:
    row = operator.index(row)
    if not 0 <= row < len(self._table):
      raise IndexError(f'row {row} of {len(self._table)} in {self._directory}')
    return self._table[row].item()

  def _image(self, row: int, shard: int, offset: int, length: int) -> bytes:
    where = self._files['shards'][shard]
    path = where['path']
    if not path:
      path = os.path.join(where['root'], self._paths(shard)[row - int(self.starts[shard])])
    try:
      data = (self._opened(path) if where['path'] else File(path)).read(offset, length)
    except OSError as error:
      raise InputError(f'{path} cannot be read any more ({error.strerror}). Put it back, or index '
                       'again with --redo=ingest.') from error
    if len(data) != length:
      raise InputError(f'{path} ends at byte {offset + len(data)}, inside a sample: it is not the '
                       'file that was indexed. Put that back, or index again with --redo=ingest.')
    return data

  @functools.cached_property
  def _table(self) -> Array:  # [n] TABLE_DTYPE
    table = np.load(os.path.join(self._directory, 'table.npy'), mmap_mode='r')
    return table.view(np.ndarray)  # a plain view of the map: np.memmap's own indexing is slow

  @functools.cached_property
  def _captions(self) -> mmap.mmap | bytes:
    with open(os.path.join(self._directory, 'captions.bin'), 'rb') as f:
      if not os.fstat(f.fileno()).st_size:
        return b''  # an empty file cannot be mapped
      return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

  @functools.cached_property
  def _files(self) -> dict[str, Any]:
    return files.read_json(os.path.join(self._directory, 'files.json'))

  def _paths(self, shard: int) -> list[str]:
    """Returns the paths of a shard's images, relative to its root."""
    if shard not in self._path_lists:
      self._path_lists[shard] = _read(self._directory, shard, ['path'])['path'].to_pylist()
    return self._path_lists[shard]


class File:
  """A file open for reading, closed when nobody holds it any more."""

  def __init__(self, path: str):
    self._fd = os.open(path, os.O_RDONLY)

  def __del__(self, close=os.close):
    if hasattr(self, '_fd'):
      close(self._fd)

  def size(self) -> int:
    return os.fstat(self._fd).st_size

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, fewer where the file ends. Threads may read at once."""
    return os.pread(self._fd, length, offset)


def _index(directory: str, shard: int) -> str:
  return os.path.join(directory, f'index-{shard:05d}.parquet')


def _read(directory: str, shard: int, columns: list[str]):
  """Returns columns of an index file, those that it has, as a pyarrow table."""
  import pyarrow.parquet as pq
  return pq.ParquetFile(_index(directory, shard)).read(columns)


def _skipped(directory: str, shard: int) -> str:
  return os.path.join(directory, f'skipped-{shard:05d}.json')


def _count(skipped: Sequence[Mapping[str, str]]) -> dict[str, int]:
  return dict(sorted(collections.Counter(entry['reason'] for entry in skipped).items()))


def _column(values: list[Any]):
  """Returns a pyarrow column: integers, else numbers, else text (JSON of what is no text)."""
  import pyarrow as pa
  values = [None if value != value else value for value in values]  # NaN is no value
  there = [value for value in values if value is not None]
  if not there:
    return pa.nulls(len(values))
  if all(type(value) is int and -2**63 <= value < 2**63 for value in there):
    return pa.array(values, pa.int64())
  if all(type(value) is float or type(value) is int and abs(value) <= 2**53 for value in there):
    return pa.array([None if value is None else float(value) for value in values], pa.float64())
  return pa.array([value if value is None or isinstance(value, str) else json.dumps(value)
                   for value in values], pa.string())


def _rows(directory: str, shard: int, written: int) -> tuple[Array, bytes]:
  """Returns a shard's rows of the table, and its captions, which begin at byte `written`."""
  index = _read(directory, shard, ['offset', 'length', 'label', 'caption'])
  captions = [caption.encode() for caption in index['caption'].to_pylist()]
  rows = np.zeros(len(captions), TABLE_DTYPE)
  for name in ('offset', 'length', 'label'):
    rows[name] = index[name].to_numpy()
  rows['shard'] = shard
  rows['caption_length'] = [len(caption) for caption in captions]
  ends = written + np.cumsum(rows['caption_length'], dtype=np.int64)
  rows['caption_offset'] = ends - rows['caption_length']
  return rows, b''.join(captions)


def _class_list(classes: Sequence[Sequence[str]]) -> list[str]:
  """Returns the one list of class names that all shards agree on."""
  lists = {tuple(names) for names in classes if names}
  if len(lists) > 1:
    first, second, *_ = sorted(lists)
    raise InputError(f'The sources of one dataset have different classes, {first[:5]} ... and '
                     f'{second[:5]} ..., so a label would mean two things. Give all the same.')
  return list(lists.pop()) if lists else []
