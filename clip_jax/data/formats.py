"""The registry of source formats: how to list samples of a file, and how to read an image.

To add a format, write one file like webdataset.py and add it to FORMATS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Protocol

from clip_jax.core.config import did_you_mean
from clip_jax.core.errors import ConfigError
from clip_jax.data import array_record, copies, folder, storage, table, tfds, webdataset


class Reader(Protocol):
  """An open source file; thread-safe, and closed when it is garbage-collected."""

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of images, given the (offset, length) of their rows in the table.

    For a format without meaningful byte offsets, `offset` is the row number in the file.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Format:
  """The properties of a format that sources.scan, listing.list_files and reader.Source use."""

  # (files of one shard, root, names of image_key in order, names of sample_key, names of other
  # needed columns) -> its samples, and {'key', 'reason'} of the skipped ones; this list is complete
  # when the samples are exhausted. The names of image_key are in lower case.
  # None: the format holds vectors, which vector_index.py indexes.
  samples: (
    Callable[
      [Sequence[storage.SourceFile], str, Sequence[str], Sequence[str], Sequence[str]],
      tuple[Iterable[table.Sample], list[dict[str, str]]],
    ]
    | None
  )
  # A shard's entry in files.json {'format', 'root', 'path', 'image_key', 'size' and 'version' of a
  # copied file} -> its reader. None: the format has no images.
  open: Callable[[Mapping[str, str]], Reader] | None
  patterns: tuple[str, ...]  # globs of its files in a folder
  one_pattern: bool = False  # only the first of these globs that matches a file counts
  # Path -> a folder and the names of its files below it, if globs cannot list them.
  find: Callable[[str], tuple[str, list[str]]] | None = None
  files_a_shard: int = 1  # 65,536 if a file is one sample; else a file is a shard
  rooted: bool = False  # images are files with paths below a root
  is_copied: bool = False  # remote files are copied to this machine first (copies.py)
  # (the dataset's path if `find` is given, else one of its files; label_key) -> class names stored
  # in the dataset. The classes of folders come from labels.py.
  classes: Callable[[str, str], tuple[str, ...]] = lambda path, label_key: ()


def by_name(name: str) -> Format:
  """Returns a format by its name; raises ConfigError for an unknown one."""
  if name not in FORMATS:
    raise ConfigError(f'format={name!r} is unknown.{did_you_mean(name, FORMATS)}')
  return FORMATS[name]


# Globs in a folder; the first that matches a file counts: the layouts of clip-retrieval and
# clip-ood, then DataComp's, with .npz files beside .parquet files of metadata.
_VECTOR_FILES = ('img_emb/*.npy', 'images/img_emb_*.npy', '*.npy', '*.npz', '*.parquet')


def _parquet():
  # Imports pyarrow: 0.3 s and 30 MB, which processes that load tars do not need.
  from clip_jax.data import parquet

  return parquet


FORMATS = {
  'webdataset': Format(
    lambda files, root, *names: webdataset.samples(files[0].path, files[0].name),
    lambda where: storage.open_file(where['path']),
    ('*.tar',),
  ),
  'parquet': Format(
    lambda files, root, *names: _parquet().samples(files[0], *names),
    lambda where: _parquet().Reader(where['path'], where['image_key']),
    ('*.parquet',),
    classes=lambda path, label_key: _parquet().classes(path, label_key),
  ),
  'folder': Format(
    lambda files, root, _image, _key, columns: folder.samples(root, files, columns),
    lambda where: storage.open_file(where['path']),
    (),
    find=folder.find,
    files_a_shard=65_536,
    rooted=True,
  ),
  'tfds': Format(
    lambda files, root, *names: tfds.samples(files[0], *names),
    lambda where: tfds.reader(copies.opened(where), where['image_key']),
    (),
    find=tfds.find,
    is_copied=True,
    classes=tfds.classes,
  ),
  'array_record': Format(
    lambda files, root, *names: array_record.samples(copies.copied(files[0]), *names),
    lambda where: array_record.reader(copies.opened(where), where['image_key']),
    ('*.array_record', '*.array_record-*', '*.arrayrecord'),
    is_copied=True,
  ),
  'embeddings': Format(None, None, _VECTOR_FILES, True),
}
