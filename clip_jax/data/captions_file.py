"""Reads a file with the captions of the images of a folder, in the forms of COCO and Flickr.

In: Karpathy's JSON {images: [{filename, split, sentences: [{raw}]}]}; COCO's JSON {images: [{id,
file_name}], annotations: [{image_id, caption}]}; or one caption a line, after the name of its
image: NAME#0<tab>CAPTION (Flickr's .token), NAME,CAPTION or NAME|NUMBER|CAPTION, below a heading or
none. Out: the captions of each image, in the order of the file.
"""

from collections.abc import Iterable, Iterator, Sequence
import csv
import dataclasses
import json
import os
import re
from typing import Any

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder

_MOST_BYTES = 1 << 30  # so that a wrong path does not fill the memory
_LINE = re.compile(
  rf'\s*"?(?P<name>[^\t,|"]+?\.(?:{"|".join(folder.IMAGES)}))"?(?:#\d+)?\s*'
  r'(?:\t|,|\|(?:\s*\d+\s*\|)?)(?P<caption>.*)',
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """What a file says of an image."""

  name: str  # a file name, or a path that ends with it
  captions: tuple[str, ...]  # () for an image that is listed without a caption
  split: str = ''  # Karpathy's: 'test', ...


@dataclasses.dataclass(frozen=True)
class Captions:
  """The captions of the images below a folder."""

  entries: dict[str, Entry]  # path of the image, relative to the folder
  missing: list[str]  # names of images that the file lists and the folder lacks


def read(path: str, root: str, splits: Sequence[str] = ()) -> Captions:
  """Returns the captions of the images below a folder.

  splits: those that count, of Karpathy's file, which has several. A name matches the image whose
  path ends with it. Raises InputError for a file of another form, for one that is not UTF-8, for a
  file of several splits if none is chosen, for a split that it lacks, and for a name that matches
  several images.
  """
  entries = list(_entries(path))
  present = sorted({entry.split for entry in entries})
  if len(present) > 1 and not splits:
    raise InputError(
      f'{path} has captions of the splits {", ".join(present)}. Choose from them, for example '
      f'where=dict(split={"test" if "test" in present else present[0]!r}).'
    )
  if splits and not set(splits) & set(present):
    raise InputError(
      f'{path} has no captions of the split {" or ".join(splits)}; it has: '
      f'{", ".join(filter(None, present)) or "no splits"}. Correct where.split, or remove it.'
    )
  by_name: dict[str, list[str]] = {}
  for image in filter(folder.is_text, folder.paths(root)):
    by_name.setdefault(os.path.basename(image), []).append(image)
  found, missing = {}, []
  for entry in entries:
    if not all(isinstance(text, str) for text in (entry.name, *entry.captions)):
      raise InputError(f'{path}: a name or caption of {entry.name!r} is not a text. Correct it.')
    if splits and entry.split not in splits:
      continue
    images = by_name.get(os.path.basename(entry.name), [])
    if len(images) > 1:
      images = [image for image in images if f'/{image}'.endswith(f'/{entry.name}')]
      if len(images) != 1:
        raise InputError(
          f'{path} names {entry.name!r}, which matches several images below {root!r}. Set the path '
          'of the dataset to the folder of one of them.'
        )
    if not images:
      missing.append(entry.name)
    elif images[0] in found:
      raise InputError(f'{path} lists the image {entry.name!r} twice. Correct the file.')
    else:
      found[images[0]] = entry
  return Captions(found, missing)


def _entries(path: str) -> Iterator[Entry]:
  """Yields the images of a file with their captions."""
  text = filetree.read_text(path, _MOST_BYTES, 'too large for a file of captions. Split it.')
  if not text.lstrip().startswith('{'):
    yield from _of_lines(text, path)
    return
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path} is not valid JSON ({error}). Correct the file.') from error
  try:
    yield from _of_coco(content) if 'annotations' in content else _of_karpathy(content)
  except (KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{path} has neither the form of Karpathy's JSON (images, each with filename, split and "
      "sentences) nor that of COCO's (images and annotations, each with a caption): "
      f'{type(error).__name__} {error}. Correct the file.'
    ) from error


def _of_karpathy(content: dict[str, Any]) -> Iterator[Entry]:
  for image in content['images']:
    name = os.path.join(image.get('filepath') or '', image['filename'])
    yield Entry(
      name, tuple(sentence['raw'] for sentence in image['sentences']), image.get('split', '')
    )


def _of_coco(content: dict[str, Any]) -> Iterator[Entry]:
  captions: dict[Any, list[str]] = {image['id']: [] for image in content['images']}
  for annotation in content['annotations']:
    captions[annotation['image_id']].append(annotation['caption'])
  for image in content['images']:
    yield Entry(image['file_name'], tuple(captions[image['id']]))


def _of_lines(text: str, path: str) -> Iterator[Entry]:
  captions: dict[str, list[str]] = {}
  lines = [line for line in re.split(r'\r\n?|\n', text) if line.strip()]
  for number, line in enumerate(lines):
    match = _LINE.fullmatch(line)
    if match:
      captions.setdefault(match['name'], []).append(_unquoted(match['caption']))
    elif number:  # the first line may be a heading
      raise InputError(
        f'{path} has the line {line[:80]!r}, which is not the name of an image and a caption. '
        'Write NAME#0<tab>CAPTION, NAME,CAPTION or NAME|NUMBER|CAPTION.'
      )
  for name, texts in captions.items():
    yield Entry(name, tuple(texts))


def _unquoted(text: str) -> str:
  """Returns a caption without the quotation marks of a CSV field."""
  text = text.strip()
  if len(text) > 1 and text[0] == text[-1] == '"':
    fields: Iterable[list[str]] = csv.reader([text])
    return ','.join(next(iter(fields)))
  return text
