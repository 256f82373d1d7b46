"""Decoded images -> galleries of the report's page, with thumbnails embedded in the page.

In: uint8 images [H, W, 3], or None for an unreadable image. Out: frozen blocks for the template.
"""

import base64
from dataclasses import dataclass
import io

import numpy as np

from clip_jax.core.types import Array

LONGEST = 300  # characters of a caption that are shown
# (characters of the page's images so far, longer side of the next one in pixels): a page of many
# benchmarks and splits stays below 10 MB. From the last number on, images are left out.
SIDES = ((2_500_000, 192), (5_000_000, 96))
UNREADABLE, LEFT_OUT = 'unreadable', 'left out'  # shown in place of an image


@dataclass(frozen=True)
class Picture:
  source: str  # data: URI; '' for an unreadable image, or one that is left out
  line: str = ''  # shown below: a similarity, a number
  caption: str = ''  # shown on hover and read aloud
  marked: bool = False  # framed
  pixels: bool = False  # a small image, enlarged without smoothing
  missing: str = UNREADABLE  # shown in place of the image without a source


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
  side: int = SIDES[0][1],  # pixels of the longer side, at most
) -> Picture:
  """Returns a picture with its image embedded: PNG up to half the side, else JPEG."""
  caption = _shortened(caption)
  if image is None:
    return Picture('', line, caption, marked)
  from PIL import Image

  shown = Image.fromarray(np.asarray(image, np.uint8))
  is_small = max(shown.size) <= side // 2
  out = io.BytesIO()
  if is_small:
    shown.save(out, 'PNG', optimize=True)
  else:
    shown.thumbnail((side, side), Image.Resampling.BICUBIC)
    shown.save(out, 'JPEG', quality=80, optimize=True)
  data = base64.b64encode(out.getvalue()).decode()
  kind = 'png' if is_small else 'jpeg'
  return Picture(f'data:image/{kind};base64,{data}', line, caption, marked, is_small)


def left_out(line: str, caption: str, marked: bool) -> Picture:
  """Returns a picture without its image, for a page that holds enough images."""
  return Picture('', line, _shortened(caption), marked, missing=LEFT_OUT)


def side_after(characters: int) -> int:
  """Returns the longer side of the next image in pixels; 0 if the page holds enough images."""
  return next((side for most, side in SIDES if characters < most), 0)


def _shortened(caption: str) -> str:
  return caption[:LONGEST] + '\u2026' if len(caption) > LONGEST else caption


def pick_thirds(
  values: Array,  # [n]
  count: int,
) -> tuple[Array, Array, Array]:
  """Returns up to `count` positions: those of the highest, the median and the lowest values.

  Each part is ordered from high to low; no position occurs twice. Ties go to the lowest position;
  positions without a finite value are left out.
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
  """Returns up to `count` rows, evenly spaced, including the first and the last."""
  if len(rows) <= count:
    return rows
  return rows[np.round(np.linspace(0, len(rows) - 1, count)).astype(int)]
