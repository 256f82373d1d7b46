"""The text tower against open_clip's arithmetic in float64, and what trimming rests on."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_clip
from clip_jax.models import layers
from clip_jax.models import text as text_tower
from test_vit import random_model

END = 29


def make():
  return text_tower.TextTransformer(context_length=9, vocab_size=30, width=8, layers_=2, heads=2,
                                    mlp_width=32, embed_dim=6, activation=layers.gelu,
                                    rngs=nnx.Rngs(0), dtype='float32')


def captions():
  text = np.random.default_rng(2).integers(1, END - 1, (4, 9)).astype(np.int32)
  for row, end in enumerate((8, 2, 4, 1)):
    text[row, end] = END
    text[row, end + 1:] = 0
  return text


def test_equals_the_reference():
  model, params = random_model(make)
  want = [reference_clip.encode_text(text, params, heads=2, layers=2) for text in captions()]
  np.testing.assert_allclose(model(jnp.asarray(captions())), np.stack(want), atol=2e-5)


def test_nothing_after_the_end_token_counts():
  model, _ = random_model(make)
  text = captions()[1:]  # all end by position 4
  whole = model(jnp.asarray(text))
  np.testing.assert_allclose(model(jnp.asarray(text[:, :5])), whole, atol=1e-6)
  text[:, 5:] = 7
  np.testing.assert_allclose(model(jnp.asarray(text)), whole, atol=1e-6)


def test_longer_than_the_context_is_refused():
  with pytest.raises(ValueError, match=r'T at most 9, got \[1, 10\]'):
    jax.eval_shape(lambda: make()(jnp.zeros((1, 10), jnp.int32)))


@jax.jit
def fresh(key):
  model = text_tower.TextTransformer(
      context_length=77, vocab_size=500, width=64, layers_=1, heads=1, mlp_width=256, embed_dim=64,
      activation=layers.gelu, rngs=nnx.Rngs(key), dtype='float32')
  return [value[...] for value in (model.token_embedding.weight, model.positional_embedding,
                                   model.text_projection)]


def test_initial_spread():
  for value, std in zip(fresh(jax.random.key(0)), (0.02, 0.01, 64 ** -0.5), strict=True):
    np.testing.assert_allclose(value.std(), std, rtol=0.05)
