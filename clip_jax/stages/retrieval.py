"""Image-text retrieval of one model on one benchmark, for stages/evaluate.py.

In: a model, the image vectors of a benchmark and its captions: the lines of each row's caption.
Out: six recalls with intervals, and the hits of every image.
"""

from collections.abc import Mapping, Sequence

from absl import logging
import numpy as np

from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import row_rules
from clip_jax.data.reader import Source
from clip_jax.evaluation import retrieval, statistics
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import classifiers, models

NAMED = 3  # images that a warning names


def score(
  x: Experiment,
  benchmark: str,
  model: models.Model,
  vectors: Array,  # [n, E]
  readable: Array,  # [n] bool
  cache: str,
) -> tuple[dict, dict[str, Array]]:
  """Returns the recalls of one model on one benchmark, and the hits of every image.

  An unreadable image, an image without a caption and an empty caption count as wrong: an image
  without a caption has one empty caption. Equal captions are encoded once, so that they tie
  exactly.
  """
  source, groups = workdir.source(x, benchmark), workdir.groups(x, benchmark)
  check_captions(benchmark, source)
  texts = [_captions(source, row) for row in range(len(source))]
  candidates = int(readable.sum())
  if candidates < 2:
    raise InputError(
      f'Only {candidates} of the {len(texts):,} images of the benchmark {benchmark} can be read, '
      'so retrieval cannot be scored.'
    )
  owner = np.repeat(np.arange(len(texts)), [len(lines) for lines in texts])  # [m]
  captions = [line for lines in texts for line in lines]
  has_text = np.array([bool(line) for line in captions])  # [m]
  encoded = _encode(model, captions, cache)
  ranks = retrieval.ranks(vectors, encoded, owner, readable, has_text)
  of_image, of_caption = (retrieval.hits(rank, candidates) for rank in (ranks.image, ranks.caption))
  group = statistics.group_index(groups, len(texts))  # [n]
  recalls = _recalls(of_image, of_caption, group, owner)
  first, per_image = recalls[retrieval.HEADLINE], np.bincount(owner)
  result = {
    'n': len(texts),
    'captions': len(captions),
    'top1': first['value'],
    'top1_low': first['low'],
    'top1_high': first['high'],
    'df': first['df'],
    'interval': first['interval'],
    'groups': int(group.max()) + 1,
    'scoring': f'{retrieval.HEADLINE}; ties count as wrong',
    'recalls': recalls,
    'unreadable': int((~readable).sum()),
    'empty_captions': int((~has_text).sum()),
    'warnings': _warnings(x, benchmark, texts, vectors[readable]),
    'scorings': {},
  }
  for warning in result['warnings']:
    logging.warning('%s: %s.', benchmark, warning)
  return result, {
    'key': workdir.keys(x, benchmark),
    'label': np.zeros(len(texts), np.int32),  # no classes: all images are of one
    'correct': of_image[1],
    'captions': per_image.astype(np.int32),
    'k': np.array(list(of_image), np.int32),
    'image_to_text': np.stack(list(of_image.values()), axis=1),  # [n, K] bool
    'text_to_image': np.stack(
      [np.bincount(owner, hit) / per_image for hit in of_caption.values()], axis=1
    ),  # [n, K] float64: the mean over the captions of an image
  }


def _encode(model: models.Model, captions: Sequence[str], cache: str) -> Array:  # [m, E] float32
  """Returns the vectors of captions, zeros for an empty one; each text is encoded once."""
  number = {text: i for i, text in enumerate(dict.fromkeys(filter(None, captions)))}
  vectors = classifiers.text_vectors(model, list(number), ('{}',), cache)
  padded = np.concatenate([vectors, np.zeros_like(vectors[:1])])
  return padded[[number.get(text, len(vectors)) for text in captions]]


def _recalls(
  of_image: Mapping[int, Array],  # k -> [n] bool
  of_caption: Mapping[int, Array],  # k -> [m] bool
  group: Array,  # [n] int
  owner: Array,  # [m] int, the image of each caption
) -> dict[str, dict]:
  """Returns name -> recall with its interval.

  Image-to-text intervals are over images, text-to-image intervals over captions; the captions of
  one image, or of one group of images, are one unit.
  """
  recalls = {}
  for direction, of_k, units in zip(
    retrieval.DIRECTIONS, (of_image, of_caption), (group, group[owner])
  ):
    for k, hit in of_k.items():
      interval = statistics.image_interval(hit, units)
      numbers = {key: getattr(interval, key) for key in ('value', 'low', 'high', 'df')}
      recalls[f'{direction} recall@{k}'] = {
        **{key: statistics.number(value) for key, value in numbers.items()},
        'interval': interval.method,
      }
  return recalls


def check_captions(benchmark: str, source: Source) -> None:
  """Raises InputError for a benchmark without captions, or with a single image."""
  if not source.caption_lengths.any():
    raise InputError(
      f'No image of the benchmark {benchmark} has a caption, so retrieval cannot be scored. Give '
      f'config.benchmarks.{benchmark}.captions, a file of captions (folders), or caption_key.'
    )
  if len(source) < 2:
    raise InputError(
      f'The benchmark {benchmark} has one image only, so every retrieval would be right. Give more.'
    )


def _captions(source: Source, row: int) -> list[str]:
  """Returns the captions of an image; '' for one without a character; [''] if there are none."""
  return [line.strip(row_rules.NO_TEXT) for line in source.caption(row).split('\n')]


def _warnings(
  x: Experiment,
  benchmark: str,
  texts: Sequence[Sequence[str]],  # n lists of captions
  vectors: Array,  # [candidates, E], of the readable images
) -> list[str]:
  """Returns what was counted as wrong, skipped or left out, in sentences."""
  key = lambda row: workdir.source(x, benchmark).key(row)
  without = [row for row, lines in enumerate(texts) if not any(lines)]
  partly = [row for row, lines in enumerate(texts) if any(lines) and not all(lines)]
  skipped = [sample['key'] for sample in workdir.skipped_samples(x, benchmark)]
  counted = [
    (list(map(key, without[:NAMED])), len(without), 'image', 'without a caption: wrong'),
    (list(map(key, partly[:NAMED])), len(partly), 'image', 'with an empty caption, which is wrong'),
    (skipped[:NAMED], len(skipped), 'sample', 'skipped, so not in the score'),
  ]
  warnings = [
    f'{progress.count_with_noun(count, noun)} {what} ({", ".join(names)}'
    f'{", ..." if count > NAMED else ""})'
    for names, count, noun, what in counted
    if count
  ]
  copies = len(vectors) - len({vector.tobytes() for vector in vectors})
  if copies:
    warnings.append(
      f'{progress.count_with_noun(copies, "image")} with the vector of another image, so that '
      'their captions tie: wrong at k = 1 (does the dataset have one row a caption?)'
    )
  large = [k for k in retrieval.KS if k >= len(vectors)]
  if large:
    warnings.append(
      f'no recall@{" and @".join(map(str, large))}: with {len(vectors)} readable images nearly '
      'every item would be a hit'
    )
  return warnings
