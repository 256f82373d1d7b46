"""Draws one image of the demo: a character of a font, or a real handwritten digit, as pixels.

Reads the fonts that matplotlib ships (DejaVu, STIX, Computer Modern) and scikit-learn's
load_digits; writes nothing. Each image has continuous jitter of size, place, shape, stroke, shade
and noise from its own generator, so that no two images are near-copies unless they were planted.
"""

import colorsys
import dataclasses
import functools
import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_jax.core.types import Array

# The shipped fonts that hold the ten digits and the Latin letters at their ASCII places (the
# symbol fonts do not: DejaVu*Display, STIXNonUni*, STIXSiz*, cmex10, cmsy10, LastResort). The value
# describes the face, for captions.
FONTS = {
  'DejaVuSans': 'sans serif',
  'DejaVuSans-Bold': 'bold sans serif',
  'DejaVuSans-Oblique': 'italic sans serif',
  'DejaVuSans-BoldOblique': 'bold italic sans serif',
  'DejaVuSansMono': 'monospaced',
  'DejaVuSansMono-Bold': 'bold monospaced',
  'DejaVuSansMono-Oblique': 'italic monospaced',
  'DejaVuSansMono-BoldOblique': 'bold italic monospaced',
  'DejaVuSerif': 'serif',
  'DejaVuSerif-Bold': 'bold serif',
  'DejaVuSerif-Italic': 'italic serif',
  'DejaVuSerif-BoldItalic': 'bold italic serif',
  'STIXGeneral': 'serif',
  'STIXGeneralBol': 'bold serif',
  'STIXGeneralItalic': 'italic serif',
  'STIXGeneralBolIta': 'bold italic serif',
  'cmb10': 'bold serif',
  'cmmi10': 'old style serif',
  'cmr10': 'serif',
  'cmss10': 'sans serif',
  'cmti10': 'italic serif',
  'cmtt10': 'monospaced typewriter',
}

SUPERSAMPLING = 3  # masks are placed on a canvas this much finer, then averaged down


@dataclasses.dataclass(frozen=True)
class Style:
  """How a character is painted. A range is drawn from uniformly; lightness is in 0..1."""

  ground: tuple[float, float] = (0.82, 1.0)  # lightness
  ink: tuple[float, float] = (0.0, 0.3)  # lightness
  swapped: float = 0.0  # share of images in which ground and ink change places
  saturation: tuple[float, float] = (0.0, 0.12)  # of both
  shade: float = 0.1  # the ground gets at most so much lighter from its middle to an edge
  noise: tuple[float, float] = (0.01, 0.03)  # standard deviation of a pixel
  stroke: tuple[float, float] = (0.0, 0.018)  # added width around the glyph, in canvas heights
  hollow: bool = False  # only that added stroke is painted
  angle: tuple[float, float] = (0.0, 5.0)  # degrees, to either side
  fill: tuple[float, float] = (0.82, 0.94)  # share of the canvas that the longer side takes
  drift: float = 0.2  # at most so far from the middle, in shares of the free room
  stretch: float = 0.08  # at most so much wider or narrower


# Light on dark varies most in place and shape: centred on the mean image, which is light, any two
# dark images are alike, and would be near-copies to an embedder otherwise.
STYLES = {
  'clean': Style(shade=0.04, angle=(0.0, 2.0), fill=(0.84, 0.92), drift=0.1, stretch=0.04),
  'filled': Style(),
  'outline': Style(ink=(0.0, 0.25), stroke=(0.035, 0.055), hollow=True),
  'inverted': Style(
    ground=(0.8, 1.0),
    ink=(0.08, 0.42),
    swapped=1.0,
    shade=0.3,
    fill=(0.68, 0.94),
    drift=0.4,
    stretch=0.2,
  ),
  'coloured': Style(
    ground=(0.8, 1.0),
    ink=(0.1, 0.45),
    swapped=0.5,
    saturation=(0.5, 1.0),
    shade=0.3,
    fill=(0.72, 0.94),
    drift=0.35,
    stretch=0.15,
  ),
  'rotated': Style(angle=(25.0, 60.0)),  # at most 60 degrees, or a 6 would be read as a 9
  'noisy': Style(noise=(0.08, 0.14)),
  'handwriting': Style(
    ink=(0.0, 0.35), shade=0.04, angle=(0.0, 2.0), fill=(0.84, 0.92), stretch=0.04
  ),
}


@functools.cache
def _font(name: str, height_px: int) -> ImageFont.FreeTypeFont:
  import matplotlib  # costs a moment to import, and only its data folder is wanted

  path = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{name}.ttf')
  # Single characters need no text shaping, and Raqm is not in every build of Pillow.
  return ImageFont.truetype(str(path), height_px, layout_engine=ImageFont.Layout.BASIC)


