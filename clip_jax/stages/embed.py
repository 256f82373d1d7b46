"""Stage embed: the embedding of every image of every dataset.

In: ingested datasets, the embedder. Out: WORKDIR/embeddings/<dataset>/00000.npy float16 [n, E],
normalised in float32 before the cast, and usable-00000.npy bool [n].
"""

import os
from collections.abc import Callable

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.stages import embedder
from clip_jax.stages import ingest
from clip_jax.stages import layout


LISTED = 3  # unreadable images that the log names


@layout.remembered
def shard_products(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """The embeddings of a dataset, one product a shard."""
  model = embedder.product(config, workdir)
  return [Product(f'embeddings/{dataset}/{i:05d}', {},
                  {model.name: model.fingerprint, part.name: part.fingerprint})
          for i, part in enumerate(ingest.shard_products(config, workdir, dataset))]


def run(config: ConfigDict, workdir: str) -> None:
  model, every = None, []
  for dataset in layout.datasets(config):
    wanted = shard_products(config, workdir, dataset)
    every += wanted
    missing = products.missing(workdir, wanted, remake=False, redo=f'embed:{dataset}')
    if not missing:
      continue
    if len(missing) < len(wanted):
      logging.info('embed %s: going on, %d of %d shards are there.', dataset, len(wanted) - len(missing),
                   len(wanted))
    model = model or embedder.load(config, workdir)
    _embed(config, workdir, dataset, missing, model)
  products.write_manifest(workdir, 'embeddings', every)


def _embed(config: ConfigDict, workdir: str, dataset: str, missing: list[Product],
           model: embedder.Embedder) -> None:
  source = layout.source(workdir, dataset)
  shards = [int(product.name.rsplit('/', 1)[1]) for product in missing]
  total = sum(int(source.starts[i + 1] - source.starts[i]) for i in shards)
  unreadable: list[str] = []
  with progress.Bar(total=total, desc=f'embed {dataset}', unit='image') as bar:
    for product, shard in zip(missing, shards):
      with products.lock(workdir, product.name):
        start, stop = int(source.starts[shard]), int(source.starts[shard + 1])
        vectors, usable = embed_rows(config, source, start, stop, model, bar,
                                     lambda row: _keys(workdir, dataset, shard, [row])[0])
        made = [f'embeddings/{dataset}/{shard:05d}.npy', f'embeddings/{dataset}/usable-{shard:05d}.npy']
        files.write_npy(os.path.join(workdir, made[0]), vectors)
        files.write_npy(os.path.join(workdir, made[1]), usable)
        lost = _keys(workdir, dataset, shard, np.flatnonzero(~usable))
        unreadable += lost
        products.finish(workdir, product, made, {'rows': len(usable), 'unreadable': len(lost)})
  said = ''
  if unreadable:
    more = ', ...' if len(unreadable) > LISTED else ''
    said = (f'; {progress.counted(len(unreadable), "unreadable image")} in no split and no search '
            f'({", ".join(unreadable[:LISTED])}{more}; the report lists all)')
  logging.info('embed %s: %s images%s.', dataset, f'{total:,}', said)


def _keys(workdir: str, dataset: str, shard: int, rows) -> list[str]:
  """Returns the keys of some rows, counted from 0 in their shard."""
  if not len(rows):
    return []
  import pyarrow.parquet as pq
  path = os.path.join(workdir, 'ingest', dataset, f'index-{shard:05d}.parquet')
  return pq.read_table(path, columns=['key'])['key'].take(np.asarray(rows)).to_pylist()


def embed_rows(config: ConfigDict, source, start: int, stop: int, model: embedder.Embedder, bar,
               key_of: Callable[[int], str]):
  """Embeds rows start..stop of a source. Returns ([n, E] float16, usable [n] bool).

  Raises InputError where the embedder gives a NaN, which no later stage may see; key_of(k) names the k-th row.
  """
  from clip_jax.data import loader
  vectors, usable = [], []
  size = config.embedder.batch_size
  for rows, images, ok in loader.image_batches(source, np.arange(start, stop), batch_size=size,
                                               image_size=model.image_size, mode=model.resize,
                                               threads=config.train.loader_threads,
                                               processes=config.train.loader_processes):
    padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
    batch = np.asarray(model.apply(padded), np.float32)[:len(images)]  # one shape, compiled once
    bad = ok & ~np.isfinite(batch).all(axis=1)
    if bad.any():
      row = int(rows[bad][0])
      raise InputError(f'The embedder gives NaN for the image {key_of(row - start)} (row {row}). Its weights are '
                       'broken: remake it with --redo=embedder.')
    norm = np.linalg.norm(batch, axis=1, keepdims=True)
    batch = np.where(ok[:, None], batch / np.where(norm > 0, norm, 1), 0)
    vectors.append(batch.astype(np.float16))
    usable.append(ok)
    bar.update(len(rows))
  if not vectors:  # a source file that holds no row of this dataset
    blank = np.zeros((size, model.image_size, model.image_size, 3), np.uint8)
    return np.zeros((0, np.asarray(model.apply(blank)).shape[1]), np.float16), np.zeros(0, bool)
  return np.concatenate(vectors), np.concatenate(usable)
