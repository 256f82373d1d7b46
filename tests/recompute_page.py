"""Recomputes the numbers of a report from the raw products: python tests/recompute_page.py WORKDIR

It imports nothing of clip_jax: NumPy, SciPy and pyarrow alone. Formulas are those of
docs/statistics.md. It prints how many numbers of each table and of the page's text it recomputed,
how many are equal at the printed precision, every difference, and what it did not check. Exit
status 1: some number differs.
"""

from collections import Counter
from collections.abc import Iterable
import math
import re
import sys

import recompute_pool_tables
import recompute_rows
import recompute_sentences as sentences
import recompute_tables
import recompute_text
from recompute_work import Between, Table, Work, printed, text_of

NEVER = (
  'words of verdicts, interpretations and warnings (their numbers are)',
  'figures: their marks and axes, and files in report/figures',
  'settings.csv, versions.csv, wall_clock.csv and the same tables of the page',
  'figures that the page quotes from the paper',
  'seconds and rates beside those that metrics.jsonl holds',
  'correctness itself: predictions are read from evaluate/, no model is run',
  'vectors, de-duplication marks, nearest anchor classes and random rows: read, not made again',
  '*.tex, which repeat the CSV files',
)


class Checks:
  """Counts comparisons by table, and keeps the differences."""

  def __init__(self):
    self.counts: dict[str, list[int]] = {}  # table -> [checked, equal]
    self.differences: list[str] = []
    self.unchecked: list[str] = []

  def add(self, table: str, where: str, expected, found, is_equal: bool) -> None:
    counts = self.counts.setdefault(table, [0, 0])
    counts[0] += 1
    counts[1] += is_equal
    if not is_equal:
      self.differences.append(f'{table}: {where}: printed {found!r}, recomputed {expected!r}')

  def table(self, name: str, expected: Table, rows: list[dict[str, str]]) -> None:
    """Compares every row and column of a CSV file."""
    key = lambda row: tuple(text_of(row[k]) for k in expected.keys)
    mine = {key(row): row for row in expected.rows}
    theirs = {key(row): row for row in rows}
    self.counts.setdefault(name, [0, 0])
    if not theirs and mine:
      self.unchecked.append(f'{name}.csv: the report has no such file')
      return
    for names in sorted(mine.keys() ^ theirs.keys()):
      if names in theirs and not expected.is_whole:
        self.unchecked.append(f'{name}.csv: row {", ".join(names)}')
        continue
      sides = ('no row', 'a row') if names in theirs else ('a row', 'no row')
      self.add(name, ', '.join(names), *sides, False)
    left = set()
    for names in mine.keys() & theirs.keys():
      left |= {c for c, v in theirs[names].items() if v and c not in mine[names]}
      for column, value in mine[names].items():
        if column not in expected.keys and column in theirs[names]:
          text = theirs[names][column]
          is_equal = same(value, text, expected.tolerance)
          self.add(name, f'{", ".join(names)}, {column}', value, text, is_equal)
    if left:
      self.unchecked.append(f'{name}.csv: column {", ".join(sorted(left))}')

  def numbers(self, table: str, text: str, expected: list) -> None:
    """Compares all numbers of a text with expected ones, in order."""
    found = [number for number, _ in recompute_text.numbers(text)]
    if len(found) != len(expected):
      self.add(table, text, f'{len(expected)} numbers', f'{len(found)} numbers', False)
      return
    for number, value in zip(found, expected, strict=True):
      if value is not None:
        self.add(table, text, value, number, recompute_text.agrees(number, value))

  def sentences(self, table: str, text: str, known: Iterable[tuple[str, list]]) -> str:
    """Compares the sentences that occur in a text; returns it without them."""
    for words, expected in known:
      for match in list(recompute_text.pattern(words).finditer(text)):
        for number, value in zip(match.groups(), expected, strict=True):
          is_equal = recompute_text.agrees(number.replace(' ', ''), value)
          self.add(table, match.group(), value, number, is_equal)
        text = text[: match.start()] + '_' * len(match.group()) + text[match.end() :]
    return text


def same(value, text: str, tolerance: float) -> bool:
  """Whether a number of a CSV file is the recomputed one."""
  if isinstance(value, str):
    return value == text
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return text == ''
  try:
    number = float(text)
  except ValueError:
    return False
  if isinstance(value, Between):
    return value.low - 1e-9 <= number <= value.high + 1e-9
  return abs(number - float(value)) <= tolerance * max(1, abs(float(value)))


