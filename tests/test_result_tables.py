"""The tables of a work directory: clip_jax.read."""

import json

import numpy as np
import pytest
import squares

import clip_jax
from clip_jax.core.errors import InputError
from clip_jax.evaluation import few_shot, retrieval
from clip_jax.experiment import result_tables


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


def test_recalls_and_few_shot_accuracies_are_columns(tmp_path):
  (tmp_path / 'config.json').write_text(
    '{"benchmarks": {"b": {}, "pairs": {}}, "splits": {"base": {}}}'
  )
  ends = lambda value: {'value': value, 'low': value - 0.1, 'high': None}
  recalls = {f'image-to-text recall@{k}': ends(k / 10) for k in (1, 5)}
  recalls['text-to-image recall@1'] = ends(0.2)
  of_shots = {'top1': 0.4, 'top1_low': 0.3, 'top1_high': 0.5, 'n': 4}
  (tmp_path / 'evaluate/base/seed0').mkdir(parents=True)
  for name, scores in (('b', {'few_shot': {'5': of_shots}}), ('pairs', {'recalls': recalls})):
    path = tmp_path / f'evaluate/base/seed0/{name}.json'
    path.write_text(json.dumps({'n': 4, 'top1': 0.5} | scores))
  table = clip_jax.read(tmp_path).results
  classified, pairs = table.to_pylist()
  further = [c for c in table.column_names if c.startswith(('image', 'text', 'few'))]
  assert len(further) == 3 * (6 + 4)
  assert list(result_tables.RECALLS.values()) == [
    f'{direction} recall@{k}' for direction in retrieval.DIRECTIONS for k in retrieval.KS
  ]
  assert list(result_tables.FEW_SHOT.values()) == list(map(str, few_shot.SHOTS))
  assert {c: v for c, v in classified.items() if c in further and v is not None} == {
    'few_shot_5': 0.4,
    'few_shot_5_low': 0.3,
    'few_shot_5_high': 0.5,
  }
  assert {c: v for c, v in pairs.items() if c in further and v is not None} == {
    'image_to_text_recall_1': 0.1,
    'image_to_text_recall_1_low': 0.0,
    'image_to_text_recall_5': 0.5,
    'image_to_text_recall_5_low': 0.4,
    'text_to_image_recall_1': 0.2,
    'text_to_image_recall_1_low': 0.1,
  }
