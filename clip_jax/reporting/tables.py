"""Tables of the report: cells for the page, tidy records for report/tables/*.csv, written numbers.

Values in records are proportions in 0..1, as in every file; cells show percent with one decimal.
An estimate here is anything with value, low, high and method, as the statistics give it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
from dataclasses import dataclass
import io
import math
from typing import Any

from clip_jax.core.types import Array

MINUS = '\u2212'
NOTHING = '\u2013'  # an en dash: no value here


@dataclass(frozen=True)
class Cell:
  text: str
  detail: str = ''  # smaller lines below
  tone: str = ''  # '' | 'muted' | 'bad' | 'strong' | 'flag' (a dagger: see the note)
  bar: float | None = None  # 0..1: a bar behind the number
  shade: float | None = None  # 0..1: how deep the ground is, in matrices
  number: bool = False  # right-aligned


@dataclass(frozen=True)
class Table:
  name: str  # of the CSV file
  caption: str
  columns: tuple[Cell, ...]
  rows: tuple[tuple[Cell, ...], ...]
  notes: tuple[str, ...] = ()
  records: tuple[Mapping[str, Any], ...] = ()
  stacked: bool = False  # on a phone a row is a small block, not a line to scroll
  kind: str = 'table'


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
  """Returns tidy CSV: a line a record, columns in order of first appearance, full precision."""
  columns = list(dict.fromkeys(key for record in records for key in record))
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(columns)
  for record in records:
    writer.writerow([_plain(record.get(column)) for column in columns])
  return out.getvalue()


def _plain(value: Any) -> Any:
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return ''
  return repr(float(value)) if isinstance(value, float) else value


def known(*values: float | None) -> bool:
  """True where every value is there and finite."""
  return all(value is not None and math.isfinite(value) for value in values)


def percent(value: float | None, decimals: int = 1) -> str:
  """0.6234 -> '62.3'; the unit stands in the head or beside it."""
  return _signed(f'{100 * value:.{decimals}f}') if known(value) else NOTHING


def share(value: float | None) -> str:
  """0.031 -> '3.1 %', 0.0004 -> '0.04 %': rates keep two digits where they are small."""
  if not known(value):
    return NOTHING
  return f'{percent(value, 2 if 0 < abs(value) < 0.005 else 1)} %'


def bracket(
  low: float | None, high: float | None, written: Callable[[float], str] = percent
) -> str:
  """Returns '[2.9, 3.3]'; '' where a bound is not known."""
  return f'[{written(low)}, {written(high)}]' if known(low, high) else ''


def share_text(e: Any) -> str:
  """Returns a rate with its interval in one line, '3.1 % [2.9, 3.3]', with equal digits."""
  return NOTHING if e is None else f'{share(e.value)} {share_bounds(e)}'.strip()


def share_bounds(e: Any) -> str:
  """Returns the interval of a rate, '[2.9, 3.3]', with the digits of `share`; '' without."""
  decimals = 2 if known(e.high) and e.high < 0.005 or 0 < e.value < 0.005 else 1
  return bracket(e.low, e.high, lambda bound: percent(bound, decimals))


def points(value: float | None) -> str:
  """0.012 -> '+1.2': a difference of accuracies in percentage points."""
  return _signed(f'{100 * value:+.1f}') if known(value) else NOTHING


def similarity(value: float | None, decimals: int = 3) -> str:
  """0.9312 -> '0.931'."""
  return _signed(f'{value:.{decimals}f}') if known(value) else NOTHING


def signed(value: float | None, decimals: int = 3) -> str:
  """0.0512 -> '+0.051'."""
  return _signed(f'{value:+.{decimals}f}') if known(value) else NOTHING


def slack(value: float) -> str:
  """0.01 -> '+0.01', 0.0 -> '0': the head of a column of slacks."""
  return f'{value:+g}'.replace('-', MINUS) if value else '0'


def number(value: float | None, digits: int = 3) -> str:
  """Integers with thousands separators, else `digits` significant digits."""
  if not known(value):
    return NOTHING
  if float(value).is_integer() and abs(value) < 1e15:
    return f'{int(value):,}'.replace('-', MINUS)
  return f'{value:.{digits}g}'.replace('-', MINUS)


def ratio(value: float) -> str:
  """1.0234 -> '1.02', 12.3 -> '12', 18000.0 -> '> 1,000': odds are rough, and far off unbounded."""
  if value > 1000:
    return '> 1,000'
  return f'{value:.2f}' if value < 9.995 else f'{value:.0f}'


def probability(value: float | None) -> str:
  """0.0321 -> 'p = 0.032', tiny -> 'p < 0.001', absent -> ''."""
  if not known(value):
    return ''
  return 'p < 0.001' if value < 0.001 else f'p = {value:.3f}'


def _signed(text: str) -> str:
  """Writes a minus sign, and no sign where every digit is 0."""
  return text.lstrip('-+') if not text.strip('-+0.') else text.replace('-', MINUS)


def bounds(estimate: Any, written: Callable[[float], str] = percent) -> str:
  """'[59.1, 65.4]'; '(seeds: 59.1 to 65.4)' where two seeds give only a range; '' without."""
  found = '' if estimate is None else bracket(estimate.low, estimate.high, written)
  if found and estimate.method == 'range':
    return f'(seeds: {written(estimate.low)} to {written(estimate.high)})'
  return found


def estimate_text(estimate: Any, written: Callable[[float], str] = points) -> str:
  """Returns 'value [low, high]' in one line."""
  if estimate is None or not known(estimate.value):
    return NOTHING
  return f'{written(estimate.value)} {bounds(estimate, written)}'.strip()


def method_words(method: str) -> str:
  """Returns what an interval is, in words."""
  return {
    'crossed': '95 % interval over seeds and images',
    'range': 'range of two seeds',
    'this checkpoint': 'this checkpoint, 95 % interval over images',
  }.get(method, '')


def sentence(text: str) -> str:
  """'not estimable: few' -> 'Not estimable: few.'"""
  return f'{text[:1].upper()}{text[1:].rstrip(".")}.'


def listed(names: Sequence[str]) -> str:
  """Returns 'a, b and c'."""
  return f'{", ".join(names[:-1])} and {names[-1]}' if len(names) > 1 else ''.join(names)


def heads(*texts: str) -> tuple[Cell, ...]:
  """Returns column heads: the first stands over text, the others over numbers."""
  return tuple(Cell(text, number=i > 0) for i, text in enumerate(texts))


def figure(text: str, detail: str = '', **kwargs: Any) -> Cell:
  """Returns a right-aligned cell."""
  return Cell(text, detail, number=True, **kwargs)


def accuracy_cell(estimate: Any, flagged: bool) -> Cell:
  """Returns an accuracy with its interval below; a flagged one gets a dagger."""
  if estimate is None:
    return figure(NOTHING, tone='muted')
  return figure(percent(estimate.value), bounds(estimate), tone='flag' if flagged else '')


def matrix(
  name: str,
  labels: Sequence[str],
  values: Array,  # [n, n] shares, row by column
  notes: Iterable[str] = (),
) -> Table:
  """Returns a shaded square table: the share of what the row holds that the column holds too."""

  def cell(i: int, j: int) -> Cell:
    value = float(values[i][j])
    return figure(
      percent(value, 0), tone='muted' if i == j else '', shade=None if i == j else value
    )

  places = range(len(labels))
  return Table(
    name,
    '',
    heads('share of \u2026 also in \u2026', *labels),
    tuple((Cell(labels[i]), *(cell(i, j) for j in places)) for i in places),
    tuple(notes),
    tuple(
      {'split': labels[i], 'also_in': labels[j], 'share': float(values[i][j])}
      for i in places
      for j in places
    ),
  )


def bars(
  name: str,
  caption: str,
  first: str,  # the head of the first column
  entries: Sequence[Mapping[str, Any]],  # what, count, total
  most: int,
) -> Table:
  """Returns shares of each kind with a bar behind the number: the `most` first on the page."""
  rows = tuple(
    (
      Cell(str(e['what'])),
      figure(number(e['count'])),
      figure(number(e['total'])),
      figure(share(e['count'] / e['total']), bar=e['count'] / e['total']),
    )
    for e in entries[:most]
    if e['total']
  )
  return Table(
    name,
    caption,
    heads(first, 'removed', 'of', 'share removed'),
    rows,
    first_of(most, len(entries)),
    tuple(entries),
  )


def first_of(most: int, count: int, what: str = '') -> tuple[str, ...]:
  """Returns the note below a table that shows `most` rows of more; () where it shows all."""
  noun = f' {what}' if what else ''
  return (f'The first {most} of {count}{noun}; all are in the CSV.',) if count > most else ()
