"""Small models of every family, and inputs and weights that two sides make alike: the golden tests.

tests/golden/open_clip.npz holds what open_clip computes for them (tests/make_golden.py), nothing
else: weights and inputs come from NumPy's PCG64, keyed by open_clip's name of each tensor.
"""

import dataclasses
import hashlib
import math

import numpy as np

from clip_jax.models import zoo

VOCAB, START, END = 512, 510, 511
IMAGES = 3

_VISION = zoo.ViTConfig(image_size=16, patch_size=4, width=32, layers=2, heads=2)
_TEXT = zoo.TextConfig(context_length=12, vocab_size=VOCAB, width=24, heads=2, layers=2)
_MAP = zoo.ViTConfig(
  image_size=16,
  patch_size=4,
  width=32,
  layers=2,
  heads=2,
  mlp_ratio=3.7362,
  pool_type='map',
  class_token=False,
  patch_bias=True,
  ln_pre=False,
  proj=False,
  activation='gelu_tanh',
  eps=1e-6,
)
_SIGLIP_TEXT = dataclasses.replace(
  _TEXT, pool_type='last', causal=False, proj='bias', eps=1e-6, activation='gelu_tanh'
)
TIMM_NAME = 'vit_golden_siglip'  # under which make_golden.py gives timm the tower _MAP


def _clip(embed_dim=20, vision=None, text=None, **others) -> zoo.CLIPConfig:
  return zoo.CLIPConfig(
    embed_dim,
    dataclasses.replace(_VISION, **(vision or {})),
    dataclasses.replace(_TEXT, **(text or {})),
    **others,
  )


FAMILIES = {
  'vit': _clip(vision={'image_size': 18}),  # two rows and columns of pixels are not seen
  'quick_gelu': zoo.with_quickgelu(_clip(text={'pool_type': 'eos', 'eos_id': END})),
  'average': _clip(vision={'pool_type': 'avg', 'mlp_ratio': 2.5}, text={'pool_type': 'first'}),
  'clipa': _clip(
    vision={'pool_type': 'avg', 'ln_pre': False, 'final_ln_after_pool': True},
    text={'pool_type': 'last', 'causal': False},
    custom_text=True,
  ),
  'layer_scale': _clip(vision={'ls_init_value': 0.1}, text={'ls_init_value': 0.1}),
  'resnet': zoo.CLIPConfig(20, zoo.ResNetConfig(64, 8, (1, 2, 1, 1), 4), _TEXT),
  'siglip': zoo.CLIPConfig(32, _MAP, _SIGLIP_TEXT, init_logit_bias=-10.0, custom_text=True),
  'siglip_no_projection': zoo.CLIPConfig(
    32,
    _MAP,
    dataclasses.replace(_SIGLIP_TEXT, width=32, proj='none', activation='gelu'),
    init_logit_bias=-10.0,
    custom_text=True,
  ),
}


def random(name: str) -> np.random.Generator:
  return np.random.Generator(
    np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'little'))
  )


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:  # float32
  """The tensor that open_clip calls `name`: matrices by fan-in, gains near 1, biases near 0."""
  normal = random(name).standard_normal(shape)
  if name == 'logit_scale':
    return np.float32(math.log(10))
  if name == 'logit_bias':
    return np.float32(-5)
  if name.endswith('running_var'):
    return (1 + 0.5 * np.abs(normal)).astype(np.float32)
  if len(shape) >= 2:
    return (normal * math.prod(shape[1:]) ** -0.5).astype(np.float32)
  gain = name.endswith(('.weight', '.gamma'))
  return (gain + 0.1 * normal).astype(np.float32)


def images(config: zoo.CLIPConfig) -> np.ndarray:  # [B, S, S, 3] float32
  size = config.image_size
  return random('images').standard_normal((IMAGES, size, size, 3)).astype(np.float32)


def texts(config: zoo.CLIPConfig) -> np.ndarray:  # [B, T] int32
  length = config.context_length
  text = random('texts').integers(1, START, (IMAGES, length)).astype(np.int32)
  text[:, 0] = START
  for row, end in zip(text, (3, length - 1, 7), strict=True):
    row[end:] = 0
    row[end] = END
  return text
