"""Stage prune: every split as rows of the base set, from the columns that the search left.

In: search columns, dedup marks, embeddings (for rows that float32 cannot decide). Out:
WORKDIR/splits/<split>/rows.npy (or rows-seed<k>.npy), split.json, for aligned splits
queries-<benchmark>.npz (how many removed rows are near each query), and what the split exports.
"""

import dataclasses
import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.pruning import rules
from clip_jax.pruning import splits
from clip_jax.stages import dedup
from clip_jax.stages import embed
from clip_jax.stages import export
from clip_jax.stages import layout
from clip_jax.stages import search

ROWS_AT_ONCE = 65_536  # vectors that are read from the pool at a time
NEAR_MARGIN = 0.02  # a query is "unhit" where no removed row is nearer than its threshold less this


@layout.remembered
def rows_product(config: ConfigDict, workdir: str, split: str, seed: int) -> Product:
  """The rows on which (split, seed) trains."""
  block = config.splits[split]
  rule = rules.RULES[block.rule]
  keys = {f'splits.{key}': layout.plain(block[key]) for key in ('rule', *rule.keys)}
  keys['splits.append_anchor'] = appends_anchor(config, split)
  if 'draw' in rule.needs:
    keys['draw'] = seed
  inputs = {}
  if 'file' in rule.needs:
    del keys['splits.file']  # where it lies changes nothing
    keys['prune.export_key'] = config.prune.export_key
    inputs['the listed file'] = export.listed_sha256(config, workdir, split)
  parts = {name: embed.shard_products(config, workdir, name) for name in layout.datasets(config)}
  reads = [*parts[layout.POOL], *parts.get(layout.ANCHOR, [])]
  if config.dedup.enabled:
    reads.append(dedup.product(config, workdir))
  names = list(block.benchmarks) + ([layout.ANCHOR_CLASSES] if 'anchor_classes' in rule.needs else [])
  searched = search.all_products(config, workdir)
  for name in names:
    if name not in searched:
      raise InputError(f'The split {split} needs the anchor\'s classes, and config.anchor has no labels. Give '
                       'config.anchor.label_key.')
    reads += searched[name]
  for other in (block.size_of, block.to):
    if other:
      reads.append(rows_product(config, workdir, other, seeds_of(config, other, seed)))
  inputs |= {part.name: part.fingerprint for part in reads}
  return Product(layout.rows_name(config, split, seed), keys, inputs)


def split_product(config: ConfigDict, workdir: str, split: str) -> Product:
  """What is known of a split: split.json, and the figures of its queries."""
  keys = layout.pick(config, ['prune.check_queries', 'prune.duplicate_similarity', 'dedup.threshold',
                              'pool.domain_column', 'pool.label_key'])
  reads = [rows_product(config, workdir, split, seed) for seed in layout.seeds(config, split)]
  return Product(f'splits/{split}/split', keys, {part.name: part.fingerprint for part in reads})


def seeds_of(config: ConfigDict, other: str, seed: int) -> int:
  """Returns the seed whose draw of another split counts: the same where it has it, else its first."""
  seeds = layout.seeds(config, other)
  return seed if seed in seeds else seeds[0]


def appends_anchor(config: ConfigDict, split: str) -> bool:
  fixed = rules.RULES[config.splits[split].rule].append_anchor
  return layout.has_anchor(config) and (config.splits[split].append_anchor if fixed is None else fixed)


def order(config: ConfigDict) -> list[str]:
  """Returns the splits so that each comes after those that it reads (size_of, to)."""
  done: list[str] = []
  def visit(name: str) -> None:
    for other in (config.splits[name].size_of, config.splits[name].to):
      if other and other not in done:
        visit(other)
    if name not in done:
      done.append(name)
  for name in config.splits:
    visit(name)
  return done


def run(config: ConfigDict, workdir: str) -> None:
  every, base = [], None
  for split in order(config):
    rows = {p.name: (seed, p) for seed in layout.seeds(config, split)
            for p in [rows_product(config, workdir, split, seed)]}
    about = split_product(config, workdir, split)
    every += [*(p for _, p in rows.values()), about]
    wanted = products.missing(workdir, [p for _, p in rows.values()], remake=True, redo='prune')
    late = products.missing(workdir, [about], remake=True, redo='prune')
    if not wanted and not late:
      continue
    base = base or Base(config, workdir)
    with products.lock(workdir, about.name):
      for product in wanted:
        kept = base.keep(split, rows[product.name][0])
        files.write_npy(os.path.join(workdir, product.name + '.npy'), base.rows(split, kept))
        products.finish(workdir, product, [product.name + '.npy'], {'pool_rows': len(kept.rows), **kept.report})
      made = base.describe(split)
      products.finish(workdir, about, made)
  if base is not None:
    _say(config, workdir)
  every += export.run(config, workdir, {(split, seed): rows_product(config, workdir, split, seed)
                                        for split, seed in layout.runs(config)})
  products.write_manifest(workdir, 'splits', every)


