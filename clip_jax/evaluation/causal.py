"""Effects of removing similar images: explained share, difference in differences, placebo, dose.

In: 0/1 correctness [S, Q] of the splits on one benchmark, same seeds and images. Out: the frozen
results below. No files. The question is that of Mayilvahanan et al. 2024: how much of the base
split's lead over a small anchor set is lost if the pool's most similar images are removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from clip_jax.core.types import Array
from clip_jax.evaluation import statistics
from clip_jax.evaluation.statistics import Estimate

CONTROLS = {'base': 'base', 'matched': 'the matched control', 'random': 'the random control'}
REFERENCES = {'anchor_only': 'anchor_only', 'line': 'the effective-robustness line'}
FEWEST = 50  # queries in each arm; with fewer, a contrast is not estimable
STEPS = 50  # maximum of IRLS; a fit that exists needs about ten


@dataclass(frozen=True)
class Share:
  """The explained share E, or E'. A value of 0.15 is printed as 15 %."""

  value: float  # NaN, like low and high, if reason is not ''
  low: float
  high: float
  control: str  # 'base' (E) | 'matched' (E') | 'random' (E' without a matched control)
  reference: str  # 'anchor_only' | 'line'
  loss: Estimate  # acc_control - acc_gap, the numerator
  lead: Estimate  # acc_control - acc_reference, the denominator
  method: str  # 'crossed' (S >= 3) | 'range' (S = 2) | 'this checkpoint' (S = 1)
  reason: str  # why there is no share, or ''
  df: float = np.nan  # degrees of freedom of the ratio's linearisation

  @property
  def seeds(self) -> int:
    return self.lead.seeds

  @property
  def images(self) -> int:
    return self.lead.images

  @property
  def groups(self) -> int:
    return self.lead.groups


@dataclass(frozen=True)
class Contrast:
  """A difference in differences, or its placebo form."""

  estimate: Estimate | None  # None if reason is not ''
  hit: int  # images in the first arm: hit queries, or the benchmark
  unhit: int  # images in the second arm: unhit queries, or the placebo benchmark
  used: float  # share of the hit queries whose class also has unhit queries
  reason: str  # '' or 'not estimable: ...'


@dataclass(frozen=True)
class Dose:
  """The dose response of the pruned split against its control."""

  value: float  # the slope: log odds of a correct answer per unit of dose, pruned against control
  low: float
  high: float
  error: float  # crossed over seeds and groups
  df: float  # degrees of freedom of the interval's t distribution
  p_value: float  # NaN below three seeds
  seeds: int
  images: int  # in classes that are neither all correct nor all wrong
  dropped: int  # images of the other classes, which do not inform the slope
  groups: int
  method: str  # as in Estimate
  reason: str  # '' or 'not estimable: ...'


