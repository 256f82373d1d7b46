"""Lists the source files of a dataset as shards. Depends on its block and the files alone."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import os

from clip_jax.core import config as config_lib
from clip_jax.core.types import Config
from clip_jax.data import (
  copies,
  filetree,
  folder,
  formats,
  labels,
  listing,
  sources,
  storage,
  vector_index,
)
from clip_jax.experiment import blocks


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of a dataset in one index file: a source file, or up to 65,536 images in a folder."""

  number: int
  block: Config  # of its source (never a 'concat')
  prefix: str  # 'name/' of the source in a concat, else ''
  root: str  # the folder to which paths are relative
  files: tuple[storage.SourceFile, ...]
  classes: tuple[str, ...]  # in label order: from the config, else from the source
  labels: str = ''  # format folder: hash of everything on which the labels depend
  labels_by: str = ''  # format folder: where the labels come from, for the log
  # Format embeddings: the files of keys, captions and columns beside the vectors. Format folder: a
  # retrieval benchmark's file of captions.
  beside: Mapping[str, storage.SourceFile] = dataclasses.field(default_factory=dict)

  @property
  def format(self) -> str:
    """The format of its files; generated data are webdataset tars."""
    return (
      'webdataset' if self.block.format in (blocks.GLYPHS, blocks.PLANTED) else self.block.format
    )

  @property
  def name(self) -> str:
    """The file's name without the machine's path; './' for a folder, whose keys name the files."""
    return printable(
      self.prefix + ('./' if formats.by_name(self.format).rooted else self.files[0].name)
    )

  def with_absolute_paths(self, workdir: str) -> 'Shard':
    """Returns the shard with absolute paths: generated tars are in the work directory."""
    if self.block.format not in (blocks.GLYPHS, blocks.PLANTED):
      return self
    absolute = tuple(
      dataclasses.replace(file, path=os.path.join(workdir, file.path)) for file in self.files
    )
    return dataclasses.replace(self, files=absolute)

  def location(self) -> dict:
    """Returns the values that the row table needs to read the samples again.

    Generated tars are relative to the folder of the index, as another machine may read them.
    """
    path = '' if formats.by_name(self.format).rooted else self.files[0].path
    if self.block.format in (blocks.GLYPHS, blocks.PLANTED):
      path = os.path.relpath(path, f'ingest/{blocks.POOL}')
    images = (
      {'images': os.path.expanduser(self.block.images)} if self.format == blocks.VECTORS else {}
    )
    return {
      'format': self.format,
      'root': self.root,
      'path': path,
      'image_key': self.block.image_key,
      **images,
      **(copies.stored(self.files[0]) if formats.by_name(self.format).is_copied else {}),
    }

  def stamps(self, check_content: bool) -> dict[str, str]:
    """Returns source file -> stamp, for the fingerprint of the index shard.

    Names are relative to the pattern in the config, never paths of this machine. A stamp is size
    and modification time, or with check_content the sha256. Several files share one stamp.
    """
    if blocks.is_absent(self.block):
      return {printable(f'source files {self.prefix}{self.files[0].name}'): 'not found'}
    stamp = _sha256 if check_content else lambda file: file.stamp
    stamps = [f'{file.name} {stamp(file)}' for file in self.files]
    further = {f'labels of {self.prefix}images': self.labels} if self.labels else {}
    further |= {
      printable(f'{kind} of {self.prefix}{self.files[0].name}'): printable(
        f'{file.name} {stamp(file)}'
      )
      for kind, file in self.beside.items()
    }
    first = self.prefix + self.files[0].name
    if len(stamps) == 1:
      return {printable(f'source file {first}'): printable(stamps[0]), **further}
    digest = hashlib.sha256('\n'.join(stamps).encode('utf-8', 'surrogateescape')).hexdigest()
    return {printable(f'{len(stamps)} source files from {first}'): digest, **further}


