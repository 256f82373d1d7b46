"""Configs of CLIP models, and open_clip's models by name, from its model_configs (3.3.0).

Supported towers are vision transformers (class token, average or attention pooling), OpenAI's
modified ResNets, and text transformers. Towers that open_clip takes from other libraries
(ConvNeXt, EVA, ViTamin, text towers of Hugging Face) are not supported.
"""

import dataclasses
import difflib
import math
from typing import Any

from clip_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """The config of a vision transformer; image and patch sizes are in pixels."""

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_ratio: float = 4.0
  pool_type: str = 'tok'  # 'tok' (the class token) | 'avg' (of the patches) | 'map' (attention)
  class_token: bool = True
  patch_bias: bool = False  # of the patch embedding
  ln_pre: bool = True  # a norm before the blocks
  final_ln_after_pool: bool = False  # ln_post is applied to the pooled token, not to each token
  proj: bool = True  # a matrix to E; without it, the width is E
  ls_init_value: float | None = None  # initial value of layer scale; None: no layer scale
  activation: str = 'gelu'  # a key of layers.ACTIVATIONS
  eps: float = 1e-5  # of its norms


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
  """The config of OpenAI's modified ResNet: 3 convolutions, bottlenecks, attention pooling."""

  image_size: int  # a multiple of 32
  width: int  # channels after the stem; the last stage has 32 times as many
  layers: tuple[int, int, int, int]  # bottlenecks in each stage
  heads: int  # of the attention pool


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The config of a text transformer."""

  context_length: int
  vocab_size: int
  width: int
  heads: int
  layers: int
  mlp_ratio: float = 4.0
  pool_type: str = 'argmax'  # 'argmax' (highest id) | 'eos' (first eos_id) | 'first' | 'last'
  eos_id: int = 2  # used by pool_type 'eos' only
  causal: bool = True
  proj: str = 'linear'  # 'linear' | 'bias' (linear, with a bias) | 'none' (the width is E)
  ls_init_value: float | None = None
  activation: str = 'gelu'
  eps: float = 1e-5
  tokenizer: str = ''  # '': CLIP's own; else open_clip's hf_tokenizer_name
  tokenizer_kwargs: tuple[tuple[str, str | bool], ...] = ()  # as in open_clip


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  embed_dim: int  # E
  vision: ViTConfig | ResNetConfig
  text: TextConfig
  init_logit_scale: float = math.log(1 / 0.07)
  init_logit_bias: float | None = None  # a bias for the sigmoid loss; None: no bias
  custom_text: bool = False  # open_clip's CustomTextCLIP: its text tensors are named text.*

  @property
  def image_size(self) -> int:
    return self.vision.image_size

  @property
  def context_length(self) -> int:
    return self.text.context_length


_NOT_COMPARED = (
  'vision',
  'text',
  'init_logit_scale',
  'init_logit_bias',
  'custom_text',
  'ls_init_value',
  'tokenizer',
  'tokenizer_kwargs',
)


def by_name(name: str) -> CLIPConfig:
  """Returns the config of an open_clip model; raises ConfigError for an unknown name."""
  if name not in ARCHITECTURES:
    lower = {other.lower(): other for other in ARCHITECTURES}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, cutoff=0)]
    raise ConfigError(f'Unknown model {name!r}; the nearest names are {", ".join(near)}.')
  return ARCHITECTURES[name]


def differences(a: CLIPConfig, b: CLIPConfig) -> dict[str, tuple[Any, Any]]:
  """Returns the numbers and kinds that change a model's output but differ: name -> (of a, of b).

  Left out are start values of parameters, the names of tensors and the tokenizer.
  """
  found = {}
  for block, x, y in (('', a, b), ('vision.', a.vision, b.vision), ('text.', a.text, b.text)):
    ours, others = _compared(x), _compared(y)
    for key in ours.keys() | others.keys():
      if ours.get(key) != others.get(key):
        found[block + key] = (ours.get(key), others.get(key))
  return dict(sorted(found.items()))


def _compared(part: Any) -> dict[str, Any]:
  fields = {key: value for key, value in vars(part).items() if key not in _NOT_COMPARED}
  if 'eos_id' in fields:
    highest = fields['vocab_size'] - 1
    if fields['pool_type'] == 'eos' and fields['eos_id'] == highest:
      fields['pool_type'] = 'argmax'  # both pool at the first token with the highest id
    if fields['pool_type'] != 'eos':
      del fields['eos_id']
  if 'mlp_ratio' in fields:
    fields['mlp_width'] = int(fields.pop('mlp_ratio') * fields['width'])
  return fields


def with_quickgelu(config: CLIPConfig) -> CLIPConfig:
  """Returns the config with QuickGELU, as for OpenAI's weights; a ResNet's image tower is kept."""
  vision = config.vision
  if isinstance(vision, ViTConfig):
    vision = dataclasses.replace(vision, activation='quick_gelu')
  return dataclasses.replace(
    config, vision=vision, text=dataclasses.replace(config.text, activation='quick_gelu')
  )


def _text_config(
  width: int, layers: int, context_length: int = 77, vocab_size: int = 49_408, **others
) -> TextConfig:
  return TextConfig(context_length, vocab_size, width, width // 64, layers, **others)


def _vit(
  embed_dim: int,
  image_size: int,
  patch_size: int,
  width: int,
  layers: int,
  heads: int,
  text_width: int,
  text_layers: int,
  mlp_ratio: float = 4.0,
  **others,
) -> CLIPConfig:
  return CLIPConfig(
    embed_dim,
    ViTConfig(image_size, patch_size, width, layers, heads, mlp_ratio, **others),
    _text_config(text_width, text_layers),
  )


def _resnet(
  embed_dim: int, image_size: int, width: int, layers: tuple[int, int, int, int], text_width: int
) -> CLIPConfig:
  return CLIPConfig(
    embed_dim,
    ResNetConfig(image_size, width, layers, heads=width * 32 // 64),
    _text_config(text_width, 12),
  )


def _clipa(
  embed_dim: int,
  image_size: int,
  width: int,
  layers: int,
  text_width: int,
  text_layers: int,
  mlp_ratio: float = 4.0,
) -> CLIPConfig:
  """Returns a CLIPA config: average pooling, no causal mask, BERT's tokenizer."""
  return CLIPConfig(
    embed_dim,
    ViTConfig(
      image_size,
      14,
      width,
      layers,
      16,
      mlp_ratio,
      pool_type='avg',
      ln_pre=False,
      final_ln_after_pool=True,
    ),
    _text_config(
      text_width,
      text_layers,
      32,
      32_000,
      pool_type='last',
      causal=False,
      tokenizer='bert-base-uncased',
      tokenizer_kwargs=(('strip_sep_token', True),),
    ),
  )


