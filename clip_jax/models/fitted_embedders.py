"""Embedders without gradient training: principal components of pixels, gradient histograms.

An embedder is a pair of pure functions: fit(images uint8 [n, S, S, 3], dim) -> params (dict of
float32 arrays, the whole embedder) and apply(params, images uint8 [b, S, S, 3]) -> float32
[b, E], unit length. Rows are processed in blocks of a fixed size, the last one padded, so that the
bits of a vector depend only on its image, not on its batch or its position in the batch.

Both use luminance (ITU-R BT.601) instead of the three channels: nearest neighbours should share a
shape, not a tint, and the covariance of the pixels has a ninth of the entries.
"""

import numpy as np

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array

_BLOCK = 256  # rows processed at once
_ORIENTATIONS = 9  # histogram bins over 180 degrees (Dalal and Triggs 2005)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def fit_pca(
  images: Array,  # [n, S, S, 3] uint8
  dim: int,  # components kept, at most n - 1 and at most S * S
) -> dict[str, np.ndarray]:  # mean [S*S], components [S*S, dim], float32
  return _principal(_in_blocks(_luminance, images), dim)


def apply_pca(
  params: dict[str, Array],  # of fit_pca
  images: Array,  # [b, S, S, 3] uint8
) -> np.ndarray:  # [b, dim] float32, unit length
  """Projects luminance minus the fit's mean on the leading components, to unit length."""
  return _in_blocks(lambda block: _project(params, _luminance(block)), images)


def fit_hog(
  images: Array,  # [n, S, S, 3] uint8
  dim: int,  # components kept; 0 keeps the histogram itself
) -> dict[str, np.ndarray]:  # mean [F], and components [F, dim] where dim > 0, float32
  features = _in_blocks(_histograms, images)
  if dim == 0:
    return dict(mean=features.mean(0, dtype=np.float64).astype(np.float32))
  return _principal(features, dim)


def apply_hog(
  params: dict[str, Array],  # of fit_hog
  images: Array,  # [b, S, S, 3] uint8
) -> np.ndarray:  # [b, dim or F] float32, unit length
  """Returns oriented gradients minus the fit's mean, projected on its components if it has any."""
  return _in_blocks(lambda block: _project(params, _histograms(block)), images)


def _in_blocks(function, images: Array) -> np.ndarray:
  if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
    raise ValueError(f'images must be [n, S, S, 3], got {list(images.shape)}')
  if images.dtype != np.uint8:
    raise ValueError(f'images must be uint8, got {images.dtype}')
  parts = []
  for start in range(0, len(images), _BLOCK):
    part = images[start : start + _BLOCK]
    block = np.zeros((_BLOCK, *images.shape[1:]), np.uint8)
    block[: len(part)] = part
    parts.append(function(block)[: len(part)])
  return (
    np.concatenate(parts)
    if parts
    else function(np.zeros((_BLOCK, *images.shape[1:]), np.uint8))[:0]
  )


def _luminance(
  images: Array,  # [b, S, S, 3] uint8
) -> np.ndarray:  # [b, S*S] float32 in 0..1
  return ((images * _LUMA).sum(-1) / 255).reshape(len(images), -1)


def _histograms(
  images: Array,  # [b, S, S, 3] uint8, S at least 8
) -> np.ndarray:  # [b, F] float32, F = (S/c - 1)^2 * 4 * 9 for cells of c pixels
  """Returns histograms of oriented gradients (Dalal and Triggs 2005).

  Cells have 8 pixels (S // 4 if S < 32), blocks 2 x 2 cells. Orientation is unsigned, in 9 bins;
  the length of a gradient is shared between the two nearest bins. Each block is scaled to unit
  length, with a small constant, so that a flat block stays zero. Pixels beyond the last whole cell
  are ignored.
  """
  size = images.shape[1]
  cell = min(8, size // 4)
  cells = size // cell
  gray = _luminance(images).reshape(-1, size, size)[:, : cells * cell, : cells * cell]
  down, right = np.gradient(gray, axis=(1, 2))
  length = np.hypot(down, right).ravel()
  position = np.arctan2(down, right).ravel() * (_ORIENTATIONS / np.pi) % _ORIENTATIONS
  lower = np.floor(position)
  share = position - lower
  lower = lower.astype(np.int64) % _ORIENTATIONS
  along = np.arange(cells * cell) // cell
  first_bin = np.arange(len(gray))[:, None, None] * cells * cells + along[:, None] * cells + along
  first_bin = first_bin.ravel() * _ORIENTATIONS  # first bin of each pixel's cell
  bins = len(gray) * cells * cells * _ORIENTATIONS
  cell_sum = np.bincount(first_bin + lower, length * (1 - share), bins)
  cell_sum += np.bincount(first_bin + (lower + 1) % _ORIENTATIONS, length * share, bins)
  cell_sum = cell_sum.reshape(-1, cells, cells, _ORIENTATIONS)
  block = np.concatenate(
    [cell_sum[:, :-1, :-1], cell_sum[:, :-1, 1:], cell_sum[:, 1:, :-1], cell_sum[:, 1:, 1:]],
    axis=-1,
  )
  block = block / np.sqrt(np.square(block).sum(-1, keepdims=True) + 1e-4)
  return block.reshape(len(images), -1).astype(np.float32)


def _principal(
  features: Array,  # [n, F] float32
  dim: int,
) -> dict[str, np.ndarray]:  # mean [F], components [F, dim], float32
  """Returns the mean and the `dim` principal components, in order of decreasing variance.

  The sign of a component is chosen so that its entry of largest magnitude is positive.
  """
  n, width = features.shape
  if not 1 <= dim <= min(n - 1, width):
    raise ConfigError(
      f'embedder.dim={dim} needs at least {dim + 1} images and {dim} features, but the embedder is '
      f'fitted on {n} images of {width} features. Set it to {max(min(n - 1, width), 1)} or less.'
    )
  mean = features.mean(0, dtype=np.float64)
  centred = features - mean
  if n >= width:
    components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dim]
  else:  # the same components, from the smaller Gram matrix of the images
    components = centred.T @ np.linalg.eigh(centred @ centred.T)[1][:, ::-1][:, :dim]
    components /= np.maximum(np.linalg.norm(components, axis=0), 1e-12)
  largest = components[np.abs(components).argmax(0), np.arange(dim)]
  components = components * np.where(largest < 0, -1, 1)
  return dict(mean=mean.astype(np.float32), components=components.astype(np.float32))


def _project(
  params: dict[str, Array],
  features: Array,  # [b, F] float32
) -> np.ndarray:  # [b, E] float32, unit length
  x = features - params['mean']
  if 'components' in params:  # row by row: in one product, the bits depend on the row's position
    x = np.stack([row @ params['components'] for row in x])
  return _unit(x)


def _unit(
  x: Array,  # [b, E] float32
) -> np.ndarray:  # [b, E] float32, unit length
  """Scales rows to unit length; a zero vector becomes the first axis, so that there is no NaN."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  first = np.zeros_like(x)
  first[:, 0] = 1
  return np.where(norm > 1e-6, x / np.maximum(norm, 1e-6), first).astype(np.float32)


EMBEDDERS = {'pca': (fit_pca, apply_pca), 'hog': (fit_hog, apply_hog)}
