"""What others do with the same vectors, for bench_search.py: times a piece of work for each line.

  python published_peer.py FOLDER K      # FOLDER: pool.npy, queries.npy, edges.npy

In (stdin): 'published', 'faiss 1' or 'faiss k'. Out: a line with wall and CPU seconds.

'published' is our own plain transcription, in PyTorch, of what Mayilvahanan et al. 2024 publish:
for each benchmark, one pass over the pool for each query's K nearest rows (a list for each chunk,
then lists merged), and another for each row's maximum over the queries. Their K is 10,000 or
20,000, ours here is the search's. 'faiss 1': IndexFlatIP over each benchmark's queries, the nearest
of each pool row. 'faiss k': IndexFlatIP over the pool, which is filled untimed, the K nearest rows
of each query.
"""

import functools
import os
import sys
import time

import numpy as np
import torch

CHUNK = 10_000
THREADS = 2


def chunks(pool):
  for i in range(0, len(pool), CHUNK):
    yield i, pool[i : i + CHUNK].astype(np.float32)


def published(pool, queries, edges, k):
  for a, b in zip(edges, edges[1:]):
    part = torch.from_numpy(queries[a:b])
    lists = []
    for i, rows in chunks(pool):
      value, row = (part @ torch.from_numpy(rows).T).topk(min(k, len(rows)), dim=1)
      lists.append((value, row + i))
    value, row = (torch.cat(x, 1) for x in zip(*lists))
    value, order = value.topk(min(k, value.shape[1]), dim=1)
    row.gather(1, order)
    torch.cat([(torch.from_numpy(rows) @ part.T).max(1).values for _, rows in chunks(pool)])


def faiss_nearest(pool, queries, edges, k):
  del k
  import faiss

  for a, b in zip(edges, edges[1:]):
    index = faiss.IndexFlatIP(queries.shape[1])
    index.add(queries[a:b])
    for _, rows in chunks(pool):
      index.search(rows, 1)


def faiss_top(pool, queries, edges, k):
  del edges
  pool_index(pool.filename).search(queries, k)


@functools.cache
def pool_index(path):
  import faiss

  pool = np.load(path, mmap_mode='r')
  index = faiss.IndexFlatIP(pool.shape[1])
  for _, rows in chunks(pool):
    index.add(rows)
  return index


def main() -> None:
  folder, k = sys.argv[1], int(sys.argv[2])
  torch.set_num_threads(THREADS)
  pool = np.load(os.path.join(folder, 'pool.npy'), mmap_mode='r')
  queries = np.load(os.path.join(folder, 'queries.npy')).astype(np.float32)
  edges = np.load(os.path.join(folder, 'edges.npy'))
  works = {'published': published, 'faiss 1': faiss_nearest, 'faiss k': faiss_top}
  for line in sys.stdin:
    if line.strip() == 'faiss k':
      pool_index(pool.filename)
    wall, cpu = time.perf_counter(), time.process_time()
    works[line.strip()](pool, queries, edges, k)
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == '__main__':
  main()
