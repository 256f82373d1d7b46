"""Plain results -> the report's sections on the pool alone: duplicates, similarities, rule sizes.

These sections need no split and no training. They show how much of each benchmark is in the pool,
and how many rows each rule would drop.
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

import numpy as np

from clip_jax.core import progress
from clip_jax.core.types import Array
from clip_jax.reporting import curves, tables
from clip_jax.reporting.figures import Looks
from clip_jax.reporting.page import Details, Fact, Figure, Figures, Heading, Text
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

QUESTION = (
  'Does the pool contain the benchmark? Accuracy on images that have duplicates or near-duplicates '
  'in the pool may say little about new images. This page shows how similar the pool is to each '
  'benchmark, before any training.'
)
PAPER_DUPLICATES = (
  '3.1 % of ImageNet-Sketch has an exact or near duplicate in LAION and 0.04 % in '
  'ImageNet-Train; 2.67 % of ImageNet-V2 has one in ImageNet-Train and 0.14 % in LAION.'
)
PAPER_REMOVED = (
  'of about 201 million pool items, alignment drops 377,340 for ImageNet-Val, 8,342,783 for '
  'Sketch, 138,852 for A, 5,735,749 for R, 274,325 for V2 and 266,025 for ObjectNet; the union '
  'is about 12.4 million.'
)
TOGETHER = 'all together'  # the name of the line for the union of all benchmarks
SLACKS = (-0.05, -0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.05)
SHARES = (0.9, 0.75, 0.5, 0.25)  # shares of the candidates to keep: columns of the table
SHOWN = 0.001  # figures show thresholds at which this share of candidates is kept, and dropped


def sentence(
  rates: Rows,  # benchmark, pool (an estimate or None)
  similarity: float,
  drops: Rows,  # name, at_zero; () without an anchor
  candidates: int,
) -> str:
  """Returns the answer without splits: duplicates of each benchmark, rows alignment would drop."""
  known = [r for r in rates if r['pool'] is not None]
  if not known:
    return 'No split is trained. The pool is not searched yet.'
  held = progress.join_names(
    [f'{tables.share(r["pool"].value)} of {r["benchmark"]}{_in_words(r["pool"])}' for r in known]
  )
  text = (
    'No split is trained; this is the search of the pool. The pool has a near-duplicate '
    f'(similarity at least {similarity:.4g}) of {held}.'
  )
  if drops and candidates:
    # The last entry is the union of all benchmarks, or the only benchmark.
    *each, last = [(d['name'], d['at_zero']) for d in drops]
    counts = [f'{progress.count_with_noun(n, "row")} for {name}' for name, n in each or [last]]
    together = f', together {tables.number(last[1])} of' if each else ', of'
    text += (
      f' Gap-aligned pruning would drop {progress.join_names(counts)}{together} '
      f'{tables.number(candidates)} candidates ({_share_of(last[1], candidates)}).'
    )
  return text


def not_searched(skipped: int, early: int) -> str:
  """Returns a sentence on the samples that are not in the search; '' if all are."""
  parts = []
  if skipped:
    parts.append(f'{progress.count_with_noun(skipped, "unusable sample")}')
  if early:
    parts.append(f'the rest of {progress.count_with_noun(early, "file")} that could not be read')
  return f' Not searched: {progress.join_names(parts)}, so there may be more.' if parts else ''


def _in_words(e: Any) -> str:
  bounds = tables.share_bounds(e)
  return f' (95 % interval {bounds.strip("[]").replace(", ", " to ")} %)' if bounds else ''


def _share_of(count: int, of: int) -> str:
  return tables.share(count / max(of, 1))


def rate_blocks(
  rates: Rows,  # benchmark, queries, pool, anchor (estimates or None), exact_pool, exact_anchor
  # (counts or None)
  similarity: float,  # a pair is a near-duplicate from this similarity on
) -> list:
  """Returns the share of queries with a duplicate in pool and anchor, with 95 % intervals."""
  if not rates:
    return []
  near, exact = f'similarity \u2265 {similarity:.4g}', 'equal images or vectors'
  heads = {
    'pool': tables.number_cell('near-duplicate in pool', near),
    'exact_pool': tables.number_cell('exact duplicate in pool', exact),
    'anchor': tables.number_cell('near-duplicate in anchor', near),
    'exact_anchor': tables.number_cell('exact duplicate in anchor', exact),
  }
  keys = [key for key in heads if any(r[key] is not None for r in rates)]
  rows = tuple(
    (
      Cell(r['benchmark']),
      tables.number_cell(tables.number(r['queries'])),
      *(_rate(r[key], r['queries']) for key in keys),
    )
    for r in rates
  )
  note = (
    'Near-duplicate: the cosine similarity is at least the threshold. Each embedder needs its '
    'own: set it with --config.prune.duplicate_similarity. Brackets: 95 % Wilson '
    'intervals over queries, in percent, each query on its own (whether an image has a copy '
    'depends on that image, so groups are not used). Exact duplicates are counts, without an '
    'interval.'
  )
  return [
    Table(
      'duplicate_rates',
      'Share of queries with a duplicate',
      (Cell('benchmark'), tables.number_cell('queries'), *(heads[key] for key in keys)),
      rows,
      (note,),
      tuple(_rate_record(r, similarity) for r in rates),
    ),
    Fact(PAPER_DUPLICATES),
  ]


def _rate(rate: Any, queries: int) -> Cell:
  """Returns an estimate with its interval, or a count with its share."""
  if rate is None or not queries:
    return tables.number_cell(tables.NOTHING)
  count = lambda n: f'{tables.number(n)} of {tables.number(queries)}'
  if isinstance(rate, int):
    return tables.number_cell(tables.share(rate / queries), count(rate))
  return tables.number_cell(
    tables.share(rate.value),
    '\n'.join((tables.share_bounds(rate), count(round(rate.value * queries)))).strip(),
  )


def _rate_record(r: Mapping[str, Any], similarity: float) -> dict:
  record = {'benchmark': r['benchmark'], 'queries': r['queries'], 'similarity': similarity}
  for key in ('pool', 'anchor'):
    e = r[key]
    record |= {
      key: e and round(e.value * r['queries']),
      f'{key}_share': e and e.value,
      f'{key}_low': e and e.low,
      f'{key}_high': e and e.high,
      f'exact_{key}': r[f'exact_{key}'],
    }
  return record


def quantile_table(
  entries: Rows,  # name, anchor [Q] or None, pool [Q]: nearest-neighbour similarities
) -> Table:
  """Returns quantiles of the similarity of each benchmark's queries to their nearest image."""
  heads = tables.column_heads('benchmark', 'queries', '5 %', 'median', '95 %', 'maximum')
  records = []
  for e, which in itertools.product(entries, ('pool', 'anchor')):
    values = np.zeros(0) if e[which] is None else e[which][np.isfinite(e[which])].astype(float)
    if len(values):
      quantiles = map(float, np.quantile(values, (0.05, 0.5, 0.95, 1)))
      records.append(
        {
          'benchmark': e['name'],
          'in': which,
          'queries': len(values),
          **dict(zip(('q05', 'median', 'q95', 'max'), quantiles)),
        }
      )
  rows = tuple(
    (
      Cell(r['benchmark'], f'nearest {r["in"]} image'),
      tables.number_cell(tables.number(r['queries'])),
      *(tables.number_cell(tables.similarity(r[q])) for q in ('q05', 'median', 'q95', 'max')),
    )
    for r in records
  )
  note = (
    'Cosine similarities of the stored float16 vectors; quantiles are a count over all queries, '
    'without an interval. Similarities of different embedders are not comparable.'
  )
  caption = 'Quantiles of the similarity of each query to its nearest image'
  return Table('nearest_similarity', caption, heads, rows, (note,), tuple(records))


