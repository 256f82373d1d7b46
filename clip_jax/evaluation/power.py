"""Power of the crossed test before training: detectable differences, and the seeds that they need.

The test is that of statistics.crossed_interval: p_value below LEVEL for the difference of two
splits over S >= 3 seeds and G groups of images. The difference of an image in a seed is modelled as
effect + seed + image + noise, all random and independent, with the variances of `Variances`. No
files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from clip_jax.core.types import Array
from clip_jax.evaluation import statistics
from clip_jax.evaluation.statistics import POWER, TINY

LEVEL = 0.05  # two-sided
FEWEST_SEEDS = 3  # fewer give no test
MOST_SEEDS = 100  # more are not tried
# Assumptions without a pilot: means over base, handwriting_pruned and its control of the demo with
# 3 seeds on its four shifted benchmarks of 700 images (LOG.md, 2026-11-29).
SEED_SD = 0.041  # of one split's accuracy; large models and pools vary less
DISAGREEMENT = 0.3  # share of images on which two seeds of one split disagree
# Assumption with and without a pilot: the share of an image's variance in a paired difference that
# every seed repeats (0 to 0.23 in 13 comparisons of a split with its control, the same entry).
IMAGE_SHARE = 0.25
# Assumption without a pilot: the share of that which the images of a group have in common (as in
# bench/simulate_intervals.py). A pilot's groups share of it what they share of the noise.
GROUP_SHARE = 0.25
_GRID = (64, 16, 8)  # quantiles of the mean squares of seeds, images and noise


@dataclass(frozen=True)
class Variances:
  """Variances of the difference between two splits' accuracies with one seed each."""

  seeds: float  # of the seeds: divided by S
  images: float  # of the images: not divided
  noise: float  # of the rest: divided by S


@dataclass(frozen=True)
class Pilot:
  """What runs that differ in the seed alone say, pooled over splits."""

  seed_sd: float  # of one split's accuracy on these images
  noise: float  # its variance that is due to the interaction of seed and image
  images: float  # variance that the images' own differences between two splits add
  disagreement: float  # share of images on which two seeds disagree
  df: int  # degrees of freedom of seed_sd: the sum of S - 1 over splits


def pilot(
  correct: Sequence[Array],  # for each split: [S, Q] bool, S >= 2
  groups: Sequence | Array | None = None,  # [Q] names, as in statistics.group_index
) -> Pilot:
  """Returns the pooled variances over seeds of some splits on the same images."""
  spread, noise, unequal, df = 0.0, 0.0, 0.0, 0
  for values in map(statistics.matrix, correct):
    seeds, images = values.shape
    if seeds < 2:
      raise ValueError(f'a pilot needs two seeds of each split, got {seeds}')
    group = statistics.group_index(groups, images)
    sizes = np.bincount(group)
    few = statistics.effective_groups(sizes)
    few = few / (few - 1) if few > 1 else np.nan
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    by_group = np.stack([np.bincount(group, row) for row in rest]) / images  # [S, G]
    spread += values.mean(1).var(ddof=1) * (seeds - 1)
    noise += few * (by_group**2).sum()
    unequal += 2 * values.var(0, ddof=1).mean() * (seeds - 1)
    df += seeds - 1
  noise /= df
  own = 2 * noise * IMAGE_SHARE / (1 - IMAGE_SHARE)
  return Pilot(float(np.sqrt(spread / df)), float(noise), float(own), float(unequal / df), df)


def assumed(sizes: Array) -> Pilot:  # [G] images of each group
  """Returns the assumptions for a benchmark without a pilot; df is 0."""
  sizes = np.asarray(sizes, np.float64)
  images, mean_size = sizes.sum(), (sizes**2).sum() / sizes.sum()
  own = DISAGREEMENT / images * IMAGE_SHARE / (1 - IMAGE_SHARE)
  shared = 1 + (mean_size - 1) * GROUP_SHARE
  return Pilot(SEED_SD, DISAGREEMENT / 2 / images, own * shared, DISAGREEMENT, 0)


def variances(of_runs: Pilot) -> Variances:
  """Returns the variances of the difference between two splits whose runs vary alike.

  The runs of both splits are independent, so that their seeds and noise add.
  """
  seeds = max(of_runs.seed_sd**2 - of_runs.noise, 0.0)
  return Variances(2 * seeds, of_runs.images, 2 * of_runs.noise)


def power(difference: float, of: Variances, seeds: int, groups: float) -> float:
  """Returns the probability that the test finds a true difference.

  groups: number of groups of equal size, see statistics.effective_groups.
  """
  return _power(difference, _true_error(of, seeds), _critical(of, seeds, groups))


def detectable(of: Variances, seeds: int, groups: float) -> float:
  """Returns the true difference that the test finds with probability POWER."""
  error, critical = _true_error(of, seeds), _critical(of, seeds, groups)
  low, high = 0.0, float(critical.max()) + 5 * error
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if _power(middle, error, critical) < POWER else (low, middle)
  return high


def seeds_needed(difference: float, of: Variances, groups: float) -> int | None:
  """Returns the fewest seeds with power POWER for a difference; None if MOST_SEEDS do not do."""
  has_power = lambda seeds: power(difference, of, seeds, groups) >= POWER
  if not has_power(MOST_SEEDS):
    return None
  low, high = FEWEST_SEEDS - 1, MOST_SEEDS  # `high` seeds do, `low` seeds do not
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if has_power(middle) else (middle, high)
  return high


def _true_error(of: Variances, seeds: int) -> float:
  return float(np.sqrt(max(of.seeds / seeds + of.images + of.noise / seeds, TINY)))


def _critical(of: Variances, seeds: int, groups: float) -> np.ndarray:  # [K]
  """Returns the smallest significant differences, over the distribution of the mean squares.

  Each mean square is its expectation times chi-square over df, independent of the others, as for
  normal data; the combinations of _GRID quantiles are equally likely.
  """
  if seeds < FEWEST_SEEDS or groups <= 1:
    raise ValueError(f'a test needs 3 seeds and 2 groups, got {seeds} and {groups:g}')
  noise = of.noise / seeds
  expected = ((of.seeds + of.noise) / seeds, of.images + noise, noise)
  df = (seeds - 1, groups - 1, (seeds - 1) * (groups - 1))
  parts = [
    mean * special.gammaincinv(n / 2, (np.arange(count) + 0.5) / count) * 2 / n
    for mean, n, count in zip(expected, df, _GRID)
  ]
  of_seeds, of_images, of_error = (grid.ravel() for grid in np.meshgrid(*parts, indexing='ij'))
  variance, degrees = statistics.combine(of_seeds, of_images, of_error, seeds, groups)
  return special.stdtrit(degrees, 1 - LEVEL / 2) * np.sqrt(variance)


def _power(difference: float, error: float, critical: np.ndarray) -> float:
  above = special.ndtr((difference - critical) / error)
  below = special.ndtr((-difference - critical) / error)
  return float((above + below).mean())
