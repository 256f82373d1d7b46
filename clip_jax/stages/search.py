"""Stage search: compares every pool row with the queries of all benchmarks, in one exact pass.

In: embeddings.
Out, in WORKDIR/search:
  <benchmark>/pool-*.npz: similarity, nearest and excess of each pool row; the shard's top-k rows of
    each query
  <benchmark>@<lo>_<hi>/pool-*.npz: as above, against the queries whose hash lies in [lo, hi), for
    splits with the key `queries`
  <benchmark>/queries.npz: key, anchor_similarity, anchor_nearest, pool_similarity, pool_nearest
  anchor_classes/pool-*.npz: as above, against the class means of the anchor
  <reference>/pool-*.npz: as above, against labelled examples or prompts
  <benchmark>/duplicates.parquet: the pairs of a query and a pool row that count as duplicates
  <benchmark>/anchor-k<k>.npz, <benchmark>/pairs-k<k>-*.npz: for splits of rule k_aligned
  <benchmark>/paper.json: the number of rows that the published truncation misses
  sizes.npz: the number of candidates over each threshold, which gives the size of every split
"""

from collections.abc import Iterator
import dataclasses
import os
import shlex
import sys

from absl import logging
import numpy as np

from clip_jax.core import files, products, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array, Config
from clip_jax.evaluation import zero_shot
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, ANCHOR_CLASSES, POOL, SIZES
from clip_jax.experiment.experiment import Experiment
from clip_jax.similarity import decide, exact, paper_compat, scann, size_curves
from clip_jax.stages import models, search_duplicates

MERGED = 8  # shards whose top-k lists are merged at once; bounds the memory
QUERIES_AT_ONCE = 4096  # queries whose pairs of a shard are sorted at once
LISTED = 6  # benchmarks named in a line of the summary
SLACKS = (-0.01, 0.01)  # the summary counts dropped rows at these slacks and at 0


@dataclasses.dataclass(frozen=True)
class Target:
  """The vectors that the pool is compared with.

  They are a benchmark's queries or a range of them, the anchor's class means, labelled examples or
  prompts.
  """

  name: str
  vectors: Array  # [Q, E] float16
  usable: Array  # [Q] bool; queries that are not usable are not searched
  thresholds: Array | None  # [Q] float64: similarity to the nearest anchor image, exact
  anchor_nearest: Array | None  # [Q] int64: that image's index in the anchor
  ids: Array  # [usable Q] int32: the number of each searched query in `nearest`

  @property
  def limits(self) -> Array:
    """The thresholds of the searched queries, [usable Q] float32; NaN without an anchor."""
    if self.thresholds is None:
      return np.full(len(self.ids), np.nan, np.float32)
    return self.thresholds[self.usable].astype(np.float32)


def search_shards(x: Experiment, todo: list[Product]) -> Made:
  """Searches each pool shard for all its missing targets in one pass."""
  pool = workdir.embeddings(x, POOL)
  if not pool.usable.any():
    raise InputError(
      f'The pool has no readable image, so it cannot be searched. See {x.path("ingest", "pool")}.'
    )
  wanted: dict[int, list[Product]] = {}
  for product in todo:
    wanted.setdefault(product.subject[1], []).append(product)
  present = len(pool.starts) - 1 - len(wanted)
  if present and not x.is_shared:
    logging.info(
      'search: continuing; %d of %d pool shards are searched already.',
      present,
      len(pool.starts) - 1,
    )
  total = sum(int(pool.starts[shard + 1] - pool.starts[shard]) for shard in wanted)
  joined = {}  # names of targets -> their queries, which go to the device once
  with progress.Bar(total=total, desc=f'search{x.suffix}', unit='row') as bar:
    for shard in sorted(wanted):
      targets = [target_of(x, product.subject[0]) for product in wanted[shard]]
      names = tuple(target.name for target in targets)
      if names not in joined:
        joined[names] = join_targets(targets)
      results = search_one(x, pool, shard, targets, joined[names])
      for product in wanted[shard]:
        arrays = results[product.subject[0]]
        files.write_npz(x.path(product.name + '.npz'), **arrays)
        yield product, [product.name + '.npz'], {'rows': len(arrays['similarity'])}
      bar.update(int(pool.starts[shard + 1] - pool.starts[shard]))
  searched = {product.subject[0] for product in todo} - {ANCHOR_CLASSES}
  counted = [
    progress.count_with_noun(len(searched & set(group)), noun)
    for noun, group in (
      ('benchmark', x.config.benchmarks),
      ('query range', [name for name in searched if blocks.RANGE in name]),
      ('reference', x.config.references),
    )
    if searched & set(group)
  ]
  logging.log(
    logging.DEBUG if x.embedder or x.is_shared else logging.INFO,
    'search%s: %s against %s queries of %s.',
    x.suffix,
    progress.count_with_noun(total, 'pool row'),
    f'{sum(len(target_of(x, name).ids) for name in searched):,}',
    ' and '.join(counted) or "the anchor's classes",
  )


