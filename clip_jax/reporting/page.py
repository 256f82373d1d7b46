"""Sections of plain blocks -> one self-contained HTML page: no request, light and dark.

The template is page.html.j2 in this folder. It escapes everything except the figures' SVG, which
this package draws, and the script page.js, without which the page is complete. The page's content
security policy lets a browser run that script alone and request nothing. Jinja2 is imported inside
`render`, for the reason given in svg.py.
"""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
import hashlib
import importlib.resources
import re
from typing import Any

TEMPLATE, SCRIPT = 'page.html.j2', 'page.js'
_CONTROLS = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')


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
  """A result of the paper, shown next to the user's own numbers."""

  text: str
  kind: str = 'fact'


@dataclass(frozen=True)
class Missing:
  """A sentence about a missing result, and the command that produces it."""

  sentence: str
  command: str = ''
  kind: str = 'missing'


@dataclass(frozen=True)
class Figure:
  name: str  # file name in report/figures, without extension
  svg: str
  caption: str = ''


@dataclass(frozen=True)
class Figures:
  items: tuple[Figure, ...]
  kind: str = 'figures'


@dataclass(frozen=True)
class Columns:
  """Blocks side by side on wide screens."""

  blocks: tuple[Any, ...]
  kind: str = 'columns'


@dataclass(frozen=True)
class Details:
  """Collapsed blocks: a click on the summary shows them."""

  summary: str
  blocks: tuple[Any, ...]
  kind: str = 'details'


@dataclass(frozen=True)
class Section:
  id: str
  title: str
  short: str  # title in the page's navigation
  blocks: tuple[Any, ...] = ()


def render(
  *,
  title: str,
  name: str,
  question: str,
  answer: str,
  state: Sequence[tuple[str, str, bool]],  # stage, its progress, is complete
  sections: Sequence[Section],
  footer: str,
  warning: str = '',  # shown above the answer
) -> str:
  """Returns the page as HTML, without the control characters that captions and keys may hold."""
  import jinja2

  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  package = importlib.resources.files('clip_jax.reporting')
  template, script = (package.joinpath(name).read_text('utf-8') for name in (TEMPLATE, SCRIPT))
  html = environment.from_string(template).render(
    script=script,
    script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    title=title,
    name=name,
    question=question,
    answer=answer,
    state=state,
    sections=sections,
    footer=footer,
    warning=warning,
  )
  return without_controls(html)


def without_controls(text: str) -> str:
  """Removes the control characters that HTML and SVG do not allow, such as NUL."""
  return _CONTROLS.sub('', text)


def blocks(sections: Iterable[Section], kind: str) -> list[Any]:
  """Returns all blocks of one kind, nested ones included, in page order."""
  return [block for section in sections for block in _walk(section.blocks) if block.kind == kind]


def _walk(items: Iterable[Any]) -> Iterator[Any]:
  for block in items:
    yield block
    if block.kind in ('columns', 'details'):
      yield from _walk(block.blocks)
