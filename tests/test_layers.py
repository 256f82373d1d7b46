"""Blocks against plain NumPy in float64."""

import logging
import math

from flax import nnx
import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import layers


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def block(seed=0, width=8, heads=2):
  return layers.ResidualAttentionBlock(
    width,
    heads,
    4 * width,
    init=layers.clip_init(width, 2),
    activation=layers.gelu,
    rngs=nnx.Rngs(seed),
    dtype='float32',
  )


def test_gelu_is_x_times_the_normal_distribution():
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  want = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), want, atol=1e-6)


def test_quick_gelu():
  x = np.linspace(-6, 6, 11, dtype=np.float32)
  want = x / (1 + np.exp(-1.702 * x))
  np.testing.assert_allclose(layers.quick_gelu(jnp.asarray(x)), want, rtol=1e-5)


def test_layer_norm_has_the_biased_variance_and_keeps_the_dtype():
  norm = layers.LayerNorm(6)
  norm.weight[...] = jnp.arange(1.0, 7.0)
  norm.bias[...] = jnp.arange(6.0)
  x = np.random.default_rng(0).normal(3, 2, (4, 6))
  want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  want = want * np.arange(1, 7) + np.arange(6)
  np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), want, atol=1e-5)
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('masked', [False, True])
def test_attention_equals_the_sum_over_heads_and_keys(masked):
  rng = np.random.default_rng(1)
  q, k, v = rng.normal(size=(3, 2, 5, 6))
  mask = np.tril(np.ones((5, 5), bool)) if masked else None
  want = np.empty((2, 5, 6))
  for b in range(2):
    for h in range(3):
      part = slice(2 * h, 2 * h + 2)
      score = q[b, :, part] @ k[b, :, part].T / math.sqrt(2)
      if masked:
        score[~mask] = -np.inf
      want[b, :, part] = softmax(score) @ v[b, :, part]
  as32 = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
  got = layers.attention(*as32, 3, None if mask is None else jnp.asarray(mask))
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('shape', [(5, 5), (2, 5, 5), (2, 1, 5)])
def test_the_fused_attention_is_the_same(shape):
  rng = np.random.default_rng(1)
  k, v = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32) for _ in range(2))
  q = jnp.asarray(rng.normal(size=(2, shape[-2], 6)), jnp.float32)
  mask = jnp.asarray(rng.random(shape) < 0.6).at[..., 0].set(True)
  for mask in (mask, None):
    np.testing.assert_allclose(
      layers.attention_fused(q, k, v, 3, mask),
      layers.attention_by_head(q, k, v, 3, mask),
      atol=1e-6,
    )


