"""The vision transformer of CLIP: images -> one vector each.

Names, shapes and initialisation are those of open_clip's VisionTransformer. With attention pooling
(SigLIP) it is timm's tower, with open_clip's names for the shared parts.
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from clip_jax.models import layers, precision
from clip_jax.models.zoo import ViTConfig

_TIMM_STD = 0.02  # standard deviation of timm's truncated normal weights


class PatchEmbedding(nnx.Module):
  """A convolution with stride = kernel size, computed as one matrix product over patches."""

  def __init__(self, patch_size: int, width: int, *, bias: bool, rngs: nnx.Rngs, dtype: str):
    init = layers.uniform((3 * patch_size * patch_size) ** -0.5)
    self.weight = nnx.Param(init(rngs.params(), (width, 3, patch_size, patch_size)))
    self.bias = nnx.Param(init(rngs.params(), (width,))) if bias else None
    self.patch_size = patch_size
    self.dtype = dtype

  def __call__(
    self,
    images: Array,  # [B, S, S, 3]; pixels beyond the last whole patch are ignored
  ) -> Array:  # [B, P, D]
    size = self.patch_size
    batch, grid = images.shape[0], images.shape[1] // size
    x = images[:, : grid * size, : grid * size].reshape(batch, grid, size, grid, size, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * grid * grid, size * size * 3)
    weight = self.weight[...].transpose(2, 3, 1, 0).reshape(size * size * 3, -1)
    x = precision.product(x, weight, self.dtype, axis=0)
    if self.bias is not None:
      x = x + self.bias[...].astype(x.dtype)
    return x.reshape(batch, grid * grid, -1)


class LatentMLP(nnx.Module):
  """An MLP with timm's names: fc1, an activation, fc2."""

  def __init__(self, width: int, mlp_width: int, *, activation: str, rngs: nnx.Rngs, dtype: str):
    make = _timm_linear(rngs, dtype)
    self.fc1, self.fc2 = make(width, mlp_width), make(mlp_width, width)
    self.activation = layers.ACTIVATIONS[activation]

  def __call__(
    self,
    x: Array,  # [..., D]
  ) -> Array:  # [..., D]
    return self.fc2(self.activation(self.fc1(x)))


class AttentionPool(nnx.Module):
  """Attention pooling with a learnt query over all tokens, then an MLP.

  This is timm's AttentionPoolLatent, with its names: the multihead attention pooling of Zhai et al.
  2022 (Scaling Vision Transformers), used by SigLIP.
  """

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype: str):
    width, make = config.width, _timm_linear(rngs, dtype)
    latent = jax.nn.initializers.truncated_normal(width**-0.5)
    self.latent = nnx.Param(latent(rngs.params(), (1, 1, width)))
    self.q, self.kv, self.proj = make(width, width), make(width, 2 * width), make(width, width)
    self.norm = layers.LayerNorm(width, config.eps)
    self.mlp = LatentMLP(
      width, int(config.mlp_ratio * width), activation=config.activation, rngs=rngs, dtype=dtype
    )
    self.heads = config.heads

  def __call__(
    self,
    x: Array,  # [B, T, D]
  ) -> Array:  # [B, D]
    k, v = jnp.split(self.kv(x), 2, axis=-1)
    q = jnp.broadcast_to(self.q(self.latent[...].astype(x.dtype)), (x.shape[0], 1, x.shape[-1]))
    x = self.proj(layers.attention(q, k, v, self.heads, None)[:, 0])
    return x + self.mlp(self.norm(x))


