"""Stage search: one exact pass of the pool against the queries of all benchmarks.

In: embeddings. Out: WORKDIR/search/<benchmark>/pool-*.npz (similarity, nearest, excess for each pool
row; the shard's own top-k for each query) and queries.npz (anchor_similarity, anchor_nearest, pool_similarity,
pool_nearest); search/anchor_classes/pool-*.npz: the same against the class means of the anchor;
search/<reference>/pool-*.npz: against labelled examples or prompts. What is made from these columns: searched.py.
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
from clip_jax.stages import dedup
from clip_jax.stages import embed
from clip_jax.stages import embedder
from clip_jax.stages import ingest
from clip_jax.stages import layout


MERGED = 8  # shards whose top lists are merged at once: memory stays flat in their number


@dataclasses.dataclass(frozen=True)
class Target:
  """What the pool is compared with: a benchmark's queries, the anchor's class means, examples or prompts."""
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
  return [*names, *config.references]


def shard_product(config: ConfigDict, workdir: str, target: str, shard: int, parts: dict) -> Product:
  """One pool shard searched with one target. `parts`: embedding products by dataset."""
  inputs = {parts[layout.POOL][shard].name: parts[layout.POOL][shard].fingerprint}
  if target in config.references:  # it has no thresholds and no top-k
    keys = {}
    if layout.is_prompts(config, target):
      block = config.references[target]
      keys = {f'references.{key}': layout.plain(block[key]) for key in ('classes', 'templates')}
      read = [embedder.product(config, workdir)]
    else:
      read = parts[target]
    return Product(f'search/{target}/pool-{shard:05d}', keys,
                   inputs | {part.name: part.fingerprint for part in read})
  reads = [layout.ANCHOR] if layout.has_anchor(config) else []
  reads += [target] if target != layout.ANCHOR_CLASSES else []
  inputs |= {part.name: part.fingerprint for name in reads for part in parts[name]}
  name = f'search/{target}/pool-{shard:05d}'
  keys = layout.pick(config, ['search.backend', 'search.top_k', *_scann_keys(config)])
  there = products.read_sidecar(workdir, name)
  if there:  # longer lists than are asked for begin with what is
    keys['search.top_k'] = max(keys['search.top_k'], there['keys'].get('search.top_k', 0))
  return Product(name, keys, inputs)


def queries_product(config: ConfigDict, target: str, shards: list[Product]) -> Product:
  """The per-query results over the whole pool."""
  keys = layout.pick(config, ['search.recall_queries', 'search.seed']) if config.search.backend == 'scann' else {}
  if any(part.keys['search.top_k'] != config.search.top_k for part in shards):
    keys |= layout.pick(config, ['search.top_k'])
  return Product(f'search/{target}/queries', keys, {part.name: part.fingerprint for part in shards})


@layout.remembered
def pass_products(config: ConfigDict, workdir: str) -> dict[str, tuple[list[Product], Product | None]]:
  """Returns target -> its products of the pass: one a pool shard, and (benchmarks) the queries'."""
  parts = {name: embed.shard_products(config, workdir, name) for name in layout.datasets(config)}
  found = {}
  for target in targets(config, workdir):
    shards = [shard_product(config, workdir, target, i, parts) for i in range(len(parts[layout.POOL]))]
    found[target] = shards, queries_product(config, target, shards) if target in config.benchmarks else None
  return found


@layout.remembered
def all_products(config: ConfigDict, workdir: str) -> dict[str, list[Product]]:
  """Returns target -> its products: one a pool shard, then, of benchmarks, the queries', pairs and paper.json."""
  every = pass_products(config, workdir)
  found = {target: [*shards, *([queries] if queries else [])] for target, (shards, queries) in every.items()}
  for name, k in wanted_pairs(config):
    found[name] += pair_products(config, workdir, name, k)
  for name in config.benchmarks:
    paper = paper_product(config, workdir, name)
    found[name] += [paper] if paper else []
  return found


def wanted_pairs(config: ConfigDict) -> list[tuple[str, int]]:
  """Returns the (benchmark, k) of all splits of rule k_aligned, each once."""
  return sorted({(name, split.k) for split in config.splits.values() if split.rule == 'k_aligned'
                 for name in split.benchmarks})