def slack_blocks(
  slack: Array,  # [m] ascending
  lines: Rows,  # name, rows [m], at_zero, together
  candidates: int,
) -> list:
  """Returns the number of rows that gap-aligned pruning would drop, by slack."""
  last = max(int(np.flatnonzero(line['rows'] > 0)[-1:].sum()) for line in lines)
  high = float(max(0.02, slack[min(last + 1, len(slack) - 1)]))
  whole = np.flatnonzero(np.max([line['rows'] for line in lines], axis=0) >= 0.99 * candidates)
  low = float(min(-0.02, max(-high, slack[whole[-1]] if len(whole) else -high)))
  text = curves.rows_by_slack(
    slack, lines, title='Rows that alignment would remove', limits=(low, high)
  )
  caption = (
    f'Of {tables.number(candidates)} candidates. An aligned split lacks a row if its similarity '
    'to some query exceeds the similarity of that query\u2019s nearest anchor image by more than '
    'the slack. Marks: slack 0.'
  )
  return [
    Heading('Gap-aligned', 'removes rows that are nearer to a query than any anchor image is'),
    Figures((Figure('rows_by_slack', text, caption),)),
    _slack_table(slack, lines, candidates),
    Fact(PAPER_REMOVED),
  ]


def _slack_table(slack: Array, lines: Rows, candidates: int) -> Table:
  heads = tables.column_heads('slack', *map(tables.slack, SLACKS))
  counts = {
    line['name']: [
      int(line['at_zero'] if s == 0 else line['rows'][np.abs(slack - s).argmin()]) for s in SLACKS
    ]
    for line in lines
  }
  rows = tuple(
    (
      Cell(name),
      *(
        tables.number_cell(
          tables.number(n), _share_of(n, candidates), tone='strong' if s == 0 else ''
        )
        for s, n in zip(SLACKS, counts_at_slacks)
      ),
    )
    for name, counts_at_slacks in counts.items()
  )
  records = tuple(
    {'benchmark': name, 'slack': s, 'dropped': n, 'candidates': candidates}
    for name, counts_at_slacks in counts.items()
    for s, n in zip(SLACKS, counts_at_slacks)
  )
  note = (
    'Re-encoded copies of anchor images tie with the threshold up to float16 rounding, so the '
    'count at slack 0 may differ by a few rows with another rounding. It is exact; the other '
    'counts use float32 similarities.'
  )
  return Table(
    'rows_by_slack', 'Rows that alignment would remove, by slack', heads, rows, (note,), records
  )


