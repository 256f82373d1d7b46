"""Stage prune: every split as rows of the base set, from the columns that the search left.

In: search columns, dedup marks, embeddings (for rows that float32 cannot decide). Out:
WORKDIR/splits/<split>/rows.npy (or rows-seed<k>.npy), split.json, for aligned splits
queries-<benchmark>.npz (how many removed rows are near each query), and what the split exports.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.pruning import rules
from clip_jax.pruning import splits
from clip_jax.stages import dedup
from clip_jax.stages import embed
from clip_jax.stages import export
from clip_jax.stages import layout
from clip_jax.stages import preview
from clip_jax.stages import prune_columns
from clip_jax.stages import search
from clip_jax.stages import sensitivity

LATER = ('quantile', 'dose')  # keys of a split that came later: they count where given, so that older rows stay
NEAR_MARGIN = 0.02  # a query is "unhit" where no removed row is nearer than its threshold less this


def parameters(config: ConfigDict, split: str) -> dict:
  """Returns the keys that the split's rule reads; those that came later only where they are given."""
  block = config.splits[split]
  return {key: layout.plain(block[key]) for key in rules.RULES[block.rule].keys if key not in LATER or block[key]}


@layout.remembered
def rows_product(config: ConfigDict, workdir: str, split: str, seed: int) -> Product:
  """The rows on which (split, seed) trains."""
  block = config.splits[split]
  rule = rules.RULES[block.rule]
  keys = {'splits.rule': block.rule, **{f'splits.{key}': value for key, value in parameters(config, split).items()}}
  keys['splits.append_anchor'] = appends_anchor(config, split)
  if 'draw' in rule.needs:
    keys['draw'] = seed
  inputs = {}
  if 'file' in rule.needs:
    del keys['splits.file']  # where it lies changes nothing
    keys['prune.export_key'] = config.prune.export_key
    inputs['the listed file'] = export.listed_sha256(config, workdir, split)
  parts = {name: embed.shard_products(config, workdir, name) for name in layout.datasets(config)
           if name in (layout.POOL, layout.ANCHOR) or name == layout.PLANTED and rule.planted}
  reads = [part for name in (layout.POOL, layout.ANCHOR, layout.PLANTED) for part in parts.get(name, [])]
  if config.dedup.enabled:
    reads.append(dedup.product(config, workdir))
  names = [*block.benchmarks, *([layout.ANCHOR_CLASSES] if 'anchor_classes' in rule.needs else []),
           *([block.reference] if block.reference else [])]
  searched = search.all_products(config, workdir)
  for name in names:
    if name not in searched:
      raise InputError(f'The split {split} needs the anchor\'s classes, and config.anchor has no labels. Give '
                       'config.anchor.label_key.')
    reads += [made for made in searched[name] if _is_read(made.name, block)]
  for other in layout.reads(config, split):
    reads.append(rows_product(config, workdir, other, seeds_of(config, split, other, seed)))
  inputs |= {part.name: part.fingerprint for part in reads}
  return Product(layout.rows_name(config, split, seed), keys, inputs)


def _is_read(product: str, block: ConfigDict) -> bool:
  """Returns whether a rule reads this product of the search: the columns; of the pairs, those of its k."""
  name = product.rsplit('/', 1)[1]
  of_k = block.rule == 'k_aligned' and (name == f'anchor-k{block.k}' or name.startswith(f'pairs-k{block.k}-'))
  return name.startswith('pool-') or name == 'queries' or of_k


def split_product(config: ConfigDict, workdir: str, split: str) -> Product:
  """What is known of a split: split.json, and the figures of its queries."""
  keys = layout.pick(config, ['prune.check_queries', 'prune.duplicate_similarity', 'dedup.threshold',
                              'pool.domain_column', 'pool.label_key'])
  reads = [rows_product(config, workdir, split, seed) for seed in layout.seeds(config, split)]
  return Product(f'splits/{split}/split', keys, {part.name: part.fingerprint for part in reads})


