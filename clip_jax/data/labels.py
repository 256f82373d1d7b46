"""The labels of images in a folder, from class folders, ObjectNet's mappings, or a file.

Class folders: a folder named after a class of the config has the label of that class. If all
folders are numbers (ImageNet-V2's 0..999), the number is the label, because the sorted order is
'0', '1', '10'. Other folders (wnids) have their rank among the folders that hold an image.
ObjectNet: of its 313 folders, those of the 113 names in objectnet_to_imagenet_1k.json are chosen. A
label is the rank of ObjectNet's own name among these names, in Python's sort order. Images keep the
red border of two pixels, because the published accuracies for comparison (CLIP_benchmark) are of
images with it.
The classes of a published benchmark (ClassFolders): every class must have its folder, and no other
folder may hold an image.
A file of labels (a flat val/ with its ground truth, labels_file.py): a class is one of the config's
class names, or a number from 0. Otherwise, and without class names, a wnid or name has its rank
among all classes in the file.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import re

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder, labels_file

_WNID = re.compile('n[0-9]{8}')
_MOST_CLASSES = 100_000  # a larger number (a date) is not a class number


class NoLabel(Exception):
  """The reason why an image that needs a label has none."""


@dataclasses.dataclass(frozen=True)
class Labels:
  """The classes of a folder, and the label of each image."""

  classes: tuple[str, ...]  # in label order
  description: str  # how the labels were derived, in words
  # Path relative to the root -> label; -1 for an image outside class folders, None for one that is
  # not chosen. Raises NoLabel.
  label_of: Callable[[str], int | None]


@dataclasses.dataclass(frozen=True)
class ClassFolders:
  """The class folders that a published benchmark has."""

  namings: tuple[tuple[str, ...], ...]  # names of the C class folders, each in label order
  labels: tuple[int, ...]  # the labels that occur; each must have its folder
  leaves_out_others: bool  # True: images of further folders are left out; False: an error


def labels(
  root: str,
  class_names: Sequence[str] = (),
  file: str = '',
  class_folders: ClassFolders | None = None,
) -> Labels:
  """Returns the labels of the images below a folder.

  class_names: of the config, in label order; () takes the classes of the folder or file. file: path
  of a file of labels; if given, only it counts. class_folders: the folders that must exist. Raises
  InputError if labels are ambiguous or a class folder is missing.
  """
  if not filetree.is_folder(root):
    raise InputError(f'{root!r} is not a folder. Correct the path of the dataset.')
  if file:
    return _by_file(root, class_names, file, class_folders)
  if class_folders:
    return _by_class_folders(root, class_names, class_folders)
  mappings = folder.objectnet_mappings(root)
  if mappings:
    return _by_objectnet(root, class_names, *mappings)
  folders = folder.class_folders(root)
  if class_names and not folders:
    raise InputError(
      f'{root!r} has no class folders, so its images have no labels. Correct the '
      'path, or set labels_file to a file of labels, or label_key to a key of the '
      'json files beside the images.'
    )
  folder_classes = folders
  if _are_numbers(folders):
    folder_classes = tuple(map(str, range(max(map(int, folders)) + 1)))
  rank = _ranks(folders, class_names, 'folders', root)
  how = 'their numbers' if folder_classes != folders else 'the rank of their names'
  if set(folders) & set(class_names):
    how = 'their places in `classes`'
  elif class_names and not _are_numbers(folders):
    first = ', '.join(f'{name} = {class_names[rank(name)]}' for name in folders[:3])
    how += f': {first}{", ..." if len(folders) > 3 else ""}'
  description = 'no class folders, no labels'
  if folders:
    description = f'labels by {len(folders):,} class folders ({how})'
    if not class_names and (folder_classes != folders or all(map(_WNID.fullmatch, folders))):
      description += '; prompts would name these numbers or wnids, so set `classes` to evaluate'
  return Labels(
    tuple(class_names) or folder_classes,
    description,
    lambda path: rank(name) if (name := folder.class_folder(path)) else -1,
  )


def _by_class_folders(root: str, class_names: Sequence[str], wanted: ClassFolders) -> Labels:
  """Returns the labels of a published benchmark's images; raises InputError for other folders."""
  present, inside = folder.class_folders(root), folder.images_folder(root)
  shared = lambda naming: len(set(present) & {naming[label] for label in wanted.labels})
  naming = max(wanted.namings, key=shared)  # of equal ones the first
  label_of = {naming[label]: label for label in wanted.labels}
  if not shared(naming):
    raise InputError(
      f'{root!r} has no class folder of this benchmark, such as {next(iter(label_of))!r}; its '
      f'folders with images are: {", ".join(present[:3]) or "none"}. Correct the path, or give '
      'labels_file, a file with the class of each image.'
    )
  missing = [name for name in label_of if name not in set(present)]
  if missing:
    raise InputError(
      f'{root!r} lacks the class folder {missing[0]!r}, or it holds no image (of '
      f'{len(label_of):,} class folders {len(missing):,} are missing). Restore the benchmark, or '
      'correct its path.'
    )
  others = [name for name in present if name not in label_of]
  if others and not wanted.leaves_out_others:
    raise InputError(
      f'{root!r} has the folder {others[0]!r}, which is no class of this benchmark '
      f'({len(others):,} such folders hold images). Remove it, or correct the path or class_set.'
    )

  def label(path: str) -> int | None:
    name = folder.class_folder(path, inside)
    if not name:
      raise NoLabel('outside the class folders')
    return label_of.get(name)

  left_out = f'{len(others):,} of {len(present):,} folders are no class of this benchmark'
  return Labels(tuple(class_names), left_out if others else '', label)


