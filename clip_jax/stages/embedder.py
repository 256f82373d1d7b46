"""Stage embedder: makes the frozen model whose image embeddings define similarity.

In: the ingested pool and anchor. Out: WORKDIR/embedder/embedder.json (what it is, sha256 of its
weights) and embedder.npz ('pca', 'hog') or checkpoints/ ('train').
"""

import dataclasses
import json
import os
from collections.abc import Callable

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.stages import ingest
from clip_jax.stages import layout

FITTED = ('pca', 'hog')
SOURCES = (*FITTED, 'train')


@dataclasses.dataclass(frozen=True)
class Embedder:
  """A frozen embedder: images uint8 [b, S, S, 3] -> [b, E] float32, unit length."""
  image_size: int
  resize: str
  apply: Callable[[Array], Array]


def product(config: ConfigDict, workdir: str) -> Product:
  """The embedder. It reads the pool and the anchor as they were when it was made and is frozen then:

  samples added to the pool later do not make it another one, so it depends on the datasets' blocks, not on
  their files. What it was made from stands in embedder.json.
  """
  keys = ['embedder.source', 'embedder.image_size', 'embedder.seed', 'preprocess.resize']
  if config.embedder.source in FITTED:
    keys += ['embedder.dim', 'embedder.fit_images']
  else:
    keys += ['embedder.samples', 'model', 'preprocess', *layout.RECIPE]
  inputs = {f'ingest/{name}/index': 'frozen at the first sight' for name in (layout.POOL, layout.ANCHOR)
            if name in layout.datasets(config)}
  del workdir
  return Product('embedder/embedder', layout.pick(config, keys), inputs)


def run(config: ConfigDict, workdir: str) -> None:
  wanted = product(config, workdir)
  if products.missing(workdir, [wanted], remake=False, redo='embedder'):
    with products.lock(workdir, wanted.name):
      make = _fit if config.embedder.source in FITTED else _train
      made, about = make(config, workdir, wanted)
      files.write_json(os.path.join(workdir, 'embedder/embedder.json'), about)
      products.finish(workdir, wanted, [*made, 'embedder/embedder.json'], about)
  products.write_manifest(workdir, 'embedder', [wanted])


def load(config: ConfigDict, workdir: str) -> Embedder:
  """Opens the embedder of a work directory."""
  source = config.embedder.source
  if source in FITTED:
    from clip_jax.models import embedders
    params = files.read_npz(os.path.join(workdir, 'embedder/embedder.npz'))
    apply = embedders.EMBEDDERS[source][1]
    return Embedder(config.embedder.image_size, config.preprocess.resize, lambda images: apply(params, images))
  from clip_jax.stages import models
  model = models.load(os.path.join(workdir, 'embedder'))
  return Embedder(model.image_size, model.resize, model.encode_image)


def base_source(config: ConfigDict, workdir: str):
  """Returns the base set before de-duplication: the pool's rows, then the anchor's."""
  from clip_jax.data import views
  names = [name for name in (layout.POOL, layout.ANCHOR) if name in layout.datasets(config)]
  return views.Concatenation([layout.source(workdir, name) for name in names])


def _fit(config: ConfigDict, workdir: str, wanted: Product):
  """Fits 'pca' or 'hog' on a seeded sample of the base set; unreadable images are passed over."""
  from clip_jax.data import loader
  from clip_jax.models import embedders
  e = config.embedder
  base = base_source(config, workdir)
  rng = np.random.default_rng(np.random.SeedSequence((e.seed, 0)))
  rows = np.sort(rng.choice(len(base), min(e.fit_images, len(base)), replace=False))
  images = [batch[ok] for _, batch, ok in loader.image_batches(
      base, rows, batch_size=e.batch_size, image_size=e.image_size, mode=config.preprocess.resize)]
  images = np.concatenate(images)  # [n, S, S, 3]
  if len(images) < 2:
    raise InputError(f'The embedder {e.source!r} needs at least 2 readable images to fit, and of '
                     f'{len(rows)} drawn from the pool and the anchor only {len(images)} can be read.')
  params = embedders.EMBEDDERS[e.source][0](images, e.dim)
  path = os.path.join(workdir, 'embedder/embedder.npz')
  files.write_npz(path, **params)
  about = {'source': e.source, 'fitted_on': len(images), 'of_base_rows': len(base), 'seed': e.seed,
           'image_size': e.image_size, 'sha256': files.sha256(path)}
  del wanted
  logging.info('embedder: %s, fitted on %s images of the base set.', e.source, f'{len(images):,}')
  return ['embedder/embedder.npz'], about


def _train(config: ConfigDict, workdir: str, wanted: Product):
  """Trains a CLIP on all usable pool rows and the anchor, with its own seed."""
  from clip_jax.stages import train
  base = base_source(config, workdir)
  result, _ = train.fit(config, workdir, 'embedder', base, seed=config.embedder.seed,
                     samples=config.embedder.samples, wanted=wanted)
  about = {'source': 'train', 'samples': config.embedder.samples, 'seed': config.embedder.seed,
           'of_base_rows': len(base), 'sha256': result.digest}
  return ['embedder/checkpoints', 'embedder/config.json', 'embedder/metrics.jsonl'], json.loads(json.dumps(about))
