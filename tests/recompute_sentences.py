"""What the sentences of a report's page must say: (words with # for numbers, expected values).

Imports nothing of clip_jax.

Used by tests/recompute_page.py.
"""

from collections.abc import Iterator
import re

import numpy as np
import recompute_formulas as formulas
import recompute_pool_tables as pool
from recompute_rows import Numbers, interval, percent, rests, right
import recompute_tables as main
from recompute_work import Between, Table, Work


def of_comparison(work: Work, tables: dict[str, Table], split: str, benchmark: str) -> Iterator:
  """Sentences about one aligned split on its benchmark."""
  found = {row['what']: row for row in tables[f'comparison_{split}_{benchmark}'].rows}
  own = main.differences(work, split, benchmark)
  against = own['against_control']
  images = work.aligned_queries(benchmark, split)
  family = sum(
    row['p_holm'] is not None for t in tables.values() for row in t.rows if 'p_holm' in row
  )
  minus = lambda x: None if x is None else -100 * x
  yield f'On the # aligned queries of {benchmark}', [int(images.sum())]
  lost = [minus(against.value), minus(against.high), minus(against.low)]
  gains = [None if x is None else -x for x in lost]
  yield 'costs # points [#, #] against the', lost
  for end in (', range of two seeds]', '; this checkpoint]'):
    yield f'costs # points [#, #{end}', lost
    yield f'gains # points [#, #{end}', [gains[0], gains[2], gains[1]]
  yield 'costs # points [unknown, no interval', lost[:1]
  yield 'gains # points [#, #] against the', [gains[0], gains[2], gains[1]]
  for other, names in (
    (main.base_of(work), ('base',)),
    (work.control(split), ('matched', 'random', 'matched control', 'random control')),
  ):
    if lead := main.lead(work, split, benchmark, other):
      for name in names:
        words = f'{name} is not shown to be better than anchor_only (# points, '
        yield f'{words}# to #)', [percent(x) for x in (lead.value, lead.low, lead.high)]
        yield f'{words}no interval', [percent(lead.value)]
  yield from shares(work, found.get('E_control'), split, benchmark)
  yield from donors(work, split)
  yield from imbalances(work, split)
  yield (
    'differences from # to # points are consistent',
    [
      percent(against.low),
      percent(against.high),
    ],
  )
  yield 'p = # (Holm, # test', [found['against_control']['p_holm'], family]
  yield 'p < # (Holm, # test', [found['against_control']['p_holm'], family]
  yield 'p = # (equivalence; Holm, # test', [found['against_control']['p_no_loss_holm'], family]
  yield 'p < # (equivalence; Holm, # test', [found['against_control']['p_no_loss_holm'], family]
  if against.error:
    yield 'detectable difference: # points', [percent(formulas.detectable(against))]
    yield '90 % interval [#, #]', [percent(x) for x in against.at(0.9)]
  points = percent(main.margin(against.images))
  yield 'A loss or gain of # points or more', [points]
  yield 'inside \u00b1# points', [points]
  yield 'equivalence margin, \u00b1# points', [points]
  hit, unhit = main.hit_and_unhit(work, split, benchmark)
  weights = formulas.class_weights(hit, unhit, work.labels(benchmark))
  used = [int((w > 0).sum()) for w in weights]
  yield 'Not estimable: # hit and # unhit queries in classes', used
  yield 'Loss on the # queries that lost a neighbour', [int(hit.sum())]
  yield 'minus loss on the # queries that did not', [int(unhit.sum())]
  yield 'Of these, # count, whose class', [sum(used)]


def shares(work: Work, row: dict | None, split: str, benchmark: str) -> Iterator:
  """The part of the control's lead that the removal takes away."""
  if row and row['value'] is not None:
    lead = main.lead(work, split, benchmark, work.control(split))
    ends = [percent(row[name]) for name in ('value', 'low', 'high')]
    for end in ('', '; range of two seeds', '; this checkpoint'):
      yield f'takes away # % [#, #{end}] of the # points by which', [*ends, percent(lead.value)]
    yield 'the interval holds # %', [50]


