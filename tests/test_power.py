"""evaluation/power.py: the predicted power is that of the report's test in simulation."""

import numpy as np
import pytest

from clip_jax.evaluation import power, statistics
from clip_jax.evaluation.power import Variances


def rejections(of: Variances, seeds, sizes, difference, draws=600, seed=0):
  """Returns the share of simulated experiments in which crossed_interval finds the difference."""
  rng, found = np.random.default_rng(seed), 0
  groups = np.repeat(np.arange(len(sizes)), sizes)
  scale = len(sizes)  # each group weighs 1 / G: its effect has G times the variance of the mean
  for _ in range(draws):
    values = (
      difference
      + np.sqrt(of.seeds) * rng.normal(size=(seeds, 1))
      + np.sqrt(of.images * scale) * rng.normal(size=(1, scale))
      + np.sqrt(of.noise * scale) * rng.normal(size=(seeds, scale))
    )
    estimate = statistics.crossed_interval(values[:, groups], groups)
    found += estimate.p_value < power.LEVEL
  return found / draws


@pytest.mark.parametrize(
  ('of', 'seeds', 'sizes'),
  [
    (Variances(4e-4, 1e-4, 1e-4), 3, (2,) * 60),  # seeds dominate
    (Variances(1e-5, 4e-4, 1e-4), 5, (1,) * 200),  # images dominate
    (Variances(0.0, 0.0, 4e-4), 3, (1,) * 200),  # noise alone, where the floor matters most
    (Variances(1e-4, 2e-4, 1e-4), 4, (20,) * 8),  # few groups
  ],
)
def test_the_detectable_difference_is_found_in_four_of_five_experiments(of, seeds, sizes):
  groups = statistics.effective_groups(sizes)
  difference = power.detectable(of, seeds, groups)
  assert power.power(difference, of, seeds, groups) == pytest.approx(0.8, abs=1e-3)
  assert rejections(of, seeds, sizes, difference) == pytest.approx(0.8, abs=0.05)
  half = power.power(difference / 2, of, seeds, groups)
  assert rejections(of, seeds, sizes, difference / 2) == pytest.approx(half, abs=0.06)


def test_a_pilot_predicts_the_test_of_two_splits_of_answers():
  """0/1 answers of two splits; the pilot knows other runs of one of them alone."""
  rng = np.random.default_rng(0)
  images, seeds, groups = 400, 4, np.repeat(np.arange(100), 4)
  skill = rng.normal(size=images) + np.repeat(rng.normal(size=100), 4)

  def runs(shift, own, count):
    level = shift + 0.35 * rng.normal(size=(count, 1)) + skill + own
    return rng.random((count, images)) < 1 / (1 + np.exp(-level))

  own = 0.8 * rng.normal(size=images)  # what the images lose beside the shift
  of = power.variances(power.pilot([runs(0.0, 0, 30), runs(0.0, 0, 30)], groups))
  found = []
  for shift in np.linspace(-1.0, -0.8, 300):
    first, second = runs(shift, own, seeds), runs(0.0, 0, seeds)
    estimate = statistics.crossed_interval(first.astype(float) - second, groups)
    found.append((estimate.value, estimate.p_value < power.LEVEL))
  values, is_found = np.array(found).T
  predicted = power.power(abs(values.mean()), of, seeds, 100)
  assert 0.5 < predicted < 0.97
  assert is_found.mean() == pytest.approx(predicted, abs=0.12)


def test_a_pilot_measures_the_sd_of_seeds_and_their_disagreement():
  correct = np.zeros((3, 100), bool)
  correct[0, :50], correct[1, :60], correct[2, :70] = True, True, True
  found = power.pilot([correct, correct])
  assert found.seed_sd == pytest.approx(0.1) and found.df == 4
  assert found.disagreement == pytest.approx((0.1 + 0.1 + 0.2) / 3)
  with pytest.raises(ValueError, match='two seeds'):
    power.pilot([correct[:1]])


def test_more_seeds_and_images_detect_less_until_the_images_limit_it():
  of = power.variances(power.assumed(np.ones(700)))
  found = [power.detectable(of, seeds, 700) for seeds in (3, 5, 10, 30)]
  assert found == sorted(found, reverse=True)
  larger = power.variances(power.assumed(np.ones(50_000)))
  assert power.detectable(larger, 5, 50_000) < power.detectable(of, 5, 700)
  grouped = power.variances(power.assumed(np.full(7, 100)))
  assert power.detectable(grouped, 5, 7) > power.detectable(of, 5, 700)
  needed = power.seeds_needed(0.05, of, 700)
  assert needed is not None and power.power(0.05, of, needed, 700) >= 0.8
  assert power.power(0.05, of, needed - 1, 700) < 0.8
  assert power.seeds_needed(0.01, of, 700) is None  # the images' own differences remain
  assert power.seeds_needed(0.5, of, 700) == 3


def test_runs_that_never_differ_detect_everything_and_two_seeds_nothing():
  same = np.ones((3, 50), bool)
  assert power.seeds_needed(0.01, power.variances(power.pilot([same])), 50) == 3
  with pytest.raises(ValueError, match='3 seeds'):
    power.detectable(Variances(1e-4, 0, 0), 2, 50)