def size_blocks(
  cut: Array,  # [m] ascending
  lines: Rows,  # name, over [m]: candidates more similar than the cut, together
  candidates: int,
  looks: Looks,
) -> list:
  """Returns the share of rows that near- and far-pruning keep, by similarity threshold."""
  share = [line['over'] / max(candidates, 1) for line in lines]
  seen = np.flatnonzero((np.max(share, 0) > SHOWN) & (np.min(share, 0) < 1 - SHOWN))
  first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, len(cut) - 1)
  limits = float(cut[max(first - 1, 0)]), float(cut[min(last + 1, len(cut) - 1)])
  drawn = tuple(
    Figure(
      f'rows_by_cut_{rule}',
      curves.rows_by_cut(
        cut,
        [{**line, 'kept': part if rule == 'far' else 1 - part} for line, part in zip(lines, share)],
        title=looks[rule][2],
        limits=limits,
      ),
    )
    for rule in ('near', 'far')
  )
  return [
    Heading('Near- and far-pruned', 'by the similarity to the nearest query'),
    Figures(drawn),
    Details('Similarity thresholds by share kept', (_cut_table(cut, lines, candidates),)),
  ]


def _cut_table(cut: Array, lines: Rows, candidates: int) -> Table:
  heads = tables.column_heads('share of candidates kept', *(f'{100 * s:g} %' for s in SHARES))
  words = {
    'near': 'near-pruned: removes rows above the threshold',
    'far': 'far-pruned: removes rows at or below the threshold',
  }
  # near: the lowest cut that keeps enough rows; far: the highest
  cuts = {}
  for line in lines:
    over = line['over'] / max(candidates, 1)
    cuts[line['name'], 'near'] = [float(cut[1 - over >= s].min(initial=1.0)) for s in SHARES]
    cuts[line['name'], 'far'] = [float(cut[over >= s].max(initial=-1.0)) for s in SHARES]
  rows = tuple(
    (Cell(name, words[rule]), *(tables.number_cell(tables.similarity(c)) for c in similarities))
    for (name, rule), similarities in cuts.items()
  )
  records = tuple(
    {'benchmark': name, 'rule': rule, 'keep': s, 'cut': c}
    for (name, rule), similarities in cuts.items()
    for s, c in zip(SHARES, similarities)
  )
  note = (
    'A split computes its exact threshold from the requested size; thresholds in this table are '
    'rounded to 0.001.'
  )
  return Table('cut_by_size', '', heads, rows, (note,), records)


def paper_compat_blocks(
  benchmarks: Rows,  # benchmark, top_k, chunk_rows, over, missed
  candidates: int,
) -> list:
  """Returns the number of rows over a threshold that the published code's top-k would keep."""
  if not benchmarks:
    return []
  text = (
    f'The published code considers only the {tables.number(benchmarks[0]["top_k"])} nearest rows '
    f'of a query in each chunk of {tables.number(benchmarks[0]["chunk_rows"])} rows. '
  )
  if not any(r['missed'] for r in benchmarks):
    total = tables.number(sum(r['over'] for r in benchmarks))
    return [
      Text(
        f'{text}Here it would remove the same rows: all {total} '
        f'(row, benchmark) pairs over a threshold, of {tables.number(candidates)} candidates.'
      )
    ]
  rows = tuple(
    (
      Cell(r['benchmark']),
      tables.number_cell(tables.number(r['over'])),
      tables.number_cell(tables.number(r['missed']), _share_of(r['missed'], r['over'])),
    )
    for r in benchmarks
  )
  counts = progress.join_names(
    [
      f'{tables.number(r["missed"])} of {tables.number(r["over"])} for {r["benchmark"]}'
      for r in benchmarks
      if r['missed']
    ]
  )
  table = Table(
    'paper_compat',
    '',
    tables.column_heads('benchmark', 'rows over a threshold', 'kept by the published truncation'),
    rows,
    (),
    tuple(benchmarks),
  )
  return [
    Text(f'{text}It would keep rows over a threshold: {counts}. The splits here remove them.'),
    Details('Counts by benchmark', (table,)),
  ]