def _ranks(
  names: Sequence[str], class_names: Sequence[str], what: str, where: str
) -> Callable[[str], int]:
  """Returns name -> label: its index in class_names, else its number, else its rank in `names`.

  Numbers count if all names are numbers. Ranks count if no name is a class and there are as many
  classes as names. The function raises NoLabel for a name outside the classes.
  """
  numbers = _are_numbers(names)
  known = set(class_names)
  if not numbers and class_names and not known & set(names) and len(class_names) != len(names):
    raise InputError(
      f'{where}: none of the {len(class_names)} classes is one of the {len(names)} '
      f'{what} ({", ".join(names[:3])}, ...), so the labels are unknown. Correct the '
      f'path, or set `classes` to the {what}, or to one name for each of them, in '
      'sorted order.'
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
  root: str, class_names: Sequence[str], names_path: str, chosen_path: str
) -> Labels:
  """Returns the labels of ObjectNet's images, None for images of folders that are not chosen."""
  names, chosen = (dict(labels_file.json_pairs(path)) for path in (names_path, chosen_path))
  if not all(isinstance(name, str) for name in names.values()) or not set(chosen) <= set(
    names.values()
  ):
    raise InputError(
      f'{names_path} and {chosen_path} do not match: the first must map '
      'folders to names, and the second must have some of these names. Restore '
      "ObjectNet's own files."
    )
  order = tuple(sorted(chosen))
  plain = str.casefold  # so that the class 'alarm clock' matches 'Alarm clock'
  given = tuple(map(plain, class_names))
  missing = [name for name in order if plain(name) not in given]
  if class_names and 0 < len(missing) < len(order):
    raise InputError(
      f"`classes` has some of ObjectNet's names, but not {missing[0]!r} "
      f'({len(missing)} of {len(order)} are missing). Name all of them, or leave '
      '`classes` out.'
    )
  rank = _ranks(tuple(map(plain, order)), given, 'names of ObjectNet', root)
  inside = folder.images_folder(root)

  def label_of(path: str) -> int | None:
    name = names.get(folder.class_folder(path, inside))
    return rank(plain(name)) if name in chosen else None

  with_images = sum(names.get(name) in chosen for name in folder.class_folders(root))
  return Labels(
    tuple(class_names) or order,
    f'recognised as ObjectNet, labels by its mappings: '
    f'{len(order)} names that ImageNet has too, {with_images} of them with images',
    label_of,
  )


