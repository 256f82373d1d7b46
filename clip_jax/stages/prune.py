"""Stage prune: writes every split as rows of the base set.

In: search columns, dedup marks, embeddings (for rows that float32 cannot decide).
Out: WORKDIR/splits/<split>/rows.npy (or rows-seed<k>.npy), split.json, for aligned splits
queries-<benchmark>.npz (the number of removed rows near each query), for splits that hold queries
back held-back-<benchmark>.npz, and the split's exports (stages/export.py).
"""

import dataclasses
import functools
import itertools
import math
import os

from absl import logging
import numpy as np

from clip_jax.core import files, products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import controls, rules, splits
from clip_jax.similarity import decide
from clip_jax.stages import domains, export, prune_clusters, prune_held_back
from clip_jax.stages.prune_columns import ROWS_AT_ONCE, PoolColumns

# Keys of a split that name rows or counts: keep() passes what they name to the rule.
_SUPPLIED = (
  'benchmarks',
  'queries',
  'size',
  'size_of',
  'to',
  'reference',
  'column',
  'values',
  'words',
  'of',
  'seed',
  'file',
)
NEAR_MARGIN = 0.02  # a query is "unhit" if no removed row is over its threshold - NEAR_MARGIN


def write_rows(x: Experiment, todo: list[Product]) -> Made:
  """Writes the rows of splits; `todo` lists each split after its dependencies."""
  names = dict.fromkeys(p.subject[0] for p in todo)
  if any(blocks.compares_domains(x.config, split) for split in names):
    # A column was named by the user; what is inferred, or missing, is news.
    is_named = blocks.domain_source(x.config)[0] == 'column'
    say = logging.debug if is_named else logging.info
    say('prune: domain: %s.', domains.words(x) or 'not known')
  for sentence in domains.expected_removal(x, names):
    logging.warning('%s', sentence)
  for product in todo:
    split, seed = product.subject
    base = base_for(x, split)
    kept = base.apply_rule(split, seed)
    if 'standardised_differences' in kept.report and base.caption_names_class is None:
      logging.info(
        'prune: %s is not matched in whether captions name the class, because the classes of the '
        'anchor have no names.',
        split,
      )
    files.write_npy(x.path(product.name + '.npy'), base.rows(split, kept))
    yield product, [product.name + '.npy'], {'pool_rows': len(kept.rows), **kept.report}


def describe(x: Experiment, todo: list[Product]) -> Made:
  """Writes split.json of each split, and the figures of an aligned split's queries."""
  of_bases: dict[Base, list[str]] = {}
  for product in todo:
    of_bases.setdefault(base_for(x, product.subject[0]), []).append(product.subject[0])
  checks = {}
  for base, names in of_bases.items():
    # All splits of an embedder are checked together, in one pass over their vectors.
    checks |= base.check(names)
  for product in todo:
    (split,) = product.subject
    yield product, base_for(x, split).describe(product, checks.get(split, {})), {}


def base_for(x: Experiment, split: str) -> 'Base':
  """Returns the base set with the similarities of a split's embedder; its rows are always the same.

  x: with the main embedder, whose candidates are those of every split.
  """
  main, view = x.cached('base', lambda: Base(x)), x.for_split(split)
  return view.cached('base', lambda: Base(view, main.columns.candidates))


