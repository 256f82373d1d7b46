"""Intervals and tests for crossed correctness: the same images under several seeds.

In: arrays of 0/1 correctness [S, Q], or differences of two of them. Out: frozen results. No files.
All values are proportions (differences: -1..1); times 100 they are points.

The number of seeds S decides the result. S = 1: an interval over images, for this checkpoint,
without a p-value. S = 2: the range of the two seeds. S >= 3: a t interval over seeds and images,
both random.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
import math

import numpy as np
from scipy import special

from clip_jax.core.types import Array

SMALL_SET = 3000  # images; with fewer, the 90 % interval of three seeds is wider than +-1 point
POWER = 0.8
TINY = 1e-24  # a smaller variance is rounding error: all contributions are equal


@dataclass(frozen=True)
class Estimate:
  """A mean with its interval; low, high, error, df and p_value are NaN if they do not exist."""

  value: float  # a proportion, or a difference of proportions
  low: float
  high: float
  error: float  # standard error
  df: float  # degrees of freedom of the interval's t distribution
  p_value: float  # two-sided, of value = 0: only for a difference over three or more seeds
  seeds: int  # S
  images: int  # Q; of a contrast, those with a weight
  groups: int  # independent units among the images: Q if no image has a group
  method: str  # 'crossed' (S >= 3) | 'range' (S = 2) | 'this checkpoint' (S = 1) | 'bootstrap' |
  # 'wilson' or 'cluster-robust' (one accuracy, S = 1) | 'none' (a single group)


@dataclass(frozen=True)
class Equivalence:
  """Whether a difference is shown to be negligible, shown to differ from 0, or neither."""

  verdict: str  # 'equivalent' | 'different' | 'undetermined'
  low: float  # the 90 % interval
  high: float
  margin: float  # largest negligible difference
  p_value: float  # of the two one-sided tests (Schuirmann 1987): below 5 % if 'equivalent'
  detectable: float  # true difference detected with power 80 % at level 5 %; NaN for S < 3


@dataclass(frozen=True)
class McNemar:
  """The images on which two models of one seed differ."""

  first_only: int  # images on which only the first model is correct
  second_only: int
  p_value: float  # exact, mid-p


def group_index(groups: Sequence | Array | None, images: int) -> np.ndarray:  # [Q] int64 in 0..G-1
  """Numbers the groups; an image with group None, NaN, '' or -1 is a group of its own."""
  if groups is None:
    return np.arange(images)
  if len(groups) != images:
    raise ValueError(f'groups must have one name per image: got {len(groups)} for {images} images')
  if isinstance(groups, np.ndarray) and groups.dtype.kind in 'iu':
    alone = groups == -1
    names = groups.astype(np.int64)
    names[alone] = names.max() + 1 + np.arange(alone.sum())
    _, first, index = np.unique(names, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[index]
  number, index = {}, np.empty(images, np.int64)
  for i, name in enumerate(groups):
    missing = isinstance(name, float | np.floating) and np.isnan(name)
    alone = missing or name is None or name in ('', -1)
    index[i] = number.setdefault(('alone', i) if alone else name, len(number))
  return index


def crossed_interval(
  difference: Array,  # [S, Q] correct(A) - correct(B)
  groups: Sequence | Array | None = None,  # [Q] names, as in group_index
  level: float = 0.95,
) -> Estimate:
  """Returns the mean difference over seeds and images, with two-way random effects.

  The variance and degrees of freedom are those of `two_way`. Images of one group (siblings of one
  photo) enter as their sum.
  """
  difference = matrix(difference)
  same = np.ones(difference.shape[1])
  return contrast(difference, same, 0 * same, groups, level)


def contrast(
  values: Array,  # [S, Q]
  weights: Array,  # [Q], 0 leaves an image out
  arms: Array,  # [Q] 0 or 1: estimate = weighted mean of arm 0 - that of arm 1, if not empty
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Estimate:
  """Returns a difference of two weighted means over images, with the crossed variance.

  An image contributes its weight times its deviation from its arm's mean, so that random group
  sizes add no variance of their own (linearisation of the ratio estimator).
  """
  values = matrix(values)
  parts = _contributions(values, weights, arms, groups)
  seeds, images, units = len(values), int(np.count_nonzero(weights)), parts.z.shape[1]
  variance, df = two_way(parts.z, parts.effective)
  if seeds == 2 or np.isnan(variance):
    return _without_error(parts.totals, images, units)
  if variance < TINY:  # avoids a zero-width interval: as if one group per arm gained and one lost
    variance, df = sum(2 / (n + 2.0) ** 2 for n in parts.groups), units - 1.0
  value, error = float(parts.totals.mean()), float(np.sqrt(variance))
  half = float(special.stdtrit(df, (1 + level) / 2)) * error
  p_value = float(2 * special.stdtr(df, -abs(value) / error)) if seeds > 2 else np.nan
  return Estimate(
    value,
    value - half,
    value + half,
    error,
    float(df),
    p_value,
    seeds,
    images,
    units,
    'crossed' if seeds > 2 else 'this checkpoint',
  )


def with_error(
  estimate: Estimate,
  error: float,  # standard error of a further, independent part of the estimate
  df: float,  # its degrees of freedom
  level: float = 0.95,
) -> Estimate:
  """Returns an estimate of `contrast` with a further error, by Satterthwaite's degrees of freedom.

  A range of two seeds, or an estimate without an interval, stays as it is.
  """
  if not error or not math.isfinite(estimate.error):
    return estimate
  own, further = estimate.error**2, error**2
  variance = own + further
  df = variance**2 / (own**2 / estimate.df + further**2 / df)
  half = float(special.stdtrit(df, (1 + level) / 2) * np.sqrt(variance))
  p_value = float(2 * special.stdtr(df, -abs(estimate.value) / np.sqrt(variance)))
  return replace(
    estimate,
    low=estimate.value - half,
    high=estimate.value + half,
    error=float(np.sqrt(variance)),
    df=float(df),
    p_value=estimate.p_value if math.isnan(estimate.p_value) else p_value,
  )


def accuracy_interval(
  correct: Array,  # [S, Q] bool
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Estimate:
  """Returns one accuracy over S seeds; Wilson's form of the crossed variance bounds it in 0..1."""
  correct = matrix(correct)
  if len(correct) == 1:
    return image_interval(correct[0], groups, level)
  return _bounded(correct, np.ones(correct.shape[1]), groups, level)


