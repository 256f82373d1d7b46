"""The report's statistics, written again from docs/statistics.md. Imports nothing of clip_jax.

Used by tests/recompute_page.py. Accuracies and differences are proportions; S is the number of
seeds, Q of images.
"""

import dataclasses

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its interval, and what it rests on."""

  value: float
  low: float | None = None
  high: float | None = None
  method: str = 'crossed'
  seeds: int = 0
  images: int = 0
  groups: int = 0
  df: float | None = None
  error: float | None = None  # standard error; the square root of Var

  def at(self, level: float) -> tuple[float, float]:
    """The interval of another level, around the value."""
    half = stats.t.ppf((1 + level) / 2, self.df) * self.error
    return self.value - half, self.value + half


def kish(sizes: np.ndarray) -> float:
  """As many groups of equal size count as much as these: (sum n)^2 / (sum n^2)."""
  return float(sizes.sum() ** 2 / (sizes.astype(float) ** 2).sum())


def group_sums(
  values: np.ndarray,  # [S, Q]
  groups: np.ndarray,  # [Q] group of each image
) -> np.ndarray:  # [S, number of groups]
  names, inverse = np.unique(groups, return_inverse=True)
  sums = np.zeros((len(values), len(names)))
  for s, row in enumerate(values):
    sums[s] = np.bincount(inverse, row, len(names))
  return sums


def variance(
  z: np.ndarray,  # [S, number of groups] contributions; their sum over groups is a seed's deviation
  effective: float,  # number of groups of equal size
) -> tuple[float, float]:
  """Var and df of the main interval."""
  s, g = len(z), max(effective, 2)
  if z.shape[1] < 2:
    return np.nan, np.nan
  by_group = z.mean(0)  # [groups]
  images = g / (g - 1) * ((by_group - by_group.mean()) ** 2).sum()
  if s == 1:
    return float(images), g - 1
  by_seed = z.sum(1)
  seeds = by_seed.var(ddof=1) / s
  rest = z - by_group - (by_seed - by_seed.mean())[:, None] / z.shape[1]
  noise = g / (g - 1) * (rest**2).sum() / (s * (s - 1))
  most = max(seeds + images - noise, seeds, images)
  if most == 0:
    return 0.0, np.nan
  w = seeds / most
  return float(most), float(1 / (w / (s - 1) + (1 - w) / (g - 1)))


def wilson(p: float, n: float, t: float) -> tuple[float, float]:
  """Wilson's interval of a proportion of n trials, t the quantile."""
  centre = (p + t * t / (2 * n)) / (1 + t * t / n)
  half = t / (1 + t * t / n) * np.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
  return float(np.clip(centre - half, 0, p)), float(np.clip(centre + half, p, 1))


def accuracy(
  correct: np.ndarray,  # [S, Q] 0 or 1
  groups: np.ndarray,  # [Q]
) -> Interval:
  """One accuracy with its interval in Wilson's form."""
  s, q = correct.shape
  p = float(correct.mean())
  sizes = np.unique(groups, return_counts=True)[1]
  info = {'seeds': s, 'images': q, 'groups': len(sizes)}
  if s == 1 and len(sizes) == q:
    return Interval(p, *wilson(p, q, stats.norm.ppf(0.975)), method='wilson', **info)
  if s == 2:
    return Interval(p, *sorted(correct.mean(1)), method='range', **info)
  method = 'crossed' if s > 2 else 'cluster-robust'
  var, df = variance(group_sums((correct - p) / q, groups), kish(sizes))
  if not np.isfinite(var):
    return Interval(p, method='none', **info)
  if not var:
    df = len(sizes) - 1
  n = min(p * (1 - p) / var, s * q) if var else len(sizes)
  low, high = wilson(p, n, stats.t.ppf(0.975, df))
  return Interval(p, low, high, method=method, df=df, error=var**0.5, **info)


