"""Converts models from and to open_clip: configs, tensors and preprocessing.

A parameter has the path of its tensor in open_clip's CustomTextCLIP, with `text.` before text
tensors. open_clip's CLIP class omits that prefix, and its SigLIP image towers are timm's
(`visual.trunk.*`): the tables below rename those.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.models import weights, zoo
from clip_jax.models.shapes import shapes

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, per channel, in [0, 1]
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Keys about training or downloading a model in open_clip, which do not change its output.
_IGNORED = (
  'timm_model_pretrained',
  'timm_drop',
  'timm_drop_path',
  'patch_dropout',
  'output_tokens',
  'hf_model_pretrained',
  'pad_id',
)
# Fields of the configs that must be positive integers, and those that may be any number.
_COUNTS = (
  'embed_dim',
  'image_size',
  'patch_size',
  'width',
  'layers',
  'heads',
  'context_length',
  'vocab_size',
)
_REALS = ('mlp_ratio', 'ls_init_value', 'eps', 'init_logit_scale', 'init_logit_bias')
_ACTIVATIONS = {'gelu': {}, 'gelu_tanh': {'approximate': 'tanh'}}


def _non_default(defaults: dict[str, Any], **given: Any) -> dict[str, Any]:
  """Returns the keys whose value differs from open_clip's default (None if not in `defaults`)."""
  return {key: value for key, value in given.items() if value != defaults.get(key)}


def config_to_open_clip(config: zoo.CLIPConfig) -> dict[str, Any]:
  """Returns the model_cfg (of open_clip_config.json) with which open_clip builds this model."""
  text = config.text
  proj = {'linear': {}, 'bias': {'proj_bias': True}, 'none': {'proj_type': 'none'}}[text.proj]
  return {
    'embed_dim': config.embed_dim,
    **_non_default(
      dict(quick_gelu=False, init_logit_scale=zoo.CLIPConfig.init_logit_scale, custom_text=False),
      quick_gelu=text.activation == 'quick_gelu',
      init_logit_bias=config.init_logit_bias,
      init_logit_scale=config.init_logit_scale,
      custom_text=config.custom_text,
    ),
    'vision_cfg': _vision_to_open_clip(config.vision),
    'text_cfg': {
      'context_length': text.context_length,
      'vocab_size': text.vocab_size,
      'width': text.width,
      'heads': text.heads,
      'layers': text.layers,
      **_non_default(
        dict(
          hf_tokenizer_name='',
          tokenizer_kwargs={},
          mlp_ratio=4.0,
          pool_type='argmax',
          no_causal_mask=False,
        ),
        hf_tokenizer_name=text.tokenizer,
        tokenizer_kwargs=dict(text.tokenizer_kwargs),
        mlp_ratio=text.mlp_ratio,
        pool_type=text.pool_type,
        eos_id=text.eos_id if text.pool_type == 'eos' else None,
        no_causal_mask=not text.causal,
      ),
      **proj,
      **_block_to_open_clip(text),
    },
  }


def _block_to_open_clip(tower: zoo.ViTConfig | zoo.TextConfig) -> dict[str, Any]:
  """Returns the keys that both transformers share, where they differ from open_clip's defaults."""
  return _non_default(
    dict(norm_kwargs={'eps': 1e-5}, act_kwargs={}),
    ls_init_value=tower.ls_init_value,
    norm_kwargs={'eps': tower.eps},
    act_kwargs=dict(_ACTIVATIONS.get(tower.activation, {})),
  )


def _vision_to_open_clip(vision: zoo.ViTConfig | zoo.ResNetConfig) -> dict[str, Any]:
  if isinstance(vision, zoo.ResNetConfig):
    return {
      'image_size': vision.image_size,
      'layers': list(vision.layers),
      'width': vision.width,
      'head_width': vision.width * 32 // vision.heads,
      'patch_size': None,
    }
  if vision.pool_type == 'map':
    names = [name for name, tower in zoo.TIMM_TOWERS.items() if tower == vision]
    if not names:
      raise ConfigError(
        'open_clip has no model with this attention-pooled image tower: '
        f'{dataclasses.asdict(vision)}.'
      )
    return {
      'image_size': vision.image_size,
      'timm_model_name': names[0],
      'timm_model_pretrained': False,
      'timm_pool': 'map',
      'timm_proj': 'none',
    }
  return {
    'image_size': vision.image_size,
    'layers': vision.layers,
    'width': vision.width,
    'head_width': vision.width // vision.heads,
    'patch_size': vision.patch_size,
    **_non_default(
      dict(mlp_ratio=4.0, pool_type='tok', no_ln_pre=False, final_ln_after_pool=False),
      mlp_ratio=vision.mlp_ratio,
      pool_type=vision.pool_type,
      no_ln_pre=not vision.ln_pre,
      final_ln_after_pool=vision.final_ln_after_pool,
    ),
    **_block_to_open_clip(vision),
  }