class PageChecks:
  """Goes through the page's blocks with the split, benchmark and query that they are about."""

  def __init__(self, work: Work, tables: dict[str, Table], checks: Checks):
    self.work, self.tables, self.checks = work, tables, checks
    self.pairs = [p for p in work.aligned() if 'comparison_{}_{}'.format(*p) in tables]
    self.pair = self.pairs[0] if self.pairs else ('', '')
    self.split, self.query, self.place = '', '', ('', 0)
    self.unread: Counter[str] = Counter()
    self.known = {pair: list(sentences.of_comparison(work, tables, *pair)) for pair in self.pairs}
    self.of_removed = {s: list(sentences.of_removed(work, s)) for s in work.selected()}
    self.others = [*sentences.of_pool(work, tables), *sentences.of_groups(work)]
    self.others += [*sentences.of_marks(work), *sentences.of_stages(work)]
    self.others += sentences.of_axes(work)
    names = [*work.splits, *work.benchmarks, *work.config['embedders']]
    names = [re.escape(n) for n in sorted(names, key=len, reverse=True)]
    self.names = [rf'(?:{"|".join(names)})/seed\d+', rf'\b(?:{"|".join(names)})\b']

  def block(self, block: recompute_text.Block) -> None:
    """Checks one block; numbers that no rule names are counted as unread."""
    name = f'page, {block.table or block.section or "answer"}'[:60]
    never = ('settings', 'versions', 'skipped_list')  # texts, and keys of skipped samples
    if block.kind == 'aside' or block.section == 'terms' or block.table in never:
      return
    if block.table.startswith('Wall-clock'):
      return
    if block.kind == 'picture':
      self.picture(block)
      return
    if block.kind in ('h3', 'summary', 'figcaption'):
      self.begin(block)
    if block.kind == 'row' and self.row(name, block):
      return
    text = block.text
    for sentence in self.sentences(block):
      text = self.checks.sentences(name, text, [sentence])
    text = recompute_text.without(text, [*sentences.FIXED, *self.names])
    left = [number for number, _ in recompute_text.numbers(text)]
    if left and not block.section and block.kind == 'p' and self.pairs:
      for number in left:
        self.checks.add(name, block.text, 'no number of this sentence', number, False)
    elif left:
      self.unread[f'{name}: {block.text[:100]}'] += len(left)

  def begin(self, block: recompute_text.Block) -> None:
    """Keeps the split or the benchmark that a heading names."""
    first = block.text.split(' ')[0].rstrip(':')
    if first in self.work.splits:
      self.split = first if first in self.of_removed else ''
    if block.section == 'neighbours' and first in self.work.benchmarks:
      self.query = first

  def sentences(self, block: recompute_text.Block) -> list[tuple[str, list]]:
    known = list(self.others)
    if block.table.startswith('accuracy') and block.table in self.tables:
      self.place = (block.table, self.place[1])
    if block.section == 'accuracy' and self.place[0] in self.tables:
      table = self.tables[self.place[0]]
      if table.keys[0] == 'split':
        known = [*sentences.of_accuracy(self.work, table), *known]
    if block.section == 'collateral' and 'collateral' in self.tables:
      known = [*sentences.of_accuracy(self.work, self.tables['collateral']), *known]
    if not block.section:
      known = [*self.of_answer(block.text), *known]
    elif block.section == 'comparisons':
      known = [*sentences.of_bootstrap(self.tables, *self.pair), *self.known[self.pair], *known]
    elif block.section == 'removed' and self.split:
      known = [*self.of_removed[self.split], *known]
    return [*known, *sentences.of_heads(self.work, block, self.tables, self.split)]

  def of_answer(self, text: str) -> list[tuple[str, list]]:
    """Sentences of the answer for the benchmark that its line names first."""
    named = re.search(r'under the (?:main embedder|embedder (\S+))', text)
    for pair in self.pairs:
      start = text[: text.find(',')]
      if named and self.work.embedder(pair[0]) != (named.group(1) or ''):
        continue
      if re.search(rf'\b{re.escape(pair[1])}\b', start):
        runs = sentences.marked_runs(self.work, *pair)
        shown = len(re.findall(r'/seed\d+', text))
        return [*self.known[pair], (' and # more', [len(runs) - shown])]
    embedders = {self.work.embedder(split) for split, _ in self.pairs}
    return [('this pool and # embedders', [len(embedders)])]

  def row(self, name: str, block: recompute_text.Block) -> bool:
    """Checks a table's row as a whole; False if it is to be read as a sentence."""
    label = block.table
    pair = next((p for p in self.pairs if label == 'comparison_{}_{}'.format(*p)), None)
    if pair:
      self.pair = pair
      return self.comparison(name, block)
    if label.startswith('McNemar'):
      label = 'mcnemar_{}_{}'.format(*self.pair)
    here = f'{block.section} {label} {self.split} {self.pair}'
    self.place = (self.place[0], self.place[1] + 1 if here == self.here else 0)
    self.here = here
    expected = recompute_rows.rows(self.work, self.tables, label, self.split)
    if expected is None:
      return False
    fixed = [r'95 % interval over images', *self.names]
    text = recompute_text.without(' | '.join(block.cells[1:]), fixed)
    if self.place[1] >= len(expected):
      self.checks.add(name, text, 'no further row', 'a row', False)
    elif (row := expected[self.place[1]]) is None:
      return False
    else:
      if label.startswith('accuracy') and 'passes' in text and ' anchor ' not in text:
        row = row[:-1]  # a report of before the anchor's share was shown
      self.checks.numbers(name, text, row)
    return True

  here = ''

  def comparison(self, name: str, block: recompute_text.Block) -> bool:
    rows = {row['what']: row for row in self.tables['comparison_{}_{}'.format(*self.pair)].rows}
    what = sentences.what_of(block.cells[0], self.work.control(self.pair[0]))
    text = block.text
    if what in rows:
      known = sentences.comparison_row(self.work, self.pair, rows[what])
      text = self.checks.sentences(name, text, known)
    for sentence in [*self.known[self.pair], *sentences.of_rests(rows['against_control'])]:
      text = self.checks.sentences(name, text, [sentence])
    text = recompute_text.without(text, [*sentences.FIXED, *self.names])
    if left := recompute_text.numbers(text):
      self.unread[f'{name}: {block.text[:100]}'] += len(left)
    return True

  def picture(self, block: recompute_text.Block) -> None:
    """Checks the number under a picture: the excess of a removed row, or a similarity."""
    key, text = block.cells
    name = f'page, {block.section}, pictures'
    if key == text:
      self.place = (key, 0)
      return
    value = sentences.of_picture(
      self.work, block.section, self.split, self.query, self.place[0], key
    )
    if value is None:
      self.unread[f'{name}: {key}'] += 1
    else:
      self.checks.numbers(name, text, [value])