def contrast(
  z: np.ndarray,  # [S, Q] weight x (value - mean), of each image
  value: float,
  groups: np.ndarray,  # [Q]
  effective: float | None = None,  # default: Kish's number for these groups
  seed_values: np.ndarray | None = None,  # [S] the estimate of each seed, for two seeds
) -> Interval:
  """The main interval of an estimate."""
  s, q = z.shape
  sizes = np.unique(groups, return_counts=True)[1]
  info = {'seeds': s, 'images': q, 'groups': len(sizes)}
  if s == 2 and seed_values is not None:
    return Interval(value, *sorted(seed_values), method='range', **info)
  var, df = variance(group_sums(z, groups), kish(sizes) if effective is None else effective)
  if not np.isfinite(var):
    return Interval(value, method='none', **info)
  if var < 1e-20:  # all groups agree: as if one more had gained and one lost
    var, df = 2 / (info['groups'] + 2) ** 2, info['groups'] - 1
  half = stats.t.ppf(0.975, df) * var**0.5
  method = 'crossed' if s > 2 else 'this checkpoint'
  return Interval(value, value - half, value + half, method, df=df, error=var**0.5, **info)


def difference(
  one: np.ndarray,  # [S, Q]
  other: np.ndarray,  # [S, Q]
  groups: np.ndarray,  # [Q]
) -> Interval:
  """Mean accuracy of one minus that of the other."""
  d = one.astype(float) - other
  value = float(d.mean())
  return contrast((d - value) / d.shape[1], value, groups, seed_values=d.mean(1))


def difference_of_means(
  d: np.ndarray,  # [S, Q]
  weights: tuple[np.ndarray, np.ndarray],  # two [Q], each sums to 1, zero outside its set
  groups: np.ndarray,  # [Q]
) -> Interval:
  """A weighted mean of some images minus that of others."""
  means = [float((d * w).sum(1).mean()) for w in weights]
  z = sum(sign * w * (d - m) for sign, w, m in zip((1, -1), weights, means, strict=True))
  parts = [kish(group_sums(w[None], groups)[0]) for w in weights]
  used = (weights[0] + weights[1]) > 0
  seed_values = (d * (weights[0] - weights[1])).sum(1)
  return contrast(z[:, used], means[0] - means[1], groups[used], sum(parts) / 2, seed_values)


def p_value(interval: Interval) -> float:
  return float(2 * stats.t.sf(abs(interval.value) / interval.error, interval.df))


def p_no_loss(interval: Interval, margin: float) -> float:
  """Equivalence: the larger of the two one-sided p-values."""
  return float(stats.t.sf((margin - abs(interval.value)) / interval.error, interval.df))


def detectable(interval: Interval, power: float = 0.8) -> float:
  t = stats.t.ppf(0.975, interval.df) + stats.t.ppf(power, interval.df)
  return float(t * interval.error)


def holm(p: list[float]) -> list[float]:
  order = np.argsort(p)
  adjusted, highest = np.zeros(len(p)), 0.0
  for place, i in enumerate(order):
    highest = max(highest, min(1.0, (len(p) - place) * p[i]))
    adjusted[i] = highest
  return adjusted.tolist()


def mcnemar_mid_p(one_only: int, other_only: int) -> float:
  """Exact mid-p: twice the tail, with half of the observed count's probability."""
  n, least = one_only + other_only, min(one_only, other_only)
  if not n:
    return 1.0
  tail = 2 * stats.binom.cdf(least, n, 0.5) - stats.binom.pmf(least, n, 0.5)
  return float(min(1.0, tail))


def ratio(
  top: np.ndarray,  # [S, Q]
  lead: np.ndarray,  # [S, Q]
  groups: np.ndarray,  # [Q]
) -> Interval:
  """Mean of top over mean of lead, with the main interval of its linearisation."""
  value = float(top.mean() / lead.mean())
  return contrast((top - value * lead) / lead.mean() / top.shape[1], value, groups)


def bootstrap(
  parts: list[np.ndarray],  # one or two [S, Q]; of two, the ratio of their means
  groups: np.ndarray,  # [Q]
  draws: int = 20_000,
) -> np.ndarray:  # [draws] sorted
  """Estimates of data sets that draw n - 1 of n seeds, and of n groups, with replacement."""
  rng = np.random.default_rng(0)
  s = len(parts[0])
  sizes = np.unique(groups, return_counts=True)[1]
  of_seeds = rng.multinomial(s - 1, np.full(s, 1 / s), draws) / (s - 1)  # [draws, S]
  of_groups = rng.multinomial(len(sizes) - 1, np.full(len(sizes), 1 / len(sizes)), draws)
  means = [
    ((of_seeds @ group_sums(part, groups)) * of_groups).sum(1) / (of_groups @ sizes)
    for part in parts
  ]
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.sort(means[0] if len(means) == 1 else means[0] / means[1])


