"""The source formats: how the samples of a file are found, and how an image is read again.

To add a format, write one file like webdataset.py and name it in FORMATS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Protocol

from clip_jax.core.config import nearest
from clip_jax.core.errors import ConfigError
from clip_jax.data import array_record, folder, storage, table, tfds, webdataset


class Reader(Protocol):
  """An open source file. Threads may read at once; closed when nobody holds it any more."""

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of images, given the `offset` and the `length` of their rows in the table.

    Where a file has no byte offsets that mean something, `offset` is the number of its row.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Format:
  """What sources.scan, listing.list_files and reader.Source must know of a format."""

  # (files of one shard, root, image_key's names in order, sample_key's, names of what else will be
  # asked for) -> its samples, and {'key', 'reason'} of what is no sample, which is complete when
  # the samples are exhausted. Names of images are in lower case.
  # None: a file is vectors, and vector_index.py finds its rows.
  samples: (
    Callable[
      [Sequence[storage.SourceFile], str, Sequence[str], Sequence[str], Sequence[str]],
      tuple[Iterable[table.Sample], list[dict[str, str]]],
    ]
    | None
  )
  # Of one shard, as it stands in files.json: {'format', 'root', 'path', 'image_key'}. None: it has
  # no images of its own.
  open: Callable[[Mapping[str, str]], Reader] | None
  patterns: tuple[str, ...]  # globs of its files in a folder
  one_pattern: bool = False  # of these globs only the first that finds a file counts
  find: Callable[[str], list[str]] | None = None  # path -> its files, where globs do not say them
  files_a_shard: int = 1  # 65,536 where a file is one sample; else a file is a shard
  rooted: bool = False  # images are named by paths below a root
  remote: bool = False  # files on gs://, s3:// and the like are read where they are
  # (its path where `find` is given, else one of its files; label_key) -> the class names it tells;
  # a folder's are told by labels.py.
  classes: Callable[[str, str], tuple[str, ...]] = lambda path, label_key: ()


def get(name: str) -> Format:
  """Returns a format by its name; raises ConfigError for an unknown one."""
  if name not in FORMATS:
    raise ConfigError(f'format={name!r} is unknown.{nearest(name, FORMATS)}')
  return FORMATS[name]


# Globs of what is looked for in a folder; the first that finds a file counts: clip-retrieval's and
# clip-ood's layout, then DataComp's, whose .npz lie beside .parquet files of metadata.
_VECTOR_FILES = ('img_emb/*.npy', 'images/img_emb_*.npy', '*.npy', '*.npz', '*.parquet')


def _parquet():
  from clip_jax.data import (
    parquet,  # with pyarrow: 0.3 s and 30 MB that processes which load tars do not need
  )

  return parquet


FORMATS = {
  'webdataset': Format(
    lambda files, root, *names: webdataset.samples(files[0].path, files[0].name),
    lambda where: storage.open_file(where['path']),
    ('*.tar',),
    remote=True,
  ),
  'parquet': Format(
    lambda files, root, *names: _parquet().samples(files[0], *names),
    lambda where: _parquet().Reader(where['path'], where['image_key']),
    ('*.parquet',),
    remote=True,
    classes=lambda path, label_key: _parquet().classes(path, label_key),
  ),
  'folder': Format(
    lambda files, root, *names: folder.samples(root, [file.name for file in files]),
    lambda where: storage.open_file(where['path']),
    (),
    find=folder.find,
    files_a_shard=65_536,
    rooted=True,
  ),
  'tfds': Format(
    lambda files, root, *names: tfds.samples(files[0], *names),
    lambda where: tfds.reader(where['path'], where['image_key']),
    (),
    find=tfds.find,
    classes=tfds.classes,
  ),
  'array_record': Format(
    lambda files, root, *names: array_record.samples(files[0], *names),
    lambda where: array_record.reader(where['path'], where['image_key']),
    ('*.array_record', '*.array_record-*', '*.arrayrecord'),
  ),
  'embeddings': Format(None, None, _VECTOR_FILES, True, remote=True),
}
