"""The text tower against open_clip's arithmetic in float64, and what trimming rests on."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_clip
from test_vit import random_model

from clip_jax.data import packing
from clip_jax.models import text as text_tower
from clip_jax.models import zoo

END = 29


def make():
  config = zoo.TextConfig(context_length=9, vocab_size=30, width=8, layers=2, heads=2)
  return text_tower.TextTransformer(config, 6, rngs=nnx.Rngs(0), dtype='float32')


def captions():
  text = np.random.default_rng(2).integers(1, END - 1, (4, 9)).astype(np.int32)
  for row, end in enumerate((8, 2, 4, 1)):
    text[row, end] = END
    text[row, end + 1 :] = 0
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


def features_and_gradients(text):
  """Of a fixed random model; the gradients of a sum over all features, each with its own weight."""
  graph, state = nnx.split(make())
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), nnx.to_pure_dict(state)
  )
  weight = rng.normal(size=(4, 6)).astype(np.float32)

  def total(params):
    model = nnx.merge(graph, params)
    features = model.packed(**text) if isinstance(text, dict) else model(text)
    return (features * weight).sum(), features

  (_, features), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return features, gradients


@pytest.fixture(scope='module')
def one_a_row():
  return features_and_gradients(jnp.asarray(captions()))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_packed_captions_have_the_same_features_and_gradients(one_a_row, groups):
  packed = packing.pack(captions(), groups)
  assert packed['tokens'].shape[1] == {1: 3, 2: 2, 4: 1}[groups]
  assert_same(features_and_gradients(packed), one_a_row)


def test_trimmed_captions_have_the_same_features_and_gradients():
  text = captions()[[1, 2, 3, 1]]  # all end by position 4
  trimmed = packing.trim(text, (5, 7))
  assert trimmed.shape == (4, 5)
  assert_same(
    features_and_gradients(jnp.asarray(trimmed)), features_and_gradients(jnp.asarray(text))
  )


def assert_same(got, want):
  np.testing.assert_allclose(got[0], want[0], atol=2e-6 * np.abs(want[0]).max())
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-6, err_msg=name)


def test_only_causal_captions_pooled_at_their_end_can_be_packed():
  config = zoo.TextConfig(9, 30, 8, 2, 1, causal=False, pool_type='last')
  assert not text_tower.packable(config) and text_tower.packable(make().config)
  model = text_tower.TextTransformer(config, 6, rngs=nnx.Rngs(0), dtype='float32')
  with pytest.raises(ValueError, match='causal'):
    model.packed(**packing.pack(captions(), 1))


def test_longer_than_the_context_is_refused():
  with pytest.raises(ValueError, match=r'T at most 9, got \[1, 10\]'):
    jax.eval_shape(lambda: make()(jnp.zeros((1, 10), jnp.int32)))


@jax.jit
def fresh(key):
  config = zoo.TextConfig(context_length=77, vocab_size=500, width=64, layers=1, heads=1)
  model = text_tower.TextTransformer(config, 64, rngs=nnx.Rngs(key), dtype='float32')
  return [
    value[...]
    for value in (model.token_embedding.weight, model.positional_embedding, model.text_projection)
  ]


def test_initial_spread():
  for value, std in zip(fresh(jax.random.key(0)), (0.02, 0.01, 64**-0.5), strict=True):
    np.testing.assert_allclose(value.std(), std, rtol=0.05)


@pytest.mark.parametrize('packed', [False, True])
def test_devices_send_one_another_nothing(packed):
  graph, state = nnx.split(make())
  mesh = jax.make_mesh(
    (4,), ('data',), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  text = np.tile(captions(), (2, 1))
  text = packing.pack(text, 4) if packed else text

  def encode(state, text):
    model = nnx.merge(graph, state)
    return model.packed(**text) if packed else model(text)

  compiled = jax.jit(encode, in_shardings=(None, split), out_shardings=split).lower(state, text)
  program = compiled.compile().as_text()
  assert 'fusion' in program
  assert not [
    word for word in ('all-reduce', 'all-gather', 'all-to-all', 'permute') if f' {word}' in program
  ]