class Base:
  """The base set's columns, read once for all splits."""

  def __init__(self, config: ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._pool = layout.embeddings(workdir, layout.POOL)
    self._source = layout.source(workdir, layout.POOL)
    self._queries: dict[str, tuple[Array, Array]] = {}
    anchor = layout.embeddings(workdir, layout.ANCHOR) if layout.has_anchor(config) else None
    self._anchor = anchor
    self._anchor_rows = np.flatnonzero(anchor.usable) if anchor is not None else np.zeros(0, np.int64)
    self.columns = self._columns()
    if not self.columns.candidates.any():
      raise InputError('The pool has no candidate: no row is readable and kept by de-duplication.')

  def _columns(self) -> rules.Columns:
    config, workdir = self._config, self._workdir
    used = {name for split in config.splits.values() for name in split.benchmarks}
    column = lambda which: {name: layout.search_column(workdir, name, which) for name in sorted(used)}
    extra = {}
    if any(split.rule == 'matched' for split in config.splits.values()):
      extra = {'anchor_class': layout.search_column(workdir, layout.ANCHOR_CLASSES, 'nearest'),
               'anchor_class_similarity': layout.search_column(workdir, layout.ANCHOR_CLASSES, 'similarity')}
    width, height = (self._source.column(name).astype(np.int64) for name in ('width', 'height'))
    recall = None
    if config.search.backend == 'scann' and used:
      recall = min(self._recall(name) for name in sorted(used))
    from clip_jax.similarity import decide
    return rules.Columns(
        tolerance=max(rules.TOLERANCE, decide.error_bound(self._pool.dim)),
        candidates=layout.candidates(config, workdir), similarity=column('similarity'), excess=column('excess'),
        exact_similarity=self._exact_similarity, exact_excess=self._exact_excess, recall=recall,
        caption_length=self._source.caption_lengths, image_pixels=width * height,
        domain=self._domain(), **extra)

  def _domain(self) -> Array | None:
    name = self._config.pool.domain_column
    return self._source.column(name) if name else None

  def _recall(self, benchmark: str) -> float:
    sidecar = products.read_sidecar(self._workdir, f'search/{benchmark}/queries')
    least = self._config.search.min_recall
    if sidecar['counts']['recall'] < least:
      raise InputError(f'ScaNN found {sidecar["counts"]["recall"]:.4f} of the true neighbours of {benchmark} on a '
                       f'sample, less than config.search.min_recall={least}. Raise config.search.candidates, or '
                       'use --config.search.backend=exact.')
    return sidecar['counts']['recall']

  def queries(self, benchmark: str) -> tuple[Array, Array]:
    """Returns a benchmark's usable queries [q, E] float16 and their exact thresholds [q] float64."""
    if benchmark not in self._queries:
      embedded = layout.embeddings(self._workdir, benchmark)
      usable = embedded.usable
      found = files.read_npz(os.path.join(self._workdir, 'search', benchmark, 'queries.npz'))
      self._queries[benchmark] = (embedded[:][usable], found['anchor_similarity_f64'][usable])
    return self._queries[benchmark]

  def _exact_similarity(self, benchmarks, rows: Array) -> Array:
    from clip_jax.similarity import decide
    return self._in_blocks(rows, lambda vectors: np.max(
        [decide.exact_similarity(vectors, self.queries(name)[0]) for name in benchmarks], axis=0))

  def _exact_excess(self, benchmarks, rows: Array) -> Array:
    from clip_jax.similarity import decide
    return self._in_blocks(rows, lambda vectors: np.max(
        [decide.exact_excess(vectors, *self.queries(name)) for name in benchmarks], axis=0))

  def _in_blocks(self, rows: Array, decide) -> Array:
    parts = [decide(self._pool.rows(rows[start:start + ROWS_AT_ONCE]))
             for start in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros(0)

  def keep(self, split: str, seed: int) -> rules.Kept:
    """Applies a split's rule. Warns where it drops more than half of the candidates without being asked to."""
    block = self._config.splits[split]
    rule = rules.RULES[block.rule]
    given = {}
    if 'benchmarks' in rule.keys:
      given['benchmarks'] = tuple(block.benchmarks)
    if 'slack' in rule.keys:
      given['slack'] = block.slack
    if 'count' in rule.needs:
      given['count'] = self._count(block, seed)
    if 'draw' in rule.needs:
      given |= {'seed': block.seed, 'draw': seed}
    if 'target' in rule.needs:
      given['removed'] = self.removed(block.to, seed)
    about = {}
    if 'file' in rule.needs:
      given['rows'], about = export.listed_rows(self._config, self._workdir, split)
    kept = rule.keep(self.columns, **given)
    return dataclasses.replace(kept, report=about | kept.report)

  def _count(self, block: ConfigDict, seed: int) -> int:
    candidates = int(self.columns.candidates.sum())
    if block.size_of:
      return len(self._pool_rows(block.size_of, seed))
    return rules.count_of(block.size, candidates)

  def _pool_rows(self, split: str, seed: int) -> Array:
    """Returns the pool rows that a split keeps, from its file."""
    seed = seeds_of(self._config, split, seed)
    rows = np.load(layout.split_rows(self._config, self._workdir, split, seed))
    return rows[rows < len(self._pool)]

  def removed(self, split: str, seed: int) -> Array:
    """Returns the candidates that a split drops, sorted."""
    dropped = self.columns.candidates.copy()
    dropped[self._pool_rows(split, seed)] = False
    return np.flatnonzero(dropped)

  def rows(self, split: str, kept: rules.Kept) -> Array:
    """Returns rows of the base set, sorted: what is kept of the pool, then the anchor's."""
    return splits.base_rows(kept.rows, len(self._pool), self._anchor_rows,
                            appends_anchor(self._config, split))

  def describe(self, split: str) -> list[str]:
    """Writes split.json (and the queries' figures of an aligned split); returns the files made."""
    config, block = self._config, self._config.splits[split]
    made = [f'splits/{split}/split.json']
    draws = {}
    for seed in layout.seeds(config, split):
      rows = np.load(layout.split_rows(config, self._workdir, split, seed))
      pool_rows = int((rows < len(self._pool)).sum())
      name = layout.rows_name(config, split, seed)
      sidecar = products.read_sidecar(self._workdir, name)
      draws[name.rsplit('/', 1)[1]] = {
          'pool_rows': pool_rows, 'anchor_rows': len(rows) - pool_rows, 'hash': splits.rows_hash(rows),
          **{key: value for key, value in sidecar['counts'].items() if key != 'pool_rows'}}
    first = next(iter(draws.values()))
    candidates = int(self.columns.candidates.sum())
    parameters = {key: layout.plain(block[key]) for key in rules.RULES[block.rule].keys}
    if 'file' in parameters:
      parameters['file'] = os.path.basename(block.file)
    about = {'rule': block.rule, 'parameters': parameters,
             'candidates': candidates, 'pool_size': len(self._pool), 'pool_rows': first['pool_rows'],
             'anchor_rows': first['anchor_rows'],
             'dropped': candidates - (first['pool_rows'] - first.get('repeats', 0)),
             'append_anchor': appends_anchor(config, split), 'seed': block.seed, 'hash': first['hash'],
             'checks': {}, 'draws': draws}
    if block.rule in layout.ALIGNED:
      figures, extra = self._aligned(split)
      about |= figures
      made += extra
    files.write_json(os.path.join(self._workdir, made[0]), about)
    return made

  def _aligned(self, split: str) -> tuple[dict, list[str]]:
    """Checks an aligned split by brute force and counts what is printed of it."""
    from clip_jax.similarity import decide
    config, block = self._config, self._config.splits[split]
    removed = self.removed(split, layout.seeds(config, split)[0])
    over, cosine, made = {}, {}, []
    for name in block.benchmarks:
      embedded = layout.embeddings(self._workdir, name)
      usable = np.flatnonzero(embedded.usable)
      queries, thresholds = self.queries(name)
      found = files.read_npz(os.path.join(self._workdir, 'search', name, 'queries.npz'))
      nearest = self._anchor.rows(found['anchor_nearest'][usable])
      counts = np.zeros((len(queries), 2), np.int64)
      for start in range(0, len(removed), ROWS_AT_ONCE):
        vectors = self._pool.rows(removed[start:start + ROWS_AT_ONCE])
        counts += decide.count_over(vectors, queries, thresholds, margins=(0.0, NEAR_MARGIN))
      norms = np.linalg.norm(queries.astype(np.float64), axis=1) * np.linalg.norm(nearest.astype(np.float64), axis=1)
      over[name], cosine[name] = counts[:, 0], thresholds / norms
      path = f'splits/{split}/queries-{name}.npz'
      arrays = {'removed_over': np.full(len(embedded), -1, np.int64),
                'removed_near': np.full(len(embedded), -1, np.int64),
                'anchor_cosine': np.full(len(embedded), np.nan)}
      for key, values in (('removed_over', counts[:, 0]), ('removed_near', counts[:, 1]),
                          ('anchor_cosine', cosine[name])):
        arrays[key][usable] = values
      files.write_npz(os.path.join(self._workdir, path), **arrays)
      made.append(path)
    labels = self._source.labels
    classes = layout.class_names(config, self._workdir, layout.POOL)
    named = np.array([*classes, 'other'])[np.where((labels >= 0) & (labels < len(classes)), labels, -1)]
    duplicate = config.prune.duplicate_similarity or 1 - config.dedup.threshold
    figures = splits.describe_aligned(
        self.columns, np.setdiff1d(np.flatnonzero(self.columns.candidates), removed, assume_unique=True),
        benchmarks=tuple(block.benchmarks), removed_over=over, anchor_cosine=cosine,
        duplicate_similarity=duplicate, label=named if classes else None, domain=self._domain())
    figures['duplicate_similarity'] = duplicate
    figures['checks'] = {name: self._check(split, name) for name in block.benchmarks}
    for warning in figures['warnings']:
      logging.warning('%s: %s.', split, warning)
    return figures, made

  def _check(self, split: str, benchmark: str) -> dict:
    """Proves by brute force on a sample that the split has the anchor's similarity gap."""
    config, block = self._config, self._config.splits[split]
    if not config.prune.check_queries:
      return {'checked': 0}
    if config.search.backend != 'exact':
      return {'checked': 0, 'kind': 'not exact: ScaNN may have missed rows'}
    kept = self._pool_rows(split, layout.seeds(config, split)[0])
    size = splits.CHECK_ROWS
    pool = (self._pool.rows(kept[i:i + size]) for i in range(0, len(kept), size))
    anchor = lambda: (self._anchor.rows(self._anchor_rows[i:i + size])
                      for i in range(0, len(self._anchor_rows), size))
    appended = appends_anchor(config, split)
    blocks = (block_ for part in ([pool, anchor()] if appended else [pool]) for block_ in part)
    found = splits.check_aligned(self.queries(benchmark)[0], blocks, anchor(), append_anchor=appended,
                                 slack=block.slack, sample=config.prune.check_queries, seed=block.seed)
    if found['failures']:
      raise InputError(f'{split} is not aligned to {benchmark}: {found["failures"]} of {found["checked"]} checked '
                       f'queries have another nearest-neighbour similarity than in the anchor, for example '
                       f'{found["first_failures"][0]}. The search is not of these embeddings: --redo=search.')
    return found


def _say(config: ConfigDict, workdir: str) -> None:
  """Says in one line a split how large it is."""
  for split in config.splits:
    about = files.read_json(os.path.join(workdir, 'splits', split, 'split.json'))
    share = about['dropped'] / max(about['candidates'], 1)
    checks = sum(check.get('checked', 0) for check in about['checks'].values())
    if any(draw.get('no_matched_control') for draw in about['draws'].values()):
      lacking = max(draw['without_full_cell_donor'] for draw in about['draws'].values())
      logging.warning('%s: no matched control exists, as %.0f %% of the rows that %s removes have no donor like them; '
                      'it holds random rows instead.', split, 100 * lacking, config.splits[split].to)
    repeats = max(draw.get('repeats', 0) for draw in about['draws'].values())
    logging.info('split %s: %s pool rows%s (%.1f %% dropped) and %s anchor rows%s.', split, f'{about["pool_rows"]:,}',
                 f', {repeats:,} of them repeats' if repeats else '', 100 * share, f'{about["anchor_rows"]:,}',
                 f'; gap checked on {checks} queries' if checks else '')
