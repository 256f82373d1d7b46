"""Losses over a global batch of paired features. A loss takes the outputs of a model's `encode`.

Losses are written on global arrays. Under jit with the batch sharded over a mesh, XLA inserts the
gathers, so that the negatives of a sample are all other samples of the global batch.
"""

from collections.abc import Callable, Mapping
import math
from typing import NamedTuple

import jax
from jax import Array, lax
import jax.numpy as jnp


def normalize(
  x: Array,  # [..., E]
) -> Array:  # [..., E] float32, unit length (a zero vector stays zero)
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def clip_loss(
  image: Array,  # [B, E], not normalised
  text: Array,  # [B, E], not normalised; row i belongs to image i
  scale: Array,  # []: factor of the cosines, the exponential of logit_scale
  bias: Array | None = None,  # ignored: a softmax is invariant to it
  *,
  chunk: int = 0,
  precision: str = 'float32',
) -> Array:  # [] float32
  """Returns the mean of both cross-entropies, image to text and text to image (CLIP, 2021).

  chunk: texts compared with all images at once. 0 holds the [B, B] logits, which is the reference.
  Else memory is [B, chunk], gradients included: the backward pass computes the logits again, so it
  takes four products of [B, E] by [E, B] where the reference takes three. The result is the same to
  float tolerance. precision: a key of PRECISIONS, of the products.
  """
  del bias
  image, text = _unit(image, text, scale)
  if not chunk:
    logits = _product(image, text, precision)  # [B, B]
    of_images, of_texts = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return (of_images + of_texts - 2 * jnp.diagonal(logits)).mean() / 2

  def add(of_images: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
    logits = _product(image, block[0], precision)  # [B, chunk]
    of_texts = jax.nn.logsumexp(logits, axis=0)
    logits = jnp.where(block[1], logits, -jnp.inf)  # the padding is no text
    return jnp.logaddexp(of_images, jax.nn.logsumexp(logits, axis=1)), of_texts

  empty = jnp.full_like(image[:, 0], -jnp.inf)
  of_images, of_texts = lax.scan(jax.checkpoint(add), empty, _blocks(text, chunk))
  matched = (image * text).sum(1)
  return (of_images + of_texts.reshape(-1)[: len(text)] - 2 * matched).mean() / 2


def siglip_loss(
  image: Array,  # [B, E], not normalised
  text: Array,  # [B, E], not normalised; row i belongs to image i
  scale: Array,  # []
  bias: Array,  # []: added to all logits, because most pairs do not match
  *,
  chunk: int = 0,
  precision: str = 'float32',
) -> Array:  # [] float32
  """Returns the sigmoid loss, summed over pairs and divided by images (Zhai et al. 2023).

  chunk, precision: as in clip_loss.
  """
  image, text = _unit(image, text, scale)
  if not chunk:
    logits = _product(image, text, precision) + bias  # [B, B]
    sign = 2 * jnp.eye(len(logits)) - 1
    return -jax.nn.log_sigmoid(sign * logits).sum() / len(logits)

  def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
    logits = _product(image, block[0], precision) + bias  # [B, chunk]
    return total + jnp.where(block[1], jax.nn.softplus(logits), 0).sum(1), None

  # As if no pair matched; -log_sigmoid(x) is softplus(-x), and softplus(x) - softplus(-x) is x.
  none = jnp.zeros_like(image[:, 0])
  total, _ = lax.scan(jax.checkpoint(add), none, _blocks(text, chunk))
  return (total - (image * text).sum(1) - bias).mean()


def _unit(image: Array, text: Array, scale: Array) -> tuple[Array, Array]:
  """Returns the vectors whose products are the logits."""
  if image.shape != text.shape or image.ndim != 2:
    raise ValueError(f'image and text must both be [B, E], got {image.shape} and {text.shape}')
  return scale * normalize(image), normalize(text)


# Precision of the logits -> that of JAX's product. In full float32 with HIGHEST; with HIGH, GPUs
# round the inputs to TensorFloat-32 (10 bits), and TPUs take three passes of bfloat16. No effect on
# CPUs.
PRECISIONS = {'float32': lax.Precision.HIGHEST, 'tensorfloat32': lax.Precision.HIGH}


def _product(image: Array, text: Array, precision: str) -> Array:  # [B, E], [C, E] -> [B, C] f32
  return jnp.matmul(image, text.T, precision=PRECISIONS[precision])


def _blocks(text: Array, chunk: int) -> tuple[Array, Array]:  # -> [n, chunk, E], [n, chunk] bool
  """Returns the texts in blocks, the last one padded with zeros, and which of them are texts."""
  count = -(-len(text) // chunk)
  padded = jnp.pad(text, ((0, count * chunk - len(text)), (0, 0)))
  is_text = jnp.arange(count * chunk) < len(text)
  return padded.reshape(count, chunk, -1), is_text.reshape(count, chunk)


class Loss(NamedTuple):
  """A loss, and its own initial values of the model's logit scale and bias, if any."""

  function: Callable[..., Array]  # (image, text, scale, bias[, chunk, precision]) -> []
  start: Mapping[str, float] = {}  # init_logit_scale (log of the scale), init_logit_bias


LOSSES = {
  'clip': Loss(clip_loss),
  # A scale of 10 and a bias of -10 (Zhai et al. 2023), as in open_clip.
  'siglip': Loss(siglip_loss, {'init_logit_scale': math.log(10), 'init_logit_bias': -10.0}),
}
