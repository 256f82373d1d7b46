"""evaluation/few_shot.py against big_vision's formulas in float64, and scikit-learn's Ridge."""

import numpy as np
import pytest

from clip_jax.evaluation import few_shot, ridge


def world(rows=400, dim=9, classes=5, seed=0):
  rng = np.random.default_rng(seed)
  label = np.arange(rows) % classes  # as many of each class, as shots are
  centre = rng.normal(size=(classes, dim))
  return (centre[label] + rng.normal(size=(rows, dim))).astype(np.float32), label


def whitened(train, test):
  mean, deviation = train.astype(np.float64).mean(0), train.astype(np.float64).std(0) + 1e-5
  pad = lambda x: np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
  return pad(train), pad(test)


@pytest.mark.parametrize('rows, dim', [(400, 9), (15, 40)])
def test_predictions_are_those_of_the_normal_equations(rows, dim):
  """Both of big_vision's cases: more rows than features, and fewer."""
  train, label = world(rows, dim)
  test, _ = world(300, dim, seed=1)
  x, xtest = whitened(train, test)
  y = 2.0 * np.eye(5)[label] - 1
  if rows > dim:
    weights = np.linalg.solve(x.T @ x + 2.0**10 * np.eye(dim + 1), x.T @ y)
  else:
    weights = x.T @ np.linalg.solve(x @ x.T + 2.0**10 * np.eye(rows), y)
  found = few_shot.predict(train, label, test, 5)
  assert (found == (xtest @ weights).argmax(1)).all() and len(set(found)) > 2


def test_predictions_are_scikit_learns():
  linear_model = pytest.importorskip('sklearn.linear_model')
  train, label = world()
  test, truth = world(300, seed=0)
  x, xtest = whitened(train, test)
  peer = linear_model.Ridge(alpha=ridge.L2, fit_intercept=False).fit(x, 2.0 * np.eye(5)[label] - 1)
  found = few_shot.predict(train, label, test, 5)
  assert (found == peer.predict(xtest).argmax(1)).all() and (found == truth).mean() > 0.5


def test_draws_are_big_visions():
  label = np.random.default_rng(3).integers(-1, 4, 100)
  for seed in few_shot.SEEDS:
    rng = np.random.default_rng(seed)
    wanted = [rng.permutation(np.where(label == c)[0])[:10] for c in range(4)]
    found = few_shot.draw(label, np.arange(4), 10, seed)
    assert found.tolist() == np.stack(wanted).tolist()
    assert (few_shot.draw(label, np.arange(4), 5, seed) == found[:, :5]).all()  # nested shots
  some = few_shot.draw(label, np.array([1, 3]), 10, 0)
  assert (label[some] == [[1], [3]]).all()


def test_a_class_with_too_few_rows():
  with pytest.raises(ValueError, match='class 1 has 2 rows, fewer than 3 shots'):
    few_shot.draw(np.array([0, 0, 0, 1, 1]), np.arange(2), 3, 0)
  with pytest.raises(ValueError, match='class 7 has 0 rows'):
    few_shot.draw(np.array([0, 0, 0]), np.array([0, 7]), 1, 0)
