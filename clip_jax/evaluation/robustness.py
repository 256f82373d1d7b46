"""Effective robustness: accuracy beyond what a line through standard models predicts.

In: accuracies. Out: accuracies. No files. The lines were refitted from the published accuracies of
imagenet-testbed (Taori et al. 2020; robustness_top1s.csv of its repository), standard models only,
without the two of its three copies of ResNet-50 that it trained itself. They hold for the ImageNet
family only, and beyond x_low..x_high they are an extrapolation. For other benchmarks, fit a line
through anchor_only checkpoints with fit_line, or use none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy.special import expit, logit

from clip_jax.core.types import Array


@dataclass(frozen=True)
class Line:
  """The line logit(accuracy) = slope * logit(x accuracy) + intercept, in natural log odds."""

  slope: float
  intercept: float
  models: int  # points of the fit
  r2: float  # on the logit axes
  error: float  # residual standard deviation in log odds, with models - 2 degrees of freedom
  x_mean: float  # mean logit of the x accuracies
  x_squares: float  # sum of their squared deviations from x_mean
  x_low: float  # lowest and highest x accuracy of the fit
  x_high: float

  def accuracy(self, x_accuracy: float) -> float:
    """Returns the line's accuracy at x_accuracy, both in 0..1."""
    return float(expit(self.slope * logit(x_accuracy) + self.intercept))

  def band(self, x_accuracy: float, level: float = 0.95) -> tuple[float, float]:
    """Returns the prediction interval of one more standard model at x_accuracy, in 0..1.

    It holds the scatter of the models and the error of the fit, on the logit axes.
    """
    x = logit(x_accuracy)
    spread = 1 + 1 / self.models + (x - self.x_mean) ** 2 / self.x_squares
    half = special.stdtrit(self.models - 2, (1 + level) / 2) * self.error * np.sqrt(spread)
    middle = self.slope * x + self.intercept
    return float(expit(middle - half)), float(expit(middle + half))


def line(shift: str, x: str = 'val', x_accuracy: float = 0.0) -> Line:
  """Returns the line of a shift; x_accuracy matters only for shift 'a', which has two lines.

  These were fitted separately and do not meet: at A_BREAK the accuracy jumps from 3.0 to 4.3 %.
  """
  if (shift, x) not in LINES:
    raise ValueError(f'no effective-robustness line for {(shift, x)}; have {sorted(LINES)}')
  below, above = LINES[shift, x]
  return above if x_accuracy > A_BREAK else below


def line_accuracy(shift: str, x_accuracy: float, x: str = 'val') -> float:
  """Returns the expected accuracy on the shift of a standard ImageNet model with this x accuracy.

  Accuracies are proportions. x is 'val' (all 1,000 classes) or 'classes' (val scored among the
  shift's own classes). ObjectNet must be scored over its 125 ImageNet ids; an answer is correct if
  it is one of the class's ids.
  """
  return line(shift, x, x_accuracy).accuracy(x_accuracy)


def mean_line_error(
  shift: str,
  x_accuracies: Array,  # [S] proportions, of the runs
  x: str = 'val',
  x_error: float = 0.0,  # standard error of their mean over the images of the x axis, and its df
  x_df: float = np.inf,
) -> tuple[float, float]:  # standard error, degrees of freedom
  """Returns the error of the mean over runs of line_accuracy, in first order (delta method).

  L_s is the line's accuracy of run s, w_s = L_s (1 - L_s) / S its derivative in log odds, and
  d_s = logit(x_s) - x_mean. A line's height at x_mean and its slope are uncorrelated, so its fit
  has the variance error^2 [(sum w_s)^2 / models + (sum w_s d_s)^2 / x_squares], with models - 2
  degrees of freedom; runs on the two lines of ImageNet-A add up. The images of the x axis have
  [x_error sum_s w_s slope / (x_s (1 - x_s))]^2. The degrees of freedom are Satterthwaite's. The
  scatter of single models around the line is not in it; that over seeds is in the runs' values.
  """
  x_accuracies = np.asarray(x_accuracies, np.float64)
  lines = [line(shift, x, float(value)) for value in x_accuracies]
  variance, squares, by_images = 0.0, 0.0, 0.0
  for fit in dict.fromkeys(lines):
    values = x_accuracies[[other == fit for other in lines]]
    values = values[(values > 0) & (values < 1)]  # at 0 and 1, every line is at 0 and 1
    expected = np.array([fit.accuracy(float(value)) for value in values])
    weight = expected * (1 - expected) / len(x_accuracies)
    apart = logit(values) - fit.x_mean
    of_fit = fit.error**2 * (weight.sum() ** 2 / fit.models + (weight @ apart) ** 2 / fit.x_squares)
    variance, squares = variance + of_fit, squares + of_fit**2 / (fit.models - 2)
    by_images += float((weight * fit.slope / (values * (1 - values))).sum())
  of_images = (x_error * by_images) ** 2
  variance, squares = variance + of_images, squares + of_images**2 / x_df
  return float(np.sqrt(variance)), float(variance**2 / squares) if squares else np.inf


