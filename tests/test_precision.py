"""bfloat16 in the towers, as CPUs with bfloat16 instructions compute it (here: any CPU)."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step

from clip_jax.core import sharding
from clip_jax.data import packing
from clip_jax.models import clip, precision, zoo
from clip_jax.training import step as training_step

CONFIG = zoo.CLIPConfig(
  embed_dim=16,
  vision=zoo.ViTConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2),
  text=zoo.TextConfig(context_length=6, vocab_size=32, width=16, heads=2, layers=2),
)
VISION = {
  'class token': CONFIG.vision,
  'attention pooling': dataclasses.replace(CONFIG.vision, pool_type='map', class_token=False),
  'resnet': zoo.ResNetConfig(32, 4, (1, 1, 1, 1), 2),
}


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
  """Gives the CPU bfloat16 instructions; functions of models are traced again."""
  monkeypatch.setattr(precision, '_cpu_flag', lambda: 'avx512_bf16')
  for cached in (precision.of, clip.functions):
    cached.cache_clear()
  yield
  for cached in (precision.of, clip.functions):
    cached.cache_clear()


@pytest.mark.parametrize(
  'backend, flag, products, activations, words',
  [
    ('cpu', 'amx_bf16', 'bfloat16', 'float32', 'this CPU has amx_bf16'),
    ('cpu', '', 'float32', 'float32', 'neither amx_bf16 nor avx512_bf16: float32 is faster'),
    ('gpu', '', 'bfloat16', 'bfloat16', 'on a gpu'),
  ],
)
def test_the_processor_decides_and_the_log_says_so_once(
  monkeypatch, caplog, backend, flag, products, activations, words
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(precision, '_cpu_flag', lambda: flag)
  with caplog.at_level(logging.INFO):
    for _ in range(2):
      assert precision.of('bfloat16') == precision.Precision(products, activations)
      assert precision.of('float32') == precision.FLOAT32
  assert len(caplog.messages) == 1 and words in caplog.messages[0]


def rounded(x):
  return np.asarray(x, jnp.bfloat16).astype(np.float64)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('rows, size_in, size_out', [(1, 16, 9), (3, 4, 5), (40, 64, 48)])
def test_product_and_gradients_are_those_of_rounded_inputs(rows, size_in, size_out, axis):
  """Exact sums of rounded numbers, where JAX's products of two bfloat16 would round the result.

  Transposes stand beside the products, which XLA must not fold into them.
  """
  rng = np.random.default_rng(rows + axis)
  x, slope = rng.normal(size=(rows, size_in)), rng.normal(size=(rows, size_out))
  weight = rng.normal(size=(size_out, size_in) if axis else (size_in, size_out))

  @jax.jit
  def both(x, weight, slope):
    product = lambda x, weight: precision.product(x.T, weight.T, 'bfloat16', axis).T
    out, backward = jax.vjp(product, x, weight)
    return out.T, *(part.T for part in backward(slope))

  got = both(*(jnp.asarray(part.T, jnp.float32) for part in (x, weight, slope)))
  x, weight, slope = rounded(x), rounded(weight), rounded(slope)
  matrix = weight.T if axis else weight
  of_matrix = x.T @ slope
  want = (x @ matrix, slope @ matrix.T, of_matrix.T if axis else of_matrix)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=1e-5 * size_in)


def test_leading_axes_are_kept():
  x, weight = jnp.ones((2, 3, 8)), jnp.ones((5, 8))
  for dtype in ('float32', 'bfloat16'):
    np.testing.assert_array_equal(precision.product(x, weight, dtype), np.full((2, 3, 5), 8.0))


def gradients(config, dtype, remat='none'):
  """Returns features and gradients of one random batch, as two vectors."""
  functions = clip.functions(config, dtype, 0.0, remat)
  params = jax.jit(clip.functions(config).init)(jax.random.key(0))
  size = config.vision.image_size
  images = jax.random.normal(jax.random.key(1), (4, size, size, 3))
  text = jax.random.randint(jax.random.key(2), (4, 6), 1, 31)

  @jax.jit
  def both(params):
    def total(params):
      features = functions.encode(params, images, text, jax.random.key(0))[0]
      out = jnp.stack([features['image'], features['text']])
      return (jnp.sin(3 * out) * out).sum(), out

    slopes, out = jax.grad(total, has_aux=True)(params)
    return out.ravel(), jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(slopes)])

  return both(params)


def distance(a, b):
  return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


@pytest.mark.parametrize(
  'vision', ['class token', *(pytest.param(name, marks=pytest.mark.slow) for name in [*VISION][1:])]
)
def test_every_tower_and_its_gradients_are_near_float32(vision):
  config = dataclasses.replace(CONFIG, vision=VISION[vision])
  half, full = (gradients(config, dtype) for dtype in ('bfloat16', 'float32'))
  for a, b in zip(half, full, strict=True):
    # Batch norms over four images enlarge the rounding.
    assert 1e-5 < distance(a, b) < (0.2 if vision == 'resnet' else 5e-2)


@pytest.mark.parametrize('remat', [pytest.param('dots', marks=pytest.mark.slow), 'blocks'])
def test_what_is_computed_again_is_the_same(remat):
  again, stored = (gradients(CONFIG, 'bfloat16', way) for way in (remat, 'none'))
  for a, b in zip(again, stored, strict=True):
    assert distance(a, b) < 1e-5


def losses(dtype, devices, microbatches):
  """Returns the losses of three steps with packed captions."""
  recipe = dataclasses.replace(test_step.RECIPE, microbatches=microbatches)
  mesh = sharding.mesh(devices=jax.devices()[:devices])
  functions = clip.functions(CONFIG, dtype)
  steps = training_step.steps(functions.init, functions.encode, recipe, mesh)
  rng, state, out = np.random.default_rng(0), steps.init(0), []
  image = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
  text = np.zeros((16, 6), np.int32)
  text[:, :3] = np.stack([np.full(16, 30), rng.integers(1, 30, 16), np.full(16, 31)], 1)
  batch = dict(image=image, text=packing.pack(text, devices * microbatches))
  schedule = dict(
    peak=np.float32(3e-4), warmup_steps=np.int32(1), total_steps=np.int32(9), seed=np.uint32(0)
  )
  for _ in range(3):
    state, values = steps.step(state, sharding.place_batch(batch, mesh), schedule)
    out.append(float(values['loss']))
  return out


@pytest.mark.slow
def test_training_in_parts_on_eight_devices_is_near_one_device_in_float32():
  alone, parts, full = losses('bfloat16', 1, 1), losses('bfloat16', 8, 2), losses('float32', 1, 1)
  np.testing.assert_allclose(parts, alone, rtol=2e-3)
  np.testing.assert_allclose(alone, full, rtol=1e-2)
  assert alone != full
