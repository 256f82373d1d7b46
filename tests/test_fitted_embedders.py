"""Fitted embedders: definitions, determinism, and bits that do not depend on the batch."""

import numpy as np
import pytest

from clip_jax.models import fitted_embedders


def images(n=300, size=16, seed=0):
  """Smooth random images: noise drawn at a quarter of the size."""
  small = np.random.default_rng(seed).integers(0, 256, (n, size // 4, size // 4, 3), dtype=np.uint8)
  return small.repeat(4, axis=1).repeat(4, axis=2)


FITS = [('pca', 10), ('hog', 10), ('hog', 0)]


@pytest.fixture(scope='module', params=FITS, ids=lambda fit: f'{fit[0]}-{fit[1]}')
def fitted(request):
  name, dim = request.param
  fit, apply = fitted_embedders.EMBEDDERS[name]
  return fit(images(), dim), apply


def test_unit_length_float32(fitted):
  params, apply = fitted
  x = apply(params, images(40, seed=1))
  assert x.dtype == np.float32 and all(value.dtype == np.float32 for value in params.values())
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)


def test_bits_do_not_depend_on_the_batch(fitted):
  params, apply = fitted
  batch = images(300, seed=2)
  x = apply(params, batch)
  order = np.random.default_rng(0).permutation(300)
  np.testing.assert_array_equal(apply(params, batch[order]), x[order])
  for size in (1, 7, 257):
    np.testing.assert_array_equal(apply(params, batch[:size]), x[:size])
  assert apply(params, batch[:0]).shape == (0, x.shape[1])


def test_fits_are_deterministic(fitted):
  params, apply = fitted
  if apply is fitted_embedders.apply_pca:
    again = fitted_embedders.fit_pca(images(), 10)
    np.testing.assert_array_equal(again['components'], params['components'])


@pytest.mark.parametrize('value', [0, 128, 255])
def test_a_constant_image_has_a_vector(fitted, value):
  params, apply = fitted
  x = apply(params, np.full((1, 16, 16, 3), value, np.uint8))
  np.testing.assert_allclose(np.linalg.norm(x), 1, atol=1e-6)


def test_an_image_without_direction_gets_the_first_axis():
  x = fitted_embedders._unit(np.zeros((1, 4), np.float32))
  np.testing.assert_array_equal(x, [[1, 0, 0, 0]])


@pytest.mark.parametrize('n', [40, 300])  # fewer and more images than the 256 pixels
def test_components_are_those_of_the_singular_values(n):
  batch = images(n, seed=3)
  params = fitted_embedders.fit_pca(batch, 5)
  gray = (batch @ np.array([0.299, 0.587, 0.114])).reshape(n, -1) / 255
  _, _, rows = np.linalg.svd(gray - gray.mean(0), full_matrices=False)
  np.testing.assert_allclose(params['mean'], gray.mean(0), atol=1e-5)
  np.testing.assert_allclose(np.abs((rows[:5] * params['components'].T).sum(1)), 1, atol=1e-4)
  largest = np.abs(params['components']).argmax(0)
  assert (params['components'][largest, np.arange(5)] > 0).all()


def gradient_image(angle, size=32):
  y, x = np.mgrid[:size, :size] / size
  ramp = np.cos(np.radians(angle)) * x + np.sin(np.radians(angle)) * y
  ramp = 255 * (ramp - ramp.min()) / (ramp.max() - ramp.min())
  return np.repeat(ramp[None, :, :, None], 3, axis=3).astype(np.uint8)


@pytest.mark.parametrize('angle, best', [(0, 0), (40, 2), (90, 4), (140, 7), (160, 8)])
def test_a_ramp_votes_for_its_own_orientation(angle, best):
  histogram = fitted_embedders._histograms(gradient_image(angle)).reshape(-1, 9).sum(0)
  assert abs(histogram.argmax() - best) <= 1
  assert histogram[best] + histogram[(best + 1) % 9] > 0.8 * histogram.sum()


def test_orientation_has_no_sign_and_contrast_counts_little():
  image = gradient_image(30)
  base, turned = fitted_embedders._histograms(image), fitted_embedders._histograms(255 - image)
  np.testing.assert_allclose(base, turned, atol=0.02)
  assert not fitted_embedders._histograms(np.full((1, 32, 32, 3), 77, np.uint8)).any()


def test_more_components_than_images_are_refused():
  with pytest.raises(ValueError, match='dim=10 needs at least 11 images .* 5 images .* 4 or less'):
    fitted_embedders.fit_pca(images(5), 10)


def test_wrong_shapes_and_types_are_refused():
  with pytest.raises(ValueError, match=r'\[3, 16, 8, 3\]'):
    fitted_embedders.fit_pca(np.zeros((3, 16, 8, 3), np.uint8), 1)
  with pytest.raises(ValueError, match='float32'):
    fitted_embedders.fit_pca(np.zeros((3, 16, 16, 3), np.float32), 1)