def effective_robustness(shift: str, accuracy: float, x_accuracy: float, x: str = 'val') -> float:
  """Returns accuracy - line_accuracy: 0.05 means 5 points above the line."""
  return accuracy - line_accuracy(shift, x_accuracy, x)


def family_table(results: Mapping[str, Mapping]) -> dict[str, dict]:
  """Returns the effective robustness on each shift of FAMILY among the results.

  results: published name of a benchmark (FAMILY, and 'imagenet1k' for val) -> its scores, as in
  <benchmark>.json. Without val, where a needed scoring is missing, or where val's accuracy is 0 or
  1, a shift is left out. line_low and line_high: the 95 % band of standard models (Line.band).
  extrapolated: val's accuracy lies outside the models of the fit.
  """
  table = {}
  for name, (shift, scoring, of_val) in FAMILY.items():
    accuracy = _accuracy(results.get(name), scoring)
    x_accuracy = _accuracy(results.get('imagenet1k'), of_val)
    if accuracy is None or x_accuracy is None or not 0 < x_accuracy < 1:
      continue
    baseline = line(shift, 'classes' if of_val else 'val', x_accuracy)
    expected, (low, high) = baseline.accuracy(x_accuracy), baseline.band(x_accuracy)
    table[name] = {
      'accuracy': accuracy,
      'x_accuracy': x_accuracy,
      'line': expected,
      'line_low': low,
      'line_high': high,
      'extrapolated': not baseline.x_low <= x_accuracy <= baseline.x_high,
      'effective_robustness': accuracy - expected,
    }
  return table


def _accuracy(scores: Mapping | None, scoring: str) -> float | None:
  """Returns the accuracy of a result, or of its further scoring; None if there is none."""
  if scores is not None and scoring:
    scores = scores.get('scorings', {}).get(scoring)
  return None if scores is None else scores['top1']


def fit_line(
  x_accuracy: Array,  # [n] proportions
  accuracy: Array,  # [n] proportions
) -> Line:
  """Fits a line by least squares on logit axes, to three or more models with different x."""
  x_accuracy, accuracy = (np.asarray(a, np.float64) for a in (x_accuracy, accuracy))
  if x_accuracy.shape != accuracy.shape or x_accuracy.ndim != 1:
    raise ValueError(f'x_accuracy {x_accuracy.shape} and accuracy {accuracy.shape} must be [n]')
  x, y = logit(x_accuracy), logit(accuracy)
  if len(x) < 3 or not np.isfinite([x, y]).all() or np.ptp(x) == 0:
    raise ValueError(
      'a line needs three or more models, with accuracies strictly between 0 and 1 and at least '
      f'two different x accuracies: got x {x_accuracy.tolist()}, y {accuracy.tolist()}'
    )
  slope, intercept = np.polyfit(x, y, 1)
  residual, total = ((y - slope * x - intercept) ** 2).sum(), ((y - y.mean()) ** 2).sum()
  return Line(
    float(slope),
    float(intercept),
    len(x),
    float(1 - residual / total) if total else 1.0,
    float(np.sqrt(residual / (len(x) - 2))),
    float(x.mean()),
    float(((x - x.mean()) ** 2).sum()),
    float(x_accuracy.min()),
    float(x_accuracy.max()),
  )


def _without_break(*numbers) -> tuple[Line, Line]:
  return Line(*numbers), Line(*numbers)


# Published name of a benchmark -> shift, the scoring whose accuracy the line predicts, and the
# scoring of val on the x axis ('': all classes).
FAMILY = {
  'imagenetv2': ('v2', '', ''),
  'imagenet_sketch': ('sketch', '', ''),
  'imagenet-a': ('a', '', 'imagenet-a'),
  'imagenet-r': ('r', '', 'imagenet-r'),
  'objectnet': ('objectnet', 'imagenet_masked', 'objectnet'),
}
A_BREAK = 0.9186  # val accuracy on ImageNet-A's classes
LINES = {  # (shift, x axis): the line below and above A_BREAK
  ('v2', 'val'): _without_break(0.9232, -0.4977, 85, 0.996, 0.0186, 1.1709, 8.501, 0.565, 0.847),
  ('sketch', 'val'): _without_break(
    1.0709, -2.3701, 85, 0.869, 0.1331, 1.1709, 8.501, 0.565, 0.847
  ),
  ('r', 'classes'): _without_break(
    0.6368, -2.1077, 80, 0.889, 0.1000, 2.5016, 15.455, 0.769, 0.965
  ),
  ('r', 'val'): _without_break(0.9116, -1.5999, 80, 0.877, 0.1053, 1.1906, 7.439, 0.565, 0.847),
  ('objectnet', 'classes'): _without_break(
    0.9809, -1.9283, 85, 0.953, 0.0862, 1.3337, 12.862, 0.566, 0.883
  ),
  ('objectnet', 'val'): _without_break(
    1.1993, -2.0243, 85, 0.941, 0.0961, 1.1709, 8.501, 0.565, 0.847
  ),
  ('a', 'classes'): (
    Line(0.6894, -5.1400, 33, 0.411, 0.3102, 1.9752, 4.369, 0.762, 0.917),
    Line(2.9560, -10.2774, 51, 0.905, 0.2649, 2.7893, 3.758, 0.919, 0.969),
  ),
}
