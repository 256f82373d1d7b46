import json
import os
import pickle
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import reader
from clip_jax.data import table

_BYTES = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()


def _record(i, caption=None, **columns):
  return table.Record(
      key=f'k{i}', caption=f'caption {i} é' if caption is None else caption, label=i % 5 - 1,
      group=f'g{i // 2}', offset=i * 7, length=i, width=i, height=2 * i, columns=columns)


def _shard(path, n, first=0, skipped=(), **columns):
  path.write_bytes(_BYTES)
  return {'format': 'webdataset', 'root': '', 'path': str(path)}, table.Scan(
      [_record(first + i, **columns) for i in range(n)], list(skipped))


def _dataset(directory, shards, classes=()):
  """Writes and assembles shards of (file, scan), and opens them."""
  for i, (_, scan) in enumerate(shards):
    table.write_shard(str(directory), i, scan)
  counts = table.assemble(str(directory), [file for file, _ in shards], classes)
  return reader.Source(str(directory)), counts


@pytest.fixture(name='source')
def _source(tmp_path):
  shards = [_shard(tmp_path / f'{i}.tar', n, 10 * i) for i, n in enumerate((3, 0, 5))]
  return _dataset(tmp_path / 'index', shards)[0]


def test_samples_are_what_was_recorded(source):
  rows = [0, 1, 2, 20, 21, 22, 23, 24]
  assert len(source) == 8
  assert source.starts.tolist() == [0, 3, 3, 8] and source.starts.dtype == np.int64
  for row, i in enumerate(rows):
    assert source[np.int64(row)] == {
        'image': _BYTES[7 * i:8 * i], 'caption': f'caption {i} é', 'label': i % 5 - 1}
    assert source.caption(row) == f'caption {i} é'
  assert source.labels.tolist() == [i % 5 - 1 for i in rows] and source.labels.dtype == np.int32
  assert source.column('key').tolist() == [f'k{i}' for i in rows]
  assert source.column('width').tolist() == rows
  for row in (-1, 8, 1 << 40):
    with pytest.raises(IndexError):
      source[row]


def test_the_files_on_disk_are_as_agreed(tmp_path, source):
  rows = np.load(tmp_path / 'index' / 'table.npy', mmap_mode='r')
  assert rows.dtype == table.TABLE_DTYPE and rows['shard'].tolist() == [0] * 3 + [2] * 5
  text = (tmp_path / 'index' / 'captions.bin').read_bytes()
  row = rows[4]
  assert text[row['caption_offset']:][:row['caption_length']].decode() == 'caption 21 é'
  index = pq.read_table(tmp_path / 'index' / 'index-00002.parquet')
  assert index.column_names == [name for name in table.COLUMNS if name != 'path']
  assert index['shard'].to_pylist() == [2] * 5
  empty = pq.read_table(tmp_path / 'index' / 'index-00001.parquet')
  assert empty.num_rows == 0 and empty.schema == index.schema


def test_counts_tell_rows_and_reasons(tmp_path):
  skipped = [{'key': 'a', 'reason': 'no image'}, {'key': 'b', 'reason': 'no image'},
             {'key': 'c', 'reason': 'bad json'}]
  shards = [_shard(tmp_path / 'a.tar', 4, skipped=skipped[:1]),
            _shard(tmp_path / 'b.tar', 2, skipped=skipped[1:])]
  assert table.write_shard(str(tmp_path / 'x'), 0, shards[1][1]) == {
      'rows': 2, 'skipped': 2, 'left_out': 0, 'reasons': {'bad json': 1, 'no image': 1}}
  source, counts = _dataset(tmp_path / 'index', shards, [('cat', 'dog'), ()])
  assert [counts[name] for name in ('rows', 'skipped', 'shards', 'unlabelled')] == [6, 3, 2, 2]
  assert counts['reasons'] == {'bad json': 1, 'no image': 2} and source.classes == ('cat', 'dog')
  assert all((tmp_path / 'index' / name).exists() for name in counts['files'])
  assert json.loads((tmp_path / 'index' / 'skipped-00001.json').read_text()) == skipped[1:]
  with pytest.raises(InputError, match='different classes'):
    _dataset(tmp_path / 'index', shards, [('cat', 'dog'), ('dog', 'cat')])


def test_a_dataset_without_rows_can_be_opened(tmp_path):
  source, counts = _dataset(tmp_path / 'index', [_shard(tmp_path / 'a.tar', 0)])
  assert len(source) == counts['rows'] == 0 and source.classes == ()
  assert source.labels.tolist() == []
  assert source.column('key').tolist() == [] and source.starts.tolist() == [0, 0]
  source, _ = _dataset(tmp_path / 'none', [])
  assert len(source) == 0 and source.starts.tolist() == [0]