def likely_quantile(
  ordered: np.ndarray,  # sorted draws
  level: float,
  draws: int,  # of the quantile that is checked
) -> tuple[float, float]:
  """Between what a quantile of fewer draws lies, up to four standard errors of its rank."""
  reach = 4 * np.sqrt(level * (1 - level) / draws)
  low, high = np.clip([level - reach, level + reach], 0, 1)
  return tuple(ordered[np.round(np.array([low, high]) * (len(ordered) - 1)).astype(int)].tolist())


def dose_slope(
  pruned: np.ndarray,  # [S, Q] 0 or 1
  control: np.ndarray,  # [S, Q]
  lost: np.ndarray,  # [Q] similarity lost
  labels: np.ndarray,  # [Q]
  groups: np.ndarray,  # [Q]
) -> Interval:
  """Logistic regression on arm x lost similarity, its parts, classes and seeds; the product.

  Classes whose answers are all right or all wrong have no finite effect and are left out.
  """
  y = np.stack([pruned, control])
  mixed = [c for c in np.unique(labels) if len(np.unique(y[:, :, labels == c])) == 2]
  informs = np.isin(labels, mixed)
  y, lost, labels, groups = y[:, :, informs], lost[informs], labels[informs], groups[informs]
  arm = np.broadcast_to(np.array([1.0, 0.0])[:, None, None], y.shape)
  lost = np.broadcast_to(lost, y.shape)
  seed = np.arange(y.shape[1])[:, None]
  columns = [arm * lost, arm, lost]
  columns += [np.broadcast_to(labels == c, y.shape) for c in np.unique(labels)]
  columns += [np.broadcast_to(seed == s, y.shape) for s in range(1, y.shape[1])]
  x = np.stack([c.ravel() for c in columns], 1).astype(float)
  beta = np.zeros(x.shape[1])
  for _ in range(100):
    p = 1 / (1 + np.exp(-x @ beta))
    information = (x.T * (p * (1 - p))) @ x
    step = np.linalg.lstsq(information, x.T @ (y.ravel() - p), rcond=None)[0]
    beta += step
    if abs(step).max() < 1e-11:
      break
  influence = np.linalg.lstsq(information, (x * (y.ravel() - p)[:, None]).T, rcond=None)[0][0]
  z = influence.reshape(y.shape).sum(0) * y.shape[1]
  return contrast(z, float(beta[0]), groups)


def class_weights(
  one: np.ndarray,  # [Q] bool
  other: np.ndarray,  # [Q] bool
  labels: np.ndarray,  # [Q]
) -> tuple[np.ndarray, np.ndarray]:
  """Weights of two sets of images with the class mix of the first, over classes with both."""
  both = [c for c in np.unique(labels) if (one & (labels == c)).any()]
  both = [c for c in both if (other & (labels == c)).any()]
  weights = np.zeros((2, len(labels)))
  total = sum((one & (labels == c)).sum() for c in both)
  for c in both:
    here = labels == c
    share = (one & here).sum() / total
    for row, members in zip(weights, (one & here, other & here), strict=True):
      row[members] = share / members.sum()
  return weights[0], weights[1]


