"""open_clip's names, checked by the parameter counts that it publishes."""

import math

import jax
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.models import clip
from clip_jax.models import zoo


def count(c):
  """Parameters of a CLIP, term by term."""
  def blocks(width, layers, mlp_width):
    return layers * (4 * width * width + 4 * width + 4 * width
                     + 2 * width * mlp_width + mlp_width + width)
  patches = (c.image_size // c.patch_size) ** 2
  vision = (3 * c.patch_size ** 2 * c.vision_width + (patches + 2) * c.vision_width
            + 4 * c.vision_width + c.vision_width * c.embed_dim
            + blocks(c.vision_width, c.vision_layers, int(c.mlp_ratio * c.vision_width)))
  text = ((c.vocab_size + c.context_length + 2 + c.embed_dim) * c.text_width
          + blocks(c.text_width, c.text_layers, 4 * c.text_width))
  return vision + text + 1


def test_the_count_is_the_models():
  config = zoo.get('ViT-B-16-plus-240')
  shapes = jax.eval_shape(clip.functions(config).init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count(config)


@pytest.mark.parametrize('name, published', [
    ('ViT-B-32', 151_277_313), ('ViT-B-16', 149_620_737), ('ViT-L-14', 427_616_513)])
def test_published_counts(name, published):
  assert count(zoo.get(name)) == published


@pytest.mark.parametrize('name, millions', [
    ('ViT-B-16-plus-240', 208.38), ('ViT-g-14', 1366.68), ('ViT-bigG-14', 2539.57),
    ('ViT-H-14', 986.11), ('ViT-B-32-plus-256', 210.3)])
def test_published_counts_in_millions(name, millions):
  assert round(count(zoo.get(name)) / 1e6, 2) == millions


def test_every_entry_is_consistent():
  for name, config in zoo.ARCHITECTURES.items():
    assert config.vision_width % config.vision_heads == 0, name
    assert config.text_width == 64 * config.text_heads, name
    assert config.quick_gelu == name.endswith('quickgelu'), name


def test_an_unknown_name_gives_the_nearest():
  with pytest.raises(ConfigError, match="'vit-b32'.*ViT-B-32"):
    zoo.get('vit-b32')
