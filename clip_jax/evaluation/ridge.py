"""A preview of splits in seconds: ridge regression on frozen features. It is not CLIP training.

The method is big_vision's fewshot_lsr, on all labelled rows instead of a few: features scaled to
mean 0 and standard deviation 1, a constant feature of 100 as the bias, targets -1 and 1 for each
class, W = (X^T X + l2 I)^-1 X^T Y with l2 = 2^10. Arrays in, arrays out. Rows are read in blocks,
so memory does not depend on their number: [E + 1, E + 1] and [C, E + 1] sums.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import re

import numpy as np

from clip_jax.core.types import Array

L2 = 2.0**10
BIAS = 100.0
SPREAD = 1e-5  # added to standard deviations, so that a constant feature is not divided by 0
NAME = 'preview, not CLIP training'

_WORD = re.compile(r'\w+')


@dataclasses.dataclass(frozen=True)
class Scale:
  """Scaling of features: x -> (x - mean) / deviation."""

  mean: Array  # [E] float32
  deviation: Array  # [E] float32, standard deviations

  def __call__(
    self,
    x: Array,  # [b, E]
  ) -> Array:  # [b, E] float32
    return (x.astype(np.float32) - self.mean) / self.deviation


def fit_scale(blocks: Iterable[Array]) -> Scale:  # [b, E] each
  """Returns the scale of all rows of the blocks; raises ValueError without rows."""
  count, total, square = 0, np.zeros(()), np.zeros(())
  for x in blocks:
    x = x.astype(np.float64)
    count, total, square = count + len(x), total + x.sum(0), square + np.einsum('be,be->e', x, x)
  if not count:
    raise ValueError('cannot compute the scale of features from 0 rows')
  mean = total / count
  deviation = np.sqrt(np.maximum(square / count - mean**2, 0)) + SPREAD
  return Scale(mean.astype(np.float32), deviation.astype(np.float32))


def fit(
  blocks: Iterable[tuple[Array, Array]],  # features [b, E], classes [b] integers in 0..C-1
  scale: Scale,
  classes: int,  # C
  l2: float = L2,
) -> Array:  # [E + 1, C] float64, the last row for the constant feature
  """Returns the weights of ridge regression on all rows of the blocks.

  X^T X is one float32 matrix product per block, summed over blocks in float64. X^T Y needs no
  product: with targets -1 and 1 it is twice the sum of each class's rows minus the total sum.
  """
  from scipy import linalg  # imported only here: the import takes a second

  dim = len(scale.mean)
  gram, sums = np.zeros((dim, dim)), np.zeros((classes, dim))
  counts = np.zeros(classes, np.int64)
  for x, label in blocks:
    x = scale(x)
    gram += x.T @ x
    order = np.argsort(label, kind='stable')
    present, first = np.unique(label[order], return_index=True)
    if len(present):
      sums[present] += np.add.reduceat(x[order], first, axis=0)
    counts += np.bincount(label, minlength=classes)
  total = sums.sum(0)
  left = np.empty((dim + 1, dim + 1))
  left[:dim, :dim] = gram
  left[:dim, dim] = left[dim, :dim] = BIAS * total
  left[dim, dim] = BIAS**2 * counts.sum()
  left[np.diag_indices(dim + 1)] += l2
  right = np.vstack([2 * sums.T - total[:, None], BIAS * (2 * counts - counts.sum())])
  return linalg.solve(left, right, assume_a='pos')


def predict(
  x: Array,  # [b, E]
  scale: Scale,
  weights: Array,  # [E + 1, C]
  allowed: Array,  # [c] int, the classes that may be predicted
) -> Array:  # [b] int, one of `allowed`
  """Returns the class with the highest score for each row; ties go to the first of `allowed`."""
  chosen = weights[:, allowed]
  scores = scale(x).astype(np.float64) @ chosen[:-1] + BIAS * chosen[-1]
  return np.asarray(allowed)[scores.argmax(axis=1)]


def plain_name(name: str) -> str:
  """Returns a class name in the form used for comparisons: lower case, single spaces."""
  return ' '.join(_WORD.findall(name.replace('_', ' ').casefold()))


def caption_classes(
  captions: Iterable[str],
  names: Mapping[str, int],  # plain_name -> class
) -> Array:  # [n] int32, -1 if a caption names no class or several
  """Returns the single class that each caption names in whole words.

  The longest name counts: 'a sports car' does not name the class car if sports car is a class.
  """
  lengths: dict[str, list[int]] = {}  # first word of names -> their lengths in words, descending
  for length, word in sorted(
    {(len(words), words[0]) for name in names if (words := name.split())}, reverse=True
  ):
    lengths.setdefault(word, []).append(length)
  return np.fromiter((_one_class(caption, lengths, names) for caption in captions), np.int32)


def _one_class(caption: str, lengths: Mapping[str, Sequence[int]], names: Mapping[str, int]) -> int:
  words = _WORD.findall(caption.replace('_', ' ').casefold())
  if lengths.keys().isdisjoint(words):
    return -1
  classes, place = set(), 0
  while place < len(words):
    step = 1
    for length in lengths.get(words[place], ()):
      name = ' '.join(words[place : place + length])
      if name in names:
        classes.add(names[name])
        step = length
        break
    place += step
  return classes.pop() if len(classes) == 1 else -1
