"""The exact search against NumPy tiles and the machine's matrix product, interleaved in one run.

  python bench/bench_search.py --rows=50000 --dim=640 --queries=3000 --k=10
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python bench/bench_search.py    # as the commands run it

Prints, for each way, GFLOP/s (2 x rows x queries x dim over the seconds) by the minimum and by the
median of the repeats, both as ratios to NumPy's matrix product of the same tiles, and the same by
CPU seconds, which neighbours on a shared machine disturb less.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from clip_jax.similarity import exact
from clip_jax.similarity import tiles


def unit_vectors(rng: np.random.Generator, n: int, centers: np.ndarray) -> np.ndarray:
  """Clustered unit vectors, as embeddings are: [n, E] float16."""
  x = centers[rng.integers(len(centers), size=n)] + rng.standard_normal((n, centers.shape[1]))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=16_384)
  parser.add_argument('--dim', type=int, default=640)
  parser.add_argument('--queries', type=int, default=3_000)
  parser.add_argument('--benchmarks', type=int, default=6)
  parser.add_argument('--k', type=int, default=10)
  parser.add_argument('--tile_rows', type=int, default=4096)
  parser.add_argument('--query_block', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=5)
  flags = parser.parse_args()

  rng = np.random.default_rng(0)
  centers = rng.standard_normal((500, flags.dim))
  vectors = unit_vectors(rng, flags.queries, centers)
  edges = np.linspace(0, flags.queries, flags.benchmarks + 1).astype(int)
  cuts = rng.uniform(0.4, 0.6, flags.queries).astype(np.float32)
  queries = exact.Queries(
      vectors, tuple((f'b{i}', a, b) for i, (a, b) in enumerate(itertools.pairwise(edges))), cuts)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'pool.npy')
    np.save(path, unit_vectors(rng, flags.rows, centers))
    pool = np.load(path, mmap_mode='r')
    ways = {
        'numpy matmul': lambda: numpy_tiles(pool, vectors, edges, flags.tile_rows, lambda s, _: s),
        'numpy max': lambda: numpy_tiles(pool, vectors, edges, flags.tile_rows, numpy_max),
        'jax matmul': lambda: jax_matmul(pool, vectors, flags.tile_rows, flags.query_block),
        'search k=0': lambda: search(pool, queries, 0, flags),
        f'search k={flags.k}': lambda: search(pool, queries, flags.k, flags)}
    report(measure(ways, flags.repeats), 2e-9 * flags.rows * flags.queries * flags.dim)


def numpy_tiles(pool, queries, edges, tile_rows, reduce):
  queries = queries.astype(np.float32)
  for i in range(0, len(pool), tile_rows):
    reduce(pool[i:i + tile_rows].astype(np.float32) @ queries.T, edges)


def numpy_max(similarity, edges):  # [T, Q] -> [T, benchmarks]
  return np.maximum.reduceat(similarity, edges[:-1], axis=1)


def jax_matmul(pool, queries, tile_rows, query_block):
  """What the search cannot beat: the same products, and nothing done with them."""
  blocks = [jax.device_put(queries[block].astype(np.float32))
            for block in tiles.query_blocks([len(queries)], query_block)[0]]
  for tile in tiles.walk(pool, np.arange(len(pool)), tile_rows, 'pool'):
    jax.block_until_ready([product(block, tile.device) for block in blocks])


product = jax.jit(tiles.dots)


def search(pool, queries, k, flags):
  exact.search_shard(pool, np.ones(len(pool), bool), queries, k=k, tile_rows=flags.tile_rows,
                     query_block=flags.query_block)


def measure(ways, repeats):
  """(wall, CPU) seconds of each way: an untimed call, then rounds in alternating order."""
  for way in ways.values():
    way()
  seconds = {name: [] for name in ways}
  for i in range(repeats):
    for name in list(ways)[::-1 if i % 2 else 1]:
      wall, cpu = time.perf_counter(), time.process_time()
      ways[name]()
      seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  return seconds


def report(seconds, gflop):
  print('                 GFLOP/s min, median   of NumPy min, median   GFLOP per CPU s, of NumPy')
  numpy = _summary(seconds['numpy matmul'])
  for name, taken in seconds.items():
    least, middle, cpu = _summary(taken)
    print(f'{name:16s} {gflop / least:8.1f} {gflop / middle:8.1f}       {numpy[0] / least:6.2f} '
          f'{numpy[1] / middle:6.2f}         {gflop / cpu:8.1f} {numpy[2] / cpu:6.2f}')


def _summary(taken):  # least and middle wall seconds, least CPU seconds
  walls, cpus = zip(*taken)
  return min(walls), statistics.median(walls), min(cpus)


if __name__ == '__main__':
  main()
