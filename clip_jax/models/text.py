"""The text transformer of CLIP: token ids -> one vector each, pooled at the end token.

Names, shapes and initialisation are those of open_clip's TextTransformer (causal, pool type
'argmax').
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from clip_jax.core.types import Array
from clip_jax.models import layers


class TokenEmbedding(nnx.Module):
  """A table of V rows; the name of its tensor is PyTorch's."""

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.weight = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (vocab_size, width)))

  def __call__(
      self,
      text: Array,  # [B, T] int32
  ) -> Array:  # [B, T, D] float32
    return self.weight[...][text]


class TextTransformer(nnx.Module):
  """Tokens and positions through causal blocks and ln_final, then projected to E."""

  def __init__(self, *, context_length: int, vocab_size: int, width: int, layers_: int,
               heads: int, mlp_width: int, embed_dim: int, activation: Callable,
               rngs: nnx.Rngs, dtype: str):
    normal = jax.nn.initializers.normal
    self.token_embedding = TokenEmbedding(vocab_size, width, rngs=rngs)
    self.positional_embedding = nnx.Param(normal(0.01)(rngs.params(), (context_length, width)))
    self.transformer = layers.Transformer(
        width, layers_, heads, mlp_width, init=layers.clip_init(width, layers_),
        activation=activation, rngs=rngs, dtype=dtype)
    self.ln_final = layers.LayerNorm(width)
    self.text_projection = nnx.Param(normal(width ** -0.5)(rngs.params(), (width, embed_dim)))
    self.dtype = dtype

  def __call__(
      self,
      text: Array,  # [B, T] int32, T at most the context length; the end token is the highest id
  ) -> Array:  # [B, E] float32, not normalised
    """Ids after the end token change nothing: attention is causal and the end token is pooled.

    So captions may be cut to any T that holds their end tokens, with the same result.
    """
    longest, width = self.positional_embedding.shape
    if text.ndim != 2 or text.shape[1] > longest:
      raise ValueError(f'text must be [B, T] with T at most {longest}, got {list(text.shape)}')
    batch, tokens = text.shape
    x = self.token_embedding(text) + self.positional_embedding[:tokens]
    end = text.argmax(-1)  # [B]
    position = jnp.arange(tokens)
    x = self.transformer.pooled(
        x.reshape(-1, width).astype(self.dtype), tokens,
        mask=position[:, None] >= position,  # [T, T]
        pooled_mask=(position <= end[:, None])[:, None],  # [B, 1, T]
        pick=lambda y: y[jnp.arange(batch) * tokens + end])
    x = self.ln_final(x)  # pooling before the norm is exact: it looks at one token at a time
    return (x @ self.text_projection[...].astype(x.dtype)).astype(jnp.float32)
