"""Format 'folder': every image file below a folder is a sample; its class is its first folder.

In: <root>/<class>/.../<name>.jpg, and optionally <name>.txt, .json, .cls and other files beside it.
Their endings may be in upper case, as in tars. Out: samples whose image is a whole file, with its
path relative to the root as key. labels.py assigns labels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
import os
import re

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, storage, table

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm', 'avif')  # endings
_BESIDE = ('txt', 'json', 'cls')
_BATCH = 256  # remote samples whose first bytes are fetched together
_HEAD = 1 << 14  # bytes: whole texts, and the header of most images
_MAPPINGS = ('folder_to_objectnet_label.json', 'objectnet_to_imagenet_1k.json')  # ObjectNet's


def paths(root: str, inside: str = '') -> Iterator[str]:
  """Yields the path, relative to root, of every image file below root/inside, in any order.

  Links are followed, except links to a parent folder. Hidden files and folders are ignored.
  """
  if storage.is_remote(root):
    yield from _remote_paths(root, inside.rstrip('/'))
    return
  real = os.path.realpath(os.path.join(root, inside))
  todo: list[tuple[str, tuple[str, ...]]] = [(inside, (real,))]
  while todo:
    folder, above = todo.pop()
    for entry in _entries(above[-1]):
      if entry.name.startswith('.'):
        continue
      path = os.path.join(folder, entry.name)
      if _is_folder(entry):
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        if real not in above:
          todo.append((path, (*above, real)))
      elif ending(entry.name) in IMAGES and _is_file(entry):
        yield path


def _remote_paths(root: str, inside: str) -> Iterator[str]:
  """Does the same for a URL; the folders of one level are listed concurrently."""
  level = [inside]
  with futures.ThreadPoolExecutor(storage.THREADS) as threads:
    while level:
      listed = threads.map(lambda folder: filetree.entries(filetree.join(root, folder)), level)
      below = []
      for folder, entries in zip(level, listed):
        for name, entry in entries.items():
          path = f'{folder}/{name}'.lstrip('/')
          if entry.is_folder and not name.startswith('.'):
            below.append(path)
          elif ending(name) in IMAGES and not name.startswith('.'):
            yield path
      level = below


def find(root: str) -> tuple[str, list[str]]:
  """Returns the folder, and the relative path of every image file below it, in natural order."""
  if not filetree.is_folder(root):
    raise InputError(f'{root!r} is not a folder. Correct the path of the dataset.')
  names = sorted(paths(root), key=storage.natural_key)
  if not names:
    raise InputError(
      f'{root!r} holds no file that ends in {", ".join(IMAGES)}. Correct the path of the dataset.'
    )
  return root, names


def samples(
  root: str, files: Sequence[storage.SourceFile], columns: Sequence[str] = ()
) -> tuple[list[table.Sample], list[dict[str, str]]]:
  """Returns the samples of image files below a root, and the skipped entries.

  columns: endings, beside txt, json and cls, of the files that belong to an image.
  """
  usable, skipped = [], []
  endings = dict.fromkeys((*_BESIDE, *map(str.lower, columns)))
  beside = functools.lru_cache(64)(lambda folder: _by_lower_ending(filetree.join(root, folder)))
  inside = images_folder(root)
  heads = _Heads() if storage.is_remote(root) else None
  for file in files:
    name = file.name
    if not is_text(name):
      skipped.append(
        {'key': os.fsencode(name).decode(errors='backslashreplace'), 'reason': 'name is not UTF-8'}
      )
      continue
    try:
      usable.append(_sample(root, file, endings, beside(os.path.dirname(name)), inside, heads))
    except OSError:
      skipped.append({'key': name, 'reason': 'file cannot be read'})
  return usable, skipped


def class_folders(root: str) -> tuple[str, ...]:
  """Returns the sorted names of the folders in the root that hold an image."""
  inside = images_folder(root)
  if storage.is_remote(root):
    return tuple(sorted({class_folder(path, inside) for path in paths(root, inside)} - {''}))
  folders = sorted(
    entry.name
    for entry in _entries(os.path.join(root, inside))
    if _is_folder(entry) and is_text(entry.name) and not entry.name.startswith('.')
  )
  return tuple(name for name in folders if any(paths(root, os.path.join(inside, name))))


def class_folder(path: str, inside: str = '') -> str:
  """Returns the first folder of an image's path, '' for an image in the root itself.

  inside: the result of `images_folder`; a path without this prefix has no class folder.
  """
  if not path.startswith(inside):
    return ''
  first, separator, _ = path[len(inside) :].partition(os.sep)
  return first if separator else ''


def images_folder(root: str) -> str:
  """Returns 'images/', with the class folders, if the root is ObjectNet's, else ''."""
  return os.path.join('images', '') if _is_objectnet(root) else ''


