"""Image-text retrieval: recall@k both ways, as in CLIP's paper (Radford et al. 2021, table 13).

In: vectors of images [n, E] and of their captions [m, E]. Out: NumPy arrays. No files.

Image to text: an image is a hit if any of its captions is among the k nearest captions. Text to
image: a caption is a hit if its image is among the k nearest images. Both as in CLIP_benchmark's
zeroshot_retrieval.py. Ties count as misses: a hit needs fewer than k wrong items that score at
least as high as the best correct one, less TIE. CLIP_benchmark leaves ties to torch.topk; here a
model that gives the same vector to everything has a recall of 0, and neither duplicate images nor
equal captions can raise one.
"""

from dataclasses import dataclass

import numpy as np

from clip_jax.core.types import Array
from clip_jax.core.vectors import to_unit_length

KS = (1, 5, 10)
DIRECTIONS = ('image-to-text', 'text-to-image')
HEADLINE = 'image-to-text recall@1'  # the accuracy of a retrieval benchmark: one hit an image
# Cosines that differ by less are a tie: an encoder gives the same image in two batches vectors that
# differ in their last bits.
TIE = 1e-6
# Scores in memory, 64 MB of float64, in tiles of [images, captions].
TILE = (1024, 8192)
NEVER = np.iinfo(np.int64).max  # the rank of what cannot be found


@dataclass(frozen=True)
class Ranks:
  """Wrong items that score at least as high as the correct one; NEVER if it cannot be found."""

  image: Array  # [n] int64: captions of other images, against the image's best own caption
  caption: Array  # [m] int64: other images, against the caption's own image


def ranks(
  image: Array,  # [n, E] float32; the norm does not matter
  caption: Array,  # [m, E] float32; the norm does not matter
  owner: Array,  # [m] int, not decreasing: the image of each caption
  readable: Array | None = None,  # [n] bool: False for an image without a vector
  has_text: Array | None = None,  # [m] bool: False for an empty caption, which has no vector
  tile: tuple[int, int] = TILE,
) -> Ranks:
  """Returns the rank of each image among captions and of each caption among images, from 0.

  An unreadable image and an empty caption have rank NEVER and compete with nothing; so has a
  caption whose image is unreadable, which still competes. Scores are cosines, summed in float64.
  Memory is that of the vectors and of one tile. Raises ValueError for a vector with NaN.
  """
  image, caption, owner = np.asarray(image), np.asarray(caption), np.asarray(owner)
  readable = np.ones(len(image), bool) if readable is None else np.asarray(readable)
  has_text = np.ones(len(caption), bool) if has_text is None else np.asarray(has_text)
  if image.ndim != 2 or caption.ndim != 2 or image.shape[1] != caption.shape[1]:
    raise ValueError(
      f'image [n, E] and caption [m, E] must agree in E: got {image.shape} and {caption.shape}'
    )
  if owner.shape != caption.shape[:1] or has_text.shape != owner.shape:
    raise ValueError(
      f'owner {owner.shape} and has_text {has_text.shape} must have one value for each of the '
      f'{len(caption)} captions'
    )
  if len(owner) and (owner.min() < 0 or owner.max() >= len(image) or (np.diff(owner) < 0).any()):
    raise ValueError(f'owner must not decrease and must lie in 0..{len(image) - 1}')
  images, captions = np.flatnonzero(readable), np.flatnonzero(has_text)
  found = Ranks(np.full(len(image), NEVER), np.full(len(caption), NEVER))
  if not len(images) or not len(captions):
    return found
  place = np.full(len(image), -1)  # of each image among the readable ones
  place[images] = np.arange(len(images))
  of_image, of_caption = _ranks(
    _unit(image[images], 'image'), _unit(caption[captions], 'caption'), place[owner[captions]], tile
  )
  found.image[images], found.caption[captions] = of_image, of_caption
  return found


def _ranks(
  image: np.ndarray,  # [n, E] float32, unit length
  caption: np.ndarray,  # [m, E] float32, unit length
  owner: np.ndarray,  # [m] int64, -1 for a caption whose image is unreadable
  tile: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:  # [n] int64, [m] int64
  own = np.full(len(caption), -np.inf)  # score of each caption with its own image
  for start in range(0, len(caption), tile[0]):
    part = slice(start, start + tile[0])
    pairs = np.einsum(
      'me,me->m', image[owner[part]].astype(np.float64), caption[part].astype(np.float64)
    )
    own[part] = np.where(owner[part] >= 0, pairs, -np.inf)
  best = np.full(len(image), -np.inf)  # each image's highest score with a caption of its own
  np.maximum.at(best, owner[owner >= 0], own[owner >= 0])
  of_image, of_caption = np.zeros(len(image), np.int64), np.zeros(len(caption), np.int64)
  for top in range(0, len(image), tile[0]):
    rows = slice(top, top + tile[0])
    block = image[rows].astype(np.float64)
    for left in range(0, len(caption), tile[1]):
      columns = slice(left, left + tile[1])
      scores = block @ caption[columns].astype(np.float64).T
      row = owner[columns] - top
      mine = np.flatnonzero((row >= 0) & (row < len(block)))
      scores[row[mine], mine] = -np.inf
      of_image[rows] += (scores >= best[rows, None] - TIE).sum(1)
      of_caption[columns] += (scores >= own[columns] - TIE).sum(0)
  of_image[np.isneginf(best)] = NEVER
  of_caption[np.isneginf(own)] = NEVER
  return of_image, of_caption


def _unit(x: np.ndarray, what: str) -> np.ndarray:
  bad = np.flatnonzero(~(np.isfinite(x).all(1) & x.any(1)))
  if len(bad):
    raise ValueError(f'the vector of {what} {bad[0]} is zero or has NaN or infinite values')
  return to_unit_length(x.astype(np.float32))


def hits(rank: Array, candidates: int) -> dict[int, np.ndarray]:  # [n] int64 -> k -> [n] bool
  """Returns whether each rank is below k, for k of KS.

  candidates: the images that can be found. k as large as that is left out: nearly everything would
  be a hit.
  """
  return {k: np.asarray(rank) < k for k in KS if k < candidates}
