"""Stage search, after the pass: what is made from the searched columns, and what the terminal says of them.

In: search/<benchmark>/pool-*.npz and queries.npz, embeddings, dedup/keep.npy. Out: search/<benchmark>/paper.json (how
many rows the published truncation misses), anchor-k<k>.npz and pairs-k<k>-*.npz (for splits of rule k_aligned),
search/sizes.npz (how many candidates lie over each threshold: the size of every split that is not made yet).
"""

import os
import shlex
import sys
from collections.abc import Iterator

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
from clip_jax.stages import layout
from clip_jax.stages import search

QUERIES_AT_ONCE = 4096  # whose pairs of a shard are sorted at a time
SAID = 6  # benchmarks that a line of the summary names
SLACKS = (-0.01, 0.01)  # at which the summary says what would be dropped, beside 0


class Columns:
  """The searched columns of some benchmarks, read shard by shard, with what decides them exactly."""

  def __init__(self, workdir: str, names):
    from clip_jax.similarity import decide
    self.workdir, self.names = workdir, tuple(names)
    self.pool = layout.embeddings(workdir, layout.POOL)
    self.tolerance = decide.error_bound(self.pool.dim)  # so near 0 an excess is decided in float64
    self._queries: dict[str, tuple[Array, Array]] = {}

  def queries(self, name: str) -> tuple[Array, Array]:
    """Returns a benchmark's usable queries [q, E] float16 and their exact thresholds [q] float64."""
    if name not in self._queries:
      embedded = layout.embeddings(self.workdir, name)
      found = files.read_npz(os.path.join(self.workdir, 'search', name, 'queries.npz'))
      self._queries[name] = embedded[:][embedded.usable], found['anchor_similarity_f64'][embedded.usable]
    return self._queries[name]

  def over(self, name: str, rows: Array, excess: Array) -> Array:
    """Returns which pool rows [m] are over a threshold, exactly, by their column: [m] bool."""
    from clip_jax.similarity import decide
    from clip_jax.similarity import size_curves
    return size_curves.over_zero(excess, self.tolerance, lambda doubt: decide.exact_excess(
        self.pool.rows(rows[doubt]), *self.queries(name)))


def make_papers(config: ConfigDict, workdir: str) -> bool:
  """Writes paper.json of each benchmark that lacks it. Every usable row of the pool counts, duplicates too."""
  made = {name: search.paper_product(config, workdir, name) for name in config.benchmarks}
  late = products.missing(workdir, [product for product in made.values() if product], remake=True, redo='search')
  if not late:
    return False
  from clip_jax.similarity import paper_compat
  columns = Columns(workdir, config.benchmarks)
  top_k = config.search.paper_top_k
  with products.lock(workdir, 'search/pass'):
    for name, product in made.items():
      if product not in late:
        continue
      over = missed = 0
      for rows in paper_compat.chunks(_over_rows(columns, name)):
        over += len(rows)
        missed += paper_compat.missed(columns.pool, rows, *columns.queries(name), top_k)
      about = {'top_k': top_k, 'chunk_rows': paper_compat.CHUNK_ROWS, 'over': over, 'missed': missed}
      files.write_json(os.path.join(workdir, product.name + '.json'), about)
      products.finish(workdir, product, [product.name + '.json'], about)
  return True


def _over_rows(columns: Columns, name: str) -> Iterator[tuple[Array, int]]:
  """Yields for each shard the pool rows over a threshold [m] int64, and the row after its last."""
  for shard, start, stop in layout.shard_slices(columns.pool.starts):
    excess, = layout.search_arrays(columns.workdir, name, shard, ['excess'])
    rows = np.flatnonzero(excess >= -columns.tolerance)
    yield start + rows[columns.over(name, start + rows, excess[rows])], stop


def make_pairs(config: ConfigDict, workdir: str) -> bool:
  """Writes the pairs that splits of rule k_aligned read, shard by shard."""
  made = False
  for name, k in search.wanted_pairs(config):
    top, *shards = search.pair_products(config, workdir, name, k)
    wanted = products.missing(workdir, [top, *shards], remake=False, redo=f'search:{name}')
    if not wanted:
      continue
    made = True
    with products.lock(workdir, 'search/pass'):
      if top in wanted:
        files.write_npz(os.path.join(workdir, top.name + '.npz'), **_anchor_top(config, workdir, name, k))
        products.finish(workdir, top, [top.name + '.npz'])
      _write_pairs(workdir, name, k, shards, wanted)
  return made


