"""Which class an image of a folder has: by its class folder, ObjectNet's mappings, or a file.

Class folders: a class name of the config is its own label; folders that are all numbers
(ImageNet-V2's 0..999) are labels themselves, as their sorted order '0', '1', '10' is not; other
folders (wnids) count by their rank among the folders that hold an image.
ObjectNet: of its 313 folders, those of the 113 names in objectnet_to_imagenet_1k.json are asked
for; a label is the rank of ObjectNet's own name among these names, sorted as Python sorts text.
Images keep the red border of two pixels: the published accuracies that ours are compared with
(CLIP_benchmark) are of images with it.
A file of labels (a flat val/ with its ground truth, labels_file.py): a class is one of the config's
class names, or a number from 0; else, and without class names, a wnid or name counts by its rank
among all that the file has.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import re

from clip_jax.core.errors import InputError
from clip_jax.data import folder, labels_file

_WNID = re.compile('n[0-9]{8}')
_MOST_CLASSES = 100_000  # a larger number (a date) is not a class number


class NoLabel(Exception):
  """The reason for which an image that has to have a label has none."""


@dataclasses.dataclass(frozen=True)
class Labels:
  """What says the classes of a folder's images."""

  classes: tuple[str, ...]  # in label order
  said: str  # what was recognised, in words
  # Path relative to the root -> label; -1 for an image in no class folder, None for one that is not
  # asked for. Raises NoLabel.
  of: Callable[[str], int | None]


def labels(root: str, class_names: Sequence[str] = (), file: str = '') -> Labels:
  """Returns what says the label of every image below a folder.

  class_names: the config's, in label order; () takes those that are found. file: the path of a file
  of labels, which then alone counts. Raises InputError where labels would be guessed.
  """
  if not os.path.isdir(root):
    raise InputError(f'{root!r} is no folder. Correct the path of the dataset.')
  if file:
    return _by_file(root, class_names, file)
  mappings = folder.objectnet_mappings(root)
  if mappings:
    return _by_objectnet(root, class_names, *mappings)
  folders = folder.class_folders(root)
  if class_names and not folders:
    raise InputError(
      f'{root!r} has no class folders, which say what each image shows. Correct the '
      'path, or name a file of labels in labels_file, or a key of the json files '
      'beside the images in label_key.'
    )
  found = folders
  if _are_numbers(folders):
    found = tuple(map(str, range(max(map(int, folders)) + 1)))
  rank = _ranks(folders, class_names, 'folders', root)
  how = 'their numbers' if found != folders else 'the rank of their names'
  if set(folders) & set(class_names):
    how = 'their places in `classes`'
  said = 'no class folders, no labels'
  if folders:
    said = f'labels by {len(folders):,} class folders ({how})'
    if not class_names and (found != folders or all(map(_WNID.fullmatch, folders))):
      said += '; prompts would name these numbers or wnids, so give `classes` to evaluate'
  return Labels(
    tuple(class_names) or found,
    said,
    lambda path: rank(name) if (name := folder.class_folder(path)) else -1,
  )


def _ranks(
  names: Sequence[str], class_names: Sequence[str], what: str, where: str
) -> Callable[[str], int]:
  """Returns name -> label: its place in class_names, else its number, else its rank in `names`.

  A number counts where all names are numbers, a rank where there are as many classes as names and
  none of them is a class. Raises NoLabel for a name that is none of the classes.
  """
  numbers = _are_numbers(names)
  known = set(class_names)
  if not numbers and class_names and not known & set(names) and len(class_names) != len(names):
    raise InputError(
      f'{where}: none of {len(class_names)} classes is one of the {len(names)} '
      f'{what} ({", ".join(names[:3])}, ...), so labels cannot be told. Correct the '
      f'path, or name the classes after the {what}, or one for each, in sorted '
      'order.'
    )
  order = class_names if known & set(names) else names
  places = {name: place for place, name in reversed(list(enumerate(order)))}
  most = len(class_names) or _MOST_CLASSES

  def rank(name: str) -> int:
    if name in places:
      label = int(name) if numbers and name not in known else places[name]
      if label < most:
        return label
    raise NoLabel('bad label')

  return rank


