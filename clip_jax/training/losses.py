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
) -> Array:  # [] float32
  """Returns the mean of both cross-entropies, image to text and text to image (CLIP, 2021)."""
  del bias
  logits = _logits(image, text, scale)  # [B, B]
  matched = jnp.diagonal(logits)
  to_text = jax.nn.logsumexp(logits, axis=1) - matched
  to_image = jax.nn.logsumexp(logits, axis=0) - matched
  return (to_text.mean() + to_image.mean()) / 2


def siglip_loss(
  image: Array,  # [B, E], not normalised
  text: Array,  # [B, E], not normalised; row i belongs to image i
  scale: Array,  # []
  bias: Array,  # []: added to all logits, because most pairs do not match
) -> Array:  # [] float32
  """Returns the sigmoid loss, summed over pairs and divided by images (Zhai et al. 2023)."""
  logits = _logits(image, text, scale) + bias  # [B, B]
  sign = 2 * jnp.eye(len(logits)) - 1
  return -jax.nn.log_sigmoid(sign * logits).sum() / len(logits)


def _logits(image: Array, text: Array, scale: Array) -> Array:  # [B, E] twice, [] -> [B, B] float32
  """Returns cosines times scale in full float32, which GPUs and TPUs use only with HIGHEST."""
  if image.shape != text.shape or image.ndim != 2:
    raise ValueError(f'image and text must both be [B, E], got {image.shape} and {text.shape}')
  return jnp.matmul(scale * normalize(image), normalize(text).T, precision=lax.Precision.HIGHEST)


class Loss(NamedTuple):
  """A loss, and its own initial values of the model's logit scale and bias, if any."""

  function: Callable[..., Array]  # (image, text, scale, bias) -> []
  start: Mapping[str, float] = {}  # init_logit_scale (log of the scale), init_logit_bias


LOSSES = {
  'clip': Loss(clip_loss),
  # A scale of 10 and a bias of -10 (Zhai et al. 2023), as in open_clip.
  'siglip': Loss(siglip_loss, {'init_logit_scale': math.log(10), 'init_logit_bias': -10.0}),
}
