"""The shapes from a config's numbers are those that the towers make."""

import dataclasses

import jax
import pytest

from clip_jax.models import clip, weights, zoo
from clip_jax.models.shapes import shapes

TEXT = zoo.TextConfig(6, 20, 8, 2, 1)
VIT = zoo.ViTConfig(16, 4, 16, 2, 2)
CONFIGS = {
  'vit': zoo.CLIPConfig(8, VIT, TEXT),
  'layer scale, a bias': zoo.CLIPConfig(
    8,
    dataclasses.replace(VIT, ls_init_value=1e-4, pool_type='avg', ln_pre=False, mlp_ratio=4.3637),
    dataclasses.replace(TEXT, ls_init_value=1e-4, proj='bias'),
    init_logit_bias=-10.0,
  ),
  'resnet': zoo.CLIPConfig(8, zoo.ResNetConfig(64, 8, (2, 1, 1, 1), 4), TEXT),
  'siglip': zoo.CLIPConfig(
    16,
    dataclasses.replace(
      VIT, pool_type='map', class_token=False, patch_bias=True, ln_pre=False, proj=False
    ),
    dataclasses.replace(TEXT, proj='bias', width=16),
    init_logit_bias=-10.0,
  ),
  'no projection': zoo.CLIPConfig(8, VIT, dataclasses.replace(TEXT, proj='none')),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_they_are_the_towers_own(name):
  config = CONFIGS[name]
  made = jax.eval_shape(clip.functions(config).init, jax.random.key(0))
  found = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(made)
  }
  assert found == shapes(config)
  paths = weights.nested({path: path for path in found})
  assert jax.tree.structure(jax.tree.map(lambda _: 0, made)) == jax.tree.structure(
    jax.tree.map(lambda _: 0, paths)
  )
