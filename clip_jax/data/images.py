"""Decodes image files, and resizes and crops them as open_clip does (Pillow, bicubic).

As in open_clip's data pipelines (webdataset, image folders), an image is converted to RGB first:
transforms of a palette or an alpha channel would give other pixels. simplejpeg decodes usual JPEGs
to the same pixels as Pillow in less than half the time. If it finds any fault, Pillow reads the
file, and its result counts.
"""

from collections.abc import Callable, Iterator
import functools
import io
import math
import os
import struct
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features
import simplejpeg

from clip_jax.core.types import Array

# Allowed formats of Pillow: those of image datasets. Some other formats start external programs.
# AVIF is built into Pillow from 11.3 on.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM') + (
  ('AVIF',) if 'avif' in features.modules and features.check('avif') else ()
)
MAX_MEGAPIXELS = 179  # of an image: twice Pillow's own limit, from where on Pillow reads no image
_MAX_MEGAPIXELS = 'CLIP_JAX_MAX_MEGAPIXELS'  # an environment variable, because processes inherit it
MODES = ('shortest', 'squash')
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop, torchvision's default
_TRIES = 10  # draws of a crop before the centre is taken; torchvision's default
_LONGEST = 64  # long side / short side; of longer images only the centre is resized, to save memory
_MOST_SIDE = 1 << 24  # pixels; Pillow allocates whole rows, and a longer row may be too large
_MOST_SCANS = 500  # in a JPEG; each costs a pass over all its pixels
_SHRINKS = (8, 4, 2)  # factors by which a JPEG can be shrunk while it is decoded

# Some builds of Pillow use another JPEG library than simplejpeg's; then the pixels can differ.
_SAME_LIBRARY = features.check_feature('libjpeg_turbo')
_SOS, _DQT, _APPS = 0xFFDA, 0xFFDB, range(0xFFE0, 0xFFF0)  # JPEG markers
JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended, progressive
JPEG_FRAME = struct.Struct('>BHHB')  # bits, height, width, layers
_SCAN = b'\xff\xda'  # _SOS in a file
_SCAN_BYTES = 14  # its segment of three layers
_HEAD_BYTES = 1024  # in which it is looked for
_SEGMENT = struct.Struct('>HH')  # marker, length
# The last three: Huffman tables, restart interval, comment.
_KNOWN = frozenset([*JPEG_FRAMES, _SOS, _DQT, *_APPS, 0xFFC4, 0xFFDD, 0xFFFE])
_SAMPLINGS = {
  (0x11, 0x11, 0x11),  # 4:4:4
  (0x21, 0x11, 0x11),  # 4:2:2
  (0x22, 0x11, 0x11),  # 4:2:0
  (0x12, 0x11, 0x11),  # 4:4:0
  (0x41, 0x11, 0x11),  # 4:1:1
  (0x11,),  # grey
  (0x22,),  # grey
}


class UnreadableImage(ValueError):
  """An image that cannot be decoded: damaged, truncated, of unknown format, or too large."""


class _Frame(NamedTuple):
  """The size of a JPEG; plain: usual quantisation tables, no application segments but JFIF's."""

  height: int
  width: int
  plain: bool


def decode(data: bytes) -> Array:
  """Returns the pixels [H, W, 3] uint8, read-only, like open_clip: EXIF rotation is not applied.

  Palettes, greys, CMYK, alpha and 16-bit colours become RGB with Pillow's convert. 16-bit greys
  (PNG, TIFF, PGM) are scaled to 8 bits, value / 257 rounded; in open_clip, Pillow's convert makes
  every value over 255 white. TIFFs of 32-bit integers or floats have no fixed range and are left to
  Pillow's convert. Raises UnreadableImage; for an image over Pillow's MAX_IMAGE_PIXELS, which
  `limit_megapixels` sets, before memory is allocated.
  """
  return _decode(data, lambda height, width: 1)[0]


def limit_megapixels(most: float) -> None:
  """Sets the size over which an image counts as unreadable, here and in processes started later.

  It is Pillow's own limit, Image.MAX_IMAGE_PIXELS, of this process.
  """
  os.environ[_MAX_MEGAPIXELS] = str(most)
  Image.MAX_IMAGE_PIXELS = int(most * 1_000_000)


limit_megapixels(float(os.environ.get(_MAX_MEGAPIXELS, MAX_MEGAPIXELS)))