def target_of(x: Experiment, name: str) -> Target:
  """Returns a target, which is opened once."""
  return x.cached(f'target {name}', lambda: open_target(x, name))


def open_target(x: Experiment, name: str) -> Target:
  """Reads a target's vectors and computes its thresholds from the anchor."""
  config = x.config
  if name == ANCHOR_CLASSES:
    vectors, classes = class_means(workdir.embeddings(x, ANCHOR), workdir.source(x, ANCHOR).labels)
    return Target(name, vectors, np.ones(len(vectors), bool), None, None, classes)
  if name in config.references and blocks.is_prompts(config, name):
    block = config.references[name]
    vectors = zero_shot.class_matrix(
      models.text_tower(x), tuple(block.classes), tuple(block.templates)
    ).astype(np.float16)  # [C, E]
    return Target(
      name,
      vectors,
      np.ones(len(vectors), bool),
      None,
      None,
      np.arange(len(vectors), dtype=np.int32),
    )
  if blocks.RANGE in name:
    return _range_of(x, name)
  queries = workdir.embeddings(x, name)
  usable = queries.usable
  if not usable.any():
    kind = 'reference' if name in config.references else 'benchmark'
    raise InputError(
      f'The {kind} {name} has no readable image, so it cannot be searched. '
      f'See {x.path("ingest", name)}.'
    )
  vectors = queries[:]
  thresholds = nearest = None
  if blocks.has_anchor(config) and name in config.benchmarks:
    anchor = workdir.embeddings(x, ANCHOR)
    thresholds = np.full(len(vectors), np.nan)
    nearest = np.full(len(vectors), -1, np.int64)
    thresholds[usable], nearest[usable] = exact.thresholds(anchor, anchor.usable, vectors[usable])
  return Target(name, vectors, usable, thresholds, nearest, np.flatnonzero(usable).astype(np.int32))


def _range_of(x: Experiment, name: str) -> Target:
  """Returns the target of a range of a benchmark's queries."""
  benchmark = blocks.benchmark_of(name)
  whole = target_of(x, benchmark)
  usable = whole.usable & workdir.queries_in(x, name)
  if not usable.any():
    low, high = blocks.query_range(name)
    raise InputError(
      f'No readable query of {benchmark} lies in queries=({low:g}, {high:g}), so nothing can be '
      f'aligned to it: the {len(usable)} queries have too few groups. Set a wider range.'
    )
  return dataclasses.replace(
    whole, name=name, usable=usable, ids=np.flatnonzero(usable).astype(np.int32)
  )


def class_means(anchor, labels: Array) -> tuple[Array, Array]:
  """Returns the normalised class means of the anchor [C', E] float16, and labels [C'] int32."""
  usable = anchor.usable & (labels >= 0)
  classes = np.unique(labels[usable])
  means = []
  for label in classes:
    mean = anchor[np.flatnonzero(usable & (labels == label))].astype(np.float64).mean(axis=0)
    means.append(mean / max(np.linalg.norm(mean), 1e-12))
  if not means:
    raise InputError(
      'No usable anchor image has a label, so the anchor has no class means. Set '
      'config.anchor.label_key.'
    )
  return np.stack(means).astype(np.float16), classes.astype(np.int32)