def _glyph(character: str, font: str, stroke: float, hollow: bool, canvas_px: int) -> Image.Image:
  """The character as a mode 'L' mask; `stroke` is in heights of the canvas."""
  face = _font(font, canvas_px)
  mask = Image.new('L', (3 * canvas_px // 2, 3 * canvas_px // 2))
  pen = ImageDraw.Draw(mask)
  start = (canvas_px // 4, canvas_px // 4)
  pen.text(start, character, 255, face, stroke_width=stroke * canvas_px)
  if hollow:
    pen.text(start, character, 0, face)
  return mask


def _place(mask: Image.Image, look: Style, image_px: int, rng) -> Array:
  """Turns, shears, stretches and shifts a mask at random. Returns the ink, [S, S] float in 0..1.

  The whole ink stays inside the canvas: the turned box is scaled to fit before it is shifted.
  """
  canvas_px = SUPERSAMPLING * image_px
  mask = mask.crop(mask.getbbox())
  size = np.array(mask.size)
  mask = ImageOps.expand(mask, 1)  # so that the edge of the ink is smooth too
  turn = np.radians(rng.uniform(*look.angle)) * (2 * rng.integers(2) - 1)
  cos, sin = np.cos(turn), np.sin(turn)
  wider, lean = rng.uniform(-look.stretch, look.stretch), rng.uniform(-0.1, 0.1)
  forward = np.array([[cos, -sin], [sin, cos]]) @ [[1 + wider, lean], [0, 1]]  # mask to canvas
  extent = np.abs(forward) @ size  # of the turned box
  forward *= rng.uniform(*look.fill) * canvas_px / extent.max()
  room = canvas_px - np.abs(forward) @ size
  centre = canvas_px / 2 + rng.uniform(-look.drift, look.drift, 2) * room
  back = np.linalg.inv(forward)
  shift = (size / 2 + 1) - back @ centre
  placed = mask.transform(
    (canvas_px, canvas_px),
    Image.Transform.AFFINE,
    (*back[0], shift[0], *back[1], shift[1]),
    Image.Resampling.BICUBIC,
  )
  return np.asarray(placed.reduce(SUPERSAMPLING), np.float32) / 255


def _colour(lightness: float, saturation: float, hue: float) -> Array:
  """A colour of about the given grey value, [3] float."""
  colour = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0))
  grey = colour @ (0.299, 0.587, 0.114)
  if lightness < grey:
    return colour * lightness / grey
  return 1 - (1 - colour) * (1 - lightness) / (1 - grey)


def _paint(mask: Array, look: Style, rng) -> Array:
  """Paints a mask, [S, S] float in 0..1, on a softly shaded ground. Returns [S, S, 3] uint8."""
  ground, ink = (
    _colour(rng.uniform(*lightness), rng.uniform(*look.saturation), rng.uniform())
    for lightness in (look.ground, look.ink)
  )
  if rng.random() < look.swapped:
    ground, ink = ink, ground
  across = np.linspace(-1, 1, len(mask))
  right, down = rng.uniform(-look.shade, look.shade, 2)
  shade = right * across + down * across[:, None]
  noise = rng.normal(0, rng.uniform(*look.noise), mask.shape)
  image = ground + mask[..., None] * (ink - ground) + (shade + noise)[..., None]
  return _to_uint8(image)


def draw(character: str, font: str, style: str, image_px: int, rng) -> Array:
  """Draws a character of a font (a key of FONTS) in a style (a key of STYLES): [S, S, 3] uint8."""
  look = STYLES[style]
  mask = _glyph(character, font, rng.uniform(*look.stroke), look.hollow, SUPERSAMPLING * image_px)
  return _paint(_place(mask, look, image_px, rng), look, rng)


def handwrite(bitmap: Array, style: str, image_px: int, rng) -> Array:
  """Draws a handwritten digit, [8, 8] in 0..16 as in load_digits, in a style: [S, S, 3] uint8."""
  look = STYLES[style]
  mask = Image.fromarray(_to_uint8(bitmap / 16))
  return _paint(_place(mask, look, image_px, rng), look, rng)


def near_copy(file: bytes, rng) -> bytes:
  """Returns an image file as a careless re-upload has it: through a JPEG, moved, or darkened."""
  image = Image.open(io.BytesIO(file))
  pixels = np.asarray(image) / 255
  change = rng.integers(3)
  if change == 0:
    jpeg = io.BytesIO()
    image.save(jpeg, 'JPEG', quality=int(rng.integers(88, 96)), subsampling=0)
    pixels = np.asarray(Image.open(jpeg)) / 255
  elif change == 1:
    moved = np.pad(pixels, ((0, 0), (1, 0), (0, 0)), 'edge')[:, :-1]
    pixels = pixels + rng.uniform(0.05, 0.1) * (moved - pixels)  # by that share of a pixel
  else:
    pixels = pixels * rng.uniform(0.98, 0.99)
  return encode(_to_uint8(pixels))


def encode(image: Array) -> bytes:
  """Returns the bytes of the PNG file of an image, [S, S, 3] uint8."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG', compress_level=1)  # noise does not shrink with more
  return file.getvalue()


def _to_uint8(image: Array) -> Array:
  """Rounds an image in 0..1 to 0..255."""
  return np.floor(image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
