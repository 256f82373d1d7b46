"""The report's tables on accuracy and training, recomputed from the raw products.

Imports nothing of clip_jax. Used by tests/recompute_page.py.
"""

from collections.abc import Iterator
import json

import numpy as np
import recompute_formulas as formulas
from recompute_pool_tables import leaked
from recompute_work import Between, Table, Work, numbers

NO_INTERVAL = dict.fromkeys(('value', 'low', 'high', 'df'))
FEWEST_GROUPS = 10  # of aligned and of held-back queries; below, counts only (method.md)


def comparisons(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  found = {}
  for split, benchmark in work.aligned():
    if work.control(split):
      found[split, benchmark] = comparison(work, split, benchmark, skipped)
      yield f'mcnemar_{split}_{benchmark}', mcnemar(work, split, benchmark)
  with_holm(work, found)
  for (split, benchmark), rows in found.items():
    names = {'split': split, 'benchmark': benchmark, **controls(work, split)}
    is_whole = any(row['what'] == 'dose_slope' for row in rows)
    is_whole &= bool(work.with_rule('anchor'))  # E against a line is not recomputed
    rows = [names | row for row in rows]
    yield f'comparison_{split}_{benchmark}', Table(('what',), rows, 1e-5, is_whole)


def controls(work: Work, split: str) -> dict[str, str]:
  """The control, and `random` for the rule of its rows if no matched control exists."""
  control = work.control(split)
  rule = work.settings(control)['rule']
  return {
    'control': control,
    'control_rule': 'random' if rule == 'matched' and work.donors(split) > 0.2 else rule,
  }


def rule(work: Work, split: str) -> str:
  block = work.settings(split)
  return (
    controls(work, block['to'])['control_rule'] if block['rule'] == 'matched' else block['rule']
  )


def base_of(work: Work) -> str:
  return work.with_rule('all')


def losses(work: Work, split: str, seed: int) -> list[dict]:
  text = (work.path / f'train/{split}/seed{seed}/metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def mark(work: Work, split: str, seed: int) -> str:
  """Why the run counts as not converged, or ''."""
  lines = losses(work, split, seed)
  steps, loss = (np.array([line[k] for line in lines]) for k in ('step', 'train/loss'))
  return formulas.not_converged(steps, loss, work.config['train']['batch_size'])


def accuracy(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """One table for each number of seeds; the most seeds are in accuracy.csv."""
  by_seeds: dict[int, list[dict]] = {}
  for split in work.splits:
    for benchmark in work.benchmarks if work.seeds(split) else ():
      (correct,) = work.arrays(benchmark, split)
      leaks = leaked(work, benchmark)
      for without in (False, True) if leaks.any() else (False,):
        images = ~leaks if without else np.ones(len(leaks), bool)
        found = formulas.accuracy(correct[:, images], work.groups(benchmark)[images])
        rows, last = work.rows(split), losses(work, split, work.seeds(split)[0])[-1]
        pool, anchor = (len(work.meta(d)['key']) for d in ('pool', 'anchor'))
        columns = numbers(found)
        columns['accuracy'] = columns.pop('value')
        marks = [mark(work, split, seed) for seed in work.seeds(split)]
        by_seeds.setdefault(len(correct), []).append(
          {
            'split': split,
            'benchmark': benchmark,
            'without_leaked': str(without),
            'rule': rule(work, split),
            **columns,
            'pool_rows': int((rows < pool).sum()),
            'anchor_rows': int(((rows >= pool) & (rows < pool + anchor)).sum()),
            'samples': int(last['train/samples']),
            'anchor_share': (rows >= pool).mean(),
            'passes': last['train/samples'] / len(rows),
            'mark': 'not converged' if any(marks) else '',
          }
        )
  for place, count in enumerate(sorted(by_seeds, reverse=True)):
    name = f'accuracy_seeds_{count}' if place else 'accuracy'
    yield name, Table(('split', 'benchmark', 'without_leaked'), by_seeds[count])


def differences(work: Work, split: str, benchmark: str) -> dict[str, formulas.Interval]:
  """Aligned minus control and minus base, on the aligned queries."""
  images = work.aligned_queries(benchmark, split)
  found = {}
  for name, other in (('against_control', work.control(split)), ('against_base', base_of(work))):
    if other:
      one, two = (a[:, images] for a in work.arrays(benchmark, split, other))
      found[name] = formulas.difference(one, two, work.groups(benchmark)[images])
  return found


def comparison(work: Work, split: str, benchmark: str, skipped: list[str]) -> list[dict]:
  control, base, anchor = work.control(split), base_of(work), work.with_rule('anchor')
  images = work.aligned_queries(benchmark, split)
  groups, labels = work.groups(benchmark)[images], work.labels(benchmark)[images]
  drawn = work.config['report']['bootstrap_draws']
  rows = [
    {'what': name} | numbers(found) for name, found in differences(work, split, benchmark).items()
  ]
  one, two = (a[:, images] for a in work.arrays(benchmark, split, control))
  seeds = len(one)
  if seeds < 3:
    skipped.append(
      f'comparison_{split}_{benchmark}: fewer than three seeds, so no bootstrap, '
      'explained share, p-value or slope is checked'
    )
  else:
    draws = formulas.bootstrap([one - two], groups)
    rows.append(
      {
        'what': 'against_control_bootstrap',
        'value': rows[0]['value'],
        'low': Between(*formulas.likely_quantile(draws, 0.025, drawn)),
        'high': Between(*formulas.likely_quantile(draws, 0.975, drawn)),
        'method': 'bootstrap',
        **{key: rows[0][key] for key in ('seeds', 'images', 'groups')},
      }
    )
    for name, other in (('E', base), ('E_control', control)):
      if other and anchor:
        rows.append({'what': name} | explained(work, split, benchmark, other, anchor))
    embedder = work.embedder(split)
    nearer = work.to_pool(benchmark, embedder) - work.threshold(benchmark, embedder)
    lost = np.maximum(nearer, 0)[images]
    rows.append(
      {'what': 'dose_slope'} | numbers(formulas.dose_slope(one, two, lost, labels, groups))
    )
  reference = work.config['report'].get('reference')
  aligned = (benchmark, *work.settings(split)['benchmarks'])
  if reference in work.benchmarks and reference not in aligned:
    rows.append({'what': 'placebo'} | numbers(placebo(work, split, benchmark, reference)))
  hit, unhit = hit_and_unhit(work, split, benchmark)
  weights = formulas.class_weights(hit, unhit, work.labels(benchmark))
  if min((w > 0).sum() for w in weights) >= 50:
    one, two = work.arrays(benchmark, split, control)
    found = formulas.difference_of_means(one - two, weights, work.groups(benchmark))
    rows.append({'what': 'hit_minus_unhit'} | numbers(found))
  return rows


def lead(work: Work, split: str, benchmark: str, other: str) -> formulas.Interval | None:
  """Accuracy of another split minus that of anchor_only on the aligned queries."""
  anchor = work.with_rule('anchor')
  if not other or not anchor:
    return None
  images = work.aligned_queries(benchmark, split)
  one, _, two = (a[:, images] for a in work.arrays(benchmark, other, split, anchor))
  return formulas.difference(one, two, work.groups(benchmark)[images])


def explained(work: Work, split: str, benchmark: str, other: str, anchor: str) -> dict:
  """Columns of E (other: base) or E' (other: the control)."""
  images = work.aligned_queries(benchmark, split)
  groups = work.groups(benchmark)[images]
  one, pruned, reference = (a[:, images] for a in work.arrays(benchmark, other, split, anchor))
  of_lead = lead(work, split, benchmark, other)
  if of_lead.low is None or of_lead.low <= 0:
    return numbers(of_lead) | dict.fromkeys(('value', 'low', 'high', 'df'))
  found = formulas.ratio(one - pruned, one - reference, groups)
  draws = formulas.bootstrap([one - pruned, one - reference], groups)
  drawn = work.config['report']['bootstrap_draws']
  low = [min(e, found.low) for e in formulas.likely_quantile(draws, 0.025, drawn)]
  high = [max(e, found.high) for e in formulas.likely_quantile(draws, 0.975, drawn)]
  return numbers(found) | {'low': Between(*low), 'high': Between(*high)}


def placebo(work: Work, split: str, benchmark: str, reference: str) -> formulas.Interval:
  d, groups, weights = [], [], np.zeros((2, 0))
  for place, name in enumerate((benchmark, reference)):
    images = work.aligned_queries(name, split) if not place else slice(None)
    one, two = (a[:, images] for a in work.arrays(name, split, work.control(split)))
    d.append(one - two)
    groups.append([f'{name}/{g}' for g in work.groups(name)[images]])
    part = np.zeros((2, one.shape[1]))
    part[place] = 1 / one.shape[1]
    weights = np.concatenate([weights, part], 1)
  return formulas.difference_of_means(
    np.concatenate(d, 1), (weights[0], weights[1]), np.concatenate(groups)
  )


def hit_and_unhit(work: Work, split: str, benchmark: str) -> tuple[np.ndarray, np.ndarray]:
  """Aligned queries with a removed row over t_i, and with none over t_i - 0.02."""
  embedder = work.embedder(split)
  highest = work.similarities(benchmark, embedder)[work.removed(split)].max(0)
  t, images = work.threshold(benchmark, embedder), work.aligned_queries(benchmark, split)
  return (highest > t) & images, (highest <= t - 0.02) & images


def with_holm(work: Work, found: dict[tuple[str, str], list[dict]]) -> None:
  """Adds the adjusted p-values to the first row of every confirmatory comparison."""
  family = [
    (key, differences(work, *key)['against_control'])
    for key in found
    if controls(work, key[0])['control_rule'] == 'matched'
  ]
  family = [(key, i) for key, i in family if i.seeds >= 3 and i.error is not None]
  p = formulas.holm([formulas.p_value(interval) for _, interval in family])
  same = formulas.holm([formulas.p_no_loss(i, margin(i.images)) for _, i in family])
  for rows in found.values():
    rows[0] |= {'p_holm': None, 'p_no_loss_holm': None}
  for (key, _), one, two in zip(family, p, same, strict=True):
    found[key][0] |= {'p_holm': one, 'p_no_loss_holm': two}


def margin(images: int) -> float:
  """Of equivalence: 1 point, 3 points for fewer than 3,000 images."""
  return 0.03 if images < 3000 else 0.01


def mcnemar(work: Work, split: str, benchmark: str) -> Table:
  images = work.aligned_queries(benchmark, split)
  control = work.control(split)
  rows = []
  for seed in sorted(set(work.seeds(split)) & set(work.seeds(control))):
    one, two = (work.correct(s, benchmark)[seed][images] for s in (split, control))
    only = int(((one == 1) & (two == 0)).sum()), int(((one == 0) & (two == 1)).sum())
    rows.append(
      {
        'seed': seed,
        'aligned_only': only[0],
        'control_only': only[1],
        'p_mid': formulas.mcnemar_mid_p(*only),
      }
    )
  return Table(('seed',), rows)


def embedders(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """The answer under each embedder: splits to slack 0 that differ in their embedder alone."""
  groups: dict[tuple, list[tuple[str, str]]] = {}
  for split, benchmark in work.aligned():
    block = work.settings(split)
    if block['rule'] != 'gap_aligned' or block['slack'] or block['quantile']:
      continue
    if not block['dose']:
      alike = (benchmark, *sorted(block['benchmarks']), *block['queries'])
      groups.setdefault(alike, []).append((split, benchmark))
  rows, total = [], int(work.candidates.sum())
  for pairs in groups.values():
    main = next((split for split, _ in pairs if not work.embedder(split)), '')
    for split, benchmark in pairs if len({work.embedder(s) for s, _ in pairs}) > 1 else ():
      gone, control = work.removed(split), work.control(split)
      row = {'benchmark': benchmark, 'split': split, 'embedder': work.embedder(split)}
      row |= {'removed': int(gone.sum()), 'candidates': total, 'also_removed': None}
      if row['embedder'] and main:
        row['also_removed'] = int((gone & work.removed(main)).sum())
      name = 'against_control' if control else 'against_base'
      found = differences(work, split, benchmark)[name]
      row |= {'control': control or base_of(work)} | numbers(found)
      row['control_rule'] = controls(work, split)['control_rule'] if control else 'all'
      if found.seeds > 2 and control and (anchor := work.with_rule('anchor')):
        share = explained(work, split, benchmark, control, anchor)
        row |= {f'share_{key}': share[key] for key in ('value', 'low', 'high', 'method')}
      rows.append(row)
  if rows:
    yield 'embedders', Table(('benchmark', 'split'), rows, 1e-5)


def held_back(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows = []
  for split, benchmark in work.aligned():
    queries = work.settings(split).get('queries', [0.0, 1.0])
    others = [n for n in work.splits if work.settings(n).get('size_of') == split]
    others = [n for n in (base_of(work), *others) if n and work.seeds(n)]
    for other in others if list(queries) != [0.0, 1.0] else ():
      names = {'split': split, 'benchmark': benchmark, 'control': other}
      names |= {'queries_from': queries[0], 'queries_to': queries[1]}
      names |= {'control_rule': work.settings(other)['rule'], **gone(work, split, benchmark)}
      found = contrasts_held_back(work, split, benchmark, other)
      names['conclusion'] = conclusion(found, names)
      rows += [names | {'what': what} | row for what, (_, row) in found.items()]
  if rows:
    yield 'held_back', Table(('split', 'benchmark', 'control', 'what'), rows)


def contrasts_held_back(
  work: Work, split: str, benchmark: str, other: str
) -> dict[str, tuple[formulas.Interval | None, dict]]:
  """The differences of both sides and their contrast; no interval below FEWEST_GROUPS groups."""
  aligned = work.aligned_queries(benchmark, split)
  one, two = work.arrays(benchmark, split, other)
  groups = work.groups(benchmark)
  found = {}
  for what, images in (('D_aligned', aligned), ('D_held_back', ~aligned)):
    units, interval = len(set(groups[images].tolist())), None
    if units >= FEWEST_GROUPS:
      interval = formulas.difference(one[:, images], two[:, images], groups[images])
    found[what] = (
      interval,
      (numbers(interval) or NO_INTERVAL)
      | {'images': int(images.sum()), 'groups': units, 'seeds': len(one)}
      | {'right_pruned': int(one[:, images].sum()), 'right_control': int(two[:, images].sum())},
    )
  interval = None
  if min(groups_in_both(work, split, benchmark)) >= FEWEST_GROUPS:
    weights = formulas.class_weights(aligned, ~aligned, work.labels(benchmark))
    interval = formulas.difference_of_means(one - two, weights, groups)
  row = (numbers(interval, counts=False) or NO_INTERVAL) | {'seeds': len(one)}
  found['A_minus_U'] = interval, row
  return found


def groups_in_both(work: Work, split: str, benchmark: str) -> list[int]:
  """Groups of aligned and of held-back queries whose class has both."""
  aligned, labels = work.aligned_queries(benchmark, split), work.labels(benchmark)
  in_both = np.isin(labels, np.intersect1d(labels[aligned], labels[~aligned]))
  groups = work.groups(benchmark)
  return [len(set(groups[side & in_both].tolist())) for side in (aligned, ~aligned)]


def gone(work: Work, split: str, benchmark: str) -> dict:
  """Rows near held-back queries that went, and these queries' excess before and after."""
  held = ~work.aligned_queries(benchmark, split) & work.usable(benchmark)
  t = work.threshold(benchmark, work.embedder(split))[held]
  similarity = work.similarities(benchmark, work.embedder(split))[:, held]
  near = ((similarity - t).max(1) > 0) & work.candidates
  before, after = (
    float(np.maximum(similarity[rows].max(0) - t, 0).mean())
    for rows in (work.candidates, work.pool_rows(split))
  )
  went = int((near & work.removed(split)).sum())
  return {
    'rows': int(near.sum()),
    'rows_removed': went,
    'share_removed': went / near.sum(),
    'excess_before': Between(before - 1e-6, before + 1e-6),
    'excess_after': Between(after - 1e-6, after + 1e-6),
    'excess_removed': Between(1 - after / before - 1e-4, 1 - after / before + 1e-4),
  }


def conclusion(found: dict, shares: dict) -> str:
  """The table of docs/statistics.md, "Aligned and held-back queries"."""
  if found['D_aligned'][1]['seeds'] < 3:
    return 'undetermined'
  if max(shares['share_removed'], shares['excess_removed'].low) > 0.8:
    return 'cannot tell'
  a, u, au = (found[k][0] for k in ('D_aligned', 'D_held_back', 'A_minus_U'))
  if a is None or u is None or au is None:
    return 'undetermined'
  low, high = au.at(0.9)
  if a.high < 0 and u.high < 0 and low > -0.02 and high < 0.02:
    return 'domain'
  return 'instance' if a.high < 0 and u.high >= 0 and au.high < 0 else 'undetermined'


def bins(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  base, rows = base_of(work), []
  for benchmark in work.benchmarks if base and work.seeds(base) else ():
    usable = work.usable(benchmark)
    (correct,) = work.arrays(benchmark, base)
    correct = correct[:, usable]
    groups, labels = work.groups(benchmark)[usable], work.labels(benchmark)[usable]
    # As float32, equal similarities to pool and anchor differ by 0 and not by a rounding error.
    pool, anchor = (
      values[usable].astype(np.float32)
      for values in (work.to_pool(benchmark), work.threshold(benchmark))
    )
    for against, values in (('similarity', pool), ('excess', pool - anchor)):
      place = np.minimum(np.floor(values.astype(float) / 0.05 + 1e-6), 19).astype(int)
      adjusted = formulas.bins_without_classes(correct, place, labels, groups)
      for name in np.unique(place).tolist():
        members = place == name
        raw = formulas.accuracy(correct[:, members], groups[members])
        for series, found in ((base, raw), ('class effects removed', adjusted[name])):
          if found is None or series != base and work.is_retrieval(benchmark):
            continue
          columns = numbers(found)
          is_open = series != base and raw.method not in ('range', 'none') and found.low is not None
          if is_open and raw.value in (0, 1):
            columns['low'] = min(found.low, max(found.value - raw.value + raw.low, 0))
            columns['high'] = max(found.high, min(found.value - raw.value + raw.high, 1))
          if members.sum() < 20:  # a count
            columns |= {'low': None, 'high': None, 'df': None, 'method': 'none'}
          columns['accuracy'] = columns.pop('value')
          columns['accuracy_low'], columns['accuracy_high'] = (
            columns.pop('low'),
            columns.pop('high'),
          )
          about = {'benchmark': benchmark, 'against': against, 'series': series}
          edges = {'low': round(name * 0.05, 6), 'high': round((name + 1) * 0.05, 6)}
          rows.append(about | edges | {'n': int(members.sum())} | columns)
  yield 'accuracy_by_similarity', Table(('benchmark', 'against', 'series', 'low'), rows)


def plane(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Each run on a benchmark against the reference, among the benchmark's classes if fewer."""
  reference, rows = work.config['report']['reference'], []
  for split in work.splits if reference in work.benchmarks else ():
    for benchmark in (b for b in work.benchmarks if b != reference):
      scorings = plane_scorings(work, split, benchmark, reference)
      scored = [work.scored(split, name, scorings[name]) for name in (reference, benchmark)]
      for place, seed in enumerate(work.seeds(split)):
        row = {'split': split, 'seed': seed, 'benchmark': benchmark, 'against': reference}
        row |= {'x_scoring': scorings[reference], 'y_scoring': scorings[benchmark]}
        for prefix, (correct, groups) in zip(('x_', 'y_'), scored, strict=True):
          row |= numbers(formulas.accuracy(correct[place][None], groups), prefix)
        rows.append(row)
  yield 'plane', Table(('split', 'seed', 'benchmark'), rows)


def plane_scorings(work: Work, split: str, benchmark: str, reference: str) -> dict[str, str]:
  """The further scorings, '' for none, of both benchmarks of a plane."""
  class_set = work.config['benchmarks'][benchmark].get('class_set', '')
  part = class_set in ('imagenet-a', 'imagenet-r', 'objectnet')
  name = class_set if part else f'classes_of_{benchmark}'
  if not work.stored(split, reference, f'{name}_correct'):
    return {reference: '', benchmark: ''}
  return {reference: name, benchmark: 'imagenet_masked' if class_set == 'objectnet' else ''}


def collateral(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Every split minus base, and minus random rows of its size and budget, on all images."""
  base, rows = base_of(work), []
  budget = lambda split: work.settings(split).get('budget') or work.config['train'].get('budget')
  size = lambda split: (len(work.rows(split)), budget(split))
  trained = [split for split in work.splits if work.seeds(split)]
  random = [split for split in trained if rule(work, split) == 'random']
  for split in trained:
    alike = [name for name in random if split not in random and size(name) == size(split)]
    others = [base if base != split else '', *(alike[:1] if split != base else [])]
    for other in filter(None, others):
      for benchmark in work.benchmarks:
        one, two = work.arrays(benchmark, split, other)
        rows.append(
          {
            'split': split,
            'against': other,
            'benchmark': benchmark,
            'rule': rule(work, split),
            'own_benchmark': str(benchmark in work.settings(split)['benchmarks']),
            'budget': budget(split),
            'budget_of_other': budget(other),
          }
          | numbers(formulas.difference(one, two, work.groups(benchmark)))
        )
  if rows:
    yield 'collateral', Table(('split', 'against', 'benchmark'), rows)


def retrieval(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Six recalls; text to image is over captions, of which those of one group are one unit."""
  rows = []
  for split in work.splits:
    for benchmark in filter(work.is_retrieval, work.benchmarks):
      names = ('captions', 'k', 'image_to_text', 'text_to_image')
      if stored := work.stored(split, benchmark, *names):
        about = {'split': split, 'rule': rule(work, split), 'benchmark': benchmark}
        rows += [about | row for row in recalls(work.groups(benchmark), *stored)]
  if rows:
    yield 'retrieval', Table(('split', 'benchmark', 'measure'), rows)


def recalls(
  groups: np.ndarray,  # [n]
  captions: np.ndarray,  # [S, n] captions of each image
  ks: np.ndarray,  # [S, K]
  of_image: np.ndarray,  # [S, n, K] 0 or 1
  of_caption: np.ndarray,  # [S, n, K] share of the image's captions that are hits
) -> Iterator[dict]:
  owner = np.repeat(np.arange(len(groups)), captions[0])
  for place, k in enumerate(ks[0].tolist()):
    hits = np.zeros((len(captions), len(owner)))
    for image, count in enumerate(captions[0].tolist()):  # which of its captions hit is not stored
      mine = np.flatnonzero(owner == image)
      for seed, share in enumerate(of_caption[:, image, place].tolist()):
        hits[seed, mine[: round(share * count)]] = 1
    for way, hit, units in (
      ('image-to-text', of_image[:, :, place].astype(float), groups),
      ('text-to-image', hits, groups[owner]),
    ):
      yield {'measure': f'{way} recall@{k}'} | numbers(formulas.accuracy(hit, units))


def few_shot(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Probes: the mean over draws of the training images, over seeds and images."""
  rows = []
  for split in work.splits:
    for benchmark in work.benchmarks:
      about = {'split': split, 'benchmark': benchmark}
      stored = work.stored(split, benchmark, 'few_shot_shots', 'few_shot_correct')
      for place, shots in enumerate(stored[0][0].tolist() if stored else ()):
        correct = stored[1][:, place].astype(float)  # [S, draws, Q]
        by_draw = correct.mean((0, 2))
        training_set = work.config['benchmarks'][benchmark]['few_shot']
        about |= {'rule': rule(work, split), 'training_set': training_set, 'shots': shots}
        about |= {'draws': len(by_draw), 'lowest_draw': by_draw.min()}
        about |= {'highest_draw': by_draw.max()}
        rows.append(about | numbers(formulas.accuracy(correct.mean(1), work.groups(benchmark))))
  if rows:
    yield 'few_shot', Table(('split', 'benchmark', 'shots'), rows)


def training(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  rows = []
  for split in work.splits:
    for draw, seed in enumerate(work.seeds(split)):
      lines = losses(work, split, seed)
      samples = int(lines[-1]['train/samples'])
      rows.append(
        {
          'run': f'{split}/seed{seed}',
          'samples': samples,
          'passes': samples / len(work.rows(split, draw)),
          'steps': lines[-1]['step'],
          'seconds': lines[-1]['train/seconds'],
          'images_per_sec': float(np.median([line['train/images_per_sec'] for line in lines])),
          'mark': 'not converged' if mark(work, split, seed) else '',
        }
      )
  yield 'training', Table(('run',), rows)


def against_random(work: Work, skipped: list[str]) -> Iterator[tuple[str, Table]]:
  """Near- and far-pruned splits minus the random split with as many pool rows."""
  rows = []
  for split in work.selected():
    if work.settings(split)['rule'] not in ('near', 'far') or not work.seeds(split):
      continue
    size = work.pool_rows(split).sum()
    for other in work.splits:
      if work.settings(other)['rule'] == 'random' and work.pool_rows(other).sum() == size:
        for benchmark in work.settings(split)['benchmarks'] if work.seeds(other) else ():
          one, two = work.arrays(benchmark, split, other)
          found = numbers(formulas.difference(one, two, work.groups(benchmark)))
          names = {'split': split, 'benchmark': benchmark, 'control': other}
          rows.append(names | {'rule': work.settings(split)['rule']} | found)
  if rows:
    keys = ('split', 'benchmark', 'control')
    yield 'size_against_random', Table(keys, rows, is_whole=False)


MAKERS = (
  against_random,
  accuracy,
  retrieval,
  few_shot,
  comparisons,
  collateral,
  embedders,
  held_back,
  bins,
  plane,
  training,
)
