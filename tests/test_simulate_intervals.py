"""The simulation computes the intervals of the package, and a short form of it covers."""

import pathlib
import sys

import numpy as np
import pytest

from clip_jax.evaluation import statistics

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'bench'))
import simulate_intervals


def test_many_draws_at_once_are_the_contrasts_of_the_package():
  rng = np.random.default_rng(0)
  group = simulate_intervals.group_of(rng, 10)
  weights, arms = rng.integers(0, 3, len(group)), rng.integers(0, 2, len(group))
  d = rng.integers(-1, 2, (3, 4, len(group))).astype(np.float32)
  d[2] = 0  # no variance
  for used in (arms, 0 * arms):
    value, error, df = simulate_intervals.intervals(d, weights, used, group)
    for k in range(3):
      one = statistics.contrast(d[k], weights, used, group)
      np.testing.assert_allclose(
        [value[k], error[k], df[k]], [one.value, one.error, one.df], rtol=1e-5, atol=1e-7
      )


def test_means_of_the_copula_are_exact():
  rng = np.random.default_rng(1)
  group = np.repeat(np.arange(30), 10)
  p = simulate_intervals.seed_accuracy(rng, 0.95, 0.03, (4000, 1, 3, 1))
  assert (p.mean(), p.std()) == pytest.approx((0.95, 0.03), abs=2e-3) and p.max() < 1
  correct = simulate_intervals.uniforms(rng, 4000, 1, 3, group) < p
  assert correct.mean() == pytest.approx(0.95, abs=2e-3)
  between = correct.reshape(4000, 3, 30, 10).mean((1, 3)).std()
  assert between > 1.5 * np.sqrt(0.95 * 0.05 / 30)  # groups share more than noise


@pytest.mark.slow
@pytest.mark.parametrize(
  'cell',
  [
    ('difference', 3, 0.03, 30, 0.6),
    ('difference', 5, 0.0, 6, 0.6),
    ('accuracy', 3, 0.01, 100, 0.2),
    ('accuracy', 5, 0.03, 30, 0.95),
    ('difference in differences', 3, 0.03, 100, 0.6),
    ('explained share', 3, 0.03, 30, 'E'),
    ('dose slope', 3, 3.0, 50, 0.6),
    ('dose slope', 5, 3.0, 600, 0.9),
  ],
)
def test_intervals_cover(cell):
  found = simulate_intervals.simulate(cell, 400)
  assert found['coverage'] > 0.93 - 2 * np.sqrt(0.93 * 0.07 / 400), found  # two standard errors
  assert found['printed'] > 0.6


def test_tables_name_the_cells_that_do_not_cover(monkeypatch):
  monkeypatch.setattr(simulate_intervals, 'choices', lambda: [(1.0, 0.0, *[0.95, 1.5] * 4)])
  lines = [
    [kind, seeds, '0.01', '30', '0.6', '95.0', '0.1', '1.00']
    for kind in simulate_intervals.KINDS
    for seeds in ('3', '5')
  ]
  lines.append(['accuracy', '5', '0.0', '6', '0.95', '92.6', '0.1', '1.00'])
  text = simulate_intervals.tables(lines)
  assert 'Cells below 93 %: 1 of 11.' in text
  assert '| accuracy | 5 | 92.6 to 92.6 |  | 95.0 to 95.0 |' in text
  assert '| accuracy | 5 | 0 | 6 | 0.95 | 92.6 |' in text
  with pytest.raises(SystemExit, match='No line of difference with 3 seeds'):
    simulate_intervals.tables(lines[1:])