class Base(PoolColumns):
  """The base set: computes splits and their descriptions from the pool's columns."""

  def __init__(self, x: Experiment, candidates: Array | None = None):
    super().__init__(x, candidates)
    self._base = workdir.base_rows(x)
    self._anchor_rows = np.zeros(0, np.int64)
    if self.anchor is not None:
      self._anchor_rows = np.flatnonzero(workdir.embeddings(self.main, blocks.ANCHOR).usable)
    # Size without planted copies.
    self._size = len(self.pool) + (0 if self.anchor is None else len(self.anchor))
    # benchmark -> rows removed by its last split, and their counts for each query
    self._counted: dict[str, tuple[Array, Array]] = {}

  def apply_rule(self, split: str, seed: int) -> rules.Kept:
    """Applies a split's rule and returns the pool rows it keeps."""
    config, block, rule = (
      self.x.config,
      self.x.config.splits[split],
      blocks.rule_of(self.x.config, split),
    )
    read = self.matched_columns if 'anchor_classes' in rule.needs else self.columns
    arguments = {key: block[key] for key in rule.keys if key not in _SUPPLIED}
    about = {}
    if 'benchmarks' in rule.keys:
      arguments['benchmarks'] = blocks.split_targets(config, split)
    if 'levels' in rule.needs:
      arguments['codes'], arguments['names'] = self.levels(block.column, block.reference)
      arguments['values'] = tuple(map(str, block['values']))
    if 'scores' in rule.needs:
      arguments['scores'] = self.numbers(block.column)
    if 'matches' in rule.needs:
      arguments['matches'] = self.captions_with(tuple(map(str, block.words)))
    if 'clusters' in rule.needs:
      arguments['assignment'], arguments['reference'] = self.clusters_of(split)
    if 'count' in rule.needs:
      arguments['count'] = (
        len(self._pool_rows(split, block.size_of, seed))
        if block.size_of
        else rules.count_of(block.size, int(self.columns.candidates.sum()))
      )
    if 'draw' in rule.needs:
      arguments |= {'seed': block.seed, 'draw': seed}
    if 'target' in rule.needs:
      arguments['removed'] = self.removed_rows(
        block.to, blocks.seed_of(config, split, block.to, seed)
      )
    if 'others' in rule.needs:
      arguments['others'] = [self._pool_rows(split, other, seed) for other in block.of]
    if 'file' in rule.needs:
      arguments['rows'], about = export.listed_rows(self.x, split)
    try:
      kept = rule.keep(read, **arguments)
    except ConfigError as error:
      raise ConfigError(f'config.splits.{split}: {error}') from error
    return dataclasses.replace(kept, report=about | kept.report)

  def _pool_rows(self, split: str, other: str, seed: int) -> Array:
    """Returns the pool rows of another split, in the draw that (split, seed) uses."""
    return workdir.pool_rows(self.x, other, blocks.seed_of(self.x.config, split, other, seed))

  def removed_rows(self, split: str, seed: int) -> Array:
    """Returns the candidates that a split drops, sorted."""
    dropped = self.columns.candidates.copy()
    dropped[workdir.pool_rows(self.x, split, seed)] = False
    return np.flatnonzero(dropped)

  def rows(self, split: str, kept: rules.Kept) -> Array:
    """Returns a split's rows of the base set: the kept pool, anchor, then planted rows, sorted."""
    planted = np.zeros(0, np.int64)
    if blocks.holds_planted(self.x.config, split):
      planted = np.flatnonzero(workdir.embeddings(self.x, blocks.PLANTED).usable)
    return splits.base_rows(
      kept.rows,
      len(self.pool),
      self._anchor_rows,
      blocks.appends_anchor(self.x.config, split),
      self._size,
      planted,
    )

  def describe(self, product: Product, checks: dict[str, dict]) -> list[str]:
    """Writes split.json, and the queries' figures of an aligned split; returns the files.

    `checks` is the result of check() for this split. Raises InputError if it is not aligned.
    """
    (split,) = product.subject
    config, block, rule = (
      self.x.config,
      self.x.config.splits[split],
      blocks.rule_of(self.x.config, split),
    )
    paths, draws = [f'{product.name}.json'], {}
    for seed in blocks.row_file_seeds(config, split):
      name = self.x.graph.rows(split, seed).name
      rows = files.read_npy(workdir.rows_path(self.x, split, seed), mmap=True)
      sizes = self._base.sizes(rows)
      counts = products.counts(self.x.workdir, name)
      draws[os.path.basename(name)] = {
        'pool_rows': sizes[blocks.POOL],
        'anchor_rows': sizes.get(blocks.ANCHOR, 0),
        'planted_rows': sizes.get(blocks.PLANTED, 0),
        'hash': splits.rows_hash(rows),
        **{key: value for key, value in counts.items() if key != 'pool_rows'},
      }
    first = next(iter(draws.values()))
    candidates = int(self.columns.candidates.sum())
    parameters = blocks.parameters(config, split)
    if 'file' in parameters:
      parameters['file'] = os.path.basename(block.file)
    about = {
      'rule': block.rule,
      'embedder': self.x.embedder,
      'parameters': parameters,
      'candidates': candidates,
      'pool_size': len(self.pool),
      'pool_rows': first['pool_rows'],
      'anchor_rows': first['anchor_rows'],
      'planted_rows': first['planted_rows'],
      'dropped': candidates - (first['pool_rows'] - first.get('repeats', 0)),
      'append_anchor': blocks.appends_anchor(config, split),
      'seed': block.seed,
      'hash': first['hash'],
      'checks': checks,
      'draws': draws,
    }
    if rule.is_aligned:
      _raise_if_not_aligned(split, checks)
      figures, more = self._aligned(split, first, os.path.dirname(product.name))
      about |= figures
      paths += more
    elif rule.selects:
      dropped = np.zeros(len(self.pool), bool)
      dropped[self.removed_rows(split, blocks.seeds(config, split)[0])] = True
      about |= {
        key: splits.shares(column, self.columns.candidates, dropped)
        for key, column in (('by_class', self.classes), ('by_domain', self.domain))
      }
    if rule.selects or 'anchor_classes' in rule.needs:
      about['domains'] = domains.words(self.x)
    if blocks.holds_back(config, split):
      about['held_back'], more = prune_held_back.figures(
        self.x,
        split,
        self.columns.candidates,
        self.removed_rows(split, blocks.seeds(config, split)[0]),
        os.path.dirname(product.name),
      )
      paths += more
    files.write_json(self.x.path(paths[0]), about)
    return paths

  def _aligned(self, split: str, report: dict, folder: str) -> tuple[dict, list[str]]:
    """Returns the figures of an aligned split and the files written; `report` is its rule's."""
    block, targets = self.x.config.splits[split], blocks.split_targets(self.x.config, split)
    removed = self.removed_rows(split, blocks.seeds(self.x.config, split)[0])
    over, cosine, paths = {}, {}, []
    for name, target in zip(block.benchmarks, targets):
      usable = np.flatnonzero(workdir.embeddings(self.x, name).usable)
      aligned = workdir.queries_in(self.x, target)[usable]
      counts, cosines = self._count_over(name, removed), self._anchor_cosine(name)
      over[name], cosine[name] = counts[aligned, 0], cosines[aligned]
      number = len(workdir.source(self.x, name))
      arrays = {
        'removed_over': np.full(number, -1, np.int64),
        'removed_near': np.full(number, -1, np.int64),
        'anchor_cosine': np.full(number, np.nan),
      }
      for key, values in (
        ('removed_over', counts[:, 0]),
        ('removed_near', counts[:, 1]),
        ('anchor_cosine', cosines),
      ):
        arrays[key][usable] = values
      paths.append(f'{folder}/queries-{name}.npz')
      files.write_npz(self.x.path(paths[-1]), **arrays)
    duplicate = blocks.duplicate_similarity(self.x.config)
    is_kept = self.columns.candidates.copy()
    is_kept[removed] = False
    figures = splits.describe_aligned(
      self.columns,
      np.flatnonzero(is_kept),
      benchmarks=tuple(block.benchmarks),
      dropped_at=self._dropped_at(targets),
      removed_over=over,
      anchor_cosine=cosine,
      duplicate_similarity=duplicate,
      label=self.classes,
      domain=self.domain,
    )
    figures['duplicate_similarity'] = duplicate
    figures['slack'] = report.get('slack', block.slack)
    figures['aligned_dropped'] = report.get('aligned_dropped', figures['dropped_at_slack']['0'])
    for warning in figures['warnings']:
      logging.warning('%s: %s.', split, warning)
    return figures, paths

  @functools.lru_cache  # noqa: B019 (both live as long as the stage)
  def _dropped_at(self, targets: tuple[str, ...]) -> dict[str, int]:
    return splits.dropped_at_slack(self.columns, targets)

  def _count_over(self, benchmark: str, removed: Array) -> Array:
    """Counts the removed rows over, and over or near, each usable query's threshold, [q, 2] int64.

    Starts from the counts of the benchmark's last split, so that only rows in which the two splits
    differ are compared.
    """
    queries, thresholds = workdir.thresholds(self.x, benchmark)
    last, counts = self._counted.get(
      benchmark, (removed[:0], np.zeros((len(queries), 2), np.int64))
    )
    gone, new = (
      np.setdiff1d(*pair, assume_unique=True) for pair in ((last, removed), (removed, last))
    )
    if len(gone) + len(new) > len(removed):
      gone, new, counts = gone[:0], removed, np.zeros_like(counts)
    counts = counts.copy()
    for rows, sign in ((new, 1), (gone, -1)):
      for start in range(0, len(rows), ROWS_AT_ONCE):
        vectors = self.pool.rows(rows[start : start + ROWS_AT_ONCE])
        counts += sign * decide.count_over(vectors, queries, thresholds, margins=(0.0, NEAR_MARGIN))
    self._counted[benchmark] = removed, counts
    return counts

  def _anchor_cosine(self, benchmark: str) -> Array:
    """Returns each usable query's cosine to its nearest anchor image, [q] float64.

    Always by the main embedder, for which the threshold of duplicates holds.
    """
    result, usable = (
      workdir.query_result(self.main, benchmark),
      workdir.embeddings(self.x, benchmark).usable,
    )
    assert result is not None  # the search is done
    return workdir.cosine(
      self.main, benchmark, blocks.ANCHOR, result.anchor_similarity_f64, result.anchor_nearest
    )[usable]

  def check(self, names: list[str]) -> dict[str, dict]:
    """Checks by brute force, for sampled queries, that splits have the anchor's similarity gap.

    Returns the result of splits.check_aligned for each aligned split among the names. Only queries
    that count for a split are checked.
    """
    config = self.x.config
    aligned = [split for split in names if blocks.rule_of(config, split).is_aligned]
    is_exact = config.search.backend == 'exact'
    if not aligned or not is_exact or not config.prune.check_queries:
      none = {'checked': 0} | (
        {} if is_exact else {'kind': 'not exact: ScaNN may have missed rows'}
      )
      return {split: dict.fromkeys(config.splits[split].benchmarks, none) for split in aligned}
    promises = {split: self._promise(split) for split in aligned}
    wanted = np.zeros(self._size, bool)
    for promise in promises.values():
      wanted[promise.rows] = True

    def parts(vectors, rows, first):  # `first`: the row of the base set that vectors[0] belongs to
      for start in range(0, len(rows), splits.CHECK_ROWS):
        block = rows[start : start + splits.CHECK_ROWS]
        yield block, vectors.rows(block - first)

    size = len(self.pool)
    anchor = size + self._anchor_rows
    results = splits.check_aligned(
      promises,
      {
        target: workdir.thresholds(self.x, target)[0]
        for split in aligned
        for target in blocks.split_targets(config, split)
      },
      itertools.chain(
        parts(self.pool, np.flatnonzero(wanted[:size]), 0), parts(self.anchor, anchor, size)
      ),
      (vectors for _, vectors in parts(self.anchor, anchor, size)),
      sample=config.prune.check_queries,
      tolerance=self.columns.tolerance,
    )
    return {
      split: {blocks.benchmark_of(target): figures for target, figures in checks.items()}
      for split, checks in results.items()
    }

  def _promise(self, split: str) -> splits.AlignmentClaim:
    block, seed = self.x.config.splits[split], blocks.seeds(self.x.config, split)[0]
    k = block.k if block.rule == 'k_aligned' else 0
    rows = files.read_npy(workdir.rows_path(self.x, split, seed), mmap=True)  # all splits are held
    rows = rows[: np.searchsorted(rows, len(self.pool))] if k else rows
    slack = products.counts(self.x.workdir, self.x.graph.rows(split, seed).name).get(
      'slack', block.slack
    )
    return splits.AlignmentClaim(
      blocks.split_targets(self.x.config, split),
      rows,
      blocks.appends_anchor(self.x.config, split),
      -math.inf if slack is None else slack,
      k,
    )


