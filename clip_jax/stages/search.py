"""Stage search: one exact pass of the pool against the queries of all benchmarks.

In: embeddings. Out: WORKDIR/search/<benchmark>/pool-*.npz (similarity, nearest, excess for each pool
row; the shard's own top-k for each query) and queries.npz (anchor_similarity, anchor_nearest, pool_similarity,
pool_nearest); search/anchor_classes/pool-*.npz: the same against the class means of the anchor.
"""

import dataclasses
import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.stages import embed
from clip_jax.stages import ingest
from clip_jax.stages import layout


@dataclasses.dataclass(frozen=True)
class Target:
  """What the pool is compared with: the queries of a benchmark, or the anchor's class means."""
  name: str
  vectors: Array                 # [Q, E] float16
  usable: Array                  # [Q] bool; queries that are not usable are not searched
  thresholds: Array | None       # [Q] float64: similarity to the nearest anchor image, exact
  anchor_nearest: Array | None   # [Q] int64: that image's index in the anchor
  ids: Array                     # [usable Q] int32: what `nearest` holds for each searched query


def targets(config: ConfigDict, workdir: str) -> list[str]:
  """Returns the names of all targets. Class means need an anchor with labels."""
  names = list(config.benchmarks)
  if layout.has_anchor(config) and _labelled(config.anchor):
    names.append(layout.ANCHOR_CLASSES)
  del workdir
  return names


def shard_product(config: ConfigDict, workdir: str, target: str, shard: int, parts: dict) -> Product:
  """One pool shard searched with one target. `parts`: embedding products by dataset."""
  inputs = {parts[layout.POOL][shard].name: parts[layout.POOL][shard].fingerprint}
  reads = [layout.ANCHOR] if layout.has_anchor(config) else []
  reads += [target] if target != layout.ANCHOR_CLASSES else []
  inputs |= {part.name: part.fingerprint for name in reads for part in parts[name]}
  del workdir
  return Product(f'search/{target}/pool-{shard:05d}',
                 layout.pick(config, ['search.backend', 'search.top_k', *_scann_keys(config)]), inputs)


def queries_product(config: ConfigDict, target: str, shards: list[Product]) -> Product:
  """The per-query results over the whole pool."""
  keys = layout.pick(config, ['search.recall_queries', 'search.seed']) if config.search.backend == 'scann' else {}
  return Product(f'search/{target}/queries', keys, {part.name: part.fingerprint for part in shards})


@layout.remembered
def all_products(config: ConfigDict, workdir: str) -> dict[str, list[Product]]:
  """Returns target -> its products: one a pool shard, then (benchmarks) the queries'."""
  parts = {name: embed.shard_products(config, workdir, name) for name in layout.datasets(config)}
  found = {}
  for target in targets(config, workdir):
    shards = [shard_product(config, workdir, target, i, parts) for i in range(len(parts[layout.POOL]))]
    found[target] = shards + ([] if target == layout.ANCHOR_CLASSES else [queries_product(config, target, shards)])
  return found


def run(config: ConfigDict, workdir: str) -> None:
  every = all_products(config, workdir)
  wanted: dict[str, set[int]] = {}
  late = []
  for target, made in every.items():
    shards = [p for p in made if not p.name.endswith('/queries')]
    wanted[target] = {shards.index(p) for p in products.missing(workdir, shards, remake=False,
                                                                redo=f'search:{target}')}
    late += products.missing(workdir, [p for p in made if p not in shards], remake=True, redo='search')
  if any(wanted.values()) or late:
    with products.lock(workdir, 'search/pass'):
      _search(config, workdir, every, wanted, late)
  products.write_manifest(workdir, 'search', [product for made in every.values() for product in made])