def decode_crop(
  data: bytes, size: int, scale: tuple[float, float], rng: np.random.Generator, shrink: float = 0.0
) -> Array:  # [S, S, 3] uint8
  """Returns random_resized_crop(decode(data), size, scale, rng); draws before reading the data.

  With `shrink` of 1 or more, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides of the
  crop then still have shrink * size pixels. Measured on synthetic photographs, with shrink = 1, 1.5
  and 2: 1024 x 768 to 64 pixels took 0.33, 0.41 and 0.42 of the time, and crops differed by 1.3,
  0.5 and 0.4 grey levels in the mean, 21, 13 and 13 at most; 1024 x 768 to 224 pixels took 0.56 of
  the time with 1 and 1.5 (0.6 in the mean, 9 at most); 400 x 350 to 224 pixels is never shrunk.
  """
  draws = rng.random((_TRIES, 4))

  def factor(height: int, width: int) -> int:
    if not shrink:
      return 1
    least = min(_crop_box(height, width, scale, draws)[2:])
    return next((f for f in _SHRINKS if least >= f * shrink * size), 1)

  image, height, width = _decode(data, factor)
  box = _crop_box(height, width, scale, draws)
  shrunk = 1 if image.shape[:2] == (height, width) else factor(height, width)
  top, left, h, w = (side / shrunk for side in box) if shrunk > 1 else box
  return _bicubic(image, size, size, (top, left, h, w))


def header(data: bytes) -> tuple[str, int, int]:
  """Returns (type, width, height) from the first bytes of an image; raises UnreadableImage.

  type: 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tiff', 'ppm' or 'avif'.
  """
  kind, width, height = _with_open_image(data, lambda image: (image.format or '', *image.size))
  return 'jpeg' if kind == 'MPO' else kind.lower(), width, height


def is_grey16(data: bytes) -> bool:
  """Returns whether the first bytes of an image say that it is a 16-bit greyscale image."""
  return _with_open_image(data, _is_grey16)


def resize(
  image: Array,  # [H, W, 3] uint8
  size: int,
  mode: str = 'shortest',
) -> Array:  # [S, S, 3] uint8
  """Resizes for evaluation: 'shortest' crops the centre, 'squash' changes the aspect ratio.

  'shortest' resizes the short side to `size` before the crop; 'squash' resizes both sides.
  'squash_bilinear', which no config key names, is for embedders that were trained with it.
  """
  if mode == 'squash_bilinear':
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
  if mode not in MODES:
    raise ValueError(f'resize mode must be one of {MODES}, got {mode!r}')
  height, width = image.shape[:2]
  if mode == 'squash':
    return _bicubic(image, size, size)
  short = min(height, width)
  new_height, new_width = size * height // short, size * width // short
  top, left = round((new_height - size) / 2), round((new_width - size) / 2)
  if max(height, width) <= _LONGEST * short:
    return _bicubic(image, new_height, new_width)[top : top + size, left : left + size]
  x, y = (left * width / new_width, top * height / new_height)  # the crop in the original image
  across = Image.fromarray(image).resize(
    (size, height), Image.Resampling.BICUBIC, (x, 0, x + size * width / new_width, height)
  )
  return np.asarray(
    across.resize(
      (size, size), Image.Resampling.BICUBIC, (0, y, size, y + size * height / new_height)
    )
  )


def random_resized_crop(
  image: Array,  # [H, W, 3] uint8
  size: int,
  scale: tuple[float, float],
  rng: np.random.Generator,
) -> Array:  # [S, S, 3] uint8
  """Crops a random part, `scale` of the area, and resizes it, as torchvision's RandomResizedCrop.

  The number of draws from rng is the same for every image.
  """
  height, width, _ = image.shape
  box = _crop_box(height, width, scale, rng.random((_TRIES, 4)))
  return _bicubic(image, size, size, box)


def _crop_box(
  height: int, width: int, scale: tuple[float, float], draws: Array
) -> tuple[int, int, int, int]:  # top, left, height, width
  for draw in draws:  # usually the first fits
    area, ratio, top, left = draw.tolist()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio  # uniform in its logarithm
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
  return (height - h) // 2, (width - w) // 2, h, w


def _decode(data: bytes, factor: Callable[[int, int], int]) -> tuple[Array, int, int]:
  """Returns (pixels, height, width); height and width are those before a JPEG was shrunk.

  factor(height, width): 1, 2, 4 or 8, by which the sides of a JPEG are divided.
  """
  many = data[:2] == b'\xff\xd8' and data.count(b'\xff') > _MOST_SCANS  # one byte is found sooner
  if many and data.count(_SCAN) > _MOST_SCANS:
    raise UnreadableImage('too many scans')
  frame = _jpeg_frame(data)
  if frame and frame.plain:
    _check_size(frame.height, frame.width)
    pixels = _fast(data, frame, factor(frame.height, frame.width))
    if pixels is not None:
      return pixels, frame.height, frame.width

  def read(image: Image.Image) -> tuple[Array, int, int]:
    width, height = image.size
    shrunk, pixels = factor(height, width), None
    if frame and not frame.plain and (frame.height, frame.width) == (height, width):
      pixels = _fast(data, frame, shrunk)
    if pixels is None:
      if shrunk > 1:
        image.draft(None, (width // shrunk, height // shrunk))
      if _is_grey16(image):
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        image = Image.fromarray(grey)
      pixels = np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))
    return pixels, height, width

  return _with_open_image(data, read)


