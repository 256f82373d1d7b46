"""The vision tower against open_clip's arithmetic in float64."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_clip
from clip_jax.models import layers
from clip_jax.models import vit


def make(dtype='float32', activation=layers.gelu, image_size=10):
  return vit.VisionTransformer(image_size=image_size, patch_size=4, width=8, layers_=2, heads=2,
                               mlp_width=32, embed_dim=6, activation=activation,
                               rngs=nnx.Rngs(0), dtype=dtype)


def random_model(make):
  """(compiled call, flat float64 params) of a model with every parameter random, norms' too."""
  graph, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
                        nnx.to_pure_dict(state))
  compiled = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
  return functools.partial(compiled, params), reference_clip.flat(params)


@pytest.mark.parametrize('ours, theirs', [(layers.gelu, reference_clip.gelu),
                                          (layers.quick_gelu, reference_clip.quick_gelu)])
def test_equals_the_reference(ours, theirs):
  model, params = random_model(lambda: make(activation=ours))
  images = np.random.default_rng(1).normal(size=(3, 10, 10, 3))
  want = [reference_clip.encode_image(image, params, heads=2, layers=2, activation=theirs)
          for image in images]
  got = model(jnp.asarray(images, jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.stack(want), atol=2e-5)


def test_bfloat16_is_near_and_gives_float32():
  images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, 10, 3)), jnp.float32)
  half, full = (random_model(lambda: make(dtype))[0](images) for dtype in ('bfloat16', 'float32'))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, full, atol=0.1 * float(jnp.abs(full).max()))


def test_patch_embedding_starts_as_a_pytorch_convolution():
  weight = vit.PatchEmbedding(8, 64, rngs=nnx.Rngs(0), dtype='float32').weight[...]
  assert weight.shape == (64, 3, 8, 8)
  bound = (3 * 64) ** -0.5
  assert 0.98 * bound < jnp.abs(weight).max() <= bound


def test_an_image_of_another_size_is_refused():
  with pytest.raises(ValueError, match=r'\[B, 10, 10, 3\], got \[2, 8, 8, 3\]'):
    jax.eval_shape(lambda: make()(jnp.zeros((2, 8, 8, 3))))
