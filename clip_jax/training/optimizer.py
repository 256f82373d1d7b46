"""AdamW as in open_clip, and its learning rate: linear warm-up, then cosine decay to zero."""

import jax
from jax import Array
import jax.numpy as jnp
import optax


def has_weight_decay(params: dict) -> dict:
  """Returns which parameters have weight decay: True for arrays of two or more axes.

  As open_clip, it excludes arrays with fewer than two axes, and those with 'bn', 'ln', 'bias' or
  'logit_scale' in their name (in transformers, all of these have fewer than two axes). So gains,
  biases, the scale and the class embedding do not decay; positional and token embeddings and
  projections do.
  """

  def decay(path: tuple, leaf: Array) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    excluded = any(word in name for word in ('bn', 'ln', 'bias', 'logit_scale'))
    return leaf.ndim >= 2 and not excluded

  return jax.tree_util.tree_map_with_path(decay, params)


def adamw(
  *, beta1: float, beta2: float, eps: float, weight_decay: float, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Returns AdamW without learning rate: multiply its updates by minus the learning rate.

  As torch.optim.AdamW: bias-corrected moments, eps outside the root, decoupled decay. clip_norm:
  gradients whose norm, over all parameters together, is larger are shrunk to it first, as with
  open_clip's --grad-clip-norm; 0: never.
  """
  return optax.chain(
    *([optax.clip_by_global_norm(clip_norm)] if clip_norm else []),
    optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=has_weight_decay),
  )


def learning_rate(
  step: Array,  # [] int32: updates done before this one
  *,
  peak: Array,  # [] float32
  warmup_steps: Array,  # [] int32
  total_steps: Array,  # [] int32
) -> Array:  # [] float32
  """Returns open_clip's cosine_lr; arguments may be traced, to compile once for all lengths."""
  warm = (step + 1) / jnp.maximum(warmup_steps, 1)
  done = (step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1)
  return peak * jnp.where(step < warmup_steps, warm, 0.5 * (1 + jnp.cos(jnp.pi * done)))
