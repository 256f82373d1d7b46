"""De-duplication audit (dedup.audit_rows): measures the duplicates that clustering misses.

De-duplication compares rows of one cluster only; this audit compares sampled rows with all rows
(see similarity/missed_duplicates.py).
In: the pool's embeddings for de-duplication, its marks and centres.
Out: WORKDIR/dedup/audit.json, which the page shows in the section on duplicates.
"""

import math

from absl import logging
import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph


def products(graph: Graph) -> dict[str, list[Product]]:
  """Adds the de-duplication audit to the stage dedup if config.dedup.audit_rows is set."""
  config = graph.config
  if not config.dedup.enabled or not config.dedup.audit_rows:
    return {}
  return {
    'dedup': [
      Product(
        'dedup/audit',
        'dedup audit',
        keys=blocks.pick_keys(config, ['dedup.audit_rows']),
        inputs=(graph.dedup_marks(),),
        is_cheap=True,
      )
    ]
  }


def compare_sample(x: Experiment, todo: list[Product]) -> Made:
  """Compares sampled rows with all rows and with the rows of their cluster."""
  from clip_jax.similarity import missed_duplicates  # imports JAX and SciPy

  d, pool = x.config.dedup, workdir.embeddings(x.with_embedder(x.config.dedup.embedder), POOL)
  usable, centers = (
    pool.usable & ~workdir.in_anchor(x),
    files.read_npy(x.path('dedup', 'centers.npy')),
  )
  sample = np.sort(
    np.random.default_rng((d.seed, 2)).choice(
      np.flatnonzero(usable), min(d.audit_rows, int(usable.sum())), replace=False, shuffle=False
    )
  )
  priority = files.read_npy(x.path('dedup', 'priority.npy')) if d.survivor != 'first' else None
  with progress.Bar(total=int(usable.sum()), desc='dedup audit', unit='row') as bar:
    result = missed_duplicates.measure(
      pool,
      usable,
      sample,
      [*_fewer_clusters(x, pool, sample, len(centers)), centers],
      threshold=d.threshold,
      keep=files.read_npy(workdir.keep_path(x)),
      priority=priority,
      on_rows=bar.update,
    )
  by_clusters = [
    {key: _nan_to_none(value) for key, value in vars(each).items()} for each in result.clusterings
  ]
  files.write_json(
    x.path('dedup', 'audit.json'),
    {
      'rows': len(sample),
      'usable': int(usable.sum()),
      'threshold': d.threshold,
      'clusters': len(centers),
      'pairs': result.pairs,
      'dropped_exhaustive': result.dropped_exhaustive,
      'by_clusters': by_clusters,
      'chains': {
        'components': result.components,
        'largest': max(result.sizes, default=0),
        'through_dropped': result.through_dropped,
        'sizes': {str(size): count for size, count in sorted(result.sizes.items())},
      },
    },
  )
  own = result.clusterings[-1]
  yield (
    todo[0],
    ['dedup/audit.json'],
    {'rows': len(sample), 'pairs': result.pairs, 'recall': _nan_to_none(own.recall)},
  )
  if result.pairs:
    logging.info(
      'dedup: audit of %s sampled rows against all rows: %s of %s pairs of near-duplicates are '
      'inside one cluster, %.1f %% [%.1f, %.1f]; %s of the sampled rows are dropped, %s by '
      'exhaustive search.',
      f'{len(sample):,}',
      f'{own.found:,}',
      f'{result.pairs:,}',
      100 * own.recall,
      100 * own.low,
      100 * own.high,
      f'{own.dropped:,}',
      f'{result.dropped_exhaustive:,}',
    )
  else:
    logging.info(
      'dedup: audit of %s sampled rows: none has a near-duplicate in the pool, so the recall is '
      'unknown. Increase config.dedup.audit_rows.',
      f'{len(sample):,}',
    )


def _fewer_clusters(x: Experiment, pool, sample: Array, most: int) -> list[Array]:
  """Returns the k-means centres of the sample for 1, 2, 4, ... clusters, fewer than `most`."""
  from clip_jax.similarity import kmeans

  d, centers, clusters = x.config.dedup, [], 1
  rows = np.zeros(len(pool), bool)
  rows[sample] = True
  while clusters < most and 2 * clusters <= len(sample):
    fit = kmeans.fit(
      pool,
      rows,
      clusters=clusters,
      seed=d.seed,
      initial_similarity=d.initial_similarity,
      min_change=d.min_change,
      max_iterations=d.max_iterations,
      name='the pool rows sampled for the de-duplication audit',
    )
    if len(fit.centers) < clusters:
      break  # the sample has too few dissimilar rows for more clusters
    centers.append(fit.centers)
    clusters *= 2
  return centers


def _nan_to_none(value: float) -> float | None:
  """Returns a number for JSON, None for NaN."""
  return None if math.isnan(value) else value


def section(_) -> None:
  """Returns no section, because the section on duplicates shows the results."""


MAKERS = {'dedup audit': compare_sample}
