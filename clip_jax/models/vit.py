"""The vision transformer of CLIP: images -> one vector each, pooled at the class token.

Names, shapes and initialisation are those of open_clip's VisionTransformer (pool type 'tok').
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from clip_jax.core.types import Array
from clip_jax.models import layers


class PatchEmbedding(nnx.Module):
  """A convolution whose stride is its size, as one matrix product over the patches' pixels."""

  def __init__(self, patch_size: int, width: int, *, rngs: nnx.Rngs, dtype: str):
    init = layers.uniform((3 * patch_size * patch_size) ** -0.5)
    self.weight = nnx.Param(init(rngs.params(), (width, 3, patch_size, patch_size)))
    self.patch_size = patch_size
    self.dtype = dtype

  def __call__(
      self,
      images: Array,  # [B, S, S, 3]; pixels beyond the last whole patch are not seen
  ) -> Array:  # [B, P, D]
    size = self.patch_size
    batch, grid = images.shape[0], images.shape[1] // size
    x = images[:, :grid * size, :grid * size].reshape(batch, grid, size, grid, size, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * grid * grid, size * size * 3)
    weight = self.weight[...].transpose(2, 3, 1, 0).reshape(size * size * 3, -1)
    return (x.astype(self.dtype) @ weight.astype(self.dtype)).reshape(batch, grid * grid, -1)


class VisionTransformer(nnx.Module):
  """Patches and a class token through ln_pre, the blocks and ln_post, then projected to E."""

  def __init__(self, *, image_size: int, patch_size: int, width: int, layers_: int, heads: int,
               mlp_width: int, embed_dim: int, activation: Callable, rngs: nnx.Rngs, dtype: str):
    patches = (image_size // patch_size) ** 2
    normal = jax.nn.initializers.normal(width ** -0.5)
    self.conv1 = PatchEmbedding(patch_size, width, rngs=rngs, dtype=dtype)
    self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
    self.positional_embedding = nnx.Param(normal(rngs.params(), (patches + 1, width)))
    self.ln_pre = layers.LayerNorm(width)
    self.transformer = layers.Transformer(
        width, layers_, heads, mlp_width, init=layers.pytorch_init(width, mlp_width),
        activation=activation, rngs=rngs, dtype=dtype)
    self.ln_post = layers.LayerNorm(width)
    self.proj = nnx.Param(normal(rngs.params(), (width, embed_dim)))
    self.image_size = image_size
    self.dtype = dtype

  def __call__(
      self,
      images: Array,  # [B, S, S, 3] float32, normalised
  ) -> Array:  # [B, E] float32, not normalised
    size = self.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'images must be [B, {size}, {size}, 3], got {list(images.shape)}')
    patches = self.conv1(images)  # [B, P, D]
    batch, _, width = patches.shape
    first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (batch, 1, width))
    x = jnp.concatenate([first, patches], axis=1)
    x = x + self.positional_embedding[...].astype(x.dtype)
    tokens = x.shape[1]
    x = self.ln_pre(x.reshape(-1, width))  # [B*(P+1), D]
    x = self.transformer.pooled(
        x, tokens, mask=None, pooled_mask=None,
        pick=lambda y: y.reshape(batch, tokens, width)[:, 0])
    x = self.ln_post(x)  # pooling before the norm is exact: it looks at one token at a time
    return (x @ self.proj[...].astype(x.dtype)).astype(jnp.float32)
