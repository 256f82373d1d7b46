"""Draws one image of the demo: a printed character, or a real handwritten digit.

Reads the fonts in matplotlib (DejaVu, STIX, Computer Modern); writes no files. Every image has
continuous jitter of size, position, shape, stroke, shade and noise from its own generator, so only
planted copies are near-copies.
"""

import colorsys
import dataclasses
import functools
import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_jax.core.types import Array

# Fonts with digits and Latin letters at their ASCII codes -> words for captions. The other fonts of
# matplotlib lack them: DejaVu*Display, STIXNonUni*, STIXSiz*, cmex10, cmsy10, LastResort.
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

SUPERSAMPLING = 3  # masks are placed on a canvas this many times finer, then averaged


@dataclasses.dataclass(frozen=True)
class Style:
  """Parameters of the drawing of a character. A range (lo, hi) is sampled uniformly."""

  ground: tuple[float, float] = (0.82, 1.0)  # lightness in 0..1
  ink: tuple[float, float] = (0.0, 0.3)  # lightness in 0..1
  swapped: float = 0.0  # fraction of images with ground and ink swapped
  saturation: tuple[float, float] = (0.0, 0.12)  # of ground and ink
  shade: float = 0.1  # maximum change of lightness from the centre of the ground to an edge
  noise: tuple[float, float] = (0.01, 0.03)  # standard deviation of a pixel's lightness
  stroke: tuple[float, float] = (0.0, 0.018)  # width added around the glyph, in canvas heights
  hollow: bool = False  # True: only the added stroke is painted
  angle: tuple[float, float] = (0.0, 5.0)  # rotation in degrees, to either side
  fill: tuple[float, float] = (0.82, 0.94)  # longer side of the glyph, as a fraction of the canvas
  drift: float = 0.2  # maximum shift from the centre, as a fraction of the free space
  stretch: float = 0.08  # maximum relative change of the width


# Inverted images vary most in position and shape. PCA subtracts the mean image, which is light;
# without this variation any two dark images would be near-copies to the embedder.
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
  'rotated': Style(angle=(25.0, 60.0)),  # over 60 degrees a 6 would look like a 9
  'noisy': Style(noise=(0.25, 0.35)),
  'handwriting': Style(
    ink=(0.0, 0.35), shade=0.04, angle=(0.0, 2.0), fill=(0.84, 0.92), stretch=0.04
  ),
}


@functools.cache
def _font(name: str, height_px: int) -> ImageFont.FreeTypeFont:
  import matplotlib  # slow to import; only its data folder is needed

  path = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{name}.ttf')
  # BASIC: single characters need no text shaping, and not every build of Pillow has Raqm.
  return ImageFont.truetype(str(path), height_px, layout_engine=ImageFont.Layout.BASIC)


def _glyph(character: str, font: str, stroke: float, hollow: bool, canvas_px: int) -> Image.Image:
  """Returns the character as a mask of mode 'L'. `stroke`: added width, in canvas heights."""
  face = _font(font, canvas_px)
  mask = Image.new('L', (3 * canvas_px // 2, 3 * canvas_px // 2))
  pen = ImageDraw.Draw(mask)
  start = (canvas_px // 4, canvas_px // 4)
  pen.text(start, character, 255, face, stroke_width=stroke * canvas_px)
  if hollow:
    pen.text(start, character, 0, face)
  return mask


def _place(mask: Image.Image, look: Style, image_px: int, rng) -> Array:
  """Rotates, shears, stretches and shifts a mask at random; returns [S, S] float32 in 0..1.

  The character stays inside the canvas: its rotated box is scaled to fit before the shift.
  """
  canvas_px = SUPERSAMPLING * image_px
  mask = mask.crop(mask.getbbox())
  size = np.array(mask.size)
  mask = ImageOps.expand(mask, 1)  # for a smooth edge of the ink
  turn = np.radians(rng.uniform(*look.angle)) * (2 * rng.integers(2) - 1)
  cos, sin = np.cos(turn), np.sin(turn)
  wider, lean = rng.uniform(-look.stretch, look.stretch), rng.uniform(-0.1, 0.1)
  forward = np.array([[cos, -sin], [sin, cos]]) @ [[1 + wider, lean], [0, 1]]  # mask to canvas
  extent = np.abs(forward) @ size  # of the rotated box
  forward *= rng.uniform(*look.fill) * canvas_px / extent.max()
  margin = canvas_px - np.abs(forward) @ size
  centre = canvas_px / 2 + rng.uniform(-look.drift, look.drift, 2) * margin
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
  """Returns a colour [3] float in 0..1 whose grey value is the given lightness."""
  colour = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0))
  grey = colour @ (0.299, 0.587, 0.114)
  if lightness < grey:
    return colour * lightness / grey
  return 1 - (1 - colour) * (1 - lightness) / (1 - grey)


def _paint(mask: Array, look: Style, rng) -> Array:
  """Paints a mask [S, S], float in 0..1, on a shaded ground; returns [S, S, 3] uint8."""
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
  """Returns a drawn character, [S, S, 3] uint8. font: a key of FONTS; style: a key of STYLES."""
  look = STYLES[style]
  mask = _glyph(character, font, rng.uniform(*look.stroke), look.hollow, SUPERSAMPLING * image_px)
  return _paint(_place(mask, look, image_px, rng), look, rng)


def handwrite(bitmap: Array, style: str, image_px: int, rng) -> Array:
  """Returns a handwritten digit in a style, [S, S, 3] uint8. bitmap: [8, 8] in 0..16."""
  look = STYLES[style]
  mask = Image.fromarray(_to_uint8(bitmap / 16))
  return _paint(_place(mask, look, image_px, rng), look, rng)


def near_copy(file: bytes, rng) -> bytes:
  """Returns a PNG that differs as a re-upload would: JPEG-compressed, shifted, or darkened."""
  image = Image.open(io.BytesIO(file))
  pixels = np.asarray(image) / 255
  change = rng.integers(3)
  if change == 0:
    jpeg = io.BytesIO()
    image.save(jpeg, 'JPEG', quality=int(rng.integers(88, 96)), subsampling=0)
    pixels = np.asarray(Image.open(jpeg)) / 255
  elif change == 1:
    moved = np.pad(pixels, ((0, 0), (1, 0), (0, 0)), 'edge')[:, :-1]
    pixels = pixels + rng.uniform(0.05, 0.1) * (moved - pixels)  # a shift by a fraction of a pixel
  else:
    pixels = pixels * rng.uniform(0.98, 0.99)
  return encode(_to_uint8(pixels))


def encode(image: Array) -> bytes:
  """Returns an image [S, S, 3] uint8 as the bytes of a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG', compress_level=1)  # more would not shrink noise
  return file.getvalue()


def _to_uint8(image: Array) -> Array:
  """Returns an image in 0..1 as uint8, rounded."""
  return np.floor(image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
