"""Layers of both towers: linear map, layer norm, attention, residual block, stack of blocks.

Names and shapes are open_clip's: the parameter at path a/b/c is the tensor `a.b.c` of its
state_dict with the same shape (matrices are [out, in]), so weights convert unchanged in both
directions. Tokens are flat, [B*T, D]; only attention separates the samples. Parameters are float32;
norms and softmax compute in float32, matrix products as models/precision.py says for `dtype`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Literal

from absl import logging
from flax import nnx
import jax
from jax import Array, lax
import jax.numpy as jnp

from clip_jax.models import precision

Init = Callable[..., Array]  # (key, shape, dtype) -> array
Pick = Callable[[Array], Array]  # [B*T, D] -> [B, D]: selects the rows of some tokens


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """The initialisers of the four matrices of a residual block."""

  in_proj: Init
  out_proj: Init
  c_fc: Init
  c_proj: Init
  zero_bias: bool = False  # of c_fc and c_proj; False: PyTorch's default, as in open_clip


def uniform(bound: float) -> Init:
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
    key, shape, dtype, minval=-bound, maxval=bound
  )


def pytorch_init(width: int, mlp_width: int) -> BlockInit:
  """Returns PyTorch's defaults, which open_clip's vision tower keeps: Xavier for the fused qkv."""
  return BlockInit(
    in_proj=uniform((6 / (4 * width)) ** 0.5),
    out_proj=uniform(width**-0.5),
    c_fc=uniform(width**-0.5),
    c_proj=uniform(mlp_width**-0.5),
  )


def clip_init(width: int, layers: int) -> BlockInit:
  """Returns the normal initialisation of CLIP's text tower (Radford et al. 2021; open_clip)."""
  deep = width**-0.5 * (2 * layers) ** -0.5
  normal = jax.nn.initializers.normal
  return BlockInit(
    in_proj=normal(width**-0.5),
    out_proj=normal(deep),
    c_fc=normal((2 * width) ** -0.5),
    c_proj=normal(deep),
  )


def timm_init() -> BlockInit:
  """Returns the initialisation of timm's vision transformers: truncated normal, std 0.02."""
  init = jax.nn.initializers.truncated_normal(0.02)
  return BlockInit(in_proj=init, out_proj=init, c_fc=init, c_proj=init, zero_bias=True)


def gelu(x: Array) -> Array:
  """Exact GELU through lax.erf; jax.nn.gelu uses erfc, which is slower on CPU."""
  return x * (0.5 + 0.5 * lax.erf(x * 0.5**0.5))


def quick_gelu(x: Array) -> Array:
  """The sigmoid approximation of GELU, with which OpenAI's weights were trained."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Array) -> Array:
  """The tanh approximation of GELU, with which the larger SigLIP models were trained."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {'gelu': gelu, 'gelu_tanh': gelu_tanh, 'quick_gelu': quick_gelu}


class LayerNorm(nnx.Module):
  """Layer norm over the last axis, computed in float32 for any input dtype."""

  def __init__(self, width: int, eps: float = 1e-5):  # PyTorch's default
    self.weight = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))
    self.eps = eps

  def __call__(
    self,
    x: Array,  # [..., D]
  ) -> Array:  # [..., D], the dtype of x
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
  """x @ weight.T + bias, with weight [out, in] as in PyTorch."""

  def __init__(
    self, size_in: int, size_out: int, *, weight: Init, bias: Init, rngs: nnx.Rngs, dtype: str
  ):
    self.weight = nnx.Param(weight(rngs.params(), (size_out, size_in)))
    self.bias = nnx.Param(bias(rngs.params(), (size_out,)))
    self.dtype = dtype

  def __call__(
    self,
    x: Array,  # [..., in]
  ) -> Array:  # [..., out]
    return linear(x, self.weight[...], self.bias[...], self.dtype)


def linear(
  x: Array,  # [..., in]
  weight: Array,  # [out, in]
  bias: Array,  # [out]
  dtype: str,
) -> Array:  # [..., out]
  y = precision.product(x, weight, dtype)
  return y + bias.astype(y.dtype)


