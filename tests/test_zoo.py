"""open_clip's names: every tensor's name and shape, and the parameter counts that it publishes."""

import hashlib
import json
import math
import pathlib

import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.models import open_clip, weights, zoo
from clip_jax.models.shapes import shapes

# Of open_clip itself, by make_golden.py.
GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden/zoo.json').read_text())


def theirs(config):
  """{open_clip's name: shape}."""
  found = weights.published_shapes(open_clip.entries(config), shapes(config))
  return {
    name if config.custom_text else name.removeprefix('text.'): shape
    for name, shape in found.items()
  }


@pytest.mark.parametrize('name', sorted(zoo.ARCHITECTURES))
def test_names_shapes_and_counts_are_open_clips(name):
  found = theirs(zoo.by_name(name))
  lines = sorted(f'{key} {list(shape)}' for key, shape in found.items())
  trained = sum(math.prod(shape) for key, shape in found.items() if 'running_' not in key)
  assert len(lines) == GOLDEN[name]['tensors']
  assert trained == GOLDEN[name]['parameters']
  assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == GOLDEN[name]['sha256']


def test_the_golden_file_has_every_model():
  assert set(GOLDEN) == set(zoo.ARCHITECTURES)


# docs/model_profile.csv of open_clip, millions of parameters.
@pytest.mark.parametrize(
  'name, millions',
  [
    ('ViT-B-32', 151.28),
    ('ViT-B-16', 149.62),
    ('ViT-L-14', 427.62),
    ('ViT-B-16-plus-240', 208.38),
    ('ViT-g-14', 1366.68),
    ('ViT-bigG-14', 2539.57),
    ('ViT-H-14', 986.11),
    ('RN50', 102.01),
    ('RN101', 119.69),
    ('RN50x4', 178.3),
    ('RN50x16', 290.98),
    ('RN50x64', 623.26),
    ('ViT-B-32-plus-256', 210.3),
    ('ViT-B-16-SigLIP', 203.16),
  ],
)
def test_published_counts(name, millions):
  assert round(GOLDEN[name]['parameters'] / 1e6, 2) == millions


def test_an_unknown_name_gives_the_nearest():
  with pytest.raises(ConfigError, match="'vit-b32'.*ViT-B-32"):
    zoo.by_name('vit-b32')
