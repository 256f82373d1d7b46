"""Format 'array_record': ArrayRecord files whose records are tf.train.Example, as TFDS writes them.

In: an .array_record. Out: its samples, each a record number; a reader of records; and `example`,
which makes such a record. TensorFlow is not needed: an Example is a small protocol buffer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import storage, table

OPTIONS = 'group_size:1'  # of a writer: records in groups are decoded together, slow at random
_BATCH = 4 << 20  # bytes of records read at once, about
_MOST_RECORDS = 256


def example(features: Mapping[str, bytes | str | int | float]) -> bytes:
  """Returns a record: a serialized tf.train.Example. Equal features give equal bytes."""
  message = _example_type()()
  for name, value in features.items():
    feature = message.features.feature[name]
    kind = (
      'bytes' if isinstance(value, bytes | str) else 'int64' if isinstance(value, int) else 'float'
    )
    getattr(feature, f'{kind}_list').value.append(
      value.encode() if isinstance(value, str) else value
    )
  return message.SerializeToString(deterministic=True)


def samples(
  file: storage.SourceFile,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
) -> tuple[Iterable[table.Sample], list[dict[str, str]]]:
  """Returns the samples of a file in order, and what is listed as skipped.

  image_key: names of the image's feature, the first that a record has counts; sample_key: of the
  feature with its key, else a key is the file's name and the record; columns: what else is read. A
  record that is damaged, or no tf.train.Example, is listed.
  """
  skipped: list[dict[str, str]] = []
  try:
    records = Records(file.path)
  except InputError:
    return iter(()), [{'key': file.name, 'reason': 'not an ArrayRecord file'}]
  if not len(records):
    skipped.append({'key': file.name, 'reason': 'no samples'})
  found = batches(records.values, len(records), file.size)
  return example_samples(found, file.name, image_key, sample_key, columns, skipped), skipped


def reader(path: str, image_key: str) -> 'Reader':
  """Opens a file for reading images at random."""
  return Reader(path, image_key, Records(path).values)


class Records:
  """The records of a file, read at random; any number of threads may."""

  def __init__(self, path: str):
    if '://' in path:
      raise InputError(
        f'{path}: ArrayRecord files are read on this machine only. Copy them here, '
        'or mount the bucket.'
      )
    from array_record.python import array_record_module

    self._path, size = path, os.path.getsize(path)  # the reader takes a missing file for empty
    try:
      self._reader = array_record_module.ArrayRecordReader(
        path, options='readahead_buffer_size:0,max_parallelism:0'
      )
      self._count = self._reader.num_records()
    except (RuntimeError, ValueError) as error:
      raise storage.changed(self._path) from error
    if not self._reader.ok() or self._count > size or not self._reader.writer_options_string():
      raise storage.changed(self._path)

  def __len__(self) -> int:
    return self._count

  def values(self, rows: Sequence[int]) -> list[bytes]:
    if rows and not 0 <= min(rows) <= max(rows) < self._count:
      raise storage.changed(self._path)
    try:
      return self._reader.read(list(rows))
    except (RuntimeError, ValueError) as error:
      raise storage.changed(self._path) from error


class Reader:
  """Reads the images out of records that are tf.train.Example; any number of threads may."""

  def __init__(self, path: str, image_key: str, values: Callable[[Sequence[int]], list[bytes]]):
    self._path, self._values = path, values
    self._names = [name.strip() for name in image_key.lower().split(';')]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the images of [(row, length)]."""
    images = []
    for record, (row, length) in zip(self._values([row for row, _ in ranges]), ranges, strict=True):
      image = _image(_parsed(record) or {}, self._names)
      if image is None or len(image[1]) != length:
        raise InputError(
          f'{self._path} is not the file that was indexed: record {row} is another. '
          'Put that back, or index again with --redo=ingest.'
        )
      images.append(image[1])
    return images


