"""Format 'parquet': image bytes in a column, as img2dataset and Hugging Face's datasets write them.

In: a .parquet with a column of bytes ('jpg'), or of {bytes, path} ('image'), and any others. Out:
its samples, each a row number; a reader of rows. A file is streamed page by page, never held whole.
"""

import bisect
import collections
from collections.abc import Iterator, Sequence
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
from clip_jax.data import storage, table

_BATCH = 4 << 20  # bytes of images decoded at once, about
_MOST_ROWS = 256  # and rows: what a footer says of sizes may be wrong
_CACHED = 96 << 20  # bytes of images kept decoded in a process, over all its files
_STREAMS = 8  # row groups that a process has begun to read; each holds a page or two
_BUFFER = 1 << 20  # bytes read at once
_REMOTE_BUFFER = 8 << 20  # the same where a read takes long
_MOST = {'string': 100_000_000, 'container': 1_000_000}  # in a footer: pyarrow's own limits


class _Damage(Exception):
  """A file, or a part of it, is not what parquet files are made of."""


@dataclasses.dataclass(frozen=True)
class _File:
  """An open file, and what is needed to read its images."""

  parquet: Any  # pyarrow's ParquetFile
  column: str  # of the images
  leaf: str  # the path of the bytes in the file: the column, or 'column.bytes'
  ending: str  # the name in image_key that the column goes by
  starts: tuple[int, ...]  # the first row of each row group, and the number of all rows
  steps: tuple[int, ...]  # rows of each row group that are decoded at once

  def batches(self, group: int, columns: Sequence[str]) -> Iterator:
    """Yields a row group in batches: the given columns. Raises _Damage."""
    with _damage():
      yield from self.parquet.iter_batches(self.steps[group], [group], columns, use_threads=False)


def samples(
  file: storage.SourceFile,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
) -> tuple[Iterator[table.Sample], list[dict[str, str]]]:
  """Returns the samples of a file in order, and what is listed as skipped.

  image_key: names of the image's column, in lower case, the first that is there counts; sample_key:
  of the column of keys, else a key is the file's name and the row; columns: what else is read.
  A file, or a row group, that is damaged is listed; a sample without an image has no members.
  Raises InputError where no column can be the image.
  """
  try:
    opened = _open(file.path, image_key)
  except _Damage:
    return iter(()), [{'key': file.name, 'reason': 'not a parquet file'}]
  names = set(opened.parquet.schema_arrow.names)
  key = next((name for name in sample_key if name in names), None)
  wanted = [
    name
    for name in dict.fromkeys([*filter(None, [key]), *columns])
    if name in names and name != opened.column
  ]
  for name in [opened.column, *wanted]:
    if opened.parquet.schema_arrow.names.count(name) > 1:
      raise InputError(
        f'{file.path} has two columns named {name}, so it is not clear which is '
        'meant. Write it with one, or name others in the dataset.'
      )
  skipped = [] if opened.starts[-1] else [{'key': file.name, 'reason': 'no samples'}]
  return _samples(opened, file.name, key, wanted, skipped), skipped


