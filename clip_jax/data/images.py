"""Bytes of an image file -> pixels, resized and cropped as open_clip does (Pillow, bicubic).

As in open_clip's own data pipelines (webdataset, image folders), an image is RGB before anything
else: its transforms on a file's palette or alpha channel would give other pixels.
"""

import io
import math

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

from clip_jax.core.types import Array

# Of what Pillow opens: some formats start other programs, and image sets are made of these.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')
MODES = ('shortest', 'squash')
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop, torchvision's default
_TRIES = 10    # draws of a crop before the centre is taken, torchvision's
_LONGEST = 64  # long side / short side: of what is longer only the centre is made, to save memory


class UnreadableImage(ValueError):
  """An image that cannot be decoded: damaged, cut short, of no known format, or too large."""


def decode(data: bytes) -> Array:
  """Returns the pixels [H, W, 3] uint8, read-only, as open_clip sees them: EXIF is not applied.

  Palettes, greys, CMYK, alpha and 16 bits become RGB as Pillow's convert makes them. Raises
  UnreadableImage; for an image over Pillow's MAX_IMAGE_PIXELS before it takes memory.
  """
  return _opened(data, lambda image: np.asarray(image.convert('RGB')))


def header_size(data: bytes) -> tuple[int, int]:
  """Returns (width, height) in pixels from the first bytes of an image; raises UnreadableImage."""
  return _opened(data, lambda image: image.size)


def resize(image: Array,  # [H, W, 3] uint8
           size: int, mode: str = 'shortest') -> Array:  # [S, S, 3] uint8
  """Resizes for evaluation: 'shortest', the short side to `size`, then the centre; or 'squash'."""
  if mode not in MODES:
    raise ValueError(f'resize mode must be one of {MODES}, got {mode!r}')
  height, width = image.shape[:2]
  if mode == 'squash':
    return _bicubic(image, size, size)
  short = min(height, width)
  new_height, new_width = size * height // short, size * width // short
  top, left = round((new_height - size) / 2), round((new_width - size) / 2)
  if max(height, width) <= _LONGEST * short:
    return _bicubic(image, new_height, new_width)[top:top + size, left:left + size]
  x, y = (left * width / new_width, top * height / new_height)  # the same part, before resizing
  across = Image.fromarray(image).resize(
      (size, height), Image.Resampling.BICUBIC, (x, 0, x + size * width / new_width, height))
  return np.asarray(across.resize(
      (size, size), Image.Resampling.BICUBIC, (0, y, size, y + size * height / new_height)))


def random_resized_crop(image: Array,  # [H, W, 3] uint8
                        size: int, scale: tuple[float, float],
                        rng: np.random.Generator) -> Array:  # [S, S, 3] uint8
  """Crops a random part, `scale` of the area, and resizes it, as torchvision's RandomResizedCrop.

  Takes the same number of draws from rng whatever the image.
  """
  height, width = image.shape[:2]
  for area, ratio, top, left in rng.random((_TRIES, 4)).tolist():
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio  # uniform in its logarithm
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
      return _bicubic(image[y:y + h, x:x + w], size, size)
  w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
  y, x = (height - h) // 2, (width - w) // 2
  return _bicubic(image[y:y + h, x:x + w], size, size)


def _opened(data: bytes, read):
  """Returns read(image) of the image in `data`; whatever fails on the way is an UnreadableImage."""
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f'{image.width} x {image.height} pixels are too many')
      return read(image)
  except (UnreadableImage, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise UnreadableImage('not an image of a known format') from error
  except Exception as error:  # on damaged files Pillow's readers raise a dozen different types
    raise UnreadableImage(f'{type(error).__name__}: {error}') from error


def _bicubic(image: Array, height: int, width: int) -> Array:  # [H, W, 3] -> [height, width, 3]
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
