"""Makes tests/golden/statistics.json by statsmodels, of data that the tests make too.

  pip install statsmodels && python tests/make_statistics_golden.py

Holds what statsmodels 0.15 computes: the mean squares of a two-way layout (anova_lm), the dose
form's logistic regression with dummy columns and its covariances clustered by group and by seed
(without small-sample corrections), Holm's adjustment, Wilson's intervals, and the two one-sided
tests of equivalence of paired differences.
"""

import json
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / 'golden' / 'statistics.json'
P_VALUES = [0.01, 0.04, 0.03, 0.005, 0.2]
COUNTS = [(0, 10), (7, 10), (633, 1000)]


def layout() -> np.ndarray:  # [4, 12]
  """Seeds by images, with effects of both."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(4, 1)) + rng.normal(size=(1, 12)) + rng.normal(size=(4, 12))


def dose_data():
  """Correctness [S, Q] of pruned and control, excess [Q], label [Q] and group [Q]."""
  rng = np.random.default_rng(1)
  images, seeds = 240, 3
  label, group = rng.integers(0, 4, images), np.arange(images) // 3
  excess = rng.normal(0.02, 0.08, images)
  eta = np.linspace(-1, 1, 4)[label] + 0.5 * rng.normal(size=80)[group]
  slope = -6 + 3 * rng.normal(size=(seeds, 1))
  draw = lambda eta: rng.random((seeds, images)) < 1 / (1 + np.exp(-eta))
  return (
    draw(eta + slope * np.maximum(excess, 0) - 0.2),
    draw(eta + 0 * slope),
    excess,
    label,
    group,
  )


def long_form():
  """Returns y [n], x [n, k] with the slope's column first, group [n] and seed [n]."""
  pruned, control, excess, label, group = dose_data()
  seeds, images = pruned.shape
  y, rows, units, runs = [], [], [], []
  for treated, correct in ((0, control), (1, pruned)):
    for s in range(seeds):
      for i in range(images):
        amount = max(excess[i], 0)
        dummies = [*(s == np.arange(1, seeds)), *(label[i] == np.arange(4))]
        rows.append([treated * amount, treated, amount, *map(float, dummies)])
        y.append(float(correct[s, i]))
        units.append(group[i])
        runs.append(s)
  return tuple(map(np.array, (y, rows, units, runs)))


def main() -> None:
  import pandas as pd
  import statsmodels
  import statsmodels.api as sm
  from statsmodels.formula.api import ols
  from statsmodels.stats.multitest import multipletests
  from statsmodels.stats.proportion import proportion_confint
  from statsmodels.stats.weightstats import ttost_paired

  d = layout()
  frame = pd.DataFrame(
    [(s, i, d[s, i]) for s in range(4) for i in range(12)], columns=['seed', 'image', 'd']
  )
  table = sm.stats.anova_lm(ols('d ~ C(seed) + C(image)', frame).fit())
  squares = (table['sum_sq'] / table['df']).tolist()  # seed, image, residual

  y, x, group, seed = long_form()
  model = sm.GLM(y, x, family=sm.families.Binomial())
  errors = {}
  for name, clusters in (('group', group), ('seed', seed)):
    fit = model.fit(
      cov_type='cluster', cov_kwds={'groups': clusters, 'use_correction': False}, tol=1e-12
    )
    errors[name] = float(fit.bse[0])
  values = d[0]
  p = ttost_paired(values, 0 * values, -1.5, 1.5)[0]
  found = {
    'statsmodels': statsmodels.__version__,
    'mean_squares': dict(zip(('seeds', 'images', 'error'), squares)),
    'dose': {'slope': float(fit.params[0]), 'error': errors},
    'holm': multipletests(P_VALUES, method='holm')[1].tolist(),
    'wilson': [list(map(float, proportion_confint(*c, method='wilson'))) for c in COUNTS],
    'equivalence_p': float(p),
  }
  PATH.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
