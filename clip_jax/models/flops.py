"""The FLOPs and the number of parameters of a model, from its config alone.

FLOPs count the multiplications and additions of the matrix products, which dominate: two for each
use of a weight, plus the attention's own products.
"""

import math
import re

from clip_jax.models import zoo
from clip_jax.models.shapes import shapes


def parameter_count(config: zoo.CLIPConfig) -> int:
  """Returns the number of parameters of both towers, with running statistics of batch norms."""
  return sum(math.prod(shape) for shape in shapes(config).values())


def forward_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of a forward pass of one image and its caption."""
  return image_flops(config) + text_flops(config)


def text_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of one caption in the text tower, with all tokens of the context."""
  return _transformer_flops(config, 'text.', config.text, config.context_length)


def image_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of one image in the image tower."""
  if isinstance(config.vision, zoo.ResNetConfig):
    return _resnet_flops(config)
  patches = (config.image_size // config.vision.patch_size) ** 2 + config.vision.class_token
  return _transformer_flops(config, 'visual.', config.vision, patches)


def _transformer_flops(
  config: zoo.CLIPConfig, prefix: str, tower: zoo.ViTConfig | zoo.TextConfig, tokens: int
) -> float:
  """Returns the FLOPs of a transformer tower.

  Weights of blocks, patches and the attention pool's keys count for every token, the others once.
  """
  flops = 4.0 * tower.layers * tokens**2 * tower.width
  for name, size in _matrices(config, prefix).items():
    flops += (
      2.0 * size * (tokens if name.startswith(('transformer.', 'conv1.', 'attn_pool.kv.')) else 1)
    )
  return flops


def _resnet_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of a ResNet; a convolution's weight is used once per output position.

  The side of the output is half the image's in the stem, a quarter in layer1, an eighth in layer2.
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
  """Returns name in the tower -> number of weights, for every matrix and convolution."""
  looked_up = ('positional_embedding', 'token_embedding.weight', 'latent')
  return {
    name.removeprefix(prefix): math.prod(shape)
    for name, shape in shapes(config).items()
    if name.startswith(prefix) and len(shape) > 1 and not name.endswith(looked_up)
  }
