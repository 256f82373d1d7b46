"""Plain results -> the report's section on aligned against held-back queries.

A comparison is any object with the fields of evaluation.held_back.Comparison.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.page import Text
from clip_jax.reporting.tables import NOTHING, Cell, Table

Item = Mapping[str, Any]
# An item is one split on one of its benchmarks, against one control. Missing values are None.
#   split, benchmark, control: names    queries: (lo, hi)    control_rule: 'random' | 'all' | ''
#   figures: rows, rows_removed, share_removed, excess_before, excess_after, excess_removed
#   comparison: aligned and held_back, with images, groups, right_pruned, right_control, difference,
#     narrow, is_lost; contrast, narrow, seeds, used, reason, conclusion
#   margin: largest negligible difference    most_removed: largest share with a conclusion

NEEDED = 3  # seeds for a claim
COUNTS = ('images', 'groups', 'right_pruned', 'right_control')  # of a side, in the CSV
FIGURES = (
  'rows',
  'rows_removed',
  'share_removed',
  'excess_before',
  'excess_after',
  'excess_removed',
)
ABOUT = (
  'The queries of a benchmark are split at random, by group. Only the aligned ones, A, count for '
  'pruning; the others, U, are held back. D: accuracy of the split minus accuracy of the control '
  'on these queries. If A loses and U does not, the model needed the neighbours themselves. If '
  'both lose alike, it needed images like these. This assumes that most neighbours of U stayed.'
)
NOTE = (
  'Brackets: 95 % intervals over seeds and images. Alike: the 90 % interval of A minus U lies '
  'within \u00b1{} points. Rows near U: candidates that are nearer to a held-back query than any '
  'anchor image. Mean excess: by how much the nearest training image of a held-back query is '
  'nearer than its nearest anchor image, before and after the removal.'
)


def blocks_of(items: Sequence[Item]) -> list:
  """Returns one sentence for each comparison, and the table of all."""
  said = [Text(f'{head(item)}: {words(item)}') for item in items if item['comparison'] is not None]
  return [Text(ABOUT, 'muted'), *said, _table(items)]


def summary_lines(items: Sequence[Item]) -> list[str]:
  """Returns the lines of the summary for the terminal; [] without a comparison."""
  lines = []
  for item in items:
    c = item['comparison']
    if c is not None:
      sides = '; '.join(f'{name}: {_side_text(c, side)}' for name, side in _sides(c))
      au = '' if c.contrast is None else f'; A minus U: {tables.estimate_text(c.contrast)} points'
      lines += [f'{head(item)}: {sides}{au}.', f'  {tables.sentence(words(item))}']
  return lines


def head(item: Item) -> str:
  """Returns the subject of a sentence: split, benchmark and control."""
  return f'{item["split"]} on {item["benchmark"]}, against {item["control"]}'


def words(item: Item) -> str:
  """Returns the conclusion of a comparison as a sentence without its subject."""
  c = item['comparison']
  if c.conclusion == 'cannot tell':
    f = item['figures']
    return (
      'the comparison cannot tell, because the neighbours of the held-back queries went, too, '
      f'although only the aligned queries counted: {tables.share(f["share_removed"])} of the rows '
      'that are nearer to a held-back query than any anchor image, and '
      f'{tables.share(f["excess_removed"])} of the mean excess of these queries (at most '
      f'{tables.percent(item["most_removed"], 0)} % may go).'
    )
  if c.conclusion == 'domain':
    size = '' if item['control_rule'] == 'random' else ' (or size\u2019s, see random)'
    return (
      'aligned and held-back queries lost alike. The loss is the domain\u2019s'
      f'{size}: images like these were needed, not these neighbours.'
    )
  if c.conclusion == 'instance':
    return (
      'the aligned queries lost and the held-back queries did not. This is instance similarity: '
      f'the model needed the neighbours themselves.{_open_loss(c.held_back.narrow, item["margin"])}'
    )
  return f'undetermined: {_why(c, item["margin"])}.'


def _open_loss(narrow: Any, margin: float) -> str:
  """Returns the loss of the held-back queries that the runs do not exclude, '' if it is small."""
  if narrow.low > -margin:
    return ''
  return (
    f' A loss of the held-back queries of up to {tables.percent(-narrow.low)} points (90 % '
    'interval) is not excluded.'
  )


def _why(c: Any, margin: float) -> str:
  """Returns why nothing is concluded."""
  if c.reason:
    return c.reason
  if c.seeds < NEEDED:
    return f'{progress.count_with_noun(c.seeds, "seed")}; a claim needs {NEEDED}'
  if not c.aligned.is_lost:
    return 'no loss on the aligned queries is shown'
  if c.held_back.is_lost:
    return f'both lost, but not shown to be alike within \u00b1{tables.percent(margin, 0)} points'
  return 'the aligned queries lost, but not shown to have lost more than the held-back queries'


def _sides(c: Any) -> list[tuple[str, Any]]:
  return [('A', c.aligned), ('U', c.held_back)]


def _side_text(c: Any, side: Any) -> str:
  """Returns D of a side or, with few groups, its counts."""
  if side.difference is not None:
    return f'{tables.estimate_text(side.difference)} points'
  total = tables.number(side.images * c.seeds)
  return (
    f'{tables.number(side.right_pruned)} of {total} right, '
    f'{tables.number(side.right_control)} with the control'
  )


def _table(items: Sequence[Item]) -> Table:
  heads = (
    Cell('split', 'benchmark, control'),
    Cell('D(A), aligned', 'points'),
    Cell('D(U), held back', 'points'),
    Cell('A minus U', 'points, class mix of A'),
    Cell('rows near U removed', 'although only A counts'),
    Cell('mean excess of U', 'before and after'),
  )
  records = tuple(record for item in items for record in _records(item))
  note = NOTE.format(tables.percent(items[0]['margin'], 0))
  return Table('held_back', '', heads, tuple(map(_row, items)), (note,), records)


def _row(item: Item) -> tuple[Cell, ...]:
  c, f = item['comparison'], item['figures']
  name = Cell(item['split'], ', '.join(filter(None, (item['benchmark'], item['control']))))
  compared = [Cell(NOTHING)] * 3
  if c is not None:
    compared = [*(_side_cell(c, side) for _, side in _sides(c)), _contrast_cell(c)]
  if f is None:
    return (name, *compared, Cell(NOTHING), Cell(NOTHING))
  counts = f'{tables.number(f["rows_removed"])} of {tables.number(f["rows"])}'
  excess = f'{tables.signed(f["excess_before"])} to {tables.signed(f["excess_after"])}'
  went = f'{tables.share(f["excess_removed"])} went'
  return (name, *compared, Cell(tables.share(f['share_removed']), counts), Cell(excess, went))


def _side_cell(c: Any, side: Any) -> Cell:
  if side.difference is None:
    return Cell(_side_text(c, side), progress.count_with_noun(side.groups, 'group'))
  return Cell(f'{tables.estimate_text(side.difference)}', _size(side.difference))


def _contrast_cell(c: Any) -> Cell:
  if c.contrast is None:
    return Cell(NOTHING, c.reason)
  narrow = tables.bracket(c.narrow.low, c.narrow.high, tables.points)
  is_crossed = c.contrast.method == 'crossed'
  lines = [_size(c.contrast), *([f'90 % {narrow}'] if is_crossed else [])]
  if c.used < 1:
    lines.append(f'{tables.share(c.used)} of A, in classes that both have')
  return Cell(tables.estimate_text(c.contrast), '\n'.join(lines))


def _size(e: Any) -> str:
  """Returns the numbers behind an interval: images, groups, seeds and degrees of freedom."""
  df = f', {tables.number(e.df)} degrees of freedom' if tables.is_known(e.df) else ''
  return (
    f'{progress.count_with_noun(e.images, "image")}, '
    f'{progress.count_with_noun(e.groups, "group")}, '
    f'{progress.count_with_noun(e.seeds, "seed")}{df}'
  )


def _records(item: Item) -> list[dict]:
  """Returns tidy records in proportions: D(A), D(U) and AU, with the figures of the split."""
  c, figures, (low, high) = item['comparison'], item['figures'] or {}, item['queries']
  parts = {
    'D_aligned': c and c.aligned,
    'D_held_back': c and c.held_back,
    'A_minus_U': None,
  }
  return [
    {key: item[key] for key in ('split', 'benchmark', 'control', 'control_rule')}
    | {'queries_from': low, 'queries_to': high, 'what': what}
    | _estimate(side.difference if side else c and c.contrast)
    | {key: getattr(side, key, None) for key in COUNTS}
    | {'seeds': c and c.seeds}
    | {key: figures.get(key) for key in FIGURES}
    | {'conclusion': c and c.conclusion}
    for what, side in parts.items()
  ]


def _estimate(e: Any) -> dict:
  return {key: getattr(e, key, None) for key in ('value', 'low', 'high', 'df', 'method')}