def attention(
  q: Array,  # [B, Q, D]; Q is T, or 1 if only the pooled token is a query
  k: Array,  # [B, T, D]
  v: Array,  # [B, T, D]
  heads: int,
  mask: Array | None,  # bool, broadcasts to [B, Q, T]: True where a query attends to a key
) -> Array:  # [B, Q, D]
  """Softmax attention, with the fastest formulation for the backend."""
  by_head = jax.default_backend() == 'cpu'
  return (attention_by_head if by_head else attention_fused)(q, k, v, heads, mask)


def attention_by_head(q: Array, k: Array, v: Array, heads: int, mask: Array | None) -> Array:
  """Attention with one batched product per head, on slices without a transpose; fastest on CPU.

  On CPUs its inputs are float32: with inputs in bfloat16 these small products are slower (B = 32,
  T = 50, K = 64 on 2 cores: 55 and 75 GFLOP/s instead of 86 and 156).
  """
  size = q.shape[-1] // heads
  out = []
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    score = jnp.einsum('bqd,btd->bqt', q[..., part] * size**-0.5, k[..., part])
    score = score.astype(jnp.float32)
    if mask is not None:
      score = jnp.where(mask, score, -jnp.inf)
    weight = jax.nn.softmax(score).astype(v.dtype)
    out.append(jnp.einsum('bqt,btd->bqd', weight, v[..., part]))
  return jnp.concatenate(out, axis=-1)


def attention_fused(q: Array, k: Array, v: Array, heads: int, mask: Array | None) -> Array:
  """Attention of all heads in one call, with cuDNN's flash attention on a GPU where possible.

  Logs once which was taken.
  """
  reason = without_cudnn(jax.default_backend(), q.dtype.name, q.shape[-1] // heads)
  if reason:
    _log_once(f"attention: XLA's, as {reason}")
    return _all_heads(q, k, v, heads, mask, 'xla')
  _log_once("attention: cuDNN's flash attention; odd numbers of tokens are padded by one")
  attend = lambda q, k, v, mask: _all_heads(q, k, v, heads, mask, 'cudnn')
  return even_lengths(q, k, v, mask, attend)


def without_cudnn(backend: str, dtype: str, size: int) -> str:
  """Returns why cuDNN has no attention for heads of a size in a dtype; '' if it has."""
  if backend != 'gpu':
    return f"cuDNN's is not for a {backend}"
  if dtype not in ('bfloat16', 'float16'):
    return f"cuDNN's is not for {dtype} (train.dtype)"
  if size % 8 or size > 128:  # up to 256 on Hopper
    return f"cuDNN's is not for heads of size {size}: multiples of 8 up to 128"
  return ''


def even_lengths(
  q: Array,  # [B, Q, D]
  k: Array,  # [B, T, D]
  v: Array,  # [B, T, D]
  mask: Array | None,  # bool, broadcasts to [B, Q, T]
  attend: Callable[..., Array],  # (q, k, v, mask None or [B or 1, Q, T]), Q and T even
) -> Array:  # [B, Q, D]
  """Returns the same attention of even lengths: JAX trains with cuDNN's for no others.

  An odd number of queries gets one more, whose output is dropped, and an odd number of keys one
  that is masked. So outputs and gradients are the same.
  """
  queries, keys = q.shape[1], k.shape[1]
  more, masked = queries % 2, keys % 2
  if mask is None:
    if not more and not masked:
      return attend(q, k, v, None)
    mask = jnp.ones((1, 1, 1), bool)
  mask = mask[(None,) * (3 - mask.ndim)]
  mask = jnp.broadcast_to(mask, (len(mask), queries, keys))
  mask = jnp.pad(mask, ((0, 0), (0, more), (0, 0)), 'edge')  # no query without a key: 0 / 0
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, masked)))
  pad = lambda x, n: jnp.pad(x, ((0, 0), (0, n), (0, 0)))
  return attend(pad(q, more), pad(k, masked), pad(v, masked), mask)[:, :queries]