def _raise_if_not_aligned(split: str, checks: dict[str, dict]) -> None:
  """Raises InputError if a checked query has a nearer neighbour in the split than in the anchor."""
  for benchmark, figures in checks.items():
    if figures.get('failures'):
      raise InputError(
        f'{split} is not aligned to {benchmark}: {figures["failures"]:,} of {figures["checked"]:,} '
        'checked queries have nearer neighbours than in the anchor, for example '
        f'{figures["first_failures"][0]}. The search results are of other embeddings; run '
        '--redo=search.'
      )


def summarize(x: Experiment, new_products: list[Product]) -> None:
  """Logs the size of each split: all in one line, details in the log file."""
  if not any(product.kind == 'split' for product in new_products):
    return
  sizes = []
  for split in x.config.splits:
    about = workdir.read_json(x, 'splits', split, 'split.json')
    share = about['dropped'] / max(about['candidates'], 1)
    checks = sum(check.get('checked', 0) for check in about['checks'].values())
    if any(draw.get('no_matched_control') for draw in about['draws'].values()):
      logging.warning('%s: %s', split, _without_control(x, split, list(about['draws'].values())))
    repeats = max(draw.get('repeats', 0) for draw in about['draws'].values())
    planted = about['planted_rows']
    logging.debug(
      'split %s%s: %s pool rows%s (%.1f %% dropped) and %s anchor rows%s%s.',
      split,
      x.for_split(split).suffix,
      f'{about["pool_rows"]:,}',
      f', {repeats:,} of them repeats' if repeats else '',
      100 * share,
      f'{about["anchor_rows"]:,}',
      f', and {planted:,} planted COPIES OF TEST IMAGES' if planted else '',
      f'; gap checked on {checks} queries' if checks else '',
    )
    if not about['pool_rows'] + about['anchor_rows'] + planted:
      logging.warning('split %s holds no row, so it cannot be trained on.', split)
    sizes.append(f'{split}{x.for_split(split).suffix} {about["pool_rows"]:,}')
  logging.info('prune: pool rows of the splits: %s.', ', '.join(sizes))


def _without_control(x: Experiment, split: str, draws: list[dict]) -> str:
  """Returns why a matched split holds random rows, and whether its cells are too fine."""
  lacking, by_chance = (
    max(draw[key] for draw in draws)
    for key in ('without_full_cell_donor', 'random_without_full_cell_donor')
  )
  why = (
    f'no matched control can be made, because for {100 * lacking:.0f} % of the rows that '
    f'{x.config.splits[split].to} removes no other row is alike in class, domain, caption and '
    'size. The split holds random rows.'
  )
  if by_chance <= controls.MAX_UNMATCHED:
    return why
  why += (
    f' Of as many random rows, {100 * by_chance:.0f} % have none either: there are too many kinds '
    'of rows for a pool of this size.'
  )
  if blocks.domain_source(x.config)[0] == 'clusters':
    why += ' Fewer domains may help: lower config.prune.domain_clusters.'
  return why


MAKERS = {
  'domains': prune_clusters.write_domains,
  'rows': write_rows,
  'split': describe,
  **export.MAKERS,
}
