"""Converts models from and to transformers' CLIPModel and SiglipModel: configs and tensors.

Both classes support one architecture per tower. Writing a model that they cannot express (ResNets,
layer scale, average pooling, a CLIP text tower without a causal mask, ...) raises ConfigError.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from absl import logging

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array
from clip_jax.models import open_clip, weights, zoo
from clip_jax.models.shapes import shapes

_ACTIVATIONS = {'gelu': 'gelu', 'quick_gelu': 'quick_gelu', 'gelu_pytorch_tanh': 'gelu_tanh'}
# (our name, transformers' name), replaced in this order: first for both towers, then for one.
_BOTH = (
  ('transformer.resblocks.', 'encoder.layers.'),
  ('.ln_1.', '.layer_norm1.'),
  ('.ln_2.', '.layer_norm2.'),
  ('.attn.out_proj.', '.self_attn.out_proj.'),
  ('.mlp.c_fc.', '.mlp.fc1.'),
  ('.mlp.c_proj.', '.mlp.fc2.'),
  ('positional_embedding', 'embeddings.position_embedding.weight'),
)
_VISION = (
  ('class_embedding', 'embeddings.class_embedding'),
  ('conv1.', 'embeddings.patch_embedding.'),
  ('ln_pre.', 'pre_layrnorm.'),
  ('ln_post.', 'post_layernorm.'),
  ('attn_pool.latent', 'head.probe'),
  ('attn_pool.proj.', 'head.attention.out_proj.'),
  ('attn_pool.norm.', 'head.layernorm.'),
  ('attn_pool.mlp.', 'head.mlp.'),
)
_TEXT = (
  ('token_embedding.', 'embeddings.token_embedding.'),
  ('ln_final.', 'final_layer_norm.'),
  ('text_projection.', 'head.'),
)
# transformers' defaults for keys missing in a config.json: (vision, text).
_DEFAULTS = {
  'clip': (
    dict(
      hidden_size=768,
      intermediate_size=3072,
      num_hidden_layers=12,
      num_attention_heads=12,
      image_size=224,
      patch_size=32,
      hidden_act='quick_gelu',
      layer_norm_eps=1e-5,
      num_channels=3,
    ),
    dict(
      hidden_size=512,
      intermediate_size=2048,
      num_hidden_layers=12,
      num_attention_heads=8,
      vocab_size=49_408,
      max_position_embeddings=77,
      hidden_act='quick_gelu',
      layer_norm_eps=1e-5,
      eos_token_id=49_407,
    ),
  ),
  'siglip': (
    dict(
      hidden_size=768,
      intermediate_size=3072,
      num_hidden_layers=12,
      num_attention_heads=12,
      image_size=224,
      patch_size=16,
      hidden_act='gelu_pytorch_tanh',
      layer_norm_eps=1e-6,
      num_channels=3,
      vision_use_head=True,
    ),
    dict(
      hidden_size=768,
      intermediate_size=3072,
      num_hidden_layers=12,
      num_attention_heads=12,
      vocab_size=32_000,
      max_position_embeddings=64,
      hidden_act='gelu_pytorch_tanh',
      layer_norm_eps=1e-6,
      projection_size=None,
    ),
  ),
}
_BICUBIC = 3  # PIL's constant, as in preprocessor_config.json


def config_from_huggingface(config_json: Mapping[str, Any]) -> zoo.CLIPConfig:
  """Converts a config.json of CLIPModel or SiglipModel; raises ConfigError for other models."""
  kind = config_json.get('model_type')
  if not isinstance(kind, str) or kind not in _DEFAULTS:
    raise ConfigError(
      f"config.json has model_type={kind!r}; transformers' supported models are "
      f'{", ".join(_DEFAULTS)}.'
    )
  try:
    # Older files have defaults in text_config, and the real values in text_config_dict.
    v, t = (
      {
        **defaults,
        **(config_json.get(f'{tower}_config') or {}),
        **(config_json.get(f'{tower}_config_dict') or {}),
      }
      for tower, defaults in zip(('vision', 'text'), _DEFAULTS[kind])
    )
    if v['num_channels'] != 3 or not v.get('vision_use_head', True):
      raise ConfigError(
        'config.json describes an unsupported image tower: '
        f'num_channels={v["num_channels"]}, '
        f'vision_use_head={v.get("vision_use_head", True)}.'
      )
    size: Any = v['image_size']
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size  # [height, width]
    vision = zoo.ViTConfig(size, v['patch_size'], **_tower(v))
    if kind == 'clip':
      argmax = t['eos_token_id'] == 2  # a former default, which transformers treats as argmax
      text = zoo.TextConfig(
        t['max_position_embeddings'],
        t['vocab_size'],
        **_tower(t),
        pool_type='argmax' if argmax else 'eos',
        eos_id=t['eos_token_id'],
      )
      scale = config_json.get('logit_scale_init_value')
      return open_clip.checked(
        zoo.CLIPConfig(
          config_json.get('projection_dim', 512),
          vision,
          text,
          zoo.CLIPConfig.init_logit_scale if scale in (None, 2.6592) else scale,
        )
      )
    vision = dataclasses.replace(
      vision, pool_type='map', class_token=False, patch_bias=True, ln_pre=False, proj=False
    )
    text = zoo.TextConfig(
      t['max_position_embeddings'],
      t['vocab_size'],
      **_tower(t),
      pool_type='last',
      causal=False,
      proj='bias',
      tokenizer='siglip',
      tokenizer_kwargs=(('clean', 'canonicalize'),),
    )
    if vision.width != (t['projection_size'] or text.width):
      raise ConfigError(
        f'config.json has image vectors of {vision.width} numbers, but text vectors '
        f'of {t["projection_size"] or text.width}.'
      )
    return open_clip.checked(
      zoo.CLIPConfig(vision.width, vision, text, init_logit_bias=-10.0, custom_text=True)
    )
  except (KeyError, TypeError, ZeroDivisionError) as error:
    raise ConfigError(
      f'config.json cannot be read as a model of type {kind}: {error!r}.'
    ) from error


def _tower(config_json: Mapping[str, Any]) -> dict[str, Any]:
  if config_json['hidden_act'] not in _ACTIVATIONS:
    raise ConfigError(
      f'config.json has hidden_act={config_json["hidden_act"]!r}; supported are '
      f'{", ".join(_ACTIVATIONS)}.'
    )
  width, hidden = config_json['hidden_size'], config_json['intermediate_size']
  ratio = hidden / width
  if int(width * ratio) != hidden:  # float rounding gave hidden - 1
    ratio += 0.5 / width
  return dict(
    width=width,
    mlp_ratio=ratio,
    layers=config_json['num_hidden_layers'],
    heads=config_json['num_attention_heads'],
    activation=_ACTIVATIONS[config_json['hidden_act']],
    eps=config_json['layer_norm_eps'],
  )


def config_to_huggingface(config: zoo.CLIPConfig) -> dict[str, Any]:
  """Returns the config.json of a model; raises ConfigError if transformers cannot express it."""
  kind = _kind(config)
  v, t = config.vision, config.text
  assert isinstance(v, zoo.ViTConfig)  # `entries` refuses ResNets
  names = {activation: name for name, activation in _ACTIVATIONS.items()}

  def tower(c: zoo.ViTConfig | zoo.TextConfig) -> dict[str, Any]:
    return dict(
      hidden_size=c.width,
      intermediate_size=int(c.width * c.mlp_ratio),
      num_hidden_layers=c.layers,
      num_attention_heads=c.heads,
      hidden_act=names[c.activation],
      layer_norm_eps=c.eps,
    )

  text = tower(t) | dict(vocab_size=t.vocab_size, max_position_embeddings=t.context_length)
  vision = tower(v) | dict(image_size=v.image_size, patch_size=v.patch_size)
  config_json = dict(model_type=kind, dtype='float32', text_config=text, vision_config=vision)
  if kind == 'siglip':
    text['projection_size'] = config.embed_dim
    return config_json | dict(architectures=['SiglipModel'])
  text |= dict(
    projection_dim=config.embed_dim, eos_token_id=2 if t.pool_type == 'argmax' else t.eos_id
  )
  vision['projection_dim'] = config.embed_dim
  return config_json | dict(
    architectures=['CLIPModel'],
    projection_dim=config.embed_dim,
    logit_scale_init_value=config.init_logit_scale,
  )


def _kind(config: zoo.CLIPConfig) -> str:
  """Returns 'clip' or 'siglip'; raises ConfigError if the model is neither."""
  v, t = config.vision, config.text
  if isinstance(v, zoo.ResNetConfig):
    raise ConfigError("transformers has no CLIP with a ResNet; use open_clip's format.")
  kind = 'siglip' if v.pool_type == 'map' else 'clip'
  clip = kind == 'clip'
  rules = {
    'vision.pool_type': (v.pool_type, ('tok',) if clip else ('map',)),
    'vision.class_token': (v.class_token, (clip,)),
    'vision.patch_bias': (v.patch_bias, (not clip,)),
    'vision.ln_pre': (v.ln_pre, (clip,)),
    'vision.proj': (v.proj, (clip,)),
    'vision.ls_init_value': (v.ls_init_value, (None,)),
    'text.ls_init_value': (t.ls_init_value, (None,)),
    'text.pool_type': (t.pool_type, ('argmax', 'eos') if clip else ('last',)),
    'text.causal': (t.causal, (clip,)),
    'text.proj': (t.proj, ('linear',) if clip else ('bias',)),
    'init_logit_bias': (
      config.init_logit_bias,
      (None,) if clip else (config.init_logit_bias or 0.0,),
    ),
  }
  for name, (value, allowed) in rules.items():
    if value not in allowed:
      raise ConfigError(
        f"transformers' {'CLIPModel' if clip else 'SiglipModel'} has no "
        f"{name}={value!r}; use open_clip's format."
      )
  if clip and t.pool_type == 'eos' and t.eos_id == 2:
    raise ConfigError(
      "with eos_token_id=2, transformers' CLIPModel takes the text feature at the token with the "
      "highest id, not at the end token. Use open_clip's format."
    )
  return kind


def entries(config: zoo.CLIPConfig) -> list[weights.Entry]:
  """Returns the entries (parameters and transformers' tensors) of a model; q, k, v are fused."""
  table = []
  clip = _kind(config) == 'clip'
  for path in shapes(config):
    tower, _, name = path.partition('.')
    if tower in ('logit_scale', 'logit_bias'):
      table.append(weights.Entry((path,), (path,), 'same' if clip else 'row'))
    elif name in ('proj', 'text_projection'):
      tensor = 'visual_projection.weight' if name == 'proj' else 'text_projection.weight'
      table.append(weights.Entry((path,), (tensor,), 'transposed'))
    elif name.startswith('attn_pool.q.'):
      part = name.rsplit('.', 1)[1]
      table.append(
        weights.Entry(
          (path, path.replace('.q.', '.kv.')), (f'vision_model.head.attention.in_proj_{part}',)
        )
      )
    elif not name.startswith('attn_pool.kv.'):
      prefix, own = ('vision_model.', _VISION) if tower == 'visual' else ('text_model.', _TEXT)
      name = weights.rename_tensor(name, (*_BOTH, *own))
      block, in_proj, part = name.partition('.attn.in_proj_')
      names = [f'{block}.self_attn.{x}_proj.{part}' for x in 'qkv'] if in_proj else [name]
      table.append(weights.Entry((path,), tuple(prefix + name for name in names)))
  return table


def is_huggingface(tensors: Mapping[str, Array]) -> bool:
  return any(name.startswith('vision_model.') for name in tensors)


def _without_position_ids(tensors: Mapping[str, Array]) -> dict[str, Array]:
  """Returns the tensors without position_ids (0, 1, 2, ...), which older versions stored."""
  return {name: array for name, array in tensors.items() if not name.endswith('.position_ids')}


def params_from_huggingface(
  tensors: Mapping[str, Array], config: zoo.CLIPConfig, where: str
) -> dict:
  """Converts a state_dict of CLIPModel or SiglipModel; raises InputError if it does not fit."""
  return weights.params_from_tensors(entries(config), _without_position_ids(tensors), config, where)


def params_to_huggingface(params: Mapping, config: zoo.CLIPConfig) -> dict[str, Array]:
  """Converts parameters to the tensors of model.safetensors."""
  return weights.tensors_from_params(entries(config), params, config)


def matching_models(tensors: Mapping[str, Array]) -> list[str]:
  """Returns the zoo's models that have these tensors, at any image size."""
  return weights.matching_models(entries, _without_position_ids(tensors))


def preprocess_from_huggingface(
  config_json: Mapping[str, Any], where: str = weights.PREPROCESSOR
) -> dict[str, Any]:
  """Returns dict(mean, std, resize) of an image processor's config; `where` is its file."""
  size = config_json.get('size', {})
  exact = isinstance(size, Mapping) and 'height' in size and not config_json.get('do_center_crop')
  for key, wanted in (
    ('do_resize', True),
    ('do_rescale', True),
    ('do_normalize', True),
    ('rescale_factor', 1 / 255),
  ):
    value = config_json.get(key, wanted)
    if not isinstance(value, (int, float)) or abs(value - wanted) > 1e-6:
      raise ConfigError(f'{where} has {key}={value!r}; supported is {wanted}.')
  given = dict(
    mean=config_json.get('image_mean') or open_clip.OPENAI_MEAN,
    std=config_json.get('image_std') or open_clip.OPENAI_STD,
    resize='squash' if exact else 'shortest',
  )
  edge, crop = (
    value.get(key) if isinstance(value, Mapping) else value
    for value, key in ((size, 'shortest_edge'), (config_json.get('crop_size'), 'height'))
  )
  if edge and crop and edge != crop:
    logging.warning(
      'These weights need images resized to %s pixels and cropped to %s; instead they are '
      "resized to the model's size, without that crop.",
      edge,
      crop,
    )
  resample = config_json.get('resample', _BICUBIC)
  return open_clip.checked_preprocess(
    given, 'bicubic' if resample == _BICUBIC else f"PIL's resample={resample}"
  )


def preprocess_to_huggingface(image_size: int, preprocess: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the preprocessor_config.json of CLIPImageProcessor."""
  square, shortest = dict(height=image_size, width=image_size), preprocess['resize'] == 'shortest'
  return dict(
    image_processor_type='CLIPImageProcessor',
    do_convert_rgb=True,
    do_resize=True,
    size=dict(shortest_edge=image_size) if shortest else square,
    resample=_BICUBIC,
    do_center_crop=shortest,
    crop_size=square,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(preprocess['mean']),
    image_std=list(preprocess['std']),
  )
