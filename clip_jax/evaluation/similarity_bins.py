"""Accuracy by nearest-neighbour similarity, raw and within class.

In: correctness [S, Q] and one similarity per query. Out: a list of bins. No files. Bins show an
association; causal.py estimates effects, from retrained models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from clip_jax.core.types import Array
from clip_jax.evaluation import statistics

FEW = 20  # images


@dataclass(frozen=True)
class Bin:
  """The queries whose similarity lies in [low, high)."""

  low: float
  high: float
  images: int
  accuracy: float
  accuracy_low: float  # of the 95 % interval, or of the range of two seeds; NaN for a single group
  accuracy_high: float
  within_class: float  # without class effects; NaN if no class links this bin to the others
  few: bool  # fewer than FEW images: shown in grey


def accuracy_by_similarity(
  correct: Array,  # [S, Q] bool
  similarity: Array,  # [Q]: s_i(pool), or s_i(pool) - t_i
  label: Array,  # [Q] int
  groups: Sequence | Array | None = None,
  width: float = 0.05,
) -> list[Bin]:  # lowest similarity first; empty bins are left out
  """Returns accuracy per similarity bin (the paper's Fig. 3, left).

  Queries without a finite similarity (unreadable images) are in no bin. A float16 cosine just above
  1 is in the last bin below 1.
  """
  correct = statistics.matrix(correct)
  similarity, label = np.asarray(similarity, np.float64), np.asarray(label)
  if not similarity.shape == label.shape == correct.shape[1:]:
    raise ValueError(
      f'similarity {similarity.shape}, label {label.shape} and correctness '
      f'{correct.shape} must have the same number of images'
    )
  kept = np.flatnonzero(np.isfinite(similarity))
  if not kept.size:
    return []
  groups = statistics.group_index(groups, len(similarity))[kept]
  correct, label = correct[:, kept], label[kept]
  number = np.floor(similarity[kept] / width + 1e-6)  # float32 0.7 is just below 14 * 0.05
  number = np.minimum(number, np.ceil(1 / width - 1e-6) - 1).astype(int)
  edges, index = np.unique(number, return_inverse=True)
  adjusted = _within_class(correct.mean(0), index, label)
  bins = []
  for b, edge in enumerate(edges):
    members = np.flatnonzero(index == b)
    raw = statistics.accuracy_interval(correct[:, members], groups[members])
    low, high = (round(float(e * width), 6) for e in (edge, edge + 1))
    bins.append(
      Bin(
        low,
        high,
        len(members),
        raw.value,
        raw.low,
        raw.high,
        float(adjusted[b]),
        len(members) < FEW,
      )
    )
  return bins


def _within_class(
  accuracy: np.ndarray,  # [n] mean over seeds
  index: np.ndarray,  # [n] bin, 0..b-1
  label: np.ndarray,  # [n]
) -> np.ndarray:  # [b]
  """Returns the bin effects of a least-squares fit on bins and classes, plus the overall mean.

  Bins are comparable within class only if shared classes link them. Only the largest linked set
  gets values, and only if it has two or more bins; the mean is over its images.
  """
  _, label = np.unique(label, return_inverse=True)
  shape = index.max() + 1, label.max() + 1
  count = sparse.coo_array((np.ones(len(index)), (index, label)), shape).tocsr()  # [b, C]
  in_bin, in_class = count.sum(1), count.sum(0)
  shared = (count * (1 / in_class)) @ count.T  # [b, b] bins linked through classes
  shared = shared.toarray()
  _, part = sparse.csgraph.connected_components(shared)
  linked = part == np.bincount(part, in_bin).argmax()
  effect = np.full(shape[0], np.nan)
  if linked.sum() < 2:
    return effect
  class_mean = np.bincount(label, accuracy) / in_class
  residual = np.bincount(index, accuracy - class_mean[label])  # [b]
  laplacian = np.diag(in_bin) - shared
  effect[linked] = np.linalg.pinv(laplacian[np.ix_(linked, linked)]) @ residual[linked]
  n = in_bin[linked]
  overall = np.bincount(index, accuracy)[linked].sum() / n.sum()
  effect[linked] += overall - (n @ effect[linked]) / n.sum()
  return effect