def _anchor_top(config: ConfigDict, workdir: str, name: str, k: int) -> dict[str, Array]:
  """Returns the exact similarity [Q, k] and the row [Q, k] of each query's k nearest anchor images."""
  from clip_jax.similarity import exact
  anchor, queries = layout.embeddings(workdir, layout.ANCHOR), layout.embeddings(workdir, name)
  if k > anchor.usable.sum():
    split = next(s for s, block in config.splits.items() if block.rule == 'k_aligned' and block.k == k)
    raise InputError(f'config.splits.{split}.k={k}, and the anchor has {int(anchor.usable.sum())} usable images: no '
                     'query has so many neighbours in it. Choose a smaller k.')
  usable = queries.usable
  found = {'similarity': np.full((len(queries), k), np.nan), 'row': np.full((len(queries), k), -1, np.int64)}
  found['similarity'][usable], found['row'][usable] = exact.anchor_top(
      anchor, anchor.usable, queries[:][usable], k, name='embeddings/anchor')
  return found


def _write_pairs(workdir: str, name: str, k: int, shards: list[Product], wanted: list[Product]) -> None:
  from clip_jax.similarity import decide
  from clip_jax.similarity import exact
  pool, queries = layout.embeddings(workdir, layout.POOL), layout.embeddings(workdir, name)
  usable = np.flatnonzero(queries.usable)
  vectors = queries[:][usable]
  cut = files.read_npz(os.path.join(workdir, f'search/{name}/anchor-k{k}.npz'))['similarity'][usable, k - 1]
  lowest = cut.min() - decide.error_bound(pool.dim)  # a row below it is no pair of any query
  jobs = [(shard, product) for shard, product in enumerate(shards) if product in wanted]
  with progress.Bar(total=len(jobs), desc=f'pairs of {name}, k={k}', unit='shard') as bar:
    for shard, product in jobs:
      similarity, = layout.search_arrays(workdir, name, shard, ['similarity'])
      part = pool.shard(shard)[0]
      rows = np.flatnonzero(similarity >= lowest)  # unusable rows hold -inf
      arrays = {'query': [np.zeros(0, np.int32)], 'row': [np.zeros(0, np.int64)], 'similarity': [np.zeros(0)]}
      for start in range(0, len(usable), QUERIES_AT_ONCE):
        mine = slice(start, start + QUERIES_AT_ONCE)
        found = list(exact.pairs_over(part, rows, vectors[mine], cut[mine], name=f'embeddings/pool/{shard:05d}.npy'))
        if not found:
          continue
        query, row, value = (np.concatenate(column) for column in zip(*found))
        order = np.lexsort((row, query))
        for key, one in (('query', usable[mine].astype(np.int32)[query]), ('row', row), ('similarity', value)):
          arrays[key].append(one[order])
      arrays = {key: np.concatenate(arrays.pop(key)) for key in list(arrays)}
      files.write_npz(os.path.join(workdir, product.name + '.npz'), **arrays)
      products.finish(workdir, product, [product.name + '.npz'],
                      {'pairs': len(arrays['row']), 'rows_revisited': len(rows)})
      bar.update()


def make_sizes(config: ConfigDict, workdir: str) -> bool:
  """Writes sizes.npz: how many candidates are over each threshold, of each benchmark and of all together."""
  wanted = search.sizes_product(config, workdir)
  if wanted is None:
    return False
  if config.dedup.enabled and products.status(workdir, dedup.product(config, workdir)) != 'fits':
    logging.info('search: what a split would drop is counted once the pool is de-duplicated: run the stage dedup, '
                 'then this one again (seconds).')
    return False
  if not products.missing(workdir, [wanted], remake=True, redo='search'):
    return False
  from clip_jax.similarity import size_curves
  names = list(config.benchmarks)
  columns = Columns(workdir, names)
  with products.lock(workdir, 'search/pass'):
    found = size_curves.count(_parts(config, columns), len(names))
    files.write_npz(os.path.join(workdir, 'search/sizes.npz'), benchmarks=np.array(names),
                    rows=np.int64(len(columns.pool)), **found)
    products.finish(workdir, wanted, ['search/sizes.npz'], {'candidates': int(found['candidates'])})
  return True


