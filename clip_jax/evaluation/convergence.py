"""Heuristic on the training loss: is a run long enough for comparisons?

In: train/loss by step, from metrics.jsonl. Out: the reason against it, '' for a converged run.
"""

import numpy as np

from clip_jax.core.types import Array

PARTS = 20  # number of equal parts of the run's steps
FEWEST = PARTS  # minimum number of logged losses


def not_converged(
  steps: Array,  # [n] increasing
  loss: Array,  # [n] train/loss
  batch_size: int,  # global
) -> str:
  """Returns why a run counts as 'not converged', else ''.

  A contrastive loss starts at log(batch_size), which is chance, stays there for a while and then
  falls. If this take-off is late, splits differ by the time of the take-off, not by the value of
  their data. Not converged: a run that ends within 5 % of chance, one whose loss falls by half only
  in its second half, or one with more than a tenth of its fall in its last tenth (a straight line
  has exactly a tenth).
  """
  steps, loss = np.asarray(steps, np.float64), np.asarray(loss, np.float64)
  if steps.shape != loss.shape:
    raise ValueError(f'steps {steps.shape} and loss {loss.shape} must have the same shape')
  if len(loss) < FEWEST:
    return f'only {len(loss)} losses are logged; at least {FEWEST} are needed'
  if not np.isfinite(loss).all():
    return 'the loss is not finite'
  part = np.minimum((steps - steps[0]) * PARTS // (steps[-1] - steps[0]), PARTS - 1).astype(int)
  filled, part = np.unique(part, return_inverse=True)
  mean = np.interp(np.arange(PARTS), filled, np.bincount(part, loss) / np.bincount(part))
  chance, before, last = np.log(batch_size), mean[-4:-2].mean(), mean[-2:].mean()
  fall = chance - last
  if fall <= 0.05 * chance:
    return f'the loss ended at {last:.2f}; chance is {chance:.2f}'
  taken_off = np.flatnonzero(mean < chance - fall / 2)[0] / PARTS
  if taken_off >= 0.5:
    return f'learning took off after {taken_off:.0%} of the steps'
  if before - last > 0.1 * fall:
    return f'the loss was still falling: {(before - last) / fall:.0%} of its fall in the last tenth'
  return ''
