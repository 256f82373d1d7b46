"""The ridge preview against the same formulas on whole matrices, and class names in captions."""

import numpy as np
import pytest
from scipy import linalg
from sklearn.linear_model import Ridge

from clip_jax.evaluation import ridge

rng = np.random.default_rng(0)


def world(rows=500, dim=7, classes=4):
  label = rng.integers(0, classes, rows)
  centre = rng.normal(size=(classes, dim))
  return (centre[label] + rng.normal(size=(rows, dim)) + 0.5).astype(np.float16), label


def cut(x, label, size):
  return [(x[i : i + size], label[i : i + size]) for i in range(0, len(x), size)]


def dense(x, label, scale, classes, l2=ridge.L2):
  """big_vision's formulas as they are written down: whitened, 100 for the bias, targets -1 and
  1.
  """
  x = (x.astype(np.float64) - scale.mean) / scale.deviation
  x = np.pad(x, ((0, 0), (0, 1)), constant_values=100.0)
  y = 2.0 * np.eye(classes)[label] - 1
  return linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)


def test_scale_is_mean_and_deviation_of_all_rows():
  x, label = world()
  x[:, 3] = 0.25  # a constant feature
  scale = ridge.fit_scale(part for part, _ in cut(x, label, 33))
  np.testing.assert_allclose(scale.mean, x.astype(np.float64).mean(0), rtol=1e-6)
  np.testing.assert_allclose(scale.deviation, x.astype(np.float64).std(0) + 1e-5, rtol=1e-5)
  assert np.isfinite(scale(x)).all()
  with pytest.raises(ValueError, match='0 rows'):
    ridge.fit_scale([])


@pytest.mark.parametrize('size', [1, 33, 500])
def test_weights_are_those_of_whole_matrices(size):
  x, label = world()
  scale = ridge.fit_scale([x[:100]])  # of other rows than it is fitted on
  found = ridge.fit(cut(x, label, size), scale, 6)  # two classes have no row
  np.testing.assert_allclose(found, dense(x, label, scale, 6), atol=2e-6)


def test_weights_are_scikit_learns():
  x, label = world(300, 5, 3)
  scale = ridge.fit_scale([x])
  peer = Ridge(alpha=64.0, fit_intercept=False)
  peer.fit(np.pad(scale(x), ((0, 0), (0, 1)), constant_values=100.0), 2.0 * np.eye(3)[label] - 1)
  np.testing.assert_allclose(
    ridge.fit(cut(x, label, 64), scale, 3, l2=64.0), peer.coef_.T, atol=2e-6
  )


def test_a_row_that_is_there_twice_counts_twice():
  x, label = world(60)
  scale = ridge.fit_scale([x])
  both = np.concatenate([x, x]), np.concatenate([label, label])
  twice = ridge.fit([both], scale, 4)
  np.testing.assert_allclose(twice, dense(*both, scale, 4), atol=2e-6)
  assert np.abs(twice - ridge.fit([(x, label)], scale, 4)).max() > 1e-3


def test_predictions_are_of_the_allowed_classes_and_learn_something():
  x, label = world(2000)
  scale = ridge.fit_scale([x])
  weights = ridge.fit([(x[:1000], label[:1000])], scale, 4)
  found = ridge.predict(x[1000:], scale, weights, np.arange(4))
  assert (found == label[1000:]).mean() > 0.5
  scores = (
    np.pad(scale(x[1000:]), ((0, 0), (0, 1)), constant_values=100.0).astype(np.float64) @ weights
  )
  assert (found == scores.argmax(1)).all()
  some = ridge.predict(x[1000:], scale, weights, np.array([3, 1]))
  assert (some == np.array([3, 1])[scores[:, [3, 1]].argmax(1)]).all()


NAMES = {'car': 0, 'sports car': 1, 'dog': 2, 't shirt': 3, 'élan': 4}


@pytest.mark.parametrize(
  'caption, wanted',
  [
    ('A photo of a dog.', 2),
    ('my Dog', 2),
    ('hotdog stand', -1),
    ('dogs', -1),
    ('a dog and a car', -1),
    ('a sports car', 1),
    ('a sports  CAR in the rain', 1),
    ('a sports car beside a car', -1),
    ('sports', -1),
    ('dog, dog!', 2),
    ('a T-shirt', 3),
    ('t_shirt', 3),
    ('ÉLAN', 4),
    ('', -1),
    ('car', 0),
    ('sports sports car', 1),
  ],
)
def test_the_one_class_that_a_caption_names(caption, wanted):
  assert ridge.caption_classes([caption], NAMES).tolist() == [wanted]


def test_captions_of_no_class_and_no_captions():
  assert ridge.caption_classes(['a dog'], {}).tolist() == [-1]
  found = ridge.caption_classes([], NAMES)
  assert found.dtype == np.int32 and not len(found)


def test_names_are_compared_by_their_words():
  assert ridge.plain_name('  Sports_Car ') == ridge.plain_name('sports car') == 'sports car'
  assert ridge.plain_name('T-shirt') == 't shirt'
