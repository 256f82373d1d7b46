"""configs/datacomp_filters.py on metadata as DataComp stores it."""

import importlib.util
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import squares
import tiny

from clip_jax import defaults

ROWS = 50  # of each of two files


@pytest.fixture(name='data')
def _data(tmp_path):
  """Metadata of 100 samples, with scores (one is missing), and a benchmark with two duplicates."""
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  queries = unit(rng.normal(size=(6, 16)))
  (tmp_path / 'metadata').mkdir()
  (tmp_path / 'val').mkdir()
  np.savez(tmp_path / 'val/val.npz', l14_img=queries.astype(np.float16))
  for part in range(2):
    vectors = unit(rng.normal(size=(ROWS, 16)))
    vectors[3] = queries[part]
    numbers = np.arange(ROWS) + part * ROWS
    np.savez(
      tmp_path / f'metadata/{part:08x}.npz',
      l14_img=vectors.astype(np.float16),
      b32_img=unit(rng.normal(size=(ROWS, 8))).astype(np.float16),
    )
    score = (numbers * 37 % 100).astype(np.float32) / 100
    pq.write_table(
      pa.table(
        {
          'uid': [f'{i:032x}' for i in numbers],
          'text': [f'caption {i}' for i in numbers],
          'LANGUAGE': ['en' if i % 3 else 'de' for i in numbers],
          'clip_b32_similarity_score': pa.array(score, mask=numbers == 7),
          'clip_l14_similarity_score': score[::-1].copy(),
        }
      ),
      tmp_path / f'metadata/{part:08x}.parquet',
    )
  return tmp_path


def filters(data, form=''):
  spec = importlib.util.spec_from_file_location(
    'filters', tiny.ROOT / 'configs/datacomp_filters.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(form)
  c.pool.path = f'{data}/metadata/*.npz'
  return c


def test_filters_write_uid_files(data, capsys):
  c = filters(data)
  c.splits.named.words = ('caption 1', 'caption 2')
  c.benchmark_dirs = f'val={data}/val'
  c.splits.clean = defaults.split(rule='below', similarity=0.95, benchmarks=('val',))
  c.splits.both = defaults.split(
    rule='intersection', of=('clean', 'clip_score_l14_30'), export=('datacomp',)
  )
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0, said
  uids = lambda split: np.load(data / f'w/splits/{split}/export/uids.npy')['f1'].tolist()
  numbers = np.arange(100)
  score = numbers * 37 % 100 / 100
  expected = [i for i in numbers if score[i] >= 0.3 and i != 7]
  assert uids('laion_threshold') == expected
  l14 = np.concatenate([score[:ROWS][::-1], score[ROWS:][::-1]])
  best = sorted(np.argsort(-l14, kind='stable')[:30].tolist())
  assert uids('clip_score_l14_30') == best
  c.splits.named.words = ('caption 7', 'CAPTION 42')
  assert squares.run(c, data / 'w', capsys, ['prune'])[0] == 0
  assert uids('named') == [7, 42]
  assert uids('both') == [i for i in best if i not in (3, 53)]


def test_the_image_based_filter_and_its_intersection(data, capsys):
  """The pool gets four far groups of images; the anchor shows two of them."""
  rng = np.random.default_rng(1)
  groups = np.arange(2 * ROWS) % 4
  pool = np.repeat(np.eye(4), 4, axis=1)[groups] + 0.05 * rng.normal(size=(2 * ROWS, 16))
  for part in range(2):
    np.savez(data / f'metadata/{part:08x}.npz', l14_img=pool[part * ROWS :][:ROWS] / 2)
  anchor = np.repeat(np.eye(4), 4, axis=1)[[1, 3, 3]] + 0.05 * rng.normal(size=(3, 16))
  (data / 'imagenet').mkdir()
  np.save(data / 'imagenet/train.npy', anchor / 2)
  c = filters(data, 'images')
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 2 and 'Give an anchor (--config.anchor.path=DIR), or reference=' in said
  c.anchor.path = f'{data}/imagenet/*.npy'
  c.pool.any_norm = c.anchor.any_norm = True
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 2, said
  assert 'config.splits.image_based.clusters=100,000 is more than the 100 rows of the pool' in said
  c.splits.image_based.clusters = 12
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0, said
  uids = lambda split: np.load(data / f'w/splits/{split}/export/uids.npy')['f1'].tolist()
  kept = uids('image_based')
  assert kept and set(groups[kept]) == {1, 3}  # no cluster spans two groups
  assert uids('image_based_and_clip_score') == sorted({*kept} & {*uids('clip_score_l14_30')})
  about = squares.Experiment(c, str(data / 'w')).path('splits/image_based/split.json')
  with open(about) as f:
    about = json.load(f)
  assert about['anchor_rows'] == 0 and about['dropped'] == 100 - len(kept)
  figures = about['draws']['rows']
  assert figures['clusters'] == 12 and figures['reference_rows'] == 3
  assert 2 <= figures['clusters_kept'] <= 3


def test_a_column_selects_the_language(data, capsys):
  c = filters(data)
  c.pool = defaults.dataset(**{**c.pool, 'where': dict(LANGUAGE='en')})
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0, said
  with open(data / 'w/splits/clip_score_l14_30/split.json') as f:
    assert json.load(f)['candidates'] == 66