def _by_objectnet(
  root: str, class_names: Sequence[str], names_of_folders: str, asked_for: str
) -> Labels:
  """Returns the labels of ObjectNet's images; None for those of folders that are not asked for."""
  names, asked = (dict(labels_file.json_pairs(path)) for path in (names_of_folders, asked_for))
  if not all(isinstance(name, str) for name in names.values()) or not set(asked) <= set(
    names.values()
  ):
    raise InputError(
      f'{names_of_folders} and {asked_for} do not fit together: the first maps '
      'folders to names, and the second has some of these names. Restore '
      "ObjectNet's own."
    )
  order = tuple(sorted(asked))
  plain = str.casefold  # 'alarm clock' is 'Alarm clock', not a name that counts by its rank
  given = tuple(map(plain, class_names))
  strange = [name for name in order if plain(name) not in given]
  if class_names and 0 < len(strange) < len(order):
    raise InputError(
      f"`classes` has some of ObjectNet's names, and not {strange[0]!r} "
      f'({len(strange)} of {len(order)} are missing). Name all of them, or leave '
      '`classes` out.'
    )
  rank = _ranks(tuple(map(plain, order)), given, 'names of ObjectNet', root)
  inside = folder.images_folder(root)

  def of(path: str) -> int | None:
    name = names.get(folder.class_folder(path, inside))
    return rank(plain(name)) if name in asked else None

  there = sum(names.get(name) in asked for name in folder.class_folders(root))
  return Labels(
    tuple(class_names) or order,
    f'recognised as ObjectNet, labels by its mappings: '
    f'{len(order)} names that ImageNet has too, {there} of them with images',
    of,
  )


def _by_file(root: str, class_names: Sequence[str], path: str) -> Labels:
  """Returns the labels that a file gives, by the images' names or in their order."""
  images = sorted(filter(folder.is_text, folder.paths(root)))
  truth = labels_file.read(path, root, images)
  found = truth.classes
  classes, rank = _file_classes(truth, class_names, path)

  def of(name: str) -> int:
    if name not in found:
      raise NoLabel('no label')
    return rank(found[name])

  said = f'labels by {os.path.basename(path)}: {len(found):,} of {len(images):,} images'
  return Labels(classes, said + (', in sorted order' if truth.in_order else ''), of)


def _file_classes(
  truth: labels_file.Truth, class_names: Sequence[str], path: str
) -> tuple[tuple[str, ...], Callable[[str], int]]:
  """Returns the classes in label order, and class -> label.

  A rank counts all classes of the file; that they are known matters of images that are there.
  """
  known = set(class_names)
  said = sorted(truth.everything)
  if known & truth.everything:
    said = sorted(set(truth.classes.values()))
  unknown = [name for name in said if name not in known]
  if unknown:
    numbers = [name for name in said if re.fullmatch(r'[+-]?[0-9]+([.][0-9]*)?', name)]
    if len(numbers) == len(said):
      return _numbered(said, class_names, truth.in_order, path)
    if numbers:
      other = next(name for name in said if name not in numbers)
      raise InputError(
        f'{path} has both numbers and names as classes ({numbers[0]!r}, {other!r}). '
        'Give one or the other.'
      )
    if class_names and (len(unknown) < len(said) or len(said) != len(class_names)):
      raise InputError(
        f'{path} says the class {unknown[0]!r}, which is not one of the '
        f'{len(class_names)} classes ({", ".join(class_names[:3])}, ...). Add it to '
        '`classes`, or correct the file.'
      )
  return (tuple(class_names) or tuple(said), _ranks(said, class_names, 'classes of the file', path))


def _numbered(
  said: Sequence[str], class_names: Sequence[str], in_order: bool, path: str
) -> tuple[tuple[str, ...], Callable[[str], int]]:
  most = len(class_names) or _MOST_CLASSES
  if not all(name.isdecimal() for name in said):
    name = next(name for name in said if not name.isdecimal())
    raise InputError(f'{path} says the class {name!r}: a class number is a whole number from 0.')
  values = set(map(int, said))
  from_one = not class_names and values == set(range(1, len(values) + 1))
  if 0 not in values and (in_order or from_one or max(values) == most):
    raise InputError(
      f'{path} has numbers from {min(values)} to {max(values)} and no 0. Class numbers count '
      'from 0, in the order of the sorted wnids. ILSVRC2012_validation_ground_truth.txt of the '
      'devkit counts from 1 in an order of its own, so labels would be wrong: give wnids '
      '(LOC_val_solution.csv, or lines of NAME WNID), or sort the images into folders of wnids.'
    )
  if max(values) >= most:
    raise InputError(
      f'{path} says the class {max(values)}, and there are {most} classes, from 0 '
      f'to {most - 1}. Correct the file, or `classes`.'
    )
  return tuple(class_names) or tuple(map(str, range(max(values) + 1))), int


def _are_numbers(names: Sequence[str]) -> bool:
  return bool(names) and all(name.isdecimal() and int(name) < _MOST_CLASSES for name in names)
