"""k-means clusters of the pool: for the rule clusters, and as domains where nothing names them.

In: the embeddings of the pool and its candidates.
Out, as domains: WORKDIR/splits/domains.npz, with centers [K, E] float32 and cluster [N] int32, -1
for rows that are no candidates.
"""

import math

import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array, Vectors
from clip_jax.experiment import workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import rules
from clip_jax.similarity import kmeans

DOMAIN_ROWS = 100  # fewest candidates per cluster, on average, of clusters that are domains
DOMAIN_SEED = 0  # of their initial centres, and of the rows that k-means fits
NO_CANDIDATE = 'The pool has no candidate: no row is both readable and not a duplicate.'


def write_domains(x: Experiment, todo: list[Product]) -> Made:
  """Writes the clusters that stand in for domains; K = 1 for a pool that is too small for more."""
  candidates = workdir.candidates(x)
  if not candidates.any():
    raise InputError(NO_CANDIDATE)
  clusters = max(1, min(x.config.prune.domain_clusters, int(candidates.sum()) // DOMAIN_ROWS))
  centers, cluster = fit(workdir.embeddings(x, POOL), candidates, clusters, DOMAIN_SEED)
  path = f'{todo[0].name}.npz'
  files.write_npz(x.path(path), centers=centers, cluster=cluster)
  yield todo[0], [path], {'clusters': len(centers)}


def fit(
  pool: Vectors,  # [N, E] float16
  candidates: Array,  # [N] bool
  clusters: int,  # K, at most the number of candidates
  seed: int,
) -> tuple[Array, Array]:
  """Returns k-means centres [K, E] float32, and each candidate's nearest, [N] int32 (else -1).

  Initial centres are random candidates. k-means fits at most rules.CLUSTER_ROWS random candidates a
  cluster; one pass then assigns all. The result does not depend on the pool's shards.
  """
  rows = np.flatnonzero(candidates)
  fitted, count = candidates, rules.CLUSTER_ROWS * clusters
  if count < len(rows):
    fitted = np.zeros(len(pool), bool)
    fitted[np.random.default_rng((seed, 1)).choice(rows, count, replace=False)] = True
  with progress.Bar(total=rules.CLUSTER_ITERATIONS, desc='k-means', unit='iteration') as bar:
    found = kmeans.fit(
      pool,
      fitted,
      clusters=clusters,
      seed=seed,
      initial_similarity=math.inf,
      max_iterations=rules.CLUSTER_ITERATIONS,
      on_iteration=lambda state: bar.update(),
    )
  if fitted is candidates:
    return found.centers, found.assignment
  with progress.Bar(total=len(rows), desc='assign', unit='row') as bar:
    return found.centers, kmeans.assign(pool, candidates, found.centers, on_rows=bar.update)
