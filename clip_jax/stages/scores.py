"""Scores one model on one benchmark: for the stage evaluate, the command evaluate and training."""

from collections.abc import Iterator, Sequence
import os

from absl import logging
import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array, Config
from clip_jax.data import loader
from clip_jax.evaluation import class_sets, statistics, zero_shot
from clip_jax.experiment import blocks, scorings, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check_keys, classifiers, few_shot, models, retrieval


def cache_folder(x: Experiment, output: str = '') -> str:
  """Returns the folder of cached classifiers: in the output, else in cache_dir, else ''."""
  place = output or x.config.cache_dir
  if not place or not files.is_local(place):
    return ''
  return os.path.join(os.path.abspath(os.path.expanduser(place)), 'classifiers')


def score(
  x: Experiment, benchmark: str, model: models.Model, cache: str = ''
) -> tuple[dict, dict[str, Array]]:
  """Returns the scores of one model on one benchmark, and its predictions for every image.

  A retrieval benchmark has recalls and hits instead (retrieval.py). cache: folder of zero-shot
  classifiers (classifiers.py); '': they stay in memory. A further scoring (experiment/scorings.py)
  has the arrays NAME_counts, NAME_prediction and NAME_correct [n].
  """
  block = x.config.benchmarks[benchmark]
  if blocks.is_retrieval(block):
    vectors, ok = image_vectors(x, benchmark, model)
    result, arrays = retrieval.score(x, benchmark, model, vectors, ok, cache)
    result['warnings'] += _count_warning(block, result['n'])
    return result, arrays
  classes, source = workdir.class_names(x, benchmark), workdir.source(x, benchmark)
  label = np.asarray(source.labels, np.int32)  # [n]
  check_labels(benchmark, label, classes, block)
  groups = workdir.groups(x, benchmark)
  templates = tuple(block.templates)
  vectors, ok = image_vectors(x, benchmark, model)
  mask = may_be_predicted(block, classes)
  matrix = classifiers.class_vectors(x, model, classes, templates, cache)
  top5 = zero_shot.predict(vectors, matrix, mask, usable=ok)
  kept = len(classes) if mask is None else int(mask.sum())
  result, correct, per_class = _numbers(label, top5, len(classes), kept, groups)
  result |= {
    'scoring': _in_words(block, classes),
    'per_class': [statistics.number(value) for value in per_class],
    'unreadable': int((~ok).sum()),
    'templates': list(templates),
    'warnings': _count_warning(block, len(label)),
    'scorings': {},
  }
  arrays = {
    'key': workdir.keys(x, benchmark),
    'label': label,
    'prediction': top5[:, 0].astype(np.int32),
    'top5': top5.astype(np.int32),
    'correct': correct,
  }
  if block.few_shot:
    allowed = np.arange(len(classes)) if mask is None else np.flatnonzero(mask)
    encode_rows = lambda dataset, rows: image_vectors(x, dataset, model, rows)
    result['few_shot'], more, warnings = few_shot.score(
      x, benchmark, model, encode_rows, label, vectors, ok, allowed
    )
    arrays |= more
    for warning in warnings:
      logging.warning('%s: %s.', benchmark, warning)
    result['warnings'] += warnings
  for name, further in _scorings(x.config, benchmark, classes).items():
    names = class_sets.by_name(further.classes).names if further.classes else classes
    matrix = classifiers.class_vectors(x, model, names, templates, cache)
    scores, parts = _further(further, vectors, ok, matrix, label, groups)
    if scores is None:
      warning = f'no image has a class of the scoring {name}'
      logging.warning('%s: %s.', benchmark, warning)
      result['warnings'].append(warning)
      continue
    result['scorings'][name] = {**scores, 'scoring': further.words}
    arrays |= {f'{name}_{key}': part for key, part in parts.items()}
  return result, arrays


def _scorings(
  config: Config, benchmark: str, classes: Sequence[str]
) -> dict[str, class_sets.Scoring]:
  """Returns the further scorings of a benchmark, those for the report's x axes included."""
  class_set = config.benchmarks[benchmark].class_set
  found = {name: class_sets.scoring(class_set, name) for name in scorings.named(config, benchmark)}
  for name, kept in scorings.subsets(config, benchmark).items():
    if set(kept) < set(classes):
      words = f'images of {len(kept):,} of the {len(classes):,} classes, among these'
      found[name] = class_sets.among(classes, kept, words)
  return found


def _further(
  further: class_sets.Scoring,
  vectors: Array,  # [n, E]
  ok: Array,  # [n] bool
  matrix: Array,  # [C, E]
  label: Array,  # [n] int32
  groups: Array | None,  # [n]
) -> tuple[dict | None, dict[str, Array]]:
  """Returns the numbers of a further scoring and its arrays [n]; None if no image counts."""
  meaning = np.asarray(further.meaning)  # [C]
  truth = meaning[label] if further.translates_labels else label  # [n]
  rows = np.flatnonzero(truth >= 0)
  if not len(rows):
    return None, {}
  if further.is_masked:
    top5 = zero_shot.predict(vectors[rows], matrix, meaning >= 0, ok[rows], meaning)
  else:
    classes = zero_shot.predict(vectors[rows], matrix, usable=ok[rows])
    top5 = np.where(classes >= 0, meaning[classes], -1).astype(np.int32)
  kept = int((meaning >= 0).sum()) if further.is_masked else len(meaning)
  numbers, correct, _ = _numbers(
    truth[rows], top5, int(meaning.max()) + 1, kept, None if groups is None else groups[rows]
  )
  counts, prediction, right = (truth >= 0), np.full(len(label), -1, np.int32), np.zeros(len(label))
  prediction[rows], right[rows] = top5[:, 0], correct
  return numbers, {'counts': counts, 'prediction': prediction, 'correct': right.astype(bool)}