class VisionTransformer(nnx.Module):
  """A transformer over patches (and a class token), with pooling and a projection to E."""

  def __init__(
    self,
    config: ViTConfig,
    embed_dim: int,
    *,
    rngs: nnx.Rngs,
    dtype: str,
    patch_dropout: float = 0.0,
    remat: str = 'none',
  ):
    width, patches = config.width, (config.image_size // config.patch_size) ** 2
    mlp_width = int(config.mlp_ratio * width)
    timm = config.pool_type == 'map'
    normal = jax.nn.initializers.normal(_TIMM_STD if timm else width**-0.5)
    init = layers.timm_init() if timm else layers.pytorch_init(width, mlp_width)
    self.conv1 = PatchEmbedding(
      config.patch_size, width, bias=config.patch_bias, rngs=rngs, dtype=dtype
    )
    if config.class_token:
      self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
    self.positional_embedding = nnx.Param(
      normal(rngs.params(), (patches + config.class_token, width))
    )
    if config.ln_pre:
      self.ln_pre = layers.LayerNorm(width, config.eps)
    self.transformer = layers.Transformer(
      width,
      config.layers,
      config.heads,
      mlp_width,
      init=init,
      activation=layers.ACTIVATIONS[config.activation],
      rngs=rngs,
      dtype=dtype,
      eps=config.eps,
      ls_init_value=config.ls_init_value,
      remat=remat,
    )
    self.ln_post = layers.LayerNorm(width, config.eps)
    if timm:
      self.attn_pool = AttentionPool(config, rngs=rngs, dtype=dtype)
    if config.proj:
      self.proj = nnx.Param(normal(rngs.params(), (width, embed_dim)))
    self.config = config
    self.patch_dropout = patch_dropout
    self.dtype = dtype

  def __call__(
    self,
    images: Array,  # [B, S, S, 3] float32, normalised
    key: Array | None = None,  # PRNG key: training, with patch dropout; None: evaluation
  ) -> Array:  # [B, E] float32, not normalised
    config, size = self.config, self.config.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'images must be [B, {size}, {size}, 3], got {list(images.shape)}')
    x = self._tokens(images, key)
    batch, tokens, width = x.shape
    x = x.reshape(-1, width)
    if config.ln_pre:
      x = self.ln_pre(x)
    if config.pool_type == 'tok':
      x = self.transformer.pooled(
        x, tokens, mask=None, pooled_mask=None, pick=lambda y: y.reshape(batch, tokens, width)[:, 0]
      )
      x = self.ln_post(x)  # after pooling, with the same result: the norm acts on single tokens
    else:
      x = self._pool(self.transformer(x, tokens, mask=None), batch, tokens)
    if config.proj:
      x = precision.product(x, self.proj[...], self.dtype, axis=0)
    return x.astype(jnp.float32)

  def _tokens(self, images: Array, key: Array | None) -> Array:  # [B, S, S, 3] -> [B, T, D]
    x = self.conv1(images)  # [B, P, D]
    position = self.positional_embedding[...].astype(x.dtype)
    first = int(self.config.class_token)
    x = x + position[first:]
    if key is not None and self.patch_dropout:
      x = drop_patches(x, self.patch_dropout, key)
    if first:
      token = self.class_embedding[...].astype(x.dtype) + position[0]
      x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
    return x

  def _pool(self, x: Array, batch: int, tokens: int) -> Array:  # [B*T, D] -> [B, D]
    """Pools tokens: 'avg' is the mean of the patches without class token, 'map' uses all tokens."""
    config = self.config
    after = config.final_ln_after_pool and config.pool_type == 'avg'
    x = (x if after else self.ln_post(x)).reshape(batch, tokens, -1)
    if config.pool_type == 'map':
      return self.attn_pool(x)
    x = x[:, int(config.class_token) :].mean(axis=1)
    return self.ln_post(x) if after else x


def drop_patches(
  x: Array,  # [B, P, D]
  share: float,  # of the patches to drop, drawn separately for each image
  key: Array,
) -> Array:  # [B, P', D], P' = max(1, floor(P * (1 - share)))
  """Drops random patches of each image (Li et al. 2022, FLIP), like open_clip's PatchDropout."""
  kept = max(1, int(x.shape[1] * (1 - share)))
  order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)[:, :kept]
  return jnp.take_along_axis(x, order[..., None], axis=1)


def _timm_linear(rngs: nnx.Rngs, dtype: str):
  """Returns a constructor of linear maps with timm's truncated normal weights and zero bias."""
  weight, bias = jax.nn.initializers.truncated_normal(_TIMM_STD), jax.nn.initializers.zeros
  return lambda size_in, size_out: layers.Linear(
    size_in, size_out, weight=weight, bias=bias, rngs=rngs, dtype=dtype
  )
