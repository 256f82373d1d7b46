"""The few-shot probe of one model on one benchmark, for stages/evaluate.py.

In: a training set of the config (benchmarks.NAME.few_shot) and the benchmark's image vectors.
Out: the accuracy by the number of training images a class, over three draws of them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.evaluation import few_shot, statistics
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import models

Encode = Callable[[str, Array], tuple[Array, Array]]  # dataset, rows -> [n, E], is-readable [n]


def score(
  x: Experiment,
  benchmark: str,
  model: models.Model,
  encode: Encode,
  label: Array,  # [n] int32, of the benchmark
  vectors: Array,  # [n, E]
  readable: Array,  # [n] bool
  allowed: Array,  # [c] int, labels that may be predicted: the classes of the probe
) -> tuple[dict[str, dict], dict[str, Array], list[str]]:
  """Returns the accuracies by shots, the correctness for each draw, and warnings.

  A number of shots that a class does not have is left out. Unreadable training images are not
  replaced; unreadable test images count as wrong. Intervals are over draws and images.
  """
  train, groups = x.config.benchmarks[benchmark].few_shot, workdir.groups(x, benchmark)
  check_classes(x, benchmark)
  names, train_label = workdir.class_names(x, benchmark), workdir.source(x, train).labels
  shots, warnings = _possible(train, train_label, allowed, names)
  if not shots:
    return {}, {}, warnings
  draws = [few_shot.draw(train_label, allowed, shots[-1], seed) for seed in few_shot.SEEDS]
  rows = np.unique(np.stack(draws))
  features, is_readable = _features(x, model, encode, train, rows)
  if not is_readable.all():
    count = progress.count_with_noun(int((~is_readable).sum()), 'training image')
    warnings.append(
      f'{count} of {len(rows):,} of the few-shot probe cannot be read and do not count'
    )
  results, correct = {}, []
  for count in shots:
    right = []
    for drawn in draws:
      place = np.searchsorted(rows, drawn[:, :count].ravel())
      target = np.repeat(np.arange(len(allowed)), count)[is_readable[place]]
      predicted = few_shot.predict(
        features[place[is_readable[place]]], target, vectors, len(allowed)
      )
      right.append((allowed[predicted] == label) & readable)
    correct.append(np.stack(right))
    results[str(count)] = _numbers(correct[-1], label, groups) | {
      'training_set': train,
      'training_images': len(allowed) * count,
    }
  return (
    results,
    {'few_shot_shots': np.array(shots), 'few_shot_correct': np.stack(correct)},
    warnings,
  )


def check_classes(x: Experiment, benchmark: str) -> None:
  """Raises InputError if the training set of a probe has other classes than the benchmark."""
  train = x.config.benchmarks[benchmark].few_shot
  own, other = workdir.class_names(x, benchmark), workdir.class_names(x, train)
  if len(own) != len(other) or own != other and set(own) == set(other):
    raise InputError(
      f'config.benchmarks.{benchmark}.few_shot={train!r}: {train} has {len(other):,} classes '
      f'({", ".join(other[:3])}, ...), and {benchmark} has {len(own):,} ({", ".join(own[:3])}, '
      '...). Give both the same classes in the same order.'
    )


def _possible(
  train: str, label: Array, allowed: Array, names: Sequence[str]
) -> tuple[list[int], list[str]]:
  """Returns the shots that every class has, and a sentence on the others."""
  counts = np.bincount(label[label >= 0], minlength=len(names))[allowed]
  least = int(counts.argmin())
  shots = [count for count in few_shot.SHOTS if count <= counts[least]]
  others = [str(count) for count in few_shot.SHOTS if count not in shots]
  if not others:
    return shots, []
  images = progress.count_with_noun(int(counts[least]), 'image')
  return shots, [
    f'no few-shot probe of {progress.join_names(others)} images a class: {train} has {images} of '
    f'the class {names[allowed[least]]!r}'
  ]


def _features(
  x: Experiment, model: models.Model, encode: Encode, train: str, rows: Array
) -> tuple[Array, Array]:
  """Returns the vectors of training images, which benchmarks of one model share."""
  kept = x.cached('few-shot features', dict)
  if kept.get('model') is not model:
    kept.clear()
    kept['model'] = model
  key = (train, rows.tobytes())
  if key not in kept:
    kept[key] = encode(train, rows)
  return kept[key]


def _numbers(
  correct: Array,  # [S, n] bool
  label: Array,  # [n]
  groups: Array | None,
) -> dict:
  accuracy = statistics.accuracy_interval(correct, groups)
  balanced = statistics.balanced_accuracy(correct, label, groups)
  numbers = {
    'top1': accuracy.value,
    'top1_low': accuracy.low,
    'top1_high': accuracy.high,
    'mean_per_class': balanced.value,
    'mean_per_class_low': balanced.low,
    'mean_per_class_high': balanced.high,
    'df': accuracy.df,
  }
  return {
    'n': correct.shape[1],
    'groups': accuracy.groups,
    'seeds': len(correct),
    **{key: statistics.number(value) for key, value in numbers.items()},
    'interval': accuracy.method,
  }
