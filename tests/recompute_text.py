"""The text of a report's page, and the numbers in it. Imports nothing of clip_jax.

Used by tests/recompute_page.py.
"""

import dataclasses
import html.parser
import re

NUMBER = r'[\u2212+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?'
SILENT = ('style', 'script', 'svg', 'title', 'nav')
BLOCKS = ('p', 'figcaption', 'summary', 'h1', 'h2', 'h3', 'aside', 'li')


@dataclasses.dataclass
class Block:
  """A paragraph, a table row (text: its cells joined) or a picture with its number."""

  kind: str  # name of its element, `row`, `head` or `picture`
  section: str  # id of the section, '' above the first
  table: str  # label of the table, '' outside tables
  text: str
  cells: tuple[str, ...] = ()
  figure: str = ''  # id of the figure that it is in


class Page(html.parser.HTMLParser):
  """Collects the blocks of a page, in order."""

  def __init__(self, text: str):
    super().__init__()
    self.blocks: list[Block] = []
    self._section, self._table, self._silent, self._figure = '', '', '', ''
    self._cells: list[str] = []
    self._text, self._title, self._in_head = '', '', False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    about = dict(attrs)
    if self._silent:
      return
    if tag in SILENT:
      self._silent = tag
    elif tag == 'section':
      self._section = about.get('id', '')
    elif tag == 'figure':
      self._figure = about.get('id', '').removeprefix('figure-')
    elif tag == 'div' and about.get('role') == 'region':
      self._table = about.get('aria-label', '')
    elif tag == 'thead':
      self._in_head = True
    elif tag == 'tr':
      self._cells = []
    elif tag == 'span' and 'picture' in about.get('class', '').split():
      self._title, self._text = about.get('title', ''), ''
    elif tag == 'small':
      self._text += ' '
    elif tag in (*BLOCKS, 'td', 'th'):
      self._text = ''

  def handle_endtag(self, tag):
    if self._silent:
      self._silent = '' if tag == self._silent else self._silent
    elif tag == 'thead':
      self._in_head = False
    elif tag == 'table':
      self._table = ''
    elif tag in ('td', 'th'):
      self._cells.append(plain(self._text))
      self._text = ''
    elif tag == 'tr':
      self._add('head' if self._in_head else 'row', ' | '.join(self._cells), tuple(self._cells))
    elif tag in BLOCKS:
      self._add(tag, self._text)
    elif tag == 'span' and self._title and self._text.strip():
      key = self._title.split(':')[0]
      self._add('picture', self._text, (key, plain(self._text)))
      self._title = ''

  def handle_data(self, data):
    if not self._silent:
      self._text += data

  def _add(self, kind: str, text: str, cells: tuple[str, ...] = ()) -> None:
    # Each line of the answer is about another split.
    for line in text.splitlines() if kind == 'p' else [text]:
      if plain(line):
        block = Block(kind, self._section, self._table, plain(line), cells, self._figure)
        self.blocks.append(block)
    self._text = ''


def plain(text: str) -> str:
  return ' '.join(text.split())


def without(text: str, phrases: list[str]) -> str:
  """The text with names and fixed phrases blanked; its length stays."""
  for phrase in phrases:
    text = re.sub(phrase, lambda m: '_' * len(m.group()), text)
  return text


def read(number: str) -> tuple[float, float]:
  """Value of a printed number, and half a unit of its last digit."""
  clean = number.replace(',', '').replace('\u2212', '-')
  decimals = len(clean.partition('.')[2])
  return float(clean), 0.5 * 10**-decimals


def numbers(text: str) -> list[tuple[str, int]]:
  """Printed numbers of a text and where they end; a bound as in `< 0.001` keeps its sign."""
  return [
    (m.group().replace(' ', ''), m.end())
    for m in re.finditer(rf'(?:[<>] )?(?<![\w.]){NUMBER}(?![\d])', text)
  ]


def agrees(printed: str, expected) -> bool:
  """Whether a printed number is the expected value, rounded."""
  if expected is None:
    return False
  if printed[0] in '<>':
    bound = read(printed[1:])[0]
    return expected < bound if printed[0] == '<' else expected > bound
  value, half = read(printed)
  if hasattr(expected, 'low'):  # a Between
    return expected.low - half <= value * 1.0 <= expected.high + half
  return abs(value - expected) <= half * (1 + 1e-9) + 1e-9


def pattern(words: str) -> re.Pattern:
  """A sentence in which # stands for a number and * for any words."""
  parts = re.split(r'([#*])', words)
  regex = {'#': f'((?:[<>] )?{NUMBER})', '*': r'.*?'}
  words = ''.join(regex.get(p, re.escape(p)) for p in parts)
  words = re.sub(r'\b(image|group|seed|cluster)s\b', r'\1s?', words)
  return re.compile(words, re.IGNORECASE)
