"""Norms and cosine similarities of vectors. Pure functions on arrays."""

import numpy as np

from clip_jax.core.types import Array


def to_unit_length(
  x: Array,  # [..., E] floating
) -> np.ndarray:  # [..., E], of the same dtype
  """Returns the vectors scaled to unit length; zero vectors stay zero, NaN stays NaN."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)


def cosine(
  first: Array,  # [n, E] float16
  second: Array,  # [n, E] float16, or [n, k, E]
) -> np.ndarray:  # [n] float64, or [n, k]
  """Returns cosine similarities in float64; 0 for a zero vector.

  The division by both norms is needed because the norm of a unit vector in float16 is off by up to
  1e-3.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if second.ndim > first.ndim:
    first = first[:, None]
  norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
  return (first * second).sum(-1) / np.where(norms > 0, norms, 1)