def _search(config: ConfigDict, workdir: str, every, wanted: dict[str, set[int]], late: list[Product]) -> None:
  pool = layout.embeddings(workdir, layout.POOL)
  names = [name for name in every if wanted[name] or any(p.name == f'search/{name}/queries' for p in late)]
  opened = {name: open_target(config, workdir, name) for name in names}
  shards = sorted(set().union(*wanted.values()))
  there = len(pool.starts) - 1 - len(shards)
  if shards and there:
    logging.info('search: going on, %d of %d pool shards are searched already.', there, len(pool.starts) - 1)
  total = sum(int(pool.starts[i + 1] - pool.starts[i]) for i in shards)
  joined = {}  # what is searched together, put on the device once
  with progress.Bar(total=total, desc='search', unit='row') as bar:
    for shard in shards:
      now = tuple(name for name in names if shard in wanted[name])
      if now not in joined:
        joined[now] = join([opened[name] for name in now])
      found = search_one(config, pool, shard, [opened[name] for name in now], joined[now])
      for name, arrays in found.items():
        made = every[name][shard]
        files.write_npz(os.path.join(workdir, made.name + '.npz'), **arrays)
        products.finish(workdir, made, [made.name + '.npz'], {'rows': len(arrays['similarity'])})
      bar.update(int(pool.starts[shard + 1] - pool.starts[shard]))
  for product in late:
    name = product.name.split('/')[1]
    arrays, counts = _queries(config, workdir, opened[name], pool)
    files.write_npz(os.path.join(workdir, product.name + '.npz'), **arrays)
    products.finish(workdir, product, [product.name + '.npz'], counts)
  if shards:
    logging.info('search: %s pool rows against %s queries of %d benchmarks.', f'{total:,}',
                 f'{sum(len(opened[name].ids) for name in config.benchmarks if name in opened):,}',
                 len(config.benchmarks))


def open_target(config: ConfigDict, workdir: str, name: str) -> Target:
  """Reads a target's vectors and finds its thresholds against the anchor."""
  from clip_jax.similarity import exact
  anchor = layout.embeddings(workdir, layout.ANCHOR) if layout.has_anchor(config) else None
  if name == layout.ANCHOR_CLASSES:
    vectors, classes = class_means(anchor, layout.source(workdir, layout.ANCHOR).labels)
    return Target(name, vectors, np.ones(len(vectors), bool), None, None, classes)
  queries = layout.embeddings(workdir, name)
  usable = queries.usable
  if not usable.any():
    raise InputError(f'No image of the benchmark {name} can be read, so it cannot be searched. '
                     f'See {workdir}/ingest/{name}.')
  vectors = queries[:]
  thresholds = nearest = None
  if anchor is not None:
    thresholds = np.full(len(vectors), np.nan)
    nearest = np.full(len(vectors), -1, np.int64)
    thresholds[usable], nearest[usable] = exact.thresholds(anchor, anchor.usable, vectors[usable])
  return Target(name, vectors, usable, thresholds, nearest, np.flatnonzero(usable).astype(np.int32))


def class_means(anchor, labels: Array) -> tuple[Array, Array]:
  """Returns the normalised mean vectors of the anchor's classes [C', E] float16 and their labels [C'] int32."""
  usable = anchor.usable & (labels >= 0)
  classes = np.unique(labels[usable])
  means = []
  for label in classes:
    mean = anchor[np.flatnonzero(usable & (labels == label))].astype(np.float64).mean(axis=0)
    means.append(mean / max(np.linalg.norm(mean), 1e-12))
  if not means:
    raise InputError('No usable anchor image has a label, so the anchor has no class means. Give '
                     'config.anchor.label_key.')
  return np.stack(means).astype(np.float16), classes.astype(np.int32)


def join(now: list[Target]):
  """Puts the usable queries of some targets one after the other, for one pass."""
  from clip_jax.similarity import exact
  segments, start = [], 0
  for target in now:
    segments.append((target.name, start, start + len(target.ids)))
    start += len(target.ids)
  return exact.Queries(np.concatenate([target.vectors[target.usable] for target in now]), tuple(segments),
                       np.concatenate([_limits(target) for target in now]))


def _limits(target: Target) -> Array:  # [usable Q] float32
  if target.thresholds is None:
    return np.full(len(target.ids), np.nan, np.float32)
  return target.thresholds[target.usable].astype(np.float32)


def search_one(config: ConfigDict, pool, shard: int, now: list[Target], queries) -> dict[str, dict[str, Array]]:
  """Searches one pool shard with some targets in one pass. Returns target -> the arrays of its file."""
  from clip_jax.similarity import exact
  vectors, usable = pool.shard(shard)
  s = config.search
  if s.backend == 'scann':
    found = _scann_shard(config, vectors, usable, now)
  else:
    found = exact.search_shard(vectors, usable, queries, k=s.top_k, tile_rows=s.tile_rows,
                               query_block=s.query_block, name=f'embeddings/pool/{shard:05d}.npy')
  for target in now:  # the search numbers the queries that it got; the files number the benchmark's
    arrays = found[target.name]
    arrays['nearest'] = np.where(arrays['nearest'] >= 0, target.ids[arrays['nearest']], -1).astype(np.int32)
  return found


