"""open_clip's names: both ways without a bit lost, for every family of towers."""

import dataclasses

import numpy as np
import pytest
from test_shapes import CONFIGS
from test_weights import CONFIG, make, same

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.models import open_clip, weights, zoo
from clip_jax.models.shapes import shapes


@pytest.mark.parametrize('name', zoo.ARCHITECTURES)
def test_a_config_survives_the_way_there_and_back(name):
  config = zoo.by_name(name)
  assert open_clip.config_from_open_clip(open_clip.config_to_open_clip(config)) == config


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('custom', [False, True])
def test_parameters_survive_the_way_there_and_back(name, custom):
  config = dataclasses.replace(CONFIGS[name], custom_text=custom)
  params = make(config)
  tensors = open_clip.params_to_open_clip(params, config)
  assert any(name.startswith('text.') for name in tensors) == custom
  for read_as in (False, True):  # whichever names the config says, both are read
    other = dataclasses.replace(config, custom_text=read_as)
    assert same(open_clip.params_from_open_clip(tensors, other, 'F'), params)


def test_names_of_clip():
  names = open_clip.params_to_open_clip(make(CONFIGS['vit']), CONFIGS['vit']).keys()
  assert {
    'visual.proj',
    'token_embedding.weight',
    'text_projection',
    'logit_scale',
    'visual.transformer.resblocks.1.attn.in_proj_weight',
    'transformer.resblocks.0.mlp.c_fc.bias',
  } <= names


def test_names_of_timms_tower():
  tensors = open_clip.params_to_open_clip(make(CONFIGS['siglip']), CONFIGS['siglip'])
  found = {
    name.removeprefix('visual.trunk.'): array.shape
    for name, array in tensors.items()
    if name.startswith('visual.')
  }
  assert found.pop('pos_embed') == (1, 16, 16) and found['attn_pool.latent'] == (1, 1, 16)
  assert {name.split('.')[0] for name in found} == {'patch_embed', 'blocks', 'norm', 'attn_pool'}
  block = {name.removeprefix('blocks.0.') for name in found if name.startswith('blocks.0.')}
  assert block == {
    f'{name}.{part}'
    for name in ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
    for part in ('weight', 'bias')
  }


def test_the_counters_of_batch_norm_are_written_as_0_and_not_read():
  config = CONFIGS['resnet']
  tensors = open_clip.params_to_open_clip(make(config), config)
  counters = {
    name: array for name, array in tensors.items() if name.endswith('num_batches_tracked')
  }
  norms = [name for name in tensors if name.endswith('running_mean')]
  assert len(counters) == len(norms) == 3 + 5 * 3 + 4
  assert all(array.dtype == np.int64 and array.shape == () for array in counters.values())
  without = {name: array for name, array in tensors.items() if name not in counters}
  assert same(open_clip.params_from_open_clip(without, config, 'F'), make(config))


def test_a_scale_with_an_axis_and_a_bias_that_is_not_there():
  config = CONFIGS['siglip']
  tensors = open_clip.params_to_open_clip(make(config), config)
  tensors['logit_scale'] = tensors['logit_scale'][None]
  del tensors['logit_bias']
  found = open_clip.params_from_open_clip(tensors, config, 'F')
  assert found['logit_scale'] == make(config)['logit_scale'] and found['logit_bias'] == 0


def test_another_model_is_an_error():
  tensors = open_clip.params_to_open_clip(make(CONFIGS['resnet']), CONFIGS['resnet'])
  with pytest.raises(InputError, match='F does not hold this model'):
    open_clip.params_from_open_clip(tensors, CONFIGS['vit'], 'F')


def blank(config):
  """Tensors of the right shapes that take no memory."""
  return {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in weights.published_shapes(open_clip.entries(config), shapes(config)).items()
  }


@pytest.mark.parametrize(
  'name, fit',
  [
    ('ViT-B-32', ['ViT-B-32', 'ViT-B-32-256', 'ViT-B-32-quickgelu']),
    ('ViT-S-32', ['ViT-S-32']),
    ('RN50x4', ['RN50x4', 'RN50x4-quickgelu']),
    (
      'ViT-B-16-SigLIP-384',
      ['ViT-B-16-SigLIP', 'ViT-B-16-SigLIP-256', 'ViT-B-16-SigLIP-384', 'ViT-B-16-SigLIP-512'],
    ),
  ],
)
def test_models_that_fit_by_shape(name, fit):
  assert open_clip.matching_models(blank(zoo.by_name(name))) == fit