def image_interval(
  correct: Array,  # [Q] bool
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Estimate:
  """Returns one run's accuracy with an interval over images.

  The method is 'wilson' or, if images share groups, 'cluster-robust': Wilson's form with
  n = p (1 - p) / Var and t with G - 1 degrees of freedom.
  """
  correct = matrix(np.asarray(correct)[None])
  images = correct.shape[1]
  group = group_index(groups, images)
  if group.max() + 1 < images:
    found = _bounded(correct, np.ones(images), groups, level)
    return found if found.method == 'none' else replace(found, method='cluster-robust')
  p = float(correct.mean())
  low, high = _wilson(p, images, special.ndtri((1 + level) / 2))
  error = float(np.sqrt(p * (1 - p) / images))
  return Estimate(p, float(low), float(high), error, np.inf, np.nan, 1, images, images, 'wilson')


def balanced_accuracy(
  correct: Array,  # [S, Q] bool
  label: Array,  # [Q] int
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Estimate:
  """Returns the mean of the per-class accuracies, over classes that have images."""
  correct, label = matrix(correct), np.asarray(label)
  if label.shape != correct.shape[1:]:
    raise ValueError(
      f'correct {correct.shape} and label {label.shape} must have the same number of images'
    )
  _, index, count = np.unique(label, return_inverse=True, return_counts=True)
  return _bounded(correct, 1 / count[index], groups, level)


def linear_interval(
  weights: Array,  # [Q] of the images in a linear estimate of an accuracy
  values: Array,  # [S, Q]
  residual: Array,  # [S, Q] values less those of the fitted model
  groups: Sequence | Array | None = None,
  level: float = 0.95,
) -> Estimate:
  """Returns sum over images of weight x value, with the crossed variance of weight x residual.

  The interval is that around the value clipped to 0..1, which is never further from the truth, and
  is clipped, too; so it has a width even for a value outside 0..1. Groups count by their sums of
  squared weights.
  """
  values, weights = matrix(values), np.asarray(weights, np.float64)
  group = group_index(groups, values.shape[1])
  totals, z = values @ weights, _group_sums(weights * residual, group)
  seeds, images, units = *values.shape, z.shape[1]
  sizes = np.sqrt(np.bincount(group, weights**2))
  variance, df = two_way(z, effective_groups(sizes))
  if seeds == 2 or np.isnan(variance):
    found = _without_error(totals, images, units)
    low, high = (float(np.clip(bound, 0, 1)) for bound in (found.low, found.high))
    return replace(found, low=low, high=high)
  if variance < TINY:  # as in contrast
    variance, df = 2 / (units + 2.0) ** 2, units - 1.0
  value, error, df = float(totals.mean()), float(np.sqrt(variance)), float(df)
  half, middle = float(special.stdtrit(df, (1 + level) / 2)) * error, np.clip(value, 0, 1)
  low, high = (float(np.clip(bound, 0, 1)) for bound in (middle - half, middle + half))
  method = 'crossed' if seeds > 2 else 'this checkpoint'
  return Estimate(value, low, high, error, df, np.nan, seeds, images, units, method)


def bootstrap_interval(
  difference: Array,  # [S, Q]
  groups: Sequence | Array | None = None,
  level: float = 0.95,
  draws: int = 2000,
  seed: int = 0,
) -> Estimate:
  """Returns percentiles of crossed_bootstrap, as a cross-check of crossed_interval.

  It counts the seed-by-image variance up to three times (Owen 2007, the pigeonhole bootstrap), so
  it is wider than crossed_interval if that variance dominates. Three seeds give few distinct draws.
  """
  difference = matrix(difference)
  seeds, images = difference.shape
  drawn = crossed_bootstrap(difference[None], groups, draws, seed)[:, 0]
  low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
  units = int(group_index(groups, images).max()) + 1
  return Estimate(
    float(difference.mean()),
    float(low),
    float(high),
    float(drawn.std(ddof=1)),
    np.nan,
    np.nan,
    seeds,
    images,
    units,
    'bootstrap',
  )


def crossed_bootstrap(
  values: Array,  # [K, S, Q]: K quantities on the same seeds and images
  groups: Sequence | Array | None = None,
  draws: int = 2000,
  seed: int = 0,
) -> np.ndarray:  # [draws, K] means under the same resampled seeds and groups; NaN for one group
  """Returns means counts_s^T values counts_g with seeds and groups resampled independently.

  n - 1 of n are drawn, which makes the variance of a mean unbiased (Rao and Wu 1988); at S = 3 the
  plain bootstrap misses a third of the variance. A single seed is not resampled. Groups with equal
  columns are drawn together, as one multinomial cell: 50,000 images have few distinct columns.
  """
  values = np.asarray(values, np.float64)
  quantities, seeds, images = values.shape
  group = group_index(groups, images)
  units = int(group.max()) + 1
  if units < 2:
    return np.full((draws, quantities), np.nan)
  rows = np.vstack(
    [_group_sums(values.reshape(-1, images), group), np.bincount(group)]
  )  # [K S + 1, G], the last row holds the group sizes
  cells, count = np.unique(rows, axis=1, return_counts=True)  # [K S + 1, U]
  rng = np.random.default_rng(seed)
  seed_counts = (
    np.ones((draws, 1))
    if seeds == 1
    else rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), draws)
  )  # [draws, S]
  block = max(1, 2_000_000 // len(count))  # draws at a time, 16 MB
  sums = np.concatenate(
    [
      rng.multinomial(units - 1, count / units, min(block, draws - start)) @ cells.T
      for start in range(0, draws, block)
    ]
  )  # [draws, K S + 1]
  per_seed = sums[:, :-1].reshape(draws, quantities, seeds) / sums[:, -1, None, None]
  return np.einsum('bks,bs->bk', per_seed, seed_counts) / seed_counts.sum(1, keepdims=True)


def equivalence(
  difference: Array,  # [S, Q]
  groups: Sequence | Array | None = None,
  margin: float | None = None,  # None: 0.01, or 0.03 for fewer than SMALL_SET images
) -> Equivalence:
  """Tests whether a difference is negligible.

  The verdict is of one comparison; claims over several need Holm's adjustment of the p-values.
  'equivalent': the 90 % interval lies inside +-margin, even if the 95 % interval excludes 0.
  'different': the 95 % interval excludes 0. 'undetermined': neither, or fewer than three seeds.
  """
  difference = matrix(difference)
  if margin is None:
    margin = 0.01 if difference.shape[1] >= SMALL_SET else 0.03
  narrow, wide = (crossed_interval(difference, groups, level) for level in (0.9, 0.95))
  verdict, detectable, p_value = 'undetermined', np.nan, np.nan
  if wide.method == 'crossed':
    detectable = wide.error * (special.stdtrit(wide.df, 0.975) + special.stdtrit(wide.df, POWER))
    p_value = float(special.stdtr(wide.df, (abs(wide.value) - margin) / wide.error))
    if -margin < narrow.low and narrow.high < margin:
      verdict = 'equivalent'
    elif wide.low > 0 or wide.high < 0:
      verdict = 'different'
  return Equivalence(verdict, narrow.low, narrow.high, margin, p_value, float(detectable))


def mcnemar(first: Array, second: Array) -> McNemar:  # [Q] bool, [Q] bool
  """Returns McNemar's exact test (mid-p) for one seed; ignores groups, for detail tables only."""
  first, second = np.asarray(first, bool), np.asarray(second, bool)
  if first.shape != second.shape:
    raise ValueError(f'first {first.shape} and second {second.shape} must have the same shape')
  b, c = int((first & ~second).sum()), int((second & ~first).sum())
  low, n = min(b, c), b + c
  # 2 P(X <= low) - P(X = low)
  p = special.bdtr(low, n, 0.5) + (special.bdtr(low - 1, n, 0.5) if low else 0)
  return McNemar(b, c, float(p))


def holm(p_values: Array | Sequence[float]) -> np.ndarray:  # [m] -> [m]
  """Returns Holm's adjusted p-values in the given order; NaN is not in the family, stays NaN."""
  p_values = np.asarray(p_values, np.float64)
  adjusted = np.full(p_values.shape, np.nan)
  family = np.flatnonzero(~np.isnan(p_values))
  order = family[np.argsort(p_values[family], kind='stable')]
  scaled = p_values[order] * np.arange(len(order), 0, -1)
  adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
  return adjusted


def number(value: float) -> float | None:
  """Returns a number for JSON, None for NaN or infinity.

  A class without images has no accuracy, a single group no interval, and Wilson's interval has no
  degrees of freedom.
  """
  return float(value) if math.isfinite(value) else None


def two_way(
  z: Array,  # [..., S, G] contribution of each group in each seed
  effective: float | None = None,  # number of groups of equal size, see effective_groups; None: G
) -> tuple[Array, Array]:  # variance [...], df [...]
  """Returns variance and degrees of freedom of the mean over seeds of the sum over groups.

  Both count as random samples. Var = max(MS_S + MS_I - MS_E, MS_S, MS_I) / (S G), the two-way
  random-effects variance of a mean, here as parts of that variance.
  df: 1/df = w / (S - 1) + (1 - w) / (G - 1), with w = MS_S / max(...), the seeds' share.
  Satterthwaite's df, which weights squares, is too large if the estimate of a variance with two
  degrees of freedom is small by chance: intervals of three seeds then cover 92 % in place of 95 %
  (docs/statistics.md). Groups of unequal size count as G = `effective` groups.
  """
  seeds, units = z.shape[-2:]
  nothing = np.full(z.shape[:-2], np.nan)
  if units < 2:
    return nothing, nothing
  effective = float(units) if effective is None else max(effective, 2.0)
  few = effective / (effective - 1)
  total, column = z.sum(-1), z.mean(-2)  # [..., S], [..., G]
  mean = column.mean(-1)
  column = column - mean[..., None]
  of_images = few * (column**2).sum(-1)
  if seeds == 1:
    return of_images, np.full_like(of_images, effective - 1)
  of_seeds = total.var(-1, ddof=1) / seeds
  rest = z - total[..., None] / units - column[..., None, :]
  of_error = few * (rest**2).sum((-2, -1)) / (seeds * (seeds - 1))
  return combine(of_seeds, of_images, of_error, seeds, effective)


def combine(
  of_seeds: Array,  # [...] MS_S / (S G)
  of_images: Array,  # [...] MS_I / (S G)
  of_error: Array,  # [...] MS_E / (S G)
  seeds: int,  # S, at least 2
  effective: float,  # G
) -> tuple[Array, Array]:  # variance [...], df [...]
  """Returns variance and degrees of freedom of a mean from its mean squares, as in `two_way`."""
  variance = np.maximum(np.maximum(of_seeds + of_images - of_error, of_seeds), of_images)
  part = np.divide(of_seeds, variance, out=np.ones_like(variance), where=variance > 0)
  return variance, 1 / (part / (seeds - 1) + (1 - part) / (effective - 1))


def effective_groups(sizes: Array) -> float:  # [G] sums of weights, 0 or larger
  """Returns the number of groups of equal size with the same sum of squared shares (Kish 1965).

  With unequal groups, the largest dominate: their squared deviations underestimate the variance, as
  those of fewer groups do, and have fewer degrees of freedom (Carter, Schnepel and Steigerwald
  2017).
  """
  sizes = np.asarray(sizes, np.float64)
  return float(sizes.sum() ** 2 / (sizes**2).sum())


def matrix(values: Array) -> np.ndarray:  # [S, Q] float64
  """Returns a seeds-by-images array as float64; raises ValueError if it is empty or not finite."""
  values = np.asarray(values, np.float64)
  if values.ndim != 2 or not values.size:
    raise ValueError(f'expected a non-empty array [seeds, images], got shape {values.shape}')
  if not np.isfinite(values).all():
    raise ValueError(
      'correctness holds NaN or infinity; an unreadable image must count as wrong (0)'
    )
  return values


def _group_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:  # [m, Q], [Q] -> [m, G]
  return np.stack([np.bincount(group, row) for row in values])


@dataclass(frozen=True)
class _Parts:
  """A weighted mean, or a difference of two, taken apart by seed and group."""

  totals: np.ndarray  # [S] each seed's estimate
  z: np.ndarray  # [S, G] contributions
  groups: list[int]  # per arm
  effective: float  # groups of equal size, the mean over arms


def _contributions(
  values: np.ndarray,  # [S, Q]
  weights: Array,  # [Q]
  arms: Array,  # [Q] 0 or 1
  groups: Sequence | Array | None,
) -> _Parts:
  group = group_index(groups, values.shape[1])
  counted = np.flatnonzero(weights)
  _, group = np.unique(group[counted], return_inverse=True)
  values = values[:, counted]
  weights, arms = np.asarray(weights, np.float64)[counted], np.asarray(arms)[counted]
  totals, z, sizes = np.zeros(len(values)), np.zeros((len(values), group.max() + 1)), []
  for sign, arm in ((1, 0), (-1, 1)):
    weight = np.where(arms == arm, weights, 0)
    if weight.any():
      mean = (values * weight).sum(1) / weight.sum()  # [S]
      totals += sign * mean
      z += _group_sums(sign * weight * (values - mean.mean()) / weight.sum(), group)
      sizes.append(np.bincount(group, weight))
  return _Parts(
    totals,
    z,
    [int((n > 0).sum()) for n in sizes],
    float(np.mean([effective_groups(n) for n in sizes])),
  )


def _without_error(totals, images, units) -> Estimate:  # [S]
  """Returns the range of two seeds, or no interval for a single group."""
  seeds, nan = len(totals), np.nan
  low, high = (float(totals.min()), float(totals.max())) if seeds == 2 else (nan, nan)
  return Estimate(
    float(totals.mean()),
    low,
    high,
    nan,
    nan,
    nan,
    seeds,
    images,
    units,
    'range' if seeds == 2 else 'none',
  )


def _bounded(correct, weights, groups, level) -> Estimate:
  """Returns a weighted accuracy in Wilson's form, with an effective number of images."""
  parts = _contributions(correct, weights, np.zeros(len(weights)), groups)
  seeds, images, units = *correct.shape, parts.z.shape[1]
  variance, df = two_way(parts.z, parts.effective)
  if seeds == 2 or np.isnan(variance):
    return _without_error(parts.totals, images, units)
  p = float(parts.totals.mean())
  df = units - 1.0 if variance < TINY else float(df)
  low, high = bounded(p, variance, df, units, seeds * images, level)
  return Estimate(
    p,
    float(low),
    float(high),
    float(np.sqrt(variance)),
    df,
    np.nan,
    seeds,
    images,
    units,
    'crossed' if seeds > 2 else 'this checkpoint',
  )


def bounded(
  p: Array | float,  # [...] proportions
  variance: Array | float,  # [...] of p, as from two_way
  df: Array | float,  # [...]
  units: int,  # G
  most: int,  # S Q, the highest effective number of images
  level: float = 0.95,
) -> tuple[Array, Array]:  # low [...], high [...]
  """Returns Wilson's interval for an effective number of images n = p (1 - p) / Var.

  All correct or all wrong has no variance; each group then counts as one observation.
  """
  constant = np.asarray(variance < TINY)
  n = np.minimum(p * (1 - p) / np.where(constant, 1, variance), most)
  df = np.where(constant, units - 1, df)
  return _wilson(p, np.where(constant, units, n), special.stdtrit(df, (1 + level) / 2))


def _wilson(p: Array | float, n: Array | float, quantile: Array) -> tuple[Array, Array]:
  """Returns Wilson's score interval of a proportion p observed on n images."""
  shrink = 1 + quantile**2 / n
  middle = (p + quantile**2 / (2 * n)) / shrink
  half = quantile / shrink * np.sqrt(p * (1 - p) / n + quantile**2 / (4 * n**2))
  return np.clip(middle - half, 0, p), np.clip(middle + half, p, 1)
