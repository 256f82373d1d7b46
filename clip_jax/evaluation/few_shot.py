"""Few-shot probe: ridge regression on frozen image features of a few images a class.

The method is big_vision's evaluators/fewshot_lsr.py: whitened features, a constant feature of 100,
targets -1 and 1, l2 = 2^10 (ridge.py). Arrays in, arrays out.
"""

import numpy as np

from clip_jax.core.types import Array
from clip_jax.evaluation import ridge

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
ROWS = 4096  # images scored at a time: 32 MB with 1,000 classes


def draw(
  label: Array,  # [n] int, of the training set
  classes: Array,  # [C] int, labels
  shots: int,
  seed: int,
) -> np.ndarray:  # [C, shots] int64, rows
  """Returns random rows of each class; fewer shots of the same seed are the first columns.

  Raises ValueError if a class has fewer rows than `shots`.
  """
  rng, rows = np.random.default_rng(seed), np.empty((len(classes), shots), np.int64)
  order = np.argsort(label, kind='stable')
  starts = np.searchsorted(np.asarray(label)[order], [classes, np.add(classes, 1)])
  for i, (start, stop) in enumerate(starts.T):
    if stop - start < shots:
      raise ValueError(f'class {classes[i]} has {stop - start} rows, fewer than {shots} shots')
    rows[i] = rng.permutation(order[start:stop])[:shots]
  return rows


def predict(
  train: Array,  # [m, E] float32
  label: Array,  # [m] int in 0..C-1
  test: Array,  # [n, E] float32
  classes: int,  # C
) -> np.ndarray:  # [n] int in 0..C-1
  """Returns the predictions of a probe that is fitted to some images; equal scores: the first."""
  scale = ridge.fit_scale([np.asarray(train)])
  weights = ridge.fit([(np.asarray(train), np.asarray(label))], scale, classes)
  return np.concatenate(
    [
      ridge.predict(test[start : start + ROWS], scale, weights, np.arange(classes))
      for start in range(0, len(test), ROWS)
    ]
  )
