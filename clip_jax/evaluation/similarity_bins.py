"""Accuracy by nearest-neighbour similarity, raw and within class.

In: correctness [S, Q] and one similarity per query. Out: a list of bins. No files. Bins show an
association; causal.py estimates effects, from retrained models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from clip_jax.core.types import Array
from clip_jax.evaluation import statistics
from clip_jax.evaluation.statistics import Estimate

FEW = 20  # images


@dataclass(frozen=True)
class Bin:
  """The queries whose similarity lies in [low, high)."""

  low: float
  high: float
  raw: Estimate
  within_class: Estimate | None  # without class effects; None if no class links this bin to others
  few: bool  # fewer than FEW images: a count, shown in grey; its estimates have no interval


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
  correct, label = correct[:, kept], np.unique(label[kept], return_inverse=True)[1]
  number = np.floor(similarity[kept] / width + 1e-6)  # float32 0.7 is just below 14 * 0.05
  number = np.minimum(number, np.ceil(1 / width - 1e-6) - 1).astype(int)
  edges, index = np.unique(number, return_inverse=True)
  weights = _within_class(index, label)
  adjusted = _estimates(correct, weights, index, label, groups)
  bins = []
  for b, edge in enumerate(edges):
    members = np.flatnonzero(index == b)
    low, high = (round(float(e * width), 6) for e in (edge, edge + 1))
    raw = statistics.accuracy_interval(correct[:, members], groups[members])
    found = Bin(low, high, raw, _at_least(adjusted[b], raw), len(members) < FEW)
    bins.append(_without_intervals(found) if found.few else found)
  return bins


def _at_least(adjusted: Estimate | None, raw: Estimate) -> Estimate | None:
  """Returns an accuracy without class effects, as wide as the raw one if all answers are equal.

  Such a bin has no variance of its own, so the residuals of the fit underestimate its error.
  """
  if adjusted is None or 0 < raw.value < 1 or raw.method in ('range', 'none'):
    return adjusted
  value = np.clip(adjusted.value, 0, 1)
  low = min(adjusted.low, max(value - (raw.value - raw.low), 0.0))
  high = max(adjusted.high, min(value + (raw.high - raw.value), 1.0))
  return replace(adjusted, low=float(low), high=float(high))


def _without_intervals(found: Bin) -> Bin:
  """Returns a bin of few images: one image would have an interval of width zero, or none."""
  nothing = dict.fromkeys(('low', 'high', 'error', 'df'), np.nan)
  raw, within = (
    estimate and replace(estimate, **nothing, method='none')
    for estimate in (found.raw, found.within_class)
  )
  return replace(found, raw=raw, within_class=within)


def _within_class(
  index: np.ndarray,  # [n] bin, 0..b-1
  label: np.ndarray,  # [n] class, 0..C-1
) -> np.ndarray:  # [b, n]; a row of NaN for a bin without a value
  """Returns the weights of the images in each bin's accuracy without class effects.

  That accuracy is the bin effect of a least-squares fit on bins and classes, plus the overall mean.
  Bins are comparable within class only if shared classes link them. Only the largest linked set
  gets values, and only if it has two or more bins; the mean is over its images.
  """
  shape = index.max() + 1, label.max() + 1
  count = sparse.coo_array((np.ones(len(index)), (index, label)), shape).tocsr()  # [b, C]
  in_bin, in_class = count.sum(1), count.sum(0)
  shared = (count * (1 / in_class)) @ count.T  # [b, b] bins linked through classes
  shared = shared.toarray()
  _, part = sparse.csgraph.connected_components(shared)
  linked = part == np.bincount(part, in_bin).argmax()
  weights = np.full((shape[0], len(index)), np.nan)
  if linked.sum() < 2:
    return weights
  laplacian = np.diag(in_bin) - shared
  n = in_bin[linked]
  # residual [b, n]: an image counts in its bin, less its part in the mean of its class
  residual = -(count.toarray() / in_class)[linked][:, label]
  residual[(np.cumsum(linked) - 1)[index[linked[index]]], np.flatnonzero(linked[index])] += 1
  effect = np.linalg.pinv(laplacian[np.ix_(linked, linked)]) @ residual
  weights[linked] = effect - n @ effect / n.sum() + linked[index] / n.sum()
  return weights


def _estimates(
  correct: np.ndarray,  # [S, n]
  weights: np.ndarray,  # [b, n]
  index: np.ndarray,  # [n] bin
  label: np.ndarray,  # [n] class
  groups: np.ndarray,  # [n] int
) -> list[Estimate | None]:  # [b]
  """Returns each bin's accuracy without class effects, with the crossed variance of its residuals.

  Bins and classes of the images count as given.
  """
  known = np.isfinite(weights[:, 0])
  if not known.any():
    return [None] * len(weights)
  linked = known[index]
  weights, accuracy = weights[:, linked], correct.mean(0)[linked]
  correct, index, label = correct[:, linked], index[linked], label[linked]
  _, group = np.unique(groups[linked], return_inverse=True)
  effect = np.where(known, weights @ accuracy, 0)
  in_class = np.maximum(np.bincount(label), 1)
  fitted = effect[index]
  fitted = fitted + (np.bincount(label, accuracy - fitted) / in_class)[label]
  residual = correct - fitted  # [S, n]
  return [
    statistics.linear_interval(weights[b], correct, residual, group) if known[b] else None
    for b in range(len(weights))
  ]
