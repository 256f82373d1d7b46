"""vectors.py: unit length and cosines, against the definition row by row."""

import math

import numpy as np
import pytest

from clip_jax.core import vectors


def rows(seed, count=20, dim=16):
  x = np.random.default_rng(seed).standard_normal((count, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_unit_keeps_the_dtype_and_zero_vectors(dtype):
  x = np.array([[3, 4], [0, 0], [np.nan, 1]], dtype)
  got = vectors.to_unit_length(x)
  assert got.dtype == dtype and got[:2].tolist() == [
    [dtype(3) / dtype(5), dtype(4) / dtype(5)],
    [0, 0],
  ]
  assert np.isnan(got[2, 0])


def test_cosines_are_divided_by_both_norms():
  x, y = rows(1), (1.5 * rows(2)).astype(np.float16)
  a, b = x.astype(np.float64), y.astype(np.float64)
  wanted = [a[i] @ b[i] / math.sqrt(a[i] @ a[i]) / math.sqrt(b[i] @ b[i]) for i in range(20)]
  np.testing.assert_allclose(vectors.cosine(x, y), wanted, rtol=1e-14)
  several = vectors.cosine(x, np.stack([y, x], 1))
  np.testing.assert_allclose(several, np.stack([wanted, np.ones(20)], 1), rtol=1e-14)
  assert vectors.cosine(0 * x, y).tolist() == [0] * 20
