"""Format 'folder': every image file below a folder is a sample; its class is its first folder.

In: <root>/<class>/.../<name>.jpg, and beside it, if they are there, <name>.txt, .json and .cls.
Out: samples whose image is a whole file, named by its path relative to the root.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import os

from clip_jax.core.errors import InputError
from clip_jax.data.storage import File
from clip_jax.data.storage import natural
from clip_jax.data.table import Sample

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm')  # endings
_BESIDE = ('txt', 'json', 'cls')
_MOST_CLASSES = 100_000  # a larger number that names a folder (a date) is not a class number


def paths(root: str, inside: str = '', above: tuple[str, ...] = ()) -> Iterator[str]:
  """Yields the path, relative to root, of every image file below it; not of hidden ones."""
  here = os.path.realpath(os.path.join(root, inside))
  if here in above:
    return  # a link to a folder that we are in
  with os.scandir(here) as entries:
    for entry in sorted(entries, key=lambda entry: entry.name):
      path = os.path.join(inside, entry.name)
      if entry.name.startswith('.'):
        continue
      if entry.is_dir():
        yield from paths(root, path, (*above, here))
      elif _split(entry.name)[1].lower() in IMAGES:
        yield path


def find(root: str) -> list[str]:
  """Returns the absolute path of every image file below a folder, in natural order."""
  if not os.path.isdir(root):
    raise InputError(f'{root!r} is no folder. Correct the path of the dataset.')
  found = sorted(paths(root), key=natural)
  if not found:
    raise InputError(f'{root!r} holds no file that ends in {", ".join(IMAGES)}. Correct the path of '
                     'the dataset.')
  return [os.path.join(root, name) for name in found]


def samples(root: str, names: Sequence[str]) -> tuple[list[Sample], list[dict[str, str]]]:
  """Returns the samples of image files, given relative to root, and what is listed as skipped."""
  found, skipped = [], []
  for folder, group in itertools.groupby(names, os.path.dirname):
    beside = set(os.listdir(os.path.join(root, folder)))
    for name in group:
      try:
        name.encode()
        found.append(_sample(root, name, beside))
      except UnicodeEncodeError:
        skipped.append({'key': os.fsencode(name).decode(errors='backslashreplace'),
                        'reason': 'name is not UTF-8'})
      except OSError:
        skipped.append({'key': name, 'reason': 'file cannot be read'})
  return found, skipped


def classes(root: str) -> tuple[str, ...]:
  """Returns the class names in label order: the folders with an image, sorted, or all numbers."""
  with os.scandir(root) as entries:
    folders = sorted(entry.name for entry in entries if entry.is_dir())
  names = tuple(name for name in folders if not name.startswith('.') and any(paths(root, name)))
  if _are_numbers(names):
    return tuple(map(str, range(max(map(int, names)) + 1)))
  return names


def label(name: str, folders: Sequence[str], class_names: Sequence[str]) -> int:
  """Returns the label of a class folder: its place in class_names, else its number, else its rank.

  folders: what `classes` gives. A number counts where all folders are numbers, a rank where there
  are as many classes as folders. -1 where the folder is none of the classes.
  """
  if name in class_names:
    return class_names.index(name)
  if _are_numbers(folders):
    return int(name)
  if not class_names or not set(class_names) & set(folders):
    if class_names and len(class_names) != len(folders):
      raise InputError(f'None of {len(class_names)} classes is one of the {len(folders)} folders '
                       f'({", ".join(folders[:3])}, ...), so labels cannot be told. Name the '
                       'classes after the folders, or give one for each, in sorted order.')
    return list(folders).index(name)
  return -1


def _sample(root: str, name: str, beside: set[str]) -> Sample:
  stem, ending = _split(name)
  files = {ending.lower(): os.path.join(root, name)}
  files |= {end: os.path.join(root, f'{stem}.{end}') for end in _BESIDE
            if f'{os.path.basename(stem)}.{end}' in beside}
  members = {end: (0, os.stat(path).st_size) for end, path in files.items()}
  first = name.split(os.sep)[0] if os.sep in name else ''
  return Sample(name, members, functools.partial(_read, files), first, name)


def _read(files: dict[str, str], ending: str, most: int) -> bytes:
  return File(files[ending]).read(0, most)


def _split(name: str) -> tuple[str, str]:
  """Returns the path without its ending, and the ending without its dot."""
  stem, ending = os.path.splitext(name)
  return stem, ending[1:]


def _are_numbers(names: Sequence[str]) -> bool:
  return bool(names) and all(name.isdecimal() and int(name) < _MOST_CLASSES for name in names)
