"""A file that says the class of each image of a folder, in one of the forms in which users hold it.

In: lines 'NAME CLASS', separated by a tab, a comma or spaces; Kaggle's LOC_val_solution.csv, of
which the first wnid counts; JSON {name: class}; or one class a line, in the order of the sorted
images, for exactly all images. NAME is a path below the folder, or a file's name, with its ending
or without. Empty lines, and lines that begin with '#', do not count. Names are looked up, never
opened.
"""

import collections
from collections.abc import Collection, Iterable, Sequence
import csv
import dataclasses
import json
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import folder
from clip_jax.data.storage import natural

_MOST_BYTES = 1 << 28  # 50,000 lines are 2 MB
_KAGGLE = 'imageid,predictionstring'  # the first line of LOC_val_solution.csv


@dataclasses.dataclass(frozen=True)
class Truth:
  """What a file says."""
  classes: dict[str, str]     # image, as given -> its class, as it is written
  everything: frozenset[str]  # all classes in the file, also of images that are not there
  in_order: bool              # the file does not name images


def read(path: str, root: str, images: Sequence[str]) -> Truth:
  """Returns what a file says of images, given by their paths relative to root, sorted."""
  text = _text(path)
  if text.lstrip().startswith('{'):
    pairs = [(name, _class(value, path)) for name, value in json_pairs(path)]
    found = _named(pairs, _aliases(root, images), path)
    if not found:
      raise InputError(f'{path} names no image of {root!r}. Give JSON of {{name: class}}, with '
                       f'names such as {images[0] if images else "a.jpg"!r}.')
    return Truth(found, frozenset(value for _, value in pairs), False)
  lines = [line for line in map(str.strip, re.split(r'[\r\n]+', text))
           if line and not line.startswith('#')]
  known = _aliases(root, images)
  pairs = _pairs(lines, known)
  if pairs:
    return Truth(_named(pairs, known, path), frozenset(value for _, value in pairs), False)
  return Truth(_in_order(lines, known, images, path), frozenset(lines), True)


def json_pairs(path: str) -> list[tuple[str, Any]]:
  """Returns the names and values of a JSON object, also those that it has twice."""
  try:
    pairs = json.loads(_text(path), object_pairs_hook=_Object)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path} is not valid JSON ({error}). Correct it.') from error
  if not isinstance(pairs, _Object):
    raise InputError(f'{path} is no JSON object of {{name: class}}. Correct it.')
  return pairs


class _Object(list):
  """The (name, value) pairs of a JSON object."""


def _pairs(lines: Sequence[str], known: Collection[str]) -> list[tuple[str, str]]:
  """Returns the (name, class) of each line, [] where no line names an image that is known.

  Lines of other images are split as most lines are; a heading, which has no number and no ending of
  an image, is left out.
  """
  kaggle = bool(lines) and lines[0].lower().replace(' ', '') == _KAGGLE
  found, others, used = [], [], collections.Counter()
  for line in lines:
    splits = _splits(line)
    which = next((i for i, (name, value) in splits.items()
                  if value and _clean(name) in known), None)
    if which is None:
      others.append(splits)
    else:
      used[which] += 1
      found.append(splits[which])
  if not found:
    return []
  usual = used.most_common(1)[0][0]
  rest = [splits[usual] for splits in others if usual in splits and splits[usual][1]]
  found += [(name, value) for name, value in rest
            if re.search('[0-9]', name) or folder.ending(name) in folder.IMAGES]
  return [(name, value.split()[0] if kaggle else value) for name, value in found]


def _splits(line: str) -> dict[int, tuple[str, str]]:
  """Returns the (name, class) that a line may mean: by a tab, a comma, the first or last space."""
  try:
    fields = next(csv.reader([line]), []) if ',' in line else []
  except csv.Error:  # a field of more than 131,072 characters
    fields = []
  choices = (line.split('\t', 1), fields[:2], line.split(None, 1), line.rsplit(None, 1))
  return {i: (choice[0], choice[1].strip().strip('"').strip())
          for i, choice in enumerate(choices) if len(choice) == 2}


def _in_order(lines: Sequence[str], known: Collection[str], images: Sequence[str], path: str
              ) -> dict[str, str]:
  """Returns image -> class of lines that name no image: one for each image, in sorted order."""
  if len(lines) != len(images):
    raise InputError(f'{path} names no image of the folder, and has {len(lines):,} lines for '
                     f'{len(images):,} images. Give lines of NAME CLASS, with names such as '
                     f'{images[0] if images else "a.jpg"!r}, or one class for every image.')
  if name := next((line for line in lines if folder.ending(line) in folder.IMAGES
                   and _clean(line) in known), ''):
    raise InputError(f'{path} has a line {name!r}, which is an image without a class. Give lines '
                     'of NAME CLASS.')
  if images != sorted(images, key=natural):
    raise InputError(f'{path} has one class a line, and the order of the images is not clear: '
                     'sorted as text it is not the order of the numbers in their names. Give lines '
                     'of NAME CLASS.')
  return dict(zip(images, lines, strict=True))


def _named(pairs: Iterable[tuple[str, str]], known: dict[str, str], path: str) -> dict[str, str]:
  """Returns image -> class of the names of images. Raises InputError for a contradiction."""
  found: dict[str, str] = {}
  for name, value in pairs:
    name = _clean(name)
    if name not in known:
      continue
    image = known[name]
    if not image:
      raise InputError(f'{path} names {name!r}, which is more than one image. Give the path '
                       'below the dataset\'s folder, with its ending.')
    if found.setdefault(image, value) != value:
      raise InputError(f'{path} says of {image!r} that its class is {found[image]!r}, and that it '
                       f'is {value!r}. Correct the file.')
  return found


def _aliases(root: str, images: Sequence[str]) -> dict[str, str]:
  """Returns the names that a file may use -> an image's path, '' where it is not clear which."""
  known: dict[str, str] = {}
  top = os.path.basename(os.path.normpath(root))
  forms = (lambda image: os.path.splitext(os.path.basename(image))[0], os.path.basename,
           lambda image: os.path.splitext(image)[0], lambda image: os.path.join(top, image),
           lambda image: image)
  for form in forms:  # the most exact one last
    these: dict[str, str] = {}
    for image in images:
      these[form(image)] = image if these.get(form(image), image) == image else ''
    known |= these
  return known


def _class(value: Any, path: str) -> str:
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise InputError(f'{path} has the value {str(value)[:60]!r}: a class is a name or a number. '
                     'Give JSON of {name: class}.')
  return str(value).strip()


def _text(path: str) -> str:
  try:
    with open(path, 'rb') as f:
      data = f.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
      raise InputError(f'{path} is larger than {_MOST_BYTES >> 20} MB, so it is no file of labels. '
                       'Give lines of NAME CLASS.')
    return data.decode('utf-8-sig')
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror}). Correct the path.') from error
  except UnicodeDecodeError as error:
    raise InputError(f'{path} is no text in UTF-8 ({error.reason} at byte {error.start}). Convert '
                     'it.') from error


def _clean(name: str) -> str:
  return os.path.normpath(name.strip().strip('"')) if name.strip() else ''
