"""Decoded images -> galleries of the report's page: thumbnails in the page, and what to show.

In: uint8 images [H, W, 3], or None where one cannot be read. Out: frozen blocks for the template.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_jax.core.types import Array

THUMBNAIL = 96  # pixels, the longer side: up to this a PNG as it is, above a JPEG of up to twice it


@dataclass(frozen=True)
class Picture:
  source: str           # data: URI; '' where the image cannot be read
  line: str = ''        # shown below: a similarity, a number
  caption: str = ''     # shown on hover and read aloud
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


def pick_queries(
    similarity: Array,  # [Q]
    count: int,
) -> list[tuple[str, int]]:
  """Returns (word, query) of the most similar, the median and the least similar queries.

  A third each. Ties go to the lowest query; queries without a similarity (NaN, unreadable images)
  are left out.
  """
  similarity = np.asarray(similarity, np.float64)
  order = np.argsort(-similarity, kind='stable')
  order = order[np.isfinite(similarity[order])]
  count = min(count, len(order))
  top, bottom = (count + 2) // 3, count // 3
  middle = count - top - bottom
  start = min(max(top, (len(order) - middle) // 2), len(order) - bottom - middle)
  chosen = [('most similar', q) for q in order[:top]]
  chosen += [('median', q) for q in order[start:start + middle]]
  chosen += [('least similar', q) for q in order[len(order) - bottom:]]
  return [(word, int(q)) for word, q in chosen]


def pick_quantiles(
    values: Array,  # [n]
    count: int,
) -> list[int]:
  """Returns up to `count` positions spread evenly over the ranks of the values, highest first."""
  order = np.argsort(-np.asarray(values, np.float64), kind='stable')
  if len(order) > count:
    order = order[np.round(np.linspace(0, len(order) - 1, count)).astype(int)]
  return [int(i) for i in order]


def telling_words(
    removed: Sequence[str],
    kept: Sequence[str],
    count: int = 12,
    least: int = 3,
) -> list[tuple[str, float, float]]:
  """Returns (word, share of removed captions, share of kept ones) of words that tell them apart.

  Ordered by how much more often a word stands in removed captions (log ratio of the shares, with
  half a caption added to each side). Words in fewer than `least` removed captions are left out.
  """
  if not removed or not kept:
    return []
  gone, stay = (Counter(word for text in texts for word in _words(text))
                for texts in (removed, kept))

  def ratio(word: str) -> float:
    return float(np.log((gone[word] + 0.5) / (len(removed) + 1))
                 - np.log((stay[word] + 0.5) / (len(kept) + 1)))

  words = sorted((word for word, n in gone.items() if n >= least and ratio(word) > 0),
                 key=lambda word: (-ratio(word), word))
  return [(word, gone[word] / len(removed), stay[word] / len(kept)) for word in words[:count]]


def _words(text: str) -> set[str]:
  return set(re.findall(r'[^\W\d_]{2,}', text.lower()))
