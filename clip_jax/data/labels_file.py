"""Reads a file with the class of each image of a folder, in several common forms.

In: lines 'NAME CLASS', all with the same separator (a tab, a comma, the first or the last space);
Kaggle's LOC_val_solution.csv, of which the first wnid counts; JSON {name: class}; or one class per
line, for exactly all images, in sorted order. NAME is a path below the folder, or a file name, with
or without its ending. Empty lines and lines that begin with '#' are ignored. Names are looked up,
never opened.
"""

from collections.abc import Collection, Iterable, Sequence
import csv
import dataclasses
import json
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder, storage

_MOST_BYTES = 1 << 28  # 50,000 lines are 2 MB
_KAGGLE = 'imageid,predictionstring'  # the first line of LOC_val_solution.csv


@dataclasses.dataclass(frozen=True)
class Truth:
  """The content of a file of labels."""

  classes: dict[str, str]  # image path, as given to `read` -> its class, as written in the file
  everything: frozenset[str]  # all classes in the file, also of missing images
  in_order: bool  # the file has classes without image names


def read(path: str, root: str, images: Sequence[str]) -> Truth:
  """Returns the classes of images, given as sorted paths relative to root."""
  text, known = _read_text(path), _aliases(root, images)
  if text.lstrip().startswith('{'):
    pairs = [(name, _class(value, path)) for name, value in json_pairs(path)]
    if not any(_normalize_name(name) in known for name, _ in pairs):
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
  return Truth(_classes_by_image(pairs, known, path), frozenset(value for _, value in pairs), False)


def json_pairs(path: str) -> list[tuple[str, Any]]:
  """Returns the (name, value) pairs of a JSON object, duplicates included."""
  try:
    pairs = json.loads(_read_text(path), object_pairs_hook=_Object)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path} is not valid JSON ({error}). Correct the file.') from error
  if not isinstance(pairs, _Object):
    raise InputError(f'{path} is not a JSON object of {{name: class}}. Correct the file.')
  return pairs


class _Object(list):
  """The (name, value) pairs of a JSON object."""


def _pairs(lines: Sequence[str], known: Collection[str], path: str) -> list[tuple[str, str]]:
  """Returns the (name, class) of each line, [] if no line names a known image.

  The separator is the one with which the most lines name an image. Raises InputError if another
  separator is needed for a line. A heading (no digit and no image ending) is left out.
  """

  def names_image(pair: tuple[str, str]) -> bool:
    return _normalize_name(pair[0]) in known and bool(pair[1])

  ways = list(zip(*map(_splits, lines)))  # [ways of splitting][lines] of (name, class)
  best = max(ways, key=lambda way: sum(map(names_image, way)), default=())
  if not any(map(names_image, best)):
    return []
  for line, pair, others in zip(lines, best, zip(*ways)):
    if not names_image(pair) and any(map(names_image, others)):
      raise InputError(
        f'{path} has the line {line[:80]!r}, whose separator differs from that of most lines. '
        'Separate name and class by a tab, or by a comma, in all lines.'
      )
  kaggle = lines[0].lower().replace(' ', '') == _KAGGLE
  return [
    (name, value.split()[0] if kaggle else value)
    for name, value in best
    if value
    and (
      _normalize_name(name) in known
      or re.search('[0-9]', name)
      or folder.ending(name) in folder.IMAGES
    )
  ]


def _splits(line: str) -> list[tuple[str, str]]:
  """Returns the (name, class) of a line for each separator, ('', '') if it is missing.

  The separators are a tab, a comma, the first space and the last space.
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
  """Returns image -> class from lines without names, one for each image in sorted order."""
  if len(lines) != len(images):
    raise InputError(
      f'{path} names no image of the folder, and has {len(lines):,} lines for '
      f'{len(images):,} images. Give lines of NAME CLASS, with names such as '
      f'{images[0] if images else "a.jpg"!r}, or one line with a class for every image.'
    )
  if name := next(
    (
      line
      for line in lines
      if folder.ending(line) in folder.IMAGES and _normalize_name(line) in known
    ),
    '',
  ):
    raise InputError(
      f'{path} has the line {name!r}, an image without a class. Give lines of NAME CLASS.'
    )
  if images != sorted(images, key=storage.natural_key):
    raise InputError(
      f'{path} has one class per line, but the order of the images is ambiguous: '
      'sorted as text, it differs from the order of the numbers in their names. Give '
      'lines of NAME CLASS.'
    )
  return dict(zip(images, lines, strict=True))


def _classes_by_image(
  pairs: Iterable[tuple[str, str]], known: dict[str, str], path: str
) -> dict[str, str]:
  """Returns image -> class of the named images; raises InputError for a contradiction."""
  classes: dict[str, str] = {}
  for name, value in pairs:
    name = _normalize_name(name)
    if name not in known:
      continue
    image = known[name]
    if not image:
      raise InputError(
        f'{path} names {name!r}, which matches more than one image. Give the path '
        "below the dataset's folder, with its ending."
      )
    if classes.setdefault(image, value) != value:
      raise InputError(
        f'{path} gives {image!r} two classes, {classes[image]!r} and {value!r}. Correct the file.'
      )
  return classes


def _aliases(root: str, images: Sequence[str]) -> dict[str, str]:
  """Returns name that a file may use -> path of the image, '' if it is ambiguous."""
  known: dict[str, str] = {}
  top = filetree.base_name(root)
  forms = (
    lambda image: os.path.splitext(os.path.basename(image))[0],
    os.path.basename,
    lambda image: os.path.splitext(image)[0],
    lambda image: os.path.join(top, image),
    lambda image: image,
  )
  for form in forms:  # the most specific form is last, so it wins
    aliases: dict[str, str] = {}
    for image in images:
      aliases[form(image)] = image if aliases.get(form(image), image) == image else ''
    known |= aliases
  return known


def _class(value: Any, path: str) -> str:
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise InputError(
      f'{path} has the value {str(value)[:60]!r}: a class must be a name or an integer. '
      'Give JSON of {name: class}.'
    )
  return str(value).strip()


def _read_text(path: str) -> str:
  return filetree.read_text(
    path, _MOST_BYTES, 'too large for a file of labels. Give lines of NAME CLASS.'
  )


def _normalize_name(name: str) -> str:
  return os.path.normpath(name.strip().strip('"')) if name.strip() else ''
