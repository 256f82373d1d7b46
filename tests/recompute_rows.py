"""What the rows of the tables of a report's page must say. Imports nothing of clip_jax.

Used by tests/recompute_page.py.
"""

from collections import Counter
import json

import recompute_tables as main
from recompute_work import Between, Table, Work, printed, text_of

Numbers = list  # of expected values, in the order of the text; None: a number that is not checked


def percent(value):
  """The value in percent; None stays."""
  if isinstance(value, Between):
    return Between(100 * value.low, 100 * value.high)
  return None if value is None else 100 * value


def interval(
  row: dict, names: tuple[str, ...] = ('value', 'low', 'high'), scale=percent
) -> Numbers:
  """Estimate and bounds, as far as the table has them."""
  return [scale(row[n]) for n in names if row[n] is not None]


def rests(row: dict, with_seeds: bool = True, with_df: bool = True) -> Numbers:
  """`5 seeds, 500 images in 4 groups, 3.1 df`."""
  found = [row['seeds']] if with_seeds else []
  found.append(row['images'])
  if row['groups'] != row['images']:
    found.append(row['groups'])
  return found + ([row['df']] if with_df and row['df'] is not None else [])


def rows(
  work: Work, tables: dict[str, Table], label: str, split: str
) -> list[Numbers | None] | None:
  """Expected numbers of each row of a table without its first cell, in the order of the CSV file.

  `split` is the split whose removed rows the page describes at this point.
  """
  if label == 'skipped':
    return skipped_rows(work)
  if label.startswith('accuracy') and label in tables and 'similarity' not in label:
    return accuracy_rows(work, tables[label])
  names = {
    'Removed by class': f'removed_by_class_{split}',
    'Removed by domain': f'removed_by_domain_{split}',
    'Rows that other slacks would remove': f'slack_{split}',
    'More frequent in removed captions': f'words_{split}',
    'More frequent in kept captions': f'words_{split}_kept',
    'Quantiles of the similarity of each query to its nearest image': 'nearest_similarity',
    'Rows that alignment would remove, by slack': 'rows_by_slack',
    'Share of queries with a duplicate': 'duplicate_rates',
    'Difference to a random split of the same size': 'size_against_random',
    'Recall of duplicates planted in the pool': 'planted_duplicates',
  }
  if label.startswith('Difference of the means'):
    name = f'balance_{work.control(split, is_trained=False)}'
  else:
    name = names.get(label.split(': the column')[0], label)
  if name not in tables or name not in ROWS and not name.startswith(PREFIXES):
    return None
  ordered = in_printed_order(work, name, tables[name])
  if name in GRIDS:
    return GRIDS[name](work, [row for row in ordered if row])
  make = ROWS.get(name) or next(ROWS[p] for p in PREFIXES if name.startswith(p))
  found = [make(work, row) if row else None for row in ordered]
  if name.startswith('balance_') and 'difference_before' not in printed(work, name)[0]:
    return [numbers[1:] for numbers in found if numbers]  # a report of before that column
  return found


def in_printed_order(work: Work, name: str, table: Table) -> list[dict | None]:
  """The recomputed rows in the order of the CSV file; None for a row that is not recomputed."""
  key = lambda row: tuple(text_of(row[k]) for k in table.keys)
  mine = {key(row): row for row in table.rows}
  return [mine.get(key(row)) for row in printed(work, name)]


def accuracy_rows(work: Work, table: Table) -> list[Numbers]:
  by_split: dict[str, Numbers] = {}
  for row in table.rows:
    if row['without_leaked'] == 'False':
      found = by_split.setdefault(row['split'], [])
      found += interval(row, ('accuracy', 'low', 'high'))
  for row in table.rows:
    found = by_split[row['split']]
    if row['benchmark'] == work.benchmarks[-1] and row['without_leaked'] == 'False':
      found += [row['pool_rows'], row['anchor_rows'], row['samples'], row['passes']]
      found.append(100 * row['anchor_rows'] / (row['pool_rows'] + row['anchor_rows']))
  return list(by_split.values())


def counted(work: Work, row: dict) -> Numbers:
  return [row['count'], row['total'], percent(row['count'] / row['total'])]


def slack(work: Work, row: dict) -> Numbers:
  return [row['dropped'], percent_of(row['dropped'], work.candidates.sum())]


