"""Lengths and angles of vectors, for every room. Arrays in, arrays out."""

import numpy as np

from clip_jax.core.types import Array


def unit(
  x: Array,  # [..., E] floating
) -> np.ndarray:  # [..., E], of the same dtype
  """Returns the vectors at length 1; a zero vector stays zero, and NaN stays NaN."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)


def cosine(
  first: Array,  # [n, E] float16
  second: Array,  # [n, E] float16, or [n, k, E]
) -> np.ndarray:  # [n] float64, or [n, k]
  """Returns similarities divided by both norms, in float64; 0 for a zero vector.

  A float16 vector's norm is off by up to 1e-3.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if second.ndim > first.ndim:
    first = first[:, None]
  norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
  return (first * second).sum(-1) / np.where(norms > 0, norms, 1)
