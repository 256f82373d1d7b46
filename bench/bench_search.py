"""The exact search against the machine's matrix product, NumPy and its peers, interleaved in one
run.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1                             # as the commands run it
  python bench/bench_search.py                                             # a minute, no peer
  python bench/bench_search.py --rows=200000 --queries=5000 --repeats=3 \\
      --peer_python=/venv/with/torch/and/faiss/bin/python                  # 5 to 10 minutes
  python bench/bench_search.py --memory=200000,1000000,4000000 --queries=500
  python bench/bench_search.py --scann=100000,1000000 --candidates=100,1000

Prints, for each way, GFLOP/s by the least and by the median wall time, each as a share of the
ceiling (jax's products of blocks and tiles of the search's own shapes, nothing else done, measured
in the same run), and the least CPU seconds, which neighbours on a shared machine disturb less. A
GFLOP counts each (row, query) pair once, so that the published approach, which takes two passes, is
given the work, not its way of doing it. `--memory` prints the largest resident memory of a process
that searches so many rows, shard by shard as the command does, the shards being one memory-mapped
file of 200,000 rows again and again; `--scann` what ScaNN takes and finds (its index built each
time, as the command does for a shard) beside the exact search.
"""

import argparse
import functools
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from clip_jax.similarity import exact, scann, tiles

SHARD = 200_000  # rows of the file that --memory reads again and again