def percent_of(count, total):
  if isinstance(count, Between):
    return Between(100 * count.low / total, 100 * count.high / total)
  return 100 * count / total


def word(work: Work, row: dict) -> Numbers:
  shares = [row[k] for k in row if k.endswith('_share')]
  return [*map(percent, shares), row['odds_ratio'], row['low'], row['high']]


def bin_row(work: Work, row: dict) -> Numbers:
  found = [row['low'], row['high'], row['n']]
  found += interval(row, ('accuracy', 'accuracy_low', 'accuracy_high'))
  if row['n'] < 20 and row['series'] != 'class effects removed':
    found += [round(row['accuracy'] * row['n'] * row['seeds']), row['n'] * row['seeds']]
  return [*found, row['seeds'], row['groups']] + ([] if row['df'] is None else [row['df']])


def plane_row(work: Work, row: dict) -> Numbers:
  found = []
  for axis in 'xy':
    one = {
      k: row[f'{axis}_{k}'] for k in ('value', 'low', 'high', 'seeds', 'images', 'groups', 'df')
    }
    found += rests(one, with_seeds=False) + interval(one)
  return found


def duplicate_row(work: Work, row: dict) -> Numbers:
  found: Numbers = [row['queries']]
  for name in ('pool', 'anchor'):
    found += interval(row, (f'{name}_share', f'{name}_low', f'{name}_high'))
    found += [row[name], row['queries']]
    exact = row.get(f'exact_{name}')
    lines = printed(work, 'duplicate_rates')
    if not any(line[f'exact_{name}'] for line in lines if line['benchmark'] == row['benchmark']):
      continue  # without images or vectors to compare, the page has no such numbers
    found += [None if exact is None else percent_of(exact, row['queries']), exact, row['queries']]
  return found