def seeds_of(config: ConfigDict, split: str, other: str, seed: int) -> int:
  """Returns the seed whose draw of another split counts for (split, seed): the same where it has it, else its first.

  A split that is not drawn itself (near, of the size of a random one) has one seed to go by: its first.
  """
  seed = seed if layout.is_drawn(config, split) else layout.seeds(config, split)[0]
  seeds = layout.seeds(config, other)
  return seed if seed in seeds else seeds[0]


def appends_anchor(config: ConfigDict, split: str) -> bool:
  fixed = rules.RULES[config.splits[split].rule].append_anchor
  return layout.has_anchor(config) and (config.splits[split].append_anchor if fixed is None else fixed)


def order(config: ConfigDict) -> list[str]:
  """Returns the splits so that each comes after those that it reads."""
  done: list[str] = []
  def visit(name: str) -> None:
    for other in layout.reads(config, name):
      if other not in done:
        visit(other)
    if name not in done:
      done.append(name)
  for name in config.splits:
    visit(name)
  return done


def run(config: ConfigDict, workdir: str) -> None:
  every, late, base = [], {}, None
  for split in order(config):
    rows = {p.name: (seed, p) for seed in layout.seeds(config, split)
            for p in [rows_product(config, workdir, split, seed)]}
    about = split_product(config, workdir, split)
    every += [*(p for _, p in rows.values()), about]
    wanted = products.missing(workdir, [p for _, p in rows.values()], remake=True, redo='prune')
    if not wanted and not products.missing(workdir, [about], remake=True, redo='prune'):
      continue
    late[split] = about
    base = base or Base(config, workdir)
    with products.lock(workdir, about.name):
      for product in wanted:
        kept = base.keep(split, rows[product.name][0])
        files.write_npy(os.path.join(workdir, product.name + '.npy'), base.rows(split, kept))
        products.finish(workdir, product, [product.name + '.npy'], {'pool_rows': len(kept.rows), **kept.report})
  checks = base.check(late) if base else {}  # of all splits together: one pass over their vectors
  for split, about in late.items():
    with products.lock(workdir, about.name):
      products.finish(workdir, about, base.describe(split, checks.get(split, {})))
  if base:
    _say(config, workdir)
  every += export.run(config, workdir, {(split, seed): rows_product(config, workdir, split, seed)
                                        for split in config.splits for seed in layout.seeds(config, split)})
  every += [*sensitivity.run(config, workdir), *preview.run(config, workdir)]
  products.write_manifest(workdir, 'splits', every)