VARIABLES = {
  'anchor_class': 'nearest anchor class',
  'anchor_class_similarity': 'closeness to the nearest anchor class',
  'caption_names_class': 'whether the caption names the class',
  'caption_length': 'caption length',
  'image_pixels': 'image size',
  'domain': 'domain',
}


def imbalances(work: Work, split: str) -> Iterator:
  """The three largest differences over the draws of a matched control, and how many more."""
  control = work.control(split, is_trained=False)
  if not control or work.settings(control)['rule'] != 'matched':
    return
  draws = [work.balance(split, control, draw) for draw in range(len(work.about(control)['draws']))]
  sizes = {name: max(abs(found[name]) for found in draws) for name in draws[0]}
  large = sorted((name for name in sizes if sizes[name] >= 0.1), key=lambda name: -sizes[name])
  for name in sorted(large[:3], key=lambda name: -len(VARIABLES[name])):  # one ends as another
    yield f'{VARIABLES[name]} (#)', [sizes[name]]
    yield f'{VARIABLES[name]} (standardised difference #)', [sizes[name]]
  yield 'and # more (table', [len(large) - 3]


def donors(work: Work, split: str) -> Iterator:
  control = work.control(split, is_trained=False)
  if not control or work.settings(control)['rule'] != 'matched':
    return
  share, random = percent(work.donors(split)), work.random_donors(split)
  random = Between(100 * random[0], 100 * random[1])
  words = 'of the removed rows have no'
  yield (
    f'# % {words} otherwise alike row, where 20 % are accepted and * leaves # %',
    [share, random],
  )
  yield (
    f'# % {words} row that is alike in every variable (of as many random rows: # %)',
    [
      share,
      random,
    ],
  )
  alike = f'# % {words} otherwise alike row that could be removed in their place'
  yield f'{alike} (of as many random rows: # %)', [share, random]


def what_of(cell: str, control: str) -> str:
  """The row of comparison_*.csv that a row of the page shows, from its first cell."""
  starts = {
    'against the in-distribution': 'placebo',
    f'against {control}': 'against_control',
    'against ': 'against_base',
    'E:': 'E',
    'E\u2032:': 'E_control',
    'queries that lost': 'hit_minus_unhit',
    'change in log-odds': 'dose_slope',
  }
  return next((what for start, what in starts.items() if cell.startswith(start)), '')


def comparison_row(work: Work, pair: tuple[str, str], row: dict) -> Iterator:
  """Estimate, what it rests on, and the parts of an explained share."""
  if row['value'] is None:
    return
  what = row['what']
  scale = (lambda x: x / 10) if what == 'dose_slope' else percent
  ends = interval(row, scale=scale)
  yield '# [#, #] log-odds' if what == 'dose_slope' else '# [#, #] points', ends
  yield '# (seeds: # to #) points', ends
  if row['low'] is None:
    yield '# points', ends[:1]
  if what in ('E', 'E_control'):
    other = main.base_of(work) if what == 'E' else work.control(pair[0])
    lead = main.lead(work, *pair, other)
    yield '# % [#, #]', ends
    yield '# of # points over anchor only', [ends[0] * lead.value, percent(lead.value)]
    yield '# % of the lead', [ends[0]]
  yield from of_rests(row)


def of_rests(row: dict) -> Iterator:
  counts = rests(row, with_df=False)
  where = ' in # groups' if len(counts) == 3 else ', ungrouped'
  if row['df'] is not None:
    yield f'# seeds, # images{where}, # df', rests(row)
  yield f'# seeds, # images{where}', counts


def of_bootstrap(tables: dict[str, Table], split: str, benchmark: str) -> Iterator:
  found = {row['what']: row for row in tables[f'comparison_{split}_{benchmark}'].rows}
  if row := found.get('against_control_bootstrap'):
    yield 'the variance formula: # [#, #] points', interval(row)
    yield from of_rests(row | {'df': None})
  tests = sum(r.get('p_holm') is not None for t in tables.values() for r in t.rows)
  yield 'Confirmatory family: # test', [tests]