def join_targets(targets: list[Target]) -> exact.Queries:
  """Concatenates the usable queries of several targets for one pass."""
  segments, start = [], 0
  for target in targets:
    segments.append((target.name, start, start + len(target.ids)))
    start += len(target.ids)
  return exact.Queries(
    np.concatenate([target.vectors[target.usable] for target in targets]),
    tuple(segments),
    np.concatenate([target.limits for target in targets]),
  )


def search_one(
  x: Experiment, pool, shard: int, targets: list[Target], queries
) -> dict[str, dict[str, Array]]:
  """Searches one pool shard for several targets; returns target -> the arrays of its file."""
  vectors, usable = pool.shard(shard)
  s = x.config.search
  if s.backend == 'scann':
    results = _scann_shard(x, vectors, usable, targets)
  else:
    k = s.top_k if any(target.name in x.config.benchmarks for target in targets) else 0
    results = exact.search_shard(
      vectors,
      usable,
      queries,
      k=k,
      tile_rows=s.tile_rows,
      query_block=s.query_block,
      name=f'embeddings/pool/{shard:05d}.npy',
    )
  for target in targets:
    arrays = results[target.name]
    if target.name not in x.config.benchmarks:  # top-k rows are used for benchmarks only
      del arrays['top_similarity'], arrays['top_row']
    # The search numbers the usable queries, the files number all queries of the benchmark.
    arrays['nearest'] = np.where(arrays['nearest'] >= 0, target.ids[arrays['nearest']], -1).astype(
      np.int32
    )
  return results


def _scann_shard(
  x: Experiment, vectors, usable, targets: list[Target]
) -> dict[str, dict[str, Array]]:
  """Searches a shard with ScaNN; scores are exact, and rows that it misses hold NaN, -1, NaN."""
  results = {}
  for target in targets:
    similarity, row = scann.candidates(
      vectors, usable, target.vectors[target.usable], x.config.search.candidates
    )
    arrays = scann.row_columns(similarity, row, usable, target.limits)
    k = min(x.config.search.top_k, similarity.shape[1])
    results[target.name] = arrays | {'top_similarity': similarity[:, :k], 'top_row': row[:, :k]}
  return results


def merge_queries(x: Experiment, todo: list[Product]) -> Made:
  """Merges the shards' top-k lists of every query; unusable queries hold NaN and -1."""
  pool = workdir.embeddings(x, POOL)
  for product in todo:
    target = target_of(x, product.subject[0])
    merged = []
    for shard in range(len(pool.starts) - 1):
      similarity, row = workdir.search_arrays(x, target.name, shard, ['top_similarity', 'top_row'])
      # Files number a shard's own rows, so that they do not depend on earlier shards.
      merged.append((similarity, np.where(row >= 0, row + pool.starts[shard], -1)))
      if len(merged) > MERGED:
        merged = [exact.merge_top(merged, x.config.search.top_k)]
    similarity, row = exact.merge_top(merged, x.config.search.top_k)
    number = len(target.vectors)
    thresholds = np.full(number, np.nan) if target.thresholds is None else target.thresholds
    result = workdir.QueryResult(
      anchor_similarity=thresholds.astype(np.float32),
      anchor_nearest=np.full(number, -1)
      if target.anchor_nearest is None
      else target.anchor_nearest,
      pool_similarity=np.full((number, similarity.shape[1]), np.nan, np.float32),
      pool_nearest=np.full((number, similarity.shape[1]), -1, np.int64),
      anchor_similarity_f64=thresholds,
      key=workdir.keys(x, target.name),
    )
    result.pool_similarity[target.usable] = similarity
    result.pool_nearest[target.usable] = row
    counts: dict[str, float | None] = {'queries': number, 'unusable': int((~target.usable).sum())}
    if x.config.search.backend == 'scann':
      counts['recall'] = _recall(x, target, pool)
    arrays = vars(result)
    order = (
      'pool_similarity',
      'pool_nearest',
      'anchor_similarity',
      'anchor_nearest',
      'anchor_similarity_f64',
      'key',
    )
    files.write_npz(x.path(product.name + '.npz'), **{key: arrays[key] for key in order})
    yield product, [product.name + '.npz'], counts