def batches(
  values: Callable[[Sequence[int]], list[bytes]], count: int, size: int
) -> Iterator[tuple[int, bytes | None]]:
  """Yields every record of a file with its number; None for one that is damaged.

  size: of the file, bytes, which says how many records to read at once.
  """
  step = min(_MOST_RECORDS, max(1, _BATCH * count // max(size, 1)))
  for start in range(0, count, step):
    rows = range(start, min(count, start + step))
    try:
      yield from zip(rows, values(rows), strict=True)
    except InputError:
      for row in rows:
        try:
          yield row, values([row])[0]
        except InputError:
          yield row, None


def example_samples(
  records: Iterable[tuple[int, bytes | None]],
  name: str,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
  skipped: list[dict[str, str]],
) -> Iterator[table.Sample]:
  """Yields the samples of records, given with their numbers; adds to `skipped` what is none."""
  stem = re.sub(r'\.(array_?record|parquet)\b', '', name)
  for row, record in records:
    features = None if record is None else _parsed(record)
    if not features:
      skipped.append(
        {
          'key': f'{stem}/{row:09d}',
          'reason': 'damaged record' if record is None else 'not a tf.train.Example',
        }
      )
      continue
    image = _image(features, image_key)
    fields = {
      column: _value(features[column])
      for column in columns
      if column in features and not (image and column == image[0])
    }
    keys = (_value(features[key]) for key in sample_key if key in features)
    key = next((key for key in keys if key not in (None, '')), f'{stem}/{row:09d}')
    members = {image[0].lower(): (row, len(image[1]))} if image else {}
    yield table.Sample(str(key), members, functools.partial(_read, image), fields=fields)


def _read(image: tuple[str, bytes], ending: str, most: int) -> bytes:
  return image[1][:most]


def _image(features: Mapping[str, Any], names: Sequence[str]) -> tuple[str, bytes] | None:
  """Returns the first feature among `names`, in lower case, that is one image, and its bytes."""
  there = {
    name.lower(): name for name in sorted(features)
  }  # the name in lower case counts before others
  for name in filter(there.__contains__, names):
    values = features[there[name]].bytes_list.value
    if len(values) == 1:
      return there[name], values[0]
  return None


def _value(feature: Any) -> Any:
  """Returns a text or number; a list where a feature holds several, None where it holds none."""
  kind = feature.WhichOneof('kind')
  values = list(getattr(feature, kind).value) if kind else []
  if kind == 'bytes_list':
    values = [value.decode('utf-8', 'replace') for value in values]
  return values[0] if len(values) == 1 else values or None


def _parsed(record: bytes) -> Mapping[str, Any] | None:
  """Returns the features of a tf.train.Example by their names, None where it is none."""
  from google.protobuf.message import DecodeError

  try:
    return _example_type().FromString(record).features.feature
  except DecodeError:
    return None


# tf.train.Example by its published fields, as protocol buffers describe a file of messages.
_EXAMPLE = """
name: 'clip_jax/example.proto'  package: 'tensorflow'  syntax: 'proto3'
message_type { name: 'BytesList'  field { name: 'value'  number: 1  label: LABEL_REPEATED  type: TYPE_BYTES } }
message_type { name: 'FloatList'  field { name: 'value'  number: 1  label: LABEL_REPEATED  type: TYPE_FLOAT } }
message_type { name: 'Int64List'  field { name: 'value'  number: 1  label: LABEL_REPEATED  type: TYPE_INT64 } }
message_type {
  name: 'Feature'
  oneof_decl { name: 'kind' }
  field { name: 'bytes_list'  number: 1  label: LABEL_OPTIONAL  type: TYPE_MESSAGE  type_name: '.tensorflow.BytesList'
          oneof_index: 0 }
  field { name: 'float_list'  number: 2  label: LABEL_OPTIONAL  type: TYPE_MESSAGE  type_name: '.tensorflow.FloatList'
          oneof_index: 0 }
  field { name: 'int64_list'  number: 3  label: LABEL_OPTIONAL  type: TYPE_MESSAGE  type_name: '.tensorflow.Int64List'
          oneof_index: 0 }
}
message_type {
  name: 'Features'
  field { name: 'feature'  number: 1  label: LABEL_REPEATED  type: TYPE_MESSAGE
          type_name: '.tensorflow.Features.FeatureEntry' }
  nested_type {
    name: 'FeatureEntry'
    options { map_entry: true }
    field { name: 'key'  number: 1  label: LABEL_OPTIONAL  type: TYPE_STRING }
    field { name: 'value'  number: 2  label: LABEL_OPTIONAL  type: TYPE_MESSAGE  type_name: '.tensorflow.Feature' }
  }
}
message_type {
  name: 'Example'
  field { name: 'features'  number: 1  label: LABEL_OPTIONAL  type: TYPE_MESSAGE  type_name: '.tensorflow.Features' }
}
"""


@functools.cache
def _example_type():
  """Returns the class of tf.train.Example messages."""
  from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
  )  # only this format's

  pool = descriptor_pool.DescriptorPool()  # its own: others may have defined tensorflow.Example
  pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('tensorflow.Example'))
