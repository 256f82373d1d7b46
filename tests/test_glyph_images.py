"""The demo's drawings: every font draws every character whole, in contrast to its ground."""

import io
import string

import numpy as np
from PIL import Image
import pytest

from clip_jax.demo import glyph_images


def rng(*seed):
  return np.random.default_rng(seed)


@pytest.mark.parametrize('font', glyph_images.FONTS)
def test_every_font_has_its_own_glyph_for_every_digit_and_letter(font):
  masks = [
    np.asarray(glyph_images._glyph(character, font, 0.0, False, 48))
    for character in string.digits + 'fkmrxyFKMRXY'
  ]
  assert all(mask.any() for mask in masks)
  assert len({mask.tobytes() for mask in masks}) == len(masks)  # a missing glyph is the same box


@pytest.mark.parametrize('style', glyph_images.STYLES)
@pytest.mark.parametrize('image_px', (16, 32, 57))
def test_ink_stays_inside_and_stands_out(style, image_px):
  look = glyph_images.STYLES[style]
  for i, font in enumerate(glyph_images.FONTS):
    mask = glyph_images._glyph(str(i % 10), font, look.stroke[1], look.hollow, 3 * image_px)
    ink = glyph_images._place(mask, look, image_px, rng(image_px, i))
    assert ink.shape == (image_px, image_px)
    assert ink.max() > 0.4
    edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert edge.mean() < 0.1
    image = glyph_images.draw(str(i % 10), font, style, image_px, rng(image_px, i, 1))
    assert image.shape == (image_px, image_px, 3) and image.dtype == np.uint8
    grey = image @ (0.299, 0.587, 0.114)
    assert np.ptp(grey) > 60


def test_outlines_are_hollow():
  def covered(hollow):
    mask = glyph_images._glyph('8', 'DejaVuSans-Bold', 0.04, hollow, 96)
    return np.asarray(mask, float).sum()

  assert covered(True) < 0.75 * covered(False)


def test_grey_value_of_a_colour_is_the_asked_lightness():
  for i in range(50):
    lightness, saturation, hue = rng(i).uniform(size=3)
    colour = glyph_images._colour(lightness, saturation, hue)
    assert colour.min() >= -1e-12 and colour.max() <= 1 + 1e-12
    assert colour @ (0.299, 0.587, 0.114) == pytest.approx(lightness)


def test_light_on_dark_and_dark_on_light():
  def ground(style):
    return np.mean(
      [glyph_images.draw('1', 'cmss10', style, 32, rng(2, i))[::31, ::31] for i in range(20)]
    )

  assert ground('inverted') < 110 < 200 < ground('filled')


def test_handwriting_is_drawn_in_any_style():
  bitmap = np.zeros((8, 8))
  bitmap[1:7, 3:5] = 16
  for style in glyph_images.STYLES:
    image = glyph_images.handwrite(bitmap, style, 32, rng(3))
    assert image.shape == (32, 32, 3)
    assert image.std() > 20


def test_equal_seeds_draw_equal_pixels_and_others_do_not():
  def draw(seed):
    return glyph_images.draw('5', 'cmr10', 'noisy', 32, rng(seed))

  np.testing.assert_array_equal(draw(4), draw(4))
  assert (draw(4) != draw(5)).mean() > 0.5


def test_near_copies_differ_a_little():
  file = glyph_images.encode(glyph_images.draw('5', 'cmr10', 'coloured', 32, rng(6)))

  def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), float)

  for i in range(12):
    difference = np.abs(pixels(glyph_images.near_copy(file, rng(7, i))) - pixels(file))
    assert 0 < difference.mean() < 8
