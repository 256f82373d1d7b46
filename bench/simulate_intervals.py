"""Simulates data with a known truth and counts how often each interval of the report covers it.

  nice python bench/simulate_intervals.py > lines.tsv        all cells, about 10 minutes on 2 cores
  python bench/simulate_intervals.py --tables lines.tsv      writes docs/statistics.md from them

Correctness is drawn from a Gaussian copula: an answer is correct if a uniform number is below the
true accuracy of its split and seed. The uniform numbers of one image agree across seeds and splits,
those of one group agree across images, and a part of both is specific to the split. The accuracy of
a seed is Beta distributed around its split's accuracy. So every mean is known exactly.
"""

from collections.abc import Iterator
import concurrent.futures
import itertools
import os
import sys

import numpy as np
from scipy import special

from clip_jax.core.types import Array
from clip_jax.evaluation import causal, statistics

DRAWS = 2000  # per cell
SEEDS = (3, 5)
SEED_SD = (0.0, 0.01, 0.03)  # of a difference of two splits, or of one accuracy
GROUPS = {6: 50, 10: 30, 30: 10, 100: 4, 1000: 1}  # groups -> mean images per group
ACCURACY = (0.2, 0.6, 0.95)
# Shares of the variance of an answer: group, image, each also specific to the split; rest: noise.
GROUP, GROUP_BY_SPLIT, IMAGE, IMAGE_BY_SPLIT = 0.15, 0.05, 0.3, 0.1
EFFECT = 0.05  # loss on all queries of a class, of the difference in differences
SLOPE, SLOPE_SD = -6.0, (0.0, 3.0)  # of the dose form
DOSE_GROUPS = {10: 60, 50: 12, 600: 1}
SHARES = {'E': (0.6, 0.5, 0.3), "E'": (0.55, 0.53, 0.3), 'E, high': (0.95, 0.92, 0.8)}
RESAMPLES = 200  # of the bootstrap of a share
TARGET = 0.93  # coverage of a 95 % interval that every cell should reach
CHUNK = 250  # draws at a time
MARKS = '<!-- written by bench/simulate_intervals.py -->', '<!-- end -->'
DOC = os.path.join(os.path.dirname(__file__), '..', 'docs', 'statistics.md')


def group_of(rng: np.random.Generator, groups: int) -> np.ndarray:  # [Q] in 0..G-1
  """Returns the group of every image; sizes vary from 1 to twice the mean."""
  mean = GROUPS.get(groups) or DOSE_GROUPS[groups]
  return np.repeat(np.arange(groups), rng.integers(1, 2 * mean, groups) if mean > 1 else 1)


def seed_accuracy(rng, p: float, sd: float, shape: tuple[int, ...]) -> np.ndarray:
  """Draws accuracies with mean p and standard deviation sd."""
  if sd == 0:
    return np.full(shape, p)
  size = p * (1 - p) / sd**2 - 1
  return rng.beta(p * size, (1 - p) * size, shape)


def uniforms(rng, draws: int, splits: int, seeds: int, group: np.ndarray) -> np.ndarray:
  """Returns uniform numbers [R, splits, S, Q] that agree within images and groups."""
  count, units = len(group), group.max() + 1

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal((draws, *shape), np.float32)

  noise = 1 - GROUP - GROUP_BY_SPLIT - IMAGE - IMAGE_BY_SPLIT
  z = noise**0.5 * normal(splits, seeds, count)
  z += GROUP**0.5 * normal(1, 1, units)[..., group] + IMAGE**0.5 * normal(1, 1, count)
  z += GROUP_BY_SPLIT**0.5 * normal(splits, 1, units)[..., group]
  z += IMAGE_BY_SPLIT**0.5 * normal(splits, 1, count)
  return special.ndtr(z)


