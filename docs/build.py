"""Builds docs/*.md and the API pages into HTML: `python docs/build.py OUT`. Every warning is an
error, and so is a link to a file that is not there.

The API pages show the comments of the source beside arguments and fields (comments.py). Drawings
load Mermaid from jsdelivr when a page is opened.
"""

from collections.abc import Sequence
import pathlib
import re
import shutil
import sys
import warnings

import comments
from markdown_it import MarkdownIt
import pdoc
import pdoc.render
import pdoc.render_helpers

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
STYLE = """
body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}
table{border-collapse:collapse;display:block;overflow:auto}
code{font-size:.9em;overflow-wrap:anywhere}
pre{background:#f5f5f5;padding:1em;overflow:auto}
pre.mermaid{background:none;padding:0}
pre.mermaid svg{min-width:110em}
"""
MERMAID = 'https://cdn.jsdelivr.net/npm/mermaid@11/dist/mermaid.esm.min.mjs'
DRAW = f'<script type="module">import mermaid from "{MERMAID}"</script>'  # draws on load
NAV = '<p><a href="index.html">docs</a> · <a href="api/index.html">API</a></p>'


def build(
  out: pathlib.Path,
  pages: pathlib.Path = HERE,
  modules: Sequence[str] = tuple(f'clip_jax.{package}' for package in PACKAGES),
) -> None:
  """Builds the Markdown files of a folder, and the API pages of modules with their submodules."""
  out.mkdir(parents=True, exist_ok=True)
  _build_api(out / 'api', modules)
  files = sorted(pages.glob('*.md'))
  for page in files:
    text = page.read_text()
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
      if not (pages / link).exists():
        raise ValueError(f'{page.name} links to {link}, which is not there')
    body = MarkdownIt().enable('table').render(text)
    for other in files:
      body = body.replace(f'href="{other.name}"', f'href="{other.stem}.html"')
    for name in re.findall(r'href="\.\./([^"]+)"', body):
      shutil.copy(pages.parent / name, out / name)
    body = body.replace('href="../', 'href="')
    body, drawings = re.subn(
      r'<pre><code class="language-mermaid">(.*?)</code></pre>',
      r'<pre class="mermaid">\1</pre>',
      body,
      flags=re.DOTALL,
    )
    head = f'<!doctype html><meta charset="utf-8"><title>{page.stem}</title><style>{STYLE}</style>'
    (out / f'{page.stem}.html').write_text(head + NAV + body + (DRAW if drawings else ''))


def _build_api(out: pathlib.Path, modules: Sequence[str]) -> None:
  filters, to_html = pdoc.render.env.filters, pdoc.render_helpers.to_html
  filters['commented_signature'], filters['comment'] = (
    comments.commented_signature,
    comments.comment,
  )
  filters['to_html'] = lambda text: to_html(comments.escaped(text))
  pdoc.render.configure(docformat='google', template_directory=HERE / 'templates')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    warnings.simplefilter('ignore', DeprecationWarning)
    pdoc.pdoc(*modules, output_directory=out)


if __name__ == '__main__':
  build(pathlib.Path(sys.argv[1]))
