"""Plain results -> the report's sections on the data: de-duplication, skipped, overlap, provenance.

Counts and proportions are plain dicts, as the stages write them to the work directory.
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

MOST_COLUMNS = 10  # larger matrices are collapsed
MOST_LISTED = 40  # lines of a list on the page; the CSV holds all
_UNREADABLE = 'unreadable image'
SURVIVORS = {  # dedup.survivor -> which row is kept
  'first': 'Among near-duplicates, the first row in pool order is kept.',
  'largest': 'Among near-duplicates, the row with the largest image is kept.',
  'longest': 'Among near-duplicates, the row with the longest caption is kept.',
  'best': 'Among near-duplicates, the row whose image and caption agree best is kept.',
}


def dedup_blocks(
  dedup: Mapping[str, Any] | None,  # usable, duplicates, clusters, threshold, survivor, embedder
  planted: Rows,  # kind, planted, found, recall, low, high
  missed: Mapping[str, Any] | None,  # dedup/audit.json
) -> list:
  """Returns the number of duplicates, which copy is kept, and the recall of de-duplication."""
  blocks: list = []
  if dedup is not None:
    other = f' of the embedder {dedup["embedder"]}' if dedup['embedder'] else ''
    blocks.append(
      Text(
        f'De-duplication marked {tables.number(dedup["duplicates"])} of '
        f'{tables.number(dedup["usable"])} usable pool rows '
        f'({tables.share(dedup["duplicates"] / max(dedup["usable"], 1))}) as near-duplicates of '
        f'another row: similarity{other} over {1 - dedup["threshold"]:.4g} within one of '
        f'{progress.count_with_noun(dedup["clusters"], "cluster")}. Marked rows are in no split; '
        f'the other rows are the candidates. {SURVIVORS[dedup["survivor"]]}'
      )
    )
  if planted:
    rows = tuple(
      (
        Cell(p['kind']),
        tables.number_cell(tables.number(p['planted'])),
        tables.number_cell(tables.number(p['found'])),
        tables.number_cell(tables.share(p['recall']), tables.bracket(p['low'], p['high'])),
      )
      for p in planted
    )
    blocks.append(
      Table(
        'planted_duplicates',
        'Recall of duplicates planted in the pool',
        tables.column_heads('kind', 'planted', 'found', 'recall'),
        rows,
        (
          'Found: the copy or its original is marked. Brackets: 95 % Wilson intervals, in percent, '
          'over the planted copies, each on its own.',
        ),
        tuple(planted),
      )
    )
  return blocks + (_missed_duplicates(missed) if missed else [])


def _missed_duplicates(missed: Mapping[str, Any]) -> list:
  """Returns the share of all duplicate pairs that lie within clusters, and the chains."""
  points, sample = missed['by_clusters'], f'random sample of {tables.number(missed["rows"])} rows'
  heads = tables.column_heads('clusters', 'pairs found', 'recall', 'rows marked', 'precision')
  rows = tuple(
    (
      Cell(tables.number(p['clusters']), 'as de-duplicated' if p is points[-1] else ''),
      tables.number_cell(tables.number(p['found'])),
      tables.number_cell(tables.share(p['recall']), tables.bracket(p['low'], p['high'])),
      tables.number_cell(tables.number(p['dropped'])),
      tables.number_cell(tables.share(p['precision'])),
    )
    for p in points
  )
  note = (
    f'Recall: share of the {tables.number(missed["pairs"])} pairs (a sampled row and any pool row) '
    'that exhaustive search finds. Precision: share of the marked rows that exhaustive search '
    f'marks too; it marks {tables.number(missed["dropped_exhaustive"])} of the sampled rows. '
    'Brackets: 95 % intervals, in percent, over pairs of one sample (Wilson, n: the pairs). '
    'Precision is a count over the sample.'
  )
  table = Table(
    'dedup_audit', 'Duplicate pairs found within clusters', heads, rows, (note,), tuple(points)
  )
  blocks: list = [Heading('Duplicates missed by the clusters', sample)]
  if len(points) > 1 and missed['pairs']:
    drawn = curves.recall_by_clusters(points, title='Duplicate pairs found')
    blocks.append(
      Figures(
        (
          Figure(
            'dedup_recall',
            drawn,
            (
              'A pair is found if both rows are in the same cluster. More clusters are faster but '
              'miss more pairs. Bars: 95 % intervals.'
            ),
          ),
        )
      )
    )
  return [*blocks, table, *_group_sizes(missed['chains'])]


def _group_sizes(chains: Mapping[str, Any]) -> list:
  """Returns the sizes of the groups that duplicate pairs join."""
  summary = Text(
    f'The pairs join rows into {progress.count_with_noun(chains["components"], "group")}; the '
    f'largest has {progress.count_with_noun(chains["largest"], "row")}. '
    f'{tables.number(chains["through_dropped"])} of the sampled rows are marked although they are '
    'duplicates of marked rows only: no kept row is their duplicate.'
  )
  sizes = [
    {'rows': size, 'groups': count}
    for size, count in sorted((int(size), n) for size, n in chains['sizes'].items())
  ]
  if not sizes:
    return [summary]
  rows = tuple(
    (Cell(tables.number(entry['rows'])), tables.number_cell(tables.number(entry['groups'])))
    for entry in sizes[:MOST_LISTED]
  )
  table = Table(
    'dedup_chains',
    '',
    tables.column_heads('rows in a group', 'groups'),
    rows,
    tables.first_of(MOST_LISTED, len(sizes), 'sizes'),
    tuple(sizes),
  )
  return [summary, Details('Groups by size', (table,))]


def skipped_blocks(
  # name, rows, skipped [{key, reason}], unreadable [keys] or None (not known), and for vectors
  # unreadable_reason
  datasets: Rows,
  replaced: Mapping[str, int],  # run -> images replaced while training
) -> list:
  """Returns the skipped samples and unreadable images, with reasons."""
  rows = tuple(
    (
      Cell(d['name']),
      tables.number_cell(tables.number(d['rows'])),
      tables.number_cell(tables.number(len(d['skipped']))),
      Cell(_reasons(d['skipped'])),
      tables.number_cell(
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
      *(
        {'key': key, 'reason': d.get('unreadable_reason', _UNREADABLE)}
        for key in d['unreadable'] or ()
      ),
    )
  )
  has_vectors = any(d.get('unreadable_reason', _UNREADABLE) != _UNREADABLE for d in datasets)
  columns = (
    Cell('dataset'),
    tables.number_cell('rows'),
    tables.number_cell('skipped'),
    Cell('reasons'),
    tables.number_cell('unusable rows' if has_vectors else 'unreadable images'),
  )
  note = (
    'Skipped samples have no row number. Rows with an unreadable image keep their row number, but '
    'no split and no search uses them. An unreadable benchmark image counts as misclassified.'
  )
  if has_vectors:
    note += (
      ' A row of vectors is unusable, too, if its vector holds a NaN or an infinity, is all zeros '
      'or is missing.'
    )
  blocks: list = [Table('skipped', '', columns, rows, (note,), records)]
  if records:
    more = f'{len(records) - MOST_LISTED} more in skipped.csv.'
    blocks.append(
      Details(
        f'List of skipped samples and {"unusable rows" if has_vectors else "unreadable images"}',
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
      Text(
        'Images unreadable during training, replaced by the next readable row of the split: '
        f'{late}.'
      )
    )
  return blocks


def _reasons(skipped: Rows) -> str:  # key, reason
  counts = sorted(Counter(item['reason'] for item in skipped).items())
  return (
    ', '.join(f'{reason}: {tables.number(number)}' for reason, number in counts) or tables.NOTHING
  )


def overlap_blocks(
  names: Sequence[str],
  inside: Array,  # [n, n]: share of the row split's pool rows that the column split holds too
) -> list:
  """Returns the matrix of shared pool rows between splits."""
  note = (
    'Percent of the row split\u2019s pool rows that the column split also contains: a count over '
    'all rows, without an interval. Random and '
    'matched splits: first draw only. Anchor rows are not counted.'
  )
  table = tables.matrix('overlap', names, inside, (note,))
  is_large = len(names) > MOST_COLUMNS
  return [Details(f'Overlap between {len(names)} splits', (table,)) if is_large else table]


def provenance_blocks(
  facts: Sequence[tuple[str, str]],  # what, value
  stages: Rows,  # stage, seconds
  versions: Mapping[str, str],
  runs: Rows,  # run, samples, passes, steps, seconds, images_per_sec, mark
) -> list:
  """Returns the provenance of the results: settings, time, runs, versions."""
  blocks: list = [_pairs('settings', facts)]
  if stages:
    rows = tuple(
      (Cell(s['stage']), tables.number_cell(progress.seconds(s['seconds']), value=s['seconds']))
      for s in stages
    )
    blocks.append(
      Details(
        'Wall-clock time',
        (
          Table(
            'wall_clock',
            'Wall-clock time per stage, summed over all runs of the stage (from the log)',
            tables.column_heads('stage', 'time'),
            rows,
            (),
            tuple(stages),
          ),
        ),
      )
    )
  if runs:
    heads = tables.column_heads('run', 'samples seen', 'passes', 'steps', 'time', 'images/s')
    blocks.append(
      Details(
        'Training runs', (Table('training', '', heads, tuple(map(_run, runs)), (), tuple(runs)),)
      )
    )
  if versions:
    blocks.append(Details('Packages and devices', (_pairs('versions', versions.items()),)))
  return blocks


def _run(run: Mapping[str, Any]) -> tuple[Cell, ...]:
  time = progress.seconds(run['seconds']) if tables.is_known(run['seconds']) else tables.NOTHING
  return (
    Cell(run['run'], run['mark']),
    *(tables.number_cell(tables.number(run[key])) for key in ('samples', 'passes', 'steps')),
    tables.number_cell(time, value=run['seconds']),
    tables.number_cell(tables.number(run['images_per_sec'])),
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
