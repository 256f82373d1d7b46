"""Planted copies of test images: draws queries, transforms their images, writes tars.

In: an indexed benchmark. Out: webdataset tars; each sample has <row>-<copy>.png or .jpg (the copy),
.txt (its caption) and .json {query, query_key, kind, copy, label, class_name, group}, where `query`
is the row of the copied image in the benchmark. The draw and the parameters of transforms come from
SHA-256, so they are equal on every machine; pixels may depend on the version of Pillow.
"""

from collections.abc import Callable, Sequence
import hashlib
import io
import json
import math
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from clip_jax.core import files
from clip_jax.core.types import Array, Source
from clip_jax.data import images

CROP_AREA = (0.8, 0.95)  # share of the area that a crop keeps; its aspect ratio is the image's
RESIZE_SIDE = (0.5, 0.75)  # factor of both sides; the copy stays small, like a thumbnail
JPEG_QUALITY = (30, 60)  # on Pillow's scale, with colours at half the resolution
COLOUR_FACTOR = (0.7, 1.3)  # of brightness, contrast and saturation, drawn separately
_MOST_JPEG_SIDE = 65_500  # pixels, the maximum of libjpeg


class Copy(NamedTuple):
  """A planned copy of a query's image."""

  row: int  # of the query in the benchmark
  number: int  # of the copy among those of the query, from 0
  kind: str
  key: str  # of the query
  label: int
  class_name: str
  group: str
  caption: str


def draw(
  groups: Sequence[str],  # [Q] group of each query; related images share one
  share: float,  # of the queries, in (0, 1]
  seed: int,
) -> Array:  # [Q] int64
  """Returns the position of each query in the draw, from 0; -1 for queries that are not drawn.

  Whole groups are drawn, in the order of a hash of their names, so that the number of queries is as
  close to the share as possible; at least one group is drawn. The draw of a smaller share is a
  prefix of a larger one. Raises ValueError for an invalid share.
  """
  if not 0 < share <= 1:
    raise ValueError(f'share={share} must be in (0, 1]')
  members: dict[str, list[int]] = {}
  for row, group in enumerate(groups):
    members.setdefault(group, []).append(row)
  order = sorted(members, key=lambda group: _digest(f'planted:{seed}:{group}'))
  drawn = np.cumsum([len(members[group]) for group in order])  # queries in the first groups
  taken = int(np.argmin(np.abs(drawn - share * len(groups)))) + 1 if len(groups) else 0
  place = np.full(len(groups), -1, np.int64)
  rows = [row for group in order[:taken] for row in members[group]]
  place[rows] = np.arange(len(rows))
  return place


def kind_of(place: int, copy: int, copies: int, kinds: Sequence[str]) -> str:
  """Returns the kind of a copy; kinds alternate over the draw, so each gets random queries."""
  return kinds[(place * copies + copy) % len(kinds)]


def transform(
  image: Array,  # [H, W, 3] uint8
  kind: str,
  *,
  seed: int,
  row: int,
  copy: int = 0,
) -> tuple[bytes, str]:
  """Returns the file of a transformed copy and its ending: 'jpg' for kind 'jpeg', else 'png'.

  A pure function of its arguments. Raises images.UnreadableImage if the copy is too large for JPEG.
  """
  amounts = _uniform(f'{seed}:{row}:{copy}', 3)
  changed = KINDS[kind](Image.fromarray(image), amounts)
  file = io.BytesIO()
  if kind == 'jpeg':
    if max(changed.size) > _MOST_JPEG_SIDE:
      raise images.UnreadableImage(
        f'{changed.width} x {changed.height} pixels are too many for JPEG'
      )
    low, high = JPEG_QUALITY
    quality = low + int(amounts[0] * (high - low + 1))
    changed.save(file, 'JPEG', quality=quality, subsampling='4:2:0')
    return file.getvalue(), 'jpg'
  changed.save(file, 'PNG', compress_level=1)  # fast to read: it is read often and written once
  return file.getvalue(), 'png'


