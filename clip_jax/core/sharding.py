"""The device mesh and how arrays lie on it: batches split over all devices, parameters by fsdp.

Axes: 'data' holds whole copies of the parameters, 'fsdp' splits each of them. Both split the batch.
XLA's partitioner does the rest, so no other file names a mesh axis. JAX is imported inside
functions: every command imports this file at its start, and JAX takes a second.
"""

from typing import Any

from clip_jax.core.errors import ConfigError


def mesh(fsdp: int = 1) -> Any:
  """All devices of all processes as a [devices / fsdp, fsdp] mesh with axes data and fsdp."""
  import jax

  count = jax.device_count()
  if fsdp < 1 or count % fsdp:
    raise ConfigError(f'train.fsdp = {fsdp} must divide the number of devices, {count}.')
  return jax.make_mesh(
    (count // fsdp, fsdp), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def check_batch_size(batch_size: int, mesh: Any) -> None:
  """Raises ConfigError, with the nearest that would do, where the devices cannot share a batch."""
  count = mesh.size
  if batch_size < 1 or batch_size % count:
    nearest = max(1, round(batch_size / count)) * count
    raise ConfigError(
      f'train.batch_size = {batch_size} must be a multiple of the {count} devices; '
      f'the nearest is {nearest}.'
    )


def parameter_shardings(tree: Any, mesh: Any) -> Any:
  """A sharding for each array (or shape) of the tree: its longest axis that fsdp divides is split.

  Vectors and scalars are replicated: there is nothing to gain. The rule reads shapes only, so that
  optimizer moments lie as their parameters do.
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
  """The whole array on every device."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> Any:
  """The first axis split over every device."""
  from jax.sharding import NamedSharding, PartitionSpec

  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def local() -> tuple[Any, Any, int]:
  """(replicated, batch split, device count) over the devices of this process alone.

  For work in which hosts do not meet, such as embedding a shard.
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
  import jax

  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
