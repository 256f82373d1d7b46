"""A file that says the class of each image of a folder, in one of the forms in which users hold it.

In: lines 'NAME CLASS', all separated alike by a tab, a comma, the first or the last space; Kaggle's
LOC_val_solution.csv, of which the first wnid counts; JSON {name: class}; or one class a line, in
the order of the sorted images, for exactly all images. NAME is a path below the folder, or a file's
name, with its ending or without. Empty lines, and lines that begin with '#', do not count. Names
are looked up, never opened.
"""

from collections.abc import Collection, Iterable, Sequence
import csv
import dataclasses
import json
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import folder, storage

_MOST_BYTES = 1 << 28  # 50,000 lines are 2 MB
_KAGGLE = 'imageid,predictionstring'  # the first line of LOC_val_solution.csv


@dataclasses.dataclass(frozen=True)
class Truth:
  """What a file says."""

  classes: dict[str, str]  # image, as given -> its class, as it is written
  everything: frozenset[str]  # all classes in the file, also of images that are not there
  in_order: bool  # the file does not name images


def read(path: str, root: str, images: Sequence[str]) -> Truth:
  """Returns what a file says of images, given by their paths relative to root, sorted."""
  text, known = _text(path), _aliases(root, images)
  if text.lstrip().startswith('{'):
    pairs = [(name, _class(value, path)) for name, value in json_pairs(path)]
    if not any(_clean(name) in known for name, _ in pairs):
      raise InputError(
        f'{path} names no image of {root!r}. Give JSON of {{name: class}}, with '
        f'names such as {images[0] if images else "a.jpg"!r}.'
      )
  else:
    lines = [
      line
      for line in map(str.strip, re.split(r'[\r\n]+', text))
      if line and not line.startswith('#')
    ]
    pairs = _pairs(lines, known, path)
    if not pairs:
      return Truth(_in_order(lines, known, images, path), frozenset(lines), True)
  return Truth(_named(pairs, known, path), frozenset(value for _, value in pairs), False)


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


def _pairs(lines: Sequence[str], known: Collection[str], path: str) -> list[tuple[str, str]]:
  """Returns the (name, class) of each line, [] where no line names an image that is known.

  Lines are split as most of those are that name an image. Raises InputError for another that names
  one if it is split otherwise. A heading, which has no number and no ending of an image, is left
  out.
  """

  def names_image(pair: tuple[str, str]) -> bool:
    return _clean(pair[0]) in known and bool(pair[1])

  ways = list(zip(*map(_splits, lines)))  # [ways of splitting][lines] of (name, class)
  best = max(ways, key=lambda way: sum(map(names_image, way)), default=())
  if not any(map(names_image, best)):
    return []
  for line, pair, others in zip(lines, best, zip(*ways)):
    if not names_image(pair) and any(map(names_image, others)):
      raise InputError(
        f'{path} has the line {line[:80]!r}, in which name and class are not separated as in most '
        'lines. Separate all by a tab, or by a comma.'
      )
  kaggle = lines[0].lower().replace(' ', '') == _KAGGLE
  return [
    (name, value.split()[0] if kaggle else value)
    for name, value in best
    if value
    and (_clean(name) in known or re.search('[0-9]', name) or folder.ending(name) in folder.IMAGES)
  ]


def _splits(line: str) -> list[tuple[str, str]]:
  """Returns the (name, class) that a line means if a tab, a comma, the first or the last space
  separates them.
  """
  try:
    fields = next(csv.reader([line]), []) if ',' in line else []
  except csv.Error:  # a field of more than 131,072 characters
    fields = []
  choices = (line.split('\t', 1), fields[:2], line.split(None, 1), line.rsplit(None, 1))
  return [
    (choice[0], choice[1].strip().strip('"').strip()) if len(choice) == 2 else ('', '')
    for choice in choices
  ]


def _in_order(
  lines: Sequence[str], known: Collection[str], images: Sequence[str], path: str
) -> dict[str, str]:
  """Returns image -> class of lines that name no image: one for each image, in sorted order."""
  if len(lines) != len(images):
    raise InputError(
      f'{path} names no image of the folder, and has {len(lines):,} lines for '
      f'{len(images):,} images. Give lines of NAME CLASS, with names such as '
      f'{images[0] if images else "a.jpg"!r}, or one class for every image.'
    )
  if name := next(
    (line for line in lines if folder.ending(line) in folder.IMAGES and _clean(line) in known), ''
  ):
    raise InputError(
      f'{path} has a line {name!r}, which is an image without a class. Give lines of NAME CLASS.'
    )
  if images != sorted(images, key=storage.natural):
    raise InputError(
      f'{path} has one class a line, and the order of the images is not clear: '
      'sorted as text it is not the order of the numbers in their names. Give lines '
      'of NAME CLASS.'
    )
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
      raise InputError(
        f'{path} names {name!r}, which is more than one image. Give the path '
        "below the dataset's folder, with its ending."
      )
    if found.setdefault(image, value) != value:
      raise InputError(
        f'{path} says of {image!r} that its class is {found[image]!r}, and that it '
        f'is {value!r}. Correct the file.'
      )
  return found


def _aliases(root: str, images: Sequence[str]) -> dict[str, str]:
  """Returns the names that a file may use -> an image's path, '' where it is not clear which."""
  known: dict[str, str] = {}
  top = os.path.basename(os.path.normpath(root))
  forms = (
    lambda image: os.path.splitext(os.path.basename(image))[0],
    os.path.basename,
    lambda image: os.path.splitext(image)[0],
    lambda image: os.path.join(top, image),
    lambda image: image,
  )
  for form in forms:  # the most exact one last
    these: dict[str, str] = {}
    for image in images:
      these[form(image)] = image if these.get(form(image), image) == image else ''
    known |= these
  return known


def _class(value: Any, path: str) -> str:
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise InputError(
      f'{path} has the value {str(value)[:60]!r}: a class is a name or a number. '
      'Give JSON of {name: class}.'
    )
  return str(value).strip()


def _text(path: str) -> str:
  try:
    with open(path, 'rb') as f:
      data = f.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
      raise InputError(
        f'{path} is larger than {_MOST_BYTES >> 20} MB, so it is no file of labels. '
        'Give lines of NAME CLASS.'
      )
    return data.decode('utf-8-sig')
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror}). Correct the path.') from error
  except UnicodeDecodeError as error:
    raise InputError(
      f'{path} is no text in UTF-8 ({error.reason} at byte {error.start}). Convert it.'
    ) from error


def _clean(name: str) -> str:
  return os.path.normpath(name.strip().strip('"')) if name.strip() else ''
