"""One training step, compiled once for each model, optimizer and mesh of the process.

A state is dict(params, opt, step): nested dicts of float32 arrays, optax's moments, int32 updates
done. The step takes and gives such a state in place (its buffers are donated).
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from clip_jax.core import sharding
from clip_jax.training import losses, optimizer

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: cosines times at most 100


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What one compiled step fixes; the schedule's numbers are arguments of the step."""

  loss: str  # a key of losses.LOSSES
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  mean: tuple[float, float, float]  # of the pixels in 0..1, for each of RGB
  std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Steps:
  """Compiled functions over one mesh."""

  init: Callable[[int], dict]  # seed -> state, every array made where it will lie
  step: Callable[[dict, dict, dict], tuple[dict, dict]]  # state, batch, schedule -> state, metrics
  abstract: dict  # the state's shapes, dtypes and shardings


def normalize(
  images: Array,  # [B, S, S, 3] uint8
  mean: tuple[float, ...],  # of the pixels in 0..1
  std: tuple[float, ...],
) -> Array:  # [B, S, S, 3] float32
  return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def _replaced(params: dict, recorded: dict) -> dict:
  """The tree with those of its leaves that `recorded` has."""
  return {
    name: (_replaced(value, recorded[name]) if isinstance(value, dict) else recorded[name])
    if name in recorded
    else value
    for name, value in params.items()
  }


@functools.cache
def steps(
  init_params: Callable[[Array], dict],  # PRNG key -> params
  encode: Callable[[dict, Array, Any, Array], tuple[dict, dict]],  # see models/clip.py, functions
  recipe: Recipe,
  mesh: Any,
) -> Steps:
  """init and step for one model. Equal arguments give the same compiled functions.

  init's result depends on the seed only, not on the mesh. step's batch is dict(image [B, S, S, 3]
  uint8, text [B, T] int32 or packed) of global arrays; its schedule dict(peak float32, warmup_steps
  int32, total_steps int32, seed uint32: of what training itself draws); its metrics are scalars:
  loss, logit_scale (the factor, not its logarithm) and learning_rate, as this update used them.
  """
  tx = optimizer.adamw(
    beta1=recipe.beta1, beta2=recipe.beta2, eps=recipe.eps, weight_decay=recipe.weight_decay
  )
  loss_function = losses.LOSSES[recipe.loss].function

  def init(seed: Array) -> dict:
    params = init_params(jax.random.key(seed))
    return dict(params=params, opt=tx.init(params), step=jnp.zeros((), jnp.int32))

  def step(state: dict, batch: dict, schedule: dict) -> tuple[dict, dict]:
    schedule = dict(schedule)
    key = jax.random.fold_in(jax.random.key(schedule.pop('seed')), state['step'])

    def loss_of(params: dict) -> tuple[Array, tuple[Array, dict]]:
      images = normalize(batch['image'], recipe.mean, recipe.std)
      features, recorded = encode(params, images, batch['text'], key)
      return loss_function(**features), (features['scale'], recorded)

    (loss, (scale, recorded)), grads = jax.value_and_grad(loss_of, has_aux=True)(state['params'])
    rate = optimizer.learning_rate(state['step'], **schedule)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    params = jax.tree.map(lambda p, u: p - rate * u, state['params'], updates)
    params['logit_scale'] = jnp.clip(params['logit_scale'], 0, MAX_LOGIT_SCALE)
    params = _replaced(params, recorded)
    state = dict(params=params, opt=opt, step=state['step'] + 1)
    return state, dict(loss=loss, logit_scale=scale, learning_rate=rate)

  shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))
  lies = sharding.parameter_shardings(shapes, mesh)
  compiled_init = jax.jit(init, out_shardings=lies)
  return Steps(
    init=lambda seed: compiled_init(jnp.uint32(seed)),
    step=jax.jit(
      step,
      donate_argnums=0,
      in_shardings=(lies, sharding.batch_sharding(mesh), None),
      out_shardings=(lies, sharding.replicated(mesh)),
    ),
    abstract=jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies
    ),
  )