def _parts(config: ConfigDict, columns: Columns):
  """Yields for each shard the candidates' similarity and excess [G, n], and whether they are over a threshold."""
  candidates = layout.candidates(config, columns.workdir)
  anchor = layout.has_anchor(config)
  for shard, start, stop in layout.shard_slices(columns.pool.starts):
    rows = np.flatnonzero(candidates[start:stop])
    if not len(rows):
      continue
    read = [layout.search_arrays(columns.workdir, name, shard, ['similarity', 'excess']) for name in columns.names]
    similarity, excess = (np.stack([one[column][rows] for one in read]) for column in (0, 1))
    dropped = [columns.over(name, start + rows, one) for name, one in zip(columns.names, excess)] if anchor else None
    yield similarity, excess if anchor else None, np.stack(dropped) if anchor else None


def say(config: ConfigDict, workdir: str) -> None:
  """Says in a few lines what the search found: duplicates, what would be dropped, how to go on."""
  duplicate = layout.duplicate_similarity(config)
  rates = []
  for name in config.benchmarks:
    rate = duplicate_rates(config, workdir, name, duplicate)
    rates.append((rate[0], f'{name} ' + ' / '.join(f'{100 * one:.3g} %' for one in rate)))
  if rates:
    where = 'in the pool / in the anchor' if layout.has_anchor(config) else 'in the pool'
    logging.info('duplicates (similarity %.4g or more), queries with one %s: %s.', duplicate, where, _list(rates))
  sizes = search.sizes_product(config, workdir)
  if sizes and products.status(workdir, sizes) == 'fits' and layout.has_anchor(config):
    found = files.read_npz(os.path.join(workdir, 'search/sizes.npz'))
    dropped, candidates = found['excess_zero'], int(found['candidates'])
    at = [int(np.argmin(np.abs(found['edges'] - slack))) for slack in SLACKS]
    names = list(config.benchmarks)
    if len(names) > 1:
      names.append('any')
    logging.info('gap-aligned would drop, of %s: %s (%.3g %%).', progress.counted(candidates, 'candidate'),
                 _list([(n, f'{name} {n:,}') for name, n in zip(names, dropped.tolist())], last=len(names) > 1),
                 100 * dropped[-1] / max(candidates, 1))
    logging.info('with a slack of %g / %g: %s.', *SLACKS, _list(
        [(n, f'{name} {one[at[0]]:,} / {one[at[1]]:,}') for name, n, one in
         zip(names, dropped.tolist(), found['excess_over'])], last=len(names) > 1))
  following = next_command(config)
  if following:
    logging.info('next: %s', following)


def _list(items: list[tuple[float, str]], last: bool = False) -> str:
  """Joins texts; of many, those of the highest values, and with `last` the last one in any case."""
  tail = [items[-1][1]] if last else []
  items = items[:-1] if last else items
  texts = [text for _, text in items]
  if len(items) > SAID:
    largest = sorted(sorted(range(len(items)), key=lambda i: -items[i][0])[:SAID])
    texts = [*(texts[i] for i in largest), f'{len(items) - SAID} more']
  return ', '.join([*texts, *tail])


def duplicate_rates(config: ConfigDict, workdir: str, benchmark: str, duplicate: float) -> list[float]:
  """Returns the share of a benchmark's usable queries with a near-duplicate in the pool, and, if any, the anchor."""
  from clip_jax.stages import report_images
  found = files.read_npz(os.path.join(workdir, 'search', benchmark, 'queries.npz'))
  usable = layout.embeddings(workdir, benchmark).usable
  pairs = [(layout.POOL, found['pool_similarity'][:, 0], found['pool_nearest'][:, 0])]
  if layout.has_anchor(config):
    pairs.append((layout.ANCHOR, found['anchor_similarity'], found['anchor_nearest']))
  rates = []
  for dataset, similarity, nearest in pairs:
    cosine = report_images.cosine(workdir, benchmark, dataset, similarity, nearest)
    rates.append(float((cosine[usable] >= duplicate).mean()))
  return rates


def next_command(config: ConfigDict) -> str:
  """Returns the user's own command line with the stages that follow; '' where this run goes on to them itself."""
  following = ['prune', 'report'] if config.splits else ['report']
  kept, stages, given = [], None, sys.orig_argv[1:]
  while given:
    part, *given = given
    name, equals, value = part.lstrip('-').partition('=')
    if not part.startswith('-') or name not in ('stages', 'redo', 'dry_run'):
      kept.append(part)
      continue
    if not equals and name != 'dry_run':
      value, *given = given or ['']
    stages = value.split(',') if name == 'stages' else stages
  if not any(part.endswith(('clip_jax.main', 'clip_jax/main.py')) for part in kept):
    return ''  # started from other Python code
  if not stages or set(stages) & set(following):
    return ''
  return shlex.join([os.path.basename(sys.executable), *kept, f'--stages={",".join(following)}'])