def pair_products(config: ConfigDict, workdir: str, benchmark: str, k: int) -> list[Product]:
  """Returns what the rule k_aligned reads of a benchmark: each query's k nearest anchor rows, then the pairs that

  are nearer than the k-th, one product a pool shard.
  """
  key = {'splits.k': k}
  read = [part for name in (layout.ANCHOR, benchmark) for part in embed.shard_products(config, workdir, name)]
  top = Product(f'search/{benchmark}/anchor-k{k}', key, {part.name: part.fingerprint for part in read})
  searched, _ = pass_products(config, workdir)[benchmark]
  pool = embed.shard_products(config, workdir, layout.POOL)
  return [top, *(Product(f'search/{benchmark}/pairs-k{k}-{shard:05d}', key,
                         {part.name: part.fingerprint for part in (top, searched[shard], pool[shard])})
                 for shard in range(len(pool)))]


def paper_product(config: ConfigDict, workdir: str, benchmark: str) -> Product | None:
  """What the published truncation misses of a benchmark; None without thresholds, and with ScaNN."""
  if not config.search.paper_top_k or not layout.has_anchor(config) or config.search.backend != 'exact':
    return None
  shards, queries = pass_products(config, workdir)[benchmark]
  return Product(f'search/{benchmark}/paper', layout.pick(config, ['search.paper_top_k']),
                 {part.name: part.fingerprint for part in (*shards, queries)})


def sizes_product(config: ConfigDict, workdir: str) -> Product | None:
  """How many rows are over each threshold. None where that cannot be told, or nobody asks.

  That is: no benchmarks, ScaNN (it does not score every row), a further embedder.
  """
  if not config.benchmarks or config.search.backend != 'exact' or products.embedder_of(workdir):
    return None
  every = pass_products(config, workdir)
  read = [part for name in config.benchmarks for part in (*every[name][0], every[name][1])]
  if config.dedup.enabled:
    read.append(dedup.product(config, workdir))
  elif layout.has_anchor(config):  # which pool rows are anchor rows
    read += ingest.shard_products(config, workdir, layout.ANCHOR)
  return Product('search/sizes', {'benchmarks': list(config.benchmarks)},
                 {part.name: part.fingerprint for part in read})


def every_product(config: ConfigDict, workdir: str) -> list[Product]:
  """Returns all products of this stage."""
  from clip_jax.stages import planted
  sizes = sizes_product(config, workdir)
  return [*(product for made in all_products(config, workdir).values() for product in made),
          *([sizes] if sizes else []), *planted.calibration_products(config, workdir)]


def run(config: ConfigDict, workdir: str) -> None:
  from clip_jax.stages import planted
  from clip_jax.stages import searched
  made = [_pass(config, workdir), searched.make_pairs(config, workdir), searched.make_papers(config, workdir),
          searched.make_sizes(config, workdir)]
  planted.calibrate(config, workdir)
  products.write_manifest(workdir, 'search', every_product(config, workdir))
  if any(made) and not products.embedder_of(workdir):
    searched.say(config, workdir)


def _pass(config: ConfigDict, workdir: str) -> bool:
  """Searches what is missing, and merges the queries' results. Returns whether anything was."""
  every = pass_products(config, workdir)
  wanted: dict[str, set[int]] = {}
  late = []
  for target, (shards, queries) in every.items():
    missing = _missing_shards(workdir, every, target)
    wanted[target] = {shards.index(product) for product in missing}
    late += products.missing(workdir, [queries] if queries else [], remake=True, redo='search')
  if not any(wanted.values()) and not late:
    return False
  with products.lock(workdir, 'search/pass'):
    _search(config, workdir, {target: shards for target, (shards, _) in every.items()}, wanted, late)
  return True


def _missing_shards(workdir: str, every, target: str) -> list[Product]:
  """Returns the shards to search. One that does not fit stops; where other targets' do not, it says --redo=search."""
  try:
    return products.missing(workdir, every[target][0], remake=False, redo=f'search:{target}')
  except InputError:
    if any(products.status(workdir, product) == 'differs'
           for name, (shards, _) in every.items() if name != target for product in shards):
      products.missing(workdir, every[target][0], remake=False, redo='search')
    raise


def _search(config: ConfigDict, workdir: str, every, wanted: dict[str, set[int]], late: list[Product]) -> None:
  pool = layout.embeddings(workdir, layout.POOL)
  if not pool.usable.any():
    raise InputError(f'No image of the pool can be read, so nothing can be searched. See {workdir}/ingest/pool.')
  names = [name for name in every if wanted[name] or any(p.name == f'search/{name}/queries' for p in late)]
  opened = {name: open_target(config, workdir, name) for name in names}
  shards = sorted(set().union(*wanted.values()))
  there = len(pool.starts) - 1 - len(shards)
  if shards and there:
    logging.info('search: going on, %d of %d pool shards are searched already.', there, len(pool.starts) - 1)
  total = sum(int(pool.starts[i + 1] - pool.starts[i]) for i in shards)
  joined = {}  # what is searched together, put on the device once
  with progress.Bar(total=total, desc=f'search{layout.whose(workdir)}', unit='row') as bar:
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
    searched = [opened[name] for name in names if wanted[name] and name != layout.ANCHOR_CLASSES]
    logging.info('search%s: %s against %s of %s.', layout.whose(workdir), progress.counted(total, 'pool row'),
                 f'{sum(len(target.ids) for target in searched):,} queries',
                 ' and '.join(progress.counted(sum(target.name in blocks for target in searched), noun)
                              for noun, blocks in (('benchmark', config.benchmarks), ('reference', config.references))
                              if any(target.name in blocks for target in searched)) or 'the anchor\'s classes')


