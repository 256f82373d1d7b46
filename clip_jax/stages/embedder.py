"""Stage embedder: makes the frozen model whose image embeddings define similarity.

In: the ingested pool and anchor, or a file of weights, which stays where it is. Out:
WORKDIR/embedder/embedder.json (what it is, sha256 of its weights), and embedder.npz ('pca', 'hog') or
checkpoints/ ('train').
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.stages import layout

FITTED = ('pca', 'hog')
FILES = 'files'     # no model at all: every dataset is vectors
SOURCES = (*FITTED, 'train', 'weights', FILES)
CONTENT = 'the content of config.embedder.path'


@dataclasses.dataclass(frozen=True)
class Embedder:
  """A frozen embedder: images uint8 [b, S, S, 3] -> [b, E] float32, unit length."""
  image_size: int
  resize: str
  apply: Callable[[Array], Array]


def product(config: ConfigDict, workdir: str) -> Product:
  """The embedder. It reads the pool and the anchor as they were when it was made and is frozen then:

  samples added to the pool later do not make it another one, so it depends on the datasets' blocks, not on
  their files. What it was made from stands in embedder.json. Weights count by their content, not by their path.
  """
  if config.embedder.source == 'weights':
    return Product('embedder/embedder', layout.pick(config, ['embedder.source', 'embedder.name']),
                   weights_content(weights_path(config)))
  if config.embedder.source == FILES:
    return Product('embedder/embedder', layout.pick(config, ['embedder.source']))
  keys = ['embedder.source', 'embedder.image_size', 'embedder.seed', 'preprocess.resize']
  if config.embedder.source in FITTED:
    keys += ['embedder.dim', 'embedder.fit_images']
  else:
    keys += ['embedder.samples', 'model', 'preprocess', *layout.recipe(config)]
  inputs = {f'ingest/{name}/index': products.FROZEN for name in (layout.POOL, layout.ANCHOR)
            if name in layout.datasets(config)}
  del workdir
  version = 1 if config.embedder.source in FITTED else 2  # of a checkpoint: what it says of its model
  return Product('embedder/embedder', layout.pick(config, keys), inputs, version)


def run(config: ConfigDict, workdir: str) -> None:
  wanted = product(config, workdir)
  if products.missing(workdir, [wanted], remake=False, redo='embedder'):
    with products.lock(workdir, wanted.name):
      made, about = _MAKERS[config.embedder.source](config, workdir, wanted)
      files.write_json(os.path.join(workdir, 'embedder/embedder.json'), about)
      products.finish(workdir, wanted, [*made, 'embedder/embedder.json'], about)
  products.write_manifest(workdir, 'embedder', [wanted])


def load(config: ConfigDict, workdir: str) -> Embedder:
  """Opens the embedder of a work directory; one of source 'files' embeds no image, so it is never opened."""
  source = config.embedder.source
  if source in FITTED:
    from clip_jax.models import embedders
    params = files.read_npz(os.path.join(workdir, 'embedder/embedder.npz'))
    apply = embedders.EMBEDDERS[source][1]
    return Embedder(config.embedder.image_size, config.preprocess.resize, lambda images: apply(params, images))
  model = _clip(config, workdir)
  return Embedder(model.image_size, model.resize, model.encode_image)


def text_tower(config: ConfigDict, workdir: str) -> Callable[[Sequence[str]], Array]:
  """Returns the function texts -> [n, E] float32, unit length, of an embedder that is a CLIP ('train', 'weights')."""
  return _clip(config, workdir).encode_text


def _clip(config: ConfigDict, workdir: str):
  from clip_jax.stages import models
  if config.embedder.source == 'weights':
    return models.open_model(models.read(weights_path(config), config.embedder.name, _name_flag(workdir)))
  return models.load(os.path.join(workdir, 'embedder'))


def _name_flag(workdir: str = '') -> str:
  """Returns with what a user says which model the weights hold; of a further embedder, its work directory's."""
  name = products.embedder_of(workdir)
  return f'--config.embedders.{name}.name' if name else '--config.embedder.name'


def architecture(config: ConfigDict) -> Any:
  """Returns the CLIPConfig of an embedder that is a CLIP ('train', 'weights')."""
  from clip_jax.stages import models
  if config.embedder.source == 'train':
    return models.architecture(config)
  return models.weights_architecture(weights_path(config), config.embedder.name, _name_flag())


def weights_path(config: ConfigDict) -> str:
  return os.path.abspath(os.path.expanduser(config.embedder.path))


def weights_content(path: str) -> dict[str, str]:
  """Returns the sha256 of a file of weights, and of the files beside it that it is read with."""
  from clip_jax.stages import models
  parts = {CONTENT: path}
  if path.endswith('.index.json'):
    from clip_jax.models import weights
    parts |= {f'the shard {shard}': os.path.join(os.path.dirname(path), shard)
              for shard in weights.shards(path).values()}
  parts |= {f'{name} beside it': os.path.join(os.path.dirname(path), name) for name in models.BESIDE}
  found = {}
  for name, part in parts.items():
    if os.path.exists(part):
      stat = os.stat(part)
      found[name] = _sha256(part, stat.st_size, stat.st_mtime_ns)
  return found


@functools.lru_cache(maxsize=None)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
  """Weights may be gigabytes: hashed once a process, as long as size and time stay."""
  del size, mtime_ns
  return files.sha256(path)


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
      base, rows, batch_size=e.batch_size, image_size=e.image_size, mode=config.preprocess.resize,
        threads=config.train.loader_threads, processes=config.train.loader_processes)]
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
  logging.info('embedder%s: %s, fitted on %s images of the base set.', layout.whose(workdir), e.source,
               f'{len(images):,}')
  return ['embedder/embedder.npz'], about


def _train(config: ConfigDict, workdir: str, wanted: Product):
  """Trains a CLIP on all usable pool rows and the anchor, with its own seed."""
  from clip_jax.stages import train
  base = base_source(config, workdir)
  result, _ = train.fit(config, workdir, 'embedder', base, base, seed=config.embedder.seed,
                        samples=config.embedder.samples, wanted=wanted)
  about = {'source': 'train', 'samples': config.embedder.samples, 'seed': config.embedder.seed,
           'of_base_rows': len(base), 'sha256': result.digest}
  return ['embedder/checkpoints', 'embedder/config.json', 'embedder/metrics.jsonl'], json.loads(json.dumps(about))


def _weights(config: ConfigDict, workdir: str, wanted: Product):
  """Opens the weights once, so that what is wrong with them is said here."""
  from clip_jax.stages import models
  path = weights_path(config)
  found = models.read(path, config.embedder.name, _name_flag(workdir))
  about = {'source': 'weights', 'name': config.embedder.name, 'file': os.path.basename(path),
           'sha256': wanted.inputs[CONTENT], 'image_size': found.config.image_size,
           'embed_dim': found.config.embed_dim, **found.preprocess}
  return [], json.loads(json.dumps(about))


def _files(config: ConfigDict, workdir: str, wanted: Product):
  """Writes down that the vectors are others'."""
  del config, workdir, wanted
  return [], {'source': FILES}


_MAKERS = {'pca': _fit, 'hog': _fit, 'train': _train, 'weights': _weights, FILES: _files}
