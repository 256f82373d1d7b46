"""The tables of a work directory: clip_jax.read."""

import json

import numpy as np
import pytest
import squares

import clip_jax
from clip_jax.core.errors import InputError


@pytest.fixture(scope='module', name='work')
def _work(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tables')
  squares.make(folder / 'data')
  c = squares.config(folder / 'data', **{'prune.duplicate_similarity': 0.95})
  squares.run_stages(c, folder / 'run', *squares.PREPARE)
  (folder / 'run/config.json').write_text(json.dumps(c.to_dict()))
  return folder / 'run'


def test_search_has_every_pool_row_with_keys(work):
  table = clip_jax.read(work).search('squares')
  assert table.column_names == ['row', 'key', 'similarity', 'nearest', 'nearest_key', 'excess']
  assert table['key'].to_pylist() == [f'{i:05d}' for i in range(60)]
  stored = np.concatenate(
    [np.load(work / f'search/squares/pool-{i:05d}.npz')['nearest'] for i in range(2)]
  )
  assert table['nearest'].to_pylist() == stored.tolist()
  assert table['nearest_key'].to_pylist() == [f'{200 + i:05d}' for i in stored.tolist()]


def test_duplicates_and_splits(work):
  tables = clip_jax.read(work)
  pairs = tables.duplicates('squares')
  assert pairs.num_rows and min(pairs['similarity'].to_pylist()) >= 0.95
  splits = tables.splits.to_pylist()
  assert [line['split'] for line in splits] == ['base', 'pruned']
  assert splits[0]['pool_rows'] == 60 and splits[1]['rule'] == 'gap_aligned'
  assert json.loads(splits[1]['parameters'])['benchmarks'] == ['squares']
  assert tables.results.num_rows == 0 and 'top1' in tables.results.column_names
  assert 'squares' in repr(tables)


def test_what_is_missing_is_an_error_in_words(work, tmp_path):
  with pytest.raises(InputError, match='has no benchmark'):
    clip_jax.read(work).search('sqares')
  with pytest.raises(InputError, match='is no work directory'):
    clip_jax.read(tmp_path)
  (tmp_path / 'config.json').write_text('{"benchmarks": {"b": {}}, "splits": {}}')
  empty = clip_jax.read(str(tmp_path))
  for call in (empty.search, empty.duplicates):
    with pytest.raises(InputError, match='yet'):
      call('b')
  assert empty.splits.num_rows == empty.results.num_rows == 0


def test_results_of_evaluated_runs(tmp_path):
  (tmp_path / 'config.json').write_text('{"benchmarks": {"b": {}}, "splits": {"base": {}}}')
  for seed, top1 in ((0, 0.5), (10, 0.7), (2, 0.6)):
    folder = tmp_path / f'evaluate/base/seed{seed}'
    folder.mkdir(parents=True)
    (folder / 'b.json').write_text(json.dumps({'n': 4, 'top1': top1}))
  table = clip_jax.read(tmp_path).results
  assert table['seed'].to_pylist() == [0, 2, 10]
  assert table['top1'].to_pylist() == [0.5, 0.6, 0.7]
