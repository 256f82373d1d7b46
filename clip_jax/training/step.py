"""One training step, compiled once for each model, optimizer and mesh of the process.

A state is dict(params, opt, step[, ema]): nested dicts of float32 arrays, optax's moments, int32
updates done, moving averages of the parameters. A step updates the state in place: its buffers are
donated.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.core import sharding
from clip_jax.training import losses, optimizer

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: cosines times at most 100


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings fixed in a compiled step; the schedule's numbers are arguments of the step."""

  loss: str  # a key of losses.LOSSES
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  mean: tuple[float, float, float]  # of the pixels in 0..1, for each of RGB
  std: tuple[float, float, float]
  loss_chunk: int = 0  # of the loss; 0: the whole matrix of logits
  loss_precision: str = 'float32'  # a key of losses.PRECISIONS
  microbatches: int = 1  # parts of a batch that go through the model one after the other
  clip_norm: float = 0.0  # largest norm of the gradients; 0: any
  ema_decay: float = 0.0  # of the moving averages of the parameters; 0: none


@dataclasses.dataclass(frozen=True)
class Steps:
  """Compiled functions over one mesh."""

  init: Callable[[int], dict]  # seed -> state, every array created on its own devices
  step: Callable[[dict, dict, dict], tuple[dict, dict]]  # state, batch, schedule -> state, metrics
  abstract: dict  # the state's shapes, dtypes and shardings
  # state, batch, schedule -> bytes that a device needs for such a step (XLA's estimate). Compiles
  # the step for the shapes of the batch; None if it was, or the platform does not say.
  compile: Callable[[dict, dict, dict], int | None]


def normalize(
  images: Array,  # [B, S, S, 3] uint8
  mean: tuple[float, ...],  # of the pixels in 0..1
  std: tuple[float, ...],
) -> Array:  # [B, S, S, 3] float32
  return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


# (params, batch, key) -> features, recorded statistics
_Features = Callable[[dict, dict, Array], tuple[dict, dict]]
_Gradients = tuple[Array, Array, dict, dict]  # loss, scale, recorded statistics, gradients