def _crop(image: Image.Image, amounts: Sequence[float]) -> Image.Image:
  side = math.sqrt(_interpolate(CROP_AREA, amounts[0]))
  width, height = (max(round(side * full), 1) for full in image.size)
  left, top = (
    int(amount * (full - part + 1))
    for amount, full, part in zip(amounts[1:], image.size, (width, height))
  )
  return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, amounts: Sequence[float]) -> Image.Image:
  side = _interpolate(RESIZE_SIDE, amounts[0])
  return image.resize([max(round(side * full), 1) for full in image.size], Image.Resampling.BICUBIC)


def _colour(image: Image.Image, amounts: Sequence[float]) -> Image.Image:
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for enhancer, amount in zip(enhancers, amounts, strict=True):
    image = enhancer(image).enhance(_interpolate(COLOUR_FACTOR, amount))
  return image


def _unchanged(image: Image.Image, amounts: Sequence[float]) -> Image.Image:
  del amounts  # only the encoding of the file may change the image
  return image


KINDS: dict[str, Callable[[Image.Image, Sequence[float]], Image.Image]] = {
  'crop': _crop,
  'resize': _resize,
  'jpeg': _unchanged,
  'colour': _colour,
  'none': _unchanged,
}


def write_tar(
  path: str,
  source: Source,  # of the benchmark
  copies: Sequence[Copy],  # in the order of the rows
  seed: int,
) -> dict:
  """Writes a tar of copies, with one image in memory at a time.

  Returns counts: samples, kinds {kind: samples}, queries (with at least one copy), and unreadable
  {key of a skipped query: reason}.
  """
  kinds: dict[str, int] = {}
  unreadable: dict[str, str] = {}
  queries, last, pixels = set(), None, None
  with files.atomic(path) as temporary, temporary.open('wb') as tar:
    for copy in copies:
      try:
        if copy.row != last:
          last, pixels = copy.row, None
          pixels = images.decode(source[copy.row]['image'])
        if pixels is None:
          continue  # the reason was recorded for its first copy
        data, ending = transform(pixels, copy.kind, seed=seed, row=copy.row, copy=copy.number)
      except images.UnreadableImage as reason:
        unreadable[copy.key] = str(reason)
        continue
      tar.write(_blocks(copy, data, ending))
      kinds[copy.kind] = kinds.get(copy.kind, 0) + 1
      queries.add(copy.row)
    tar.write(bytes(2 * tarfile.BLOCKSIZE))  # end of the tar
  return {
    'samples': sum(kinds.values()),
    'kinds': kinds,
    'queries': len(queries),
    'unreadable': unreadable,
  }


def _blocks(copy: Copy, data: bytes, ending: str) -> bytes:
  """Returns a sample as blocks of a tar; a TarFile would keep all headers in memory."""
  metadata = {
    'query': copy.row,
    'query_key': copy.key,
    'kind': copy.kind,
    'copy': copy.number,
    'label': copy.label,
    'class_name': copy.class_name,
    'group': copy.group,
  }
  members = {ending: data, 'txt': copy.caption.encode(), 'json': json.dumps(metadata).encode()}
  parts = []
  for name, content in members.items():
    member = tarfile.TarInfo(f'{copy.row:08d}-{copy.number}.{name}')
    member.size = len(content)
    parts += [member.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
  return b''.join(parts)


def _interpolate(bounds: tuple[float, float], amount: float) -> float:
  return bounds[0] + amount * (bounds[1] - bounds[0])


def _uniform(name: str, count: int) -> list[float]:
  """Returns up to four pseudo-random numbers in [0, 1), determined by a name."""
  digest = _digest(name)
  parts = (digest[8 * i : 8 * i + 8] for i in range(count))
  return [(int.from_bytes(part, 'big') >> 11) / 2**53 for part in parts]  # 53 bits fit a float


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()
