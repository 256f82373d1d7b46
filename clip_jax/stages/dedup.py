"""Stage dedup: marks near-duplicates inside the pool (SemDeDup-like: k-means, then pairs inside clusters).

In: WORKDIR/embeddings/pool. Out: WORKDIR/dedup/keep.npy bool [N] and duplicate_of.npy int64 [N], -1
where kept. Rows are only marked; nothing is renumbered. Samples that are anchor rows too take no part.
"""

import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.products import Product
from clip_jax.stages import embed
from clip_jax.stages import ingest
from clip_jax.stages import layout

MADE = ['dedup/keep.npy', 'dedup/duplicate_of.npy']
STATE = 'dedup/kmeans-state.npz'


def product(config: ConfigDict, workdir: str) -> Product:
  inputs = {part.name: part.fingerprint for part in embed.shard_products(config, workdir, layout.POOL)}
  if layout.has_anchor(config):  # which pool rows are anchor rows
    inputs |= {part.name: part.fingerprint for part in ingest.shard_products(config, workdir, layout.ANCHOR)}
  return Product('dedup/keep', layout.pick(config, ['dedup']), inputs)


def run(config: ConfigDict, workdir: str) -> None:
  if not config.dedup.enabled:
    logging.info('dedup: off; every usable pool row is a candidate.')
    return
  wanted = product(config, workdir)
  if products.missing(workdir, [wanted], remake=False, redo='dedup'):
    with products.lock(workdir, wanted.name):
      counts = _mark(config, workdir, wanted)
      products.finish(workdir, wanted, MADE, counts)
  products.write_manifest(workdir, 'dedup', [wanted])


def _mark(config: ConfigDict, workdir: str, wanted: Product) -> dict:
  from clip_jax.similarity import duplicates
  pool = layout.embeddings(workdir, layout.POOL)
  usable = pool.usable & ~layout.in_anchor(config, workdir)
  result = _cluster(config, workdir, pool, usable, wanted)
  keep, duplicate_of = duplicates.within_clusters(pool, usable, result.assignment,
                                                  threshold=config.dedup.threshold)
  files.write_npy(os.path.join(workdir, MADE[0]), keep)
  files.write_npy(os.path.join(workdir, MADE[1]), duplicate_of)
  (files.epath.Path(workdir) / STATE).unlink(missing_ok=True)
  dropped = int(usable.sum()) - int((keep & usable).sum())
  share = dropped / max(int(usable.sum()), 1)
  logging.info('dedup: %s of %s usable pool rows are near-duplicates (%.1f %%), %d clusters.',
               f'{dropped:,}', f'{int(usable.sum()):,}', 100 * share, len(result.centers))
  if share > 0.5:
    logging.warning('De-duplication drops more than half of the pool. Each embedder needs its own '
                    'config.dedup.threshold (now %g): is this one too large?', config.dedup.threshold)
  return {'usable': int(usable.sum()), 'duplicates': dropped, 'clusters': len(result.centers),
          'iterations': result.iterations, 'changed': result.changed}


def _cluster(config: ConfigDict, workdir: str, pool, usable, wanted: Product):
  """K-means, saved after every iteration: a killed run goes on from there."""
  from clip_jax.similarity import kmeans
  d = config.dedup
  clusters = d.clusters or min(-(-int(usable.sum()) // 8000), 50_000)
  path = os.path.join(workdir, STATE)
  state = None
  if os.path.exists(path):
    saved = files.read_npz(path)
    if str(saved.pop('fingerprint')) == wanted.fingerprint:
      state = kmeans.KMeans(saved['centers'], saved['assignment'], int(saved['iterations']), int(saved['changed']))
      logging.info('dedup: k-means goes on after iteration %d.', state.iterations)
    else:
      logging.info('dedup: a half-done k-means of another config is left aside.')
  with progress.Bar(total=d.max_iterations, desc='k-means', unit='iteration') as bar:
    def save(state: kmeans.KMeans) -> None:
      files.write_npz(path, fingerprint=np.array(wanted.fingerprint), **vars(state))
      bar.update()
    result = kmeans.fit(pool, usable, clusters=clusters, seed=d.seed, initial_similarity=d.initial_similarity,
                        min_change=d.min_change, max_iterations=d.max_iterations, on_iteration=save, state=state)
  if result.changed >= max(1, d.min_change * usable.sum()):
    logging.warning('dedup: k-means stopped after %d iterations with %d assignments still changing.',
                    result.iterations, result.changed)
  return result