def config_from_open_clip(model: dict[str, Any]) -> zoo.CLIPConfig:
  """Converts a model_cfg of open_clip; raises ConfigError for unsupported values."""
  model = dict(model)
  try:
    for block in ('vision_cfg', 'text_cfg'):
      if not isinstance(model[block], dict):
        raise TypeError(f'{block}={model[block]!r}')
    quick_gelu = model.pop('quick_gelu', False)
    vision = _vision_from_open_clip(dict(model.pop('vision_cfg')), quick_gelu)
    config = zoo.CLIPConfig(
      model.pop('embed_dim'),
      vision,
      _text_from_open_clip(dict(model.pop('text_cfg')), quick_gelu),
      init_logit_scale=model.pop('init_logit_scale', zoo.CLIPConfig.init_logit_scale),
      init_logit_bias=model.pop('init_logit_bias', None),
      custom_text=model.pop('custom_text', False),
    )
  except KeyError as error:
    raise ConfigError(f'The model config of open_clip lacks the key {error}.') from error
  except (TypeError, AttributeError, ZeroDivisionError) as error:
    raise ConfigError(
      f'The model config of open_clip has a value of the wrong type: {error}.'
    ) from error
  _check_unused('', model)
  return checked(config)


def checked(config: zoo.CLIPConfig) -> zoo.CLIPConfig:
  """Returns the config if its numbers are valid; raises ConfigError for the first invalid one."""
  for name, value, valid, wanted in _conditions(config):
    if not valid:
      raise ConfigError(
        f'The model has {name}={value!r}, which must be {wanted}. Correct its config, or download '
        'it again.'
      )
  return config


def _conditions(config: zoo.CLIPConfig) -> Iterator[tuple[str, Any, bool, str]]:
  """Yields (name, value, whether it is valid, what it must be).

  A condition may assume that all earlier ones hold.
  """
  whole = lambda value: type(value) is int and value > 0
  vision, text = config.vision, config.text
  resnet = isinstance(vision, zoo.ResNetConfig)
  for block, part in (('', config), ('vision.', vision), ('text.', text)):
    for key, value in vars(part).items():
      if key == 'layers' and part is vision and resnet:
        yield (
          block + key,
          value,
          len(value) == 4 and all(map(whole, value)),
          'four whole numbers above 0',
        )
      elif key in _COUNTS:
        yield block + key, value, whole(value), 'a whole number above 0'
      elif key in _REALS:
        yield block + key, value, value is None or type(value) in (int, float), 'a number'
  if resnet:
    yield 'vision.image_size', vision.image_size, vision.image_size % 32 == 0, 'a multiple of 32'
  else:
    yield (
      'vision.patch_size',
      vision.patch_size,
      vision.patch_size <= vision.image_size,
      f'at most the image size, {vision.image_size}',
    )
  for block, width, heads in (
    ('vision', vision.width * (32 if resnet else 1), vision.heads),
    ('text', text.width, text.heads),
  ):
    yield f'{block}.heads', heads, width % heads == 0, f'a divisor of the width, {width}'


def _text_from_open_clip(text: dict[str, Any], quick_gelu: bool) -> zoo.TextConfig:
  if text.get('hf_model_name'):
    raise ConfigError(
      f'text_cfg.hf_model_name={text["hf_model_name"]!r}: text towers of Hugging '
      'Face are not supported.'
    )
  width, proj_type = text.pop('width', 512), text.pop('proj_type', 'linear')
  bias = text.pop('proj_bias', False)
  config = zoo.TextConfig(
    text.pop('context_length', 77),
    text.pop('vocab_size', 49_408),
    width,
    text.pop('heads', 8),
    text.pop('layers', 12),
    text.pop('mlp_ratio', 4.0),
    text.pop('pool_type', 'argmax'),
    text.pop('eos_id', 2),
    causal=not text.pop('no_causal_mask', False),
    proj='none' if proj_type == 'none' else 'bias' if bias else 'linear',
    tokenizer=text.pop('hf_tokenizer_name', None) or '',
    tokenizer_kwargs=tuple((text.pop('tokenizer_kwargs', None) or {}).items()),
    **_block_from_open_clip(text, quick_gelu),
  )
  if config.pool_type not in ('argmax', 'eos', 'first', 'last') or proj_type not in (
    'linear',
    'none',
  ):
    raise ConfigError(
      f'text_cfg has pool_type={config.pool_type!r} and proj_type={proj_type!r}, '
      'at least one of which is not supported.'
    )
  _check_unused('text_cfg.', text)
  return config


