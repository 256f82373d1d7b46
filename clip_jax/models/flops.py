"""The work and the size of a model, from its numbers alone: computes nothing.

FLOPs count the multiplications and additions of the matrix products, which are nearly all of the
work: two for each weight and each place where it is used, and the attention's own.
"""

import math
import re

from clip_jax.models import zoo
from clip_jax.models.shapes import shapes


def parameter_count(config: zoo.CLIPConfig) -> int:
  """Returns the number of parameters of both towers, batch norms' running statistics among them."""
  return sum(math.prod(shape) for shape in shapes(config).values())


def forward_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of one image and its caption through both towers."""
  return image_flops(config) + text_flops(config)


def text_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of one caption through the text tower, all tokens of the context."""
  return _transformer_flops(config, 'text.', config.text, config.context_length)


def image_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of one image through the image tower."""
  if isinstance(config.vision, zoo.ResNetConfig):
    return _resnet_flops(config)
  patches = (config.image_size // config.vision.patch_size) ** 2 + config.vision.class_token
  return _transformer_flops(config, 'visual.', config.vision, patches)


def _transformer_flops(
  config: zoo.CLIPConfig, prefix: str, tower: zoo.ViTConfig | zoo.TextConfig, tokens: int
) -> float:
  """Blocks, patches and the attention pool's keys are made for every token, what is beside them
  once.
  """
  flops = 4.0 * tower.layers * tokens**2 * tower.width
  for name, size in _matrices(config, prefix).items():
    flops += (
      2.0 * size * (tokens if name.startswith(('transformer.', 'conv1.', 'attn_pool.kv.')) else 1)
    )
  return flops


def _resnet_flops(config: zoo.CLIPConfig) -> float:
  """A weight of a convolution is used once a place: half the side in the stem, a quarter in layer1,
  ...
  """
  halved = re.compile(r'layer[234]\.0\.conv[12]\.')  # before the pooling that halves the side
  flops = 0.0
  for name, size in _matrices(config, 'visual.').items():
    if name.startswith('attnpool.'):
      side = config.image_size // 32
    elif name.startswith('layer'):
      side = config.image_size // (2 << int(name[len('layer')])) * (2 if halved.match(name) else 1)
    else:
      side = config.image_size // 2
    flops += 2.0 * size * side**2
  return flops


def _matrices(config: zoo.CLIPConfig, prefix: str) -> dict[str, int]:
  """Returns the number of weights of every matrix and convolution of a tower, by its name there."""
  looked_up = ('positional_embedding', 'token_embedding.weight', 'latent')
  return {
    name.removeprefix(prefix): math.prod(shape)
    for name, shape in shapes(config).items()
    if name.startswith(prefix) and len(shape) > 1 and not name.endswith(looked_up)
  }