def intervals(
  values: Array,  # [R, S, Q]
  weights: Array,  # [Q]
  arms: Array,  # [Q]
  group: Array,  # [Q] in 0..G-1, sorted
) -> tuple[Array, Array, Array]:  # value [R], error [R], df [R]
  """Returns statistics.contrast of R draws at once; tests/test_simulate_intervals.py compares."""
  first = np.flatnonzero(np.diff(group, prepend=-1))
  total, z, least, effective = 0.0, 0.0, 0.0, []
  for sign, arm in ((1, 0), (-1, 1)):
    weight = np.where(arms == arm, weights, 0.0).astype(np.float32)
    if weight.any():
      size = np.bincount(group, weight)  # [G]
      sums = np.add.reduceat(values * weight, first, -1, np.float64) / size.sum()  # [R, S, G]
      mean = sums.sum(-1)  # [R, S]
      total = total + sign * mean
      z = z + sign * (sums - mean.mean(-1)[:, None, None] * (size / size.sum()))
      least += 2 / ((size > 0).sum() + 2) ** 2
      effective.append(statistics.effective_groups(size))
  variance, df = statistics.two_way(z, np.mean(effective))
  constant = variance < statistics.TINY
  variance = np.where(constant, least, variance)
  return total.mean(-1), variance**0.5, np.where(constant, z.shape[-1] - 1, df)


def t_interval(value, error, df) -> tuple[Array, Array]:
  half = special.stdtrit(df, 0.975) * error
  return value - half, value + half


def difference(rng, draws, seeds, sd, groups, accuracy):
  """The crossed difference of two splits of equal accuracy."""
  group = group_of(rng, groups)
  p = seed_accuracy(rng, accuracy, sd / 2**0.5, (draws, 2, seeds, 1))
  correct = uniforms(rng, draws, 2, seeds, group) < p
  d = correct[:, 0].astype(np.float32) - correct[:, 1]
  ones = np.ones(len(group))
  return 0.0, *t_interval(*intervals(d, ones, 0 * ones, group))


def one_accuracy(rng, draws, seeds, sd, groups, accuracy):
  """The accuracy of one split over seeds and images, in Wilson's form."""
  group = group_of(rng, groups)
  p = seed_accuracy(rng, accuracy, sd, (draws, 1, seeds, 1))
  correct = (uniforms(rng, draws, 1, seeds, group) < p)[:, 0].astype(np.float32)
  sizes = np.bincount(group)
  sums = np.add.reduceat(correct, np.cumsum(sizes) - sizes, -1, np.float64) / len(group)
  mean = sums.sum(-1).mean(-1)
  z = sums - mean[:, None, None] * (sizes / len(group))
  variance, df = statistics.two_way(z, statistics.effective_groups(sizes))
  return accuracy, *statistics.bounded(mean, variance, df, len(sizes), seeds * len(group))


def in_differences(rng, draws, seeds, sd, groups, accuracy):
  """The difference in differences, without an effect; classes differ in loss and share of hits."""
  group = group_of(rng, groups)
  label = rng.integers(0, 5, len(group))
  hit = rng.random(len(group)) < np.array([0.2, 0.3, 0.4, 0.6, 0.7])[label]
  hits, unhits = (np.bincount(label, arm, 5) for arm in (hit, ~hit))
  weights = hit + ~hit * (hits / np.maximum(unhits, 1))[label]
  loss = np.array([0, 0.01, 0.02, 0.04, EFFECT])[label]
  # The loss of a seed differs between hit and unhit queries, with half of the variance each.
  p = seed_accuracy(rng, accuracy, sd / 2, (draws, 2, 2, seeds, 1))  # [R, split, hit, S, 1]
  p = np.where(hit, p[:, :, 0], p[:, :, 1])  # [R, split, S, Q]
  p[:, 1] -= loss
  correct = uniforms(rng, draws, 2, seeds, group) < p
  d = correct[:, 1].astype(np.float32) - correct[:, 0]
  return 0.0, *t_interval(*intervals(d, weights, ~hit, group))


def share(rng, draws, seeds, sd, groups, name):
  """The explained share; a draw whose share is not printed has NaN bounds."""
  group = group_of(rng, groups)
  accuracies = SHARES[name]
  p = np.stack([seed_accuracy(rng, a, sd / 2**0.5, (draws, seeds, 1)) for a in accuracies], 1)
  correct = uniforms(rng, draws, 3, seeds, group) < p
  found = [
    causal.explained_share(*one, groups=group, draws=RESAMPLES, seed=k)
    for k, one in enumerate(correct)
  ]
  low, high = np.array([(f.low, f.high) for f in found]).T
  return (accuracies[0] - accuracies[1]) / (accuracies[0] - accuracies[2]), low, high