def test_preprocessing_both_ways():
  config = zoo.by_name('ViT-B-16-SigLIP')
  default = open_clip.default_preprocess(config)
  assert default == dict(mean=(0.5,) * 3, std=(0.5,) * 3, resize='squash')
  written = open_clip.preprocess_to_open_clip(224, default)
  assert open_clip.preprocess_from_open_clip(written, config) == default
  plain = open_clip.default_preprocess(zoo.by_name('ViT-B-32'))
  assert plain['resize'] == 'shortest' and plain['mean'] == open_clip.OPENAI_MEAN
  assert open_clip.preprocess_from_open_clip({}, config) == plain  # open_clip's own defaults
  assert open_clip.default_preprocess(zoo.by_name('ViT-L-14-CLIPA'))['mean'][0] == 0.485
  with pytest.raises(ConfigError, match='longest'):
    open_clip.preprocess_from_open_clip({'resize_mode': 'longest'}, config)
  assert open_clip.preprocess_from_open_clip({'mean': 0.5}, config)['mean'] == (0.5, 0.5, 0.5)
  for mean in ((0.5,), 'abc', (None, 1, 1), (float('nan'),) * 3, {'r': 1}):
    with pytest.raises(ConfigError, match='three means'):
      open_clip.preprocess_from_open_clip({'mean': mean}, config)


@pytest.mark.parametrize(
  'block, key, value, match',
  [
    ('vision_cfg', 'layers', '1', "vision.layers='1', which must be a whole number above 0"),
    ('vision_cfg', 'layers', [1, 1], 'vision.layers=.1, 1., which must be four whole numbers'),
    ('vision_cfg', 'width', 16.5, 'vision.width=16.5'),
    ('vision_cfg', 'patch_size', 0, 'patch_size=0'),
    ('vision_cfg', 'image_size', 4, 'patch_size=16, which must be at most the image size, 4'),
    ('vision_cfg', 'image_size', [32, 64], 'image_size=.32, 64.'),
    ('vision_cfg', 'head_width', 0, 'wrong type'),
    ('vision_cfg', 'head_width', 2000, 'vision.heads=0'),
    ('vision_cfg', 'head_width', 80, 'vision.heads=9, which must be a divisor of the width, 768'),
    ('text_cfg', 'heads', 7, 'text.heads=7, which must be a divisor of the width, 512'),
    ('text_cfg', 'heads', True, 'text.heads=True'),
    ('text_cfg', 'context_length', None, 'context_length=None'),
    ('text_cfg', 'mlp_ratio', '4', "mlp_ratio='4', which must be a number"),
    ('text_cfg', 'tokenizer_kwargs', 'abc', 'wrong type'),
    ('', 'embed_dim', '8', "embed_dim='8'"),
    ('', 'init_logit_scale', 'x', 'init_logit_scale'),
    ('', 'vision_cfg', 'ViT', "vision_cfg='ViT'"),
  ],
)
def test_numbers_that_make_no_model(block, key, value, match):
  model = open_clip.config_to_open_clip(zoo.by_name('ViT-B-16'))
  (model[block] if block else model)[key] = value
  with pytest.raises(ConfigError, match=match):
    open_clip.config_from_open_clip(model)


def test_a_square_image_size_may_be_two_numbers():
  model = open_clip.config_to_open_clip(zoo.by_name('ViT-B-16'))
  model['vision_cfg']['image_size'] = [224, 224]
  assert open_clip.config_from_open_clip(model) == zoo.by_name('ViT-B-16')


def test_a_tensor_under_both_of_its_names():
  tensors = open_clip.params_to_open_clip(make(), CONFIG)
  tensors['text.positional_embedding'] = tensors['positional_embedding']
  with pytest.raises(InputError, match='F holds positional_embedding twice'):
    open_clip.params_from_open_clip(tensors, CONFIG, 'F')
