"""Plain results -> the report's sections on the data: removed rows, duplicates, skipped, overlaps.

Counts and proportions come in as plain dicts, as the stages leave them in the work directory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.core.types import Array
from clip_jax.reporting import tables
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.page import Columns, Details, Fact, Heading, Text
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

PAPER_REMOVED = (
    'of about 201 million pool items, aligning drops 377,340 for ImageNet-Val, 8,342,783 for '
    'Sketch, 138,852 for A, 5,735,749 for R, 274,325 for V2 and 266,025 for ObjectNet; about '
    '12.4 million together.')
PAPER_DUPLICATES = (
    '3.1 % of ImageNet-Sketch has an exact or near duplicate in LAION and 0.04 % in '
    'ImageNet-Train; 2.67 % of ImageNet-V2 has one in ImageNet-Train and 0.14 % in LAION.')
MOST_LISTED = 40  # lines of a list on the page; the CSV holds all
MOST_BARS = 30    # classes and domains on the page, those that lose most
BALANCED = 0.1    # standardised difference under which a control counts as balanced
VARIABLES = {'anchor_class': 'nearest anchor class',
             'anchor_class_similarity': 'similarity to that class',
             'caption_length': 'caption length', 'image_pixels': 'image size', 'domain': 'domain'}


def removed_blocks(
    about: Mapping[str, Any],  # an aligned split's split.json
    *,
    name: str,
    benchmarks: Sequence[str],
    gallery: Gallery | None,
    words: Sequence[tuple[str, float, float]],      # as gallery.telling_words returns them
    controls: Mapping[str, Mapping[str, Any]],      # matched split -> its split.json
) -> list:
  """Returns what one aligned split removed: numbers, warnings, images, classes, slacks, words."""
  dropped, candidates = about['dropped'], about['candidates']
  blocks: list = [
      Heading(name, f'aligned to {tables.listed(benchmarks)}'),
      Text(f'{tables.number(dropped)} of {tables.number(candidates)} candidates are removed '
           f'({tables.share(dropped / max(candidates, 1))}).')]
  blocks += [Text(_hits(b, q)) for b, q in about.get('queries', {}).items()]
  blocks += [Text(f'{line[:1].upper()}{line[1:]}.', 'warning')
             for line in about.get('warnings', ())]
  blocks += [_check(b, check) for b, check in about.get('checks', {}).items()]
  if gallery is not None:
    blocks.append(gallery)
  side = [_levels(name, key, first, about[key])
          for key, first in (('by_class', 'class'), ('by_domain', 'domain')) if about.get(key)]
  if about.get('dropped_at_slack'):
    side.append(_slacks(name, about))
  if side:
    blocks.append(Columns(tuple(side)))
  if words:
    blocks.append(Details('Words that stand in removed captions more than in kept ones',
                          (_words(name, words),)))
  for control, found in controls.items():
    blocks += _control(control, found)
  return blocks


def _hits(benchmark: str, q: Mapping[str, Any]) -> str:
  return (f'{benchmark}: {tables.number(q["hit"])} of {tables.number(q["queries"])} queries '
          f'({tables.share(q["hit_share"])}) lose at least one neighbour that is nearer than any '
          f'anchor image; {tables.number(q["leaked"])} ({tables.share(q["leaked_share"])}) already '
          'have a near-duplicate in the anchor.')


def _check(benchmark: str, check: Mapping[str, Any]) -> Text:
  """Returns one line on the proof that the split has the anchor's similarity gap."""
  if not check.get('checked'):
    why = check.get('kind', 'it was switched off')
    return Text(f'{benchmark}: the similarity gap was not checked by brute force ({why}).', 'muted')
  if check.get('failures'):
    return Text(f'{benchmark}: the similarity gap differs from the anchor\u2019s for '
                f'{check["failures"]} of {check["checked"]} queries checked by brute force.',
                'warning')
  how = 'does not exceed' if check.get('kind') == 'inequality' else 'equals'
  return Text(f'Checked by brute force on {check["checked"]} queries of {benchmark}: the '
              f'split\u2019s nearest-neighbour similarity {how} the anchor\u2019s for every one.',
              'muted')


def _levels(name: str, key: str, first: str, levels: Mapping[str, Mapping[str, Any]]) -> Table:
  entries = [{'what': level, 'count': v['dropped'], 'total': v['candidates']}
             for level, v in levels.items()]
  entries.sort(key=lambda e: (-e['count'] / max(e['total'], 1), e['what']))
  return tables.bars(f'removed_{key}_{name}', f'Removed by {first}', first, entries, MOST_BARS)