def open_target(config: ConfigDict, workdir: str, name: str) -> Target:
  """Reads a target's vectors and finds its thresholds against the anchor."""
  from clip_jax.similarity import exact
  anchor = layout.embeddings(workdir, layout.ANCHOR) if layout.has_anchor(config) else None
  if name == layout.ANCHOR_CLASSES:
    vectors, classes = class_means(anchor, layout.source(workdir, layout.ANCHOR).labels)
    return Target(name, vectors, np.ones(len(vectors), bool), None, None, classes)
  if name in config.references and layout.is_prompts(config, name):
    vectors = prompts(config, workdir, name)
    return Target(name, vectors, np.ones(len(vectors), bool), None, None, np.arange(len(vectors), dtype=np.int32))
  queries = layout.embeddings(workdir, name)
  usable = queries.usable
  if not usable.any():
    kind = 'reference' if name in config.references else 'benchmark'
    raise InputError(f'No image of the {kind} {name} can be read, so it cannot be searched. '
                     f'See {workdir}/ingest/{name}.')
  vectors = queries[:]
  thresholds = nearest = None
  if anchor is not None and name in config.benchmarks:
    thresholds = np.full(len(vectors), np.nan)
    nearest = np.full(len(vectors), -1, np.int64)
    thresholds[usable], nearest[usable] = exact.thresholds(anchor, anchor.usable, vectors[usable])
  return Target(name, vectors, usable, thresholds, nearest, np.flatnonzero(usable).astype(np.int32))


def prompts(config: ConfigDict, workdir: str, name: str) -> Array:  # [C, E] float16
  """Encodes the prompts of a reference with the embedder's text tower: one vector a class, in the classes' order."""
  from clip_jax.evaluation import zero_shot
  block = config.references[name]
  encode_text = embedder.text_tower(config, workdir)
  matrix = zero_shot.class_matrix(encode_text, tuple(block.classes), tuple(block.templates))
  return matrix.astype(np.float16)


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
    k = s.top_k if any(target.name in config.benchmarks for target in now) else 0
    found = exact.search_shard(vectors, usable, queries, k=k, tile_rows=s.tile_rows, query_block=s.query_block,
                               name=f'embeddings/pool/{shard:05d}.npy')
  for target in now:  # the search numbers the queries that it got; the files number the benchmark's
    arrays = found[target.name]
    if target.name not in config.benchmarks:  # nobody asks for the pool rows nearest to a class or an example
      del arrays['top_similarity'], arrays['top_row']
    arrays['nearest'] = np.where(arrays['nearest'] >= 0, target.ids[arrays['nearest']], -1).astype(np.int32)
  return found


def _queries(config: ConfigDict, workdir: str, target: Target, pool) -> tuple[dict[str, Array], dict]:
  """Merges the shards' top-k of every query; queries that were not searched hold NaN and -1."""
  from clip_jax.similarity import exact
  merged = []
  for shard in range(len(pool.starts) - 1):
    similarity, row = layout.search_arrays(workdir, target.name, shard, ['top_similarity', 'top_row'])
    # Rows of the shard, so that a shard's file does not depend on those before it.
    merged.append((similarity, np.where(row >= 0, row + pool.starts[shard], -1)))
    if len(merged) > MERGED:
      merged = [exact.merge_top(merged, config.search.top_k)]
  merged = [exact.merge_top(merged, config.search.top_k)]
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
    excess, = layout.search_arrays(workdir, target.name, shard, ['excess'])
    found += int((excess[true] > 0).sum())
  logging.info('search %s: ScaNN found %d of %d rows over a threshold of %d sampled queries.', target.name, found,
               over, len(sample))
  return found / over if over else 1.0


def _scann_keys(config: ConfigDict) -> list[str]:
  return ['search.candidates'] if config.search.backend == 'scann' else []


def _labelled(block: ConfigDict) -> bool:
  """Whether the samples of a dataset have labels, as far as its block says."""
  return all(part.label_key or part.format in ('folder', 'glyphs') for _, part in layout.flatten(block))
