"""Decoded images -> galleries of the report's page: thumbnails in the page, and what to show.

In: uint8 images [H, W, 3], or None where one cannot be read. Out: frozen blocks for the template.
"""

import base64
from dataclasses import dataclass
import io

import numpy as np

from clip_jax.core.types import Array

LONGEST = 300  # letters of a caption that are shown
THUMBNAIL = 96  # pixels, the longer side: up to this a PNG as it is, above a JPEG of up to twice it


@dataclass(frozen=True)
class Picture:
  source: str  # data: URI; '' where the image cannot be read
  line: str = ''  # shown below: a similarity, a number
  caption: str = ''  # shown on hover and read aloud
  marked: bool = False  # framed
  pixels: bool = False  # small, enlarged without smoothing


@dataclass(frozen=True)
class Group:
  title: str
  pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
  title: str
  rows: tuple[tuple[str, tuple[Group, ...]], ...]  # (the row's head, its groups of pictures)
  note: str = ''
  kind: str = 'gallery'


def picture(
  image: Array | None,  # [H, W, 3] uint8
  line: str = '',
  caption: str = '',
  marked: bool = False,
) -> Picture:
  """Returns a picture whose image is inside the page: PNG when it is small, else JPEG."""
  if len(caption) > LONGEST:
    caption = caption[:LONGEST] + '\u2026'
  if image is None:
    return Picture('', line, caption, marked)
  from PIL import Image

  shown = Image.fromarray(np.asarray(image, np.uint8))
  is_small = max(shown.size) <= THUMBNAIL
  out = io.BytesIO()
  if is_small:
    shown.save(out, 'PNG', optimize=True)
  else:
    shown.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.BICUBIC)
    shown.save(out, 'JPEG', quality=80, optimize=True)
  data = base64.b64encode(out.getvalue()).decode()
  kind = 'png' if is_small else 'jpeg'
  return Picture(f'data:image/{kind};base64,{data}', line, caption, marked, is_small)


def pick_thirds(
  values: Array,  # [n]
  count: int,
) -> tuple[Array, Array, Array]:
  """Returns up to `count` positions in three parts: the highest, around the median, the lowest.

  Each from high to low, no position twice. Ties go to the lowest position; positions without a
  value (NaN, infinite) are left out.
  """
  values = np.asarray(values, np.float64)
  order = np.argsort(-values, kind='stable')
  order = order[np.isfinite(values[order])]
  count = min(count, len(order))
  top, bottom = (count + 2) // 3, count // 3
  middle = count - top - bottom
  start = min(max(top, (len(order) - middle) // 2), len(order) - bottom - middle)
  return order[:top], order[start : start + middle], order[len(order) - bottom :]


def pick_evenly(rows: Array, count: int) -> Array:  # [n] -> [min(n, count)]
  """Returns up to `count` of the rows, evenly spaced, the first and the last among them."""
  if len(rows) <= count:
    return rows
  return rows[np.round(np.linspace(0, len(rows) - 1, count)).astype(int)]