def classes(path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names that Hugging Face's datasets leave in a file, () for none."""
  try:
    said = json.loads((_parquet(path).schema_arrow.metadata or {}).get(b'huggingface', b'{}'))
    names = said['info']['features'][label_key]['names']
    return tuple(names) if all(isinstance(name, str) for name in names) else ()
  except (_Damage, ValueError, LookupError, TypeError, RecursionError):
    return ()


class Reader:
  """A file of which rows are read at random; any number of threads may.

  A row group can only be decoded from its start. So what is decoded on the way to a row is kept,
  as long as _CACHED allows, and a later row of the group goes on where the last one stopped.
  """

  def __init__(self, path: str, image_key: str):
    self._path = path
    try:
      self._file = _open(path, [name.strip() for name in image_key.lower().split(';')])
    except _Damage as error:
      raise storage.changed(self._path) from error
    self._number = next(_numbers)
    self._ends = collections.defaultdict(list)  # row group -> the rows before the end of each batch
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._file.starts[-1]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the images of [(row, length)]; each row group is read once."""
    found = self.values([row for row, _ in ranges])
    if any(len(data) != length for data, (_, length) in zip(found, ranges, strict=True)):
      raise storage.changed(self._path)
    return found

  def values(self, rows: Sequence[int]) -> list[bytes]:
    """Returns the bytes of rows, whatever their number."""
    found = [b''] * len(rows)
    with self._lock:
      for i in sorted(range(len(rows)), key=rows.__getitem__):
        found[i] = self._value(rows[i])
    return found

  def _value(self, row: int) -> bytes:
    if not 0 <= row < self._file.starts[-1]:
      raise storage.changed(self._path)
    group = bisect.bisect_right(self._file.starts, row) - 1
    row -= self._file.starts[group]
    number = bisect.bisect_right(self._ends[group], row)
    batch = _decoded.get((self._number, group, number))
    if batch is None:
      number, batch = self._decode(group, row, number)
    data = _buffer(batch, row - (self._ends[group][number - 1] if number else 0))
    if data is None:
      raise storage.changed(self._path)
    return data.to_pybytes()

  def _decode(self, group: int, row: int, wanted: int) -> tuple[int, Any]:
    """Returns the batch of a row group that holds a row, and its number."""
    number, stream = _streams.take((self._number, group)) or (0, None)
    if stream is None or number > wanted:
      number, stream = 0, self._file.batches(group, [self._file.leaf])
    ends = self._ends[group]
    while True:
      try:
        batch = _part(next(stream).column(self._file.column), 'bytes')
      except (_Damage, StopIteration) as error:
        raise storage.changed(self._path) from error
      if number == len(ends):
        ends.append((ends[-1] if ends else 0) + len(batch))
      _decoded.put((self._number, group, number), batch, batch.nbytes)
      if row < ends[number]:
        if self._file.starts[group] + ends[number] < self._file.starts[group + 1]:
          _streams.put((self._number, group), (number + 1, stream))
        return number, batch
      number += 1


class _Recent:
  """What was used last, up to a size in all."""

  def __init__(self, most: int):
    self._most, self._size, self._lock = most, 0, threading.RLock()
    self._found: collections.OrderedDict[tuple, tuple[Any, int]] = collections.OrderedDict()

  def get(self, key: tuple) -> Any | None:
    with self._lock:
      if key in self._found:
        self._found.move_to_end(key)
      return self._found.get(key, (None, 0))[0]

  def take(self, key: tuple) -> Any | None:
    """Returns a value that nobody else then gets."""
    with self._lock:
      value, size = self._found.pop(key, (None, 0))
      self._size -= size
      return value

  def put(self, key: tuple, value: Any, size: int = 1) -> None:
    with self._lock:
      self.take(key)
      self._found[key] = value, size
      self._size += size
      while self._size > self._most:
        self._size -= self._found.popitem(last=False)[1][1]


_decoded = _Recent(_CACHED)  # (reader, row group, batch) -> the batch's images
_streams = _Recent(_STREAMS)  # (reader, row group) -> (the batch that comes next, the batches)
_numbers = itertools.count()  # one a reader: a file that is opened again may be another


def _samples(
  file: _File, name: str, key: str | None, columns: list[str], skipped: list[dict[str, str]]
) -> Iterator[table.Sample]:
  leaves = (
    [file.leaf, *columns]
    if file.leaf == file.column
    else [file.leaf, f'{file.column}.path', *columns]
  )
  stem = os.path.splitext(name)[0]
  for group, (row, end) in enumerate(itertools.pairwise(file.starts)):
    try:
      for batch in file.batches(group, leaves):
        if row + batch.num_rows > end:
          raise _Damage('more rows than the footer says')
        for image, path_only, fields in _rows(batch, file.column, columns):
          shown = fields.get(key)
          shown = f'{stem}/{row:09d}' if shown is None or shown == '' else str(shown)
          if path_only:
            skipped.append({'key': shown, 'reason': 'image is not in the file'})
          else:
            members = {} if image is None else {file.ending: (row, image.size)}
            yield table.Sample(shown, members, functools.partial(_read, image), fields=fields)
          row += 1
      if row < end:
        raise _Damage('fewer rows than the footer says')
    except _Damage as damage:
      short = isinstance(damage.__cause__, MemoryError)
      skipped.append(
        {
          'key': f'{name}, row {row}',
          'reason': 'not enough memory for a page' if short else 'damaged row group',
        }
      )


def _rows(batch, column: str, columns: list[str]) -> Iterator[tuple[Any, bool, dict[str, Any]]]:
  """Yields of each row the image's bytes, or None; whether a path stands for them; the rest."""
  with _damage():
    images, paths = (
      _part(batch.column(column), name) for name in ('bytes', 'path')
    )  # no path is ever opened
    arrays = {name: batch.column(name) for name in columns}
    for i in range(batch.num_rows):
      image = _buffer(images, i)
      path_only = image is None and paths is not None and paths[i].is_valid
      yield image, path_only, {name: _python(array, i) for name, array in arrays.items()}


def _read(data, ending: str, most: int) -> bytes:
  return data.slice(0, min(most, data.size)).to_pybytes()


@contextlib.contextmanager
def _damage() -> Iterator[None]:
  """Raises _Damage for whatever pyarrow raises on damaged files; other errors pass."""
  errors = pa.ArrowException, OSError, ValueError, OverflowError, IndexError, KeyError
  try:
    yield
  except errors as error:
    if isinstance(error, InputError) or getattr(error, 'errno', None):
      raise
    raise _Damage(str(error)) from error


def _parquet(path: str):
  """Returns a pyarrow ParquetFile. A footer cannot ask for more items than the file has bytes."""
  local = '://' not in path
  size = os.path.getsize(path) if local else _MOST['string']
  with _damage():
    return pq.ParquetFile(
      path if local else storage.open_stream(path),
      pre_buffer=False,
      buffer_size=_BUFFER if local else _REMOTE_BUFFER,
      thrift_string_size_limit=min(_MOST['string'], max(size, 1)),
      thrift_container_size_limit=min(_MOST['container'], max(size, 1)),
    )


def _open(path: str, image_key: Sequence[str]) -> _File:
  """Opens a file. Raises _Damage, and InputError where no column can be the image."""
  parquet = _parquet(path)
  with _damage():
    column, leaf, ending = _image_column(parquet.schema_arrow, image_key, path)
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    counts = [group.num_rows for group in groups]
    if min(counts, default=0) < 0 or sum(counts) != parquet.metadata.num_rows:
      raise _Damage('the footer contradicts itself')
    # Not by the sizes of columns: on some damaged footers pyarrow ends the process when asked.
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
  """Returns the column of images, the path of its bytes in the file, and which of `names` it is."""
  fields = {field.name.lower(): field for field in schema}
  for name in filter(fields.__contains__, names):
    kind, column = _stored(fields[name].type), fields[name].name
    if _holds_bytes(kind):
      return column, column, name
    if (
      pa.types.is_struct(kind)
      and kind.get_field_index('bytes') >= 0
      and _holds_bytes(_stored(kind.field('bytes').type))
    ):
      return column, f'{column}.bytes', name
  have = ', '.join(f'{field.name} ({field.type})' for field in schema)
  raise InputError(
    f'{path} has no column of image bytes, or of {{bytes, path}}, among '
    f'{", ".join(names)}; it has {have[:500]}. Name it in image_key.'
  )


def _holds_bytes(kind) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _stored(kind):
  """Returns the type of the values, whether they are wrapped in an extension or a dictionary."""
  while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType):
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
  return kind


