"""Zero-shot classification with OpenAI's protocol: class matrix, predictions, scores.

In: a text encoder as a function, image vectors [n, E]. Out: NumPy arrays and a dict. No files.
"""

from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array
from clip_jax.core.vectors import to_unit_length

ROWS = 4096  # images scored at a time: 32 MB with 1,000 classes


def class_matrix(
  encode_text: Callable[[list[str]], Array],  # n texts -> [n, E] float32, of any length
  classes: Sequence[str],  # C names
  templates: Sequence[str],  # M texts; '{}' takes the class name
  batch_size: int = 8192,  # texts, rounded down to whole classes; the last batch is shorter
) -> np.ndarray:  # [C, E] float32, unit norm
  """Returns CLIP's prompt ensemble: per class, encode templates, normalise, average, normalise."""
  if not classes or not templates:
    raise ConfigError(
      f'zero-shot needs classes and templates: got {len(classes)} classes and '
      f'{len(templates)} templates.'
    )
  for template in templates:
    if '{}' not in template:
      raise ConfigError(f"the template {template!r} has no '{{}}' for the class name; add one.")
  at_once, means = max(1, batch_size // len(templates)), []
  for start in range(0, len(classes), at_once):
    names = classes[start : start + at_once]
    texts = [template.replace('{}', name) for name in names for template in templates]
    encoded = np.asarray(encode_text(texts), np.float64)
    if len(encoded) != len(texts):
      raise ValueError(
        f'encode_text must return one row per text: got shape {encoded.shape} for {len(texts)} '
        'texts'
      )
    unit = to_unit_length(_nonzero(encoded)).reshape(len(names), len(templates), -1)
    means.append(unit.mean(1))
  return to_unit_length(_nonzero(np.concatenate(means))).astype(np.float32)


def predict(
  image: Array,  # [n, E] float32; the norm does not matter
  classes: Array,  # [C, E] float32, the class matrix
  mask: Array | None = None,  # [C] bool: classes that may be predicted
  usable: Array | None = None,  # [n] bool: predictions of other images are -1
  meaning: Array | None = None,  # [C] int, 0 or more where mask: the label that each class means
) -> np.ndarray:  # [n, min(5, C)] int32, best first; ties: the lowest label; -1 after the last
  """Returns the best five labels of each image; the mask applies before the argmax.

  Without `meaning` the label of a class is its index. Classes of one meaning count once, by the
  highest of their scores. Scores are summed in float64 and rounded to float32, so that classes with
  equal names tie exactly and predictions do not depend on the block of an image.
  """
  image, classes = np.asarray(image), np.asarray(classes, np.float64)
  if image.ndim != 2 or classes.ndim != 2 or image.shape[1] != classes.shape[1]:
    raise ValueError(
      f'image [n, E] and classes [C, E] must agree in E: got {image.shape} and {classes.shape}'
    )
  mask = np.ones(len(classes), bool) if mask is None else np.asarray(mask)
  usable = np.ones(len(image), bool) if usable is None else np.asarray(usable)
  meaning = np.arange(len(classes)) if meaning is None else np.asarray(meaning)
  if mask.dtype != bool or mask.shape != classes.shape[:1] or not mask.any():
    raise ValueError(
      f'mask must be bool [{len(classes)}] with at least one class: got {mask.dtype} {mask.shape}'
    )
  if usable.dtype != bool or usable.shape != image.shape[:1]:
    raise ValueError(f'usable must be bool [{len(image)}]: got {usable.dtype} {usable.shape}')
  if meaning.shape != classes.shape[:1] or (meaning[mask] < 0).any():
    raise ValueError(
      f'meaning must be [{len(classes)}], 0 or more for every class of the mask: got shape '
      f'{meaning.shape}'
    )
  allowed = np.flatnonzero(mask)
  allowed = allowed[np.argsort(meaning[allowed], kind='stable')]
  labels, first = np.unique(meaning[allowed], return_index=True)
  best = np.full((len(image), min(5, len(classes))), -1, np.int32)
  for start in range(0, len(image), ROWS):
    block = slice(start, start + ROWS)
    scores = (image[block].astype(np.float64) @ classes[allowed].T).astype(np.float32)
    if np.isnan(scores[usable[block]]).any():
      row = start + int(np.flatnonzero(np.isnan(scores).any(1) & usable[block])[0])
      raise ValueError(f'the vector of image {row} or a class vector holds NaN')
    if len(labels) < len(allowed):
      scores = np.maximum.reduceat(scores, first, axis=1)
    for rank in range(min(best.shape[1], len(labels))):
      top = scores.argmax(1)  # ties: the first
      best[block, rank] = labels[top]
      scores[np.arange(len(scores)), top] = -np.inf
  best[~usable] = -1
  return best


def score(
  label: Array,  # [n] int in 0..C-1
  top5: Array,  # [n, k] int32 from predict
  classes: int,  # C
) -> dict:
  """Returns top1, top5 and mean_per_class (floats) and per_class ([C] float64).

  All are proportions in 0..1; per_class is NaN for a class without images, and mean_per_class is
  the mean over the other classes. An image with predictions -1 counts as wrong. With fewer than
  five classes, top5 is over all of them.
  """
  label, top5 = np.asarray(label), np.asarray(top5)
  if label.ndim != 1 or not len(label) or top5.ndim != 2 or len(top5) != len(label):
    raise ValueError(
      'label [n] and top5 [n, k] must agree in n, with n at least 1: got '
      f'{label.shape} and {top5.shape}'
    )
  if label.min() < 0 or label.max() >= classes:
    raise ValueError(f'labels must lie in 0..{classes - 1}: got {label.min()} to {label.max()}')
  hit = top5 == label[:, None]  # [n, k]
  images = np.bincount(label, minlength=classes)
  right = np.bincount(label, hit[:, 0], classes)
  per_class = np.where(images > 0, right / np.maximum(images, 1), np.nan)  # [C]
  return {
    'top1': float(hit[:, 0].mean()),
    'top5': float(hit.any(1).mean()),
    'mean_per_class': float(np.nanmean(per_class)),
    'per_class': per_class,
  }


def _nonzero(x: np.ndarray) -> np.ndarray:  # [m, E] float64
  bad = np.flatnonzero(~(np.isfinite(x).all(1) & x.any(1)))
  if len(bad):
    raise ValueError(f'text vector {bad[0]} is zero or has NaN or infinite values')
  return x
