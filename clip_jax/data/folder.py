"""Format 'folder': every image file below a folder is a sample; its class is its first folder.

In: <root>/<class>/.../<name>.jpg, and beside it, if they are there, <name>.txt, .json and .cls.
Out: samples whose image is a whole file, named by its path relative to the root. What class each
has is said by labels.py.
"""

from collections.abc import Iterator, Sequence
import functools
import os
import re

from clip_jax.core.errors import InputError
from clip_jax.data import storage, table

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm')  # endings
_BESIDE = ('txt', 'json', 'cls')
_MAPPINGS = ('folder_to_objectnet_label.json', 'objectnet_to_imagenet_1k.json')  # ObjectNet's


def paths(root: str, inside: str = '') -> Iterator[str]:
  """Yields the path, relative to root, of every image file below root/inside, in no order.

  Links are followed, but not to a folder that they lie in. Hidden files and folders do not count.
  """
  todo = [(inside, (os.path.realpath(os.path.join(root, inside)),))]
  while todo:
    here, above = todo.pop()
    for entry in _entries(above[-1]):
      if entry.name.startswith('.'):
        continue
      path = os.path.join(here, entry.name)
      if _is_folder(entry):
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        if real not in above:
          todo.append((path, (*above, real)))
      elif ending(entry.name) in IMAGES and _is_file(entry):
        yield path


def find(root: str) -> list[str]:
  """Returns the absolute path of every image file below a folder, in natural order."""
  if not os.path.isdir(root):
    raise InputError(f'{root!r} is no folder. Correct the path of the dataset.')
  found = sorted(paths(root), key=storage.natural)
  if not found:
    raise InputError(
      f'{root!r} holds no file that ends in {", ".join(IMAGES)}. Correct the path of the dataset.'
    )
  return [os.path.join(root, name) for name in found]


def samples(root: str, names: Sequence[str]) -> tuple[list[table.Sample], list[dict[str, str]]]:
  """Returns the samples of image files, given relative to root, and what is listed as skipped."""
  found, skipped = [], []
  beside = functools.lru_cache(64)(lambda folder: set(os.listdir(os.path.join(root, folder))))
  inside = images_folder(root)
  for name in names:
    if not is_text(name):
      skipped.append(
        {'key': os.fsencode(name).decode(errors='backslashreplace'), 'reason': 'name is not UTF-8'}
      )
      continue
    try:
      found.append(_sample(root, name, beside(os.path.dirname(name)), inside))
    except OSError:
      skipped.append({'key': name, 'reason': 'file cannot be read'})
  return found, skipped


def class_folders(root: str) -> tuple[str, ...]:
  """Returns the folders below the root that hold an image, sorted by their names."""
  inside = images_folder(root)
  folders = sorted(
    entry.name
    for entry in _entries(os.path.join(root, inside))
    if _is_folder(entry) and is_text(entry.name) and not entry.name.startswith('.')
  )
  return tuple(name for name in folders if any(paths(root, os.path.join(inside, name))))


def class_folder(path: str, inside: str = '') -> str:
  """Returns the first folder of an image's path, '' for one in the root itself.

  inside: what `images_folder` gives; a path that does not begin with it has no class folder.
  """
  if not path.startswith(inside):
    return ''
  first, separator, _ = path[len(inside) :].partition(os.sep)
  return first if separator else ''


def images_folder(root: str) -> str:
  """Returns 'images/' where the root is ObjectNet's, whose class folders lie there, else ''."""
  return os.path.join('images', '') if _is_objectnet(root) else ''


def objectnet_mappings(root: str) -> tuple[str, ...]:
  """Returns ObjectNet's files of folder -> name and of names, () where this is not ObjectNet.

  root: the folder objectnet-1.0, or the images/ in it.
  """
  top = root if _is_objectnet(root) else os.path.dirname(os.path.abspath(root))
  if (
    not _is_objectnet(top)
    or not os.path.samefile(root, top)
    and not os.path.samefile(root, os.path.join(top, 'images'))
  ):
    return ()
  return tuple(os.path.join(top, 'mappings', name) for name in _MAPPINGS)


def ending(name: str) -> str:
  """Returns the ending of a file's name, in lower case, without its dot."""
  return os.path.splitext(name)[1][1:].lower()


def is_text(name: str) -> bool:
  """Says whether a name is UTF-8; images with another name are listed as skipped."""
  return not re.search('[\ud800-\udfff]', name)


def _sample(root: str, name: str, beside: set[str], inside: str) -> table.Sample:
  stem = os.path.splitext(name)[0]
  files = {ending(name): os.path.join(root, name)}
  files |= {
    end: os.path.join(root, f'{stem}.{end}')
    for end in _BESIDE
    if f'{os.path.basename(stem)}.{end}' in beside
  }
  members = {end: (0, os.stat(path).st_size) for end, path in files.items()}
  return table.Sample(
    name, members, functools.partial(_read, files), class_folder(name, inside), name
  )


def _read(files: dict[str, str], which: str, most: int) -> bytes:
  return storage.File(files[which]).read(0, most)


def _entries(folder: str) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as entries:
      return list(entries)
  except OSError as error:  # how many images are missed cannot be said
    raise InputError(
      f'The folder {folder!r} cannot be listed ({error.strerror}). Give this user '
      'the right to read it, or take it out of the dataset.'
    ) from error


def _is_folder(entry: os.DirEntry) -> bool:
  return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
  """A pipe would be waited for without end. A broken link counts: it is listed when it is read."""
  return (
    entry.is_file(follow_symlinks=False)
    or entry.is_symlink()
    and (os.path.isfile(entry.path) or not os.path.exists(entry.path))
  )


def _is_objectnet(top: str) -> bool:
  return os.path.isdir(os.path.join(top, 'images')) and all(
    os.path.isfile(os.path.join(top, 'mappings', name)) for name in _MAPPINGS
  )