def _part(array, name: str):
  """Returns the field 'bytes' or 'path' of a batch of images, None where it has none; bytes alone
  are themselves.
  """
  if isinstance(array, pa.ExtensionArray):
    array = array.storage
  if not isinstance(array, pa.StructArray):
    return array if name == 'bytes' else None
  place = array.type.get_field_index(name)
  return None if place < 0 else _part(array.flatten()[place], 'bytes')  # null where the parent is


def _buffer(array, i: int):
  """Returns the bytes of one value without a copy, None for null."""
  value = array[i]
  if isinstance(value, pa.DictionaryScalar):
    value = value.value
  return value.as_buffer() if value.is_valid else None


def _python(array, i: int) -> Any:
  """Returns a value of a column as JSON could hold it, None where it has no Python value."""
  value = array[i]
  if isinstance(value, pa.DictionaryScalar):
    value = value.value
  if not value.is_valid:
    return None
  if isinstance(value, pa.StringScalar | pa.BinaryScalar):  # text may be no UTF-8
    return _as_text(value.as_buffer().to_pybytes())
  try:
    return json.loads(json.dumps(value.as_py(), default=_as_text))
  except (pa.ArrowException, ValueError, OverflowError):  # a time that Python does not know
    return None


def _as_text(value: Any) -> str:
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)