def unit_vectors(rng: np.random.Generator, n: int, centers: np.ndarray) -> np.ndarray:
  """Clustered unit vectors, as embeddings are: [n, E] float16."""
  out = np.empty((n, centers.shape[1]), np.float16)
  for part in np.array_split(out, -(-n // 8192)):
    x = centers[rng.integers(len(centers), size=len(part))]
    x = x + rng.standard_normal(x.shape, np.float32)
    part[:] = x / np.linalg.norm(x, axis=1, keepdims=True)
  return out


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = lambda text: [int(number) for number in text.split(',')]
  parser.add_argument('--rows', type=int, default=16_384)
  parser.add_argument('--dim', type=int, default=640)
  parser.add_argument('--queries', type=int, default=3_000)
  parser.add_argument('--benchmarks', type=int, default=6)
  parser.add_argument('--k', type=int, default=64)
  parser.add_argument('--tile_rows', type=int, default=0, help='0: as the search chooses')
  parser.add_argument('--query_block', type=int, default=0, help='0: as the search chooses')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--ways', default='', help='only those whose name holds one of these, by comma'
  )
  parser.add_argument('--peer_python', default='', help='a Python with torch and faiss')
  parser.add_argument('--memory', type=numbers, default=[], help='rows, by comma')
  parser.add_argument('--memory_rows', type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument('--scann', type=numbers, default=[], help='rows, by comma')
  parser.add_argument('--candidates', type=numbers, default=[100], help='of --scann, by comma')
  flags = parser.parse_args()

  if flags.memory_rows:
    search_shards(flags)
  elif flags.memory:
    for rows in flags.memory:
      subprocess.run([sys.executable, *sys.argv, f'--memory_rows={rows}'], check=True)
  elif flags.scann:
    for rows in flags.scann:
      against_scann(flags, rows)
  else:
    against_all(flags)


def against_all(flags) -> None:
  rng, centers = np.random.default_rng(0), centers_of(flags)
  vectors = unit_vectors(rng, flags.queries, centers)
  edges = np.linspace(0, flags.queries, flags.benchmarks + 1).astype(int)
  cuts = rng.uniform(0.4, 0.6, flags.queries).astype(np.float32)
  segments = tuple((f'b{i}', int(a), int(b)) for i, (a, b) in enumerate(itertools.pairwise(edges)))
  bare, queries = exact.Queries(vectors, segments), exact.Queries(vectors, segments, cuts)
  with tempfile.TemporaryDirectory() as folder:
    np.save(os.path.join(folder, 'pool.npy'), unit_vectors(rng, flags.rows, centers))
    np.save(os.path.join(folder, 'queries.npy'), vectors)
    np.save(os.path.join(folder, 'edges.npy'), edges)
    pool = np.load(os.path.join(folder, 'pool.npy'), mmap_mode='r')
    tile_rows, query_block = tiles.default_sizes(flags.tile_rows, flags.query_block)
    k = flags.k
    ways = {
      'jax products (ceiling)': timed(ceiling(pool, vectors, tile_rows, query_block)),
      'numpy products': timed(lambda: numpy_tiles(pool, vectors, edges, lambda s, _: s)),
      'numpy maximum': timed(lambda: numpy_tiles(pool, vectors, edges, numpy_max)),
      'similarity': timed(lambda: search(pool, bare, flags, k=0, nearest=False)),
      'similarity, nearest': timed(lambda: search(pool, bare, flags, k=0)),
      'similarity, nearest, excess': timed(lambda: search(pool, queries, flags, k=0)),
      f'top {k} alone': timed(lambda: search(pool, bare, flags, k=k, nearest=False)),
      f'all with top {k}': timed(lambda: search(pool, queries, flags, k=k)),
      f'ScaNN brute force, top {k}': timed(lambda: scann_top(folder, vectors, k)),
    }
    if flags.peer_python:
      peer = subprocess.Popen(
        [
          flags.peer_python,
          os.path.join(os.path.dirname(__file__), 'published_peer.py'),
          folder,
          str(k),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      ways |= {
        'published, two passes': lambda: ask(peer, 'published'),
        'faiss flat, nearest': lambda: ask(peer, 'faiss 1'),
        f'faiss flat, top {k}': lambda: ask(peer, 'faiss k'),
      }
    wanted = flags.ways.split(',')
    ways = {
      name: way
      for i, (name, way) in enumerate(ways.items())
      if i == 0 or any(part in name for part in wanted)
    }
    slots = tiles.query_blocks([flags.queries], query_block)[0].size
    made = tile_count(flags.rows, tile_rows) * tile_rows * slots  # the ceiling's pairs
    report(
      measure(ways, flags.repeats),
      2e-9 * flags.rows * flags.queries * flags.dim,
      2e-9 * made * flags.dim,
    )
    if flags.peer_python:
      peer.stdin.close()
      peer.wait()


def centers_of(flags) -> np.ndarray:
  return np.random.default_rng(1).standard_normal((500, flags.dim)).astype(np.float32)


def laid_out(queries, query_block):
  return queries[tiles.query_blocks([len(queries)], query_block)[0]].astype(np.float32)


def ceiling(pool, queries, tile_rows, query_block):
  """What the search cannot beat: its products, and nothing read, converted or done with them."""
  blocks = [jax.device_put(block) for block in laid_out(queries, query_block)]
  tile = jax.device_put(np.resize(pool[:tile_rows].astype(np.float32), (tile_rows, pool.shape[1])))

  def run():
    for _ in range(tile_count(len(pool), tile_rows)):
      for scores in tiles.one_ahead(product(block, tile) for block in blocks):
        scores.block_until_ready()

  return run


def tile_count(rows, tile_rows):
  return max(1, round(rows / tile_rows))


product = jax.jit(tiles.dots)


def numpy_tiles(pool, queries, edges, reduce):
  queries = queries.astype(np.float32)
  for i in range(0, len(pool), 4096):
    reduce(pool[i : i + 4096].astype(np.float32) @ queries.T, edges)


def numpy_max(similarity, edges):  # [T, Q] -> [T, benchmarks]
  return np.maximum.reduceat(similarity, edges[:-1], axis=1)


def search(pool, queries, flags, **asked):
  return exact.search_shard(
    pool,
    np.ones(len(pool), bool),
    queries,
    tile_rows=flags.tile_rows,
    query_block=flags.query_block,
    **asked,
  )


def scann_top(folder, queries, k):
  scann_index(folder, k).search_batched_parallel(queries.astype(np.float32))


@functools.cache
def scann_index(folder, k):
  import scann as library

  pool = np.load(os.path.join(folder, 'pool.npy')).astype(np.float32)
  return library.scann_ops_pybind.builder(pool, k, 'dot_product').score_brute_force().build()


def ask(peer, work):
  peer.stdin.write(work + '\n')
  peer.stdin.flush()
  return tuple(float(seconds) for seconds in peer.stdout.readline().split())


def timed(way):
  def run():
    wall, cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - wall, time.process_time() - cpu

  return run


def measure(ways, repeats):
  """(wall, CPU) seconds of each way: an untimed call, then rounds in alternating order."""
  for way in ways.values():
    way()
  seconds = {name: [] for name in ways}
  for i in range(repeats):
    for name in list(ways)[:: -1 if i % 2 else 1]:
      seconds[name].append(ways[name]())
  return seconds


def report(seconds, gflop, ceiling_gflop):
  """The ceiling's products are its own, padding and all; the others count real pairs only."""
  print(f'{"":28s} GFLOP/s least, median    of ceiling least, median    GFLOP a CPU s, of ceiling')
  top = None
  for name, taken in seconds.items():
    walls, cpus = zip(*taken)
    work = ceiling_gflop if top is None else gflop
    rates = [work / x for x in (min(walls), statistics.median(walls), min(cpus))]
    top = top or rates
    print(
      f'{name:28s} {rates[0]:8.1f} {rates[1]:8.1f}            {rates[0] / top[0]:6.2f} '
      f'{rates[1] / top[1]:6.2f}               {rates[2]:8.1f} {rates[2] / top[2]:6.2f}'
    )


def search_shards(flags) -> None:
  """Searches memory_rows rows shard by shard and prints the largest resident memory."""
  rng, centers = np.random.default_rng(0), centers_of(flags)
  queries = exact.Queries(
    unit_vectors(rng, flags.queries, centers),
    (('b', 0, flags.queries),),
    np.full(flags.queries, 0.5, np.float32),
  )
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'pool.npy')
    out = np.lib.format.open_memmap(path, 'w+', np.float16, (SHARD, flags.dim))
    for i in range(0, SHARD, 8192):
      out[i : i + 8192] = unit_vectors(rng, min(8192, SHARD - i), centers)
    del out
    merged = []
    for start in range(0, flags.memory_rows, SHARD):
      shard = np.load(path, mmap_mode='r')[: flags.memory_rows - start]
      found = search(shard, queries, flags, k=flags.k)['b']
      merged = [
        exact.merge_top([*merged, (found['top_similarity'], found['top_row'] + start)], flags.k)
      ]
  print(
    f'{flags.memory_rows:9,d} rows: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}'
    f' MiB at most, of them up to {2 * SHARD * flags.dim / 2**20:.0f} of the mapped file'
  )


def recall_of(pool, usable, queries, similarity, sample=200):
  """The share of the true n nearest rows that candidates hold, over a random sample of queries;
  ties are as good.
  """
  chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
  true = exact.search_shard(
    pool,
    usable,
    exact.Queries(queries[chosen], (('b', 0, len(chosen)),)),
    k=similarity.shape[1],
    nearest=False,
  )['b']['top_similarity']
  return float((similarity[chosen] >= true[:, -1:]).mean())


def against_scann(flags, rows) -> None:
  rng, centers = np.random.default_rng(0), centers_of(flags)
  vectors = unit_vectors(rng, flags.queries, centers)
  queries, usable = exact.Queries(vectors, (('b', 0, len(vectors)),)), np.ones(rows, bool)
  pool = unit_vectors(rng, rows, centers)
  for n in flags.candidates:
    wall, _ = timed(lambda: search(pool, queries, flags, k=n, nearest=False))()
    found = []
    approximate, _ = timed(lambda: found.extend(scann.candidates(pool, usable, vectors, n)))()
    recall = recall_of(pool, usable, vectors, found[0])
    print(
      f'{rows:9,d} rows, {len(vectors):,} queries, {n} candidates each: exact {wall:.1f} s, ScaNN '
      f'{approximate:.1f} s with its index, recall {recall:.4f}',
      flush=True,
    )


if __name__ == '__main__':
  main()