def objectnet_mappings(root: str) -> tuple[str, ...]:
  """Returns the paths of ObjectNet's two mapping files, () if the root is not ObjectNet's.

  The first maps folders to names, the second has the names shared with ImageNet. root: the folder
  objectnet-1.0, or images/ in it.
  """
  top = root if _is_objectnet(root) else filetree.parent(root)
  same = str.__eq__ if storage.is_remote(root) else os.path.samefile
  if not _is_objectnet(top) or not same(root, top) and not same(root, filetree.join(top, 'images')):
    return ()
  return tuple(filetree.join(top, f'mappings/{name}') for name in _MAPPINGS)


def ending(name: str) -> str:
  """Returns the ending of a file name, in lower case, without the dot."""
  return os.path.splitext(name)[1][1:].lower()


def is_text(name: str) -> bool:
  """Returns whether a name is valid UTF-8; images with other names are skipped."""
  return not re.search('[\ud800-\udfff]', name)


def _by_lower_ending(folder: str) -> dict[str, str]:
  """Returns name with its ending in lower case -> name, of the files of a folder.

  Of 'a.TXT' and 'a.txt' the latter counts.
  """
  names = {}
  for name in sorted(filetree.entries(folder) if storage.is_remote(folder) else os.listdir(folder)):
    stem, dot, end = name.rpartition('.')
    names[f'{stem}{dot}{end.lower()}'] = name
  return names


def _sample(
  root: str,
  file: storage.SourceFile,
  endings: Iterable[str],
  beside: Mapping[str, str],
  inside: str,
  heads: '_Heads | None',
) -> table.Sample:
  name, folder = file.name, os.path.dirname(file.name)
  stem = os.path.splitext(os.path.basename(name))[0]
  names = {
    end: os.path.join(folder, actual) for end in endings if (actual := beside.get(f'{stem}.{end}'))
  }
  names[ending(name)] = name
  if heads is None:
    paths = {end: os.path.join(root, name) for end, name in names.items()}
    sizes = {end: os.stat(path).st_size for end, path in paths.items()}
    read = functools.partial(_read, paths)
  else:
    further = {end: other for end, other in names.items() if other != name}
    found = filetree.source_files(root, list(further.values()))
    members = dict(zip(further, found, strict=True)) | {ending(name): file}
    sizes = {end: member.size for end, member in members.items()}
    read = functools.partial(heads.read, heads.add(members))
  return table.Sample(
    name, {end: (0, size) for end, size in sizes.items()}, read, class_folder(name, inside), name
  )


def _read(files: dict[str, str], which: str, most: int) -> bytes:
  return storage.File(files[which]).read(0, most)


class _Heads:
  """The first bytes of the files of remote samples, fetched in batches in the samples' order."""

  def __init__(self) -> None:
    self._samples: list[dict[str, storage.SourceFile]] = []  # ending -> file
    self._batch, self._bytes = -1, {}  # number of the batch in memory; path -> its first bytes

  def add(self, members: dict[str, storage.SourceFile]) -> int:
    """Adds a sample and returns its number."""
    self._samples.append(members)
    return len(self._samples) - 1

  def read(self, number: int, which: str, most: int) -> bytes:
    """Returns the first bytes of a file of a sample."""
    file = self._samples[number][which]
    most = min(most, file.size)
    if number // _BATCH != self._batch:
      self._batch = number // _BATCH
      batch = self._samples[self._batch * _BATCH :][:_BATCH]
      wanted = [file for members in batch for file in members.values()]
      ranges = [(file.path, 0, min(_HEAD, file.size)) for file in wanted]
      self._bytes = dict(zip((file.path for file in wanted), storage.read_ranges(ranges)))
    head = self._bytes[file.path]
    return head[:most] if most <= len(head) else storage.open_file(file.path).read(0, most)


def _entries(folder: str) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as entries:
      return list(entries)
  except OSError as error:  # an error, because an unknown number of images would be missing
    raise InputError(
      f'The folder {folder!r} cannot be listed ({error.strerror}). Make it readable for '
      'this user, or remove it from the dataset.'
    ) from error


def _is_folder(entry: os.DirEntry) -> bool:
  return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
  """Returns whether an entry is a regular file, a link to one, or a broken link.

  A pipe is excluded because reading it would block; a broken link is skipped later, when read.
  """
  return (
    entry.is_file(follow_symlinks=False)
    or entry.is_symlink()
    and (os.path.isfile(entry.path) or not os.path.exists(entry.path))
  )


def _is_objectnet(top: str) -> bool:
  return filetree.is_folder(filetree.join(top, 'images')) and all(
    filetree.is_file(filetree.join(top, f'mappings/{name}')) for name in _MAPPINGS
  )
