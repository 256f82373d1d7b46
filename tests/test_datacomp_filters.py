"""configs/datacomp_filters.py on metadata as DataComp stores it."""

import importlib.util

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
          'clip_b32_similarity_score': pa.array(score, mask=numbers == 7),
          'clip_l14_similarity_score': score[::-1].copy(),
        }
      ),
      tmp_path / f'metadata/{part:08x}.parquet',
    )
  return tmp_path


def test_filters_write_uid_files(data, capsys):
  spec = importlib.util.spec_from_file_location(
    'filters', tiny.ROOT / 'configs/datacomp_filters.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  c.pool.path = f'{data}/metadata/*.npz'
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