def of_heads(work: Work, block, tables: dict[str, Table], split: str) -> Iterator:
  """Numbers in the heads of tables, and under headings of splits."""
  for name in work.splits:
    low, high = work.settings(name).get('queries', (0.0, 1.0))
    if high - low < 1 and re.search(rf'\b{name}\b', block.text):
      yield '(# % of the query groups count)', [100 * (high - low)]
  if block.kind == 'head' and block.table in tables and block.table.startswith('accuracy'):
    table = tables[block.table]
    if table.keys[0] == 'split':
      for row in table.rows[: len(work.benchmarks)]:
        for words in (
          'mean of # seeds',
          '# seed: interval of this checkpoint',
          'mean, range of # seeds',
        ):
          yield f'{row["benchmark"]} # queries {words}', [row['images'], row['seeds']]
  if block.kind == 'head':
    if block.table == 'few_shot' and 'few_shot' in tables:
      shots = sorted({row['shots'] for row in tables['few_shot'].rows})
      yield ' | '.join(['# training images of each class'] * len(shots)), shots
    yield '| # % | # % | # % | # %', [90, 75, 50, 25]
    slacks = (-0.05, -0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05)
    yield 'slack | ' + ' | '.join('#' * 9), list(slacks)
    yield '| # % | median | # %', [5, 95]
  for benchmark in work.benchmarks:
    near = work.excess_of_queries(benchmark)[work.usable(benchmark)] > 0
    words = '# of # queries (# %, a count) have a pool image nearer'
    if f'similarity_{benchmark}' == block.figure:
      yield words, [int(near.sum()), len(near), 100 * near.mean()]
  if name := work.config['prune'].get('preview'):
    yield f'on # frozen features of the embedder {name}', [work.vectors('pool', name).shape[1]]
  if split:
    meta = work.config['pool']['domain_column']
    for row in tables[f'removed_by_domain_{split}'].rows if meta else ():
      yield f"# % of domain '{row['what']}' is removed", [100 * row['count'] / row['total']]


def marked_runs(work: Work, split: str, benchmark: str) -> list[str]:
  """Runs behind an answer that are not converged."""
  names = (main.base_of(work), work.with_rule('anchor'), split, work.control(split))
  return [f'{n}/seed{k}' for n in names if n for k in work.seeds(n) if main.mark(work, n, k)]


def of_picture(work: Work, section: str, split: str, benchmark: str, query: str, key: str):
  """The number under a picture: excess of a pool row, or similarity to the query."""
  for dataset in ('pool', 'anchor'):
    if key in work.row_of(dataset):
      row = work.row_of(dataset)[key]
      break
  else:
    return None
  if section == 'removed' and dataset == 'pool' and split:
    value = float(work.order(split)[row])
    return -value if work.settings(split)['rule'] == 'far' else value
  if section == 'neighbours' and query in work.row_of(benchmark):
    mine = work.vectors(benchmark)[work.row_of(benchmark)[query]]
    return float(mine @ work.vectors(dataset)[row])
  return None


def of_removed(work: Work, split: str) -> Iterator:
  gone, total = int(work.removed(split).sum()), int(work.candidates.sum())
  yield '# of # candidates are removed (# %)', [gone, total, 100 * gone / total]
  yield 'More than half of the candidates are dropped: # of #', [gone, total]
  sample = [min(2000, gone), min(2000, int(work.pool_rows(split).sum()))]
  yield '# removed and # kept captions were compared', sample
  if (block := work.settings(split))['rule'] in ('near', 'far'):
    order = work.order(split)[work.pool_rows(split)].max()
    yield 'The threshold is a similarity of #', [order if block['rule'] == 'near' else -order]
    return
  for benchmark in work.settings(split)['benchmarks']:
    images = work.aligned_queries(benchmark, split) & work.usable(benchmark)
    q, hit = int(images.sum()), int((main.hit_and_unhit(work, split, benchmark)[0] & images).sum())
    leaks = int((pool.leaked(work, benchmark) & images).sum())
    start = f'{benchmark}: # of # aligned queries (# %) lose'
    yield start, [hit, q, 100 * hit / q]
    yield start.replace('aligned ', ''), [hit, q, 100 * hit / q]
    yield '# queries (# %) already have a near-duplicate', [leaks, 100 * leaks / q]
    yield f'for each of # queries of {benchmark}', [min(q, work.config['prune']['check_queries'])]
    held = int((work.usable(benchmark) & ~images).sum())
    if held:
      went = main.gone(work, split, benchmark)
      yield (
        f'{benchmark}: # queries are aligned, # are held back. # candidates are nearer',
        [
          q,
          held,
          went['rows'],
        ],
      )
      yield (
        '; # of them (# %) are removed all the same',
        [
          went['rows_removed'],
          percent(went['share_removed']),
        ],
      )
  yield from donors(work, split)
  control = work.control(split, is_trained=False)
  if control and work.settings(control)['rule'] == 'matched':
    drawn = int((work.removed(control) & ~work.removed(split)).sum())
    yield (
      f'The control {control} removes # other rows in place of the # removed ones',
      [drawn, gone],
    )
    yield '; # have none even if some variables may differ', [gone - drawn]


