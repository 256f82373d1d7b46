"""The positive control: what planted copies of test images changed, and how near they lie to these.

In: correctness [S, Q] of the split with the copies and of base; similarities. Out: the frozen
result and the dict below. No files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip_jax.core.types import Array
from clip_jax.core.vectors import cosine, unit
from clip_jax.evaluation import causal, statistics
from clip_jax.evaluation.statistics import Estimate

WANTED = 0.95  # share of the copies that a calibrated threshold finds
_BLOCK = 256  # queries that are compared with all others at a time


@dataclass(frozen=True)
class Leakage:
  """What the split with the copies has over base, on the queries that it holds and on others."""

  estimate: Estimate | None  # gain on the planted less gain on the others
  planted: Estimate | None  # gain on the planted queries; all None where reason is not ''
  unplanted: Estimate | None  # gain on the others
  planted_queries: int
  unplanted_queries: int
  reason: str  # '' or 'not estimable: ...'


def contrast(
  with_copies: Array,  # [S, Q] bool
  base: Array,  # [S, Q] bool, the same seeds
  planted: Array,  # [Q] bool: a copy of it is in the split
  unplanted: Array,  # [Q] bool: it was not drawn; what is neither does not count
  groups: Sequence | Array | None = None,  # [Q] names, as in statistics.group_index
  level: float = 0.95,
) -> Leakage:
  """[acc(with copies) - acc(base)] on planted queries less the same on unplanted ones.

  Which queries are planted was drawn at random, so this is a randomised contrast: seeds crossed
  with groups of images. Three seeds or more: an interval; two: their range; one: over images only.
  """
  with_copies, base = statistics.matrix(with_copies), statistics.matrix(base)
  planted, unplanted = np.asarray(planted, bool), np.asarray(unplanted, bool)
  if with_copies.shape != base.shape or not planted.shape == unplanted.shape == base.shape[1:]:
    raise ValueError(
      f'with_copies {with_copies.shape}, base {base.shape}, planted {planted.shape} '
      f'and unplanted {unplanted.shape} must agree in seeds and images'
    )
  if (planted & unplanted).any():
    raise ValueError(f'{(planted & unplanted).sum()} queries are both planted and not')
  found = Leakage(None, None, None, int(planted.sum()), int(unplanted.sum()), '')
  if min(found.planted_queries, found.unplanted_queries) < causal.FEWEST:
    return replace(
      found,
      reason=f'not estimable: {found.planted_queries} planted and '
      f'{found.unplanted_queries} unplanted queries; each needs {causal.FEWEST}',
    )
  one_arm = np.zeros(len(planted))
  estimates = (
    statistics.contrast(with_copies - base, counted.astype(float), arms, groups, level)
    for counted, arms in (
      (planted | unplanted, unplanted),
      (planted, one_arm),
      (unplanted, one_arm),
    )
  )
  return replace(found, **dict(zip(('estimate', 'planted', 'unplanted'), estimates)))


def nearest_other(
  vectors: Array,  # [Q, E] float16, of a benchmark
  usable: Array,  # [Q] bool
  rows: Array,  # [n] int64: the queries that are asked about
) -> Array:  # [n] float64
  """Returns each asked query's cosine similarity to the nearest other usable one; -1 for none.

  float32 finds the neighbour, float64 says how near it is. Memory: _BLOCK rows of Q similarities.
  """
  units = unit(np.asarray(vectors, np.float32))
  found = np.full(len(rows), -1.0)
  for start in range(0, len(rows), _BLOCK):
    some = rows[start : start + _BLOCK]
    similarity = units[some] @ units.T  # [b, Q]
    similarity[:, ~usable] = -np.inf
    similarity[np.arange(len(some)), some] = -np.inf
    nearest = similarity.argmax(1)
    exact = cosine(vectors[some], vectors[nearest])
    found[start : start + len(some)] = np.where(np.isfinite(similarity.max(1)), exact, -1)
  return found


def calibration(
  kinds: Sequence[str] | Array,  # [n] of each copy
  similarity: Array,  # [n] float64: of each copy to its own query
  others: Array,  # [m] float64: of each planted query to the nearest image that is no copy of it
  threshold: float,  # similarity from which a pair counts as a duplicate
  wanted: float = WANTED,
) -> dict:
  """Returns how many copies a duplicate threshold finds, and which threshold finds enough of them.

  others_over: share of `others` at or over the threshold; others_median, others_highest. kinds: for
  each kind, and 'all' last: copies, found (at or over the threshold), recall with its Wilson
  interval low and high, least and median similarity, similarity_wanted (the highest that `wanted`
  of the copies reach), threshold_wanted (1 - that, as config.dedup.threshold is written),
  others_over_wanted with its Wilson interval.
  """
  kinds, similarity, others = np.asarray(kinds), np.asarray(similarity), np.asarray(others)
  parts = [(str(kind), similarity[kinds == kind]) for kind in sorted(set(kinds.tolist()))]
  return {
    'similarity': float(threshold),
    'threshold': float(1 - threshold),
    'wanted': float(wanted),
    'queries': len(others),
    'others_over': float((others >= threshold).mean()),
    'others_median': float(np.median(others)),
    'others_highest': float(others.max()),
    'kinds': [
      _recall(kind, values, others, threshold, wanted)
      for kind, values in [*parts, ('all', similarity)]
    ],
  }


def _recall(kind: str, similarity: Array, others: Array, threshold: float, wanted: float) -> dict:
  found = similarity >= threshold
  interval = statistics.image_interval(found)
  missed = int(np.floor((1 - wanted) * len(similarity) + 1e-9))  # copies that may be missed
  reached = float(np.sort(similarity)[missed])
  false = statistics.image_interval(others >= reached)
  return {
    'kind': kind,
    'copies': len(found),
    'found': int(found.sum()),
    'recall': interval.value,
    'low': interval.low,
    'high': interval.high,
    'least': float(similarity.min()),
    'median': float(np.median(similarity)),
    'similarity_wanted': reached,
    'threshold_wanted': 1 - reached,
    'others_over_wanted': false.value,
    'others_over_wanted_low': false.low,
    'others_over_wanted_high': false.high,
  }
