"""Sections of plain blocks -> one self-contained HTML page: no request, no script, light and dark.

The template is page.html.j2 beside this file. Everything that goes into it is escaped, except the
figures' SVG, which this package draws. Jinja2 is imported where a page is rendered: see svg.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
import importlib.resources
from typing import Any

TEMPLATE = 'page.html.j2'


@dataclass(frozen=True)
class Text:
  text: str
  tone: str = ''  # '' | 'muted' | 'warning'
  kind: str = 'text'


@dataclass(frozen=True)
class Heading:
  text: str
  detail: str = ''
  kind: str = 'heading'


@dataclass(frozen=True)
class Fact:
  """What the paper found, beside a user's own numbers."""

  text: str
  kind: str = 'fact'


@dataclass(frozen=True)
class Missing:
  """One sentence for what is not there yet, and the command that makes it."""

  sentence: str
  command: str = ''
  kind: str = 'missing'


@dataclass(frozen=True)
class Figure:
  name: str  # of the file in report/figures
  svg: str
  caption: str = ''


@dataclass(frozen=True)
class Figures:
  items: tuple[Figure, ...]
  kind: str = 'figures'


@dataclass(frozen=True)
class Columns:
  """Blocks side by side where there is room."""

  blocks: tuple[Any, ...]
  kind: str = 'columns'


@dataclass(frozen=True)
class Details:
  """Blocks behind a line that opens them."""

  summary: str
  blocks: tuple[Any, ...]
  kind: str = 'details'


@dataclass(frozen=True)
class Section:
  id: str
  title: str
  short: str  # in the page's navigation
  blocks: tuple[Any, ...] = ()


def render(
  *,
  title: str,
  name: str,
  question: str,
  answer: str,
  state: Sequence[tuple[str, str, bool]],  # stage, what is there, whether that is all
  sections: Sequence[Section],
  footer: str,
  warning: str = '',  # stands above the answer
) -> str:
  """Returns the page."""
  import jinja2

  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  template = importlib.resources.files('clip_jax.reporting').joinpath(TEMPLATE)
  return environment.from_string(template.read_text('utf-8')).render(
    title=title,
    name=name,
    question=question,
    answer=answer,
    state=state,
    sections=sections,
    footer=footer,
    warning=warning,
  )


def blocks(sections: Iterable[Section], kind: str) -> list[Any]:
  """Returns all blocks of one kind, also those inside other blocks, in the order of the page."""
  return [block for section in sections for block in _walk(section.blocks) if block.kind == kind]


def _walk(items: Iterable[Any]) -> Iterator[Any]:
  for block in items:
    yield block
    if block.kind in ('columns', 'details'):
      yield from _walk(block.blocks)
