"""Random access to an indexed dataset: rows of its table -> images and captions.

In: the dataset's folder as table.assemble writes it, and the source files in their place.
"""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import functools
import mmap
import operator
import os
from typing import Any

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import filetree, formats, keyed_images, storage, table

_ROWS = 1 << 20  # numbers written as texts at a time
_OPEN_FILES = 128  # source files that one Source keeps open


class Source:
  """An indexed dataset with random access, as a Grain RandomAccessDataSource.

  Reads are thread-safe. A pickle holds only the name of the folder. The table and the captions are
  memory-mapped; at most _OPEN_FILES source files are open.
  """

  def __init__(self, directory: str):
    self._directory = os.fspath(directory)
    self._opened = functools.lru_cache(_OPEN_FILES)(self._open)

  def __reduce__(self):
    return Source, (self._directory,)

  def __len__(self) -> int:
    return len(self._table)

  def __repr__(self) -> str:
    return f'<source of {len(self):,} samples, index in {self._directory}>'

  @property
  def has_images(self) -> bool:
    """Whether rows have images; rows of vectors have them only if the dataset has `images`."""
    return all(
      formats.by_name(shard['format']).open or shard.get('images')
      for shard in self._files['shards']
    )

  def __getitem__(self, row: int) -> dict[str, Any]:
    """Returns dict(image: bytes of the image file, caption: str, label: int, -1 for none).

    Raises InputError for a row of vectors without an image.
    """
    return self.read_samples([row])[0]

  def read_samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Returns [self[row] for row in rows], faster: rows of one file are read together."""
    rows = [operator.index(row) for row in rows]
    places = self._places(rows)
    images = self._images(rows, places)
    return [
      {
        'image': images[k],
        'label': label,
        'caption': self._captions[offset : offset + length].decode(),
      }
      for k, (_, _, _, offset, length, label) in enumerate(places)
    ]

  def caption(self, row: int) -> str:
    """Returns the caption of a row without reading its image."""
    _, _, _, offset, length, _ = self._row(row)
    return self._captions[offset : offset + length].decode()

  def key(self, row: int) -> str:
    """Returns the key of a row; reads a part of its index file."""
    shard = self._row(row)[0]
    return table.read_key(self._directory, shard, operator.index(row) - int(self.starts[shard]))

  @property
  def labels(self) -> Array:  # [n] int32
    return np.ascontiguousarray(self._table['label'])

  @property
  def caption_lengths(self) -> Array:  # [n] int32, bytes of UTF-8
    return np.ascontiguousarray(self._table['caption_length'])

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    return self._starts

  @functools.cached_property
  def _starts(self) -> Array:
    return files.read_npy(os.path.join(self._directory, 'starts.npy'))

  @property
  def classes(self) -> tuple[str, ...]:
    """The class names in label order, () if none are known."""
    return tuple(self._files['classes'])

  def offsets(self, shard: int) -> Array:  # [n] int64
    """Returns the offsets of a shard's rows in its file; for vectors, their row numbers."""
    return self._table['offset'][self.starts[shard] : self.starts[shard + 1]]

  def column(self, name: str) -> Array:  # [n]
    """Returns a column of the index: numbers (missing: NaN) or str objects (missing: None)."""
    import pyarrow as pa

    kind = self._column_type(name)
    if kind != pa.string():
      return self._numbers(name, kind)
    parts = [pa.array([], kind), *self._column_parts(name, kind)]
    codes = pa.concat_arrays(parts).dictionary_encode()  # equal texts share one str
    words = np.array([*codes.dictionary.to_pylist(), None], object)
    return words[codes.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]

  def levels(self, name: str) -> tuple[Array, list[str]]:  # [n] int32
    """Returns each row's value of a column, as a number into the names of all values.

    -1: a missing value, or an empty text, which is then among the names, too. Names are in the
    order of their first rows. Memory: the numbers, and one shard.
    """
    import pyarrow as pa

    kind = self._column_type(name)
    parts = self._column_parts(name, kind)
    if kind != pa.string():  # as the column has them: with a missing value, 1 is written 1.0
      numbers = self._numbers(name, kind)
      parts = (
        pa.array(numbers[i : i + _ROWS], from_pandas=True) for i in range(0, len(self), _ROWS)
      )
    place: dict[str, int] = {}
    codes, end = np.zeros(len(self), np.int32), 0
    for part in parts:
      encoded = part.cast(pa.large_string()).fill_null('').dictionary_encode()
      words = encoded.dictionary.to_pylist()
      own = np.array([place.setdefault(word, len(place)) for word in words], np.int32)
      codes[end : end + len(part)] = own[encoded.indices.to_numpy()]
      end += len(part)
    if '' in place:
      codes[codes == place['']] = -1
    return codes, list(place)

  def _numbers(self, name: str, kind: Any) -> Array:  # [n]
    """Returns a column of numbers; integers become float64 if a row has no value."""
    values, end = np.zeros(len(self), kind.to_pandas_dtype()), 0
    for part in self._column_parts(name, kind):
      if part.null_count:
        values = values.astype(np.result_type(values, np.float64), copy=False)
      values[end : end + len(part)] = part.to_numpy(zero_copy_only=False)
      end += len(part)
    return values

  def _column_type(self, name: str) -> Any:
    """Returns the pyarrow type that holds the column of all shards."""
    import pyarrow as pa

    shards = range(len(self._files['shards']))
    kinds = {table.column_type(self._directory, shard, name) for shard in shards} - {None}
    if not kinds:
      raise InputError(
        f'{self._directory} has no column {name!r}. Add it to the `columns` of the dataset.'
      )
    kinds -= {pa.null()}  # a shard where all values are missing
    if len(kinds) != 1:
      kinds = {pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()}
    return kinds.pop()

  def _column_parts(self, name: str, kind: Any) -> Iterator[Any]:
    """Yields the column of each shard as an arrow array of a type; null where a shard lacks it."""
    import pyarrow as pa

    for shard in range(len(self._files['shards'])):
      part = table.read_columns(self._directory, shard, [name])
      if part.column_names:
        chunks = part[name].cast(kind).chunks
        yield pa.concat_arrays([pa.array([], kind), *chunks])
      else:
        yield pa.nulls(part.num_rows, kind)

  def same_samples(self, other: 'Source') -> Array:  # [n] bool
    """Returns which rows are also in `other`, as the same bytes of the same file."""
    other_places = collections.defaultdict(list)
    for shard in range(len(other.starts) - 1):
      path, places = other._sample_places(shard)
      other_places[path].append(places)
    mask = np.zeros(len(self), bool)
    for shard in range(len(self.starts) - 1):
      path, places = self._sample_places(shard)
      if path in other_places:
        rows = slice(self.starts[shard], self.starts[shard + 1])
        mask[rows] = np.isin(places, np.concatenate(other_places[path]))
    return mask

  def _sample_places(self, shard: int) -> tuple[str, Array]:
    """Returns the file (or root folder) of a shard, and the offsets (or paths) of its samples."""
    where = self._files['shards'][shard]
    if not where['path']:
      rows = range(int(self.starts[shard]), int(self.starts[shard + 1]))
      return where['root'], np.array(list(map(self._path, rows)), np.str_)
    path = where['path']
    return path if storage.is_remote(path) else os.path.realpath(path), self.offsets(shard)

  def _row(self, row: int) -> tuple[int, int, int, int, int, int]:
    return self._places([operator.index(row)])[0]

  def _places(self, rows: list[int]) -> list[tuple[int, int, int, int, int, int]]:
    """Returns the table entries of rows."""
    count = len(self._table)
    for row in rows:
      if not 0 <= row < count:
        raise IndexError(f'row {row} does not exist: {self._directory} has {count} rows')
    return self._table[rows].tolist()

  def _images(self, rows: Sequence[int], places: Sequence[Any]) -> dict[int, bytes]:
    """Returns position in `rows` -> image bytes.

    places: the table entry of each row. Images of one file are read in one call, and all remote
    images are fetched together.
    """
    images, remote = {}, {}  # remote: position in `rows` -> URL
    shards = collections.defaultdict(list)
    for k, place in enumerate(places):
      shards[place[0]].append(k)
    for shard, members in shards.items():
      where = self._files['shards'][shard]
      path, opener = where['path'], formats.by_name(where['format']).open
      if not opener:  # vectors
        images |= {k: self._keyed_image(rows[k], shard) for k in members}
      elif not path and storage.is_remote(where['root']):
        remote |= {k: filetree.join(where['root'], self._path(rows[k])) for k in members}
      elif not path:  # each image is a file
        for k in members:
          file = os.path.join(where['root'], self._path(rows[k]))
          with _input_errors(file):
            images |= _check_lengths(
              file, opener({**where, 'path': file}).read_many([places[k][1:3]]), [k], places
            )
      else:
        with _input_errors(path):
          reader = self._opened(shard)
          if isinstance(reader, storage.RemoteFile):
            remote |= dict.fromkeys(members, path)
          else:
            images |= _check_lengths(
              path, reader.read_many([places[k][1:3] for k in members]), members, places
            )
    parts = storage.read_ranges([(path, *places[k][1:3]) for k, path in remote.items()])
    for (k, path), data in zip(remote.items(), parts, strict=True):
      images |= _check_lengths(path, [data], [k], places)
    return images

  def _keyed_image(self, row: int, shard: int) -> bytes:
    """Returns the image of a row of vectors, looked up by the row's key."""
    where = self._files['shards'][shard]
    if not where.get('images'):
      raise InputError(
        f'{where["path"]} holds vectors and no images. Set `images` of the dataset to '
        'the path of the images.'
      )
    key = table.read_key(self._directory, shard, row - int(self.starts[shard]))
    with _input_errors(where['images']):
      return keyed_images.KeyedImages(where['images']).read(key)

  def _open(self, shard: int) -> formats.Reader:
    where = self._files['shards'][shard]
    opener = formats.by_name(where['format']).open
    assert opener is not None  # vectors have no file of images to open
    return opener(where)

  @functools.cached_property
  def _table(self) -> Array:  # [n] TABLE_DTYPE
    rows = files.read_npy(os.path.join(self._directory, 'table.npy'), mmap=True)
    return rows.view(np.ndarray)  # a plain view, because indexing an np.memmap is slow

  @functools.cached_property
  def _captions(self) -> mmap.mmap | bytes:
    return _memory_map(os.path.join(self._directory, 'captions.bin'))

  @functools.cached_property
  def _files(self) -> dict[str, Any]:
    return table.read_files(self._directory)

  @functools.cached_property
  def _paths(self) -> tuple[Array, mmap.mmap | bytes]:
    """Returns the end of each row's path in the text of all paths, and that text."""
    ends = files.read_npy(os.path.join(self._directory, 'path_ends.npy'), mmap=True)
    return ends.view(np.ndarray), _memory_map(os.path.join(self._directory, 'paths.bin'))

  def _path(self, row: int) -> str:
    """Returns the path of a row's image, relative to its root."""
    ends, text = self._paths
    return text[int(ends[row - 1]) if row else 0 : int(ends[row])].decode()


@contextlib.contextmanager
def _input_errors(path: str) -> Iterator[None]:
  """Turns an OSError from reading a source file into an InputError."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'{path} cannot be read any more ({error.strerror or error}). Restore it, or '
      'index again with --redo=ingest.'
    ) from error


def _check_lengths(
  path: str, images: Sequence[bytes], members: Sequence[int], places: Sequence[tuple]
) -> dict[int, bytes]:
  """Returns dict(zip(members, images)); raises InputError if an image has the wrong length.

  places: table entries with the expected lengths, indexed by `members`.
  """
  for k, data in zip(members, images, strict=True):
    _, offset, length, *_ = places[k]
    if len(data) != length:
      raise InputError(
        f'{path} ends at byte {offset + len(data)}, inside a sample: it is not the '
        'file that was indexed. Restore that file, or index again with --redo=ingest.'
      )
  return dict(zip(members, images))


def _memory_map(path: str) -> mmap.mmap | bytes:
  with open(files.local(path), 'rb') as f:
    if not os.fstat(f.fileno()).st_size:
      return b''  # an empty file cannot be mapped
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
