"""What dtype='bfloat16' means on this machine, and the towers' matrix products in it.

Accelerators: inputs and outputs of products, and what lies between them, in bfloat16 (sums in
float32): memory traffic counts. CPUs with bfloat16 instructions: only the inputs of products, as
XLA's fast kernels take bfloat16 and give float32. Other CPUs: float32, as bfloat16 is slower there.
Softmax, norms and losses are in float32 everywhere.
"""

import dataclasses
import functools

from absl import logging
import jax
from jax import Array, lax
import jax.numpy as jnp

_CPU_FLAGS = ('amx_bf16', 'avx512_bf16')  # in /proc/cpuinfo


@dataclasses.dataclass(frozen=True)
class Precision:
  products: str  # dtype of the inputs of matrix products
  activations: str  # dtype of their outputs, and of all else that is not fixed to float32


FLOAT32 = Precision('float32', 'float32')


@functools.cache
def of(dtype: str) -> Precision:  # 'float32' | 'bfloat16'
  """Returns the precision with which this process computes a model of a dtype; logs it once."""
  if dtype == 'float32':
    return FLOAT32
  backend = jax.default_backend()
  flag = _cpu_flag() if backend == 'cpu' else ''
  if backend != 'cpu':
    precision, reason = Precision(dtype, dtype), f'products and activations on a {backend}'
  elif flag:
    reason = f'inputs of products, as this CPU has {flag}; their sums and all else in float32'
    precision = Precision(dtype, 'float32')
  else:
    reason = f'not used, as this CPU has neither {" nor ".join(_CPU_FLAGS)}: float32 is faster'
    precision = FLOAT32
  logging.info('%s: %s.', dtype, reason)
  return precision


def _cpu_flag() -> str:
  """Returns the first of the CPU's flags that means products in bfloat16; '' if it has none."""
  try:
    with open('/proc/cpuinfo') as file:
      flags = next((line for line in file if line.startswith('flags')), '').split()
  except OSError:  # not Linux
    return ''
  return next((flag for flag in _CPU_FLAGS if flag in flags), '')


def product(
  x: Array,  # [..., in]
  weight: Array,  # float32 [out, in], or [in, out]
  dtype: str,
  axis: int = 1,  # of the weight that has x's numbers: 1 for [out, in], 0 for [in, out]
) -> Array:  # [..., out], of(dtype).activations
  """Returns x times the weight."""
  precision = of(dtype)
  if precision.products == precision.activations:
    return _dot(x.astype(precision.products), weight.astype(precision.products), axis, None)
  rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  out: Array = _mixed(rows, weight, axis)
  return out.reshape(*x.shape[:-1], -1)


def _dot(x: Array, y: Array, axis: int, output: str | None) -> Array:  # [..., in] -> [..., out]
  dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
  return lax.dot_general(x, y, dimensions, preferred_element_type=output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed(x: Array, weight: Array, axis: int) -> Array:  # float32 [n, in] -> float32 [n, out]
  """The product of inputs rounded to bfloat16, in float32; so are both products of its gradient.

  JAX's own gradient would multiply float32 by bfloat16, for which XLA has no fast kernel.
  """
  return _mixed_forward(x, weight, axis)[0]


def _mixed_forward(x: Array, weight: Array, axis: int):
  x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
  return _mixed_dot(x, weight, axis), (x, weight)


def _mixed_backward(axis: int, rounded: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
  (x, weight), slope = rounded, slope.astype(jnp.bfloat16)
  left, right = (slope, x) if axis else (x, slope)
  return _mixed_dot(slope, weight, 1 - axis), _mixed_dot(left.T, right, 0)


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _mixed_dot(x: Array, y: Array, axis: int) -> Array:  # bfloat16 [n, in] -> float32 [n, out]
  """The product by XLA's kernel for bfloat16 inputs that lie in memory row by row.

  XLA (0.10.2) chooses that kernel early, by the inputs' layouts. A transpose beside the product,
  seen then, makes it convert to float32 instead; folded into the product later, it leaves one that
  no kernel computes (UNIMPLEMENTED at run time). Barriers hide it, and the reshapes, which cost
  nothing, set the layout.
  """
  x, y = (lax.reshape(lax.optimization_barrier(part[None]), part.shape) for part in (x, y))
  return lax.optimization_barrier(_dot(x, y, axis, 'float32'))
