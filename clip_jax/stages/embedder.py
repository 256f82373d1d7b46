"""Stage embedder: makes the frozen model whose image embeddings define similarity.

In: the ingested pool and anchor, or a weights file, which is not copied.
Out: WORKDIR/embedder/embedder.json (its description and the sha256 of its weights), and
embedder.npz ('pca', 'hog') or checkpoints/ ('train').
"""

import os

from absl import logging
import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core import files, hosts
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.data import loader
from clip_jax.experiment import graph, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import fitted_embedders, sscd
from clip_jax.stages import fit, models


def make(x: Experiment, todo: list[Product]) -> Made:
  """Makes the embedder and writes its description, embedder.json."""
  (product,) = todo
  folder = os.path.dirname(product.name)
  source = x.embedder_block.source
  outputs, about = _MAKERS.get(source, _fit)(x, product)
  if hosts.index():  # process 0 records the embedder
    return
  about = config_lib.plain({'source': source, **about})
  files.write_json(x.path(folder, 'embedder.json'), about)
  yield product, [f'{folder}/{name}' for name in (*outputs, 'embedder.json')], about


def _fit(x: Experiment, product: Product):
  """Fits 'pca' or 'hog' on a seeded sample of the base set; skips unreadable images."""
  block, train, base = x.embedder_block, x.config.train, workdir.base_source(x)
  rng = np.random.default_rng(np.random.SeedSequence((block.seed, 0)))
  rows = np.sort(rng.choice(len(base), min(block.fit_images, len(base)), replace=False))
  images = np.concatenate(
    [
      batch[ok]
      for _, batch, ok in loader.image_batches(
        base,
        rows,
        batch_size=block.batch_size,
        image_size=block.image_size,
        mode=x.config.preprocess.resize,
        threads=train.loader_threads,
        processes=train.loader_processes,
      )
    ]
  )  # [n, S, S, 3]
  if len(images) < 2:
    raise InputError(
      f'The embedder {block.source!r} needs at least 2 readable images to fit, but only '
      f'{len(images):,} of {len(rows):,} images drawn from the pool and the anchor can be read.'
    )
  path = x.path(product.name + '.npz')
  files.write_npz(path, **fitted_embedders.EMBEDDERS[block.source][0](images, block.dim))
  logging.log(
    logging.DEBUG if x.embedder else logging.INFO,
    'embedder%s: %s, fitted on %s images of the base set.',
    x.suffix,
    block.source,
    f'{len(images):,}',
  )
  return ['embedder.npz'], {
    'fitted_on': len(images),
    'of_base_rows': len(base),
    'seed': block.seed,
    'image_size': block.image_size,
    'sha256': files.sha256(path),
  }


def _train(x: Experiment, product: Product):
  """Trains a CLIP on all usable pool rows and the anchor, with its own seed."""
  base, block = workdir.base_source(x), x.embedder_block
  result, _ = fit.fit(
    x,
    os.path.dirname(product.name),
    base,
    whole=base,
    base=base,
    seed=block.seed,
    samples=block.samples,
    product=product,
  )
  return ['checkpoints', 'config.json', 'metrics.jsonl'], {
    'samples': block.samples,
    'seed': block.seed,
    'of_base_rows': len(base),
    'sha256': result.digest,
  }


def _weights(x: Experiment, product: Product):
  """Opens the weights once, so that errors in them appear in this stage."""
  block = x.embedder_block
  read = models.read(models.weights_path(x), block.name, models.name_flag(x))
  return [], {
    'name': block.name,
    'file': os.path.basename(block.path),
    'sha256': product.sources[graph.WEIGHTS],
    'image_size': read.config.image_size,
    'embed_dim': read.config.embed_dim,
    **read.preprocess,
  }


def _sscd(x: Experiment, product: Product):
  """Reads the weights of SSCD once, so that errors in them appear in this stage."""
  path = models.weights_path(x)
  sscd.read(path)
  logging.info(
    'embedder%s: sscd. Its authors count pairs of similarity over %g as copies (sscd_disc_mixup, '
    '90 %% precision on DISC): --config.dedup.threshold=%g.',
    x.suffix,
    sscd.SIMILARITY,
    1 - sscd.SIMILARITY,
  )
  return [], {
    'name': '',
    'file': os.path.basename(path),
    'sha256': product.sources[graph.WEIGHTS],
    'image_size': sscd.IMAGE_SIZE,
    'embed_dim': sscd.RESNET50.embed_dim,
    'mean': sscd.MEAN,
    'std': sscd.STD,
    'resize': sscd.RESIZE,
  }


def _files(x: Experiment, product: Product):
  """Makes nothing, because the vectors come from files."""
  del x, product
  return [], {}


_MAKERS = {
  'train': _train,
  'weights': _weights,
  'sscd': _sscd,
  'files': _files,
}  # other sources are fitted on images: fitted_embedders.EMBEDDERS
MAKERS = {'embedder': make}