def _worldwide(
  name: str,
  vocab_size: int,
  eos_id: int,
  tokenizer: str,
  kwargs: tuple[tuple[str, str | bool], ...] = (),
) -> CLIPConfig:
  """Returns a config of MetaCLIP 2 (many languages)."""
  plain = _PLAIN[name]
  text = dataclasses.replace(
    plain.text,
    vocab_size=vocab_size,
    pool_type='eos',
    eos_id=eos_id,
    tokenizer=tokenizer,
    tokenizer_kwargs=kwargs,
  )
  return dataclasses.replace(plain, text=text)


# embed_dim, image_size, patch_size, width, layers, heads, text_width, text_layers
_PLAIN = {
  'ViT-S-16': _vit(384, 224, 16, 384, 12, 6, 384, 12),
  'ViT-S-32': _vit(384, 224, 32, 384, 12, 6, 384, 12),
  'ViT-S-16-alt': _vit(256, 224, 16, 384, 12, 6, 256, 10),
  'ViT-S-32-alt': _vit(256, 224, 32, 384, 12, 6, 256, 10),
  'ViT-M-16': _vit(512, 224, 16, 512, 12, 8, 512, 12),
  'ViT-M-32': _vit(512, 224, 32, 512, 12, 8, 512, 12),
  'ViT-M-16-alt': _vit(384, 224, 16, 512, 12, 8, 384, 12, ls_init_value=1e-4),
  'ViT-M-32-alt': _vit(384, 224, 32, 512, 12, 8, 384, 12),
  'ViT-B-16': _vit(512, 224, 16, 768, 12, 12, 512, 12),
  'ViT-B-16-plus': _vit(640, 224, 16, 896, 12, 14, 640, 12),
  'ViT-B-16-plus-240': _vit(640, 240, 16, 896, 12, 14, 640, 12),
  'ViT-B-32': _vit(512, 224, 32, 768, 12, 12, 512, 12),
  'ViT-B-32-256': _vit(512, 256, 32, 768, 12, 12, 512, 12),
  'ViT-B-32-plus-256': _vit(640, 256, 32, 896, 12, 14, 640, 12),
  'ViT-L-14': _vit(768, 224, 14, 1024, 24, 16, 768, 12),
  'ViT-L-14-280': _vit(768, 280, 14, 1024, 24, 16, 768, 12),
  'ViT-L-14-336': _vit(768, 336, 14, 1024, 24, 16, 768, 12),
  'ViT-L-16': _vit(768, 224, 16, 1024, 24, 16, 768, 12),
  'ViT-L-16-320': _vit(768, 320, 16, 1024, 24, 16, 768, 12),
  'ViT-H-14': _vit(1024, 224, 14, 1280, 32, 16, 1024, 24),
  'ViT-H-14-378': _vit(1024, 378, 14, 1280, 32, 16, 1024, 24),
  'ViT-H-16': _vit(1024, 224, 16, 1280, 32, 16, 1024, 24),
  'ViT-g-14': _vit(1024, 224, 14, 1408, 40, 16, 1024, 24, mlp_ratio=4.3637),
  'ViT-e-14': _vit(1280, 224, 14, 1792, 56, 16, 1280, 36, mlp_ratio=8.5715),
  'ViT-bigG-14': _vit(1280, 224, 14, 1664, 48, 16, 1280, 32, mlp_ratio=4.9231),
  # embed_dim, image_size, width, layers, text_width
  'RN50': _resnet(1024, 224, 64, (3, 4, 6, 3), 512),
  'RN101': _resnet(512, 224, 64, (3, 4, 23, 3), 512),
  'RN50x4': _resnet(640, 288, 80, (4, 6, 10, 6), 640),
  'RN50x16': _resnet(768, 384, 96, (6, 8, 18, 8), 768),
  'RN50x64': _resnet(1024, 448, 128, (3, 15, 36, 10), 1024),
  # embed_dim, image_size, width, layers, text_width, text_layers
  'ViT-L-14-CLIPA': _clipa(768, 224, 1024, 24, 768, 12),
  'ViT-L-14-CLIPA-336': _clipa(768, 336, 1024, 24, 768, 12),
  'ViT-H-14-CLIPA': _clipa(1024, 224, 1280, 32, 1024, 24),
  'ViT-H-14-CLIPA-336': _clipa(1024, 336, 1280, 32, 1024, 24),
  'ViT-bigG-14-CLIPA': _clipa(1280, 224, 1664, 48, 1280, 32, mlp_ratio=4.9231),
  'ViT-bigG-14-CLIPA-336': _clipa(1280, 336, 1664, 48, 1280, 32, mlp_ratio=4.9231),
}
_XLMV = (901_629, 2, 'facebook/xlm-v-base')
_BIG_G_378 = dataclasses.replace(
  _PLAIN['ViT-bigG-14'], vision=dataclasses.replace(_PLAIN['ViT-bigG-14'].vision, image_size=378)
)
_PLAIN |= {
  'ViT-L-14-worldwide': _worldwide(
    'ViT-L-14', 250_100, 1, 'google/mt5-base', (('clean', 'canonicalize'),)
  ),
  'ViT-H-14-worldwide': _worldwide('ViT-H-14', *_XLMV),
  'ViT-H-14-worldwide-378': _worldwide('ViT-H-14-378', *_XLMV),
  'ViT-bigG-14-worldwide': _worldwide('ViT-bigG-14', *_XLMV),
  'ViT-bigG-14-worldwide-378': dataclasses.replace(
    _worldwide('ViT-bigG-14', *_XLMV), vision=_BIG_G_378.vision
  ),
}
_QUICK = (
  'ViT-B-16',
  'ViT-B-32',
  'ViT-L-14',
  'ViT-L-14-336',
  'ViT-H-14',
  'ViT-H-14-378',
  'ViT-bigG-14',
  'ViT-L-14-worldwide',
  'ViT-H-14-worldwide',
  'RN50',
  'RN101',
  'RN50x4',
  'RN50x16',
  'RN50x64',
)


