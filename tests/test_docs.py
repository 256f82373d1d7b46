"""The pages in docs/ build without a warning; drawing and table are those of the code."""

import pathlib
import sys

import pytest

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
sys.path.append(str(DOCS))


def test_the_drawing_is_the_one_of_the_code():
  import make_graph

  assert make_graph.committed() == make_graph.draw(), 'run `python docs/make_graph.py`'


@pytest.mark.slow
def test_the_pages_build_without_warnings(tmp_path):
  pytest.importorskip('pdoc')
  pytest.importorskip('markdown_it')
  import build

  build.build(tmp_path)
  for name in ('index.html', 'files.html', 'api/clip_jax/core/products.html'):
    assert (tmp_path / name).stat().st_size > 0
  assert '<pre class="mermaid">flowchart' in (tmp_path / 'architecture.html').read_text()
  search = (tmp_path / 'api/clip_jax/similarity/exact.html').read_text()
  assert '# rows [n, E] float16' in search and '# [Q, E] float16' in search  # argument, field


MODULES = {  # a module that the build must refuse -> the message
  'warns_at_import': (
    'import warnings\nwarnings.warn("planted")',
    'Error importing warns_at_import',
  ),
  'warns_when_rendered': ('x: "Missing" = 1', 'Missing'),
  'fails_at_import': ('import no_such_module', 'Error importing fails_at_import'),
}


@pytest.mark.parametrize('module', MODULES)
def test_a_warning_fails_the_build(tmp_path, monkeypatch, module):
  pytest.importorskip('pdoc')
  pytest.importorskip('markdown_it')
  import build

  source, message = MODULES[module]
  (tmp_path / f'{module}.py').write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises((Warning, RuntimeError), match=message):
    build.build(tmp_path / 'out', pages=tmp_path, modules=[module])


def test_a_broken_link_fails_the_build(tmp_path):
  pytest.importorskip('pdoc')
  pytest.importorskip('markdown_it')
  import build

  (tmp_path / 'page.md').write_text('A [page](page.md), a [site](https://example.org).')
  build.build(tmp_path / 'out', pages=tmp_path, modules=['clip_jax.core.errors'])
  (tmp_path / 'page.md').write_text('A [page](nothing.md).')
  with pytest.raises(ValueError, match=r'page\.md links to nothing\.md, which is not there'):
    build.build(tmp_path / 'out', pages=tmp_path, modules=['clip_jax.core.errors'])


def test_every_file_up_to_prune_has_a_meaning(prepared_squares):
  import make_files_table

  found = make_files_table.contents(prepared_squares / 'run')
  unknown = [
    content
    for content, kind in found.items()
    if make_files_table.meaning_of(*content, set()) is None and kind not in ('list', 'object')
  ]  # lists and objects that are empty here are described by what they hold
  assert len(found) > 100 and not unknown


@pytest.mark.slow  # a whole run
def test_every_file_of_a_whole_run_is_on_the_page(tmp_path):
  import everything
  import make_files_table

  workdirs = everything.run(tmp_path)
  page = make_files_table.page(*workdirs)
  assert make_files_table.PAGE.read_text() == page, 'run `python docs/make_files_table.py`'
  (workdirs[0] / 'dedup/new.json').write_text('{"rows": 1}')
  (workdirs[0] / 'report/summary.txt').unlink()
  with pytest.raises(ValueError) as error:
    make_files_table.page(*workdirs)
  assert 'dedup/new.json rows' in str(error.value) and 'report/summary.txt' in str(error.value)
