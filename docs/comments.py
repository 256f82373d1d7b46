"""Filters for the API pages: signatures and fields with the comments of the source.

Shapes, dtypes and units stand in comments beside arguments and fields, which pdoc leaves out.
"""

import ast
import functools
import html
import importlib
import inspect
import io
import re
import tokenize
from typing import Any

from markupsafe import Markup
import pygments
from pygments import formatters, lexers


def commented_signature(function: Any) -> Markup | str:
  """Returns a function's header from its source, as HTML; '' if the header has no comment."""
  source = inspect.cleandoc('\n' + function.source)
  comments, tree = _comments(source), ast.parse(source).body
  if not tree or not isinstance(tree[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
    return ''
  first, last = tree[0].lineno, tree[0].body[0].lineno - 1
  if not any(first <= line <= last for line in comments):
    return ''
  header = '\n'.join(source.splitlines()[first - 1 : last])
  text = pygments.highlight(header, lexers.PythonLexer(), formatters.HtmlFormatter(nowrap=True))
  return Markup(text.rstrip('\n'))


def comment(variable: Any) -> str:
  """Returns the comment beside, or above, a constant or a field; '' if it has none."""
  return _of_module(variable.taken_from[0]).get(variable.taken_from[1], '')


@functools.cache
def _of_module(name: str) -> dict[str, str]:
  """Returns qualified name -> comment for the constants and fields of a module."""
  try:
    source = inspect.getsource(importlib.import_module(name))
  except (ImportError, OSError, TypeError):
    return {}
  comments, lines = _comments(source), source.splitlines()

  def above(line: int) -> str:
    block: list[str] = []
    while line - 1 in comments and lines[line - 2].lstrip().startswith('#'):
      line -= 1
      if comments[line].endswith(':') or comments[line].startswith('---'):
        break  # the heading of several fields
      block.insert(0, comments[line])
    return ' '.join(block)

  def beside(line: int) -> str:
    text = comments.get(line, '')
    while text.endswith(('|', ',')) and lines[line].lstrip().startswith('#'):
      line += 1
      text += ' ' + comments[line]
    return text

  found: dict[str, str] = {}

  def walk(body: list[ast.stmt], prefix: str) -> None:
    for node in body:
      if isinstance(node, ast.ClassDef):
        walk(node.body, f'{prefix}{node.name}.')
      targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
      for target in targets:
        if isinstance(target, ast.Name) and node.end_lineno:
          found[prefix + target.id] = beside(node.end_lineno) or above(node.lineno)

  walk(ast.parse(source).body, '')
  return found


def _comments(source: str) -> dict[int, str]:
  """Returns line -> comment without its '#'."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}


def escaped(text: str) -> str:
  """Returns Markdown in which `<name>` outside code is text, not a tag of HTML."""
  parts = re.split(r'(`[^`]*`)', text)
  return ''.join(part if part[:1] == '`' else html.escape(part, quote=False) for part in parts)
