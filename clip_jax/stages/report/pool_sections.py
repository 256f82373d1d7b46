"""The report's sections on the pool alone: galleries, similarities, duplicates, rule sizes.

In: results of the search and of de-duplication. These sections need no split; the report of a
search without training has no others.
"""

import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.types import Array
from clip_jax.evaluation import statistics
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.reporting import benchmark_overlap, inventory, page, sections, tables
from clip_jax.reporting.page import Text
from clip_jax.stages.report import leaks
from clip_jax.stages.report.facts import Facts
from clip_jax.stages.report.panels import looks


def sentence(facts: Facts) -> str:
  """Returns the answer of a config without splits: the share of each benchmark in the pool."""
  return benchmark_overlap.sentence(
    _rates(facts), blocks.duplicate_similarity(facts.config), _drops(facts), _candidates(facts)
  ) + benchmark_overlap.not_searched(*leaks.not_searched(facts))


def summary_lines(facts: Facts) -> list[list[str]]:
  """Returns lines of cells: each benchmark's duplicates, and the rows alignment would drop."""
  dropped = {drop['name']: drop['at_zero'] for drop in _drops(facts)}
  cell = lambda n: (
    '-' if n is None else f'{n:,} rows, {tables.share(n / max(_candidates(facts), 1))}'
  )
  head = ['Benchmark', 'queries with a duplicate', *(['alignment would drop'] if dropped else [])]
  lines = [
    [
      rate['benchmark'],
      tables.share_text(rate['pool']),
      *([cell(dropped.get(rate['benchmark']))] if dropped else []),
    ]
    for rate in _rates(facts)
    if rate['pool'] is not None
  ]
  return [head, *lines] if lines else []


def neighbours(facts: Facts) -> list:
  """Returns galleries of queries beside their nearest neighbours."""
  config, searched, pictures = facts.config, facts.query_results, facts.pictures
  if not searched:
    return [facts.missing('The pool is not searched yet.', 'search')]
  # Open galleries: the splits' own benchmarks, or all without splits. The others are collapsed.
  about = {b for name in config.splits for b in config.splits[name].benchmarks} or set(searched)
  shown: list = []
  for b in sorted(searched, key=lambda b: b not in about):
    if pictures.has(POOL, b):
      drawn = pictures.neighbours(b, searched[b])
      shown.append(drawn if b in about else page.Details(b, (drawn,)))
  has_anchor = blocks.has_anchor(config)
  if shown:
    point = (
      'Framed pool images are nearer to the query than any anchor image. Point'
      if has_anchor
      else 'Point'
    )
    shown.insert(
      0, Text(f'{point} at an image to see its caption; click on it to enlarge it.', 'muted')
    )
  shown += [Text(f'{name}: {why}', 'warning') for name, why in pictures.lost.items()]
  without = pictures.missing_images_sentence(POOL, *([ANCHOR] if has_anchor else []), *searched)
  if without:
    shown.append(Text(without))
  late = [b for b in config.benchmarks if b not in searched]
  if late:
    shown.append(facts.missing(f'Not searched yet: {progress.join_names(late)}.', 'search'))
  return shown


def similarity(facts: Facts) -> list:
  """Returns histograms and quantiles of nearest-neighbour similarity."""
  has_anchor = blocks.has_anchor(facts.config)
  shown = sections.histogram_blocks(
    [
      {
        'name': b,
        'pool': result.pool_similarity[:, 0],
        'anchor': result.anchor_similarity if has_anchor else None,
      }
      for b, result in facts.query_results.items()
    ]
  )
  return shown or [facts.missing('The pool is not searched yet.', 'search')]


def rule_sizes(facts: Facts) -> list:
  """Returns the number of rows that gap-aligned, near- and far-pruning would drop."""
  sizes = facts.sizes
  if sizes is None:
    return [facts.missing('The search counts the rows that each rule would remove.', 'search')]
  if sizes.has_excess:
    truncated = {b: workdir.truncation(facts.x, b) for b in facts.config.benchmarks}
    shown = [
      *benchmark_overlap.slack_blocks(sizes.edges, _drops(facts), _candidates(facts)),
      *benchmark_overlap.paper_compat_blocks(
        [{'benchmark': b, **counts} for b, counts in truncated.items() if counts],
        _candidates(facts),
      ),
    ]
  else:
    shown = [
      Text(
        'Without an anchor there is no similarity gap to align to, so gap-aligned pruning has no '
        'size here. Set config.anchor to get it.'
      )
    ]
  over = [{**line, 'over': counts} for line, counts in _lines(facts, sizes.similarity_over)]
  return shown + benchmark_overlap.size_blocks(sizes.edges, over, _candidates(facts), looks())


