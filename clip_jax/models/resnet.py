"""CLIP's modified ResNet: images -> one vector each.

Names, shapes and initialisation are those of open_clip's ModifiedResNet (Radford et al. 2021): a
stem of three convolutions, average pooling before each strided convolution, attention pooling.
"""

from typing import Any

from flax import nnx
import jax
from jax import Array, lax
import jax.numpy as jnp

from clip_jax.models import layers, precision
from clip_jax.models.zoo import ResNetConfig

_MOMENTUM = 0.1  # of the running statistics; PyTorch's default
_EPS = 1e-5


class Conv(nnx.Module):
  """A convolution without bias, weight [out, in, k, k] as in PyTorch; k is 1 or 3."""

  def __init__(
    self, size_in: int, size_out: int, kernel: int, *, stride: int = 1, rngs: nnx.Rngs, dtype: str
  ):
    init = layers.uniform((size_in * kernel * kernel) ** -0.5)
    self.weight = nnx.Param(init(rngs.params(), (size_out, size_in, kernel, kernel)))
    self.stride = stride
    self.dtype = dtype

  def __call__(
    self,
    x: Array,  # [B, H, W, C]
  ) -> Array:  # [B, H', W', C']
    kernel = self.weight.shape[-1]
    if kernel == 1:
      return precision.product(x, self.weight[:, :, 0, 0], self.dtype)
    activations = precision.of(self.dtype).activations  # XLA's fast convolutions have one dtype
    weight, x = self.weight[...].astype(activations), x.astype(activations)
    pad = (kernel // 2, kernel // 2)
    return lax.conv_general_dilated(
      x, weight, (self.stride, self.stride), (pad, pad), dimension_numbers=('NHWC', 'OIHW', 'NHWC')
    )


class BatchNorm(nnx.Module):
  """Batch norm over all but the last axis, in float32, with PyTorch's running statistics."""

  def __init__(self, width: int):
    self.weight = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))
    self.running_mean = nnx.BatchStat(jnp.zeros(width))
    self.running_var = nnx.BatchStat(jnp.ones(width))

  def __call__(
    self,
    x: Array,  # [B, H, W, C]
    training: bool,  # True: use and record the batch's statistics; False: the running ones
  ) -> Array:  # [B, H, W, C]
    y = x.astype(jnp.float32)
    mean, var = self.running_mean[...], self.running_var[...]
    if training:
      mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
      n = y.size // y.shape[-1]
      keep = 1 - _MOMENTUM
      self.running_mean[...] = keep * self.running_mean[...] + _MOMENTUM * lax.stop_gradient(mean)
      unbiased = lax.stop_gradient(var) * (n / max(n - 1, 1))  # recorded by PyTorch
      self.running_var[...] = keep * self.running_var[...] + _MOMENTUM * unbiased
    y = (y - mean) * lax.rsqrt(var + _EPS) * self.weight[...] + self.bias[...]
    return y.astype(x.dtype)


class Bottleneck(nnx.Module):
  """A bottleneck block: 1x1, 3x3, average pooling if strided, 1x1, plus a shortcut of the input."""

  def __init__(self, size_in: int, planes: int, stride: int, *, rngs: nnx.Rngs, dtype: str):
    self.conv1 = Conv(size_in, planes, 1, rngs=rngs, dtype=dtype)
    self.bn1 = BatchNorm(planes)
    self.conv2 = Conv(planes, planes, 3, rngs=rngs, dtype=dtype)
    self.bn2 = BatchNorm(planes)
    self.conv3 = Conv(planes, 4 * planes, 1, rngs=rngs, dtype=dtype)
    self.bn3 = BatchNorm(4 * planes)
    self.bn3.weight[...] = jnp.zeros(4 * planes)  # at initialisation a block is its shortcut
    self.widened = stride > 1 or size_in != 4 * planes
    if self.widened:
      self.downsample = nnx.List(
        [Conv(size_in, 4 * planes, 1, rngs=rngs, dtype=dtype), BatchNorm(4 * planes)]
      )
    self.stride = stride

  def __call__(
    self,
    x: Array,  # [B, H, W, C]
    training: bool,
  ) -> Array:  # [B, H/stride, W/stride, 4 * planes]
    y = jax.nn.relu(self.bn1(self.conv1(x), training))
    y = jax.nn.relu(self.bn2(self.conv2(y), training))
    y = self.bn3(self.conv3(average_pool(y, self.stride)), training)
    if self.widened:
      conv: Any
      norm: Any
      conv, norm = self.downsample  # an nnx.List, whose items have no type of their own
      x = norm(conv(average_pool(x, self.stride)), training)
    return jax.nn.relu(x + y)