def _slacks(name: str, about: Mapping[str, Any]) -> Table:
  counts = sorted((float(slack), count) for slack, count in about['dropped_at_slack'].items())
  rows = tuple((Cell(f'{slack:+g}'.replace('-', tables.MINUS) if slack else '0'),
                tables.figure(tables.number(count)),
                tables.figure(tables.share(count / max(about['candidates'], 1))))
               for slack, count in counts)
  note = ('Re-encoded copies of anchor images tie at the threshold up to the rounding of float16: '
          'the count at 0 is fragile by nature.')
  return Table(f'slack_{name}', 'Rows that other slacks would remove',
               tables.heads('slack', 'rows removed', 'of candidates'), rows, (note,),
               tuple({'slack': slack, 'dropped': count} for slack, count in counts))


def _words(name: str, words: Sequence[tuple[str, float, float]]) -> Table:
  rows = tuple((Cell(word), tables.figure(tables.share(gone), bar=gone),
                tables.figure(tables.share(kept), bar=kept)) for word, gone, kept in words)
  records = tuple({'word': word, 'removed_share': gone, 'kept_share': kept}
                  for word, gone, kept in words)
  return Table(f'words_{name}', '', tables.heads('word', 'of removed captions', 'of kept captions'),
               rows, (), records)


def _control(control: str, about: Mapping[str, Any]) -> list:
  """Returns how well a matched control resembles the removed rows, from its first draw."""
  draw = next(iter(about.get('draws', {}).values()), {})
  if 'standardised_differences' not in draw:
    return []
  without = tables.share(draw['without_full_cell_donor'])
  if draw['no_matched_control']:
    head = Text(f'No matched control exists: {without} of the removed rows have no other row like '
                f'them. {control} is a random split of the same size instead.', 'warning')
  else:
    head = Text(f'The control {control} removes {tables.number(draw["drawn"])} other rows in place '
                f'of {tables.number(draw["removed"])}. {without} of the removed rows had no other '
                f'row just like them; {tables.number(draw["shortfall"])} found none at all.')
  differences = draw['standardised_differences']
  rows = tuple((Cell(VARIABLES.get(key, key)), tables.figure(
      tables.signed(value), tone='' if tables.known(value) and abs(value) < BALANCED else 'bad'))
               for key, value in differences.items())
  table = Table(f'balance_{control}', 'Standardised difference, removed rows and drawn rows',
                tables.heads('variable', 'difference'), rows,
                (f'Balanced: within \u00b1{BALANCED:g}.',),
                tuple({'variable': key, 'difference': v} for key, v in differences.items()))
  return [head, Details('How alike the control\u2019s rows are', (table,))]


def duplicate_blocks(
    dedup: Mapping[str, Any] | None,  # usable, duplicates, clusters, threshold
    planted: Rows,                    # kind, planted, found
    rates: Rows,  # benchmark, queries, pool, anchor, exact_pool, exact_anchor: counts or None
    similarity: float,                # from which a pair counts as near-duplicate
) -> list:
  """Returns what de-duplication found, and how many queries have a duplicate in pool and anchor."""
  blocks: list = []
  if dedup is not None:
    clusters = f'{tables.number(dedup["clusters"])} cluster{"" if dedup["clusters"] == 1 else "s"}'
    blocks.append(Text(
        f'De-duplication marked {tables.number(dedup["duplicates"])} of '
        f'{tables.number(dedup["usable"])} usable pool rows '
        f'({tables.share(dedup["duplicates"] / max(dedup["usable"], 1))}) as near-duplicates of an '
        f'earlier row: similarity over {1 - dedup["threshold"]:.4g} inside one of {clusters}. They '
        'are in no split; the rest are the candidates.'))
  if planted:
    rows = tuple((Cell(p['kind']), tables.figure(tables.number(p['planted'])),
                  tables.figure(tables.number(p['found'])),
                  tables.figure(tables.share(p['found'] / max(p['planted'], 1)))) for p in planted)
    blocks.append(Table('planted_duplicates', 'Duplicates planted in the pool, found again',
                        tables.heads('kind', 'planted', 'found', 'recall'), rows,
                        ('Found: of copy and original, at least one is marked.',), tuple(planted)))
  if rates:
    blocks += [_rates(rates, similarity), Fact(PAPER_DUPLICATES)]
  return blocks


def _rates(rates: Rows, similarity: float) -> Table:
  near, exact = f'at least {similarity:.4g} similar', 'equal bytes or pixels'
  columns = (Cell('benchmark'), tables.figure('queries'), tables.figure('near, in the pool', near),
             tables.figure('exact, in the pool', exact),
             tables.figure('near, in the anchor', near),
             tables.figure('exact, in the anchor', exact))
  keys = ('pool', 'exact_pool', 'anchor', 'exact_anchor')
  rows = tuple((Cell(r['benchmark']), tables.figure(tables.number(r['queries'])),
                *(_rate(r[key], r['queries']) for key in keys)) for r in rates)
  note = ('Near: similarity divided by both vectors\u2019 norms. The threshold belongs to this '
          'embedder.')
  return Table('duplicate_rates', 'Queries with a duplicate', columns, rows, (note,),
               tuple({**r, 'similarity': similarity} for r in rates))


