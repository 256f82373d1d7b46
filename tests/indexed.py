"""Small indexed datasets, and reading in threads, for the tests of what reads samples at random."""

from concurrent import futures

import numpy as np

from clip_jax.data import reader, table

BYTES = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()


def record(i, caption=None, **columns):
  return table.Record(
    key=f'k{i}',
    caption=f'caption {i} é' if caption is None else caption,
    label=i % 5 - 1,
    group=f'g{i // 2}',
    offset=i * 7,
    length=i,
    width=i,
    height=2 * i,
    columns=columns,
  )


def shard(path, n, first=0, skipped=(), **columns):
  path.write_bytes(BYTES)
  return {'format': 'webdataset', 'root': '', 'path': str(path)}, table.Scan(
    [record(first + i, **columns) for i in range(n)], list(skipped)
  )


def dataset(directory, shards, classes=()):
  """Writes and assembles shards of (file, scan), and opens them."""
  for i, (_, scan) in enumerate(shards):
    table.write_shard(str(directory), i, scan)
  counts = table.assemble(str(directory), [file for file, _ in shards], classes)
  return reader.Source(str(directory)), counts


def in_threads(read, count):
  """Calls read(0), ..., read(count - 1) at once; raises what one of them raises."""
  with futures.ThreadPoolExecutor(count) as threads:
    list(threads.map(read, range(count)))