def _recall(x: Experiment, target: Target, pool) -> float | None:
  """Returns ScaNN's recall: the share of rows over a threshold that it finds for sampled queries.

  The true rows come from an exact search. None without an anchor, which gives the thresholds.
  """
  if target.thresholds is None:
    return None
  ids = np.flatnonzero(target.usable)
  sample = np.random.default_rng(x.config.search.seed).choice(
    ids, min(x.config.search.recall_queries, len(ids)), replace=False
  )
  queries = exact.Queries(
    target.vectors[sample],
    ((target.name, 0, len(sample)),),
    target.thresholds[sample].astype(np.float32),
  )
  over = recalled = 0
  for shard in range(len(pool.starts) - 1):
    rows, usable = pool.shard(shard)
    true = exact.search_shard(rows, usable, queries, k=1)[target.name]['excess'] > 0
    over += int(true.sum())
    (excess,) = workdir.search_arrays(x, target.name, shard, ['excess'])
    recalled += int((excess[true] > 0).sum())
  logging.info(
    'search %s: ScaNN found %d of the %d rows over a threshold of %d sampled queries.',
    target.name,
    recalled,
    over,
    len(sample),
  )
  return recalled / over if over else 1.0


def anchor_lists(x: Experiment, todo: list[Product]) -> Made:
  """Writes the exact similarity and the row of each query's k nearest anchor images, [Q, k]."""
  (name, k), anchor = todo[0].subject, workdir.embeddings(x, ANCHOR)
  if k > anchor.usable.sum():
    split = next(
      s for s, block in x.config.splits.items() if block.rule == 'k_aligned' and block.k == k
    )
    raise InputError(
      f'config.splits.{split}.k={k}, but the anchor has only {int(anchor.usable.sum())} usable '
      'images. Choose a smaller k.'
    )
  queries = workdir.embeddings(x, name)
  usable = queries.usable
  similarity, row = np.full((len(queries), k), np.nan), np.full((len(queries), k), -1, np.int64)
  similarity[usable], row[usable] = exact.anchor_top(
    anchor, anchor.usable, queries[:][usable], k, name='embeddings/anchor'
  )
  files.write_npz(x.path(todo[0].name + '.npz'), similarity=similarity, row=row)
  yield todo[0], [todo[0].name + '.npz'], {}


def pairs(x: Experiment, todo: list[Product]) -> Made:
  """Writes for each shard the pairs of a query and a pool row nearer than its k-th anchor row."""
  name, k, _ = todo[0].subject
  pool, queries = workdir.embeddings(x, POOL), workdir.embeddings(x, name)
  usable = np.flatnonzero(queries.usable)
  vectors = queries[:][usable]
  lists = x.graph.anchor_lists(name, k, x.embedder).name
  cut = files.read_npz(x.path(f'{lists}.npz'))['similarity'][usable, k - 1]
  lowest = cut.min() - decide.error_bound(pool.dim)  # rows below it are in no pair
  with progress.Bar(total=len(todo), desc=f'pairs of {name}, k={k}', unit='shard') as bar:
    for product in todo:
      shard = product.subject[2]
      (similarity,) = workdir.search_arrays(x, name, shard, ['similarity'])
      part = pool.shard(shard)[0]
      rows = np.flatnonzero(similarity >= lowest)  # unusable rows hold -inf
      arrays = {
        'query': [np.zeros(0, np.int32)],
        'row': [np.zeros(0, np.int64)],
        'similarity': [np.zeros(0)],
      }
      for start in range(0, len(usable), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)
        blocks_of_pairs = list(
          exact.pairs_over(
            part, rows, vectors[block], cut[block], name=f'embeddings/pool/{shard:05d}.npy'
          )
        )
        if not blocks_of_pairs:
          continue
        query, row, value = (np.concatenate(column) for column in zip(*blocks_of_pairs))
        order = np.lexsort((row, query))
        for key, one in (
          ('query', usable[block].astype(np.int32)[query]),
          ('row', row),
          ('similarity', value),
        ):
          arrays[key].append(one[order])
      joined = {key: np.concatenate(arrays.pop(key)) for key in list(arrays)}
      files.write_npz(x.path(product.name + '.npz'), **joined)
      yield (
        product,
        [product.name + '.npz'],
        {'pairs': len(joined['row']), 'rows_revisited': len(rows)},
      )
      bar.update()


