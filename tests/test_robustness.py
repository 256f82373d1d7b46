"""Check values of the lines, and a line recovered from points on it."""

import dataclasses

import numpy as np
import pytest
from scipy import special, stats

from clip_jax.evaluation import robustness


def test_clip_vit_b_32():
  """63.30 on val, 55.77 on V2, 42.37 on Sketch: published, with the line's 50.1 and 14.4."""
  points = lambda value: round(100 * value, 1)
  assert points(robustness.line_accuracy('v2', 0.6330)) == 50.1
  assert points(robustness.effective_robustness('v2', 0.5577, 0.6330)) == 5.6
  assert points(robustness.line_accuracy('sketch', 0.6330)) == 14.4
  assert points(robustness.effective_robustness('sketch', 0.4237, 0.6330)) == 28.0


def test_every_line():
  for (shift, x), (below, above) in robustness.LINES.items():
    assert (below == above) == (shift != 'a') and x in ('val', 'classes')
    found = [robustness.line_accuracy(shift, a, x) for a in np.linspace(0.05, 0.91, 30)]
    assert (np.diff(found) > 0).all() and max(found) < 0.99
  assert robustness.line('a', 'classes', 0.90).models == 33
  assert robustness.line('a', 'classes', 0.95).models == 51
  ends = [robustness.line_accuracy('a', robustness.A_BREAK + e, 'classes') for e in (-1e-9, 1e-9)]
  assert [round(100 * end, 1) for end in ends] == [3.0, 4.3]
  with pytest.raises(ValueError, match=r"\('a', 'val'\); have"):
    robustness.line_accuracy('a', 0.5)
  assert robustness.line_accuracy('v2', 0.0) == 0 and robustness.line_accuracy('v2', 1.0) == 1


def test_the_band_is_scipys_prediction_interval():
  """Against scipy.stats.linregress, with the textbook prediction interval of a new point."""
  rng = np.random.default_rng(1)
  x = rng.uniform(0.3, 0.8, 12)
  y = special.expit(0.9 * special.logit(x) - 1 + 0.2 * rng.normal(size=12))
  found = robustness.fit_line(x, y)
  a, b = special.logit(x), special.logit(y)
  fit = stats.linregress(a, b)
  assert (found.slope, found.intercept) == pytest.approx((fit.slope, fit.intercept))
  assert found.error / np.sqrt(found.x_squares) == pytest.approx(fit.stderr)
  assert found.error * np.sqrt(1 / 12 + found.x_mean**2 / found.x_squares) == pytest.approx(
    fit.intercept_stderr
  )
  half = stats.t.ppf(0.975, 10) * np.sqrt(
    found.error**2 + fit.stderr**2 * (special.logit(0.5) - a.mean()) ** 2 + found.error**2 / 12
  )
  middle = special.logit(found.accuracy(0.5))
  assert special.logit(found.band(0.5)) == pytest.approx([middle - half, middle + half])
  low, high = robustness.line('sketch').band(0.633)
  assert [round(100 * bound, 1) for bound in (low, high)] == [11.3, 18.0]
  assert (found.x_low, found.x_high) == (x.min(), x.max())


def test_fit_line():
  x = np.linspace(0.2, 0.9, 9)
  y = [robustness.line_accuracy('sketch', a) for a in x]
  found = robustness.fit_line(x, y)
  assert (found.slope, found.intercept) == pytest.approx((1.0709, -2.3701))
  assert found.models == 9 and found.r2 == pytest.approx(1)
  noise = 0.05 * np.random.default_rng(0).normal(size=9)
  rough = robustness.fit_line(x, np.clip(y + noise, 0.01, 1))
  assert 0.2 < rough.r2 < 1
  for x, y in (
    ([0.1, 0.2], [0.1, 0.2]),
    ([0.1, 0.2, 0.3], [0, 0.1, 0.2]),
    ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]),
  ):
    with pytest.raises(ValueError, match='three or more models'):
      robustness.fit_line(x, y)


