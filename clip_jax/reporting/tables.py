"""Tables of the report: cells for the page, records for report/tables/*.csv, number formats.

Values in records are proportions in 0..1, as in every file; cells show percent with one decimal.
An estimate is any object with the fields value, low, high, method, seeds, images, groups and df.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
from dataclasses import dataclass
import io
import math
from typing import Any, TypeGuard

from clip_jax.core import progress
from clip_jax.core.types import Array

FEW_GROUPS = 12  # with fewer, an interval may cover less than 93 % (docs/statistics.md)
ESTIMATE = ('value', 'low', 'high', 'method', 'seeds', 'images', 'groups', 'df')
MINUS = '\u2212'
NOTHING = '\u2013'  # an en dash: no value


@dataclass(frozen=True)
class Cell:
  text: str
  detail: str = ''  # smaller lines below
  tone: str = ''  # '' | 'muted' | 'bad' | 'strong' | 'flag' (a dagger: see the note)
  bar: float | None = None  # 0..1: length of a bar behind the number
  shade: float | None = None  # 0..1: depth of the background colour, in matrices
  number: bool = False  # right-aligned
  value: float | None = None  # what sorts the column, where the text does not begin with it


@dataclass(frozen=True)
class Table:
  name: str  # of the CSV file
  caption: str
  columns: tuple[Cell, ...]
  rows: tuple[tuple[Cell, ...], ...]
  notes: tuple[str, ...] = ()
  records: tuple[Mapping[str, Any], ...] = ()
  latex: str = ''  # of report/tables/NAME.tex; '' for none
  stacked: bool = False  # on a phone, each row is a block instead of a scrolled line
  kind: str = 'table'


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
  """Returns CSV: one line per record, columns in order of first appearance, full precision."""
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


def is_known(value: float | None, *more: float | None) -> TypeGuard[float]:
  """Returns whether every value is given and finite."""
  return all(v is not None and math.isfinite(v) for v in (value, *more))


def percent(value: float | None, decimals: int = 1) -> str:
  """Formats a proportion as percent without a unit: 0.6234 -> '62.3'."""
  return _signed(f'{100 * value:.{decimals}f}') if is_known(value) else NOTHING


def share(value: float | None) -> str:
  """Formats a rate with its unit: 0.031 -> '3.1 %', 0.0004 -> '0.04 %'."""
  if not is_known(value):
    return NOTHING
  return f'{percent(value, 2 if 0 < abs(value) < 0.005 else 1)} %'


def bracket(
  low: float | None, high: float | None, written: Callable[[float], str] = percent
) -> str:
  """Returns an interval, '[2.9, 3.3]'; '' if a bound is unknown."""
  return f'[{written(low)}, {written(high)}]' if is_known(low) and is_known(high) else ''


def share_text(e: Any) -> str:
  """Returns a rate with its interval, '3.1 % [2.9, 3.3]', with equal numbers of decimals."""
  return NOTHING if e is None else f'{share(e.value)} {share_bounds(e)}'.strip()


def share_bounds(e: Any) -> str:
  """Returns the interval of a rate, '[2.9, 3.3]', with the decimals of `share`, or ''."""
  decimals = 2 if is_known(e.high) and e.high < 0.005 or 0 < e.value < 0.005 else 1
  return bracket(e.low, e.high, lambda bound: percent(bound, decimals))


def points(value: float | None) -> str:
  """Formats a difference of accuracies in percentage points: 0.012 -> '+1.2'."""
  return _signed(f'{100 * value:+.1f}') if is_known(value) else NOTHING


def similarity(value: float | None, decimals: int = 3) -> str:
  """Formats a similarity: 0.9312 -> '0.931'."""
  return _signed(f'{value:.{decimals}f}') if is_known(value) else NOTHING


def signed(value: float | None, decimals: int = 3) -> str:
  """Formats a number with its sign: 0.0512 -> '+0.051'."""
  return _signed(f'{value:+.{decimals}f}') if is_known(value) else NOTHING


def slack(value: float) -> str:
  """Formats a slack for a column head: 0.01 -> '+0.01', 0.0 -> '0'."""
  return f'{value:+g}'.replace('-', MINUS) if value else '0'


def number(value: float | None, digits: int = 3) -> str:
  """Formats integers and large numbers with thousands separators, others with `digits` digits."""
  if not is_known(value):
    return NOTHING
  if float(value).is_integer() and abs(value) < 1e15:
    return f'{int(value):,}'.replace('-', MINUS)
  if abs(value) >= 10**digits - 0.5:  # 999.7, too: as three digits it would be 1e+03
    return f'{value:,.0f}'.replace('-', MINUS)
  return f'{value:.{digits}g}'.replace('-', MINUS)


def ratio(value: float) -> str:
  """Formats an odds ratio: 1.0234 -> '1.02', 12.3 -> '12', 18000.0 -> '> 1,000'."""
  if value > 1000:
    return '> 1,000'
  return f'{value:.2f}' if value < 9.995 else f'{value:.0f}'


def probability(value: float | None) -> str:
  """Formats a p-value: 0.0321 -> 'p = 0.032', 1e-9 -> 'p < 0.001', None -> ''."""
  if not is_known(value):
    return ''
  return 'p < 0.001' if value < 0.001 else f'p = {value:.3f}'


def _signed(text: str) -> str:
  """Replaces the hyphen by a minus sign, and drops the sign of a zero."""
  return text.lstrip('-+') if not text.strip('-+0.') else text.replace('-', MINUS)


def bounds(estimate: Any, written: Callable[[float], str] = percent) -> str:
  """Returns '[59.1, 65.4]', or '(seeds: 59.1 to 65.4)' for a range of two seeds, or ''."""
  text = '' if estimate is None else bracket(estimate.low, estimate.high, written)
  if estimate is not None and text and estimate.method == 'range':
    return f'(seeds: {written(estimate.low)} to {written(estimate.high)})'
  return text


def estimate_text(estimate: Any, written: Callable[[float], str] = points) -> str:
  """Returns an estimate as 'value [low, high]'."""
  if estimate is None or not is_known(estimate.value):
    return NOTHING
  return f'{written(estimate.value)} {bounds(estimate, written)}'.strip()


def basis(estimate: Any) -> str:
  """Returns the numbers behind an interval: '3 seeds, 980 images in 300 groups, 2.6 df'."""
  parts = [progress.count_with_noun(estimate.seeds, 'seed'), images_in_groups(estimate)]
  return ', '.join([*parts, *filter(None, [degrees(estimate.df)])])


def images_in_groups(estimate: Any) -> str:
  """Returns '980 images in 6 groups', or '980 images, ungrouped'."""
  images = progress.count_with_noun(estimate.images, 'image')
  return images + grouping(estimate.images, estimate.groups)


def grouping(images: int, groups: int) -> str:
  """Returns ' in 6 groups', or ', ungrouped' if every image is its own group."""
  if groups == images:
    return ', ungrouped'
  return f' in {progress.count_with_noun(groups, "group")}'


def degrees(*df: float | None) -> str:
  """Returns degrees of freedom, '2.6 df' or '2.1 to 3.5 df'; '' if none is finite.

  Wilson's interval of one accuracy uses the normal distribution and has none.
  """
  finite = [value for value in df if is_known(value)]
  if not finite:
    return ''
  low, high = (number(round(value, 1)) for value in (min(finite), max(finite)))
  return f'{low} df' if low == high else f'{low} to {high} df'


def few_groups(groups: Mapping[str, int]) -> tuple[str, ...]:  # benchmark -> groups
  """Returns a note that warns of intervals over few groups, or ()."""
  few = {name: count for name, count in groups.items() if count < FEW_GROUPS}
  if not few:
    return ()
  named = progress.join_names(
    [f'{name}: {progress.count_with_noun(n, "group")}' for name, n in few.items()]
  )
  return (
    f'Fewer than {FEW_GROUPS} groups ({named}): the images are few independent units, whatever '
    'their number. Simulated 95 % intervals of such data can cover less than 93 %; do not base a '
    'claim on them.',
  )


def estimate_record(estimate: Any) -> dict[str, Any]:
  """Returns the fields of an estimate for a CSV."""
  return {key: getattr(estimate, key) for key in ESTIMATE}


def method_words(method: str) -> str:
  """Returns the description of an interval."""
  return {
    'crossed': '95 % interval over seeds and images',
    'range': 'range of two seeds',
    'this checkpoint': 'this checkpoint, 95 % interval over images',
  }.get(method, '')


def sentence(text: str) -> str:
  """Returns the text as a sentence: 'not estimable: few' -> 'Not estimable: few.'"""
  return f'{text[:1].upper()}{text[1:].rstrip(".")}.'


def column_heads(*texts: str) -> tuple[Cell, ...]:
  """Returns column heads: the first for text, the others for numbers."""
  return tuple(Cell(text, number=i > 0) for i, text in enumerate(texts))


def number_cell(text: str, detail: str = '', **kwargs: Any) -> Cell:
  """Returns a right-aligned cell."""
  return Cell(text, detail, number=True, **kwargs)


def accuracy_cell(estimate: Any, flagged: bool) -> Cell:
  """Returns an accuracy with its interval below it, and a dagger if it is flagged."""
  if estimate is None:
    return number_cell(NOTHING, tone='muted')
  return number_cell(percent(estimate.value), bounds(estimate), tone='flag' if flagged else '')


def matrix(
  name: str,
  labels: Sequence[str],
  values: Array,  # [n, n] shares, row by column
  notes: Iterable[str] = (),
) -> Table:
  """Returns a shaded square table: the share of the row's items that the column also contains."""

  def cell(i: int, j: int) -> Cell:
    value = float(values[i][j])
    return number_cell(
      percent(value, 0), tone='muted' if i == j else '', shade=None if i == j else value
    )

  places = range(len(labels))
  return Table(
    name,
    '',
    column_heads('pool rows of this split, % also in', *labels),
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
  """Returns a table of shares with bars; the page shows the first `most` entries."""
  rows = tuple(
    (
      Cell(str(e['what'])),
      number_cell(number(e['count'])),
      number_cell(number(e['total'])),
      number_cell(share(e['count'] / e['total']), bar=e['count'] / e['total']),
    )
    for e in entries[:most]
    if e['total']
  )
  return Table(
    name,
    caption,
    column_heads(first, 'removed', 'candidates', 'share removed'),
    rows,
    first_of(most, len(entries)),
    tuple(entries),
  )


def first_of(most: int, count: int, what: str = '') -> tuple[str, ...]:
  """Returns the note below a table that shows only its first `most` rows, or ()."""
  noun = f' {what}' if what else ''
  return (f'First {most} of {count}{noun}; the CSV has all.',) if count > most else ()
