"""Class matrix, predictions and scores against plain loops; ties, masks, unreadable images."""

import numpy as np
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.evaluation import zero_shot


def encoder(calls=None):
  """A text's vector is a fixed random function of the text, with a norm far from 1."""

  def encode(texts):
    if calls is not None:
      calls.append(len(texts))
    return np.stack([np.random.default_rng(list(t.encode())).normal(size=6) * 7 for t in texts])

  return encode


def test_class_matrix_is_the_ensemble():
  classes, templates = ('dog', 'hot {} dog'), ('a {}.', 'the {} of {}', '{}')
  unit = lambda v: v / np.linalg.norm(v)
  rows = []
  for name in classes:
    texts = ['a ' + name + '.', 'the ' + name + ' of ' + name, name]
    rows.append(unit(np.mean([unit(v) for v in encoder()(texts)], 0)))
  for batch_size in (1, 4, 1024):
    found = zero_shot.class_matrix(encoder(), classes, templates, batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows, rtol=1e-6)


def test_class_matrix_encodes_in_batches():
  calls = []
  zero_shot.class_matrix(encoder(calls), [f'c{i}' for i in range(10)], ['a {}', 'b {}'], 8)
  assert calls == [8, 8, 4]


def test_class_matrix_refuses():
  with pytest.raises(ConfigError, match="'a photo' has no '{}'"):
    zero_shot.class_matrix(encoder(), ['dog'], ['a {}', 'a photo'])
  with pytest.raises(ConfigError, match='0 classes and 1 templates'):
    zero_shot.class_matrix(encoder(), [], ['a {}'])
  with pytest.raises(ValueError, match='text vector 0 is zero'):
    zero_shot.class_matrix(lambda texts: np.zeros((len(texts), 3)), ['dog'], ['a {}'])
  with pytest.raises(ValueError, match='one row per text'):
    zero_shot.class_matrix(lambda texts: np.ones((1, 3)), ['dog', 'cat'], ['a {}'])


def slow(scores, mask):
  order = sorted(np.flatnonzero(mask), key=lambda c: (-scores[c], c))[:5]
  return order + [-1] * (min(5, len(mask)) - len(order))


@pytest.mark.parametrize('kept', [12, 5, 3, 1])
def test_predict_is_the_sorted_list(kept, monkeypatch):
  monkeypatch.setattr(zero_shot, 'ROWS', 7)
  rng = np.random.default_rng(0)
  image = rng.integers(-1, 2, (40, 4)).astype(np.float32)  # many ties
  classes = rng.integers(-1, 2, (12, 4)).astype(np.float32)
  mask = np.isin(np.arange(12), rng.permutation(12)[:kept])
  found = zero_shot.predict(image, classes, mask)
  assert found.dtype == np.int32 and found.shape == (40, 5)
  assert found.tolist() == [slow(s, mask) for s in image @ classes.T]


def test_classes_of_one_name_tie_and_the_lower_wins():
  """missile is ImageNet's class 657 and 744: equal columns must not be told apart by rounding."""
  rng = np.random.default_rng(1)
  classes = rng.normal(size=(1000, 512)).astype(np.float32)
  classes[744] = classes[657]
  image = (classes[657] + 0.1 * rng.normal(size=(300, 512))).astype(np.float32)
  found = zero_shot.predict(image, classes)
  assert (found[:, :2] == [657, 744]).all()
  assert (zero_shot.predict(image[250:], classes) == found[250:]).all()


def test_the_mask_applies_before_the_argmax():
  image, classes = np.eye(3, dtype=np.float32)[[0]], np.eye(3, dtype=np.float32)
  classes[1] = [0.5, 0.5, 0]
  assert zero_shot.predict(image, classes)[0].tolist() == [0, 1, 2]
  assert zero_shot.predict(image, classes, np.array([False, True, True]))[0].tolist() == [1, 2, -1]


def test_classes_of_one_meaning_count_once_by_their_highest_score():
  rng = np.random.default_rng(2)
  image, classes = rng.normal(size=(50, 6)), rng.normal(size=(9, 6))
  meaning = np.array([4, -1, 2, 4, 0, 2, -1, 7, 2])
  found = zero_shot.predict(image, classes, meaning >= 0, meaning=meaning)
  scores = (image @ classes.T).astype(np.float32)
  for row, best in zip(scores, found):
    joined = {label: max(row[meaning == label]) for label in (0, 2, 4, 7)}
    assert best.tolist() == [*sorted(joined, key=joined.get, reverse=True), -1]
  with pytest.raises(ValueError, match='0 or more for every class'):
    zero_shot.predict(image, classes, meaning=meaning)


def test_predict_refuses(monkeypatch):
  image, classes = np.ones((4, 3), np.float32), np.eye(3, dtype=np.float32)
  with pytest.raises(ValueError, match=r'\(4, 3\) and \(3, 2\)'):
    zero_shot.predict(image, classes[:, :2])
  for mask in (np.array([0, 1, 2]), np.zeros(3, bool), np.ones(4, bool)):
    with pytest.raises(ValueError, match='mask must be bool'):
      zero_shot.predict(image, classes, mask)
  image[2, 1] = np.nan
  for rows in (4096, 2, 1):
    monkeypatch.setattr(zero_shot, 'ROWS', rows)
    with pytest.raises(ValueError, match='image 2'):
      zero_shot.predict(image, classes)
  usable = np.array([True, True, False, True])
  assert zero_shot.predict(image, classes, usable=usable)[2].tolist() == [-1, -1, -1]


def test_score():
  label = np.array([0, 0, 0, 0, 2, 2])
  top5 = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [-1, -1, -1], [2, 0, 1], [1, 0, 3]], np.int32)
  found = zero_shot.score(label, top5, 4)
  assert found['top1'] == 3 / 6 and found['top5'] == 4 / 6
  np.testing.assert_array_equal(found['per_class'], [2 / 4, np.nan, 1 / 2, np.nan])
  assert found['mean_per_class'] == 0.5
  assert all(isinstance(found[k], float) for k in ('top1', 'top5', 'mean_per_class'))


def test_an_unreadable_image_is_wrong_even_with_label_0():
  image = np.zeros((2, 3), np.float32)  # zeros tie for class 0
  top5 = zero_shot.predict(image, np.eye(3, dtype=np.float32), usable=np.array([True, False]))
  assert zero_shot.score(np.zeros(2, int), top5, 3)['top1'] == 0.5


def test_score_refuses():
  with pytest.raises(ValueError, match=r'0\.\.2: got 0 to 3'):
    zero_shot.score(np.array([0, 3]), np.zeros((2, 1), int), 3)
  with pytest.raises(ValueError, match='-1 to 1'):
    zero_shot.score(np.array([-1, 1]), np.full((2, 1), -1), 3)
  for label, top5 in ((np.zeros(0, int), np.zeros((0, 5))), (np.zeros(3, int), np.zeros((2, 5)))):
    with pytest.raises(ValueError, match='must agree'):
      zero_shot.score(label, top5, 3)
