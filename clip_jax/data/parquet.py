"""Format 'parquet': image bytes in a column, as img2dataset and Hugging Face's datasets write them.

In: a .parquet with a column of bytes ('jpg') or of {bytes, path} ('image'), and any other columns.
Out: its samples, with their row numbers; a random-access reader of rows. A file is streamed page by
page and never held in memory as a whole.
"""

import bisect
import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.core.errors import InputError
from clip_jax.data import row_rules, storage, table

_BATCH = 4 << 20  # approximate bytes of images decoded at once
_MOST_ROWS = 256  # maximum rows decoded at once, because sizes in a footer may be wrong
_CACHED = 96 << 20  # bytes of decoded images that a process caches, over all its files
_STREAMS = 8  # partly read row groups that a process keeps open; each holds a page or two
_BUFFER = 1 << 20  # bytes per read of a local file
_REMOTE_BUFFER = 8 << 20  # bytes per read of a remote file
_MOST = {'string': 100_000_000, 'container': 1_000_000}  # of a footer: pyarrow's own limits


class _Damage(Exception):
  """A file, or a part of it, is not valid parquet."""


@dataclasses.dataclass(frozen=True)
class _File:
  """An open file, with the layout of its images."""

  parquet: Any  # pyarrow's ParquetFile
  column: str  # of the images
  leaf: str  # path of the bytes in the schema: the column, or 'column.bytes'
  ending: str  # the name in image_key that matches the column
  starts: tuple[int, ...]  # first row of each row group, then the total number of rows
  steps: tuple[int, ...]  # rows to decode at once, for each row group

  def batches(self, group: int, columns: Sequence[str]) -> Iterator:
    """Yields the given columns of a row group in batches. Raises _Damage."""
    with _damage_errors():
      yield from self.parquet.iter_batches(self.steps[group], [group], columns, use_threads=False)


def samples(
  file: storage.SourceFile,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
) -> tuple[Iterator[table.Sample], list[dict[str, str]]]:
  """Returns the samples of a file in order, and the skipped entries.

  image_key: names of the image column, in lower case; the first one in the file counts. sample_key:
  names of the key column; without it, a key is the file's name and the row. columns: other columns
  to read. A name without a column matches the only column that differs in case alone ('TEXT'). A
  damaged file or row group is skipped; a sample without an image has no members. Raises InputError
  if no column holds images.
  """
  try:
    opened = _open(file.path, image_key)
  except _Damage:
    return iter(()), [{'key': file.name, 'reason': 'not a parquet file'}]
  actual = row_rules.matched([*sample_key, *columns], opened.parquet.schema_arrow.names)
  key = row_rules.first_of(sample_key, actual)
  wanted = {
    name: actual[name]
    for name in dict.fromkeys([*filter(None, [key]), *columns])
    if actual.get(name, opened.column) != opened.column
  }
  for name in [opened.column, *wanted.values()]:
    if opened.parquet.schema_arrow.names.count(name) > 1:
      raise InputError(
        f'{file.path} has two columns named {name}. Write the file with one, or name other '
        'columns in the dataset.'
      )
  skipped = [] if opened.starts[-1] else [{'key': file.name, 'reason': 'no samples'}]
  return _samples(opened, file.name, key, wanted, skipped), skipped


