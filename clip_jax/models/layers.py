"""What both towers are made of: linear map, layer norm, attention, residual block, stack of blocks.

Names and shapes are open_clip's: the parameter at path a/b/c is the tensor `a.b.c` of its
state_dict with the same shape (matrices are [out, in]), so that weights move both ways unchanged.
Tokens travel flat, as [B*T, D]: only attention needs to see where one sample ends. Parameters are
float32; `dtype` is what the matrix products compute in, while norms and softmax stay in float32.
"""

import dataclasses
from collections.abc import Callable

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from clip_jax.core.types import Array

Init = Callable[..., Array]  # (key, shape, dtype) -> array


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """How the four matrices of a residual block start."""
  in_proj: Init
  out_proj: Init
  c_fc: Init
  c_proj: Init


def uniform(bound: float) -> Init:
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, minval=-bound, maxval=bound)


def pytorch_init(width: int, mlp_width: int) -> BlockInit:
  """PyTorch's defaults, which open_clip leaves in its vision tower: Xavier for the fused qkv."""
  return BlockInit(
      in_proj=uniform((6 / (4 * width)) ** 0.5), out_proj=uniform(width ** -0.5),
      c_fc=uniform(width ** -0.5), c_proj=uniform(mlp_width ** -0.5))


def clip_init(width: int, layers: int) -> BlockInit:
  """The normal initialisation of CLIP's text tower (Radford et al. 2021; open_clip)."""
  deep = width ** -0.5 * (2 * layers) ** -0.5
  normal = jax.nn.initializers.normal
  return BlockInit(in_proj=normal(width ** -0.5), out_proj=normal(deep),
                   c_fc=normal((2 * width) ** -0.5), c_proj=normal(deep))


def gelu(x: Array) -> Array:
  """Exact GELU through lax.erf; jax.nn.gelu takes the detour over erfc, which costs more on CPU."""
  return x * (0.5 + 0.5 * lax.erf(x * 0.5 ** 0.5))


def quick_gelu(x: Array) -> Array:
  """The sigmoid approximation that OpenAI's own weights were trained with."""
  return x * jax.nn.sigmoid(1.702 * x)


class LayerNorm(nnx.Module):
  """Over the last axis, eps 1e-5 (PyTorch's), in float32 whatever comes in."""

  def __init__(self, width: int):
    self.weight = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(
      self,
      x: Array,  # [..., D]
  ) -> Array:  # [..., D], the dtype of x
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
  """x @ weight.T + bias in `dtype`, with weight [out, in] as PyTorch keeps it."""

  def __init__(self, size_in: int, size_out: int, *, weight: Init, bias: Init, rngs: nnx.Rngs,
               dtype: str):
    self.weight = nnx.Param(weight(rngs.params(), (size_out, size_in)))
    self.bias = nnx.Param(bias(rngs.params(), (size_out,)))
    self.dtype = dtype

  def __call__(
      self,
      x: Array,  # [..., in]
  ) -> Array:  # [..., out] dtype
    return linear(x, self.weight[...], self.bias[...], self.dtype)


def linear(
    x: Array,  # [..., in]
    weight: Array,  # [out, in]
    bias: Array,  # [out]
    dtype: str,
) -> Array:  # [..., out] dtype
  y = lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
  return y + bias.astype(dtype)


def attention(
    q: Array,  # [B, Q, D]; Q is T, or 1 where only the pooled token asks
    k: Array,  # [B, T, D]
    v: Array,  # [B, T, D]
    heads: int,
    mask: Array | None,  # bool, broadcasts to [B, Q, T]: True where a query may look
) -> Array:  # [B, Q, D]
  """Softmax attention, one batched product a head on slices: no transpose to a head axis."""
  size = q.shape[-1] // heads
  out = []
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    score = jnp.einsum('bqd,btd->bqt', q[..., part] * size ** -0.5, k[..., part])
    score = score.astype(jnp.float32)
    if mask is not None:
      score = jnp.where(mask, score, -jnp.inf)
    weight = jax.nn.softmax(score).astype(v.dtype)
    out.append(jnp.einsum('bqt,btd->bqd', weight, v[..., part]))
  return jnp.concatenate(out, axis=-1)