def bins_without_classes(
  correct: np.ndarray,  # [S, Q]
  bins: np.ndarray,  # [Q]
  labels: np.ndarray,  # [Q]
  groups: np.ndarray,  # [Q]
) -> dict[int, Interval | None]:  # by bin
  """Accuracy of each bin from a least-squares fit on bins and classes, at the overall class mix."""
  linked = _largest_linked(bins, labels)
  known = np.isin(bins, linked)
  result: dict[int, Interval | None] = dict.fromkeys(np.unique(bins).tolist())
  if len(linked) < 2:
    return result
  correct, bins, labels, groups = correct[:, known], bins[known], labels[known], groups[known]
  of_bins = (bins[:, None] == linked).astype(float)
  of_classes = (labels[:, None] == np.unique(labels)).astype(float)
  x = np.concatenate([of_bins, of_classes], 1)
  solve = np.linalg.pinv(x)  # [columns, Q]
  beta = solve @ correct.mean(0)
  residual = correct - x @ beta
  for place, name in enumerate(linked.tolist()):
    contrast_of = np.concatenate([np.eye(len(linked))[place], of_classes.mean(0)])
    weights = contrast_of @ solve
    effective = kish(group_sums(weights[None] ** 2, groups)[0] ** 0.5)
    value, of_seeds = float(contrast_of @ beta), correct @ weights
    found = contrast(residual * weights, value, groups, effective, of_seeds)
    value = float(np.clip(found.value, 0, 1))
    move = 0 if found.method == 'range' else value - found.value  # the interval is around it
    ends = [None if e is None else float(np.clip(e + move, 0, 1)) for e in (found.low, found.high)]
    result[name] = dataclasses.replace(found, value=value, low=ends[0], high=ends[1])
  return result


def _largest_linked(bins: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The bins of the largest set that shared classes link."""
  sets: list[tuple[set, set]] = []
  for name in np.unique(bins):
    mine, classes = {name}, set(labels[bins == name].tolist())
    for other in [s for s in sets if s[1] & classes]:
      sets.remove(other)
      mine, classes = mine | other[0], classes | other[1]
    sets.append((mine, classes))
  largest = max(sets, key=lambda s: np.isin(bins, list(s[0])).sum())
  return np.array(sorted(largest[0]))


def standardised(a: np.ndarray, b: np.ndarray) -> float:
  """Difference of the means over the root of the mean of the two variances."""
  if a.mean() == b.mean():
    return 0.0
  return float((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))


def not_converged(steps: np.ndarray, loss: np.ndarray, batch_size: int) -> str:
  """Why a run counts as not converged, '' for a converged one."""
  if len(loss) < 20:
    return f'only {len(loss)} losses are logged; at least 20 are needed'
  part = np.minimum((steps - steps[0]) * 20 // (steps[-1] - steps[0]), 19).astype(int)
  mean = np.interp(
    np.arange(20), np.unique(part), [loss[part == p].mean() for p in np.unique(part)]
  )
  chance, last = np.log(batch_size), mean[-2:].mean()
  fall = chance - last
  if fall <= 0.05 * chance:
    return f'the loss ended at {last:.2f}; chance is {chance:.2f}'
  taken_off = int(np.flatnonzero(mean < chance - fall / 2)[0]) / 20
  if taken_off >= 0.5:
    return f'learning took off after {taken_off:.0%}'
  late = (mean[-4:-2].mean() - last) / fall
  return f'the loss was still falling: {late:.0%}' if late > 0.1 else ''


def odds_ratio(a: int, b: int, n_a: int, n_b: int) -> dict[str, float]:
  """Ratio of a word's odds in n_a captions over n_b others, with a prior of 10 captions each."""
  prior = 10 * (a + b) / (n_a + n_b)
  cells = [a + prior, n_a + 10 - a - prior, b + prior, n_b + 10 - b - prior]
  cells = [cells[0], max(cells[1], 0.5), cells[2], max(cells[3], 0.5)]
  log = np.log(cells[0] / cells[1]) - np.log(cells[2] / cells[3])
  error = np.sqrt(sum(1 / c for c in cells))
  half = 1.959964 * error
  return {
    'odds_ratio': float(np.exp(log)),
    'low': float(np.exp(log - half)),
    'high': float(np.exp(log + half)),
    'z': float(log / error),
  }


def ridge(
  train: np.ndarray,  # [n, E] scaled features
  labels: np.ndarray,  # [n] 0..C-1
  test: np.ndarray,  # [m, E] scaled features
  classes: int,  # C
) -> np.ndarray:  # [m, C] scores; the highest is the prediction
  """Ridge regression on targets -1 and 1, L2 penalty 1,024, a constant feature of 100."""
  x, t = (np.c_[part, np.full(len(part), 100.0)] for part in (train, test))
  y = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
  weights = np.linalg.solve(x.T @ x + 1024 * np.eye(x.shape[1]), x.T @ y)
  return t @ weights
