"""Every family against open_clip's own outputs: features, logits, loss, gradients, statistics.

Agreement in float32: the largest difference over the largest value of a tensor.
"""

import pathlib

import golden_clip
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import clip, open_clip, weights
from clip_jax.models.shapes import shapes
from clip_jax.training import losses

GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden/open_clip.npz')
FAMILIES = sorted(golden_clip.FAMILIES)


def params(config, weight):
  """Returns our parameters from `weight`, a function of open_clip's name and the shape."""
  tensors = {}
  for name, shape in weights.published_shapes(open_clip.entries(config), shapes(config)).items():
    theirs = name if config.custom_text else name.removeprefix('text.')
    tensors[theirs] = weight(theirs, shape)
  return jax.tree.map(jnp.asarray, open_clip.params_from_open_clip(tensors, config, 'golden'))


def load(family):
  """(config, functions, params) with the golden weights, by open_clip's names."""
  config = golden_clip.FAMILIES[family]
  return config, clip.functions(config), params(config, golden_clip.weight)


def near(got, want, tolerance):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_model_has_the_parameters_that_its_numbers_say(family):
  config = golden_clip.FAMILIES[family]
  tree = jax.eval_shape(clip.functions(config).init, jax.random.key(0))
  found = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert found == shapes(config)


@pytest.mark.parametrize('family', FAMILIES)
def test_features_and_logits(family):
  config, functions, params = load(family)
  image = jax.jit(functions.encode_image)(params, golden_clip.images(config))
  text = jax.jit(functions.encode_text)(params, golden_clip.texts(config))
  near(image, GOLDEN[f'{family}/image'], 1e-5)
  near(text, GOLDEN[f'{family}/text'], 1e-5)
  logits = jnp.exp(params['logit_scale']) * losses.normalize(image) @ losses.normalize(text).T
  near(logits + params.get('logit_bias', 0), GOLDEN[f'{family}/logits'], 1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_loss_gradients_and_recorded_statistics(family):
  config, functions, params = load(family)
  sigmoid = config.init_logit_bias is not None

  def loss_of(params):
    features, recorded = functions.encode(
      params, golden_clip.images(config), golden_clip.texts(config), jax.random.key(0)
    )
    return losses.LOSSES['siglip' if sigmoid else 'clip'].function(**features), recorded

  (loss, recorded), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  near(loss, GOLDEN[f'{family}/loss'], 1e-6)

  wanted = {
    name.split('/', 2)[2]: value
    for name, value in GOLDEN.items()
    if name.startswith(f'{family}/gradient/')
  }
  largest = max(wanted.values())
  found = open_clip.params_to_open_clip(jax.device_get(gradients), config)
  statistics = {name for name in found if 'running_' in name or 'num_batches' in name}
  assert found.keys() - statistics == wanted.keys()
  assert all(not found[name].any() for name in statistics)  # they are not trained
  for name, want in wanted.items():
    # A bias that softmax does not see has a gradient of rounding errors alone.
    assert abs(np.linalg.norm(found[name]) - want) <= 1e-4 * want + 1e-7 * largest, name

  recorded = weights.flat(recorded)
  wanted = {
    name.split('/', 2)[2]: value
    for name, value in GOLDEN.items()
    if name.startswith(f'{family}/recorded/')
  }
  assert recorded.keys() == wanted.keys()
  for name, want in wanted.items():
    near(recorded[name], want, 1e-5)