def _rate(count: int | None, queries: int) -> Cell:
  if count is None or not queries:
    return tables.figure(tables.NOTHING)
  return tables.figure(tables.share(count / queries), tables.number(count))


def skipped_blocks(
    datasets: Rows,  # name, rows, skipped [{key, reason}], unreadable [keys] or None (not known)
    replaced: Mapping[str, int],  # run -> images replaced while training
) -> list:
  """Returns every sample that takes no part, and why."""
  rows, records = [], []
  for d in datasets:
    reasons = Counter(item['reason'] for item in d['skipped'])
    said = ', '.join(f'{number} {reason}' for reason, number in sorted(reasons.items()))
    bad = d['unreadable']
    rows.append((Cell(d['name']), tables.figure(tables.number(d['rows'])),
                 tables.figure(tables.number(len(d['skipped']))), Cell(said or tables.NOTHING),
                 tables.figure(tables.NOTHING if bad is None else tables.number(len(bad)))))
    records += [{'dataset': d['name'], **item} for item in d['skipped']]
    records += [{'dataset': d['name'], 'key': key, 'reason': 'unreadable image'}
                for key in bad or ()]
  columns = (Cell('dataset'), tables.figure('rows'), tables.figure('skipped'), Cell('reasons'),
             tables.figure('unreadable images'))
  note = ('Skipped samples never became a row. Rows with an unreadable image keep their number but '
          'are in no split and no search; an unreadable benchmark image counts as wrong.')
  blocks: list = [Table('skipped', '', columns, tuple(rows), (note,), tuple(records))]
  if records:
    more = f'{len(records) - MOST_LISTED} more in skipped.csv.'
    blocks.append(Details('Which', (Table(
        'skipped_list', '', (Cell('dataset'), Cell('key'), Cell('reason')),
        tuple((Cell(r['dataset']), Cell(r['key']), Cell(r['reason']))
              for r in records[:MOST_LISTED]),
        (more,) if len(records) > MOST_LISTED else ()),)))
  late = ', '.join(f'{run}: {number}' for run, number in replaced.items() if number)
  if late:
    blocks.append(Text('Unreadable while training, replaced by the next readable row of the '
                       f'split: {late}.'))
  return blocks


def overlap_blocks(
    names: Sequence[str],
    inside: Array,  # [n, n]: share of the row split's pool rows that the column split holds too
) -> list:
  """Returns the matrix of how far the splits share their pool rows."""
  note = ('Percent of the row split\u2019s pool rows that the column split holds too; drawn splits '
          'by their first draw; anchor rows do not count.')
  return [tables.matrix('overlap', names, inside, (note,))]


def provenance_blocks(
    facts: Sequence[tuple[str, str]],  # what, value
    stages: Rows,                      # stage, seconds
    versions: Mapping[str, str],
    runs: Rows,  # run, samples, passes, steps, seconds, images_per_sec, mark
) -> list:
  """Returns how the results came about: settings, time, runs, versions."""
  blocks: list = [_pairs('settings', facts)]
  if stages:
    rows = tuple((Cell(s['stage']), tables.figure(progress.seconds(s['seconds']))) for s in stages)
    blocks.append(Details('Wall-clock', (Table(
        'wall_clock', 'From the log: all starts of a stage together',
        tables.heads('stage', 'time'), rows, (), tuple(stages)),)))
  if runs:
    heads = tables.heads('run', 'samples seen', 'passes', 'steps', 'time', 'images a second')
    blocks.append(Details('Training runs', (Table(
        'training', '', heads, tuple(map(_run, runs)), (), tuple(runs)),)))
  if versions:
    blocks.append(Details('Packages and devices', (_pairs('versions', versions.items()),)))
  return blocks


def _run(run: Mapping[str, Any]) -> tuple[Cell, ...]:
  numbers = [tables.figure(tables.number(run[key])) for key in ('samples', 'passes', 'steps')]
  time = progress.seconds(run['seconds']) if tables.known(run['seconds']) else tables.NOTHING
  return (Cell(run['run'], run['mark']), *numbers, tables.figure(time),
          tables.figure(tables.number(run['images_per_sec'])))


def _pairs(name: str, pairs) -> Table:
  pairs = list(pairs)
  return Table(name, '', (), tuple((Cell(what), Cell(value)) for what, value in pairs), (),
               tuple({'what': what, 'value': value} for what, value in pairs))
