"""accelerator.py: its arithmetic, here on the CPU, and that it compiles down to a GPU's program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.similarity import accelerator, decide


def unit(rng, *shape):
  x = rng.standard_normal(shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def arguments(rng, blocks=2, b=64, dim=96, rows=128):
  """Three benchmarks; the second has one group of queries, and the third goes over two blocks."""
  owner = np.repeat([0, 1, 2], [2, 1, blocks * b // 16 - 3]).astype(np.int32)
  number = np.concatenate([np.arange(32), np.minimum(np.arange(16), 4), np.arange(blocks * b - 48)])
  return (
    unit(rng, blocks, b, dim),
    rng.uniform(0, 0.3, (blocks, b)).astype(np.float32),
    number.reshape(blocks, b).astype(np.int32),
    owner.reshape(blocks, -1),
    unit(rng, rows, dim),
    100,
  )


@pytest.mark.parametrize('k', [0, 7])
def test_the_scan_equals_float64_within_the_bound(k):
  vectors, cuts, number, owner, tile, count = arguments(np.random.default_rng(0))
  columns, top = accelerator.scan(
    vectors, cuts, number, owner, tile, count, benchmarks=3, k=k, nearest=True
  )
  s = vectors.reshape(128, -1).astype(np.float64) @ tile.astype(np.float64).T
  bound = decide.error_bound(96)
  of = np.repeat(owner.ravel(), 16)
  similarity, nearest, excess = (np.asarray(x) for x in columns)
  for benchmark in range(3):
    part = s[of == benchmark]
    over = part - cuts.ravel()[of == benchmark, None]
    assert np.abs(similarity[benchmark] - part.max(0)).max() <= bound
    assert np.abs(excess[benchmark] - over.max(0)).max() <= bound
    assert np.array_equal(nearest[benchmark], number.ravel()[of == benchmark][part.argmax(0)])
  if not k:
    assert top is None
    return
  values, position = (np.asarray(x).reshape(128, k) for x in top)
  want = np.argsort(-s[:, :count], axis=1)[:, :k]  # padding is no row
  assert np.array_equal(position, want)
  assert np.abs(values - np.take_along_axis(s, want, 1)).max() <= bound


def test_a_gpu_gets_float16_products_with_float32_sums():
  args = arguments(np.random.default_rng(0))
  lowered = jax.export.export(accelerator.scan, platforms=['cuda'])(
    *args[:-1], np.int32(args[-1]), benchmarks=3, k=7, nearest=True
  ).mlir_module()
  (dot,) = (line for line in lowered.splitlines() if ' stablehlo.dot_general' in line)
  assert '(tensor<64x96xf16>, tensor<128x96xf16>) -> tensor<64x128xf32>' in dot


class Device:
  def __init__(self, limit):
    self.memory_stats = lambda: None if limit is None else {'bytes_limit': limit}


@pytest.mark.parametrize(
  'limits, want',
  [([None, None], False), ([10_000], False), ([10_000, 10_000], True), ([80_000, 80_000], False)],
)
def test_queries_are_spread_only_where_they_do_not_fit(limits, want):
  queries = jnp.zeros((2, 64, 96), jnp.float16)  # 24,576 bytes
  assert accelerator.too_large(queries, [Device(limit) for limit in limits]) == want
