"""SSCD, an embedder for copy detection (Pizzi et al. 2022): images -> descriptors of 512 numbers.

In: a user's file of a published ResNet-50 model with torchvision's names, for example
sscd_disc_mixup.torchvision.pt of github.com/facebookresearch/sscd-copy-detection. No published
weights were available here: names, shapes and formulas follow that repository's code and are tested
against transcriptions with random weights, but no descriptor was compared with a published one.

torchvision's ResNet-50, GeM pooling, one linear layer, unit length; all in float32. Each batch norm
is folded into its convolution when the file is read. Images are squashed to 320 x 320, which the
repository recommends for batches; its own evaluation resizes the shorter side to 288, does not crop
and embeds one image at a time.
"""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.models import torchscript, weights

IMAGE_SIZE = 320
RESIZE = 'squash_bilinear'  # torchvision's Resize([320, 320]) of a Pillow image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The repository's README: pairs of DISC images with a cosine similarity above this are copies with
# 90 % precision, for sscd_disc_mixup.
SIMILARITY = 0.75
FLOPS = 16.7e9  # of one image: 4.09e9 multiply-adds at 224 x 224, scaled to 320 x 320
_GEM_POWER, _GEM_LEAST = 3.0, 1e-6
_EPS = 1e-5  # of the batch norms
_PROJECTIONS = ('backbone.fc', 'embeddings.1', 'embeddings.0')  # names of the linear layer
_NORM = ('weight', 'bias', 'running_mean', 'running_var')


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A ResNet of bottleneck blocks; a block of stage i has 4 * width * 2**i channels."""

  layers: tuple[int, ...] = (3, 4, 6, 3)
  width: int = 64
  embed_dim: int = 512


RESNET50 = Architecture()


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each tensor of a file; the linear layer is called backbone.fc."""
  width = architecture.width
  convolutions = {('conv1', 'bn1'): (width, 3, 7, 7)}
  size_in = width
  for stage, count in enumerate(architecture.layers):
    planes = width * 2**stage
    for number in range(count):
      at = f'layer{stage + 1}.{number}'
      convolutions[f'{at}.conv1', f'{at}.bn1'] = (planes, size_in, 1, 1)
      convolutions[f'{at}.conv2', f'{at}.bn2'] = (planes, planes, 3, 3)
      convolutions[f'{at}.conv3', f'{at}.bn3'] = (4 * planes, planes, 1, 1)
      if not number:
        pair = f'{at}.downsample.0', f'{at}.downsample.1'
        convolutions[pair] = (4 * planes, size_in, 1, 1)
      size_in = 4 * planes
  tensors: dict[str, tuple[int, ...]] = {}
  for (conv, norm), shape in convolutions.items():
    tensors[f'backbone.{conv}.weight'] = shape
    tensors |= {f'backbone.{norm}.{name}': shape[:1] for name in _NORM}
  return tensors | {
    'backbone.fc.weight': (architecture.embed_dim, size_in),
    'backbone.fc.bias': (architecture.embed_dim,),
  }


def read(path: str) -> dict[str, np.ndarray]:
  """Returns the parameters of a file, for `apply`; raises InputError if it holds another model."""
  refuse_torchscript(path)
  tensors = {
    name: array
    for name, array in weights.read(path).items()
    if not name.endswith('num_batches_tracked')
  }
  for projection in _PROJECTIONS:
    if f'{projection}.weight' in tensors:
      for part in ('weight', 'bias'):
        if f'{projection}.{part}' in tensors:
          tensors[f'backbone.fc.{part}'] = tensors.pop(f'{projection}.{part}')
      break
  wanted = shapes(RESNET50)
  problems = [f'{name} is missing' for name in wanted if name not in tensors]
  problems += [f'{name} is unknown' for name in sorted(tensors.keys() - wanted.keys())]
  problems += [
    f'{name} has shape {list(tensors[name].shape)} instead of {list(shape)}'
    for name, shape in wanted.items()
    if name in tensors and tensors[name].shape != shape
  ]
  problems += [
    f'{name} has dtype {array.dtype} instead of a float'
    for name, array in tensors.items()
    if array.dtype.kind != 'f'
  ]
  if problems:
    more = f' and {len(problems) - 4} more problems' if len(problems) > 4 else ''
    raise InputError(
      f'{path} does not hold the ResNet-50 of SSCD with the names of torchvision: '
      f'{", ".join(problems[:4])}{more}. Use a published file such as '
      'sscd_disc_mixup.torchvision.pt; files with .classy.pt have other names.'
    )
  return _folded(tensors)