def _all_heads(
  q: Array,
  k: Array,
  v: Array,
  heads: int,
  mask: Array | None,
  implementation: Literal['xla', 'cudnn'],
) -> Array:
  split = [x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v)]  # [B, T, H, K]
  if mask is not None:
    mask = mask[(None,) * (3 - mask.ndim)][:, None]  # [B or 1, 1, Q or 1, T]
  out = jax.nn.dot_product_attention(*split, mask=mask, implementation=implementation)
  return out.reshape(q.shape)


_log_once = functools.cache(logging.info)


class Attention(nnx.Module):
  """Multi-head self-attention with the fused qkv matrix of torch.nn.MultiheadAttention."""

  def __init__(self, width: int, heads: int, *, init: BlockInit, rngs: nnx.Rngs, dtype: str):
    if width % heads:
      raise ValueError(f'width={width} must be a multiple of heads={heads}')
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
    pick: Pick = lambda y: y,  # selects the tokens of the output
  ) -> Array:  # [B*T, D], or [B, D] of the picked tokens
    width = x.shape[-1]
    qkv = linear(x, self.in_proj_weight[...], self.in_proj_bias[...], self.dtype)
    q, k, v = jnp.split(qkv.reshape(-1, tokens, 3 * width), 3, axis=-1)
    return self.out_proj(pick(attention(q, k, v, self.heads, mask).reshape(-1, width)))

  def pooled(
    self,
    x: Array,  # [B*T, D]
    query: Array,  # [B, D], the rows of x that are queries
    tokens: int,  # T
    mask: Array | None,  # bool, broadcasts to [B, 1, T]
  ) -> Array:  # [B, D]
    """Returns the attention of one query token per sample; no other queries are computed."""
    width = x.shape[-1]
    weight, bias = self.in_proj_weight[...], self.in_proj_bias[...]
    q = linear(query, weight[:width], bias[:width], self.dtype)
    kv = linear(x, weight[width:], bias[width:], self.dtype)
    k, v = jnp.split(kv.reshape(-1, tokens, 2 * width), 2, axis=-1)
    return self.out_proj(attention(q[:, None], k, v, self.heads, mask)[:, 0])


class MLP(nnx.Module):
  """c_fc, an activation, c_proj."""

  def __init__(
    self,
    width: int,
    mlp_width: int,
    *,
    init: BlockInit,
    activation: Callable,
    rngs: nnx.Rngs,
    dtype: str,
  ):
    def bias(width: int) -> Init:
      return jax.nn.initializers.zeros if init.zero_bias else uniform(width**-0.5)

    self.c_fc = Linear(width, mlp_width, weight=init.c_fc, bias=bias(width), rngs=rngs, dtype=dtype)
    self.c_proj = Linear(
      mlp_width, width, weight=init.c_proj, bias=bias(mlp_width), rngs=rngs, dtype=dtype
    )
    self.activation = activation

  def __call__(
    self,
    x: Array,  # [..., D]
  ) -> Array:  # [..., D]
    return self.c_proj(self.activation(self.c_fc(x)))


class LayerScale(nnx.Module):
  """A gain per channel of a block's branch (Touvron et al. 2021), named as in open_clip."""

  def __init__(self, width: int, start: float):
    self.gamma = nnx.Param(jnp.full(width, start))

  def __call__(
    self,
    x: Array,  # [..., D]
  ) -> Array:  # [..., D]
    return x * self.gamma[...].astype(x.dtype)