def test_captions_may_all_be_empty(tmp_path):
  source, _ = _dataset(tmp_path / 'index', [_shard(tmp_path / 'a.tar', 0)])
  shard = _shard(tmp_path / 'a.tar', 0)[0], table.Scan([_record(1, caption='')], [])
  source, _ = _dataset(tmp_path / 'index', [shard])
  assert source[0]['caption'] == source.caption(0) == ''


def test_columns_of_shards_that_differ_are_joined(tmp_path):
  def column(parts):
    file, _ = _shard(tmp_path / 'a.tar', 0)
    shards = [(file, table.Scan([_record(i, c=value) for i, value in enumerate(part)], []))
              for part in parts]
    return _dataset(tmp_path / 'index', [*shards, _shard(tmp_path / 'a.tar', 2)])[0].column('c')

  numbers = column([[1, None], [2.5, float('nan')], [None, None]])
  assert numbers[[0, 2]].tolist() == [1, 2.5] and np.isnan(numbers[[1, 3, 4, 5, 6, 7]]).all()
  assert column([[1, 2], ['x', None], [[1], {'a': 1}]]).tolist() == [
      '1', '2', 'x', None, '[1]', '{"a": 1}', None, None]
  assert column([[1 << 70, 2]]).tolist() == [str(1 << 70), '2', None, None]
  assert column([[None, None]]).tolist() == [None] * 4
  assert column([[3, 4], [5, 6]])[:4].tolist() == [3, 4, 5, 6]
  assert column([['x', float('nan')]]).tolist() == ['x', None, None, None]
  with pytest.raises(InputError, match="no column 'other'"):
    reader.Source(str(tmp_path / 'index')).column('other')


def test_shards_of_tars_and_folders_make_one_dataset(tmp_path):
  (tmp_path / 'images').mkdir()
  records = []
  for i in range(3):
    (tmp_path / 'images' / f'{i}.png').write_bytes(b'image %d' % i)
    records.append(table.Record(f'{i}.png', 'c', 0, 'g', 0, 7, 1, 1, {}, f'{i}.png'))
  files = {'format': 'folder', 'root': str(tmp_path / 'images'), 'path': ''}
  source, _ = _dataset(
      tmp_path / 'index', [_shard(tmp_path / 'a.tar', 2), (files, table.Scan(records, []))])
  assert [sample['image'] for sample in source] == [
      b'', _BYTES[7:8], b'image 0', b'image 1', b'image 2']
  other, _ = _dataset(tmp_path / 'other', [(files, table.Scan(records[1:2], []))])
  assert source.same_samples(other).tolist() == [False, False, False, True, False]
  assert other.same_samples(source).tolist() == [True]


def test_same_samples_are_the_same_bytes_of_the_same_file(tmp_path):
  file, scan = _shard(tmp_path / 'a.tar', 6)
  elsewhere, _ = _shard(tmp_path / 'b.tar', 6)
  pool, _ = _dataset(tmp_path / 'pool', [(elsewhere, scan), (file, scan)])
  some, _ = _dataset(tmp_path / 'some', [(file, table.Scan(scan.records[1:3], [])),
                                         (file, table.Scan(scan.records[4:5], []))])
  assert np.flatnonzero(pool.same_samples(some)).tolist() == [7, 8, 10]
  assert some.same_samples(pool).all()


def test_files_that_changed_are_named(tmp_path, source):
  (tmp_path / '2.tar').write_bytes(_BYTES[:150])
  with pytest.raises(InputError, match='2.tar ends at byte 150'):
    source[3]
  os.remove(tmp_path / '0.tar')
  with pytest.raises(InputError, match='0.tar cannot be read'):
    source[0]


def test_threads_and_pickles_read_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(reader, '_OPEN_FILES', 2)  # so that files are closed while others read
  shards = [_shard(tmp_path / f'{i}.tar', 20, 20 * i) for i in range(8)]
  source, _ = _dataset(tmp_path / 'index', shards)
  expected = list(source)
  assert len(pickle.dumps(source)) < 300
  again, wrong = pickle.loads(pickle.dumps(source)), []

  def read(seed):
    for row in np.random.default_rng(seed).integers(0, 160, 1500):
      if again[row] != expected[row]:
        wrong.append(row)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  opened = [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')]
  assert len([path for path in opened if path.startswith(str(tmp_path)) and '.tar' in path]) <= 4
