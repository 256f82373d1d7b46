"""The positive control: effect of planted copies of test images, and calibration of thresholds.

In: correctness [S, Q] of the split with the copies and of base; similarities of copies to their
queries. Out: the frozen result and the dict below. No files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip_jax.core.types import Array
from clip_jax.core.vectors import cosine, to_unit_length
from clip_jax.evaluation import causal, statistics
from clip_jax.evaluation.statistics import Estimate

WANTED = 0.95  # share of the copies that a calibrated threshold finds
_BLOCK = 256  # queries compared with all others at a time


@dataclass(frozen=True)
class Leakage:
  """Gain of the split with copies over base, on planted and on unplanted queries."""

  estimate: Estimate | None  # gain on planted minus gain on unplanted queries
  planted: Estimate | None  # gain on planted queries; all estimates are None if reason is not ''
  unplanted: Estimate | None  # gain on unplanted queries
  planted_queries: int
  unplanted_queries: int
  reason: str  # '' or 'not estimable: ...'


def contrast(
  with_copies: Array,  # [S, Q] bool
  base: Array,  # [S, Q] bool, the same seeds
  planted: Array,  # [Q] bool: a copy of the query is in the split
  unplanted: Array,  # [Q] bool: the query was not drawn; queries of neither kind do not count
  groups: Sequence | Array | None = None,  # [Q] names, as in statistics.group_index
  level: float = 0.95,
) -> Leakage:
  """Returns [acc(with copies) - acc(base)] on planted queries minus the same on unplanted ones.

  Planted queries were drawn at random, so this is a randomised contrast, with seeds crossed with
  groups of images. Three or more seeds give an interval, two give a range, one gives an interval
  over images only.
  """
  with_copies, base = statistics.matrix(with_copies), statistics.matrix(base)
  planted, unplanted = np.asarray(planted, bool), np.asarray(unplanted, bool)
  if with_copies.shape != base.shape or not planted.shape == unplanted.shape == base.shape[1:]:
    raise ValueError(
      f'with_copies {with_copies.shape}, base {base.shape}, planted {planted.shape} '
      f'and unplanted {unplanted.shape} must agree in seeds and images'
    )
  if (planted & unplanted).any():
    raise ValueError(f'{(planted & unplanted).sum()} queries are both planted and unplanted')
  result = Leakage(None, None, None, int(planted.sum()), int(unplanted.sum()), '')
  if min(result.planted_queries, result.unplanted_queries) < causal.FEWEST:
    return replace(
      result,
      reason=f'not estimable: {result.planted_queries} planted and '
      f'{result.unplanted_queries} unplanted queries; each needs {causal.FEWEST}',
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
  return replace(result, **dict(zip(('estimate', 'planted', 'unplanted'), estimates)))


def nearest_other(
  vectors: Array,  # [Q, E] float16, of a benchmark
  usable: Array,  # [Q] bool
  rows: Array,  # [n] int64: queries
) -> Array:  # [n] float64
  """Returns the cosine similarity of each row to its nearest other usable query; -1 for none.

  The neighbour is found in float32, its similarity computed in float64. Memory: _BLOCK rows of Q
  similarities.
  """
  units = to_unit_length(np.asarray(vectors, np.float32))
  nearest_similarity = np.full(len(rows), -1.0)
  for start in range(0, len(rows), _BLOCK):
    block = rows[start : start + _BLOCK]
    similarity = units[block] @ units.T  # [b, Q]
    similarity[:, ~usable] = -np.inf
    similarity[np.arange(len(block)), block] = -np.inf
    nearest = similarity.argmax(1)
    exact = cosine(vectors[block], vectors[nearest])
    nearest_similarity[start : start + len(block)] = np.where(
      np.isfinite(similarity.max(1)), exact, -1
    )
  return nearest_similarity


def calibration(
  kinds: Sequence[str] | Array,  # [n] kind of each copy
  similarity: Array,  # [n] float64: similarity of each copy to its own query
  others: Array,  # [m] float64: similarity of each planted query to the nearest non-copy
  threshold: float,  # a pair counts as a duplicate from this similarity on
  wanted: float = WANTED,
) -> dict:
  """Returns the recall of a duplicate threshold, and the threshold of recall `wanted`.

  others_over: share of `others` at or above the threshold. others_median and others_highest are
  similarities. kinds: for each kind, and for 'all' last, a dict of copies and found (at or above
  the threshold) as counts, recall with its Wilson interval low and high, least and median
  similarity, similarity_wanted (the highest similarity that the share `wanted` of the copies
  reaches), threshold_wanted (1 - similarity_wanted, the form of config.dedup.threshold), and
  others_over_wanted (share of `others` at or above similarity_wanted) with its Wilson interval.
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
  is_found = similarity >= threshold
  interval = statistics.image_interval(is_found)
  missed = int(np.floor((1 - wanted) * len(similarity) + 1e-9))  # copies that may be missed
  reached = float(np.sort(similarity)[missed])
  false = statistics.image_interval(others >= reached)
  return {
    'kind': kind,
    'copies': len(is_found),
    'found': int(is_found.sum()),
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
