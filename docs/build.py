"""Builds docs/*.md and the API pages into HTML: `python docs/build.py OUT`. Every warning is an
error, and so is a link to a file that is not there.
"""

import pathlib
import re
import shutil
import sys
import warnings

from markdown_it import MarkdownIt
import pdoc

HERE = pathlib.Path(__file__).parent
PACKAGES = [
  'core',
  'data',
  'models',
  'similarity',
  'pruning',
  'training',
  'evaluation',
  'experiment',
]
STYLE = 'body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}'
STYLE += (
  'td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}table{border-collapse:collapse}'
)
STYLE += 'pre{background:#f5f5f5;padding:1em;overflow:auto}'


def build(out: pathlib.Path) -> None:
  out.mkdir(parents=True, exist_ok=True)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    warnings.simplefilter('ignore', DeprecationWarning)

    pdoc.pdoc(*(f'clip_jax.{package}' for package in PACKAGES), output_directory=out / 'api')
  pages = sorted(HERE.glob('*.md'))
  for page in pages:
    text = page.read_text()
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
      if not (HERE / link).exists():
        raise ValueError(f'{page.name} links to {link}, which is not there')
    body = MarkdownIt().enable('table').render(text)
    for other in pages:
      body = body.replace(f'href="{other.name}"', f'href="{other.stem}.html"')
    for name in re.findall(r'href="\.\./([^"]+)"', body):
      shutil.copy(HERE.parent / name, out / name)
    body = body.replace('href="../', 'href="')
    head = f'<!doctype html><meta charset="utf-8"><title>{page.stem}</title><style>{STYLE}</style>'
    nav = '<p><a href="index.html">docs</a> · <a href="api/index.html">API</a></p>'
    (out / f'{page.stem}.html').write_text(head + nav + body)


if __name__ == '__main__':
  build(pathlib.Path(sys.argv[1]))
