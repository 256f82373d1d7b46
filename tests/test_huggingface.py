"""transformers' names: both ways without a bit lost, and what it cannot say."""

import dataclasses

import numpy as np
import pytest
from test_shapes import CONFIGS
from test_weights import make, same

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.models import huggingface, open_clip, weights, zoo

CLIP = CONFIGS['vit']
SIGLIP = dataclasses.replace(
  CONFIGS['siglip'],
  custom_text=True,
  text=dataclasses.replace(
    CONFIGS['siglip'].text,
    pool_type='last',
    causal=False,
    tokenizer='siglip',
    tokenizer_kwargs=(('clean', 'canonicalize'),),
  ),
)


def replaced(config, tower, **numbers):
  return dataclasses.replace(
    config, **{tower: dataclasses.replace(getattr(config, tower), **numbers)}
  )


@pytest.mark.parametrize(
  'config',
  [
    CLIP,
    SIGLIP,
    zoo.with_quickgelu(CLIP),
    replaced(CLIP, 'text', pool_type='eos', eos_id=5, activation='gelu_tanh', eps=1e-6),
    replaced(CLIP, 'vision', mlp_ratio=70 / 16),
    dataclasses.replace(CLIP, init_logit_scale=1.5),
  ],
)
def test_both_ways(config):
  assert huggingface.config_from_huggingface(huggingface.config_to_huggingface(config)) == config
  params = make(config)
  tensors = huggingface.params_to_huggingface(params, config)
  assert huggingface.is_huggingface(tensors)
  assert not huggingface.is_huggingface(open_clip.params_to_open_clip(params, config))
  assert same(huggingface.params_from_huggingface(tensors, config, 'F'), params)
  old = tensors | {
    f'{tower}_model.embeddings.position_ids': np.arange(6)[None] for tower in ('text', 'vision')
  }
  assert same(huggingface.params_from_huggingface(old, config, 'F'), params)


def test_q_k_and_v_are_three_and_projections_are_transposed():
  params = weights.flat(make(CLIP))
  tensors = huggingface.params_to_huggingface(make(CLIP), CLIP)
  joined = params['text.transformer.resblocks.0.attn.in_proj_weight']
  for i, part in enumerate('qkv'):
    name = f'text_model.encoder.layers.0.self_attn.{part}_proj.weight'
    assert np.array_equal(tensors[name], joined[8 * i : 8 * (i + 1)])
  assert np.array_equal(tensors['visual_projection.weight'], params['visual.proj'].T)
  assert np.array_equal(tensors['text_projection.weight'], params['text.text_projection'].T)


def test_every_mlp_width_is_kept():
  for width in (384, 1024, 1152, 1408, 1664):
    for hidden in range(2 * width, 5 * width, 37):
      found = huggingface._tower(
        dict(
          hidden_size=width,
          intermediate_size=hidden,
          hidden_act='gelu',
          layer_norm_eps=1,
          num_hidden_layers=1,
          num_attention_heads=1,
        )
      )
      assert int(width * found['mlp_ratio']) == hidden


def test_numbers_that_a_config_leaves_out():
  found = huggingface.config_from_huggingface(
    {'model_type': 'clip', 'text_config': {'eos_token_id': 2}, 'vision_config': {}}
  )
  assert found == zoo.by_name('ViT-B-32-quickgelu')
  large = {
    'hidden_size': 1024,
    'num_hidden_layers': 24,
    'num_attention_heads': 16,
    'patch_size': 14,
    'intermediate_size': 4096,
  }
  text = {
    'hidden_size': 768,
    'num_attention_heads': 12,
    'intermediate_size': 3072,
    'eos_token_id': 2,
  }
  found = huggingface.config_from_huggingface(
    {
      'model_type': 'clip',
      'projection_dim': 768,
      'logit_scale_init_value': 2.6592,
      'text_config': {},
      'text_config_dict': text,
      'vision_config': {},
      'vision_config_dict': large,
    }
  )
  assert found == zoo.by_name('ViT-L-14-quickgelu')
  siglip = huggingface.config_from_huggingface(
    {'model_type': 'siglip', 'vision_config': {}, 'text_config': {}}
  )
  assert siglip.vision.activation == 'gelu_tanh' and siglip.text.context_length == 64


