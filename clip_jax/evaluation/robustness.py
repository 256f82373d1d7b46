"""Effective robustness: accuracy beyond what a line through standard models predicts.

In: accuracies. Out: accuracies. No files. The lines were refitted from the published accuracies of
imagenet-testbed (Taori et al. 2020), standard models only, and hold for the ImageNet family only.
For other benchmarks, fit a line through anchor_only checkpoints with fit_line, or use none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from clip_jax.core.types import Array


@dataclass(frozen=True)
class Line:
  """The line logit(accuracy) = slope * logit(x accuracy) + intercept, in natural log odds."""

  slope: float
  intercept: float
  models: int  # points of the fit
  r2: float  # on the logit axes

  def accuracy(self, x_accuracy: float) -> float:
    """Returns the line's accuracy at x_accuracy, both in 0..1."""
    return float(expit(self.slope * logit(x_accuracy) + self.intercept))


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


def effective_robustness(shift: str, accuracy: float, x_accuracy: float, x: str = 'val') -> float:
  """Returns accuracy - line_accuracy: 0.05 means 5 points above the line."""
  return accuracy - line_accuracy(shift, x_accuracy, x)


def family_table(results: Mapping[str, Mapping]) -> dict[str, dict]:
  """Returns the effective robustness on each shift of FAMILY among the results.

  results: published name of a benchmark (FAMILY, and 'imagenet1k' for val) -> its scores, as in
  <benchmark>.json. Without val, or where a needed scoring is missing, a shift is left out.
  """
  table = {}
  for name, (shift, scoring, of_val) in FAMILY.items():
    accuracy = _accuracy(results.get(name), scoring)
    x_accuracy = _accuracy(results.get('imagenet1k'), of_val)
    if accuracy is None or x_accuracy is None:
      continue
    axis = 'classes' if of_val else 'val'
    expected = line_accuracy(shift, x_accuracy, axis)
    table[name] = {
      'accuracy': accuracy,
      'x_accuracy': x_accuracy,
      'line': expected,
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
  return Line(float(slope), float(intercept), len(x), float(1 - residual / total) if total else 1.0)


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
  ('v2', 'val'): _without_break(0.9232, -0.4977, 85, 0.996),
  ('sketch', 'val'): _without_break(1.0709, -2.3701, 85, 0.869),
  ('r', 'classes'): _without_break(0.6368, -2.1077, 80, 0.889),
  ('r', 'val'): _without_break(0.9116, -1.5999, 80, 0.877),
  ('objectnet', 'classes'): _without_break(0.9809, -1.9283, 85, 0.953),
  ('objectnet', 'val'): _without_break(1.1993, -2.0243, 85, 0.941),
  ('a', 'classes'): (Line(0.6894, -5.1400, 33, 0.411), Line(2.9560, -10.2774, 51, 0.905)),
}