def main(folder: str) -> int:
  work, checks, tables = Work(folder), Checks(), {}
  for make in (*recompute_tables.MAKERS, *recompute_pool_tables.MAKERS):
    try:
      for name, table in make(work, checks.unchecked):
        tables[name] = table
        checks.table(name, table, printed(work, name))
    except FileNotFoundError as error:
      checks.unchecked.append(f'tables of "{make.__name__}": {error.filename} does not exist')
  blocks = recompute_text.Page((work.path / 'report' / 'index.html').read_text()).blocks
  unread = {}
  try:
    page = PageChecks(work, tables, checks)
    unread = page.unread
    for block in blocks:
      page.block(block)
    others(work, tables, checks, {block.text for block in blocks if not block.section})
  except FileNotFoundError as error:
    checks.unchecked.append(f'the rest of the page: {error.filename} does not exist')
  report(work, checks, unread)
  return 1 if checks.differences else 0


def others(work: Work, tables: dict[str, Table], checks: Checks, answer: set[str]) -> None:
  """Checks leaks.json, the rows of aligned splits, and summary.txt; answer: the page's lines."""
  leaks = work.json('report/leaks.json')
  counts = {'rows': len(work.candidates), 'usable': int(work.usable('pool').sum())}
  for name, value in counts.items():
    checks.add('leaks.json', name, value, leaks['pool'][name], leaks['pool'][name] == value)
  for row in tables['duplicate_rates'].rows if 'duplicate_rates' in tables else ():
    near = leaks['benchmarks'][row['benchmark']]['near']
    pairs = tables[f'duplicates-{row["benchmark"]}'].rows
    expected = {'queries': row['pool'], 'rate': row['pool_share'], 'low': row['pool_low']}
    expected |= {'high': row['pool_high'], 'pairs': len(pairs)}
    expected['pool_rows'] = len({pair['pool_row'] for pair in pairs})
    for name, value in expected.items():
      where = f'{row["benchmark"]}, near, {name}'
      checks.add('leaks.json', where, value, near[name], same(value, str(near[name]), 1e-9))
  for split in work.selected():
    block = work.settings(split)
    if block['rule'] == 'gap_aligned' and not (block['quantile'] or block['dose']):
      gone = (work.order(split) > block['slack']) & work.candidates
      wrong = int((gone != work.removed(split)).sum())
      checks.add('rows of aligned splits', split, '0 rows that differ', wrong, wrong == 0)
  known = [*sentences.of_summary(work, tables)]
  for line in (work.path / 'report' / 'summary.txt').read_text().splitlines():
    text = ' '.join(line.split())
    if text in answer:
      checks.add('summary.txt, answer', text, text, text, True)
      continue
    for start, values in known:
      if text.startswith(start):
        text = recompute_text.without(text.removeprefix(start), sentences.FIXED)
        checks.numbers('summary.txt', text, values)
        break
    else:
      if recompute_text.numbers(recompute_text.without(text, sentences.FIXED)):
        checks.unchecked.append(f'summary.txt: {text[:100]}')


def report(work: Work, checks: Checks, unread: dict[str, int]) -> None:
  for name, (checked, equal) in checks.counts.items():
    print(f'{name}: {checked:,} checked, {equal:,} equal')
  checked, equal = (sum(c[i] for c in checks.counts.values()) for i in (0, 1))
  print(f'All: {checked:,} checked, {equal:,} equal, {checked - equal:,} different')
  for line in checks.differences:
    print('DIFFERENT', line)
  files = {f.stem for f in (work.path / 'report' / 'tables').glob('*.csv')}
  named = {'settings', 'versions', 'wall_clock'}
  for line in (*NEVER, *checks.unchecked, *sorted(files - checks.counts.keys() - named)):
    print('Not checked:', line)
  for line, count in unread.items():
    print(f'Not checked: {count} numbers in {line}')


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python tests/recompute_page.py WORKDIR')
  sys.exit(main(sys.argv[1]))