class Base(prune_columns.Pool):
  """The base set: the pool's columns, and what is made of them, the splits and their descriptions."""

  def __init__(self, config: ConfigDict, workdir: str):
    super().__init__(config, workdir)
    self._counted: dict[str, tuple[Array, Array]] = {}  # benchmark -> rows that the last split removed, and counts

  def keep(self, split: str, seed: int) -> rules.Kept:
    """Applies a split's rule."""
    block = self._config.splits[split]
    rule = rules.RULES[block.rule]
    known = self._matched_columns if 'anchor_classes' in rule.needs else self.columns
    given = {key: getattr(block, key) for key in ('slack', 'quantile', 'dose', 'k') if key in rule.keys}
    about = {}
    if 'benchmarks' in rule.keys:
      given['benchmarks'] = tuple(block.benchmarks)
    if 'levels' in rule.needs:
      given['codes'], given['names'] = self._levels(block.column, block.reference)
      given['values'] = tuple(map(str, block['values']))
    if 'count' in rule.needs:
      given['count'] = self._count(split, seed)
    if 'draw' in rule.needs:
      given |= {'seed': block.seed, 'draw': seed}
    if 'target' in rule.needs:
      given['removed'] = self.removed(block.to, seeds_of(self._config, split, block.to, seed))
    if 'others' in rule.needs:
      given['others'] = [self._pool_rows(other, seeds_of(self._config, split, other, seed)) for other in block.of]
    if 'file' in rule.needs:
      given['rows'], about = export.listed_rows(self._config, self._workdir, split)
    try:
      kept = rule.keep(known, **given)
    except ConfigError as error:
      raise ConfigError(f'config.splits.{split}: {error}') from error
    return dataclasses.replace(kept, report=about | kept.report)

  def _count(self, split: str, seed: int) -> int:
    block = self._config.splits[split]
    if block.size_of:
      return len(self._pool_rows(block.size_of, seeds_of(self._config, split, block.size_of, seed)))
    return rules.count_of(block.size, int(self.columns.candidates.sum()))

  def _pool_rows(self, split: str, seed: int) -> Array:
    """Returns the pool rows that a split keeps, from its file; `seed` is one of its own."""
    rows = np.load(layout.split_rows(self._config, self._workdir, split, seed))
    return rows[rows < len(self._pool)]

  def removed(self, split: str, seed: int) -> Array:
    """Returns the candidates that a split drops, sorted."""
    dropped = self.columns.candidates.copy()
    dropped[self._pool_rows(split, seed)] = False
    return np.flatnonzero(dropped)

  def rows(self, split: str, kept: rules.Kept) -> Array:
    """Returns rows of the base set, sorted: what is kept of the pool, then the anchor's, then planted ones."""
    planted = np.zeros(0, np.int64)
    if rules.RULES[self._config.splits[split].rule].planted:
      planted = np.flatnonzero(layout.embeddings(self._workdir, layout.PLANTED).usable)
    return splits.base_rows(kept.rows, len(self._pool), self._anchor_rows, appends_anchor(self._config, split),
                            self._base_size, planted)

  def describe(self, split: str, checks: dict[str, dict]) -> list[str]:
    """Writes split.json (and the queries' figures of an aligned split); returns the files made.

    `checks`: what check() found of this split. InputError where it is not aligned.
    """
    config, block = self._config, self._config.splits[split]
    made = [f'splits/{split}/split.json']
    draws = {}
    for seed in layout.seeds(config, split):
      rows = np.load(layout.split_rows(config, self._workdir, split, seed))
      pool_rows, base_rows = np.searchsorted(rows, (len(self._pool), self._base_size)).tolist()
      name = layout.rows_name(config, split, seed)
      sidecar = products.read_sidecar(self._workdir, name)
      draws[name.rsplit('/', 1)[1]] = {
          'pool_rows': pool_rows, 'anchor_rows': base_rows - pool_rows, 'planted_rows': len(rows) - base_rows,
          'hash': splits.rows_hash(rows),
          **{key: value for key, value in sidecar['counts'].items() if key != 'pool_rows'}}
    first = next(iter(draws.values()))
    candidates = int(self.columns.candidates.sum())
    given = parameters(config, split)
    if 'file' in given:
      given['file'] = os.path.basename(block.file)
    about = {'rule': block.rule, 'parameters': given,
             'candidates': candidates, 'pool_size': len(self._pool), 'pool_rows': first['pool_rows'],
             'anchor_rows': first['anchor_rows'], 'planted_rows': first['planted_rows'],
             'dropped': candidates - (first['pool_rows'] - first.get('repeats', 0)),
             'append_anchor': appends_anchor(config, split), 'seed': block.seed, 'hash': first['hash'],
             'checks': checks, 'draws': draws}
    if block.rule in layout.ALIGNED:
      _refuse(split, checks)
      figures, extra = self._aligned(split, first)
      about |= figures
      made += extra
    elif rules.RULES[block.rule].selects:
      dropped = np.zeros(len(self._pool), bool)
      dropped[self.removed(split, layout.seeds(config, split)[0])] = True
      about |= {key: splits.shares(column, self.columns.candidates, dropped)
                for key, column in (('by_class', self._classes), ('by_domain', self._domain))}
    files.write_json(os.path.join(self._workdir, made[0]), about)
    return made

  def _aligned(self, split: str, found: dict) -> tuple[dict, list[str]]:
    """Counts what is printed of an aligned split. `found`: what its rule reported."""
    config, block = self._config, self._config.splits[split]
    removed = self.removed(split, layout.seeds(config, split)[0])
    over, cosine, made = {}, {}, []
    for name in block.benchmarks:
      usable = np.flatnonzero(layout.embeddings(self._workdir, name).usable)
      counts = self._count_over(name, removed)
      over[name], cosine[name] = counts[:, 0], self._anchor_cosine(name)
      path = f'splits/{split}/queries-{name}.npz'
      number = len(layout.source(self._workdir, name))
      arrays = {'removed_over': np.full(number, -1, np.int64), 'removed_near': np.full(number, -1, np.int64),
                'anchor_cosine': np.full(number, np.nan)}
      for key, values in (('removed_over', counts[:, 0]), ('removed_near', counts[:, 1]),
                          ('anchor_cosine', cosine[name])):
        arrays[key][usable] = values
      files.write_npz(os.path.join(self._workdir, path), **arrays)
      made.append(path)
    duplicate = layout.duplicate_similarity(config)
    figures = splits.describe_aligned(
        self.columns, np.setdiff1d(np.flatnonzero(self.columns.candidates), removed, assume_unique=True),
        benchmarks=tuple(block.benchmarks), dropped_at=self._dropped_at(tuple(block.benchmarks)),
        removed_over=over, anchor_cosine=cosine,
        duplicate_similarity=duplicate, label=self._classes, domain=self._domain)
    figures['duplicate_similarity'] = duplicate
    figures['slack'] = _slack(block, found)
    figures['aligned_dropped'] = found.get('aligned_dropped', figures['dropped_at_slack']['0'])
    for warning in figures['warnings']:
      logging.warning('%s: %s.', split, warning)
    return figures, made

  @functools.lru_cache
  def _dropped_at(self, benchmarks: tuple[str, ...]) -> dict[str, int]:
    return splits.dropped_at_slack(self.columns, benchmarks)

  def _count_over(self, benchmark: str, removed: Array) -> Array:
    """Returns how many removed rows are over each usable query's threshold, and near it or over, [q, 2] int64.

    Counts of the last split of this benchmark are taken over: only rows that one of the two removes are counted.
    """
    from clip_jax.similarity import decide
    queries, thresholds = self.queries(benchmark)
    last, counts = self._counted.get(benchmark, (removed[:0], np.zeros((len(queries), 2), np.int64)))
    gone, new = (np.setdiff1d(*pair, assume_unique=True) for pair in ((last, removed), (removed, last)))
    if len(gone) + len(new) > len(removed):
      gone, new, counts = gone[:0], removed, np.zeros_like(counts)
    counts = counts.copy()
    for rows, sign in ((new, 1), (gone, -1)):
      for start in range(0, len(rows), prune_columns.ROWS_AT_ONCE):
        vectors = self._pool.rows(rows[start:start + prune_columns.ROWS_AT_ONCE])
        counts += sign * decide.count_over(vectors, queries, thresholds, margins=(0.0, NEAR_MARGIN))
    self._counted[benchmark] = removed, counts
    return counts

  @functools.lru_cache
  def _anchor_cosine(self, benchmark: str) -> Array:
    """Returns each usable query's threshold, divided by both vectors' norms, [q] float64."""
    queries, thresholds = self.queries(benchmark)
    usable = layout.embeddings(self._workdir, benchmark).usable
    found = files.read_npz(os.path.join(self._workdir, 'search', benchmark, 'queries.npz'))
    nearest = self._anchor.rows(found['anchor_nearest'][usable])
    norm = lambda vectors: np.linalg.norm(vectors.astype(np.float64), axis=1)
    return thresholds / (norm(queries) * norm(nearest))

  def check(self, late: Iterable[str]) -> dict[str, dict]:
    """Checks by brute force, on a sample of the queries, that splits have the anchor's similarity gap.

    Returns for each aligned one of them what splits.check_aligned says of it.
    """
    config = self._config
    aligned = [split for split in late if config.splits[split].rule in layout.ALIGNED]
    exact = config.search.backend == 'exact'
    if not aligned or not exact or not config.prune.check_queries:
      none = {'checked': 0} | ({} if exact else {'kind': 'not exact: ScaNN may have missed rows'})
      return {split: {name: none for name in config.splits[split].benchmarks} for split in aligned}
    promises = {split: self._promise(split) for split in aligned}
    wanted = np.zeros(self._base_size, bool)
    for promise in promises.values():
      wanted[promise.rows] = True
    def blocks(vectors, rows, first):  # rows of the base set, of vectors whose row 0 is its row `first`
      for start in range(0, len(rows), splits.CHECK_ROWS):
        some = rows[start:start + splits.CHECK_ROWS]
        yield some, vectors.rows(some - first)
    size = len(self._pool)
    anchor = size + self._anchor_rows
    return splits.check_aligned(
        promises, {name: self.queries(name)[0] for split in aligned for name in config.splits[split].benchmarks},
        itertools.chain(blocks(self._pool, np.flatnonzero(wanted[:size]), 0), blocks(self._anchor, anchor, size)),
        (vectors for _, vectors in blocks(self._anchor, anchor, size)),
        sample=config.prune.check_queries, tolerance=self.columns.tolerance)

  def _promise(self, split: str) -> splits.Promise:
    config, block = self._config, self._config.splits[split]
    seed = layout.seeds(config, split)[0]
    k = block.k if block.rule == 'k_aligned' else 0
    rows = np.load(layout.split_rows(config, self._workdir, split, seed), mmap_mode='r')  # of all splits at once
    rows = rows[:np.searchsorted(rows, len(self._pool))] if k else rows
    slack = _slack(block, products.read_sidecar(self._workdir, layout.rows_name(config, split, seed))['counts'])
    return splits.Promise(tuple(block.benchmarks), rows, appends_anchor(config, split),
                          -math.inf if slack is None else slack, k)


