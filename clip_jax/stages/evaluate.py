"""Stage evaluate: classifies every benchmark zero-shot with every trained model.

In: checkpoints, ingested benchmarks.
Out: WORKDIR/evaluate/<split>/seed<k>/<benchmark>.json (scores) and <benchmark>.npz (key,
label, prediction, top5 and correct of every image, in index order).
"""

import math

from absl import logging
import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import loader
from clip_jax.evaluation import statistics, zero_shot
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check_keys, models


def evaluate(x: Experiment, todo: list[Product]) -> Made:
  """Evaluates one run on its missing benchmarks."""
  split, seed, _ = todo[0].subject
  folder = workdir.run_folder(split, seed)
  model = models.load(x.path(folder))
  for product in progress.track(
    todo, total=len(todo), desc=f'evaluate {split}/seed{seed}', unit='result'
  ):
    result, arrays = score(x, product.subject[2], model)
    result['checkpoint'] = f'{folder}/checkpoints, step {model.step}'
    files.write_npz(x.path(product.name + '.npz'), **arrays)
    files.write_json(x.path(product.name + '.json'), result)
    yield (
      product,
      [product.name + '.json', product.name + '.npz'],
      {'n': result['n'], 'top1': result['top1'], 'unreadable': result['unreadable']},
    )


def summarize(x: Experiment, new_products: list[Product]) -> None:
  """Logs the number of new results."""
  del x
  logging.info(
    'evaluate: %s of %s on %s.',
    progress.count_with_noun(len(new_products), 'result'),
    progress.count_with_noun(len({product.subject[:2] for product in new_products}), 'model'),
    progress.count_with_noun(len({product.subject[2] for product in new_products}), 'benchmark'),
  )


def score(x: Experiment, benchmark: str, model: models.Model) -> tuple[dict, dict[str, Array]]:
  """Returns the scores of one model on one benchmark, and its predictions for every image."""
  block, classes = x.config.benchmarks[benchmark], workdir.class_names(x, benchmark)
  source = workdir.source(x, benchmark)
  label = np.asarray(source.labels, np.int32)  # [n]
  check_labels(benchmark, label, classes, block.classes)
  matrix = zero_shot.class_matrix(model.encode_text, classes, tuple(block.templates))
  mask = np.isin(classes, list(block.class_mask)) if block.class_mask else None
  pixels, ok = x.cached(
    f'images {benchmark}, {model.image_size} pixels, {model.resize}',
    lambda: read_images(x, benchmark, model),
  )
  vectors = encode(model, pixels, x.config.evaluate.batch_size)
  top5 = zero_shot.predict(vectors, matrix, mask, usable=ok)
  scores = zero_shot.score(label, top5, len(classes))
  prediction = top5[:, 0].astype(np.int32)
  correct = prediction == label
  interval = statistics.image_interval(correct, workdir.groups(x, benchmark))
  numbers = {
    'top1': scores['top1'],
    'top1_low': interval.low,
    'top1_high': interval.high,
    'top5': scores['top5'],
    'mean_per_class': scores['mean_per_class'],
    'df': interval.df,
  }
  result = {
    'n': len(label),
    'classes': len(classes),
    **{key: number(value) for key, value in numbers.items()},
    'interval': interval.method,
    'groups': interval.groups,
    'per_class': [number(value) for value in scores['per_class']],
    'unreadable': int((~ok).sum()),
    'templates': list(block.templates),
  }
  return result, {
    'key': workdir.keys(x, benchmark),
    'label': label,
    'prediction': prediction,
    'top5': top5.astype(np.int32),
    'correct': correct,
  }


def read_images(x: Experiment, benchmark: str, model: models.Model) -> tuple[Array, Array]:
  """Returns a benchmark's preprocessed images uint8 [n, S, S, 3] and is-readable bool [n]."""
  source, train = workdir.source(x, benchmark), x.config.train
  parts = [
    (images, ok)
    for _, images, ok in loader.image_batches(
      source,
      np.arange(len(source)),
      batch_size=x.config.evaluate.batch_size,
      image_size=model.image_size,
      mode=model.resize,
      threads=train.loader_threads,
      processes=train.loader_processes,
    )
  ]
  return np.concatenate([images for images, _ in parts]), np.concatenate([ok for _, ok in parts])


def number(value: float) -> float | None:
  """Returns a number for JSON, None for NaN or infinity.

  A class without images has no accuracy, a single group no interval, and Wilson's interval has no
  degrees of freedom.
  """
  return float(value) if math.isfinite(value) else None


def encode(model: models.Model, pixels: Array, batch_size: int) -> Array:
  """Returns the image embeddings [n, E]; the last batch is padded to compile only one shape."""
  parts = []
  for start in range(0, len(pixels), batch_size):
    batch = pixels[start : start + batch_size]
    padded = np.concatenate(
      [batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)]
    )
    parts.append(model.encode_image(padded)[: len(batch)])
  return np.concatenate(parts)


def check_benchmarks(x: Experiment) -> None:
  """Raises an error, before any training, for a benchmark that cannot be scored."""
  for name in x.config.benchmarks:
    check_labels(
      name,
      np.asarray(workdir.source(x, name).labels),
      workdir.class_names(x, name),
      x.config.benchmarks[name].classes,
    )


def check_labels(benchmark: str, label: Array, classes, given) -> None:
  """Raises an error for a benchmark without class names, with unlabelled images or one class.

  given: the class names in the config; without any, those of the source must not be codes.
  """
  if not classes:
    raise ConfigError(
      f'config.benchmarks.{benchmark}.classes is missing: zero-shot needs the class names, in '
      'label order.'
    )
  check_keys.prompt_names(f'config.benchmarks.{benchmark}.classes', classes, given)
  if (label < 0).any() or (label >= len(classes)).any():
    bad = int(((label < 0) | (label >= len(classes))).sum())
    raise InputError(
      f'{bad:,} of {len(label):,} images of the benchmark {benchmark} have no label in its '
      f'{len(classes)} classes. Check label_key, classes and where.'
    )
  if len(np.unique(label)) < 2:
    raise InputError(
      f'All images of the benchmark {benchmark} have one class ({classes[label[0]]!r}), so its '
      'accuracy has no meaning. Give images of other classes, too.'
    )


MAKERS = {'result': evaluate}
