"""Plain results -> the report's table of the answer under each embedder, side by side.

Estimates may be of any type with the fields of tables.ESTIMATE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.page import Heading
from clip_jax.reporting.tables import NOTHING, Cell, Table

# A row is one aligned split on one of its own benchmarks. Missing values are None.
#   benchmark, split, control: names    queries: the queries in words if not all; else ''
#   embedder: a further embedder, '' for the main one    name: the embedder in words
#   removed, candidates, also_removed (by the main embedder's split, too): counts of rows
#   balance: kind: 'matched' | 'random' | 'base'; unbalanced: names of what differs
#   loss: estimate of the split minus its control    share: E', an estimate with a reason
Row = Mapping[str, Any]

KINDS = {'matched': 'matched rows', 'random': 'random rows', 'base': 'no control'}
NOTE = (
  'Cosines of different embedders are not comparable: each embedder has its own thresholds and '
  'removes its own number of rows, on which a loss depends, too. No row is a test of one embedder '
  'against another. Also removed: rows that the split of the main embedder removes as well; a '
  'count, and therefore without an interval. Difference: aligned split minus control. E\u2032: '
  'share of the control\u2019s lead over the reference that is lost.'
)


def blocks_of(rows: Sequence[Row]) -> list:
  """Returns the table of the answer under each embedder; [] without rows."""
  if not rows:
    return []
  heads = (
    Cell('benchmark', 'split'),
    Cell('embedder'),
    tables.number_cell('rows removed', 'of the candidates'),
    tables.number_cell('also removed', 'under the main embedder\nof the rows removed'),
    Cell('control', 'its balance'),
    Cell('difference, points', 'what it rests on'),
    Cell('E\u2032'),
  )
  known = [row for row in rows if row['loss'] is not None]
  notes = (NOTE, *tables.few_groups({row['benchmark']: row['loss'].groups for row in known}))
  return [
    Heading('The answer under each embedder'),
    Table('embedders', '', heads, tuple(map(_cells, rows)), notes, tuple(map(_record, rows))),
  ]


def _cells(row: Row) -> tuple[Cell, ...]:
  loss = row['loss']
  return (
    Cell(row['queries'] or row['benchmark'], row['split']),
    Cell(row['name']),
    _count_cell(row['removed'], row['candidates']),
    _count_cell(row['also_removed'], row['removed']),
    Cell(NOTHING if row['control'] is None else row['control'], _balance_words(row)),
    Cell(tables.estimate_text(loss), '' if loss is None else tables.basis(loss)),
    _share_cell(row['share']),
  )


def _count_cell(count: int | None, total: int | None) -> Cell:
  share = tables.share(count / total) if count is not None and total else ''
  return tables.number_cell(tables.number(count), share)


def _balance_words(row: Row) -> str:
  if row['balance'] is None:
    return ''
  unlike = progress.join_names(row['balance'].unbalanced)
  return f'{KINDS[row["balance"].kind]}, {f"different in {unlike}" if unlike else "balanced"}'


def _share_cell(share: Any) -> Cell:
  if share is None:
    return Cell(NOTHING, 'it needs a control and the anchor alone, evaluated')
  if share.reason:
    return Cell(NOTHING, share.reason)
  whole = lambda value: tables.percent(value, 0)
  return Cell(f'{whole(share.value)} % {tables.bounds(share, whole)}'.strip())


def _record(row: Row) -> dict[str, Any]:
  """Returns the row for the CSV, in proportions."""
  loss, share, balance = row['loss'], row['share'], row['balance']
  rule = None if balance is None else {'base': 'all'}.get(balance.kind, balance.kind)
  names = ('benchmark', 'split', 'embedder', 'removed', 'candidates', 'also_removed', 'control')
  return {
    **{key: row[key] for key in names},
    'control_rule': rule,
    'unbalanced': balance and '; '.join(balance.unbalanced),
    **(dict.fromkeys(tables.ESTIMATE) if loss is None else tables.estimate_record(loss)),
    **{
      f'share_{key}': share and getattr(share, key)
      for key in ('value', 'low', 'high', 'method', 'reason')
    },
  }