def of_pool(work: Work, tables: dict[str, Table]) -> Iterator:
  """Sentences on the pool, the index and the duplicates."""
  total, usable = int(work.candidates.sum()), int(work.usable('pool').sum())
  yield 'Of # candidates. An aligned split', [total]
  exceeding = [work.excess(b)[work.usable('pool')] > 0 for b in work.benchmarks]
  yield (
    'all # (row, benchmark) pairs over a threshold, of # candidates',
    [
      int(sum(e.sum() for e in exceeding)),
      total,
    ],
  )
  marked = usable - total
  yield (
    'De-duplication marked # of # usable pool rows (# %)',
    [marked, usable, 100 * marked / usable],
  )
  centers = work.path / 'dedup' / 'centers.npy'
  if centers.exists():
    values = [1 - work.config['dedup']['threshold'], len(np.load(centers))]
    yield ': similarity over # within one of # clusters', values
  yield 'has a similarity of # or more to any query', [pool.similarity_of_duplicates(work)]
  yield 'similarity \u2265 #', [pool.similarity_of_duplicates(work)]


def of_accuracy(work: Work, table: Table) -> Iterator:
  seeds = [row['seeds'] for row in table.rows]
  yield 'Intervals rest on # seeds', seeds[:1]
  yield 'Intervals rest on # to # seeds', [min(seeds), max(seeds)]
  for benchmark in work.benchmarks:
    mine = [row for row in table.rows if row['benchmark'] == benchmark]
    one = mine[0]
    df = [row['df'] for row in mine if row['df'] is not None]
    counts = [one['images']] + ([one['groups']] if one['groups'] != one['images'] else [])
    where = ' in # groups' if len(counts) > 1 else ', ungrouped'
    if df:
      yield f'{benchmark}: # images{where}, # to # df', [*counts, min(df), max(df)]
      yield f'{benchmark}: # images{where}, # df', [*counts, df[0]]
  yield from of_groups(work)


def of_groups(work: Work) -> Iterator:
  for benchmark in work.benchmarks:
    images, groups = len(work.groups(benchmark)), len(set(work.groups(benchmark).tolist()))
    sizes = np.unique(work.groups(benchmark), return_counts=True)[1]
    df = formulas.kish(sizes) - 1
    # Comparisons of aligned queries alone may have too few groups where the benchmark has enough.
    for split, name in work.aligned() if groups >= 12 else ():
      of_aligned = work.groups(benchmark)[work.aligned_queries(benchmark, split)]
      if name == benchmark and 0 < len(set(of_aligned.tolist())) < 12:
        yield f'{benchmark}: # groups', [len(set(of_aligned.tolist()))]
    yield f'{benchmark} # images in # groups # df', [images, groups, df]
    yield f'{benchmark} # images in # groups', [images, groups]
    yield f'{benchmark}: # groups', [groups]
    yield f'{benchmark} # images, ungrouped', [images]
    yield f'{benchmark}: # images, ungrouped', [images]
    yield f'{benchmark}: # images in # groups', [images, groups]


