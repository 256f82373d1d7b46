"""flops.py against open_clip's published counts, and the parameters against those that are made."""

import jax
import numpy as np
import pytest

from clip_jax.models import clip, flops, zoo


@pytest.mark.parametrize(
  'name, gflops', [('ViT-B-32', 8.82), ('ViT-L-14', 162.03), ('RN50', 12.22)]
)
def test_images_cost_what_open_clip_says(name, gflops):
  assert flops.image_flops(zoo.by_name(name)) / 1e9 == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize(
  'name, gflops', [('ViT-B-32', 14.78), ('ViT-L-14', 175.33), ('RN50', 18.18)]
)
def test_both_towers_cost_what_open_clip_says(name, gflops):
  config = zoo.by_name(name)
  assert flops.forward_flops(config) == flops.image_flops(config) + flops.text_flops(config)
  assert flops.forward_flops(config) / 1e9 == pytest.approx(gflops, rel=0.005)


def test_patches_and_a_class_token_by_hand():
  vision = zoo.ViTConfig(image_size=8, patch_size=4, width=6, layers=0, heads=1)
  config = zoo.CLIPConfig(5, vision, zoo.TextConfig(3, 9, 4, 1, 0))
  assert flops.image_flops(config) == 2 * (
    6 * 3 * 16 * 5 + 6 * 5
  )  # the class token counts as a patch
  assert flops.text_flops(config) == 2 * 4 * 5


@pytest.mark.parametrize('name', ['ViT-S-32-alt', 'RN50'])
def test_parameters_are_those_that_are_made(name):
  config = zoo.by_name(name)
  made = jax.eval_shape(clip.functions(config).init, jax.random.key(0))
  assert flops.parameter_count(config) == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(made))