def _numbers(
  label: Array,  # [n] int
  top5: Array,  # [n, k] int32
  classes: int,  # number of labels
  kept: int,  # classes that may be predicted
  groups: Array | None,  # [n]
) -> tuple[dict, Array, Array]:
  """Returns the accuracies with intervals, is-correct bool [n] and the accuracy of each class."""
  scores = zero_shot.score(label, top5, classes)
  correct = top5[:, 0] == label
  interval = statistics.image_interval(correct, groups)
  balanced = statistics.balanced_accuracy(correct[None], label, groups)
  numbers = {
    'top1': scores['top1'],
    'top1_low': interval.low,
    'top1_high': interval.high,
    'top5': scores['top5'],
    'mean_per_class': scores['mean_per_class'],
    'mean_per_class_low': balanced.low,
    'mean_per_class_high': balanced.high,
    'df': interval.df,
  }
  result = {
    'n': len(label),
    'classes': kept,
    **{key: statistics.number(numbers[key]) for key in numbers},
  }
  result |= {'interval': interval.method, 'groups': interval.groups}
  return result, correct, scores['per_class']


def may_be_predicted(block: Config, classes: Sequence[str]) -> Array | None:  # [C] bool
  """Returns which classes may be predicted on a benchmark, None for all."""
  found = blocks.class_set(block)
  if found:
    return np.isin(np.arange(len(classes)), found.labels)
  return np.isin(classes, list(block.class_mask)) if block.class_mask else None


def _in_words(block: Config, classes: Sequence[str]) -> str:
  found = blocks.class_set(block)
  if found:
    return found.scoring
  return f'{len(block.class_mask) or len(classes):,} classes' + (
    f', by a mask of {len(classes):,}' if block.class_mask else ''
  )


def _count_warning(block: Config, rows: int) -> list[str]:
  """Returns a warning for another number of images than the published one, [] if it is right."""
  if block.expected_rows in (0, rows):
    return []
  return [f'{rows:,} rows, but the published dataset has {block.expected_rows:,}']


def image_vectors(
  x: Experiment,
  dataset: str,
  model: models.Model,
  rows: Array | None = None,  # [n] int64, sorted; None: all
) -> tuple[Array, Array]:
  """Returns the embeddings [n, E] float32 of images, and whether each is readable [n] bool.

  The decoded images of whole benchmarks are kept for the next model, if those of all benchmarks fit
  in train.cache_mb.
  """
  pixels = 3 * model.image_size**2
  sources = [
    workdir.source(x, name) for name in x.config.benchmarks if workdir.is_ingested(x, name)
  ]
  size = pixels * sum(map(len, sources))
  batches = _image_batches(x, dataset, model, rows)
  if rows is None and size <= x.config.train.cache_mb * 1e6:
    name = f'images {dataset}, {model.image_size} pixels, {model.resize}'
    batches = x.cached(name, lambda: list(_image_batches(x, dataset, model)))
  vectors, ok = [], []
  for images, readable in batches:
    vectors.append(encode(model, images, x.config.evaluate.batch_size))
    ok.append(readable)
  return np.concatenate(vectors), np.concatenate(ok)


def _image_batches(
  x: Experiment, dataset: str, model: models.Model, rows: Array | None = None
) -> Iterator[tuple[Array, Array]]:
  """Yields preprocessed images of a dataset, uint8 [b, S, S, 3], and is-readable bool [b]."""
  source, train = workdir.source(x, dataset), x.config.train
  for _, images, ok in loader.image_batches(
    source,
    np.arange(len(source)) if rows is None else rows,
    batch_size=x.config.evaluate.batch_size,
    image_size=model.image_size,
    mode=model.resize,
    threads=train.loader_threads,
    processes=train.loader_processes,
  ):
    yield images, ok


def encode(model: models.Model, pixels: Array, batch_size: int) -> Array:
  """Returns the embeddings [b, E] of a batch, padded to batch_size: one shape is compiled."""
  padding = np.zeros((batch_size - len(pixels), *pixels.shape[1:]), pixels.dtype)
  return model.encode_image(np.concatenate([pixels, padding]))[: len(pixels)]


def check_labels(benchmark: str, label: Array, classes: Sequence[str], block: Config) -> None:
  """Raises an error for a benchmark without class names, with unlabelled images or one class.

  block: its config; without class names in it, those of the source must not be codes.
  """
  if not classes:
    raise ConfigError(
      f'config.benchmarks.{benchmark}.classes is missing: zero-shot needs the class names, in '
      'label order.'
    )
  check_keys.prompt_names(
    f'config.benchmarks.{benchmark}.classes', classes, blocks.given_classes(block)
  )
  mask = may_be_predicted(block, classes)
  allowed = np.arange(len(classes)) if mask is None or block.class_mask else np.flatnonzero(mask)
  is_bad = ~np.isin(label, allowed)
  if is_bad.any():
    raise InputError(
      f'{int(is_bad.sum()):,} of {len(label):,} images of the benchmark {benchmark} have no label '
      f'in its {len(allowed)} classes. Check label_key, classes and where.'
    )
  if len(np.unique(label)) < 2:
    raise InputError(
      f'All images of the benchmark {benchmark} have one class ({classes[label[0]]!r}), so its '
      'accuracy has no meaning. Give images of other classes, too.'
    )