def test_the_family_against_the_published_check():
  """OpenAI's ViT-B/32: 63.30 on val, 55.77 on V2, 42.37 on Sketch: +5.6 and +28.0 points."""
  val = {'top1': 0.6330, 'scorings': {'imagenet-r': {'top1': 0.8}, 'objectnet': {'top1': 0.7}}}
  results = {
    'imagenet1k': val,
    'imagenetv2': {'top1': 0.5577},
    'imagenet_sketch': {'top1': 0.4237},
    'imagenet-r': {'top1': 0.5},
    'imagenet-a': {'top1': 0.3},  # val was not scored on its classes
    'objectnet': {'top1': 0.9, 'scorings': {'imagenet_masked': {'top1': 0.4}}},
    'mine': {'top1': 1.0},
  }
  found = robustness.family_table(results)
  points = {name: round(100 * line['effective_robustness'], 1) for name, line in found.items()}
  assert (points['imagenetv2'], points['imagenet_sketch']) == (5.6, 28.0)
  assert not found['imagenetv2']['extrapolated'] and found['imagenet-r']['extrapolated'] is False
  for line in found.values():
    assert line['line_low'] < line['line'] < line['line_high']
  low = robustness.family_table({**results, 'imagenet1k': {'top1': 0.3}})
  assert low['imagenetv2']['extrapolated']
  assert robustness.family_table({**results, 'imagenet1k': {'top1': 0.0}}) == {}
  assert found['imagenet-r']['line'] == robustness.line_accuracy('r', 0.8, 'classes')
  assert found['objectnet']['line'] == robustness.line_accuracy('objectnet', 0.7, 'classes')
  assert found['objectnet']['accuracy'] == 0.4 and set(found) == {*results} - {
    'imagenet1k',
    'imagenet-a',
    'mine',
  }
  assert (
    robustness.family_table({key: results[key] for key in results if key != 'imagenet1k'}) == {}
  )


def test_the_error_of_the_mean_over_runs_is_that_of_refits(monkeypatch):
  """Against the scatter over 4,000 refits of a line, at noisy x accuracies far from its middle."""
  rng = np.random.default_rng(2)
  models = special.logit(rng.uniform(0.5, 0.8, 20))
  refit = lambda: robustness.fit_line(
    special.expit(models), special.expit(1.1 * models - 2 + 0.15 * rng.normal(size=20))
  )
  runs, x_error = np.array([0.25, 0.3, 0.33]), 0.02
  exact = robustness.fit_line(special.expit(models), special.expit(1.1 * models - 2))
  known = dataclasses.replace(exact, error=0.15)
  monkeypatch.setitem(robustness.LINES, ('made', 'val'), (known, known))
  fits = [refit() for _ in range(4000)]
  means = [np.mean([fit.accuracy(x) for x in runs]) for fit in fits]
  error, df = robustness.mean_line_error('made', runs)
  assert (error, df) == (pytest.approx(np.std(means), rel=0.05), pytest.approx(18))
  moved = [np.mean([fit.accuracy(x) for x in runs + x_error * rng.normal()]) for fit in fits]
  both, more = robustness.mean_line_error('made', runs, x_error=x_error)
  assert both == pytest.approx(np.std(moved), rel=0.05) and both > 1.1 * error and more > df
  # The residual error of a refit itself is that of models - 2 degrees of freedom.
  assert np.mean([fit.error**2 for fit in fits]) == pytest.approx(0.15**2, rel=0.05)


def test_the_error_over_both_lines_of_imagenet_a_and_at_the_ends():
  low, high = robustness.A_BREAK - 0.1, robustness.A_BREAK + 0.02
  parts = [robustness.mean_line_error('a', [x], 'classes')[0] / 2 for x in (low, high)]
  error, df = robustness.mean_line_error('a', [low, high], 'classes')
  assert error == pytest.approx(np.hypot(*parts)) and 31 < df < 31 + 49
  assert robustness.mean_line_error('sketch', [0.0, 1.0]) == (0, np.inf)