def training_row(work: Work, row: dict) -> Numbers:
  time = row['seconds']
  clock = [time // 60, round(time) % 60] if round(time) >= 60 else [time]
  return [row['samples'], row['passes'], row['steps'], *clock, row['images_per_sec']]


def skipped_rows(work: Work) -> list[Numbers]:
  """Rows, skipped samples, their reasons in any order if there is one, and unreadable images."""
  found = []
  for dataset in ('pool', 'anchor', *work.benchmarks):
    files = (work.path / 'ingest' / dataset).glob('skipped-*.json')
    reasons = Counter(e['reason'] for f in sorted(files) for e in json.loads(f.read_text()))
    counts = [len(work.meta(dataset)['key']), reasons.total(), *reasons.values()]
    found.append([*counts, int((~work.usable(dataset)).sum())])
  return found


def sensitivity_row(work: Work, row: dict) -> Numbers:
  return [
    row['removed_here'],
    row['removed_there'],
    percent(row['jaccard']),
    percent(row['same_count_jaccard']),
    row['spearman'],
    row['only_here'] + row['only_there'],
    row['only_here'],
    row['only_there'],
  ]


def embedder_row(work: Work, row: dict) -> Numbers:
  found = [row['removed'], percent(row['removed'] / row['candidates'])]
  if row['also_removed'] is not None:
    found += [row['also_removed'], percent(row['also_removed'] / row['removed'])]
  found += interval(row) + rests(row)
  if row.get('share_value') is not None:
    return found + [percent(row[f'share_{k}']) for k in ('value', 'low', 'high')]
  lead = main.lead(work, row['split'], row['benchmark'], row['control'])
  if row['control_rule'] == 'all' or not lead:
    return found
  if lead.low is not None and lead.low > 0:  # a share of fewer than three seeds
    return [*found, None, None, None]
  return found + [percent(x) for x in (lead.value, lead.low, lead.high) if x is not None]


def grid(first: str, value: str, scale, extra=None):
  """Rows of a page's table that hold several rows of the file, in its order."""

  def found(work: Work, ordered: list[dict]) -> list[Numbers]:
    lines: dict[tuple, Numbers] = {}
    for row in ordered:
      line = lines.setdefault(tuple(row[k] for k in first.split()), [])
      line += [scale(row[value])] + ([extra(row)] if extra else [])
    return list(lines.values())

  return found


def preview_rows(work: Work, ordered: list[dict]) -> list[Numbers]:
  lines: dict[str, Numbers] = {}
  for row in ordered:
    line = lines.setdefault(row['split'], [])
    line += interval(row, ('accuracy', 'low', 'high'))
    if row['benchmark'] == [b for b in work.benchmarks if not work.is_retrieval(b)][-1]:
      line += [row['rows'], percent(row['labelled'] / row['rows'])]
  return list(lines.values())


def collateral_rows(work: Work, ordered: list[dict]) -> list[Numbers]:
  lines: dict[tuple, Numbers] = {}
  for row in ordered:
    lines.setdefault((row['split'], row['against']), []).extend(interval(row))
  return list(lines.values())


def held_back_rows(work: Work, ordered: list[dict]) -> list[Numbers]:
  lines: dict[tuple, Numbers] = {}
  for row in ordered:
    key = row['split'], row['benchmark'], row['control']
    line = lines.setdefault(key, [])
    if row['what'] == 'A_minus_U':
      found = main.contrasts_held_back(work, *key)['A_minus_U'][0]
      if found is None:
        line += [*main.groups_in_both(work, *key[:2]), main.FEWEST_GROUPS]
      else:
        line += [*interval(row), found.images, found.groups, found.seeds, found.df]
        line += [90, *map(percent, found.at(0.9))] if found.seeds > 2 else []
      line += [percent(row['share_removed']), row['rows_removed'], row['rows']]
      line += [row['excess_before'], row['excess_after'], percent(row['excess_removed'])]
    elif row['value'] is None:
      line += [*right(row), row['groups']]
    else:
      line += [*interval(row), row['images'], row['groups'], row['seeds'], row['df']]
  return list(lines.values())


def right(row: dict) -> Numbers:
  """`0 of 7 right, 2 with the control`, over all seeds."""
  return [row['right_pruned'], row['images'] * row['seeds'], row['right_control']]


def recall_rows(work: Work, ordered: list[dict]) -> list[Numbers]:
  lines: dict[tuple, Numbers] = {}
  for row in ordered:
    lines.setdefault((row['split'], row['benchmark']), []).extend(interval(row))
  return list(lines.values())


def few_shot_rows(work: Work, ordered: list[dict]) -> list[Numbers]:
  lines: dict[tuple, Numbers] = {}
  rows_of: dict[tuple, list[dict]] = {}
  for row in ordered:
    key = row['split'], row['benchmark']
    rows_of.setdefault(key, []).append(row)
    line = lines.setdefault(key, [])
    line += [*interval(row), percent(row['lowest_draw']), percent(row['highest_draw'])]
  for key, line in lines.items():
    df = [row['df'] for row in rows_of[key] if row['df'] is not None]
    ends = [min(df), max(df)] if df and round(min(df), 1) != round(max(df), 1) else df[:1]
    line += rests(rows_of[key][0], with_df=False) + ends
  return list(lines.values())


same = lambda value: value
ROWS = {
  'removed_by_': counted,
  'slack_': slack,
  'words_': word,
  'balance_': lambda work, row: [row['difference_before'], row['difference']],
  'mcnemar_': lambda work, row: [row['aligned_only'], row['control_only'], row['p_mid']],
  'accuracy_by_similarity': bin_row,
  'plane': plane_row,
  'nearest_similarity': lambda work, row: [
    row[k] for k in ('queries', 'q05', 'median', 'q95', 'max')
  ],
  'duplicate_rates': duplicate_row,
  'planted_duplicates': lambda work, row: [
    row['planted'],
    row['found'],
    *interval(row, ('recall', 'low', 'high')),
  ],
  'training': training_row,
  'size_against_random': lambda work, row: interval(row) + rests(row),
  'sensitivity': sensitivity_row,
  'embedders': embedder_row,
  'rows_by_slack': same,
  'cut_by_size': same,
  'collateral': same,
  'overlap': same,
  'preview': same,
  'held_back': same,
  'retrieval': same,
  'few_shot': same,
}
PREFIXES = tuple(name for name in ROWS if name.endswith('_'))
GRIDS = {
  'rows_by_slack': grid(
    'benchmark', 'dropped', same, lambda row: percent_of(row['dropped'], row['candidates'])
  ),
  'cut_by_size': grid('benchmark rule', 'cut', same),
  'overlap': grid('split', 'share', percent),
  'preview': preview_rows,
  'collateral': collateral_rows,
  'held_back': held_back_rows,
  'retrieval': recall_rows,
  'few_shot': few_shot_rows,
}
