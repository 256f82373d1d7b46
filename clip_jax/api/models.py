"""clip_jax.load: a CLIP that encodes images and texts."""

from collections.abc import Iterator, Sequence
import os
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.evaluation import zero_shot

BATCH = 64  # images encoded at once


class Model:
  """A CLIP with its preprocessing and tokenizer; all embeddings are float32, of unit length."""

  def __init__(self, path: str, model: Any):
    self._path, self._model = path, model

  def __repr__(self) -> str:
    return f'<clip_jax model {self._path}, {self.image_size} pixels>'

  @property
  def image_size(self) -> int:
    """Pixels, width and height."""
    return self._model.image_size

  def encode_image(self, images: Any) -> np.ndarray:
    """Returns the embeddings of images, [n, E] float32.

    images: a list of PIL images, paths, bytes of image files (as open_pool gives them) or arrays
    [H, W, 3] uint8, or one array [n, H, W, 3]; one image alone is a list of one. They are resized
    as the model's preprocessing says. Raises InputError for an image that cannot be read.
    """
    parts = []
    for block in _blocks(_as_list(images), BATCH):
      pixels = np.stack([self._prepared(image) for image in block])
      size = 1 << (len(pixels) - 1).bit_length()  # few compiled shapes
      padded = np.pad(pixels, ((0, size - len(pixels)), (0, 0), (0, 0), (0, 0)), mode='edge')
      parts.append(np.asarray(self._model.encode_image(padded))[: len(pixels)])
    if not parts:
      raise InputError('encode_image needs at least one image.')
    return np.concatenate(parts)

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """Returns the embeddings of texts, [n, E] float32."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
      raise InputError('encode_text needs at least one text.')
    return np.asarray(self._model.encode_text(texts))

  def zero_shot(
    self, class_names: Sequence[str], templates: Sequence[str] = ('a photo of a {}.',)
  ) -> np.ndarray:
    """Returns the class vectors of a zero-shot classifier, [C, E] float32, of unit length.

    A class vector is the normalised mean over the normalised embeddings of its prompts (CLIP's
    prompt ensemble); '{}' in a template takes the class name. The prediction for an image is
    (encode_image(images) @ zero_shot(names).T).argmax(1).
    """
    if isinstance(class_names, str) or isinstance(templates, str):
      raise ConfigError('class_names and templates are lists of strings.')
    return zero_shot.class_matrix(self.encode_text, class_names, templates)

  def _prepared(self, image: Any) -> Array:
    return images.resize(_pixels(image), self.image_size, self._model.resize)


def load(path: str | os.PathLike, model: str = '') -> Model:
  """Opens a CLIP.

  path: a run of clip_jax (WORKDIR/train/<split>/seed<k>) or one of its checkpoints, or a weights
  file of open_clip, OpenAI or Hugging Face (.safetensors, .pt, .bin). model: the open_clip name of
  a weights file that has no open_clip_config.json or config.json beside it, as 'ViT-B-32'.
  """
  from clip_jax.stages import models

  given = models.resolve_path(str(path))
  return Model(given, models.open_model(models.read(given, model, flag='model')))


def _as_list(images: Any) -> Any:
  if isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, 'convert'):
    return [images]
  if isinstance(images, np.ndarray) and images.ndim == 3:
    return images[None]
  return images if isinstance(images, np.ndarray) else list(images)


def _pixels(image: Any) -> Array:  # -> [H, W, 3] uint8
  if isinstance(image, bytes):
    try:
      return images.decode(image)
    except images.UnreadableImage as error:
      raise InputError(f'These {len(image):,} bytes are no readable image ({error}).') from error
  if isinstance(image, (str, os.PathLike)):
    try:
      with open(image, 'rb') as f:
        return images.decode(f.read())
    except (OSError, images.UnreadableImage) as error:
      reason = getattr(error, 'strerror', None) or error
      raise InputError(f'{os.fspath(image)} is no readable image ({reason}).') from error
  if isinstance(image, Image.Image):
    return np.asarray(image.convert('RGB'))
  pixels = np.asarray(image)
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    raise InputError(
      f'An image array must be uint8 [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}.'
    )
  return pixels


def _blocks(items: Any, size: int) -> Iterator[Sequence[Any]]:
  for start in range(0, len(items), size):
    yield items[start : start + size]
