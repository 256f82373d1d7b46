"""Plain differences -> the report's collateral table: every split on every benchmark.

Estimates may be of any type with the fields of tables.ESTIMATE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.tables import Cell, Table

Item = Mapping[str, Any]
# An item is one split against another one:
#   split, rule, against: names           budgets: of both, 'samples' or 'epochs'
#   shown: the split's name on the page
#   own: benchmarks whose queries choose its rows
#   differences: benchmark -> an estimate, split minus the other


def blocks_of(items: Sequence[Item], benchmarks: Sequence[str]) -> list:
  """Returns a table with a row for each item and a column for each benchmark; [] without items."""
  shown = [b for b in benchmarks if any(b in item['differences'] for item in items)]
  if not shown:
    return []
  rows = tuple(
    (
      Cell(item['shown'], f'minus {item["against"]}'),
      *(_cell(item['differences'].get(b), b in item['own']) for b in shown),
    )
    for item in items
  )
  records = tuple(
    {
      'split': item['split'],
      'rule': item['rule'],
      'against': item['against'],
      'benchmark': b,
      'own_benchmark': b in item['own'],
      'budget': item['budgets'][0],
      'budget_of_other': item['budgets'][1],
      **tables.estimate_record(estimate),
    }
    for item in items
    for b, estimate in item['differences'].items()
  )
  columns = tables.column_heads('split', *shown)
  return [Table('collateral', '', columns, rows, _notes(items, shown), records)]


def _cell(estimate: Any, is_own: bool) -> Cell:
  if estimate is None:
    return tables.number_cell(tables.NOTHING, tone='muted')
  return tables.number_cell(
    tables.points(estimate.value),
    tables.bounds(estimate, tables.points),
    tone='strong' if is_own else '',
  )


def _notes(items: Sequence[Item], benchmarks: Sequence[str]) -> tuple[str, ...]:
  """Returns what the numbers are, what they rest on, and which pairs differ in budget."""
  by_benchmark = {
    b: [item['differences'][b] for item in items if b in item['differences']] for b in benchmarks
  }
  every = [e for estimates in by_benchmark.values() for e in estimates]
  seeds = sorted({e.seeds for e in every})
  counts = f'{seeds[0]} to {seeds[-1]} seeds'
  if len(seeds) == 1:
    counts = progress.count_with_noun(seeds[0], 'seed')
  basis = '; '.join(
    ', '.join(
      filter(None, [f'{b}: {tables.images_in_groups(e[0])}', tables.degrees(*(d.df for d in e))])
    )
    for b, e in by_benchmark.items()
  )
  unequal = [
    f'{item["shown"]} minus {item["against"]}'
    for item in items
    if item['budgets'][0] != item['budgets'][1]
  ]
  notes = [
    'Differences of accuracy in points, on all images of a benchmark, with 95 % intervals over '
    'seeds and images. Bold: benchmarks whose queries choose the rows of the split. These are '
    'estimates, not tests: they are in no family and support no claim.',
    f'Intervals rest on {counts}. {basis}.',
  ]
  if any(e.method == 'range' for e in every):
    notes.append('Two seeds: in brackets the lower and the higher difference, no interval.')
  if any(e.method == 'this checkpoint' for e in every):
    notes.append('One seed: the interval is over images, for these two checkpoints.')
  if unequal:
    notes.append(
      f'Different budgets, equal passes against equal samples: {progress.join_names(unequal)}.'
    )
  return (*notes, *tables.few_groups({b: e[0].groups for b, e in by_benchmark.items()}))
