"""Is a run long enough to be compared? A rule of thumb on the training loss.

In: train/loss by step, as metrics.jsonl holds it. Out: a sentence, '' for a run that is fine.
"""

import numpy as np

from clip_jax.core.types import Array

PARTS = 20  # the run is cut into so many stretches of equal steps
FEWEST = PARTS  # logged losses needed to judge


def not_converged(
  steps: Array,  # [n] increasing
  loss: Array,  # [n] train/loss
  batch_size: int,  # global
) -> str:
  """Why a run is marked 'not converged', else ''.

  A contrastive loss starts at log(batch_size), chance, stays there for a while and takes off. Where
  the take-off lies late, splits differ in when it came and not in what the data is worth. Marked:
  a run that ends within 5 % of chance; one that had half of its fall in its second half; one that
  had more than a tenth of its fall in its last tenth (a straight line has exactly that).
  """
  steps, loss = np.asarray(steps, np.float64), np.asarray(loss, np.float64)
  if steps.shape != loss.shape:
    raise ValueError(f'steps {steps.shape} and loss {loss.shape} must have one shape')
  if len(loss) < FEWEST:
    return f'only {len(loss)} losses were logged, {FEWEST} are needed to judge'
  if not np.isfinite(loss).all():
    return 'the loss is not finite'
  part = np.minimum((steps - steps[0]) * PARTS // (steps[-1] - steps[0]), PARTS - 1).astype(int)
  filled, part = np.unique(part, return_inverse=True)
  mean = np.interp(np.arange(PARTS), filled, np.bincount(part, loss) / np.bincount(part))
  chance, before, last = np.log(batch_size), mean[-4:-2].mean(), mean[-2:].mean()
  fall = chance - last
  if fall <= 0.05 * chance:
    return f'the loss ended at {last:.2f}, chance is {chance:.2f}'
  taken_off = np.flatnonzero(mean < chance - fall / 2)[0] / PARTS
  if taken_off >= 0.5:
    return f'learning took off after {taken_off:.0%} of the steps'
  if before - last > 0.1 * fall:
    return f'the loss was still falling: {(before - last) / fall:.0%} of its fall in the last tenth'
  return ''
