"""Plain results -> the report's sections on the data: de-duplication, skipped, overlap, provenance.

Counts and proportions come in as plain dicts, as the stages leave them in the work directory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.core.types import Array
from clip_jax.reporting import curves, tables
from clip_jax.reporting.page import Details, Figure, Figures, Heading, Text
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

MOST_COLUMNS = 10  # of a matrix that is shown at once
MOST_LISTED = 40  # lines of a list on the page; the CSV holds all
SURVIVORS = {  # dedup.survivor -> which of near-duplicates stays
  'first': 'Of near-duplicates the first in the pool\u2019s order stays.',
  'largest': 'Of near-duplicates the largest image stays.',
  'longest': 'Of near-duplicates the one with the longest caption stays.',
  'best': 'Of near-duplicates the one whose image and caption agree best stays.',
}


def dedup_blocks(
  dedup: Mapping[str, Any] | None,  # usable, duplicates, clusters, threshold, survivor, embedder
  planted: Rows,  # kind, planted, found, recall, low, high
  audit: Mapping[str, Any] | None,  # dedup/audit.json
) -> list:
  """Returns what de-duplication found in the pool, which copy stays, and how much it overlooks."""
  blocks: list = []
  if dedup is not None:
    other = f' of the embedder {dedup["embedder"]}' if dedup['embedder'] else ''
    blocks.append(
      Text(
        f'De-duplication marked {tables.number(dedup["duplicates"])} of '
        f'{tables.number(dedup["usable"])} usable pool rows '
        f'({tables.share(dedup["duplicates"] / max(dedup["usable"], 1))}) as near-duplicates of '
        f'another row: similarity{other} over {1 - dedup["threshold"]:.4g} inside one of '
        f'{progress.counted(dedup["clusters"], "cluster")}. They are in no split; the rest are the '
        'candidates. '
        f'{SURVIVORS[dedup["survivor"]]}'
      )
    )
  if planted:
    rows = tuple(
      (
        Cell(p['kind']),
        tables.figure(tables.number(p['planted'])),
        tables.figure(tables.number(p['found'])),
        tables.figure(tables.share(p['recall']), tables.bracket(p['low'], p['high'])),
      )
      for p in planted
    )
    blocks.append(
      Table(
        'planted_duplicates',
        'Duplicates planted in the pool, found again',
        tables.heads('kind', 'planted', 'found', 'recall'),
        rows,
        (
          'Found: of copy and original, at least one is marked. In brackets: 95 % '
          'intervals, in percent (Wilson\u2019s).',
        ),
        tuple(planted),
      )
    )
  return blocks + (_audit(audit) if audit else [])


def _audit(audit: Mapping[str, Any]) -> list:
  """Returns how many duplicate pairs lie inside clusters, of all that there are, and the chains."""
  points, sample = audit['by_clusters'], f'{tables.number(audit["rows"])} rows, drawn at random'
  heads = tables.heads('clusters', 'pairs found', 'recall', 'rows marked', 'precision')
  rows = tuple(
    (
      Cell(tables.number(p['clusters']), 'as de-duplicated' if p is points[-1] else ''),
      tables.figure(tables.number(p['found'])),
      tables.figure(tables.share(p['recall']), tables.bracket(p['low'], p['high'])),
      tables.figure(tables.number(p['dropped'])),
      tables.figure(tables.share(p['precision'])),
    )
    for p in points
  )
  note = (
    f'Of the {tables.number(audit["pairs"])} pairs of a drawn row and any row of the pool '
    'that exhaustive search finds; it would mark '
    f'{tables.number(audit["dropped_exhaustive"])} of the drawn rows. In brackets: 95 % '
    'intervals, in percent. Precision: of the rows marked, those that exhaustive search '
    'marks, too.'
  )
  table = Table(
    'dedup_audit', 'Duplicate pairs found inside clusters', heads, rows, (note,), tuple(points)
  )
  blocks: list = [Heading('How much the clusters overlook', sample)]
  if len(points) > 1 and audit['pairs']:
    drawn = curves.recall_by_clusters(points, title='Duplicate pairs found')
    blocks.append(
      Figures(
        (
          Figure(
            'dedup_recall',
            drawn,
            (
              'A pair is found when both rows lie in one cluster; more clusters are faster and '
              'overlook '
              'more. Bars are 95 % intervals.'
            ),
          ),
        )
      )
    )
  return [*blocks, table, *_chains(audit['chains'])]


def _chains(chains: Mapping[str, Any]) -> list:
  """Returns how far duplicates of duplicates reach."""
  said = Text(
    f'The pairs join rows into {tables.number(chains["components"])} groups, the largest of '
    f'{tables.number(chains["largest"])} rows. {tables.number(chains["through_dropped"])} of '
    'the drawn rows are marked though no row that stays is their duplicate: they are '
    'duplicates of marked rows only.'
  )
  sizes = [
    {'rows': size, 'groups': count}
    for size, count in sorted((int(size), n) for size, n in chains['sizes'].items())
  ]
  if not sizes:
    return [said]
  rows = tuple(
    (Cell(tables.number(one['rows'])), tables.figure(tables.number(one['groups'])))
    for one in sizes[:MOST_LISTED]
  )
  table = Table(
    'dedup_chains',
    '',
    tables.heads('rows in a group', 'groups'),
    rows,
    tables.first_of(MOST_LISTED, len(sizes), 'sizes'),
    tuple(sizes),
  )
  return [said, Details('Groups by size', (table,))]


def skipped_blocks(
  datasets: Rows,  # name, rows, skipped [{key, reason}], unreadable [keys] or None (not known)
  replaced: Mapping[str, int],  # run -> images replaced while training
) -> list:
  """Returns every sample that takes no part, and why."""
  rows = tuple(
    (
      Cell(d['name']),
      tables.figure(tables.number(d['rows'])),
      tables.figure(tables.number(len(d['skipped']))),
      Cell(_reasons(d['skipped'])),
      tables.figure(
        tables.NOTHING if d['unreadable'] is None else tables.number(len(d['unreadable']))
      ),
    )
    for d in datasets
  )
  records = tuple(
    {'dataset': d['name'], **item}
    for d in datasets
    for item in (
      *d['skipped'],
      *({'key': key, 'reason': 'unreadable image'} for key in d['unreadable'] or ()),
    )
  )
  columns = (
    Cell('dataset'),
    tables.figure('rows'),
    tables.figure('skipped'),
    Cell('reasons'),
    tables.figure('unreadable images'),
  )
  note = (
    'Skipped samples never became a row. Rows with an unreadable image keep their number but '
    'are in no split and no search; an unreadable benchmark image counts as wrong.'
  )
  blocks: list = [Table('skipped', '', columns, rows, (note,), records)]
  if records:
    more = f'{len(records) - MOST_LISTED} more in skipped.csv.'
    blocks.append(
      Details(
        'Which',
        (
          Table(
            'skipped_list',
            '',
            (Cell('dataset'), Cell('key'), Cell('reason')),
            tuple(
              (Cell(r['dataset']), Cell(r['key']), Cell(r['reason'])) for r in records[:MOST_LISTED]
            ),
            (more,) if len(records) > MOST_LISTED else (),
          ),
        ),
      )
    )
  late = ', '.join(f'{run}: {number}' for run, number in replaced.items() if number)
  if late:
    blocks.append(
      Text(f'Unreadable while training, replaced by the next readable row of the split: {late}.')
    )
  return blocks


def _reasons(skipped: Rows) -> str:  # key, reason
  counts = sorted(Counter(item['reason'] for item in skipped).items())
  return ', '.join(f'{number} {reason}' for reason, number in counts) or tables.NOTHING


def overlap_blocks(
  names: Sequence[str],
  inside: Array,  # [n, n]: share of the row split's pool rows that the column split holds too
) -> list:
  """Returns the matrix of how far the splits share their pool rows."""
  note = (
    'Percent of the row split\u2019s pool rows that the column split holds too; drawn splits '
    'by their first draw; anchor rows do not count.'
  )
  table = tables.matrix('overlap', names, inside, (note,))
  return [Details(f'{len(names)} splits', (table,)) if len(names) > MOST_COLUMNS else table]


def provenance_blocks(
  facts: Sequence[tuple[str, str]],  # what, value
  stages: Rows,  # stage, seconds
  versions: Mapping[str, str],
  runs: Rows,  # run, samples, passes, steps, seconds, images_per_sec, mark
) -> list:
  """Returns how the results came about: settings, time, runs, versions."""
  blocks: list = [_pairs('settings', facts)]
  if stages:
    rows = tuple((Cell(s['stage']), tables.figure(progress.seconds(s['seconds']))) for s in stages)
    blocks.append(
      Details(
        'Wall-clock',
        (
          Table(
            'wall_clock',
            'From the log: all starts of a stage together',
            tables.heads('stage', 'time'),
            rows,
            (),
            tuple(stages),
          ),
        ),
      )
    )
  if runs:
    heads = tables.heads('run', 'samples seen', 'passes', 'steps', 'time', 'images a second')
    blocks.append(
      Details(
        'Training runs', (Table('training', '', heads, tuple(map(_run, runs)), (), tuple(runs)),)
      )
    )
  if versions:
    blocks.append(Details('Packages and devices', (_pairs('versions', versions.items()),)))
  return blocks


def _run(run: Mapping[str, Any]) -> tuple[Cell, ...]:
  time = progress.seconds(run['seconds']) if tables.known(run['seconds']) else tables.NOTHING
  return (
    Cell(run['run'], run['mark']),
    *(tables.figure(tables.number(run[key])) for key in ('samples', 'passes', 'steps')),
    tables.figure(time),
    tables.figure(tables.number(run['images_per_sec'])),
  )


def _pairs(name: str, pairs) -> Table:
  pairs = list(pairs)
  return Table(
    name,
    '',
    (),
    tuple((Cell(what), Cell(value)) for what, value in pairs),
    (),
    tuple({'what': what, 'value': value} for what, value in pairs),
  )
