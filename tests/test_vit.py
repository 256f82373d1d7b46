"""The vision tower against open_clip's arithmetic in float64."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_clip

from clip_jax.models import vit, zoo


def make(dtype='float32', activation='gelu', image_size=10, **others):
  config = zoo.ViTConfig(
    image_size=image_size, patch_size=4, width=8, layers=2, heads=2, activation=activation
  )
  return vit.VisionTransformer(config, 6, rngs=nnx.Rngs(0), dtype=dtype, **others)


def random_model(make):
  """(compiled call, flat float64 params) of a model with every parameter random, norms' too."""
  graph, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), nnx.to_pure_dict(state)
  )
  compiled = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
  return functools.partial(compiled, params), reference_clip.flat(params)


@pytest.mark.parametrize(
  'ours, theirs', [('gelu', reference_clip.gelu), ('quick_gelu', reference_clip.quick_gelu)]
)
def test_equals_the_reference(ours, theirs):
  model, params = random_model(lambda: make(activation=ours))
  images = np.random.default_rng(1).normal(size=(3, 10, 10, 3))
  want = [
    reference_clip.encode_image(image, params, heads=2, layers=2, activation=theirs)
    for image in images
  ]
  got = model(jnp.asarray(images, jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.stack(want), atol=2e-5)


def test_bfloat16_is_near_and_gives_float32():
  images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, 10, 3)), jnp.float32)
  half, full = (random_model(lambda: make(dtype))[0](images) for dtype in ('bfloat16', 'float32'))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, full, atol=0.1 * float(jnp.abs(full).max()))


def test_patch_embedding_starts_as_a_pytorch_convolution():
  weight = vit.PatchEmbedding(8, 64, bias=False, rngs=nnx.Rngs(0), dtype='float32').weight[...]
  assert weight.shape == (64, 3, 8, 8)
  bound = (3 * 64) ** -0.5
  assert 0.98 * bound < jnp.abs(weight).max() <= bound


def test_an_image_of_another_size_is_refused():
  with pytest.raises(ValueError, match=r'\[B, 10, 10, 3\], got \[2, 8, 8, 3\]'):
    jax.eval_shape(lambda: make()(jnp.zeros((2, 8, 8, 3))))


def test_dropped_patches_are_as_if_they_had_never_been():
  model, _ = random_model(lambda: make(patch_dropout=0.5))
  images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, 10, 3)), jnp.float32)
  whole = model(images)
  np.testing.assert_array_equal(random_model(make)[0](images), whole)  # none without a key
  x = jnp.arange(24.0).reshape(2, 12, 1)
  kept = np.asarray(vit.drop_patches(x, 0.5, jax.random.key(0)))[..., 0]
  assert kept.shape == (2, 6)
  for row, of in zip(kept, np.asarray(x[..., 0])):
    assert len(set(row)) == 6 and set(row) <= set(of)
  assert set(kept[0]) != set(kept[1] - 12)  # each image loses others
  assert vit.drop_patches(x, 0.99, jax.random.key(0)).shape == (2, 1, 1)


def test_training_drops_patches_by_its_key():
  graph, state = nnx.split(make(patch_dropout=0.5))
  run = jax.jit(lambda state, x, key: nnx.merge(graph, state)(x, key))
  images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, 10, 3)), jnp.float32)
  a, b, c = (run(state, images, jax.random.key(n)) for n in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0


@pytest.mark.parametrize('remat', ['blocks', 'dots'])
def test_what_is_recomputed_changes_nothing(remat):
  def gradients(remat):
    graph, state = nnx.split(make(remat=remat))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 10, 3)), jnp.float32)
    return jax.jit(jax.grad(lambda state: nnx.merge(graph, state)(images).sum()))(state)

  for a, b in zip(
    jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients('none')), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)