class ResidualAttentionBlock(nnx.Module):
  """x + attention(ln_1(x)), then x + mlp(ln_2(x)); with layer scale, each branch has a gain."""

  def __init__(
    self,
    width: int,
    heads: int,
    mlp_width: int,
    *,
    init: BlockInit,
    activation: Callable,
    rngs: nnx.Rngs,
    dtype: str,
    eps: float = 1e-5,
    ls_init_value: float | None = None,
  ):
    self.ln_1 = LayerNorm(width, eps)
    self.attn = Attention(width, heads, init=init, rngs=rngs, dtype=dtype)
    self.ln_2 = LayerNorm(width, eps)
    self.mlp = MLP(width, mlp_width, init=init, activation=activation, rngs=rngs, dtype=dtype)
    if ls_init_value is not None:
      self.ls_1 = LayerScale(width, ls_init_value)
      self.ls_2 = LayerScale(width, ls_init_value)
    self.scaled = ls_init_value is not None

  def __call__(
    self,
    x: Array,  # [B*T, D]
    tokens: int,  # T
    mask: Array | None,  # bool, broadcasts to [B, T, T]
    pick: Pick = lambda y: y,
  ) -> Array:  # [B*T, D], or [B, D] of the picked tokens; other outputs are not computed
    return self._add_attention_and_mlp(pick(x), self.attn(self.ln_1(x), tokens, mask, pick))

  def pooled(
    self,
    x: Array,  # [B*T, D]
    tokens: int,  # T
    mask: Array | None,  # bool, broadcasts to [B, 1, T]
    pick: Pick,  # exactly one token of each sample
  ) -> Array:  # [B, D]
    y = self.ln_1(x)
    return self._add_attention_and_mlp(pick(x), self.attn.pooled(y, pick(y), tokens, mask))

  def _add_attention_and_mlp(self, x: Array, attended: Array) -> Array:  # [n, D] both
    x = x + (self.ls_1(attended) if self.scaled else attended)
    y = self.mlp(self.ln_2(x))
    return x + (self.ls_2(y) if self.scaled else y)


class Transformer(nnx.Module):
  """A stack of `layers` blocks, unrolled: a scan over stacked layers is 15 % slower on CPU.

  remat: a key of REMAT, which decides what the backward pass recomputes.
  """

  def __init__(
    self,
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    *,
    init: BlockInit,
    activation: Callable,
    rngs: nnx.Rngs,
    dtype: str,
    eps: float = 1e-5,
    ls_init_value: float | None = None,
    remat: str = 'none',
  ):
    self.resblocks = nnx.List(
      [
        ResidualAttentionBlock(
          width,
          heads,
          mlp_width,
          init=init,
          activation=activation,
          rngs=rngs,
          dtype=dtype,
          eps=eps,
          ls_init_value=ls_init_value,
        )
        for _ in range(layers)
      ]
    )
    self.remat = remat

  def __call__(
    self,
    x: Array,  # [B*T, D]
    tokens: int,  # T
    mask: Array | None,  # bool, broadcasts to [B, T, T]
  ) -> Array:  # [B*T, D]
    for block in self.resblocks:
      x = self._run(block, x, tokens, mask)
    return x

  def pooled(
    self,
    x: Array,  # [B*T, D]
    tokens: int,  # T
    mask: Array | None,  # bool, broadcasts to [B, T, T]
    pooled_mask: Array | None,  # bool, broadcasts to [B, 1, T]: rows of mask at picked tokens
    pick: Pick,  # exactly one token of each sample
  ) -> Array:  # [B, D]
    """Returns the output at the picked tokens, exactly; the last block computes nothing else."""
    *blocks, last = self.resblocks
    for block in blocks:
      x = self._run(block, x, tokens, mask)
    return last.pooled(x, tokens, pooled_mask, pick)

  def picked(
    self,
    x: Array,  # [R*T, D]
    tokens: int,  # T
    mask: Array,  # bool [R, T, T]
    pick: Pick,  # any tokens: packed rows hold several samples
  ) -> Array:  # [B, D]
    """Returns the output at the picked tokens, exactly; a row may have any number of them."""
    *blocks, last = self.resblocks
    for block in blocks:
      x = self._run(block, x, tokens, mask)
    return last(x, tokens, mask, pick)

  def _run(self, block: ResidualAttentionBlock, x: Array, tokens: int, mask: Array | None) -> Array:
    if REMAT[self.remat] is None:
      return block(x, tokens, mask)
    graph, state = nnx.split(block)
    run = jax.checkpoint(
      lambda state, x: nnx.merge(graph, state)(x, tokens, mask), policy=REMAT[self.remat]
    )
    return run(state, x)


# What a block stores for its backward pass: everything; its input only; or also the results of its
# matrix products, except those with a batch axis (the attention's), which are recomputed.
REMAT = {
  'none': None,
  'blocks': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