def _queries(config: ConfigDict, workdir: str, target: Target, pool) -> tuple[dict[str, Array], dict]:
  """Merges the shards' top-k of every query; queries that were not searched hold NaN and -1."""
  from clip_jax.similarity import exact
  merged = []
  for shard in range(len(pool.starts) - 1):
    arrays = files.read_npz(layout.search_file(workdir, target.name, shard))
    row = arrays['top_row']  # of the shard, so that a shard's file does not depend on those before it
    merged.append((arrays['top_similarity'], np.where(row >= 0, row + pool.starts[shard], -1)))
    merged = [exact.merge_top(merged, config.search.top_k)]  # memory stays flat in the number of shards
  (similarity, row), = merged
  number = len(target.vectors)
  arrays = {'pool_similarity': np.full((number, similarity.shape[1]), np.nan, np.float32),
            'pool_nearest': np.full((number, similarity.shape[1]), -1, np.int64),
            'anchor_similarity': np.full(number, np.nan, np.float32),
            'anchor_nearest': np.full(number, -1, np.int64),
            'anchor_similarity_f64': np.full(number, np.nan)}
  arrays['pool_similarity'][target.usable] = similarity
  arrays['pool_nearest'][target.usable] = row
  if target.thresholds is not None:
    arrays |= {'anchor_similarity': target.thresholds.astype(np.float32),
               'anchor_nearest': target.anchor_nearest, 'anchor_similarity_f64': target.thresholds}
  counts = {'queries': number, 'unusable': int((~target.usable).sum())}
  if config.search.backend == 'scann':
    counts['recall'] = _recall(config, workdir, target, pool)
  return arrays, counts


def _scann_shard(config: ConfigDict, vectors, usable, now: list[Target]) -> dict[str, dict[str, Array]]:
  """ScaNN: candidates of each query, exactly re-scored; other rows hold NaN, -1, NaN."""
  from clip_jax.similarity import scann
  found = {}
  for target in now:
    similarity, row = scann.candidates(vectors, usable, target.vectors[target.usable], config.search.candidates)
    limits = _limits(target)
    query, place = np.nonzero(row >= 0)
    rows, scores = row[query, place], similarity[query, place]
    best = np.lexsort((query, -scores, rows))  # of each row: the highest score, ties lowest query
    rows_, first = np.unique(rows[best], return_index=True)
    arrays = {'similarity': np.full(len(usable), np.nan, np.float32),
              'nearest': np.full(len(usable), -1, np.int32),
              'excess': np.full(len(usable), np.nan, np.float32)}
    arrays['similarity'][rows_] = scores[best][first]
    arrays['nearest'][rows_] = query[best][first]
    over = np.full(len(usable), -np.inf, np.float32)
    with np.errstate(invalid='ignore'):  # NaN where there is no anchor to compare with
      np.maximum.at(over, rows, scores - limits[query])
    arrays['excess'][rows_] = over[rows_]
    for key in ('similarity', 'excess'):
      arrays[key][~usable] = -np.inf
    k = min(config.search.top_k, similarity.shape[1])
    found[target.name] = arrays | {'top_similarity': similarity[:, :k], 'top_row': row[:, :k]}
  return found


def _recall(config: ConfigDict, workdir: str, target: Target, pool) -> float | None:
  """Returns the share of the rows over a threshold that ScaNN found, for a sample of the queries.

  The sampled queries are searched exactly. None without an anchor: there are no thresholds then.
  """
  from clip_jax.similarity import exact
  if target.thresholds is None:
    return None
  ids = np.flatnonzero(target.usable)
  sample = np.random.default_rng(config.search.seed).choice(
      ids, min(config.search.recall_queries, len(ids)), replace=False)
  queries = exact.Queries(target.vectors[sample], ((target.name, 0, len(sample)),),
                          target.thresholds[sample].astype(np.float32))
  over = found = 0
  for shard in range(len(pool.starts) - 1):
    true = exact.search_shard(*pool.shard(shard), queries, k=1)[target.name]['excess'] > 0
    over += int(true.sum())
    found += int((files.read_npz(layout.search_file(workdir, target.name, shard))['excess'][true] > 0).sum())
  logging.info('search %s: ScaNN found %d of %d rows over a threshold of %d sampled queries.', target.name, found,
               over, len(sample))
  return found / over if over else 1.0


def _scann_keys(config: ConfigDict) -> list[str]:
  return ['search.candidates'] if config.search.backend == 'scann' else []


def _labelled(block: ConfigDict) -> bool:
  """Whether the samples of a dataset have labels, as far as its block says."""
  return all(part.label_key or part.format in ('folder', 'glyphs') for _, part in ingest._flatten(block))
