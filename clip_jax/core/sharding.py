"""The device mesh and the shardings of batches and parameters; no other file names its axes.

Axes: 'data' and 'fsdp' split the batch, 'fsdp' also the parameters, 'tensor' the parameters and
the work of attention and MLP (its devices see the same samples). XLA's partitioner does the rest.
JAX is imported inside functions: every command imports this file, and JAX takes a second.
"""

from typing import Any

from clip_jax.core.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')
_BATCH = ('data', 'fsdp')  # mesh axes that split the first axis of a batch
# The end of a parameter's name -> the array's axis that 'tensor' splits: the outputs of the first
# product of attention and MLP and the inputs of the second one, so that each block needs one sum
# over devices (Shoeybi et al. 2019, Megatron-LM). Others are only split by 'fsdp'.
_TENSOR = {
  'attn.in_proj_weight': 0,
  'attn.in_proj_bias': 0,
  'attn.out_proj.weight': 1,
  'mlp.c_fc.weight': 0,
  'mlp.c_fc.bias': 0,
  'mlp.c_proj.weight': 1,
}


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None) -> Any:
  """Returns a [data, fsdp, tensor] mesh; data=-1: all devices that are left.

  devices: default: those of all processes.

  Raises ConfigError if the product of the axes is not the number of devices.
  """
  import jax

  count = jax.device_count() if devices is None else len(devices)
  sizes = dict(data=data if data > 0 else count // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
  if sizes['data'] * fsdp * tensor != count:
    what = ' x '.join(f'{name}={size}' for name, size in zip(AXES, (data, fsdp, tensor)))
    raise ConfigError(
      f'config.mesh: {what} does not give the number of devices, {count}. Choose factors of it; '
      'data=-1 takes all devices that the others leave.'
    )
  made = jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    devices=devices,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )
  owners = [{device.process_index for device in part} for part in made.devices.reshape(-1, tensor)]
  if any(len(owner) > 1 for owner in owners):  # each process loads its own part of a batch
    raise ConfigError(
      f'config.mesh.tensor={tensor} must divide the number of devices of one process, '
      f'{jax.local_device_count()}.'
    )
  return made


def batch_parts(mesh: Any) -> int:
  """Returns the number of equal parts into which the mesh splits a batch."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch_size(batch_size: int, mesh: Any, microbatches: int = 1) -> None:
  """Raises ConfigError if devices and microbatches cannot split the batch evenly."""
  count = batch_parts(mesh) * microbatches
  if batch_size < 1 or batch_size % count:
    nearest = max(1, round(batch_size / count)) * count
    times = '' if microbatches == 1 else f' times train.microbatches={microbatches}'
    raise ConfigError(
      f'config.train.batch_size={batch_size} must be a multiple of the number of devices, '
      f'{batch_parts(mesh)}{times}; the nearest is {nearest}.'
    )


def parameter_shardings(tree: Any, mesh: Any) -> Any:
  """Returns a sharding for each array (or shape): 'tensor' by name, then 'fsdp' by shape.

  fsdp splits the longest axis left that it divides; vectors and scalars not, as that saves nothing.
  The rules depend on shapes and the end of names only, so the moments of the optimizer are sharded
  like their parameters.
  """
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  parts, tensor = mesh.shape['fsdp'], mesh.shape['tensor']

  def sharding(path: tuple, leaf: Any) -> NamedSharding:
    spec: list[str | None] = [None] * len(leaf.shape)
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    split = next((axis for end, axis in _TENSOR.items() if name.endswith(end)), None)
    if tensor > 1 and split is not None and leaf.shape[split] % tensor == 0:
      spec[split] = 'tensor'
    axes = [i for i, size in enumerate(leaf.shape) if size % parts == 0 and spec[i] is None]
    if parts > 1 and len(leaf.shape) >= 2 and axes:
      spec[max(axes, key=lambda i: leaf.shape[i])] = 'fsdp'
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Any) -> Any:
  """Returns the sharding with the whole array on every device."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> Any:
  """Returns the sharding with the first axis split over the mesh's axes data and fsdp."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec(_BATCH))


def local() -> tuple[Any, Any, int]:
  """Returns (replicated sharding, batch sharding, device count) for this process's devices only.

  For work without communication between hosts, such as embedding a shard.
  """
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  devices = jax.local_devices()
  mesh = jax.make_mesh(
    (len(devices),), ('data',), devices=devices, axis_types=(jax.sharding.AxisType.Auto,)
  )
  return (
    NamedSharding(mesh, PartitionSpec()),
    NamedSharding(mesh, PartitionSpec('data')),
    len(devices),
  )


def to_host(x: Any) -> Any:  # -> np.ndarray
  """Returns a whole array, parts on devices of other processes included; all must call this."""
  import jax
  import numpy as np

  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(x, tiled=True)


def place_batch(
  batch: dict,  # arrays, nested or not, each [b, ...]: this process's part of the global batch
  mesh: Any,
) -> dict:  # each [B, ...], global, split over the devices
  """Returns the batch as global arrays on the devices of the mesh."""
  import jax

  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
