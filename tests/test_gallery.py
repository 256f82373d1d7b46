"""Thumbnails that live in the page, and the choice of what is shown."""

import base64
import io

import numpy as np
from hypothesis import given, strategies as st
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
def test_picked_queries_are_different_ordered_and_as_many_as_asked(similarity, count):
  similarity = np.array(similarity)
  picked = gallery.pick_queries(similarity, count)
  queries = [q for _, q in picked]
  assert len(picked) == min(count, np.isfinite(similarity).sum()) == len(set(queries))
  values = similarity[queries]
  assert np.isfinite(values).all() and (np.diff(values) <= 0).all()
  if picked:
    assert values[0] == np.nanmax(similarity)
  if count > 2 and len(picked) > 2:
    assert values[-1] == np.nanmin(similarity)


def test_picked_queries_are_named_in_thirds():
  picked = gallery.pick_queries(np.linspace(0, 1, 101), 6)
  assert [word for word, _ in picked
         ] == ['most similar'] * 2 + ['median'] * 2 + ['least similar'] * 2
  assert [q for _, q in picked] == [100, 99, 51, 50, 1, 0]


def test_quantiles_reach_both_ends():
  assert gallery.pick_quantiles(np.arange(100.0), 3) == [99, 49, 0] or gallery.pick_quantiles(
      np.arange(100.0), 3) == [99, 50, 0]
  assert gallery.pick_quantiles(np.array([1.0, 3.0, 2.0]), 9) == [1, 2, 0]
  assert gallery.pick_quantiles(np.zeros(0), 4) == []


def test_telling_words_are_those_of_removed_captions():
  removed = ['a sketch of a dog', 'Sketch: dog', 'pencil sketch, cat'] * 3
  kept = ['a photo of a dog', 'photo cat', 'photo of a dog'] * 3
  words = gallery.telling_words(removed, kept)
  assert words[0] == ('sketch', 1.0, 0.0)
  assert 'photo' not in [word for word, *_ in words]
  assert all(gone > stay for _, gone, stay in words)
  assert gallery.telling_words([], kept) == gallery.telling_words(removed, []) == []


def test_telling_words_count_captions_not_words():
  (word, gone, _), *_ = gallery.telling_words(['dog dog dog'] * 3, ['cat'] * 3)
  assert (word, gone) == ('dog', 1.0)