def explained_share(
  control: Array,  # [S, Q] bool: base for E, matched (else random) for E'
  gap: Array,  # [S, Q] bool: the gap-aligned split
  reference: Array,  # [S, Q] bool: anchor_only; or [S]: the robustness line's accuracies
  *,
  groups: Sequence | Array | None = None,
  reference_error: float = 0.0,  # standard error of the line's mean accuracy, with its df
  reference_df: float = np.inf,
  control_name: str = 'base',
  reference_name: str = 'anchor_only',
  level: float = 0.95,
  draws: int = 2000,
  seed: int = 0,
) -> Share:
  """Returns the explained share E = (acc_control - acc_gap) / (acc_control - acc_reference).

  E' has the matched control in place of base, in numerator and denominator: 0 means that alignment
  costs nothing, 1 that it costs the whole lead of the control over the reference. The interval is
  that of the crossed bootstrap, but at least as wide as the t interval of the ratio's
  linearisation, because three seeds give too few distinct draws if seeds vary more than images
  (S = 2: the range). There is no share if the denominator's interval reaches 0.
  reference_error, of a robustness line, is in the intervals of the denominator and of the ratio
  (not in the range of two seeds): as E / (acc_control - acc_reference) times it in the
  linearisation, and as a t variate times it, subtracted from the denominator, in each draw.
  """
  control, gap = statistics.matrix(control), statistics.matrix(gap)
  reference = np.asarray(reference, np.float64)
  if reference.ndim == 1:
    reference = np.repeat(reference[:, None], control.shape[1], 1)
  if not control.shape == gap.shape == reference.shape:
    raise ValueError(
      'control, gap and reference must hold the same seeds and images: got '
      f'{control.shape}, {gap.shape}, {reference.shape}'
    )
  loss = statistics.crossed_interval(control - gap, groups, level)
  lead = statistics.crossed_interval(control - reference, groups, level)
  lead = statistics.with_error(lead, reference_error, reference_df, level)
  share = Share(np.nan, np.nan, np.nan, control_name, reference_name, loss, lead, lead.method, '')
  if not lead.low > 0:
    return replace(
      share,
      reason=f'{CONTROLS[control_name]} is not shown to be better than '
      f'{REFERENCES[reference_name]} ({_points(lead)})',
    )
  value = loss.value / lead.value
  parts, df = np.stack([control - gap, control - reference]), np.nan
  if lead.method == 'range':
    ratios = parts[0].mean(1) / parts[1].mean(1)  # [S]
    low, high = ratios.min(), ratios.max()
  else:
    drawn = statistics.crossed_bootstrap(parts, groups, draws, seed)
    linear = statistics.crossed_interval((parts[0] - value * parts[1]) / lead.value, groups, level)
    linear = statistics.with_error(
      linear, value / lead.value * reference_error, reference_df, level
    )
    if reference_error:
      t = np.random.default_rng((seed, 1)).standard_t(min(reference_df, 1e9), draws)
      drawn[:, 1] -= reference_error * t
    with np.errstate(divide='ignore', invalid='ignore'):  # a draw with denominator 0 is infinite
      ratio = drawn[:, 0] / drawn[:, 1]
    low, high = np.nanquantile(ratio, [(1 - level) / 2, (1 + level) / 2])
    low, high = min(low, value + linear.low), max(high, value + linear.high)
    df = linear.df
  return replace(share, value=value, low=float(low), high=float(high), df=df)