def _is_over_threshold(x: Experiment, name: str, rows: Array, excess: Array) -> Array:
  """Returns whether each pool row [m] is over a benchmark's threshold, decided exactly, [m] bool.

  excess: [m], their column; only values near 0 are computed again.
  """
  pool = workdir.embeddings(x, POOL)
  return size_curves.is_over_zero(
    excess,
    decide.error_bound(pool.dim),
    lambda near: decide.exact_excess(pool.rows(rows[near]), *workdir.thresholds(x, name)),
  )


def truncation(x: Experiment, todo: list[Product]) -> Made:
  """Counts the rows that the published top-k truncation misses, among all usable pool rows."""
  (product,) = todo
  (name,) = product.subject
  pool, top_k = workdir.embeddings(x, POOL), x.config.search.paper_top_k
  over = missed = 0
  for rows in paper_compat.regroup_rows(_over_rows(x, name)):
    over += len(rows)
    missed += paper_compat.count_missed(pool, rows, *workdir.thresholds(x, name), top_k)
  about = {'top_k': top_k, 'chunk_rows': paper_compat.CHUNK_ROWS, 'over': over, 'missed': missed}
  files.write_json(x.path(product.name + '.json'), about)
  yield product, [product.name + '.json'], about


def _over_rows(x: Experiment, name: str) -> Iterator[tuple[Array, int]]:
  """Yields for each shard its pool rows over a threshold, [m] int64, and the shard's end row."""
  pool = workdir.embeddings(x, POOL)
  for shard, start, stop in workdir.shard_slices(pool.starts):
    (excess,) = workdir.search_arrays(x, name, shard, ['excess'])
    rows = np.flatnonzero(excess >= -decide.error_bound(pool.dim))
    yield start + rows[_is_over_threshold(x, name, start + rows, excess[rows])], stop


def sizes(x: Experiment, todo: list[Product]) -> Made:
  """Counts the candidates over each threshold, for each benchmark and for all together."""
  names = list(x.config.benchmarks)
  counted = size_curves.count_candidates(_candidate_parts(x, names), len(names))
  files.write_npz(
    x.path(todo[0].name + '.npz'),
    benchmarks=np.array(names),
    rows=np.array(len(workdir.embeddings(x, POOL))),
    **counted,
  )
  yield todo[0], [todo[0].name + '.npz'], {'candidates': int(counted['candidates'])}


def _candidate_parts(x: Experiment, names: list[str]):
  """Yields for each shard the candidates' similarity, excess and whether excess > 0, each [G, n].

  G: benchmarks. Without an anchor, the last two are None.
  """
  candidates, has_anchor = workdir.candidates(x), blocks.has_anchor(x.config)
  for shard, start, stop in workdir.shard_slices(workdir.embeddings(x, POOL).starts):
    rows = np.flatnonzero(candidates[start:stop])
    if not len(rows):
      continue
    read = [workdir.search_arrays(x, name, shard, ['similarity', 'excess']) for name in names]
    similarity, excess = (np.stack([one[column][rows] for one in read]) for column in (0, 1))
    dropped = (
      [_is_over_threshold(x, name, start + rows, one) for name, one in zip(names, excess)]
      if has_anchor
      else None
    )
    yield similarity, excess if has_anchor else None, None if dropped is None else np.stack(dropped)


# ------------------------------------------------------------------------------------------------
# the summary


