"""Format 'array_record': ArrayRecord files whose records are tf.train.Example, as TFDS writes them.

In: an .array_record. Out: its samples, with their record numbers; a random-access reader of
records; and `example`, which builds a record. TensorFlow is not needed: an Example is a small
protocol buffer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import row_rules, storage, table

OPTIONS = 'group_size:1'  # of a writer; larger groups are decoded as a whole, slow for random reads
_BATCH = 4 << 20  # approximate bytes of records read at once
_MOST_RECORDS = 256


def example(features: Mapping[str, bytes | str | int | float]) -> bytes:
  """Returns a record: a serialized tf.train.Example. Equal features give equal bytes."""
  message: Any = _example_type()()
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
  """Returns the samples of a file in order, and the skipped entries.

  image_key: names of the image feature; the first one in a record counts. sample_key: names of the
  key feature; without it, a key is the file's name and the record number. columns: other features
  to read. A record that is damaged, or no tf.train.Example, is skipped.
  """
  skipped: list[dict[str, str]] = []
  try:
    records = Records(file.path)
  except InputError:
    return iter(()), [{'key': file.name, 'reason': 'not an ArrayRecord file'}]
  if not len(records):
    skipped.append({'key': file.name, 'reason': 'no samples'})
  records_read = batches(records.values, len(records), file.size)
  return example_samples(records_read, file.name, image_key, sample_key, columns, skipped), skipped


def reader(path: str, image_key: str) -> 'Reader':
  """Opens a file for random access to its images."""
  return Reader(path, image_key, Records(path).values)


class Records:
  """Random access to the records of a file; thread-safe."""

  def __init__(self, path: str):
    assert not storage.is_remote(path), path  # such a reader may never return
    from array_record.python import array_record_module

    self._path, size = path, os.path.getsize(path)  # fails for a missing file; the reader does not
    try:
      self._reader = array_record_module.ArrayRecordReader(
        path, options='readahead_buffer_size:0,max_parallelism:0'
      )
      self._count = self._reader.num_records()
    except (RuntimeError, ValueError) as error:
      raise storage.changed_file_error(self._path) from error
    if not self._reader.ok() or self._count > size or not self._reader.writer_options_string():
      raise storage.changed_file_error(self._path)

  def __len__(self) -> int:
    return self._count

  def values(self, rows: Sequence[int]) -> list[bytes]:
    if rows and not 0 <= min(rows) <= max(rows) < self._count:
      raise storage.changed_file_error(self._path)
    try:
      return self._reader.read(list(rows))
    except (RuntimeError, ValueError) as error:
      raise storage.changed_file_error(self._path) from error


class Reader:
  """Random access to the images in records that are tf.train.Examples; thread-safe."""

  def __init__(self, path: str, image_key: str, values: Callable[[Sequence[int]], list[bytes]]):
    self._path, self._values = path, values
    self._names = row_rules.image_names(image_key)

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the images of [(row, length)]."""
    images = []
    for record, (row, length) in zip(self._values([row for row, _ in ranges]), ranges, strict=True):
      image = _image(_parsed(record) or {}, self._names)
      if image is None or len(image[1]) != length:
        raise InputError(
          f'{self._path} is not the file that was indexed: record {row} differs. '
          'Restore the indexed file, or index again with --redo=ingest.'
        )
      images.append(image[1])
    return images


def batches(
  values: Callable[[Sequence[int]], list[bytes]], count: int, size: int
) -> Iterator[tuple[int, bytes | None]]:
  """Yields (number, record) for every record of a file; a damaged record is None.

  size: of the file in bytes; it determines how many records are read at once.
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
  """Yields the samples of (number, record) pairs; appends unusable records to `skipped`."""
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
      column: _value(features[column], storage.decode_text)
      for column in columns
      if column in features and not (image and column == image[0])
    }
    keys = (_value(features[key]) for key in sample_key if key in features)
    key = next((key for key in keys if key not in (None, '')), f'{stem}/{row:09d}')
    members = {image[0].lower(): (row, len(image[1]))} if image else {}
    yield table.Sample(str(key), members, functools.partial(_read, image), fields=fields)


def _read(image: tuple[str, bytes] | None, ending: str, most: int) -> bytes:
  assert image is not None  # a sample without an image has no members to read
  return image[1][:most]


def _image(features: Mapping[str, Any], names: Sequence[str]) -> tuple[str, bytes] | None:
  """Returns (name, bytes) of the first feature among the lower-case `names` that holds one image."""
  # Sorted, so that among names that differ in case the lower-case one wins.
  actual = {name.lower(): name for name in sorted(features)}
  for name in filter(actual.__contains__, names):
    values = features[actual[name]].bytes_list.value
    if len(values) == 1:
      return actual[name], values[0]
  return None


def _utf8(data: bytes) -> str:
  return data.decode('utf-8', 'replace')


def _value(feature: Any, decode: Callable[[bytes], str] = _utf8) -> Any:
  """Returns the value of a feature, text or number; a list of several values, None for none."""
  kind = feature.WhichOneof('kind')
  values = list(getattr(feature, kind).value) if kind else []
  if kind == 'bytes_list':
    values = [decode(value) for value in values]
  return values[0] if len(values) == 1 else values or None


def _parsed(record: bytes) -> Mapping[str, Any] | None:
  """Returns name -> feature of a tf.train.Example, None if the record is none."""
  from google.protobuf.message import DecodeError

  try:
    message: Any = _example_type().FromString(record)
    return message.features.feature
  except DecodeError:
    return None


# The published fields of tf.train.Example, as a FileDescriptorProto in text format.
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
  # Imported here because only this format needs protobuf.
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

  pool = descriptor_pool.DescriptorPool()  # separate: the default may have tensorflow.Example
  pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('tensorflow.Example'))
