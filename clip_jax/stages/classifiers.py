"""Vectors of class names and captions: encoded once for all benchmarks, and cached on disk.

In: a model, class names and templates. Out: class vectors [C, E]; with a cache folder
<folder>/<hash>.npy, the same array. The hash covers the text tower, the names and the templates, so
that a file never goes with another model.
"""

from collections.abc import Sequence
import hashlib
import os

from absl import logging
import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core import files, progress
from clip_jax.core.types import Array
from clip_jax.evaluation import zero_shot
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import models

VERSION = 1  # of the computation; another one makes other hashes
MANY_TEXTS = 10_000  # so many take a minute on a CPU, so they are announced


def class_vectors(
  x: Experiment,
  model: models.Model,
  names: Sequence[str],  # C class names
  templates: Sequence[str],
  folder: str = '',  # of the cache; '': only in memory
) -> Array:  # [C, E] float32
  """Returns the zero-shot classifier of a model, from memory, from the cache, or encoded."""
  digest = _hash(model, names, templates)
  return x.cached(
    f'classifier {digest}', lambda: text_vectors(model, names, templates, folder, digest)
  )


def text_vectors(
  model: models.Model,
  names: Sequence[str],  # C class names, or captions for the template '{}'
  templates: Sequence[str],
  folder: str = '',  # of the cache; '': no cache
  digest: str = '',  # of the arguments, if it is known
) -> Array:  # [C, E] float32, unit norm
  """Returns the mean vectors of names in templates, from the cache or encoded."""
  digest = digest or _hash(model, names, templates)
  path = os.path.join(folder, f'{digest}.npy') if folder else ''
  vectors = _read(path, len(names)) if path else None
  if vectors is not None:
    return vectors
  count = len(names) * len(templates)
  if count >= MANY_TEXTS:
    logging.info(
      'Encoding %s texts: %s names or captions in %s ...',
      f'{count:,}',
      f'{len(names):,}',
      progress.count_with_noun(len(templates), 'template'),
    )
  vectors = zero_shot.class_matrix(model.encode_text, names, templates)
  if path:
    files.write_npy(path, vectors)
  return vectors


def _hash(model: models.Model, names: Sequence[str], templates: Sequence[str]) -> str:
  import jax

  key = [VERSION, model.text_hash(), list(names), list(templates), jax.__version__]
  key.append(jax.default_backend())  # which changes the last bits
  return hashlib.sha256(config_lib.canonical(key).encode()).hexdigest()


def _read(path: str, classes: int) -> Array | None:
  """Returns a cached classifier; None, with a warning if it is damaged, if it must be encoded."""
  if not files.exists(path):
    return None
  try:
    vectors = files.read_npy(path)
  except (OSError, ValueError, EOFError) as error:
    logging.warning('%s cannot be read (%s) and is made again.', path, error)
    return None
  if vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == classes:
    return vectors
  logging.warning('%s holds %s %s and is made again.', path, vectors.dtype, list(vectors.shape))
  return None
