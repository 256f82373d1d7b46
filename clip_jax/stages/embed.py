"""Stage embed: the embedding of every image of every dataset; vectors that others made are normalised, not computed.

In: ingested datasets, the embedder, files of vectors. Out: WORKDIR/embeddings/<dataset>/00000.npy float16 [n, E],
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
from clip_jax.core.types import Array
from clip_jax.data import vectors as vectors_lib
from clip_jax.stages import benchmark_dirs
from clip_jax.stages import embedder
from clip_jax.stages import ingest
from clip_jax.stages import layout


LISTED = 3  # unreadable images that the log names


@layout.remembered
def shard_products(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """The embeddings of a dataset, one product a shard. Vectors from files are the same with any embedder."""
  model, given = embedder.product(config, workdir), ingest.vector_shards(config, workdir, dataset)
  return [Product(f'embeddings/{dataset}/{i:05d}', {},
                  {**({} if i in given else {model.name: model.fingerprint}), part.name: part.fingerprint})
          for i, part in enumerate(ingest.shard_products(config, workdir, dataset))]


def run(config: ConfigDict, workdir: str) -> None:
  model, every, checked = None, [], False
  for dataset in layout.datasets(config):
    wanted = shard_products(config, workdir, dataset)
    every += wanted
    missing = products.missing(workdir, wanted, remake=False, redo=f'embed:{dataset}')
    if not missing:
      continue
    if len(missing) < len(wanted):
      logging.info('embed %s: going on, %d of %d shards are there.', dataset, len(wanted) - len(missing),
                   len(wanted))
    if not checked:
      _check_dims(config, workdir)
      checked = True
    given = ingest.vector_shards(config, workdir, dataset)
    from_files = [product for product in missing if _shard(product) in given]
    if from_files:
      _take(config, workdir, dataset, from_files, given)
    if len(from_files) < len(missing):
      model = model or embedder.load(config, workdir)
      _embed(config, workdir, dataset, [product for product in missing if product not in from_files], model)
  products.write_manifest(workdir, 'embeddings', every)


def _shard(product: Product) -> int:
  return int(product.name.rsplit('/', 1)[1])


def _check_dims(config: ConfigDict, workdir: str) -> None:
  """Raises InputError where the datasets' vectors, or those of the weights, are not of one length E."""
  dims = {f'{dataset} ({layout.datasets(config)[dataset].path or "its sources"})': dim
          for dataset in layout.datasets(config) if (dim := ingest.vector_dim(config, workdir, dataset))}
  if dims and config.embedder.source == 'weights':
    dims[f'the embedder {config.embedder.path}'] = embedder.architecture(config).embed_dim
  first = next(iter(dims), '')
  for name, dim in dims.items():
    if dim != dims[first]:
      raise InputError(f'{first} has vectors of {dims[first]} numbers, and {name} of {dim}: they are not of one '
                       'embedder, so they cannot be compared. Give vectors of the same.')


def _take(config: ConfigDict, workdir: str, dataset: str, missing: list[Product],
          given: dict[int, ingest.Shard]) -> None:
  """Normalises the vectors of files, shard by shard, block by block."""
  source = layout.source(workdir, dataset)
  cache = os.path.abspath(os.path.expanduser(config.cache_dir or os.path.join(workdir, 'cache')))
  files.remove_unfinished(cache)
  total = sum(len(source.offsets(_shard(product))) for product in missing)
  with progress.Bar(total=total, desc=f'embed {dataset}{layout.whose(workdir)}', unit='vector') as bar:
    for product in missing:
      shard = given[_shard(product)]
      with products.lock(workdir, product.name):
        made = [f'{product.name}.npy', f'embeddings/{dataset}/usable-{shard.number:05d}.npy']
        rows = source.offsets(shard.number)  # of the file, ascending
        any_norm = 'any_norm' if shard.prefix else benchmark_dirs.flag(config, dataset, 'any_norm')
        _write_unit(shard, vectors_lib.local_copy(shard.files[0], cache), rows, os.path.join(workdir, made[0]), bar,
                    f'{any_norm}=True')
        files.write_npy(os.path.join(workdir, made[1]), np.ones(len(rows), bool))
        products.finish(workdir, product, made, {'rows': len(rows), 'unreadable': 0})
  logging.info('embed %s%s: %s vectors taken from %s.', dataset, layout.whose(workdir), f'{total:,}',
               progress.counted(len(missing), 'file'))


def _write_unit(shard: ingest.Shard, path: str, rows: Array, out: str, bar, any_norm: str) -> None:
  """Writes the chosen rows of a file of vectors as unit vectors, float16 [n, E].

  Raises InputError for bad ones; any_norm: the flag that takes vectors of any length.
  """
  block_ = shard.block
  head = vectors_lib.head(path, block_.vector_key, block_.vector_dim)
  bad_rows, first = 0, ''
  with files.atomic(out) as temporary, temporary.open('wb') as f:
    np.lib.format.write_array_header_1_0(f, {'descr': '<f2', 'fortran_order': False, 'shape': (len(rows), head.dim)})
    for start, block in vectors_lib.blocks(path, head):
      low, high = np.searchsorted(rows, (start, start + len(block)))
      if high - low < len(block):
        block = block[rows[low:high] - start]
      unit, bad = vectors_lib.unit(block, block_.any_norm)
      if bad.any():
        place = int(np.argmax(bad))
        first = first or f'row {rows[low + place]:,} {vectors_lib.fault(block[place])}'
        bad_rows += int(bad.sum())
      f.write(unit.tobytes())
      bar.update(high - low)
    if bad_rows:
      said = f'{shard.files[0].path}: {first}, and {bad_rows:,} of {len(rows):,} vectors in all '
      if block_.any_norm:
        raise InputError(f'{said}have no direction. Remove them, or put the right file there.')
      raise InputError(f'{said}are not of length {vectors_lib.LEAST_NORM} to {vectors_lib.MOST_NORM}, as embeddings '
                       f'of images are. Is this the right file? {any_norm} takes vectors of any length, never NaN or '
                       'zeros.')


def _embed(config: ConfigDict, workdir: str, dataset: str, missing: list[Product],
           model: embedder.Embedder) -> None:
  source = layout.source(workdir, dataset)
  shards = list(map(_shard, missing))
  total = sum(int(source.starts[i + 1] - source.starts[i]) for i in shards)
  unreadable: list[str] = []
  with progress.Bar(total=total, desc=f'embed {dataset}{layout.whose(workdir)}', unit='image') as bar:
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
  logging.info('embed %s%s: %s images%s.', dataset, layout.whose(workdir), f'{total:,}', said)


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