def _fast(data: bytes, frame: _Frame, shrunk: int) -> Array | None:
  """Returns the pixels of a JPEG, or None if simplejpeg finds any fault in it."""
  shape = -(-frame.height // shrunk), -(-frame.width // shrunk), 3
  least: Any = dict(min_height=shape[0], min_width=shape[1]) if shrunk > 1 else {}
  try:
    pixels = simplejpeg.decode_jpeg(data, **least)
  except ValueError:
    return None
  pixels.flags.writeable = False
  return pixels if pixels.shape == shape else None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields (marker, start of the content, end) of a JPEG's segments, up to the first scan's header.

  `data` has at least 6 bytes of each content. Ends early at a marker that usual files do not have.
  """
  at, marker = 2, 0
  while marker != _SOS and at + 10 <= len(data):
    marker, length = _SEGMENT.unpack_from(data, at)
    if marker not in _KNOWN or length < 2:
      break
    yield marker, at + 4, at + 2 + length
    at += 2 + length


def _jpeg_frame(data: bytes) -> _Frame | None:
  """Returns the frame of a JPEG that simplejpeg decodes like Pillow, else None."""
  if data[:2] != b'\xff\xd8' or not _SAME_LIBRARY:
    return None
  head = data[: data.find(_SCAN, 0, _HEAD_BYTES) + _SCAN_BYTES]
  return _frame_of_head(head) or _walk_to_frame(data)  # _SCAN may lie in another segment


def _walk_to_frame(data: bytes) -> _Frame | None:
  frame, plain = None, True
  for marker, start, end in jpeg_segments(data):
    if marker == _SOS:
      return frame._replace(plain=plain) if frame and end <= len(data) else None
    if marker in JPEG_FRAMES:
      bits, height, width, count = JPEG_FRAME.unpack_from(data, start)
      samplings = tuple(data[start + 7 : end : 3])
      if (
        bits != 8
        or end - start != 6 + 3 * count
        or samplings not in _SAMPLINGS
        or not height * width
      ):
        return None
      frame = _Frame(height, width, plain)
    elif marker == _DQT:
      plain &= not (end - start) % 65 and max(data[start:end:65], default=0) < 16
    elif marker in _APPS:
      plain &= marker == _APPS[0] and end - start == 14 and data[start : start + 5] == b'JFIF\0'
  return None


_frame_of_head = functools.lru_cache(256)(_walk_to_frame)  # small images often share their head


def _is_grey16(image: Image.Image) -> bool:
  """Returns whether an image has greys of 0 to 65,535.

  Pillow's mode 'I' holds 32 bits; of a PNG or a PGM they are 16-bit values.
  """
  return image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))


def _check_size(height: int, width: int) -> None:
  over = Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS
  if over or max(height, width) > _MOST_SIDE:
    raise UnreadableImage(f'{width} x {height} pixels are too many')


def _with_open_image(data: bytes, read: Callable[[Image.Image], Any]) -> Any:
  """Returns read(image) of the image in `data`; turns every failure into UnreadableImage."""
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      _check_size(image.height, image.width)
      return read(image)
  except (UnreadableImage, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise UnreadableImage('not an image of a known format') from error
  except Exception as error:  # Pillow raises a dozen different types for damaged files
    raise UnreadableImage(f'{type(error).__name__}: {error}') from error


def _bicubic(
  image: Array,  # [H, W, 3] uint8
  height: int,
  width: int,
  box: tuple[float, float, float, float] | None = None,
) -> Array:  # [height, width, 3] uint8
  """Resizes an image, or its part at box=(top, left, height, width)."""
  top, left, h, w = box or (0, 0, *image.shape[:2])
  y, x = math.floor(top), math.floor(left)
  rows, columns = math.ceil(top + h) - y, math.ceil(left + w) - x
  if (rows, columns) == (h, w) == (height, width):
    return image[y : y + rows, x : x + columns]
  row = 3 * image.shape[1]  # bytes; with this stride, Pillow reads the part without a copy
  pixels = np.ascontiguousarray(image).data.cast('B')[y * row + 3 * x :]
  part = Image.new('RGB', (columns, rows), None)  # not initialised, unlike Image.frombytes's
  part.frombytes(pixels, 'raw', 'RGB', row, 1)
  inner = left - x, top - y, left - x + w, top - y + h
  resized = part.resize((width, height), Image.Resampling.BICUBIC, inner)
  return np.frombuffer(resized.tobytes(), np.uint8).reshape(height, width, 3)