def _gradients(
  features_of: _Features, loss_of: Callable[..., Array], params: dict, batch: dict, key: Array
) -> _Gradients:
  """Returns a loss and its gradients."""

  def loss(params: dict) -> tuple[Array, tuple[Array, dict]]:
    features, recorded = features_of(params, batch, key)
    return loss_of(**features), (features['scale'], recorded)

  (value, (scale, recorded)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  return value, scale, recorded, gradients


def _cached_gradients(
  features_of: _Features,
  loss_of: Callable[..., Array],
  params: dict,
  batch: dict,
  key: Array,
  *,
  microbatches: int,
  mesh: Any,
) -> _Gradients:
  """Returns the same with the activations of one microbatch in memory (GradCache, Gao et al. 2021).

  1. The features of all microbatches, without activations. 2. The loss of the whole batch and its
  gradient with respect to the features. 3. Each microbatch again, with that gradient. A mean of the
  losses of microbatches would be another loss: fewer negatives.
  """
  parts = jax.tree.map(lambda leaf: _split(leaf, microbatches, mesh), batch)
  keys = jax.random.split(key, microbatches)
  features = jax.lax.map(lambda part: features_of(params, *part)[0], (parts, keys))
  whole = {  # scale and bias are the same in all parts
    name: _join(leaf, mesh) if leaf.ndim > 1 else leaf[0] for name, leaf in features.items()
  }
  value, slopes = jax.value_and_grad(lambda whole: loss_of(**whole))(whole)
  slopes = {
    name: _split(leaf, microbatches, mesh)
    if leaf.ndim
    else jnp.full(microbatches, leaf) / microbatches
    for name, leaf in slopes.items()
  }

  def add(sums: dict, xs: tuple[dict, Array, dict]) -> tuple[dict, None]:
    part, key, slope = xs
    backward = jax.vjp(lambda params: features_of(params, part, key)[0], params)[1]
    return jax.tree.map(jnp.add, sums, backward(slope)[0]), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  gradients, _ = jax.lax.scan(add, zeros, (parts, keys, slopes))
  return value, whole['scale'], {}, gradients


def _split(
  leaf: Array,  # [B, ...], split over the devices
  microbatches: int,
  mesh: Any,
) -> Array:  # [microbatches, B / microbatches, ...]
  """Returns microbatches that take an equal part of each device's rows, so that none moves."""
  rows = leaf.reshape(sharding.batch_parts(mesh), microbatches, -1, *leaf.shape[1:]).swapaxes(0, 1)
  return rows.reshape(microbatches, -1, *leaf.shape[1:])


def _join(leaf: Array, mesh: Any) -> Array:  # [microbatches, B / microbatches, ...] -> [B, ...]
  """Returns the rows in the order before _split."""
  rows = leaf.reshape(len(leaf), sharding.batch_parts(mesh), -1, *leaf.shape[2:]).swapaxes(0, 1)
  return rows.reshape(-1, *leaf.shape[2:])


def _replaced(params: dict, recorded: dict) -> dict:
  """Returns params with the leaves of `recorded` in place of its own."""
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
  """Returns init and step of a model; equal arguments give the same compiled functions.

  init's result depends only on the seed, not on the mesh. step's batch is dict(image [B, S, S, 3]
  uint8, text [B, T] int32 or packed) of global arrays. Its schedule is dict(peak float32,
  warmup_steps int32, total_steps int32, seed uint32 of the random numbers in training). Its metrics
  are scalars: loss, logit_scale (the factor, not its logarithm) and learning_rate of this update.
  """
  tx = optimizer.adamw(
    beta1=recipe.beta1,
    beta2=recipe.beta2,
    eps=recipe.eps,
    weight_decay=recipe.weight_decay,
    clip_norm=recipe.clip_norm,
  )
  asked = dict(chunk=recipe.loss_chunk, precision=recipe.loss_precision)
  usual = dict(chunk=0, precision='float32')  # a loss may know nothing else
  options = {name: value for name, value in asked.items() if value != usual[name]}
  loss_of = functools.partial(losses.LOSSES[recipe.loss].function, **options)
  gradients = _gradients
  if recipe.microbatches > 1:
    gradients = functools.partial(_cached_gradients, microbatches=recipe.microbatches, mesh=mesh)

  def init(seed: Array) -> dict:
    params = init_params(jax.random.key(seed))
    state = dict(params=params, opt=tx.init(params), step=jnp.zeros((), jnp.int32))
    return dict(state, ema=params) if recipe.ema_decay else state

  def step(state: dict, batch: dict, schedule: dict) -> tuple[dict, dict]:
    schedule = dict(schedule)
    key = jax.random.fold_in(jax.random.key(schedule.pop('seed')), state['step'])

    def features_of(params: dict, batch: dict, key: Array) -> tuple[dict, dict]:
      return encode(params, normalize(batch['image'], recipe.mean, recipe.std), batch['text'], key)

    loss, scale, recorded, grads = gradients(features_of, loss_of, state['params'], batch, key)
    rate = optimizer.learning_rate(state['step'], **schedule)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    params = jax.tree.map(lambda p, u: p - rate * u, state['params'], updates)
    params['logit_scale'] = jnp.clip(params['logit_scale'], 0, MAX_LOGIT_SCALE)
    params = _replaced(params, recorded)
    new = dict(params=params, opt=opt, step=state['step'] + 1)
    if recipe.ema_decay:
      new['ema'] = optax.incremental_update(params, state['ema'], 1 - recipe.ema_decay)
    return new, dict(loss=loss, logit_scale=scale, learning_rate=rate)

  shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))
  placement = sharding.parameter_shardings(shapes, mesh)
  compiled_init = jax.jit(init, out_shardings=placement)
  compiled_step = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(placement, sharding.batch_sharding(mesh), None),
    out_shardings=(placement, sharding.replicated(mesh)),
  )
  known: set[tuple] = set()  # shapes of batches

  def compile_step(state: dict, batch: dict, schedule: dict) -> int | None:
    key = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
    if key in known:
      return None
    known.add(key)
    need = compiled_step.lower(state, batch, schedule).compile().memory_analysis()
    if need is None:  # a platform that does not say
      return None
    inputs_and_outputs = need.argument_size_in_bytes + need.output_size_in_bytes
    return inputs_and_outputs + need.temp_size_in_bytes - need.alias_size_in_bytes

  return Steps(
    init=lambda seed: compiled_init(np.uint32(seed)),
    step=compiled_step,
    compile=compile_step,
    abstract=jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placement
    ),
  )
