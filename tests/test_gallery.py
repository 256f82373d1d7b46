"""Thumbnails that live in the page, and the choice of what is shown."""

import base64
import io

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image

from clip_jax.reporting import gallery


def decoded(picture):
  head, data = picture.source.split(',', 1)
  return head, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_images_keep_every_pixel():
  image = np.random.default_rng(0).integers(0, 256, (28, 20, 3), np.uint8)
  picture = gallery.picture(image, '0.9', 'a seven')
  head, shown = decoded(picture)
  assert head == 'data:image/png;base64' and picture.pixels
  np.testing.assert_array_equal(np.asarray(shown), image)


def test_large_images_are_shrunk_and_keep_their_shape():
  picture = gallery.picture(np.zeros((300, 900, 3), np.uint8))
  head, shown = decoded(picture)
  assert head == 'data:image/jpeg;base64' and not picture.pixels
  assert shown.size == (192, 64)


def test_unreadable_images_have_no_source():
  assert gallery.picture(None, 'line', 'caption').source == ''


@given(st.lists(st.floats(-1, 1) | st.just(float('nan')), max_size=30), st.integers(0, 9))
def test_thirds_are_different_ordered_and_as_many_as_asked(values, count):
  values = np.array(values)
  thirds = gallery.pick_thirds(values, count)
  chosen = np.concatenate(thirds)
  assert len(chosen) == min(count, np.isfinite(values).sum()) == len(set(chosen.tolist()))
  picked = values[chosen]
  assert np.isfinite(picked).all() and (np.diff(picked) <= 0).all()
  if len(chosen):
    assert picked[0] == np.nanmax(values)
  if count > 2 and len(chosen) > 2:
    assert picked[-1] == np.nanmin(values)


def test_thirds_are_the_ends_and_the_middle():
  thirds = gallery.pick_thirds(np.linspace(0, 1, 101), 6)
  assert [part.tolist() for part in thirds] == [[100, 99], [51, 50], [1, 0]]
  assert [len(part) for part in gallery.pick_thirds(np.array([0.5, 0.7]), 9)] == [1, 1, 0]


def test_evenly_spaced_rows_reach_both_ends():
  assert gallery.pick_evenly(np.arange(100), 3).tolist() == [0, 50, 99]
  assert gallery.pick_evenly(np.array([4, 7]), 9).tolist() == [4, 7]
  assert gallery.pick_evenly(np.zeros(0, int), 4).tolist() == []


def test_a_very_long_caption_is_cut():
  assert len(gallery.picture(None, caption='word ' * 3000).caption) == gallery.LONGEST + 1
  assert gallery.picture(None, caption='a photo').caption == 'a photo'


def test_pictures_of_a_full_page_are_smaller_and_then_left_out():
  (large, side), (most, small) = gallery.SIDES
  sides = [gallery.side_after(n) for n in (0, large - 1, large, most - 1, most, 10 * most)]
  assert sides == [side, side, small, small, 0, 0]
  image = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
  assert 'image/png' in gallery.picture(image, side=side).source
  assert 'image/jpeg' in gallery.picture(image, side=small).source
  empty = gallery.left_out('0.9', 'x' * 1000, True)
  assert empty.source == '' and empty.missing == 'left out' and len(empty.caption) == 301
