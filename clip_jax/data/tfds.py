"""Format 'tfds': a dataset that tensorflow-datasets has prepared, read without TensorFlow.

In: DIR/NAME/VERSION/SPLIT, of which the last part is a split and the folder before it holds
dataset_info.json. Out: the files of the split, whose records are tf.train.Example in ArrayRecord or
parquet. What the files are, and the class names, is asked of tensorflow-datasets; the records are
read as those of format 'array_record', since its own data source holds a parquet split in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import os
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import array_record, storage, table

_READABLE = ('array_record', 'parquet')  # of the file formats, those that are read at random
_RECORDS = 'data'  # the parquet column in which TFDS keeps records


def find(path: str) -> list[str]:
  """Returns the files of a split in order: path is DIR/NAME/VERSION/SPLIT, or of the only split."""
  builder, split = _split(path)
  kind = builder.info.file_format.value if builder.info.file_format else 'none'
  if kind not in _READABLE:
    raise InputError(
      f'{path}: its files are of format {kind}, which cannot be read at random. '
      "Prepare it again with file_format='array_record', or convert it with "
      "tfds' convert_format script."
    )
  found = [os.fspath(file) for file in builder.info.splits[split].filepaths]
  for file in found:
    if not os.path.isfile(file):
      raise InputError(
        f'{file} is missing, which dataset_info.json names. Put it back, or prepare '
        'the dataset again.'
      )
  if not found:
    raise InputError(f'{path}: the split {split!r} has no files. Choose another split.')
  return found


def classes(path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names of a label in label order, () where the dataset knows none."""
  builder, _ = _split(path)
  feature = _flat(builder.info.features).get(label_key)
  return tuple(getattr(feature, 'names', None) or ())


def samples(
  file: storage.SourceFile,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
) -> tuple[Iterable[table.Sample], list[dict[str, str]]]:
  """Returns the samples of one file of a split, and what is listed as skipped.

  The names are features: 'a/b' of a feature in another. See array_record.samples.
  """
  builder = _builder(os.path.dirname(file.path))
  images = _images(builder)
  names = [name for name in image_key if name in map(str.lower, images)]
  if not names:
    raise InputError(
      f'{file.path}: no Image feature is among {", ".join(image_key)}; it has '
      f'{", ".join(images) or "none"}. Name it in image_key.'
    )
  skipped: list[dict[str, str]] = []
  try:
    values, count = _records(file.path)
  except InputError:
    return iter(()), [{'key': file.name, 'reason': 'file is damaged'}]
  if count != _expected(builder, file.path):
    skipped.append({'key': file.name, 'reason': 'not as many records as dataset_info.json says'})
  records = array_record.batches(values, count, file.size)
  found = array_record.example_samples(records, file.name, names, sample_key, columns, skipped)
  return found, skipped


def reader(path: str, image_key: str) -> array_record.Reader:
  """Opens one file of a split."""
  return array_record.Reader(path, image_key, _records(path)[0])


def _records(path: str):
  """Returns the function that reads records of a file, and their number."""
  if '.parquet' in os.path.basename(path):
    from clip_jax.data import parquet  # as in formats.py: with pyarrow

    rows = parquet.Reader(path, _RECORDS)
    return rows.values, len(rows)
  records = array_record.Records(path)
  return records.values, len(records)


def _split(path: str) -> tuple[Any, str]:
  """Returns the builder of a dataset, and which of its splits a path means."""
  if '://' in path:
    raise InputError(
      f'{path}: TFDS datasets are read on this machine only. Copy it here, or mount the bucket.'
    )
  inside = os.path.exists(os.path.join(path, 'dataset_info.json'))
  folder, split = (path, '') if inside else os.path.split(path.rstrip(os.sep))
  builder = _builder(folder)
  splits = list(builder.info.splits)
  if not split and len(splits) == 1:
    (split,) = splits
  if split not in splits:
    raise InputError(
      f'{path} names no split of the dataset, which has '
      f'{", ".join(splits) or "none"}. '
      f'Give {os.path.join(folder, splits[0] if splits else "SPLIT")}.'
    )
  return builder, split


def _builder(folder: str):
  if not os.path.isfile(os.path.join(folder, 'dataset_info.json')):
    raise InputError(
      f'{folder!r} holds no dataset_info.json, so it is no prepared TFDS dataset. '
      'The path must be DIR/NAME/VERSION/SPLIT.'
    )
  import tensorflow_datasets as tfds  # takes seconds

  _check_features(os.path.join(folder, 'features.json'))
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # damaged descriptions raise a dozen different types
    raise InputError(
      f'{folder}: tensorflow-datasets cannot read its description '
      f'({type(error).__name__}: {error}). Prepare the dataset again.'
    ) from error


def _check_features(path: str) -> None:
  """Raises InputError for features that are not TFDS' own: it would import the module they name."""
  named = []
  try:
    with open(path, encoding='utf-8') as f:
      json.load(
        f,
        object_hook=lambda part: named.extend(
          part[key] for key in ('pythonClassName', 'type') if isinstance(part.get(key), str)
        ),
      )
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read ({error}). Prepare the dataset again.') from error
  if other := [name for name in named if not name.startswith('tensorflow_datasets.')]:
    raise InputError(
      f'{path} names {other[0]}, which is its own code, and is not run. '
      'Prepare the dataset with the features of tensorflow-datasets.'
    )


def _flat(features: Mapping[str, Any], above: str = '') -> dict[str, Any]:
  """Returns the features by their names in a record: 'a/b' for one that lies in another."""
  found = {}
  for name, feature in features.items():
    if hasattr(feature, 'items'):
      found |= _flat(feature, f'{above}{name}/')
    else:
      found[above + name] = feature
  return found


def _images(builder) -> list[str]:
  import tensorflow_datasets as tfds  # as in _builder

  return [
    name
    for name, feature in _flat(builder.info.features).items()
    if isinstance(feature, tfds.features.Image)
  ]


def _expected(builder, path: str) -> int | None:
  """Returns how many records dataset_info.json says that a file holds."""
  lengths = {}
  for split in builder.info.splits.values():
    lengths |= dict(zip(split.filenames, split.shard_lengths, strict=True))
  return lengths.get(os.path.basename(path))
