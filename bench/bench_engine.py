"""What an engine costs a shard, against calling the function directly, interleaved in one run.

  pip install 'ray==2.60.*'                            # optional
  python bench/bench_engine.py --shards=200

A shard is a file of one number, written with fsync: what is left is the work of the engine, with
its sidecars and locks. Ways: direct (the function alone), local (products.make, in this process),
local in two processes, shared (a command that shares the work directory), and Ray on this machine
alone, without which the bench says so. Prints by the minimum and by the median of the repeats: the
seconds from the call to the first shard, the milliseconds from shard to shard (a shard ends with
its sidecar), what of them is more than direct, and the seconds from the last shard to the end.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import importlib.util
import os
import statistics
import tempfile
import time

import numpy as np

from clip_jax.core import engine, files, on_ray, products
from clip_jax.core.products import Product
from clip_jax.stages import sharing

KILLS = 3


def write(path: str) -> None:
  """Makes a shard."""
  files.write_npy(path, np.float64(1))


def wanted(shards: int) -> list[Product]:
  return [
    Product(f'made/{i:05d}', sharing.SHARDED[0], ('pool', i), batch='made/all')
    for i in range(shards)
  ]


def path_of(folder: str, product: Product) -> str:
  return os.path.join(folder, f'{product.name}.npy')


def direct(folder: str, shards: int) -> None:
  for product in wanted(shards):
    write(path_of(folder, product))


def make(batch: list[Product], part: str = '', *, folder: str, workers: int = 0) -> list[Product]:
  """Makes a batch as the stage ingest does."""

  def work(todo: list[Product]) -> Iterator[tuple[Product, list[str], dict]]:
    jobs = [path_of(folder, product) for product in todo]
    for i, _ in engine.finished(write, jobs, workers=workers, desc='bench', unit='shard'):
      yield todo[i], [f'{todo[i].name}.npy'], {}

  return products.make(folder, batch, work, part=part, kills=KILLS if part else 0)


def local(folder: str, shards: int, workers: int = 0) -> None:
  make(wanted(shards), folder=folder, workers=workers)


def shared(folder: str, shards: int) -> None:
  for _ in sharing.shared(functools.partial(make, folder=folder), wanted(shards)):
    pass


def ray(folder: str, shards: int) -> None:
  """One worker, as many as the others have."""
  on_ray.run(
    shared,
    (folder, shards),
    workdir=folder,
    address='',
    cpus=os.cpu_count() or 1,
    watch=lambda calls, replaced: products.count_finished(
      folder, [product.name for product in wanted(shards)]
    ),
  )


WAYS: dict[str, Callable[[str, int], None]] = {
  'direct': direct,
  'local': local,
  'local, 2 processes': functools.partial(local, workers=2),
  'shared': shared,
  'ray': ray,
}


def measure(way: Callable[[str, int], None], shards: int) -> tuple[float, float, float]:
  """Returns the seconds to the first shard, from shard to shard, and from the last to the end."""
  with tempfile.TemporaryDirectory() as folder:
    began = time.time()
    way(folder, shards)
    ended = time.time()
    paths = [str(products.sidecar_path(folder, product.name)) for product in wanted(shards)]
    if way is direct:
      paths = [path_of(folder, product) for product in wanted(shards)]
    made = sorted(map(os.path.getmtime, paths))
  return made[0] - began, (made[-1] - made[0]) / (shards - 1), ended - made[-1]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shards', type=int, default=200)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--ways', default=';'.join(WAYS), help='separated by semicolons')
  flags = parser.parse_args(arguments)
  names = flags.ways.split(';')
  if 'ray' in names and importlib.util.find_spec('ray') is None:
    print("Ray is not installed (pip install 'clip-jax-ood[ray]'): it is left out.")
    names.remove('ray')
  found = {name: [] for name in names}
  for i in range(flags.repeats):
    for name in names[:: -1 if i % 2 else 1]:
      found[name].append(measure(WAYS[name], flags.shards))
  print(f'{flags.shards} shards, minimum and median of {flags.repeats} repeats')
  print(f'{"":20} {"start, s":>15} {"a shard, ms":>15} {"over direct, ms":>15} {"end, s":>15}')
  kinds = (min, statistics.median)
  base = [
    kind(each for _, each, _ in found['direct']) if 'direct' in found else 0 for kind in kinds
  ]
  for name, times in found.items():
    start, each, end = ([kind(column) for kind in kinds] for column in zip(*times, strict=True))
    over = [1e3 * (one - other) for one, other in zip(each, base)]
    cells = (start, [1e3 * value for value in each], over, end)
    print(f'{name:20}', *(f'{low:7.2f} {middle:7.2f}' for low, middle in cells))


if __name__ == '__main__':
  main()
