"""The list of duplicates of the search: complete, with evidence, remade alone."""

import csv
import io
import json

import numpy as np
from PIL import Image
import pyarrow.parquet as pq
import pytest
import squares

from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.stages import search_duplicates

SEARCHED = squares.PREPARE[:-1]


def _reencoded(data: bytes) -> bytes:
  out = io.BytesIO()
  Image.open(io.BytesIO(data)).save(out, 'PNG', compress_level=0)
  return out.getvalue()


@pytest.fixture(name='data')
def _data(tmp_path):
  """The squares, with two copies of query 00200 in the second tar: its file, and its pixels in
  another file.
  """
  squares.make(tmp_path)
  query = squares.sample(200, 200 % 3)
  copies = {
    'copy': {**query, 'txt': b'the same file'},
    'pixels': {**query, 'png': _reencoded(query['png']), 'txt': b'another file, "quoted"\nline'},
  }
  more = {f'{i:05d}': squares.sample(i, i % 3) for i in range(40, 60)}
  squares.write_tar(tmp_path / 'pool/1.tar', more | copies)
  return tmp_path


def _config(data, similarity=0.9, **more):
  return squares.config(
    data, **{'prune.duplicate_similarity': similarity, 'dedup.enabled': False, **more}
  )


def _list(folder):
  return pq.read_table(folder / 'search/squares/duplicates.parquet').to_pylist()


def _expected(folder, similarity):
  """Returns the rows of the list by numpy alone."""
  load = lambda name, n: np.concatenate(
    [np.load(folder / f'embeddings/{name}/{i:05d}.npy') for i in range(n)]
  ).astype(np.float64)
  pool, queries = load('pool', 2), load('squares', 1)
  cosine = queries @ pool.T
  cosine /= np.sqrt((queries**2).sum(1)[:, None] * (pool**2).sum(1))
  expected = []
  for query in range(len(queries)):
    rows = [r for r in np.argsort(-cosine[query], kind='stable') if cosine[query, r] >= similarity]
    expected += [(query, row, rank + 1) for rank, row in enumerate(rows)]
  return expected


def test_the_list_is_complete_and_says_why_a_pair_is_exact(data, tmp_path):
  x = squares.run_stages(_config(data), tmp_path / 'w', *SEARCHED)
  found = _list(tmp_path / 'w')
  assert [(p['query_row'], p['pool_row'], p['rank']) for p in found] == _expected(
    tmp_path / 'w', 0.9
  )
  assert len(found) > 100  # far more than top_k for each query
  exact = [p for p in found if p['kind'] == 'exact']
  assert [(p['query_key'], p['pool_key'], p['evidence'], p['rank']) for p in exact] == [
    ('00200', 'copy', 'bytes', 1),
    ('00200', 'pixels', 'pixels', 2),
  ]
  assert exact[1]['caption'] == 'another file, "quoted"\nline'
  assert exact[1]['pool_file'] == '1.tar' and exact[1]['query_file'] == '0.tar'
  counts = products.counts(x.workdir, 'search/squares/duplicates')
  assert counts['exact'] == {'pairs': 2, 'queries': 1, 'pool_rows': 2}
  assert counts['near']['pairs'] == len(found) and counts['queries'] == 12


def test_another_threshold_makes_the_list_alone_again(data, tmp_path, capsys):
  squares.run(_config(data), tmp_path / 'w', capsys, SEARCHED)
  stamps = {
    path: path.stat().st_mtime_ns for path in (tmp_path / 'w').glob('[e-s]*/**/*') if path.is_file()
  }
  status, said = squares.run(_config(data, 0.999), tmp_path / 'w', capsys, SEARCHED)
  assert status == 0, said
  changed = {
    str(path.relative_to(tmp_path / 'w'))
    for path, stamp in stamps.items()
    if path.stat().st_mtime_ns != stamp and path.suffix != '.txt'
  }
  assert changed == {
    'search/manifest.json',
    'search/squares/duplicates.parquet',
    'search/squares/duplicates.sidecar.json',
  }
  assert [p['evidence'] for p in _list(tmp_path / 'w')] == ['bytes', 'pixels']


def test_a_list_that_is_too_long_stops_and_names_the_key(data, tmp_path, monkeypatch):
  monkeypatch.setattr(search_duplicates, 'MOST_PAIRS', 50)
  with pytest.raises(InputError, match='config.prune.duplicate_similarity to a higher'):
    squares.run_stages(_config(data), tmp_path / 'w', *SEARCHED)
  assert not (tmp_path / 'w/search/squares/duplicates.parquet').exists()


def test_no_duplicate_is_an_empty_list(data, tmp_path, capsys):
  config = _config(data, 0.99999)
  squares.write_tar(data / 'pool/1.tar', {'00041': squares.sample(41, 1)})
  status, said = squares.run(config, tmp_path / 'w', capsys, [*SEARCHED, 'report'])
  assert status == 0, said
  assert _list(tmp_path / 'w') == []
  page = (tmp_path / 'w/report/index.html').read_text()
  assert 'No pool image has a similarity of 0.99999 or more' in page


def test_the_report_shows_pairs_and_writes_csv_and_card(data, tmp_path, capsys):
  status, said = squares.run(_config(data), tmp_path / 'w', capsys, [*SEARCHED, 'report'])
  assert status == 0, said
  report = tmp_path / 'w/report'
  page = (report / 'index.html').read_text()
  assert 'squares: the most similar pairs' in page
  assert '20 of ' in page and 'exact: equal bytes' in page
  with open(report / 'tables/duplicates-squares.csv', newline='') as f:
    rows = list(csv.DictReader(f))
  stored = _list(tmp_path / 'w')
  assert len(rows) == len(stored)
  assert [float(row['similarity']) for row in rows] == [pair['similarity'] for pair in stored]
  assert rows[1]['caption'] == stored[1]['caption']
  card = json.loads((report / 'leaks.json').read_text())
  of = card['benchmarks']['squares']
  assert of['exact']['rate'] == pytest.approx(1 / 12) and card['similarity'] == 0.9
  assert 0 < of['exact']['low'] < 1 / 12 < of['exact']['high'] < 1
  assert card['versions']['packages']['jax'] and card['embedder']['source'] == 'pca'
  rates = (report / 'tables/duplicate_rates.csv').read_text().splitlines()[1]
  assert rates.startswith(f'squares,12,0.9,{of["near"]["queries"]},')


def test_near_pairs_are_shown_although_exact_ones_fill_the_table(
  data, tmp_path, capsys, monkeypatch
):
  from clip_jax.stages.report import leaks

  monkeypatch.setattr(leaks, 'SHOWN', 2)  # as many as there are exact ones
  status, said = squares.run(_config(data), tmp_path / 'w', capsys, [*SEARCHED, 'report'])
  assert status == 0, said
  page = (tmp_path / 'w/report/index.html').read_text()
  assert 'squares: the most similar near pairs' in page
  near = max(
    (p for p in _list(tmp_path / 'w') if p['kind'] == 'near'), key=lambda p: p['similarity']
  )
  assert near['pool_key'] in page[page.index('the most similar near pairs') :]


def test_images_that_are_gone_leave_the_vectors_to_decide(data, tmp_path):
  class Gone:
    """A source whose images cannot be read any more."""

    def read_samples(self, rows):
      raise InputError('gone')

    def __getitem__(self, row):
      raise InputError('gone')

  assert search_duplicates._digests(Gone(), np.array([1, 2])) == {1: None, 2: None}