def list_shards(block: Config, planted_tars: Sequence[str] = ()) -> list[Shard]:
  """Returns the shards of a dataset, in order. Raises InputError if a path matches no file.

  planted_tars: the tars of planted copies. Generated tars (demo, planted copies) are products: they
  are listed relative to the work directory, whether they exist or not. In a plan, a source whose
  files are not there is one shard of one file, which does not exist.
  """
  shards: list[Shard] = []
  for prefix, part in blocks.flatten(block):
    if blocks.is_absent(part):
      file = storage.SourceFile(part.path[0], os.path.basename(part.path[0]), 0, 0.0)
      shards.append(Shard(len(shards), part, prefix, '', (file,), blocks.given_classes(part)))
      continue
    generated = {
      blocks.GLYPHS: [f'ingest/{blocks.GLYPHS}/{part.path or blocks.POOL}-00000.tar'],
      blocks.PLANTED: planted_tars,
    }
    form = 'webdataset' if part.format in generated else part.format
    listed = (
      [storage.SourceFile(path, os.path.basename(path), 0, 0.0) for path in generated[part.format]]
      if part.format in generated
      else listing.list_files(part.format, os.path.expanduser(part.path))
    )
    root, folder_labels = listing.root(form, part.path), _labels(part)
    classes = blocks.given_classes(part) or (
      folder_labels.classes if folder_labels else _source_classes(part, form, listed[0])
    )
    beside = (
      vector_index.companions(listed, os.path.expanduser(part.metadata))
      if form == blocks.VECTORS
      else [_captions_file(part)] * len(listed)
    )
    size = formats.by_name(form).files_a_shard
    for start in range(0, len(listed), size):
      shard_files = tuple(listed[start : start + size])
      shards.append(
        Shard(
          len(shards),
          part,
          prefix,
          root,
          shard_files,
          classes,
          _labels_hash(part, folder_labels, shard_files) if folder_labels else '',
          folder_labels.description if folder_labels else '',
          beside[start],
        )
      )
  return shards


def _captions_file(block: Config) -> dict[str, storage.SourceFile]:
  """Returns the file of captions of a retrieval benchmark as {'captions': file}, {} without one."""
  path = os.path.expanduser(block.captions) if blocks.is_retrieval(block) else ''
  if not path:
    return {}
  return {'captions': filetree.source_file(path)}


def _labels(block: Config) -> labels.Labels | None:
  """Returns the labels of a folder's images; None for other formats, and if label_key is given."""
  if block.format != 'folder' or block.label_key:
    return None
  return labels.labels(
    listing.root('folder', block.path),
    blocks.given_classes(block),
    os.path.expanduser(block.labels_file),
    class_folders(block),
  )


def class_folders(block: Config) -> labels.ClassFolders | None:
  """Returns the class folders of a benchmark that has a class_set, else None."""
  found = blocks.class_set(block)
  if found is None:
    return None
  return labels.ClassFolders(found.folder_names, found.labels, found.leaves_out_folders)


def _labels_hash(
  block: Config, folder_labels: labels.Labels, images: tuple[storage.SourceFile, ...]
) -> str:
  """Returns the sha256 of the labels file, or else of the labels of the images' folders."""
  if block.labels_file:
    return filetree.sha256(filetree.source_file(os.path.expanduser(block.labels_file)))
  inside = folder.images_folder(listing.root('folder', block.path))

  def label(path: str) -> int | str | None:
    try:
      return folder_labels.label_of(path)
    except labels.NoLabel as reason:
      return str(reason)

  one_image = {folder.class_folder(file.name, inside): file.name for file in images}
  by_folder = {name: label(path) for name, path in one_image.items()}
  return hashlib.sha256(config_lib.canonical(by_folder).encode()).hexdigest()


def _source_classes(block: Config, form: str, first: storage.SourceFile) -> tuple[str, ...]:
  """Returns the class names that the source files store, () if there are none."""
  if formats.by_name(form).rooted or not block.label_key:
    return ()
  return sources.classes(
    form, block.path if formats.by_name(form).find else first.path, block.label_key
  )


_sha256 = functools.cache(filetree.sha256)


def printable(name: str) -> str:
  """Returns a file name as valid UTF-8 text; other bytes become backslash escapes."""
  return name.encode('utf-8', 'backslashreplace').decode()
