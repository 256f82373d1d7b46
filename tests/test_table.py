import json

from indexed import BYTES, dataset, shard
import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import table


@pytest.fixture(name='source')
def _source(tmp_path):
  shards = [shard(tmp_path / f'{i}.tar', n, 10 * i) for i, n in enumerate((3, 0, 5))]
  return dataset(tmp_path / 'index', shards)[0]


def test_the_files_on_disk_are_as_agreed(tmp_path, source):
  rows = np.load(tmp_path / 'index' / 'table.npy', mmap_mode='r')
  assert rows.dtype == table.TABLE_DTYPE and rows['shard'].tolist() == [0] * 3 + [2] * 5
  text = (tmp_path / 'index' / 'captions.bin').read_bytes()
  row = rows[4]
  assert text[row['caption_offset'] :][: row['caption_length']].decode() == 'caption 21 é'
  index = pq.read_table(tmp_path / 'index' / 'index-00002.parquet')
  assert index.column_names == [name for name in table.COLUMNS if name != 'path']
  assert index['shard'].to_pylist() == [2] * 5
  empty = pq.read_table(tmp_path / 'index' / 'index-00001.parquet')
  assert empty.num_rows == 0 and empty.schema == index.schema


def test_counts_tell_rows_and_reasons(tmp_path):
  skipped = [
    {'key': 'a', 'reason': 'no image'},
    {'key': 'b', 'reason': 'no image'},
    {'key': 'c', 'reason': 'bad json'},
  ]
  shards = [
    shard(tmp_path / 'a.tar', 4, skipped=skipped[:1]),
    shard(tmp_path / 'b.tar', 2, skipped=skipped[1:]),
  ]
  assert table.write_shard(str(tmp_path / 'x'), 0, shards[1][1]) == {
    'rows': 2,
    'skipped': 2,
    'left_out': 0,
    'reasons': {'bad json': 1, 'no image': 1},
  }
  source, counts = dataset(tmp_path / 'index', shards, [('cat', 'dog'), ()])
  assert [counts[name] for name in ('rows', 'skipped', 'shards', 'unlabelled')] == [6, 3, 2, 2]
  assert counts['reasons'] == {'bad json': 1, 'no image': 2} and source.classes == ('cat', 'dog')
  assert all((tmp_path / 'index' / name).exists() for name in counts['files'])
  assert json.loads((tmp_path / 'index' / 'skipped-00001.json').read_text()) == skipped[1:]
  with pytest.raises(InputError, match='different classes'):
    dataset(tmp_path / 'index', shards, [('cat', 'dog'), ('dog', 'cat')])


def test_shards_of_tars_and_folders_make_one_dataset(tmp_path):
  (tmp_path / 'images').mkdir()
  records = []
  for i in range(3):
    (tmp_path / 'images' / f'{i}.png').write_bytes(b'image %d' % i)
    records.append(table.Record(f'{i}.png', 'c', 0, 'g', 0, 7, 1, 1, {}, f'{i}.png'))
  files = {'format': 'folder', 'root': str(tmp_path / 'images'), 'path': ''}
  source, _ = dataset(
    tmp_path / 'index', [shard(tmp_path / 'a.tar', 2), (files, table.Scan(records, []))]
  )
  assert [sample['image'] for sample in source] == [
    b'',
    BYTES[7:8],
    b'image 0',
    b'image 1',
    b'image 2',
  ]
  other, _ = dataset(tmp_path / 'other', [(files, table.Scan(records[1:2], []))])
  assert source.same_samples(other).tolist() == [False, False, False, True, False]
  assert other.same_samples(source).tolist() == [True]
