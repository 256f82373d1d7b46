"""Made trees of the ImageNet family's layout, a stub model, and its scores in plain NumPy."""

import hashlib
import io
import os
import pathlib

import numpy as np
from PIL import Image

from clip_jax.evaluation import class_sets
from clip_jax.stages import models

WNIDS = class_sets.wnids()
E = 12  # numbers in an embedding


def jpeg(number: int) -> bytes:
  """Returns an 8-pixel image of a colour."""
  rng = np.random.default_rng(number)
  image = io.BytesIO()
  Image.fromarray(np.tile(rng.integers(0, 256, 3, dtype=np.uint8), (8, 8, 1))).save(image, 'JPEG')
  return image.getvalue()


def tree(root, folders, ending='JPEG', first=0) -> pathlib.Path:
  """Writes one image into each class folder; `first` begins the numbers of the images."""
  root = pathlib.Path(root)
  for number, folder in enumerate(folders):
    (root / folder).mkdir(parents=True)
    (root / folder / f'image.{ending}').write_bytes(jpeg(first + number))
  return root


def wnids_of(name: str) -> list[str]:
  return [WNIDS[label] for label in class_sets.by_name(name).labels]


def text_vector(text: str) -> np.ndarray:  # [E], a fixed random function of the text
  seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')
  return np.random.default_rng(seed).normal(size=E)


def image_vector(pixels: np.ndarray) -> np.ndarray:  # [8, 8, 3] uint8 -> [E]
  mix = np.random.default_rng(0).normal(size=(3, E))
  vector = np.sin((pixels[0, 0] + 1.0) / 40) @ mix
  return (vector / np.linalg.norm(vector)).astype(np.float32)


def model(encoded: list[str] | None = None, name='stub') -> models.Model:
  """Returns a stub model; `encoded` collects the texts that it encodes."""

  def encode_text(texts):
    if encoded is not None:
      encoded.extend(texts)
    return np.stack([text_vector(text) for text in texts]).astype(np.float32)

  return models.Model(
    8,
    'shortest',
    lambda batch: np.stack(list(map(image_vector, batch))),
    encode_text,
    None,
    lambda: name,
  )


def class_vectors(names, templates) -> np.ndarray:  # [C, E]
  """CLIP's prompt ensemble, one class after the other."""
  rows = []
  for name in names:
    vectors = [text_vector(t.replace('{}', name)).astype(np.float32) for t in templates]
    mean = np.mean([v / np.linalg.norm(v.astype(np.float64)) for v in vectors], 0)
    rows.append(mean / np.linalg.norm(mean))
  return np.array(rows, np.float32)


def image_vectors(root, keys) -> np.ndarray:  # [n, E]
  """Embeds the images of a tree by their keys, without the loader."""
  return np.stack(
    [image_vector(np.asarray(Image.open(os.path.join(root, key)).convert('RGB'))) for key in keys]
  )