def _siglip_tower(
  width: int,
  layers: int,
  heads: int,
  patch_size: int,
  image_size: int,
  activation: str,
  mlp_ratio: float = 4.0,
) -> ViTConfig:
  return ViTConfig(
    image_size,
    patch_size,
    width,
    layers,
    heads,
    mlp_ratio,
    pool_type='map',
    class_token=False,
    patch_bias=True,
    ln_pre=False,
    proj=False,
    activation=activation,
    eps=1e-6,
  )


# The towers that open_clip takes from timm, by timm's name, with timm's activation.
TIMM_TOWERS = {
  f'vit_{size}_patch{patch_size}_siglip_{image_size}': _siglip_tower(
    width,
    layers,
    heads,
    patch_size,
    image_size,
    'gelu_tanh' if image_size in tanh else 'gelu',
    mlp_ratio,
  )
  for size, patch_size, image_sizes, tanh, width, layers, heads, mlp_ratio in (
    ('base', 16, (224, 256, 384, 512), (), 768, 12, 12, 4.0),
    ('base', 32, (256,), (256,), 768, 12, 12, 4.0),
    ('large', 16, (256, 384, 512), (512,), 1024, 24, 16, 4.0),
    ('so400m', 14, (224, 378, 384), (), 1152, 27, 16, 3.7362),
    ('so400m', 16, (256, 384, 512), (256, 384, 512), 1152, 27, 16, 3.7362),
    ('giantopt', 16, (256, 384), (256, 384), 1536, 40, 16, 4.0),
  )
  for image_size in image_sizes
}