def dose(rng, draws, seeds, sd, groups, accuracy):
  """The dose form; sd is that of the slope over seeds."""
  group = group_of(rng, groups)
  count = len(group)
  label = rng.integers(0, 6, count)
  excess = rng.normal(0.02, 0.08, count)
  amount = np.maximum(excess, 0)
  eta = special.logit(accuracy) + np.linspace(-1, 1, 6)[label] + 2 * amount
  seed, shift = (0.2 * rng.standard_normal((draws, seeds, 1)) for _ in range(2))
  slope = SLOPE + sd * rng.standard_normal((draws, seeds, 1))
  p = special.expit(np.stack([eta + seed, eta + seed - 0.2 + shift + slope * amount], 1))
  control, pruned = np.moveaxis(uniforms(rng, draws, 2, seeds, group) < p, 1, 0)
  found = [causal.dose(a, b, excess, label, group) for a, b in zip(pruned, control)]
  low, high = np.array([(f.low, f.high) for f in found]).T
  return SLOPE, low, high


KINDS = {
  'difference': difference,
  'accuracy': one_accuracy,
  'difference in differences': in_differences,
  'explained share': share,
  'dose slope': dose,
}


def cells() -> Iterator[tuple]:  # (kind, seeds, sd, groups, accuracy or name)
  """Yields the simulated designs."""
  for kind in ('difference', 'accuracy', 'difference in differences'):
    accuracies = ACCURACY if kind != 'difference in differences' else (0.3, 0.6, 0.9)
    yield from itertools.product((kind,), SEEDS, SEED_SD, GROUPS, accuracies)
  yield from itertools.product(('explained share',), SEEDS, (0.0, 0.03), (6, 30), SHARES)
  yield from itertools.product(('explained share',), SEEDS, (0.0, 0.03), (1000,), ('E',))
  yield from itertools.product(('dose slope',), SEEDS, SLOPE_SD, DOSE_GROUPS, (0.6, 0.9))


def simulate(cell: tuple, draws: int = DRAWS) -> dict:
  """Returns the cell's coverage, share of printed intervals and median width (proportions)."""
  kind, *design = cell
  rng, low, high = np.random.default_rng(abs(hash_of(cell))), [], []
  for start in range(0, draws, CHUNK):
    truth, *bounds = KINDS[kind](rng, min(CHUNK, draws - start), *design)
    for part, values in zip((low, high), bounds):
      part.append(values)
  low, high = np.concatenate(low), np.concatenate(high)
  printed = np.isfinite(low)
  covered = (low <= truth) & (truth <= high)
  return {
    'cell': cell,
    'coverage': float(covered[printed].mean()),
    'printed': float(printed.mean()),
    'width': float(np.median((high - low)[printed])),
  }


def hash_of(cell: tuple) -> int:
  """Returns a seed that depends on the cell only."""
  return int.from_bytes(repr(cell).encode(), 'little') % 2**63


def choices(draws: int = 100_000) -> list[tuple]:
  """Returns coverage and width of several intervals for normal data of three seeds, 1,000 images.

  One row per (share of the image-by-seed noise in the images' mean square, seed variance in units
  of that mean square): for each interval, coverage and median width over that of a known variance.
  """
  rng, rows, seeds, images = np.random.default_rng(0), [], 3, 1000
  for noise, ratio in itertools.product((1.0, 0.5, 0.1), (0.0, 1.0, 10.0)):
    df = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    expected = np.array([noise + ratio, 1.0, noise])
    ms_s, ms_i, ms_e = (expected * rng.chisquare(df, (draws, 3)) / df).T
    true = 1 + ratio
    ms = np.maximum(np.maximum(ms_s + ms_i - ms_e, ms_s), ms_i)
    satterthwaite = ms**2 / (ms_s**2 / df[0] + ms_i**2 / df[1] + ms_e**2 / df[2])
    plain = ms_s + np.maximum(ms_i - ms_e, 0)
    half = {
      'this package': (ms, 1 / harmonic(ms_s / ms, df)),
      'Satterthwaite': (ms, np.maximum(satterthwaite, seeds - 1)),
      'without the floor': (plain, 1 / harmonic(ms_s / plain, df)),
      't over seeds': (ms_s, np.full(draws, df[0])),
    }
    z = np.abs(rng.standard_normal(draws)) * true**0.5
    row = []
    for variance, own_df in half.values():
      width = special.stdtrit(own_df, 0.975) * variance**0.5
      row += [float((z <= width).mean()), float(np.median(width) / (1.959964 * true**0.5))]
    rows.append((noise, ratio, *row))
  return rows


