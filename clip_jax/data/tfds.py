"""Format 'tfds': a dataset that tensorflow-datasets has prepared, read without TensorFlow.

In: DIR/NAME/VERSION/SPLIT; the folder DIR/NAME/VERSION holds dataset_info.json. Out: the files of
the split, whose records are tf.train.Examples in ArrayRecord or parquet. tensorflow-datasets lists
the files and the class names. Records are read as in format 'array_record', because the package's
own data source holds a parquet split in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import json
import os
from typing import Any

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.data import array_record, copies, filetree, storage, table

_READABLE = ('array_record', 'parquet')  # file formats with random access
_INFO = 'dataset_info.json'
_MOST_BYTES = 1 << 26  # of a file of the description
_RECORDS = 'data'  # the parquet column in which TFDS stores records


def find(path: str) -> tuple[str, list[str]]:
  """Returns the folder of a dataset and the names of a split's files in it, in order.

  The path may omit the only split of a dataset.
  """
  folder, builder, split = _split(path)
  kind = builder.info.file_format.value if builder.info.file_format else 'none'
  if kind not in _READABLE:
    raise InputError(
      f'{path}: its files have format {kind}, which has no random access. '
      "Prepare it again with file_format='array_record', or convert it with "
      "tfds' convert_format script."
    )
  names = [os.path.basename(file) for file in builder.info.splits[split].filepaths]
  present = filetree.entries(folder) if storage.is_remote(folder) else os.listdir(folder)
  if missing := next((name for name in names if name not in present), None):
    raise InputError(
      f'{filetree.join(folder, missing)} is missing, but dataset_info.json names it. Restore it, '
      'or prepare the dataset again.'
    )
  if not names:
    raise InputError(f'{path}: the split {split!r} has no files. Choose another split.')
  return folder, names


def classes(path: str, label_key: str) -> tuple[str, ...]:
  """Returns the class names of a label feature in label order, () if it has none."""
  _, builder, _ = _split(path)
  feature = _flat(builder.info.features).get(label_key)
  return tuple(getattr(feature, 'names', None) or ())


def samples(
  file: storage.SourceFile,
  image_key: Sequence[str],
  sample_key: Sequence[str],
  columns: Sequence[str],
) -> tuple[Iterable[table.Sample], list[dict[str, str]]]:
  """Returns the samples of one file of a split, and the skipped entries.

  The names are names of features; 'a/b' is a nested feature. See array_record.samples.
  """
  builder = _builder(filetree.parent(file.path))
  images = _images(builder)
  names = [name for name in image_key if name in map(str.lower, images)]
  if not names:
    raise InputError(
      f'{file.path}: no Image feature is among {", ".join(image_key)}; it has '
      f'{", ".join(images) or "none"}. Set image_key to one of its Image features.'
    )
  skipped: list[dict[str, str]] = []
  try:
    values, count = _records(copies.local_copy(file))
  except InputError:
    return iter(()), [{'key': file.name, 'reason': 'file is damaged'}]
  if count != _expected(builder, file.path):
    skipped.append({'key': file.name, 'reason': 'not as many records as dataset_info.json says'})
  records = array_record.batches(values, count, file.size)
  examples = array_record.example_samples(records, file.name, names, sample_key, columns, skipped)
  return examples, skipped


def reader(path: str, image_key: str) -> array_record.Reader:
  """Opens one file of a split."""
  return array_record.Reader(path, image_key, _records(path)[0])


def _records(path: str):
  """Returns the function that reads records of a file, and the number of records."""
  if '.parquet' in os.path.basename(path):
    from clip_jax.data import parquet  # imported here because it needs pyarrow, as in formats.py

    rows = parquet.Reader(path, _RECORDS)
    return rows.values, len(rows)
  records = array_record.Records(path)
  return records.values, len(records)


def _split(path: str) -> tuple[str, Any, str]:
  """Returns the folder and the builder of a dataset, and the name of the path's split."""
  inside = filetree.is_file(filetree.join(path, _INFO))
  folder, split = (path, '') if inside else (filetree.parent(path), filetree.base_name(path))
  builder = _builder(folder)
  splits = list(builder.info.splits)
  if not split and len(splits) == 1:
    (split,) = splits
  if split not in splits:
    raise InputError(
      f'{path} names no split of the dataset, which has '
      f'{", ".join(splits) or "none"}. '
      f'Give {filetree.join(folder, splits[0] if splits else "SPLIT")}.'
    )
  return folder, builder, split


def _builder(folder: str):
  if not filetree.is_file(filetree.join(folder, _INFO)):
    raise InputError(
      f'{folder!r} holds no dataset_info.json, so it is not a prepared TFDS dataset. '
      'The path must be DIR/NAME/VERSION/SPLIT.'
    )
  import tensorflow_datasets as tfds  # takes seconds to import

  local = _local_description(folder)
  _check_features(os.path.join(local, 'features.json'))
  try:
    return tfds.builder_from_directory(local)
  except Exception as error:  # damaged descriptions raise a dozen different types
    raise InputError(
      f'{folder}: tensorflow-datasets cannot read its description '
      f'({type(error).__name__}: {error}). Prepare the dataset again.'
    ) from error


def _local_description(folder: str) -> str:
  """Returns a local folder with the description of a dataset: copies of a remote one's files."""
  if not storage.is_remote(folder):
    return folder
  names = sorted(name for name in filetree.entries(folder) if name.endswith(('.json', '.txt')))
  described = filetree.source_files(folder, names)
  stamp = hashlib.sha256(' '.join([folder, *(file.stamp for file in described)]).encode())
  local = os.path.join(copies.folder(), f'{stamp.hexdigest()[:16]}-tfds')
  for file in described:
    path = os.path.join(local, file.name)
    if not os.path.exists(path):
      files.write_bytes(path, filetree.read_bytes(file.path, _MOST_BYTES, 'too large for a text.'))
  return local


def _check_features(path: str) -> None:
  """Raises InputError for features outside TFDS, because it would import their modules."""
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
      f'{path} names {other[0]}, custom code of the dataset, which is not run. '
      'Prepare the dataset with the features of tensorflow-datasets only.'
    )


def _flat(features: Mapping[str, Any], above: str = '') -> dict[str, Any]:
  """Returns name in a record -> feature; a nested feature has the name 'a/b'."""
  flat = {}
  for name, feature in features.items():
    if hasattr(feature, 'items'):
      flat |= _flat(feature, f'{above}{name}/')
    else:
      flat[above + name] = feature
  return flat


def _images(builder) -> list[str]:
  import tensorflow_datasets as tfds  # as in _builder

  return [
    name
    for name, feature in _flat(builder.info.features).items()
    if isinstance(feature, tfds.features.Image)
  ]


def _expected(builder, path: str) -> int | None:
  """Returns the number of records of a file according to dataset_info.json."""
  lengths = {}
  for split in builder.info.splits.values():
    lengths |= dict(zip(split.filenames, split.shard_lengths, strict=True))
  return lengths.get(os.path.basename(path))