def _siglip(
  tower: str,
  tokenizer: str,
  vocab_size: int,
  *,
  context_length: int = 64,
  activation: str = 'gelu',
  proj: str = 'bias',
) -> CLIPConfig:
  """Returns a SigLIP or SigLIP 2 config: attention pooling, no causal mask, a logit bias."""
  vision = TIMM_TOWERS[tower]
  wide = vision.width > 1024  # so400m and giant share a text tower
  text = TextConfig(
    context_length,
    vocab_size,
    1152 if wide else vision.width,
    16 if wide else vision.width // 64,
    27 if wide else vision.layers,
    3.7362 if wide else 4.0,
    pool_type='last',
    causal=False,
    proj=proj,
    activation=activation,
    eps=1e-6,
    tokenizer=f'timm/{tokenizer}',
    tokenizer_kwargs=(('clean', 'canonicalize'),),
  )
  return CLIPConfig(vision.width, vision, text, init_logit_bias=-10.0, custom_text=True)


_B, _I18N = 'ViT-B-16-SigLIP', 'ViT-B-16-SigLIP-i18n-256'
_SIGLIP = {
  'ViT-B-16-SigLIP': _siglip('vit_base_patch16_siglip_224', _B, 32_000),
  'ViT-B-16-SigLIP-256': _siglip('vit_base_patch16_siglip_256', _B, 32_000),
  'ViT-B-16-SigLIP-384': _siglip('vit_base_patch16_siglip_384', _B, 32_000),
  'ViT-B-16-SigLIP-512': _siglip('vit_base_patch16_siglip_512', _B, 32_000),
  'ViT-B-16-SigLIP-i18n-256': _siglip('vit_base_patch16_siglip_256', _I18N, 250_000),
  'ViT-L-16-SigLIP-256': _siglip('vit_large_patch16_siglip_256', _B, 32_000),
  'ViT-L-16-SigLIP-384': _siglip('vit_large_patch16_siglip_384', _B, 32_000),
  'ViT-SO400M-14-SigLIP': _siglip('vit_so400m_patch14_siglip_224', _B, 32_000, context_length=16),
  'ViT-SO400M-14-SigLIP-378': _siglip('vit_so400m_patch14_siglip_378', _B, 32_000),
  'ViT-SO400M-14-SigLIP-384': _siglip('vit_so400m_patch14_siglip_384', _B, 32_000),
  'ViT-SO400M-16-SigLIP-i18n-256': _siglip(
    'vit_so400m_patch16_siglip_256', _I18N, 250_000, proj='none'
  ),
} | {
  f'ViT-{name}': _siglip(
    f'vit_{tower}_siglip_{size}', f'ViT-{name}', 256_000, activation='gelu_tanh'
  )
  for name, tower, size in (
    ('B-32-SigLIP2-256', 'base_patch32', 256),
    ('B-16-SigLIP2', 'base_patch16', 224),
    ('B-16-SigLIP2-256', 'base_patch16', 256),
    ('B-16-SigLIP2-384', 'base_patch16', 384),
    ('B-16-SigLIP2-512', 'base_patch16', 512),
    ('L-16-SigLIP2-256', 'large_patch16', 256),
    ('L-16-SigLIP2-384', 'large_patch16', 384),
    ('L-16-SigLIP2-512', 'large_patch16', 512),
    ('SO400M-14-SigLIP2', 'so400m_patch14', 224),
    ('SO400M-14-SigLIP2-378', 'so400m_patch14', 378),
    ('SO400M-16-SigLIP2-256', 'so400m_patch16', 256),
    ('SO400M-16-SigLIP2-384', 'so400m_patch16', 384),
    ('SO400M-16-SigLIP2-512', 'so400m_patch16', 512),
    ('gopt-16-SigLIP2-256', 'giantopt_patch16', 256),
    ('gopt-16-SigLIP2-384', 'giantopt_patch16', 384),
  )
}

ARCHITECTURES = (
  _PLAIN | {f'{name}-quickgelu': with_quickgelu(_PLAIN[name]) for name in _QUICK} | _SIGLIP
)