@pytest.mark.parametrize(
  'config, match',
  [
    (CONFIGS['resnet'], 'ResNet'),
    (CONFIGS['layer scale, a bias'], "vision.pool_type='avg'"),
    (replaced(CLIP, 'vision', ls_init_value=0.1), 'ls_init_value=0.1'),
    (replaced(CLIP, 'text', causal=False), 'text.causal=False'),
    (CONFIGS['no projection'], "text.proj='none'"),
    (replaced(CLIP, 'text', pool_type='eos', eos_id=2), 'eos_token_id=2'),
    (dataclasses.replace(CLIP, init_logit_bias=0.0), 'init_logit_bias=0.0'),
    (replaced(SIGLIP, 'text', pool_type='argmax'), "SiglipModel has no text.pool_type='argmax'"),
  ],
)
def test_what_it_cannot_say(config, match):
  with pytest.raises(ConfigError, match=match):
    huggingface.config_to_huggingface(config)


@pytest.mark.parametrize(
  'found, match',
  [
    ({'model_type': 'bert'}, "model_type='bert'"),
    ({}, 'model_type=None'),
    ({'model_type': 'clip', 'text_config': {'hidden_act': 'relu'}}, "hidden_act='relu'"),
    ({'model_type': 'clip', 'vision_config': {'num_channels': 1}}, 'num_channels=1'),
    ({'model_type': 'siglip', 'text_config': {'projection_size': 3}}, 'text vectors of 3'),
    ({'model_type': 'clip', 'text_config': 3}, 'cannot be read'),
  ],
)
def test_configs_that_are_not_built(found, match):
  with pytest.raises(ConfigError, match=match):
    huggingface.config_from_huggingface(found)


def test_another_model_is_an_error():
  tensors = huggingface.params_to_huggingface(make(CLIP), CLIP)
  del tensors['text_model.encoder.layers.0.self_attn.k_proj.weight']
  with pytest.raises(InputError, match='needs text_model.encoder.layers.0.self_attn.k_proj.weight'):
    huggingface.params_from_huggingface(tensors, CLIP, 'F')


def test_models_that_fit_by_shape():
  config = zoo.by_name('ViT-S-32')
  shapes = weights.published_shapes(huggingface.entries(config), weights.shapes(config))
  tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  assert huggingface.matching_models(tensors) == ['ViT-S-32']


def test_numbers_that_make_no_model():
  found = huggingface.config_to_huggingface(zoo.by_name('ViT-B-32'))
  for tower, key, value, match in (
    ('vision_config', 'patch_size', 0, 'patch_size=0'),
    ('vision_config', 'hidden_size', 0, 'ZeroDivision'),
    (
      'text_config',
      'num_attention_heads',
      3,
      'text.heads=3, which must be a divisor of the width, 512',
    ),
    ('vision_config', 'image_size', [32, 64], 'image_size='),
  ):
    with pytest.raises(ConfigError, match=match):
      huggingface.config_from_huggingface(found | {tower: found[tower] | {key: value}})
  with pytest.raises(ConfigError, match='model_type=.*clip, siglip'):
    huggingface.config_from_huggingface(found | {'model_type': ['clip']})
  two = found | {'vision_config': found['vision_config'] | {'image_size': [224, 224]}}
  assert huggingface.config_from_huggingface(two).image_size == 224


@pytest.mark.parametrize(
  'given',
  [
    {'do_normalize': False},
    {'do_rescale': False},
    {'do_resize': None},
    {'rescale_factor': 1 / 127.5},
  ],
)
def test_preprocessing_that_is_not_built(given):
  with pytest.raises(ConfigError, match=next(iter(given))):
    huggingface.preprocess_from_huggingface(given)


def test_images_cropped_from_a_larger_size_are_said(caplog):
  huggingface.preprocess_from_huggingface({'size': {'shortest_edge': 24}, 'crop_size': 24})
  huggingface.preprocess_from_huggingface({'size': 24})
  assert not caplog.records
  huggingface.preprocess_from_huggingface(
    {'size': {'shortest_edge': 32}, 'crop_size': {'height': 24}}
  )
  assert '32 pixels and cropped to 24' in caplog.text


def test_preprocessing_both_ways():
  for resize in ('shortest', 'squash'):
    given = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), resize=resize)
    assert (
      huggingface.preprocess_from_huggingface(huggingface.preprocess_to_huggingface(24, given))
      == given
    )
  old = {'size': 224, 'do_center_crop': True, 'crop_size': 224}  # as OpenAI's first files have it
  assert huggingface.preprocess_from_huggingface(old) == dict(
    mean=open_clip.OPENAI_MEAN, std=open_clip.OPENAI_STD, resize='shortest'
  )