def of_axes(work: Work) -> Iterator:
  """`val (classes of r): 200 images`, of which there are fewer than of val."""
  reference = work.config['report']['reference']
  for benchmark in work.benchmarks if reference in work.benchmarks else ():
    for split in (s for s in work.splits if work.seeds(s) and benchmark != reference):
      scorings = main.plane_scorings(work, split, benchmark, reference)
      words = {reference: f' (classes of {benchmark})', benchmark: ' (its ImageNet classes)'}
      for name, scoring in scorings.items():
        if scoring:
          groups = work.scored(split, name, scoring)[1]
          images, units = len(groups), len(set(groups.tolist()))
          start = f'{name}{words[name]}: # images'
          yield f'{start} in # groups', [images, units]
          yield f'{start}, ungrouped', [images]


def of_stages(work: Work) -> Iterator:
  """`train 26 of 26 runs`, and so on."""
  train = work.config['train']
  blocks = [work.settings(s) for s in work.splits if not train['only'] or s in train['only']]
  planned = sum(len(block.get('seeds') or train['seeds']) for block in blocks)
  runs = sum(len(work.seeds(s)) for s in work.splits)
  counts = {
    'ingest # of # datasets': 2 + len(work.benchmarks),
    'embed # of # datasets': 2 + len(work.benchmarks),
    'search # of # benchmarks': len(work.benchmarks),
    'prune # of # splits': len(work.splits),
  }
  for words, count in counts.items():
    yield words, [count, count]
  yield 'train # of # runs', [runs, planned]
  yield 'evaluate # of # results', [n * len(work.benchmarks) for n in (runs, planned)]


def of_marks(work: Work) -> Iterator:
  for split in work.splits:
    for seed in work.seeds(split):
      reason = main.mark(work, split, seed)
      if reason:
        words = re.sub(r'\d+(\.\d+)?', '#', reason)
        values = [float(m.group()) for m in re.finditer(r'\d+(\.\d+)?', reason)]
        yield f'{split}/seed{seed}: {words}', values


def of_summary(work: Work, tables: dict[str, Table]) -> Iterator:
  """Beginnings of lines of summary.txt, and the numbers after them."""
  found: dict[tuple, dict[str, dict]] = {}
  for row in tables['held_back'].rows if 'held_back' in tables else ():
    key = row['split'], row['benchmark'], row['control']
    found.setdefault(key, {})[row['what']] = row
  for (split, benchmark, control), rows_of in found.items():
    values = []
    for row in rows_of.values():
      is_count = row['value'] is None and 'right_pruned' in row
      values += right(row) if is_count else interval(row)
    yield f'{split} on {benchmark}, against {control}:', values
  for name, table in tables.items():
    if name.startswith('accuracy') and table.keys[0] == 'split':
      lines: dict[str, Numbers] = {}
      for row in table.rows:
        if row['without_leaked'] == 'False':
          lines.setdefault(row['split'], []).extend(interval(row, ('accuracy', 'low', 'high')))
      for split, values in lines.items():
        yield f'{split} (random rows) ', values
        yield f'{split} ', values


# phrases whose numbers are fixed words of the page, not results
FIXED = [
  r'recall@\d+',
  r'^Brackets: 95 % interval .*',
  r'; 1 seed\]',
  r'\d+ % (?=interval|Wilson|prediction)',
  r'(?<=Bars: )95 %',
  r'(?<=Brackets: )95 %',
  r'Fewer than \d+ (groups|queries)',
  r'fewer than \d+ (groups|queries)',
  r'can cover less than 93 %',
  r'at most 1\.',
  r'power 80 %',
  r'each needs 50',
  r'within \u00b10\.1',
  r'within \u00b12 points',
  r'where 20 % are accepted',
  r'minus 0\.02',
  r'for every 0\.1 by which',
  r'per 0\.1 of lost',
  r'rounded to 0\.001',
  r'usually 0\b',
  r'slack 0\b',
  r'top 20,000 ',
  r'the 20,000 nearest rows of a query in each chunk of 1,000,000 rows',
  r'proportions \(0 to 1\)',
  r'ICLR 2024',
  r'2008\)',
  r'contains 1 are',
  r'Marks: slack 0',
  r'float16|float32|float64|seed \d+|seed\d+',
]