def _vision_from_open_clip(
  vision: dict[str, Any], quick_gelu: bool
) -> zoo.ViTConfig | zoo.ResNetConfig:
  name: Any = vision.pop('timm_model_name', None)
  image_size: Any = vision.pop('image_size', 224)
  if isinstance(image_size, (list, tuple)) and len(set(image_size)) == 1:
    (image_size,) = set(image_size)  # [height, width]
  size: Any = image_size  # ViTConfig refuses what is no integer
  if name:
    if (
      name not in zoo.TIMM_TOWERS
      or vision.pop('timm_pool', 'map') != 'map'
      or (vision.pop('timm_proj', 'none') != 'none')
    ):
      raise ConfigError(
        f'vision_cfg.timm_model_name={name!r} is not supported. Supported timm '
        f'towers: {", ".join(zoo.TIMM_TOWERS)}.'
      )
    _check_unused('vision_cfg.', vision)
    return dataclasses.replace(zoo.TIMM_TOWERS[name], image_size=size)
  width, layers = vision.pop('width', 768), vision.pop('layers', 12)
  head_width = vision.pop('head_width', 64)
  if isinstance(layers, (list, tuple)):
    config = zoo.ResNetConfig(size, width, tuple(layers), width * 32 // head_width)
    vision.pop('patch_size', None)
  else:
    config = zoo.ViTConfig(
      size,
      vision.pop('patch_size', 16),
      width,
      layers,
      width // head_width,
      vision.pop('mlp_ratio', 4.0),
      vision.pop('pool_type', 'tok'),
      ln_pre=not vision.pop('no_ln_pre', False),
      final_ln_after_pool=vision.pop('final_ln_after_pool', False),
      **_block_from_open_clip(vision, quick_gelu),
    )
    if config.pool_type not in ('tok', 'avg'):
      raise ConfigError(f'vision_cfg.pool_type={config.pool_type!r} is not supported.')
  _check_unused('vision_cfg.', vision)
  return config


def _block_from_open_clip(tower: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
  act, norm = tower.pop('act_kwargs', None) or {}, tower.pop('norm_kwargs', None) or {}
  names = [name for name, kwargs in _ACTIVATIONS.items() if kwargs == act]
  if not names or set(norm) - {'eps'}:
    raise ConfigError(f'act_kwargs={act} and norm_kwargs={norm} of open_clip are not supported.')
  return {
    'activation': 'quick_gelu' if quick_gelu else names[0],
    'eps': norm.get('eps', 1e-5),
    'ls_init_value': tower.pop('ls_init_value', None),
  }


def _check_unused(block: str, left: dict[str, Any]) -> None:
  """Raises ConfigError for a key that was not read, unless its value turns the feature off."""
  for key, value in left.items():
    if key not in _IGNORED and value not in (None, False, 'learnable', 'default'):
      raise ConfigError(f'{block}{key}={value!r} of open_clip is not supported.')


# (our name, name in timm's vision transformer), replaced in this order; other names are equal.
_TIMM = (
  ('conv1.', 'patch_embed.proj.'),
  ('positional_embedding', 'pos_embed'),
  ('transformer.resblocks.', 'blocks.'),
  ('.ln_1.', '.norm1.'),
  ('.ln_2.', '.norm2.'),
  ('.attn.in_proj_', '.attn.qkv.'),
  ('.attn.out_proj.', '.attn.proj.'),
  ('.mlp.c_fc.', '.mlp.fc1.'),
  ('.mlp.c_proj.', '.mlp.fc2.'),
  ('ln_post.', 'norm.'),
)
# Prefixes of the text tower's tensors in models without the prefix 'text.'.
_TEXT = ('token_embedding.', 'positional_embedding', 'transformer.', 'ln_final.', 'text_projection')
_COUNTER = 'num_batches_tracked'  # of PyTorch's batch norm; not used here


def entries(config: zoo.CLIPConfig) -> list[weights.Entry]:
  """Returns the entries (parameters and open_clip's tensors) of a model; text tensors as text.*."""

  def entry(path: str) -> weights.Entry:
    if not (path.startswith('visual.') and _is_timm(config)):
      return weights.Entry((path,), (path,))
    name = weights.rename_tensor(path.removeprefix('visual.'), _TIMM)
    return weights.Entry(
      (path,), (f'visual.trunk.{name}',), 'row' if name == 'pos_embed' else 'same'
    )

  return list(map(entry, shapes(config)))


def normalize_names(tensors: Mapping[str, Array]) -> dict[str, Array]:
  """Returns the tensors with CustomTextCLIP's names, scalar scale and bias, and no counters."""
  renamed = {}
  for name, array in tensors.items():
    if name in ('logit_scale', 'logit_bias'):
      array = np.reshape(array, ()) if np.size(array) == 1 else array
    if not name.endswith(_COUNTER):
      renamed[f'text.{name}' if name.startswith(_TEXT) else name] = array
  return renamed


def params_from_open_clip(tensors: Mapping[str, Array], config: zoo.CLIPConfig, where: str) -> dict:
  """Converts a state_dict of CLIP or CustomTextCLIP; raises InputError if it does not fit."""
  given, tensors = tensors, normalize_names(tensors)
  for name in given:
    if f'text.{name}' in given and f'text.{name}' in tensors:
      raise InputError(f'{where} holds {name} twice, also as text.{name}. Is it another model?')
  if config.init_logit_bias is not None and 'logit_bias' not in tensors:
    logging.info('%s has no logit_bias; it is set to 0, as in open_clip.', where)
    tensors['logit_bias'] = np.zeros((), np.float32)
  return weights.params_from_tensors(entries(config), tensors, config, where)


def params_to_open_clip(params: Mapping, config: zoo.CLIPConfig) -> dict[str, Array]:
  """Converts parameters to a state_dict that open_clip's model loads with strict=True."""
  state = {}
  for name, array in weights.tensors_from_params(entries(config), params, config).items():
    state[name if config.custom_text else name.removeprefix('text.')] = array
    if name.endswith('.running_var'):
      state[name.replace('running_var', _COUNTER)] = np.zeros((), np.int64)
  return state


def matching_models(tensors: Mapping[str, Array]) -> list[str]:
  """Returns the zoo's models that have these tensors, at any image size."""
  return weights.matching_models(entries, normalize_names(tensors))


def preprocess_to_open_clip(image_size: int, preprocess: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the preprocess_cfg of open_clip_config.json.

  preprocess: dict(mean, std, resize), mean and std with 3 numbers each.
  """
  return {
    'size': image_size,
    'mode': 'RGB',
    'mean': list(preprocess['mean']),
    'std': list(preprocess['std']),
    'interpolation': 'bicubic',
    'resize_mode': preprocess['resize'],
    'fill_color': 0,
  }


def preprocess_from_open_clip(
  preprocess_cfg: Mapping[str, Any], config: zoo.CLIPConfig
) -> dict[str, Any]:
  """Returns dict(mean, std, resize) of a preprocess_cfg; missing keys get open_clip's defaults."""
  defaults = dict(mean=OPENAI_MEAN, std=OPENAI_STD, resize='shortest')
  given = {
    name: preprocess_cfg[key]
    for name, key in (('mean', 'mean'), ('std', 'std'), ('resize', 'resize_mode'))
    if preprocess_cfg.get(key)
  }
  size = preprocess_cfg.get('size') or config.image_size
  if size not in (config.image_size, [config.image_size] * 2):
    logging.warning(
      "preprocess_cfg has images of %s pixels, but the model has %d; the model's size is used.",
      size,
      config.image_size,
    )
  return checked_preprocess(defaults | given, preprocess_cfg.get('interpolation') or 'bicubic')


def checked_preprocess(preprocess: Mapping[str, Any], interpolation: str) -> dict[str, Any]:
  """Returns dict(mean, std, resize) with valid values; raises ConfigError for unsupported ones."""
  if preprocess['resize'] not in ('shortest', 'squash'):
    raise ConfigError(
      f'These weights need images resized by {preprocess["resize"]!r}; supported are shortest and '
      'squash.'
    )
  if interpolation != 'bicubic':
    logging.warning(
      'These weights were trained with %s resizing; bicubic is used instead.', interpolation
    )
  given = [
    (preprocess[key],) * 3
    if isinstance(preprocess[key], (int, float))
    else preprocess[key]  # as open_clip
    for key in ('mean', 'std')
  ]
  try:
    mean, std = (tuple(map(float, numbers)) for numbers in given)
  except (TypeError, ValueError):
    mean = std = ()
  if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not np.isfinite([mean, std]).all():
    raise ConfigError(
      f'Preprocessing needs three means and deviations, got {preprocess["mean"]} and '
      f'{preprocess["std"]}.'
    )
  return dict(mean=mean, std=std, resize=preprocess['resize'])


def default_preprocess(config: zoo.CLIPConfig) -> dict[str, Any]:
  """Returns the preprocessing of open_clip's weights of this family: SigLIP, CLIPA, else OpenAI."""
  if _is_timm(config):
    return dict(mean=(0.5,) * 3, std=(0.5,) * 3, resize='squash')
  if isinstance(config.vision, zoo.ViTConfig) and config.vision.pool_type == 'avg':
    clipa = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize='squash')
    return checked_preprocess(clipa, 'bilinear')
  return dict(mean=OPENAI_MEAN, std=OPENAI_STD, resize='shortest')


def _is_timm(config: zoo.CLIPConfig) -> bool:
  return isinstance(config.vision, zoo.ViTConfig) and config.vision.pool_type == 'map'