def summarize(x: Experiment, new_products: list[Product]) -> None:
  """Logs the duplicate rates, the rows that splits would drop, and the next command."""
  config = x.config
  if (
    config.dedup.enabled
    and products.read_sidecar(x.workdir, x.graph.dedup_marks().name) is None
    and config.benchmarks
  ):
    logging.info(
      'search: the sizes of splits are counted after de-duplication. Run the stage dedup, then '
      'search again (seconds).'
    )
  if all(product.embedder for product in new_products):
    return
  lists = {b: products.counts(x.workdir, x.graph.duplicates(b).name) for b in config.benchmarks}
  shares = [
    (counts['near']['queries'] / max(counts['queries'], 1), b, counts['exact']['queries'])
    for b, counts in lists.items()
    if counts
  ]
  if shares:
    logging.log(
      logging.DEBUG if config.splits else logging.INFO,
      'search: queries with a duplicate in the pool (similarity %g or more): %s; pairs in '
      'search/*/duplicates.parquet.',
      blocks.duplicate_similarity(config),
      _join_texts(
        [(share, f'{b} {100 * share:.3g} % ({exact:,} exact)') for share, b, exact in shares]
      ),
    )
  if (
    config.benchmarks
    and config.search.backend == 'exact'
    and blocks.has_anchor(config)
    and products.status(x.workdir, x.graph.threshold_counts()) == 'fits'
  ):
    _log_sizes(x)
  if following := next_command(config):
    logging.info('next: %s', following)


def _log_sizes(x: Experiment) -> None:
  counted = files.read_npz(x.path('search', f'{SIZES}.npz'))
  dropped, candidates = counted['excess_zero'], int(counted['candidates'])
  at = [int(np.argmin(np.abs(counted['edges'] - slack))) for slack in SLACKS]
  names = list(x.config.benchmarks)
  if len(names) > 1:
    names.append('any')
  logging.debug(
    'gap-aligned would drop, of %s: %s (%.3g %%).',
    progress.count_with_noun(candidates, 'candidate'),
    _join_texts(
      [(n, f'{name} {n:,}') for name, n in zip(names, dropped.tolist())], last=len(names) > 1
    ),
    100 * dropped[-1] / max(candidates, 1),
  )
  logging.debug(
    'gap-aligned with a slack of %g / %g would drop: %s.',
    *SLACKS,
    _join_texts(
      [
        (n, f'{name} {one[at[0]]:,} / {one[at[1]]:,}')
        for name, n, one in zip(names, dropped.tolist(), counted['excess_over'])
      ],
      last=len(names) > 1,
    ),
  )


def _join_texts(items: list[tuple[float, str]], last: bool = False) -> str:
  """Joins the texts of the LISTED highest values; with `last`, always includes the last text."""
  tail = [items[-1][1]] if last else []
  items = items[:-1] if last else items
  texts = [text for _, text in items]
  if len(items) > LISTED:
    largest = sorted(sorted(range(len(items)), key=lambda i: -items[i][0])[:LISTED])
    texts = [*(texts[i] for i in largest), f'{len(items) - LISTED} more']
  return ', '.join([*texts, *tail])


def next_command(config: Config) -> str:
  """Returns the user's command line with the next stages; '' if this command runs them itself."""
  following = ['prune', 'report'] if config.splits else ['report']
  kept, stages, arguments = [], None, sys.orig_argv[1:]
  while arguments:
    part, *arguments = arguments
    name, equals, value = part.lstrip('-').partition('=')
    if not part.startswith('-') or name not in ('stages', 'redo', 'dry_run'):
      kept.append(part)
      continue
    if not equals and name != 'dry_run':
      value, *arguments = arguments or ['']
    stages = value.split(',') if name == 'stages' else stages
  if not any(part.endswith(('clip_jax.main', 'clip_jax/main.py')) for part in kept):
    return ''  # started from other Python code
  if not stages or set(stages) & set(following):
    return ''
  return shlex.join([os.path.basename(sys.executable), *kept, f'--stages={",".join(following)}'])


MAKERS = {
  'search shard': search_shards,
  'queries': merge_queries,
  'anchor lists': anchor_lists,
  'pairs': pairs,
  'truncation': truncation,
  'sizes': sizes,
  **search_duplicates.MAKERS,
}