def difference_in_differences(
  pruned: Array,  # [S, Q] bool: the aligned split P
  control: Array,  # [S, Q] bool: its control C: matched, else random
  hit: Array,  # [Q] bool: P removed a row that is nearer than t_i
  unhit: Array,  # [Q] bool: P removed no row that is nearer than t_i - 0.02
  label: Array,  # [Q] int
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Contrast:
  """Returns (P - C on hit queries) - (P - C on unhit queries of the same classes).

  Both arms get the class mix of the hit queries; classes without both kinds are left out.
  Assumptions: without the removal, swapping C for P would have changed both kinds by the same
  points within a class; the removal affects unhit queries only as much as it affects all.
  """
  difference = _difference(pruned, control)
  hit, unhit, label = np.asarray(hit, bool), np.asarray(unhit, bool), np.asarray(label)
  if not hit.shape == unhit.shape == label.shape == difference.shape[1:]:
    raise ValueError(
      f'hit {hit.shape}, unhit {unhit.shape}, label {label.shape} and correctness '
      f'{difference.shape} must have the same number of images'
    )
  if (hit & unhit).any():
    raise ValueError(f'{(hit & unhit).sum()} queries are marked both hit and unhit')
  weights = class_weights(hit, unhit, label)
  used_hits, used_unhits = (int(np.count_nonzero(weights[arm])) for arm in (hit, unhit))
  result = Contrast(None, int(hit.sum()), int(unhit.sum()), used_hits / max(int(hit.sum()), 1), '')
  if min(used_hits, used_unhits) < FEWEST:
    return replace(
      result,
      reason=f'not estimable: {used_hits} hit and {used_unhits} unhit queries '
      f'in classes that have both; each needs {FEWEST}',
    )
  return replace(result, estimate=statistics.contrast(difference, weights, unhit, groups, level))


def class_weights(
  first: Array,  # [Q] bool
  second: Array,  # [Q] bool, none of them in `first`
  label: Array,  # [Q] int
) -> np.ndarray:  # [Q] float64
  """Returns weights that give both arms of a contrast the class mix of the first.

  An image of the first arm weighs 1; the images of the second arm share the weight of the first
  arm's images of their class. Images of classes without both kinds, and of neither arm, weigh 0.
  """
  _, label = np.unique(label, return_inverse=True)
  firsts, seconds = (np.bincount(label, arm, label.max() + 1) for arm in (first, second))  # [C]
  both = (firsts > 0) & (seconds > 0)
  per_second = firsts / np.maximum(seconds, 1)  # [C] weight of an image of the second arm
  return both[label] * (first + second * per_second[label])


def placebo(
  pruned: Array,  # [S, Q] bool
  control: Array,  # [S, Q] bool
  placebo_pruned: Array,  # [S, Q'] bool: the same runs on the placebo benchmark (val)
  placebo_control: Array,  # [S, Q'] bool
  groups: Sequence | Array | None = None,  # [Q]
  placebo_groups: Sequence | Array | None = None,  # [Q']; a name in both lists is one group
  level: float = 0.95,
) -> Contrast:
  """Returns the placebo contrast [acc_b(P) - acc_b(C)] - [acc_val(P) - acc_val(C)].

  It shows whether P loses more on benchmark b than on a benchmark to which it is not aligned.
  """
  first, second = _difference(pruned, control), _difference(placebo_pruned, placebo_control)
  if len(first) != len(second):
    raise ValueError(f'both benchmarks need the same seeds: got {len(first)} and {len(second)}')
  images, others = first.shape[1], second.shape[1]
  names = [
    *(groups if groups is not None else [None] * images),
    *(placebo_groups if placebo_groups is not None else [None] * others),
  ]
  arms = np.repeat([0, 1], [images, others])
  estimate = statistics.contrast(np.hstack([first, second]), np.ones(len(arms)), arms, names, level)
  return Contrast(estimate, images, others, 1.0, '')


def dose(
  pruned: Array,  # [S, Q] bool
  control: Array,  # [S, Q] bool
  excess: Array,  # [Q] s_i(pool) - t_i; below 0 the dose is 0
  label: Array,  # [Q] int
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Dose:
  """Fits logit P(correct) = pruned + dose + slope (pruned x dose) + class + seed.

  The slope may differ between seeds: its variance is crossed over seeds and groups, as that of the
  main interval (`statistics.two_way`), applied to the scores of the fit. Score sums by group alone
  cover 84 to 87 % if seed slopes vary by half. One seed has an interval over groups, two have the
  range of their own slopes. Classes that are all correct or all wrong have an infinite class effect
  and are dropped.
  """
  pruned, control = statistics.matrix(pruned), statistics.matrix(control)
  difference = _difference(pruned, control)
  excess, label = np.asarray(excess, np.float64), np.asarray(label)
  if not excess.shape == label.shape == difference.shape[1:]:
    raise ValueError(
      f'excess {excess.shape}, label {label.shape} and correctness '
      f'{difference.shape} must have the same number of images'
    )
  if np.isnan(excess).any():
    raise ValueError(f'{np.isnan(excess).sum()} queries have no excess (NaN)')
  seeds, images = pruned.shape
  answers = np.stack([control, pruned], 1)  # [S, 2, Q]
  _, label, count = np.unique(label, return_inverse=True, return_counts=True)
  rate = np.bincount(label, answers.mean((0, 1))) / count  # [C]
  kept = np.flatnonzero((rate[label] > 0) & (rate[label] < 1))
  _, group = np.unique(statistics.group_index(groups, images)[kept], return_inverse=True)
  units, nan = len(np.unique(group)), np.nan
  result = Dose(
    nan, nan, nan, nan, nan, nan, seeds, len(kept), images - len(kept), units, _method(seeds), ''
  )
  if units < 2:
    return replace(result, reason='not estimable: fewer than two groups in classes that vary')
  data = answers[:, :, kept], np.maximum(excess[kept], 0), label[kept], group
  fit = _dose_fit(*data)
  if fit is None:
    return replace(
      result,
      reason='not estimable: the dose hardly varies within classes, or it separates correct from '
      'wrong answers',
    )
  slope, scores = fit
  if seeds == 2:
    each = [_dose_fit(data[0][[s]], *data[1:]) for s in range(2)]
    slopes = [one[0] for one in each if one is not None]
    low, high = (min(slopes), max(slopes)) if len(slopes) == 2 else (nan, nan)
    return replace(result, value=slope, low=low, high=high)
  variance, df = statistics.two_way(scores, statistics.effective_groups(np.bincount(group)))
  error = float(np.sqrt(variance))
  half = float(special.stdtrit(df, (1 + level) / 2)) * error
  p_value = float(2 * special.stdtr(df, -abs(slope) / error)) if seeds > 2 else nan
  return replace(
    result,
    value=slope,
    low=slope - half,
    high=slope + half,
    error=error,
    df=float(df),
    p_value=p_value,
  )


def _dose_fit(
  answers: np.ndarray,  # [S, 2, Q] 0 or 1, of the control and of the pruned split
  amount: np.ndarray,  # [Q]
  label: np.ndarray,  # [Q] int
  group: np.ndarray,  # [Q] in 0..G-1
) -> tuple[float, np.ndarray] | None:  # the slope, and each group's contribution in each seed
  """Fits the dose model; contributions [S, G] sum to about 0 over seeds and groups."""
  shape = seeds, _, _ = answers.shape
  treated = np.broadcast_to(np.array([0.0, 1.0])[:, None], shape)
  amount = np.broadcast_to(amount, shape)
  seed_effects = [
    np.broadcast_to((np.arange(seeds) == s)[:, None, None], shape) for s in range(1, seeds)
  ]
  x = np.stack([treated * amount, treated, amount, *seed_effects], -1).reshape(-1, 2 + seeds)
  _, label = np.unique(label, return_inverse=True)
  fit = _logistic(x, answers.ravel(), np.broadcast_to(label, shape).ravel())
  if fit is None:
    return None
  slope, scores = fit
  units = group.max() + 1
  cell = np.arange(seeds)[:, None, None] * units + np.broadcast_to(group, shape)
  return slope, seeds * np.bincount(cell.ravel(), scores, seeds * units).reshape(seeds, units)


def _logistic(
  x: np.ndarray,  # [n, k]
  y: np.ndarray,  # [n] 0 or 1
  label: np.ndarray,  # [n] in 0..C-1: one intercept each
) -> tuple[float, np.ndarray] | None:  # the first coefficient, and its influences [n]
  """Fits a logistic regression by IRLS, each step a weighted regression within classes.

  This is exact (Frisch and Waugh) without building the 1,000 class columns. An influence is the
  observation's part of the estimate's error, in first order. None if the fit does not exist:
  collinear columns, or a coefficient that diverges.
  """
  scale = x.std(0)
  if not (scale > 0).all():
    return None
  x, k = x / scale, x.shape[1]
  beta, intercept = np.zeros(k), np.zeros(label.max() + 1)
  for _ in range(STEPS):
    eta = x @ beta + intercept[label]
    p = 1 / (1 + np.exp(-np.clip(eta, -30, 30)))
    weight = p * (1 - p)
    total = np.bincount(label, weight)  # [C]
    means = np.stack([np.bincount(label, weight * c) / total for c in x.T], 1)  # [C, k]
    within = x - means[label]  # [n, k]
    information = within.T @ (weight[:, None] * within)  # [k, k]
    if np.linalg.cond(information) > 1e10:
      return None
    target = eta + (y - p) / weight
    step = np.linalg.solve(information, within.T @ (weight * target)) - beta
    beta = beta + step
    intercept = np.bincount(label, weight * target) / total - means @ beta
    if np.abs(step).max() < 1e-9:
      break
  else:
    return None
  influence = within @ np.linalg.inv(information)[0] * (y - p) / scale[0]
  return float(beta[0] / scale[0]), influence


def _method(seeds: int) -> str:
  return {1: 'this checkpoint', 2: 'range'}.get(seeds, 'crossed')


def _difference(pruned: Array, control: Array) -> np.ndarray:  # [S, Q]
  pruned, control = statistics.matrix(pruned), statistics.matrix(control)
  if pruned.shape != control.shape:
    raise ValueError(
      'pruned and control must hold the same seeds and images: got '
      f'{pruned.shape} and {control.shape}'
    )
  return pruned - control


def _points(estimate: Estimate) -> str:
  if np.isnan(estimate.low):
    interval = 'no interval: all images belong to one group'
  else:
    interval = f'{100 * estimate.low:.1f} to {100 * estimate.high:.1f}'
  return f'{100 * estimate.value:+.1f} points, {interval}'.replace('-', '\u2212')
