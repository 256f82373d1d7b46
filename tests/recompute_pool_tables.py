"""The report's tables on the pool, its rows and its neighbours, recomputed from the raw products.

Imports nothing of clip_jax. Used by tests/recompute_page.py.
"""

from collections import Counter
from collections.abc import Iterator
import json
import re

import numpy as np
import recompute_formulas as formulas
from recompute_work import Between, Table, Work, numbers
from scipy import stats


def removed(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  meta, column = work.meta('pool'), work.config['pool']['domain_column']
  classes = work.config['pool']['classes']
  by = {
    'class': [classes[label] if label >= 0 else 'other' for label in meta['label']],
    'domain': [d or '' for d in meta[column]] if column else None,
  }
  for split in work.selected():
    for name, values in by.items():
      if values:
        total, count = (
          Counter(v for v, m in zip(values, mask, strict=True) if m)
          for mask in (work.candidates, work.removed(split))
        )
        rows = [{'what': v, 'count': count[v], 'total': total[v]} for v in total]
        yield f'removed_by_{name}_{split}', Table(('what',), rows)
    yield from words(work, split)
    if work.settings(split)['rule'] == 'gap_aligned':
      excess = work.order(split)[work.candidates]
      slacks = (-0.01, -0.005, 0.0, 0.005, 0.01)
      rows = [{'slack': slack, 'dropped': over(excess, slack)} for slack in slacks]
      yield f'slack_{split}', Table(('slack',), rows)
    control = work.control(split, is_trained=False)
    if control and work.settings(control)['rule'] == 'matched':
      before = work.balance(split)
      draws = [work.balance(split, control, i) for i in range(len(work.about(control)['draws']))]
      rows = [
        {'variable': v, 'difference': max((d[v] for d in draws), key=abs), 'difference_before': b}
        for v, b in before.items()
      ]
      yield f'balance_{control}', Table(('variable',), rows)


def over(excess: np.ndarray, slack: float) -> int | Between:
  """Rows over a slack; off 0, the report counts float32 values, so rows at the cut may differ."""
  if slack == 0:
    return int((excess > 0).sum())
  return Between(int((excess > slack + 1e-6).sum()), int((excess > slack - 1e-6).sum()))


def words(work: Work, split: str) -> Iterator[tuple[str, Table]]:
  captions = work.meta('pool')['caption']
  counts, sizes = [], []
  for mask in (work.removed(split), work.pool_rows(split)):
    rows = np.flatnonzero(mask)
    if len(rows) > 2000:
      rows = rows[np.round(np.linspace(0, len(rows) - 1, 2000)).astype(int)]
    found = [set(re.findall(r'[^\W\d_]{2,}', captions[r].lower())) for r in rows]
    counts.append(Counter(word for caption in found for word in caption))
    sizes.append(len(rows))
  if not all(sizes):
    return
  for suffix, (a, b), (n_a, n_b), names in (
    ('', counts, sizes, ('removed_share', 'kept_share')),
    ('_kept', counts[::-1], sizes[::-1], ('kept_share', 'removed_share')),
  ):
    rows = [
      {'word': word, names[0]: n / n_a, names[1]: b[word] / n_b}
      | formulas.odds_ratio(n, b[word], n_a, n_b)
      for word, n in a.items()
      if n >= 3
    ]
    rows = sorted((r for r in rows if r['low'] > 1), key=lambda r: (-r['z'], r['word']))
    yield f'words_{split}{suffix}', Table(('word',), rows[:12])


def nearest(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows = []
  for benchmark in work.benchmarks:
    usable = work.usable(benchmark)
    for name, values in (('pool', work.to_pool(benchmark)), ('anchor', work.threshold(benchmark))):
      q = np.quantile(values[usable], [0.05, 0.5, 0.95, 1])
      row = {'benchmark': benchmark, 'in': name, 'queries': int(usable.sum())}
      rows.append(row | dict(zip(('q05', 'median', 'q95', 'max'), q.tolist(), strict=True)))
  yield 'nearest_similarity', Table(('benchmark', 'in'), rows, 1e-6)


def by_slack(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows, columns = [], {b: work.excess(b)[work.candidates] for b in work.benchmarks}
  columns['all together'] = np.max(list(columns.values()), 0)
  for name, excess in columns.items():
    for slack in (-0.05, -0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.05):
      row = {'benchmark': name, 'slack': slack, 'dropped': over(excess, slack)}
      rows.append(row | {'candidates': len(excess)})
  yield 'rows_by_slack', Table(('benchmark', 'slack'), rows)


def cuts(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """The threshold may be any value between two rows' similarities, and is rounded to 0.001."""
  rows, columns = [], {b: work.highest(b)[work.candidates] for b in work.benchmarks}
  columns['all together'] = np.max(list(columns.values()), 0)
  for name, values in columns.items():
    for which in ('near', 'far'):
      for keep in (0.9, 0.75, 0.5, 0.25):
        ordered = np.sort(values)
        place = round(len(values) * (keep if which == 'near' else 1 - keep))
        low, high = ordered[max(place - 2, 0)], ordered[min(place + 1, len(values) - 1)]
        row = {'benchmark': name, 'rule': which, 'keep': keep}
        rows.append(row | {'cut': Between(low - 0.0011, high + 0.0011)})
  yield 'cut_by_size', Table(('benchmark', 'rule', 'keep'), rows)


def duplicates(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows, limit = [], similarity_of_duplicates(work)
  for benchmark in work.benchmarks:
    usable = work.usable(benchmark)
    row = {'benchmark': benchmark, 'queries': int(usable.sum()), 'similarity': limit}
    for dataset in ('pool', 'anchor'):
      count = int((cosines(work, dataset, benchmark).max(0)[usable] >= limit).sum())
      low, high = formulas.wilson(count / usable.sum(), usable.sum(), stats.norm.ppf(0.975))
      names = (dataset, f'{dataset}_share', f'{dataset}_low', f'{dataset}_high')
      row |= dict(zip(names, (count, count / usable.sum(), low, high), strict=True))
      if count:
        skipped.append(f'duplicate_rates: exact_{dataset} of {benchmark} (no images are opened)')
      elif max(work.meta('pool').get('length') or [0]) > 0:
        row[f'exact_{dataset}'] = 0  # an exact duplicate is a near one
    rows.append(row)
  yield 'duplicate_rates', Table(('benchmark',), rows)


def duplicate_pairs(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  for benchmark in work.benchmarks:
    found = cosines(work, 'pool', benchmark)
    pairs = np.argwhere(found >= similarity_of_duplicates(work))
    keys, queries = work.meta('pool')['key'], work.meta(benchmark)['key']
    rows = [
      {
        'query_row': int(q),
        'pool_row': int(p),
        'query_key': queries[q],
        'pool_key': keys[p],
        'similarity': float(found[p, q]),
      }
      for p, q in pairs
    ]
    yield f'duplicates-{benchmark}', Table(('query_row', 'pool_row'), rows, 1e-6)


def similarity_of_duplicates(work: Work) -> float:
  return work.config['prune']['duplicate_similarity'] or 1 - work.config['dedup']['threshold']


def cosines(work: Work, dataset: str, benchmark: str) -> np.ndarray:  # [N, Q]
  """Cosines divided by both norms; -1 for unusable rows."""
  a, b = work.vectors(dataset), work.vectors(benchmark)
  norms = (np.maximum(np.linalg.norm(v, axis=1), 1e-12) for v in (a, b))
  found = work.similarities(benchmark) if dataset == 'pool' else a @ b.T
  found = found / next(norms)[:, None] / next(norms)
  found[~work.usable(dataset)] = -1
  return found


def leaked(work: Work, benchmark: str) -> np.ndarray:  # [Q] bool
  """Queries with a near-duplicate in the anchor."""
  return cosines(work, 'anchor', benchmark).max(0) >= similarity_of_duplicates(work)


def overlap(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  masks = {s: work.pool_rows(s) for s in work.splits}
  masks = {s: m for s, m in masks.items() if m.any()}
  rows = [
    {'split': one, 'also_in': two, 'share': (a & b).sum() / a.sum()}
    for one, a in masks.items()
    for two, b in masks.items()
  ]
  yield 'overlap', Table(('split', 'also_in'), rows)


def skipped_samples(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows = []
  for dataset in ('pool', 'anchor', *work.benchmarks):
    for file in sorted((work.path / 'ingest' / dataset).glob('skipped-*.json')):
      rows += [{'dataset': dataset, **entry} for entry in json.loads(file.read_text())]
    keys = work.meta(dataset)['key']
    rows += [
      {'dataset': dataset, 'key': keys[row], 'reason': 'unreadable image'}
      for row in np.flatnonzero(~work.usable(dataset))
    ]
  yield 'skipped', Table(('dataset', 'key'), rows)


def planted(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """A planted copy counts as found if de-duplication marks it, or its original."""
  meta = work.meta('pool')
  if not any(meta.get('duplicate_kind') or []):
    return
  marked = np.load(work.path / 'dedup' / 'duplicate_of.npy') >= 0
  row_of = {key: row for row, key in enumerate(meta['key'])}
  rows = []
  for kind in ('exact', 'near'):
    copies = [row for row, k in enumerate(meta['duplicate_kind']) if k == kind]
    found = sum(bool(marked[r] or marked[row_of[meta['duplicate_of'][r]]]) for r in copies)
    low, high = formulas.wilson(found / len(copies), len(copies), stats.norm.ppf(0.975))
    row = {'kind': kind, 'planted': len(copies), 'found': found, 'recall': found / len(copies)}
    rows.append(row | {'low': low, 'high': high})
  yield 'planted_duplicates', Table(('kind',), rows)


def preview(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Classes by label only; features scaled by mean and deviation of all labelled candidates."""
  name = work.config['prune']['preview']
  if not name:
    return
  x = np.concatenate([work.vectors(d, name) for d in ('pool', 'anchor')])
  labels = np.concatenate([work.labels(d) for d in ('pool', 'anchor')])
  labels[: len(work.candidates)][~work.candidates] = -1
  known = labels >= 0
  mean, deviation = x[known].mean(0), x[known].std(0) + 1e-5
  rows = []
  for split in work.splits:
    of_split = work.rows(split)
    train = of_split[labels[of_split] >= 0]
    classified = [b for b in work.benchmarks if not work.is_retrieval(b)]
    tests = [(work.vectors(b, name) - mean) / deviation for b in classified]
    scaled = (x[train] - mean) / deviation
    scores = formulas.ridge(scaled, labels[train], np.concatenate(tests), labels.max() + 1)
    for benchmark in classified:
      mine, scores = scores[: len(work.labels(benchmark))], scores[len(work.labels(benchmark)) :]
      block = work.config['benchmarks'][benchmark]
      masked = [c not in (block.get('class_mask') or block['classes']) for c in block['classes']]
      mine = np.where(masked, -np.inf, mine) if any(masked) else mine
      right = (mine.argmax(1) == work.labels(benchmark))[None].astype(float)
      found = numbers(formulas.accuracy(right, work.groups(benchmark)))
      columns = {key: found[key] for key in ('low', 'high', 'groups', 'df')}
      about = {'split': split, 'benchmark': benchmark, 'embedder': name, 'l2': 1024.0}
      about |= {'rows': len(of_split), 'labelled': len(train), 'n': right.shape[1]}
      rows.append(about | columns | {'accuracy': found['value']})
  yield 'preview', Table(('split', 'benchmark'), rows)


def sensitivity(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """The rows that the same rule would remove with another embedder's vectors."""
  rows, inside = [], work.candidates
  of_rules = [s for s in work.selected() if work.settings(s)['rule'] != 'k_aligned']
  of_rules = [s for s in of_rules if not work.embedder(s)]
  for split in (s for s in of_rules if not work.settings(s)['dose']):
    for embedder in work.config['prune']['sensitivity']:
      here, there = (work.order(split, e)[inside] for e in ('', embedder))
      mine = work.removed(split)[inside]
      same = np.zeros(len(there), bool)
      same[np.argsort(-there, kind='stable')[: mine.sum()]] = True
      other = there > 0 if work.settings(split)['rule'] == 'gap_aligned' else same
      correlation = float(stats.spearmanr(here, there).statistic)
      row = {'split': split, 'embedder': embedder}
      row |= {'removed_here': int(mine.sum()), 'removed_there': int(other.sum())}
      row |= {'jaccard': (mine & other).sum() / (mine | other).sum()}
      row |= {'same_count_jaccard': (mine & same).sum() / (mine | same).sum()}
      row |= {'spearman': Between(correlation - 1e-5, correlation + 1e-5)}
      row |= {'only_here': int((mine & ~other).sum()), 'only_there': int((other & ~mine).sum())}
      rows.append(row)
  if rows:
    yield 'sensitivity', Table(('split', 'embedder'), rows, is_whole=False)


MAKERS = (
  removed,
  nearest,
  by_slack,
  cuts,
  duplicates,
  duplicate_pairs,
  overlap,
  skipped_samples,
  planted,
  preview,
  sensitivity,
)
