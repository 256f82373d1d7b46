"""The FLOPs, parameters and activations of a model, from its config alone.

FLOPs count the multiplications and additions of the matrix products, which dominate: two for each
use of a weight, plus the attention's own products.
"""

from collections.abc import Iterator
import math
import re

from clip_jax.models import zoo
from clip_jax.models.shapes import shapes

# What the backward pass reads of a block, by the key remat: numbers for each token and its width,
# and for each head and pair of tokens. 'none' was fitted to XLA's estimates for the training steps
# of ViT-S-32, ViT-B-32 and ViT-B-16 in float32 on a CPU, which it meets within 2 %; the others
# follow from the definition. cuDNN's attention keeps no pairs.
_KEPT = {'none': (23, 2), 'dots': (10, 1), 'blocks': (1, 0)}
_KEPT_OF_CONVOLUTION = 3.7  # numbers for each of its outputs, from XLA's estimate for RN50


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
  return _transformer_flops(config, 'visual.', config.vision, image_tokens(config.vision))


def image_tokens(vision: zoo.ViTConfig) -> int:
  """Returns the tokens of an image: its patches and the class token."""
  return (vision.image_size // vision.patch_size) ** 2 + vision.class_token


def _transformer_flops(
  config: zoo.CLIPConfig, prefix: str, tower: zoo.ViTConfig | zoo.TextConfig, tokens: int
) -> float:
  """Returns the FLOPs of a transformer tower.

  Weights of blocks, patches and the attention pool's keys count for every token, the others once.
  """
  flops = 4.0 * tower.layers * tokens**2 * tower.width
  for name, shape in _matrices(config, prefix).items():
    each = name.startswith(('transformer.', 'conv1.', 'attn_pool.kv.'))
    flops += 2.0 * math.prod(shape) * (tokens if each else 1)
  return flops


def _resnet_flops(config: zoo.CLIPConfig) -> float:
  """Returns the FLOPs of a ResNet; a convolution's weight is used once per output position."""
  return sum(2.0 * math.prod(shape) * side**2 for shape, side in _convolutions(config))


def _convolutions(config: zoo.CLIPConfig) -> Iterator[tuple[tuple[int, ...], int]]:
  """Yields the shape of each weight of a ResNet, and the side of its output.

  The side is half the image's in the stem, a quarter in layer1, an eighth in layer2.
  """
  halved = re.compile(r'layer[234]\.0\.conv[12]\.')  # before the pooling that halves the side
  for name, shape in _matrices(config, 'visual.').items():
    if name.startswith('attnpool.'):
      side = config.image_size // 32
    elif name.startswith('layer'):
      side = config.image_size // (2 << int(name[len('layer')])) * (2 if halved.match(name) else 1)
    else:
      side = config.image_size // 2
    yield shape, side


def block_activations(tower: zoo.ViTConfig | zoo.TextConfig, tokens: int, remat: str) -> float:
  """Returns the numbers of one transformer block and one sample that its backward pass reads."""
  per_token, per_pair = _KEPT[remat]
  return per_token * tokens * tower.width + per_pair * tower.heads * tokens**2


def activations(config: zoo.CLIPConfig, remat: str = 'none') -> float:
  """Returns the numbers that the backward pass reads of one image and its caption.

  Times batch and bytes, this is the part of a training step's memory that grows with the batch. The
  remat of config.train is that of transformers; one block more is computed again at a time.
  """
  text, vision = config.text, config.vision
  towers: list[tuple[zoo.ViTConfig | zoo.TextConfig, int]] = [(text, config.context_length)]
  total = 0.0
  if isinstance(vision, zoo.ResNetConfig):
    total = _KEPT_OF_CONVOLUTION * sum(shape[0] * side**2 for shape, side in _convolutions(config))
  else:
    towers.append((vision, image_tokens(vision)))
  for tower, tokens in towers:
    total += tower.layers * block_activations(tower, tokens, remat)
  if remat != 'none':
    total += max(block_activations(tower, tokens, 'none') for tower, tokens in towers)
  return total


def widest_activations(config: zoo.CLIPConfig) -> float:
  """Returns the numbers of the widest layer in the forward pass of one image."""
  if isinstance(config.vision, zoo.ResNetConfig):
    return max(_KEPT_OF_CONVOLUTION * shape[0] * side**2 for shape, side in _convolutions(config))
  return block_activations(config.vision, image_tokens(config.vision), 'dots')


def _matrices(config: zoo.CLIPConfig, prefix: str) -> dict[str, tuple[int, ...]]:
  """Returns name in the tower -> shape, for every matrix and convolution."""
  looked_up = ('positional_embedding', 'token_embedding.weight', 'latent')
  return {
    name.removeprefix(prefix): shape
    for name, shape in shapes(config).items()
    if name.startswith(prefix) and len(shape) > 1 and not name.endswith(looked_up)
  }