def _slack(block: ConfigDict, found: dict) -> float | None:
  """Returns an aligned split's slack as its rule reported it; rows of an older version do not say it: its own."""
  return found.get('slack', block.slack)


def _refuse(split: str, checks: dict[str, dict]) -> None:
  for benchmark, figures in checks.items():
    if figures.get('failures'):
      raise InputError(
          f'{split} is not aligned to {benchmark}: {figures["failures"]} of {figures["checked"]} checked queries '
          f'have nearer neighbours than in the anchor, for example {figures["first_failures"][0]}. The search is '
          'not of these embeddings: --redo=search.')


def _say(config: ConfigDict, workdir: str) -> None:
  """Says in one line a split how large it is."""
  for split in config.splits:
    about = files.read_json(os.path.join(workdir, 'splits', split, 'split.json'))
    share = about['dropped'] / max(about['candidates'], 1)
    checks = sum(check.get('checked', 0) for check in about['checks'].values())
    if any(draw.get('no_matched_control') for draw in about['draws'].values()):
      lacking = max(draw['without_full_cell_donor'] for draw in about['draws'].values())
      logging.warning('%s: no matched control exists, as %.0f %% of the rows that %s removes have no donor like '
                      'them; it holds random rows instead.', split,
                      100 * lacking, config.splits[split].to)
    repeats = max(draw.get('repeats', 0) for draw in about['draws'].values())
    planted = about.get('planted_rows', 0)  # a split.json of an older version has none
    logging.info('split %s: %s pool rows%s (%.1f %% dropped) and %s anchor rows%s%s.', split,
                 f'{about["pool_rows"]:,}', f', {repeats:,} of them repeats' if repeats else '', 100 * share,
                 f'{about["anchor_rows"]:,}',
                 f', and {planted:,} COPIES OF TEST IMAGES, planted on purpose' if planted else '',
                 f'; gap checked on {checks} queries' if checks else '')
    if not about['pool_rows'] + about['anchor_rows'] + planted:
      logging.warning('split %s holds no row: nothing can be trained on it.', split)
