"""Stage evaluate: zero-shot classification of every benchmark by every trained model.

In: checkpoints, ingested benchmarks. Out: WORKDIR/evaluate/<split>/seed<k>/<benchmark>.json (scores)
and <benchmark>.npz (label, prediction, top5 and correct of every image, in index order).
"""

import math
import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import ConfigError
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.stages import ingest
from clip_jax.stages import layout
from clip_jax.stages import train


def product(config: ConfigDict, workdir: str, split: str, seed: int, benchmark: str, run_: Product) -> Product:
  block = config.benchmarks[benchmark]
  keys = {'preprocess.resize': config.preprocess.resize,
          **{f'benchmarks.{benchmark}.{key}': layout.plain(block[key])
             for key in ('classes', 'templates', 'class_mask')}}
  whole = ingest.index_product(benchmark, ingest.shard_products(config, workdir, benchmark))
  return Product(f'evaluate/{split}/seed{seed}/{benchmark}', keys,
                 {run_.name: run_.fingerprint, whole.name: whole.fingerprint})


def all_products(config: ConfigDict, workdir: str) -> list[tuple[str, int, str, Product]]:
  runs = train.all_products(config, workdir)
  return [(split, seed, benchmark, product(config, workdir, split, seed, benchmark, made))
          for (split, seed), made in runs.items() for benchmark in config.benchmarks]


def run(config: ConfigDict, workdir: str) -> None:
  every = all_products(config, workdir)
  wanted = products.missing(workdir, [made for *_, made in every], remake=True, redo='evaluate')
  runs = train.all_products(config, workdir)
  todo: dict[tuple[str, int], list[tuple[str, Product]]] = {}
  untrained = set()
  for split, seed, benchmark, made in every:
    if made in wanted:
      if products.status(workdir, runs[split, seed]) != 'fits':
        untrained.add(f'{split}/seed{seed}')
        continue
      todo.setdefault((split, seed), []).append((benchmark, made))
  if untrained:
    logging.info('evaluate: %d runs are not trained yet and are left out: %s.', len(untrained),
                 ', '.join(sorted(untrained)))
  images = {}
  total = sum(len(jobs) for jobs in todo.values())
  with progress.Bar(total=total, desc='evaluate', unit='result') as bar:
    for (split, seed), jobs in todo.items():
      _evaluate_run(config, workdir, split, seed, jobs, images, bar)
  products.write_manifest(workdir, 'evaluate', [made for *_, made in every])
  if total:
    logging.info('evaluate: %d results, %d models on %d benchmarks.', total, len(todo), len(config.benchmarks))


def _evaluate_run(config: ConfigDict, workdir: str, split: str, seed: int, jobs, images: dict, bar) -> None:
  from clip_jax.stages import models
  folder = layout.run_folder(split, seed)
  model = models.load(os.path.join(workdir, folder))
  for benchmark, made in jobs:
    key = (benchmark, model.image_size)
    if key not in images:
      images[key] = read_benchmark(config, workdir, benchmark, model.image_size, config.preprocess.resize)
    with products.lock(workdir, made.name):
      result, arrays = score(config, workdir, benchmark, model, images[key])
      result['checkpoint'] = f'{folder}/checkpoints, step {model.step}'
      files.write_npz(os.path.join(workdir, made.name + '.npz'), **arrays)
      files.write_json(os.path.join(workdir, made.name + '.json'), result)
      products.finish(workdir, made, [made.name + '.json', made.name + '.npz'],
                      {'n': result['n'], 'top1': result['top1'], 'unreadable': result['unreadable']})
    bar.update()


def read_benchmark(config: ConfigDict, workdir: str, benchmark: str, image_size: int,
                   resize: str) -> tuple[Array, Array]:
  """Returns a benchmark's preprocessed images uint8 [n, S, S, 3] and which could be read, bool [n]."""
  from clip_jax.data import loader
  source = layout.source(workdir, benchmark)
  parts = [(images, ok) for _, images, ok in loader.image_batches(
      source, np.arange(len(source)), batch_size=config.evaluate.batch_size, image_size=image_size,
      mode=resize, threads=config.train.loader_threads, processes=config.train.loader_processes)]
  return np.concatenate([images for images, _ in parts]), np.concatenate([ok for _, ok in parts])


def score(config: ConfigDict, workdir: str, benchmark: str, model,
          images: tuple[Array, Array]) -> tuple[dict, dict[str, Array]]:
  """Returns the scores of one model on one benchmark, and its answer for every image."""
  from clip_jax.evaluation import statistics
  from clip_jax.evaluation import zero_shot
  block = config.benchmarks[benchmark]
  classes = layout.class_names(config, workdir, benchmark)
  label = np.asarray(layout.source(workdir, benchmark).labels, np.int32)  # [n]
  check_labels(benchmark, label, classes)
  matrix = zero_shot.class_matrix(model.encode_text, classes, tuple(block.templates))
  mask = np.isin(classes, list(block.class_mask)) if block.class_mask else None
  pixels, ok = images
  vectors = encode(model, pixels, config.evaluate.batch_size)
  top5 = zero_shot.predict(vectors, matrix, mask, usable=ok)
  found = zero_shot.score(label, top5, len(classes))
  prediction = top5[:, 0].astype(np.int32)
  correct = prediction == label
  groups = layout.source(workdir, benchmark).column('group') if block.group_key else None
  interval = statistics.image_interval(correct, groups)
  numbers = {'top1': found['top1'], 'top1_low': interval.low, 'top1_high': interval.high, 'top5': found['top5'],
             'mean_per_class': found['mean_per_class']}
  result = {'n': len(label), 'classes': len(classes), **{key: number(value) for key, value in numbers.items()},
            'interval': interval.method, 'per_class': [number(value) for value in found['per_class']],
            'unreadable': int((~ok).sum()), 'templates': list(block.templates)}
  return result, {'label': label, 'prediction': prediction, 'top5': top5.astype(np.int32), 'correct': correct}


def number(value: float) -> float | None:
  """Returns a number for JSON: null where it cannot be told (no image of a class, all images in one group)."""
  return None if math.isnan(value) else float(value)


def encode(model, pixels: Array, batch_size: int) -> Array:
  """Returns the image embeddings [n, E]; the last batch is padded, so that one shape is compiled."""
  parts = []
  for start in range(0, len(pixels), batch_size):
    batch = pixels[start:start + batch_size]
    padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)])
    parts.append(model.encode_image(padded)[:len(batch)])
  return np.concatenate(parts)


def check_benchmarks(config: ConfigDict, workdir: str) -> None:
  """Raises an error for a benchmark that cannot be scored, before models are trained for it."""
  for name in config.benchmarks:
    check_labels(name, np.asarray(layout.source(workdir, name).labels), layout.class_names(config, workdir, name))


def check_labels(benchmark: str, label: Array, classes) -> None:
  """Raises an error where zero-shot accuracy would mean nothing: no labels, no names, one class."""
  if not classes:
    raise ConfigError(f'config.benchmarks.{benchmark}.classes is not given: zero-shot needs the class names, in '
                      'label order.')
  if (label < 0).any() or (label >= len(classes)).any():
    bad = int(((label < 0) | (label >= len(classes))).sum())
    raise InputError(f'{bad} of {len(label)} images of the benchmark {benchmark} have no label among its '
                     f'{len(classes)} classes. Check label_key, classes and where.')
  if len(np.unique(label)) < 2:
    raise InputError(f'All images of the benchmark {benchmark} are of one class ({classes[label[0]]!r}): there is '
                     'nothing to tell apart.')
