"""The text transformer of CLIP: token ids -> one vector each.

Names, shapes and initialisation are those of open_clip's TextTransformer.
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from clip_jax.models import layers, precision
from clip_jax.models.zoo import TextConfig


class TokenEmbedding(nnx.Module):
  """A table of V rows; its tensor has PyTorch's name."""

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.weight = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (vocab_size, width)))

  def __call__(
    self,
    text: Array,  # [...] int32
  ) -> Array:  # [..., D] float32
    return self.weight[...][text]


class TextTransformer(nnx.Module):
  """A transformer over tokens: embeddings, blocks, pooling to one token, norm, projection to E."""

  def __init__(
    self, config: TextConfig, embed_dim: int, *, rngs: nnx.Rngs, dtype: str, remat: str = 'none'
  ):
    width, normal = config.width, jax.nn.initializers.normal
    self.token_embedding = TokenEmbedding(config.vocab_size, width, rngs=rngs)
    self.positional_embedding = nnx.Param(
      normal(0.01)(rngs.params(), (config.context_length, width))
    )
    self.transformer = layers.Transformer(
      width,
      config.layers,
      config.heads,
      int(config.mlp_ratio * width),
      init=layers.clip_init(width, config.layers),
      activation=layers.ACTIVATIONS[config.activation],
      rngs=rngs,
      dtype=dtype,
      eps=config.eps,
      ls_init_value=config.ls_init_value,
      remat=remat,
    )
    self.ln_final = layers.LayerNorm(width, config.eps)
    if config.proj == 'linear':
      self.text_projection = nnx.Param(normal(width**-0.5)(rngs.params(), (width, embed_dim)))
    elif config.proj == 'bias':
      self.text_projection = layers.Linear(
        width,
        embed_dim,
        weight=normal(width**-0.5),
        bias=jax.nn.initializers.zeros,
        rngs=rngs,
        dtype=dtype,
      )
    self.config = config
    self.dtype = dtype

  def __call__(
    self,
    text: Array,  # [B, T] int32, T at most the context length
  ) -> Array:  # [B, E] float32, not normalised
    """Returns one vector per caption.

    With a causal mask, ids after the pooled token have no effect. So captions that are pooled at
    their end token may be cut to any T that contains it, with the same result.
    """
    longest, width = self.positional_embedding.shape
    if text.ndim != 2 or text.shape[1] > longest:
      raise ValueError(f'text must be [B, T] with T at most {longest}, got {list(text.shape)}')
    batch, tokens = text.shape
    x = self.token_embedding(text) + self.positional_embedding[:tokens]
    end, position = self._pooled_at(text), jnp.arange(tokens)  # [B], [T]
    causal = self.config.causal
    x = self.transformer.pooled(
      x.reshape(-1, width).astype(precision.of(self.dtype).activations),
      tokens,
      mask=position[:, None] >= position if causal else None,  # [T, T]
      pooled_mask=(position <= end[:, None])[:, None] if causal else None,  # [B, 1, T]
      pick=lambda y: _take_rows(y.reshape(batch, tokens, width), end[:, None])[:, 0],
    )
    return self._project(x)

  def packed(
    self,
    tokens: Array,  # [G, R, T] int32: rows that hold several captions each
    segment: Array,  # [G, R, T] int32: number of the token's caption in its row; 0: none
    position: Array,  # [G, R, T] int32: position in that caption
    end: Array,  # [G, B/G] int32: index of each caption's pooled token among its group's R*T
  ) -> Array:  # [B, E] float32, not normalised, in the order of `end`
    """Returns the features of packed captions, equal to those of one caption per row.

    A token attends only to its own caption. Each of the G groups lies on one device, so devices
    exchange no data.
    """
    if not packable(self.config):
      raise ValueError('packing needs a text tower with a causal mask and pool_type=argmax')
    groups, rows, length = tokens.shape
    width = self.config.width
    x = self.token_embedding(tokens) + self.positional_embedding[...][position]
    place = jnp.arange(length)
    mask = (segment[..., None] == segment[..., None, :]) & (place[:, None] >= place)

    x = self.transformer.picked(
      x.reshape(-1, width).astype(precision.of(self.dtype).activations),
      length,
      mask.reshape(-1, length, length),
      pick=lambda y: _take_rows(y.reshape(groups, rows * length, width), end).reshape(-1, width),
    )
    return self._project(x)

  def _pooled_at(self, text: Array) -> Array:  # [B, T] -> [B] int32
    kind = self.config.pool_type
    if kind in ('first', 'last'):
      return jnp.full(text.shape[0], 0 if kind == 'first' else text.shape[1] - 1)
    return (text == self.config.eos_id if kind == 'eos' else text).argmax(-1)

  def _project(self, x: Array) -> Array:  # [B, D] -> [B, E]
    x = self.ln_final(x)  # after pooling, with the same result: the norm acts on single tokens
    if self.config.proj == 'linear':
      assert isinstance(self.text_projection, nnx.Param)
      x = precision.product(x, self.text_projection[...], self.dtype, axis=0)
    elif self.config.proj == 'bias':
      x = self.text_projection(x)
    return x.astype(jnp.float32)


def _take_rows(
  x: Array,  # [G, N, D]
  places: Array,  # [G, n] int32, each in 0..N-1
) -> Array:  # [G, n, D]
  """Returns the given rows of each group; with sharded groups, each device uses only its own."""
  return jnp.take_along_axis(x, places[..., None], axis=1)


def packable(config: TextConfig) -> bool:
  """Returns whether a caption's features depend only on its tokens up to the end token."""
  return config.causal and config.pool_type == 'argmax'