def _by_file(
  root: str, class_names: Sequence[str], path: str, class_folders: ClassFolders | None
) -> Labels:
  """Returns the labels from a file, by image name or in the order of the images."""
  images = sorted(filter(folder.is_text, folder.paths(root)))
  truth = labels_file.read(path, root, images)
  class_of = truth.classes
  wnids = class_folders.namings[0] if class_folders else ()
  if wnids and truth.everything <= set(wnids):  # the names of class folders, in a file
    classes = tuple(class_names)
    rank = {name: label for label, name in enumerate(wnids)}.__getitem__
  else:
    classes, rank = _file_classes(truth, class_names, path)

  def label_of(name: str) -> int:
    if name not in class_of:
      raise NoLabel('no label')
    return rank(class_of[name])

  description = f'labels by {os.path.basename(path)}: {len(class_of):,} of {len(images):,} images'
  return Labels(classes, description + (', in sorted order' if truth.in_order else ''), label_of)


def _file_classes(
  truth: labels_file.Truth, class_names: Sequence[str], path: str
) -> tuple[tuple[str, ...], Callable[[str], int]]:
  """Returns the classes in label order, and the function class -> label.

  Ranks are among all classes of the file. Only classes of existing images must be in class_names.
  """
  known = set(class_names)
  in_file = sorted(truth.everything)
  if known & truth.everything:
    in_file = sorted(set(truth.classes.values()))
  unknown = [name for name in in_file if name not in known]
  if unknown:
    numbers = [name for name in in_file if re.fullmatch(r'[+-]?[0-9]+([.][0-9]*)?', name)]
    if len(numbers) == len(in_file):
      return _numbered(in_file, class_names, truth.in_order, path)
    if numbers:
      other = next(name for name in in_file if name not in numbers)
      raise InputError(
        f'{path} has both numbers and names as classes ({numbers[0]!r}, {other!r}). '
        'Use only one of the two.'
      )
    if class_names and (len(unknown) < len(in_file) or len(in_file) != len(class_names)):
      raise InputError(
        f'{path} has the class {unknown[0]!r}, which is not one of the '
        f'{len(class_names)} classes ({", ".join(class_names[:3])}, ...). Add it to '
        '`classes`, or correct the file.'
      )
  return (
    tuple(class_names) or tuple(in_file),
    _ranks(in_file, class_names, 'classes of the file', path),
  )


def _numbered(
  in_file: Sequence[str], class_names: Sequence[str], in_order: bool, path: str
) -> tuple[tuple[str, ...], Callable[[str], int]]:
  most = len(class_names) or _MOST_CLASSES
  if not all(name.isdecimal() for name in in_file):
    name = next(name for name in in_file if not name.isdecimal())
    raise InputError(f'{path} has the class {name!r}: a class number must be an integer from 0.')
  values = set(map(int, in_file))
  from_one = not class_names and values == set(range(1, len(values) + 1))
  if 0 not in values and (in_order or from_one or max(values) == most):
    raise InputError(
      f'{path} has numbers from {min(values)} to {max(values)} and no 0. Class numbers must count '
      'from 0, in the order of the sorted wnids. ILSVRC2012_validation_ground_truth.txt of the '
      'devkit counts from 1 in another order, so its labels would be wrong: give wnids '
      '(LOC_val_solution.csv, or lines of NAME WNID), or sort the images into folders of wnids.'
    )
  if max(values) >= most:
    raise InputError(
      f'{path} has the class {max(values)}, but there are only {most} classes, 0 '
      f'to {most - 1}. Correct the file, or `classes`.'
    )
  return tuple(class_names) or tuple(map(str, range(max(values) + 1))), int


def _are_numbers(names: Sequence[str]) -> bool:
  return bool(names) and all(name.isdecimal() and int(name) < _MOST_CLASSES for name in names)
