"""The device mesh and the shardings: batches over all devices, parameters over the fsdp axis.

Axes: each slice along 'data' holds a copy of the parameters, which is split along 'fsdp'. Both
axes split the batch. XLA's partitioner does the rest, so no other file names a mesh axis. JAX is
imported inside functions: every command imports this file, and JAX takes a second.
"""

from typing import Any

from clip_jax.core.errors import ConfigError


def mesh(fsdp: int = 1) -> Any:
  """Returns a [devices / fsdp, fsdp] mesh of all processes' devices, with axes data and fsdp."""
  import jax

  count = jax.device_count()
  if fsdp < 1 or count % fsdp:
    raise ConfigError(f'config.train.fsdp={fsdp} must divide the number of devices, {count}.')
  return jax.make_mesh(
    (count // fsdp, fsdp), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def check_batch_size(batch_size: int, mesh: Any, microbatches: int = 1) -> None:
  """Raises ConfigError if devices and microbatches cannot split the batch evenly."""
  count = mesh.size * microbatches
  if batch_size < 1 or batch_size % count:
    nearest = max(1, round(batch_size / count)) * count
    times = '' if microbatches == 1 else f' times train.microbatches={microbatches}'
    raise ConfigError(
      f'config.train.batch_size={batch_size} must be a multiple of the number of devices, '
      f'{mesh.size}{times}; the nearest is {nearest}.'
    )


def parameter_shardings(tree: Any, mesh: Any) -> Any:
  """Returns a sharding for each array (or shape): the longest axis that fsdp divides is split.

  Vectors and scalars are replicated, as splitting them saves nothing. The rule depends on shapes
  only, so the moments of the optimizer are sharded like their parameters.
  """
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  parts = mesh.shape['fsdp']

  def sharding(leaf: Any) -> NamedSharding:
    spec: list[str | None] = [None] * len(leaf.shape)
    axes = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
    if parts > 1 and len(leaf.shape) >= 2 and axes:
      spec[max(axes, key=lambda i: leaf.shape[i])] = 'fsdp'
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(sharding, tree)


def replicated(mesh: Any) -> Any:
  """Returns the sharding with the whole array on every device."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> Any:
  """Returns the sharding with the first axis split over all devices."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


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


def place_batch(
  batch: dict,  # arrays, nested or not, each [b, ...]: this process's part of the global batch
  mesh: Any,
) -> dict:  # each [B, ...], global, split over the devices
  """Returns the batch as global arrays on the devices of the mesh."""
  import jax

  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