class AttentionPool(nnx.Module):
  """Attention pooling whose query is the mean over positions; keys are the mean and positions."""

  def __init__(
    self, places: int, width: int, heads: int, embed_dim: int, *, rngs: nnx.Rngs, dtype: str
  ):
    normal = jax.nn.initializers.normal(width**-0.5)

    def make(size_out: int) -> layers.Linear:
      return layers.Linear(
        width, size_out, weight=normal, bias=layers.uniform(width**-0.5), rngs=rngs, dtype=dtype
      )

    self.positional_embedding = nnx.Param(normal(rngs.params(), (places + 1, width)))
    self.k_proj, self.q_proj, self.v_proj = make(width), make(width), make(width)
    self.c_proj = make(embed_dim)
    self.heads = heads

  def __call__(
    self,
    x: Array,  # [B, H, W, D]
  ) -> Array:  # [B, E]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)  # [B, 1 + H*W, D]
    x = x + self.positional_embedding[...].astype(x.dtype)
    q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
    return self.c_proj(layers.attention(q, k, v, self.heads, None)[:, 0])


class ModifiedResNet(nnx.Module):
  def __init__(self, config: ResNetConfig, embed_dim: int, *, rngs: nnx.Rngs, dtype: str):
    width, half = config.width, config.width // 2
    self.conv1 = Conv(3, half, 3, stride=2, rngs=rngs, dtype=dtype)
    self.bn1 = BatchNorm(half)
    self.conv2 = Conv(half, half, 3, rngs=rngs, dtype=dtype)
    self.bn2 = BatchNorm(half)
    self.conv3 = Conv(half, width, 3, rngs=rngs, dtype=dtype)
    self.bn3 = BatchNorm(width)
    size_in = width
    for stage, count in enumerate(config.layers):
      planes = width * 2**stage
      blocks = []
      for number in range(count):
        stride = 2 if stage and not number else 1
        blocks.append(Bottleneck(size_in, planes, stride, rngs=rngs, dtype=dtype))
        size_in = 4 * planes
      setattr(self, f'layer{stage + 1}', nnx.List(blocks))
    self.attnpool = AttentionPool(
      (config.image_size // 32) ** 2, 32 * width, config.heads, embed_dim, rngs=rngs, dtype=dtype
    )
    self.config = config

  def __call__(
    self,
    images: Array,  # [B, S, S, 3] float32, normalised
    key: Array | None = None,  # any PRNG key: training, with the batch's statistics; not used
  ) -> Array:  # [B, E] float32, not normalised
    size, training = self.config.image_size, key is not None
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'images must be [B, {size}, {size}, 3], got {list(images.shape)}')
    x = images
    for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
      x = jax.nn.relu(norm(conv(x), training))
    x = average_pool(x, 2)
    for i in range(1, 5):
      for block in getattr(self, f'layer{i}'):
        x = block(x, training)
    return self.attnpool(x).astype(jnp.float32)


def average_pool(
  x: Array,  # [B, H, W, C]
  size: int,
) -> Array:  # [B, H // size, W // size, C]; rows beyond the last whole window are ignored
  if size == 1:
    return x
  batch, height, width, channels = x.shape
  h, w = height // size, width // size
  x = x[:, : h * size, : w * size].reshape(batch, h, size, w, size, channels)
  return x.mean((2, 4))
