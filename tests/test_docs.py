"""The pages in docs/ build without a warning, and the drawing is what the code draws."""

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
  for name in ('index.html', 'architecture.html', 'api/clip_jax/core/products.html'):
    assert (tmp_path / name).stat().st_size > 0


def test_every_file_has_a_meaning(prepared_squares):
  import make_files_table

  page = make_files_table.page(prepared_squares / 'run')
  assert make_files_table.PAGE.read_text() == page, 'run `python docs/make_files_table.py`'