def refuse_torchscript(path: str) -> None:
  """Raises InputError if the file is a TorchScript archive."""
  if os.path.isfile(path) and torchscript.is_archive(path):
    raise InputError(
      f'{path} is a TorchScript archive, but SSCD needs a state dict with the names of '
      'torchvision. Use the published file that ends in .torchvision.pt, or save one from the '
      "model in PyTorch: torch.save(model.state_dict(), 'sscd.pt')."
    )


def _folded(tensors: Mapping[str, Array]) -> dict[str, np.ndarray]:
  """Returns weight and bias of each convolution with its batch norm, and of the linear layer."""
  params = {f'fc.{part}': np.asarray(tensors[f'backbone.fc.{part}']) for part in ('weight', 'bias')}
  for name, kernel in tensors.items():
    if kernel.ndim != 4:
      continue
    conv = name.removesuffix('.weight')
    norm = conv[:-1] + '1' if conv.endswith('downsample.0') else conv.replace('conv', 'bn')
    weight, bias, mean, var = (np.float64(tensors[f'{norm}.{part}']) for part in _NORM)
    scale = weight / np.sqrt(var + _EPS)
    conv = conv.removeprefix('backbone.')
    params[f'{conv}.weight'] = (kernel * scale[:, None, None, None]).astype(np.float32)
    params[f'{conv}.bias'] = (bias - mean * scale).astype(np.float32)
  return params


def apply(
  params: Mapping[str, Any],  # of `read`
  images: Any,  # [b, S, S, 3] uint8
) -> Any:  # [b, E] float32, unit length
  """Returns the descriptors of a batch of images, a JAX array."""
  import jax.numpy as jnp  # the config check reads this file, and JAX takes a second

  x = (jnp.asarray(images, jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
  x = _max_pool(_convolution(params, 'conv1', x, 2).clip(0))
  for stage in range(1, 5):
    number = 0
    while f'layer{stage}.{number}.conv1.weight' in params:
      at, stride = f'layer{stage}.{number}', 1 if stage == 1 or number else 2
      y = _convolution(params, f'{at}.conv1', x).clip(0)
      y = _convolution(params, f'{at}.conv2', y, stride).clip(0)
      y = _convolution(params, f'{at}.conv3', y)
      if not number:
        x = _convolution(params, f'{at}.downsample.0', x, stride)
      x = (x + y).clip(0)
      number += 1
  x = jnp.matmul(gem(x), params['fc.weight'].T, precision='highest') + params['fc.bias']
  return x / jnp.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


def gem(
  x: Any,  # [b, H, W, C]
) -> Any:  # [b, C]
  """Returns the generalised mean over the positions, with power 3."""
  return (x.clip(_GEM_LEAST) ** _GEM_POWER).mean((1, 2)) ** (1 / _GEM_POWER)


def _convolution(params: Mapping[str, Any], name: str, x: Any, stride: int = 1) -> Any:
  from jax import lax

  kernel = params[f'{name}.weight']
  pad = (kernel.shape[-1] // 2,) * 2
  y = lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    (pad, pad),
    dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
    precision=lax.Precision.HIGHEST,
  )
  return y + params[f'{name}.bias']


def _max_pool(x: Any) -> Any:
  """Returns the maximum over 3 x 3 windows with stride 2; the border is padded with -infinity."""
  from jax import lax

  pads = ((0, 0), (1, 1), (1, 1), (0, 0))
  return lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