def duplicates(facts: Facts) -> list:
  """Returns duplicate rates of the queries, and the results of de-duplication."""
  dedup, counts = facts.config.dedup, facts.counts.get('dedup/keep')
  marked = (
    {**counts, **{key: dedup[key] for key in ('threshold', 'survivor', 'embedder')}}
    if dedup.enabled and counts is not None
    else None
  )
  rates = [{**rate, **_exact(facts, rate['benchmark'])} for rate in _rates(facts)]
  shown = [
    *benchmark_overlap.rate_blocks(rates, blocks.duplicate_similarity(facts.config)),
    *leaks.pairs(facts),
    *inventory.dedup_blocks(marked, _planted(facts), workdir.dedup_audit(facts.x)),
  ]
  return shown or [facts.missing('De-duplication and the search find duplicates.', 'search')]


def _planted(facts: Facts) -> list[dict]:
  """Returns the recall of de-duplication for copies planted in the pool, by kind.

  [] if the pool's index has no columns duplicate_of and duplicate_kind.
  """
  x, columns = facts.x, {'duplicate_of', 'duplicate_kind'}
  if not (
    columns <= set(x.config.pool.columns)
    and workdir.is_ingested(x, POOL)
    and 'dedup/keep' in facts.counts
  ):
    return []
  source, keep = workdir.source(x, POOL), files.read_npy(workdir.keep_path(x))
  row = {key: i for i, key in enumerate(source.column('key'))}
  is_marked: dict[str, list[bool]] = {}
  for i, (kind, original) in enumerate(
    zip(source.column('duplicate_kind'), source.column('duplicate_of'))
  ):
    if kind is not None and original in row:
      is_marked.setdefault(str(kind), []).append(not (keep[i] and keep[row[original]]))
  recall = {kind: statistics.image_interval(np.array(marks)) for kind, marks in is_marked.items()}
  return [
    {
      'kind': kind,
      'planted': len(marks),
      'found': sum(marks),
      'recall': recall[kind].value,
      'low': recall[kind].low,
      'high': recall[kind].high,
    }
    for kind, marks in sorted(is_marked.items())
  ]


def _rates(facts: Facts) -> list[dict]:
  """Returns each searched benchmark's usable queries and duplicate rates in pool and anchor.

  Wilson's interval over queries, not groups: whether an image has a copy depends on that image.
  """
  usable = {
    b: np.isfinite(result.pool_similarity[:, 0]) for b, result in facts.query_results.items()
  }
  shares = {
    (b, dataset): statistics.image_interval(near[usable[b]])
    for (b, dataset), near in facts.near.items()
    if usable[b].any()
  }
  return [
    {
      'benchmark': b,
      'queries': int(mask.sum()),
      POOL: shares.get((b, POOL)),
      ANCHOR: shares.get((b, ANCHOR)),
    }
    for b, mask in usable.items()
  ]


def _exact(facts: Facts, benchmark: str) -> dict[str, int | None]:
  """Returns the number of queries with an exact duplicate in pool and anchor.

  Exact: equal bytes or decoded pixels; in a pool without images, equal stored vectors.
  """
  known = leaks.lists(facts).get(benchmark)
  return {
    'exact_pool': known['exact']['queries'] if known else None,
    'exact_anchor': facts.pictures.exact_duplicates(
      benchmark,
      ANCHOR,
      facts.near.get((benchmark, ANCHOR)),
      facts.query_results[benchmark].nearest(ANCHOR)[1],
    ),
  }


def _candidates(facts: Facts) -> int:
  return int(facts.sizes.candidates) if facts.sizes else 0


def _lines(facts: Facts, counts: Array) -> list[tuple[dict, Array]]:  # [G + 1, ...]
  """Returns (line, counts) of each benchmark, and of all together if there are several."""
  assert facts.sizes is not None
  names = facts.sizes.benchmarks.tolist()
  lines = [{'name': name, 'together': False} for name in names]
  if len(names) > 1:
    lines.append({'name': benchmark_overlap.TOGETHER, 'together': True})
  return list(zip(lines, counts))


def _drops(facts: Facts) -> list[dict]:
  """Returns the rows that alignment would drop at every slack; [] without an anchor."""
  sizes = facts.sizes
  if sizes is None or not sizes.has_excess:
    return []
  return [
    {**line, 'rows': rows, 'at_zero': int(zero)}
    for (line, rows), zero in zip(_lines(facts, sizes.excess_over), sizes.excess_zero)
  ]