@pytest.mark.parametrize('queries, keys', [(5, 5), (1, 5), (1, 4), (4, 4)])
@pytest.mark.parametrize('masked', ['none', 'causal', 'each'])
def test_an_attention_of_even_lengths_is_the_same_with_its_gradients(queries, keys, masked):
  rng = np.random.default_rng(queries)
  q, k, v, slope = (
    jnp.asarray(rng.normal(size=(2, n, 6)), jnp.float32) for n in (queries, keys, keys, queries)
  )
  mask = {
    'none': None,
    'causal': jnp.arange(keys - queries, keys)[:, None] >= jnp.arange(keys),
    'each': jnp.asarray(rng.random((2, 1, keys)) < 0.6).at[..., 0].set(True),
  }[masked]
  seen = []

  def attend(q, k, v, mask):
    seen.append(None if mask is None else mask.shape)
    assert q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
    return layers.attention_by_head(q, k, v, 3, mask)

  even, even_back = jax.vjp(lambda *qkv: layers.even_lengths(*qkv, mask, attend), q, k, v)
  want, back = jax.vjp(lambda *qkv: layers.attention_by_head(*qkv, 3, mask), q, k, v)
  np.testing.assert_allclose(even, want, atol=1e-6)
  for a, b in zip(even_back(slope), back(slope), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert (seen == [None]) == (mask is None and queries == keys == 4)


@pytest.mark.parametrize(
  'queries, keys, size, dtype, words',
  [
    (50, 50, 64, 'bfloat16', "cuDNN's flash attention"),
    (256, 256, 80, 'bfloat16', "cuDNN's flash attention"),
    (197, 197, 64, 'bfloat16', "cuDNN's flash attention"),
    (1, 77, 64, 'bfloat16', "cuDNN's flash attention"),
    (50, 50, 64, 'float32', 'not for float32'),
    (50, 50, 136, 'bfloat16', 'not for heads of size 136'),
    (50, 50, 12, 'bfloat16', 'not for heads of size 12'),
  ],
)
def test_cudnn_is_asked_for_what_jax_lets_it_train(
  monkeypatch, caplog, queries, keys, size, dtype, words
):
  """cuDNN's own check of the shapes runs where a gradient is traced: no GPU is needed for it."""
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91_500)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  layers._log_once.cache_clear()
  q, k = (jax.ShapeDtypeStruct((2, n, 2 * size), dtype) for n in (queries, keys))
  masks = [None, np.ones((queries, keys), bool), np.ones((2, 1, keys), bool)]
  with caplog.at_level(logging.INFO):
    for mask in masks:

      def total(q, k, v, mask=mask):
        return layers.attention_fused(q, k, v, 2, mask).astype(jnp.float32).sum()

      program = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, k, k))
      assert ('dot_product_attention_bwd' in program) == (words == "cuDNN's flash attention")
  assert len(caplog.messages) == 1 and words in caplog.messages[0]


def test_a_block_may_be_asked_for_some_of_its_tokens():
  layer, x = block(), jax.random.normal(jax.random.key(1), (3 * 5, 8))
  mask, rows = jnp.tril(jnp.ones((5, 5), bool)), jnp.array([1, 1, 14, 7])
  np.testing.assert_allclose(
    layer(x, 5, mask, lambda y: y[rows]), layer(x, 5, mask)[rows], atol=1e-6
  )


def test_a_pooled_block_is_the_block_at_the_picked_token():
  @jax.jit
  def both():
    layer = block()
    x = jax.random.normal(jax.random.key(1), (3 * 5, 8))
    mask = jnp.tril(jnp.ones((5, 5), bool))
    rows = jnp.array([2, 0, 4])  # the token picked in each of three samples
    return (
      layer(x, 5, mask).reshape(3, 5, 8)[jnp.arange(3), rows],
      layer.pooled(x, 5, mask[rows][:, None], lambda y: y[jnp.arange(3) * 5 + rows]),
    )

  whole, got = both()
  np.testing.assert_allclose(got, whole, atol=1e-6)


def test_initial_spread():
  width, mlp_width = 64, 256
  torch = layers.pytorch_init(width, mlp_width)
  for init, shape, bound in (
    (torch.in_proj, (3 * width, width), math.sqrt(6 / (4 * width))),
    (torch.out_proj, (width, width), 1 / 8),
    (torch.c_fc, (mlp_width, width), 1 / 8),
    (torch.c_proj, (width, mlp_width), 1 / 16),
  ):
    x = init(jax.random.key(0), shape)
    assert 0.98 * bound < jnp.abs(x).max() <= bound
    np.testing.assert_allclose(x.std(), bound / math.sqrt(3), rtol=0.03)
  clip = layers.clip_init(width, 3)
  for init, std in (
    (clip.in_proj, width**-0.5),
    (clip.out_proj, (width * 6) ** -0.5),
    (clip.c_fc, (2 * width) ** -0.5),
    (clip.c_proj, (width * 6) ** -0.5),
  ):
    np.testing.assert_allclose(init(jax.random.key(0), (256, 64)).std(), std, rtol=0.03)


def test_heads_must_divide_the_width():
  with pytest.raises(ValueError, match='width=8 .*heads=3'):
    block(heads=3)
