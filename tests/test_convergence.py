"""Planted loss curves."""

import numpy as np
import pytest

from clip_jax.evaluation.convergence import not_converged

STEPS = np.arange(0, 3001, 10)
CHANCE = np.log(128)


def curve(take_off, width, end=1.5, noise=0.1):
  """Chance, a fall around take_off (a share of the run), then flat at end."""
  x = STEPS / STEPS[-1]
  fall = 1 / (1 + np.exp(-(x - take_off) / width))
  return CHANCE - (CHANCE - end) * fall + noise * np.random.default_rng(0).normal(size=len(x))


@pytest.mark.parametrize(
  ('loss', 'reason'),
  [
    (curve(0.1, 0.03), ''),
    (curve(0.3, 0.05), ''),
    (1.5 + (CHANCE - 1.5) * np.exp(-STEPS / 400), ''),
    (curve(0.6, 0.05), 'took off after 6'),
    (curve(0.97, 0.02), 'took off after 95%'),
    (curve(2.0, 0.05), 'chance is 4.85'),
    (CHANCE - 3 * (STEPS / 3000) ** 0.8 - 0.5 * (STEPS > 2850), 'still falling'),
    (np.where(STEPS > 2000, np.nan, 2.0), 'not finite'),
  ],
)
def test_planted_curves(loss, reason):
  found = not_converged(STEPS, loss, 128)
  assert (reason in found) if reason else found == ''


def test_uneven_and_few_steps():
  loss = curve(0.1, 0.03)
  kept = (STEPS < 300) | (STEPS % 200 == 0)  # sparse after a while: some stretches are empty
  assert not_converged(STEPS[kept], loss[kept], 128) == ''
  assert 'only 5 losses' in not_converged(STEPS[:5], loss[:5], 128)
  with pytest.raises(ValueError, match='must have the same shape'):
    not_converged(STEPS, loss[1:], 128)