class Attention(nnx.Module):
  """Multi-head self-attention with the fused qkv matrix of torch.nn.MultiheadAttention."""

  def __init__(self, width: int, heads: int, *, init: BlockInit, rngs: nnx.Rngs, dtype: str):
    if width % heads:
      raise ValueError(f'a width of {width} does not divide into {heads} heads')
    zeros = jax.nn.initializers.zeros
    self.in_proj_weight = nnx.Param(init.in_proj(rngs.params(), (3 * width, width)))
    self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
    self.out_proj = Linear(width, width, weight=init.out_proj, bias=zeros, rngs=rngs, dtype=dtype)
    self.heads = heads
    self.dtype = dtype

  def __call__(
      self,
      x: Array,  # [B*T, D]
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, T, T]
  ) -> Array:  # [B*T, D]
    width = x.shape[-1]
    qkv = linear(x, self.in_proj_weight[...], self.in_proj_bias[...], self.dtype)
    q, k, v = jnp.split(qkv.reshape(-1, tokens, 3 * width), 3, axis=-1)
    return self.out_proj(attention(q, k, v, self.heads, mask).reshape(-1, width))

  def pooled(
      self,
      x: Array,  # [B*T, D]
      query: Array,  # [B, D], the rows of x that ask
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, 1, T]
  ) -> Array:  # [B, D]
    width = x.shape[-1]
    weight, bias = self.in_proj_weight[...], self.in_proj_bias[...]
    q = linear(query, weight[:width], bias[:width], self.dtype)
    kv = linear(x, weight[width:], bias[width:], self.dtype)
    k, v = jnp.split(kv.reshape(-1, tokens, 2 * width), 2, axis=-1)
    return self.out_proj(attention(q[:, None], k, v, self.heads, mask)[:, 0])


class MLP(nnx.Module):
  """c_fc, an activation, c_proj; PyTorch's default biases in both towers, as in open_clip."""

  def __init__(self, width: int, mlp_width: int, *, init: BlockInit, activation: Callable,
               rngs: nnx.Rngs, dtype: str):
    self.c_fc = Linear(width, mlp_width, weight=init.c_fc, bias=uniform(width ** -0.5),
                       rngs=rngs, dtype=dtype)
    self.c_proj = Linear(mlp_width, width, weight=init.c_proj, bias=uniform(mlp_width ** -0.5),
                         rngs=rngs, dtype=dtype)
    self.activation = activation

  def __call__(
      self,
      x: Array,  # [..., D]
  ) -> Array:  # [..., D]
    return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nnx.Module):
  """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

  def __init__(self, width: int, heads: int, mlp_width: int, *, init: BlockInit,
               activation: Callable, rngs: nnx.Rngs, dtype: str):
    self.ln_1 = LayerNorm(width)
    self.attn = Attention(width, heads, init=init, rngs=rngs, dtype=dtype)
    self.ln_2 = LayerNorm(width)
    self.mlp = MLP(width, mlp_width, init=init, activation=activation, rngs=rngs, dtype=dtype)

  def __call__(
      self,
      x: Array,  # [B*T, D]
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, T, T]
  ) -> Array:  # [B*T, D]
    x = x + self.attn(self.ln_1(x), tokens, mask)
    return x + self.mlp(self.ln_2(x))

  def pooled(
      self,
      x: Array,  # [B*T, D]
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, 1, T]
      pick: Callable[[Array], Array],  # [B*T, D] -> [B, D]
  ) -> Array:  # [B, D]
    """The block's output at one token a sample. Exact: no other output of the block is read."""
    y = self.ln_1(x)
    x = pick(x) + self.attn.pooled(y, pick(y), tokens, mask)
    return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
  """`layers` blocks, unrolled (a scan over stacked layers measured 15 % slower on CPU)."""

  def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, init: BlockInit,
               activation: Callable, rngs: nnx.Rngs, dtype: str):
    self.resblocks = nnx.List([
        ResidualAttentionBlock(width, heads, mlp_width, init=init, activation=activation,
                               rngs=rngs, dtype=dtype)
        for _ in range(layers)])

  def __call__(
      self,
      x: Array,  # [B*T, D]
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, T, T]
  ) -> Array:  # [B*T, D]
    for block in self.resblocks:
      x = block(x, tokens, mask)
    return x

  def pooled(
      self,
      x: Array,  # [B*T, D]
      tokens: int,  # T
      mask: Array | None,  # bool, broadcasts to [B, T, T]
      pooled_mask: Array | None,  # bool, broadcasts to [B, 1, T]: the picked tokens' rows of mask
      pick: Callable[[Array], Array],  # [B*T, D] -> [B, D]
  ) -> Array:  # [B, D]
    """The stack's output at the picked tokens; the last block computes nothing else."""
    *blocks, last = self.resblocks
    for block in blocks:
      x = block(x, tokens, mask)
    return last.pooled(x, tokens, pooled_mask, pick)