def classes(path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names that Hugging Face's datasets store in a file, () for none."""
  try:
    metadata = json.loads((_parquet(path).schema_arrow.metadata or {}).get(b'huggingface', b'{}'))
    names = metadata['info']['features'][label_key]['names']
    return tuple(names) if all(isinstance(name, str) for name in names) else ()
  except (_Damage, ValueError, LookupError, TypeError, RecursionError):
    return ()


class Reader:
  """Random access to the rows of a file; thread-safe.

  A row group can only be decoded from its start. So the batches decoded on the way to a row are
  cached, up to _CACHED bytes, and a read of a later row of the group continues from there.
  """

  def __init__(self, path: str, image_key: str):
    self._path = path
    try:
      self._file = _open(path, row_rules.image_names(image_key))
    except _Damage as error:
      raise storage.changed_file_error(self._path) from error
    self._number = next(_numbers)
    self._ends = collections.defaultdict(list)  # row group -> row at which each batch ends
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._file.starts[-1]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the images of [(row, length)]; each row group is read once."""
    images = self.values([row for row, _ in ranges])
    if any(len(data) != length for data, (_, length) in zip(images, ranges, strict=True)):
      raise storage.changed_file_error(self._path)
    return images

  def values(self, rows: Sequence[int]) -> list[bytes]:
    """Returns the bytes of rows, in the given order, without a check of their lengths."""
    images = [b''] * len(rows)
    with self._lock:
      for i in sorted(range(len(rows)), key=rows.__getitem__):
        images[i] = self._value(rows[i])
    return images

  def _value(self, row: int) -> bytes:
    if not 0 <= row < self._file.starts[-1]:
      raise storage.changed_file_error(self._path)
    group = bisect.bisect_right(self._file.starts, row) - 1
    row -= self._file.starts[group]
    number = bisect.bisect_right(self._ends[group], row)
    batch = _decoded.get((self._number, group, number))
    if batch is None:
      number, batch = self._decode(group, row, number)
    data = _buffer(batch, row - (self._ends[group][number - 1] if number else 0))
    if data is None:
      raise storage.changed_file_error(self._path)
    return data.to_pybytes()

  def _decode(self, group: int, row: int, wanted: int) -> tuple[int, Any]:
    """Returns the number of the batch that holds a row of a row group, and the batch."""
    number, stream = _streams.take((self._number, group)) or (0, None)
    if stream is None or number > wanted:
      number, stream = 0, self._file.batches(group, [self._file.leaf])
    ends = self._ends[group]
    while True:
      try:
        batch = _bytes_or_path(next(stream).column(self._file.column), 'bytes')
      except (_Damage, StopIteration) as error:
        raise storage.changed_file_error(self._path) from error
      if number == len(ends):
        ends.append((ends[-1] if ends else 0) + len(batch))
      _decoded.put((self._number, group, number), batch, batch.nbytes)
      if row < ends[number]:
        if self._file.starts[group] + ends[number] < self._file.starts[group + 1]:
          _streams.put((self._number, group), (number + 1, stream))
        return number, batch
      number += 1


class _LRUCache:
  """A cache with least-recently-used eviction and a maximum total size."""

  def __init__(self, most: int):
    self._most, self._size, self._lock = most, 0, threading.RLock()
    self._entries: collections.OrderedDict[tuple, tuple[Any, int]] = collections.OrderedDict()

  def get(self, key: tuple) -> Any | None:
    with self._lock:
      if key in self._entries:
        self._entries.move_to_end(key)
      return self._entries.get(key, (None, 0))[0]

  def take(self, key: tuple) -> Any | None:
    """Removes and returns a value, so that no other thread gets it; None if it is missing."""
    with self._lock:
      value, size = self._entries.pop(key, (None, 0))
      self._size -= size
      return value

  def put(self, key: tuple, value: Any, size: int = 1) -> None:
    with self._lock:
      self.take(key)
      self._entries[key] = value, size
      self._size += size
      while self._size > self._most:
        self._size -= self._entries.popitem(last=False)[1][1]


_decoded = _LRUCache(_CACHED)  # (reader, row group, batch) -> the batch's images
_streams = _LRUCache(_STREAMS)  # (reader, row group) -> (number of the next batch, iterator)
_numbers = itertools.count()  # one per reader, because a file may change before it is reopened


def _samples(
  file: _File,
  name: str,
  key: str | None,
  columns: Mapping[str, str],  # name in a sample's fields -> column
  skipped: list[dict[str, str]],
) -> Iterator[table.Sample]:
  path = [] if file.leaf == file.column else [f'{file.column}.path']
  leaves = list(dict.fromkeys([file.leaf, *path, *columns.values()]))
  stem = os.path.splitext(name)[0]
  for group, (row, end) in enumerate(itertools.pairwise(file.starts)):
    try:
      for batch in file.batches(group, leaves):
        if row + batch.num_rows > end:
          raise _Damage('more rows than the footer says')
        for image, path_only, fields in _rows(batch, file.column, columns):
          value = fields.get(key) if key else None
          sample_key = f'{stem}/{row:09d}' if value is None or value == '' else str(value)
          if path_only:
            skipped.append({'key': sample_key, 'reason': 'image is not in the file'})
          else:
            members = {} if image is None else {file.ending: (row, image.size)}
            yield table.Sample(sample_key, members, functools.partial(_read, image), fields=fields)
          row += 1
      if row < end:
        raise _Damage('fewer rows than the footer says')
    except _Damage as damage:
      out_of_memory = isinstance(damage.__cause__, MemoryError)
      skipped.append(
        {
          'key': f'{name}, row {row}',
          'reason': 'not enough memory for a page' if out_of_memory else 'damaged row group',
        }
      )


def _rows(
  batch, column: str, columns: Mapping[str, str]
) -> Iterator[tuple[Any, bool, dict[str, Any]]]:
  """Yields (image bytes or None, whether the row has a path only, its fields) of each row."""
  with _damage_errors():
    # Paths are never opened.
    images, paths = (_bytes_or_path(batch.column(column), name) for name in ('bytes', 'path'))
    arrays = {name: batch.column(actual) for name, actual in columns.items()}
    for i in range(batch.num_rows):
      image = _buffer(images, i)
      path_only = image is None and paths is not None and paths[i].is_valid
      yield image, path_only, {name: _python(array, i) for name, array in arrays.items()}


def _read(data, ending: str, most: int) -> bytes:
  return data.slice(0, min(most, data.size)).to_pybytes()


@contextlib.contextmanager
def _damage_errors() -> Iterator[None]:
  """Turns the errors that pyarrow raises on damaged files into _Damage; others pass unchanged."""
  errors = pa.ArrowException, OSError, ValueError, OverflowError, IndexError, KeyError
  try:
    yield
  except errors as error:
    if isinstance(error, InputError) or getattr(error, 'errno', None):
      raise
    raise _Damage(str(error)) from error


def _parquet(path: str):
  """Returns a pyarrow ParquetFile, with limits against a footer that claims more than it holds."""
  local = '://' not in path
  size = os.path.getsize(path) if local else _MOST['string']
  with _damage_errors():
    return pq.ParquetFile(
      path if local else storage.open_stream(path),
      pre_buffer=False,
      buffer_size=_BUFFER if local else _REMOTE_BUFFER,
      thrift_string_size_limit=min(_MOST['string'], max(size, 1)),
      thrift_container_size_limit=min(_MOST['container'], max(size, 1)),
    )


def _open(path: str, image_key: Sequence[str]) -> _File:
  """Opens a file. Raises _Damage, and InputError if no column holds images."""
  parquet = _parquet(path)
  with _damage_errors():
    column, leaf, ending = _image_column(parquet.schema_arrow, image_key, path)
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    counts = [group.num_rows for group in groups]
    if min(counts, default=0) < 0 or sum(counts) != parquet.metadata.num_rows:
      raise _Damage('the footer contradicts itself')
    # The sizes of columns are not read: on some damaged footers pyarrow then ends the process.
    steps = (_BATCH * group.num_rows // max(group.total_byte_size, 1) for group in groups)
    return _File(
      parquet,
      column,
      leaf,
      ending,
      (0, *itertools.accumulate(counts)),
      tuple(min(_MOST_ROWS, max(1, step)) for step in steps),
    )


def _image_column(schema, names: Sequence[str], path: str) -> tuple[str, str, str]:
  """Returns the image column, the path of its bytes in the schema, and its name in `names`."""
  fields = {field.name.lower(): field for field in schema}
  for name in filter(fields.__contains__, names):
    kind, column = _storage_type(fields[name].type), fields[name].name
    if _holds_bytes(kind):
      return column, column, name
    if (
      pa.types.is_struct(kind)
      and kind.get_field_index('bytes') >= 0
      and _holds_bytes(_storage_type(kind.field('bytes').type))
    ):
      return column, f'{column}.bytes', name
  columns = ', '.join(f'{field.name} ({field.type})' for field in schema)
  raise InputError(
    f'{path} has no column of image bytes, or of {{bytes, path}}, among '
    f'{", ".join(names)}; it has {columns[:500]}. Set image_key to its image column.'
  )


def _holds_bytes(kind) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _storage_type(kind):
  """Returns the storage type of the values, without extension or dictionary wrappers."""
  while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType):
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
  return kind


def _bytes_or_path(array, name: str):
  """Returns the field 'bytes' or 'path' of a batch of images, None if it is missing.

  A plain column of bytes counts as the field 'bytes'.
  """
  if isinstance(array, pa.ExtensionArray):
    array = array.storage
  if not isinstance(array, pa.StructArray):
    return array if name == 'bytes' else None
  place = array.type.get_field_index(name)
  # flatten() gives null where the parent is null.
  return None if place < 0 else _bytes_or_path(array.flatten()[place], 'bytes')


def _buffer(array, i: int):
  """Returns the bytes of one value without a copy, None for null."""
  value = array[i]
  if isinstance(value, pa.DictionaryScalar):
    value = value.value
  return value.as_buffer() if value.is_valid else None


def _python(array, i: int) -> Any:
  """Returns a value of a column as JSON types, None if Python cannot represent it."""
  value = array[i]
  if isinstance(value, pa.DictionaryScalar):
    value = value.value
  if not value.is_valid:
    return None
  if isinstance(value, pa.StringScalar | pa.BinaryScalar):  # text may be invalid UTF-8
    return _as_text(value.as_buffer().to_pybytes())
  try:
    return json.loads(json.dumps(value.as_py(), default=_as_text))
  except (pa.ArrowException, ValueError, OverflowError):  # such as a time out of Python's range
    return None


def _as_text(value: Any) -> str:
  return storage.decode_text(value) if isinstance(value, bytes) else str(value)
