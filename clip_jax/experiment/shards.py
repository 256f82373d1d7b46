"""The source files of a dataset as shards: what is listed before anything is read.

Pure in the block and the files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import os

from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core.types import Config
from clip_jax.data import folder, formats, labels, listing, sources, storage, vector_index
from clip_jax.experiment import blocks

_BLOCK = 1 << 22  # bytes of a source file that are hashed at once


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of a dataset that one index file describes: a tar, or up to 65,536 images of a
  folder.
  """

  number: int
  block: Config  # of the one source that it comes from (never a 'concat')
  prefix: str  # 'name/' of that source in a concat, else ''
  root: str  # the folder that relative paths start from
  files: tuple[storage.SourceFile, ...]
  classes: tuple[str, ...]  # in label order: the config's, or those that the source itself names
  labels: str = ''  # of a folder: a hash of what its images' labels depend on
  labels_by: str = ''  # and in words how they are known
  # Of vectors: the files that describe their rows.
  beside: Mapping[str, storage.SourceFile] = dataclasses.field(default_factory=dict)

  @property
  def format(self) -> str:
    """The format of its files: what is drawn here lies in tars."""
    return (
      'webdataset' if self.block.format in (blocks.GLYPHS, blocks.PLANTED) else self.block.format
    )

  @property
  def name(self) -> str:
    """What to call its file, wherever it lies on this machine; of a folder, keys are the files."""
    return printable(
      self.prefix + ('./' if formats.get(self.format).rooted else self.files[0].name)
    )

  def at(self, workdir: str) -> 'Shard':
    """Returns the shard with absolute paths: tars that are drawn here lie in the work directory."""
    if self.block.format not in (blocks.GLYPHS, blocks.PLANTED):
      return self
    here = tuple(
      dataclasses.replace(file, path=os.path.join(workdir, file.path)) for file in self.files
    )
    return dataclasses.replace(self, files=here)

  def location(self) -> dict:
    """Returns what the row table must know to read the samples again."""
    path = '' if formats.get(self.format).rooted else self.files[0].path
    images = (
      {'images': os.path.expanduser(self.block.images)} if self.format == blocks.VECTORS else {}
    )
    return {
      'format': self.format,
      'root': self.root,
      'path': path,
      'image_key': self.block.image_key,
      **images,
    }

  def stamps(self, check_content: bool) -> dict[str, str]:
    """Returns what the shard reads: name relative to its pattern, never a path of this machine ->
    stamp.

    A file counts by size and time, or with check_content by its sha256.
    """
    stamp = _sha256 if check_content else lambda file: file.stamp
    stamps = [f'{file.name} {stamp(file)}' for file in self.files]
    more = {f'labels of {self.prefix}images': self.labels} if self.labels else {}
    more |= {
      printable(f'{kind} of {self.prefix}{self.files[0].name}'): printable(
        f'{file.name} {stamp(file)}'
      )
      for kind, file in self.beside.items()
    }
    first = self.prefix + self.files[0].name
    if len(stamps) == 1:
      return {printable(f'source file {first}'): printable(stamps[0]), **more}
    digest = hashlib.sha256('\n'.join(stamps).encode('utf-8', 'surrogateescape')).hexdigest()
    return {printable(f'{len(stamps)} source files from {first}'): digest, **more}


def list_shards(block: Config, planted_tars: Sequence[str] = ()) -> list[Shard]:
  """Returns the shards of a dataset, in order. Raises InputError where a path matches nothing.

  planted_tars: the files of the dataset of planted copies. What is drawn here counts by its
  product, so that its tars are listed, relative to the work directory, whether they are there
  already or not.
  """
  shards: list[Shard] = []
  for prefix, part in blocks.flatten(block):
    drawn = {
      blocks.GLYPHS: [f'ingest/{blocks.GLYPHS}/{part.path or blocks.POOL}-00000.tar'],
      blocks.PLANTED: planted_tars,
    }
    form = 'webdataset' if part.format in drawn else part.format
    listed = (
      [storage.SourceFile(path, os.path.basename(path), 0, 0.0) for path in drawn[part.format]]
      if part.format in drawn
      else listing.list_files(part.format, os.path.expanduser(part.path))
    )
    root, known = listing.root(form, part.path), _labels(part)
    classes = tuple(part.classes) or (
      known.classes if known else _own_classes(part, form, listed[0])
    )
    beside = (
      vector_index.companions(listed, os.path.expanduser(part.metadata))
      if form == blocks.VECTORS
      else [{}] * len(listed)
    )
    size = formats.get(form).files_a_shard
    for start in range(0, len(listed), size):
      some = tuple(listed[start : start + size])
      by_labels = (_labels_hash(part, known, some), known.description) if known else ('', '')
      shards.append(
        Shard(len(shards), part, prefix, root, some, classes, *by_labels, beside[start])
      )
  return shards


def _labels(block: Config) -> labels.Labels | None:
  """Returns what gives the labels of a folder's images; None where a key of the samples, or
  nothing, does.
  """
  if block.format != 'folder' or block.label_key:
    return None
  return labels.labels(
    listing.root('folder', block.path), tuple(block.classes), os.path.expanduser(block.labels_file)
  )


def _labels_hash(block: Config, known: labels.Labels, part: tuple[storage.SourceFile, ...]) -> str:
  """Returns a hash of what the labels of these images depend on: a file's content, or their
  folders' labels.
  """
  if block.labels_file:
    return files.sha256(os.path.expanduser(block.labels_file))
  inside = folder.images_folder(listing.root('folder', block.path))

  def label(path: str) -> int | str | None:
    try:
      return known.of(path)
    except labels.NoLabel as reason:
      return str(reason)

  one_each = {folder.class_folder(file.name, inside): file.name for file in part}
  by_folder = {name: label(path) for name, path in one_each.items()}
  return hashlib.sha256(config_lib.canonical(by_folder).encode()).hexdigest()


def _own_classes(block: Config, form: str, first: storage.SourceFile) -> tuple[str, ...]:
  """Returns the class names that a source keeps beside its samples, () where it has none."""
  if formats.get(form).rooted or not block.label_key:
    return ()
  return sources.classes(
    form, block.path if formats.get(form).find else first.path, block.label_key
  )


@functools.cache
def _sha256(file: storage.SourceFile) -> str:
  digest, source = hashlib.sha256(), storage.open_file(file.path)
  for start in range(0, file.size, _BLOCK):
    digest.update(source.read(start, min(_BLOCK, file.size - start)))
  return digest.hexdigest()


def printable(name: str) -> str:
  """Returns a file's name, which may be any bytes, as text that can be written down."""
  return name.encode('utf-8', 'backslashreplace').decode()