def harmonic(part: Array, df: Array) -> Array:
  return part / df[0] + (1 - part) / df[1]


def tables(lines: list[list[str]]) -> str:  # lines of the simulation's output
  """Returns the tables of docs/statistics.md."""
  cells = [
    (*line[:2], float(line[2]), int(line[3]), line[4], *map(float, line[5:])) for line in lines
  ]
  out = [
    '| interval | seeds | 6 groups | 10 | 30 | 50 | 100 | 600 | 1,000 | lowest | type I, highest |',
    '| --- ' * 11 + '|',
  ]
  for kind, seeds in itertools.product(KINDS, map(str, SEEDS)):
    own = [c for c in cells if c[:2] == (kind, seeds)]
    if not own:
      raise SystemExit(f'No line of {kind} with {seeds} seeds: simulate all cells first.')
    by_groups = [[c[5] for c in own if c[3] == g] for g in (6, 10, 30, 50, 100, 600, 1000)]
    spans = [f'{min(v):.1f} to {max(v):.1f}' if v else '' for v in by_groups]
    least = min(c[5] for c in own)
    wrong = f'{100 - least:.1f}' if 'difference' in kind else ''
    out.append(f'| {" | ".join([kind, seeds, *spans, f"{least:.1f}", wrong])} |')
  below = [c for c in cells if c[5] < 100 * TARGET]
  out += ['', f'Cells below {100 * TARGET:.0f} %: {len(below)} of {len(cells)}.', '']
  out += ['| interval | seeds | seed sd | groups | accuracy | coverage, % |', '| --- ' * 6 + '|']
  out += [f'| {c[0]} | {c[1]} | {c[2]:g} | {c[3]} | {c[4]} | {c[5]:.1f} |' for c in below]
  out += [
    '',
    'Normal data, three seeds, 1,000 ungrouped images: coverage in %, and in brackets the median '
    'width over that of a known variance.',
    '',
    '| noise / MS_I | seed variance / MS_I | this package | Satterthwaite | without the floor | t '
    'over seeds |',
    '| --- ' * 6 + '|',
  ]
  for noise, ratio, *numbers in choices():
    pairs = [f'{100 * c:.1f} ({w:.2f})' for c, w in zip(numbers[::2], numbers[1::2])]
    out.append(f'| {noise:g} | {ratio:g} | {" | ".join(pairs)} |')
  return '\n'.join(out)


def write_tables(path: str) -> None:
  """Replaces what stands between the marks of docs/statistics.md."""
  with open(path) as file:
    lines = [line.rstrip('\n').split('\t') for line in file if line.count('\t') == 7]
  with open(DOC) as file:
    before, _, rest = file.read().partition(MARKS[0])
  _, mark, after = rest.partition(MARKS[1])
  if not mark:
    raise SystemExit(f'{DOC} lacks the lines {MARKS}.')
  with open(DOC, 'w') as file:
    file.write(f'{before}{MARKS[0]}\n\n{tables(lines)}\n\n{MARKS[1]}{after}')


def main() -> None:
  with concurrent.futures.ProcessPoolExecutor(2) as pool:
    for r in pool.map(simulate, cells()):
      numbers = f'{100 * r["coverage"]:.1f}', f'{r["width"]:.3f}', f'{r["printed"]:.2f}'
      print(*r['cell'], *numbers, sep='\t', flush=True)


if __name__ == '__main__':
  write_tables(sys.argv[2]) if sys.argv[1:2] == ['--tables'] else main()
