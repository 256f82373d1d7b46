"""When does ScaNN begin to win? Query to pool, an index a shard: clip_jax.search, both backends.

  python bench/bench_scann.py [rows] [numbers ...]

For a shard of `rows` (default 1,000,000) clustered unit vectors, as embeddings are: seconds to
build the index, seconds and recall of the ten nearest rows for rising numbers of queries, and the
number of queries from which index and queries together take less than the exact search. The exact
search costs rows x queries, so larger pools, which are searched shard by shard, have the same
break-even.
"""

import sys
import time

import numpy as np

from clip_jax.similarity import exact, scann

QUERIES = (1000, 4000, 16_000)
K = 10
CLUSTERS, SPREAD = 2000, 0.7  # norm of a row's noise around its centre of norm 1


def vectors(rng, count: int, centres: np.ndarray) -> np.ndarray:
  out = np.empty((count, centres.shape[1]), np.float16)
  for start in range(0, count, 100_000):
    part = centres[rng.integers(0, len(centres), min(100_000, count - start))]
    noise = rng.normal(size=part.shape).astype(np.float32) * (SPREAD / part.shape[1] ** 0.5)
    part = part + noise
    out[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
  return out


def timed(call):
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def main(rows: int, dim: int) -> None:
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLUSTERS, dim)).astype(np.float32)
  centres /= np.linalg.norm(centres, axis=1, keepdims=True)
  pool = vectors(rng, rows, centres)
  usable = np.ones(rows, bool)
  most = vectors(rng, max(QUERIES), centres)
  searches = {}
  build, index = timed(lambda: scann.index(pool, usable, 4 * K))
  print(f'{rows:,} rows of {dim} numbers: index {build:.1f} s', flush=True)
  for count in QUERIES:
    queries = most[:count]
    of = exact.Queries(queries, (('q', 0, count),))
    timed(lambda: exact.search_shard(pool[:4096], usable[:4096], of, k=K, nearest=False))  # noqa: B023
    seconds, found = timed(lambda: exact.search_shard(pool, usable, of, k=K, nearest=False)['q'])  # noqa: B023
    approximate, (_, row) = timed(lambda: scann.search(index, pool, queries, 4 * K))  # noqa: B023
    recall = np.mean([len(np.intersect1d(a, b[:K])) / K for a, b in zip(found['top_row'], row)])
    searches[count] = seconds, approximate
    print(
      f'  {count:>6,} queries: exact {seconds:6.1f} s, ScaNN {approximate:6.1f} s besides the '
      f'index, recall@{K} {recall:.4f}',
      flush=True,
    )
  (few, (exact_few, scann_few)), (many, (exact_many, scann_many)) = (
    (count, searches[count]) for count in (QUERIES[0], QUERIES[-1])
  )
  slope = ((exact_many - exact_few) - (scann_many - scann_few)) / (many - few)
  if slope <= 0:
    print('  ScaNN does not win at any number of queries.')
  else:
    even = few + (build + scann_few - exact_few) / slope
    print(f'  ScaNN begins to win at about {max(even, 0):,.0f} queries a shard.')


if __name__ == '__main__':
  for numbers in [int(text) for text in sys.argv[2:]] or [64, 640]:
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, numbers)
