import json
import os
import pickle
import subprocess
import sys

import fsspec
from indexed import BYTES, dataset, in_threads, record, shard
import numpy as np
import pyarrow as pa
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import formats, reader, storage, table


@pytest.fixture(name='source')
def _source(tmp_path):
  shards = [shard(tmp_path / f'{i}.tar', n, 10 * i) for i, n in enumerate((3, 0, 5))]
  return dataset(tmp_path / 'index', shards)[0]


def test_samples_are_what_was_recorded(source):
  rows = [0, 1, 2, 20, 21, 22, 23, 24]
  assert len(source) == 8
  assert source.starts.tolist() == [0, 3, 3, 8] and source.starts.dtype == np.int64
  for row, i in enumerate(rows):
    assert source[np.int64(row)] == {
      'image': BYTES[7 * i : 8 * i],
      'caption': f'caption {i} é',
      'label': i % 5 - 1,
    }
    assert source.caption(row) == f'caption {i} é'
  assert source.labels.tolist() == [i % 5 - 1 for i in rows] and source.labels.dtype == np.int32
  assert source.column('key').tolist() == [f'k{i}' for i in rows]
  assert source.column('width').tolist() == rows
  for row in (-1, 8, 1 << 40):
    with pytest.raises(IndexError):
      source[row]


def test_a_dataset_without_rows_can_be_opened(tmp_path):
  source, counts = dataset(tmp_path / 'index', [shard(tmp_path / 'a.tar', 0)])
  assert len(source) == counts['rows'] == 0 and source.classes == ()
  assert source.labels.tolist() == []
  assert source.column('key').tolist() == [] and source.starts.tolist() == [0, 0]
  source, _ = dataset(tmp_path / 'none', [])
  assert len(source) == 0 and source.starts.tolist() == [0]


def test_captions_may_all_be_empty(tmp_path):
  source, _ = dataset(tmp_path / 'index', [shard(tmp_path / 'a.tar', 0)])
  blank = shard(tmp_path / 'a.tar', 0)[0], table.Scan([record(1, caption='')], [])
  source, _ = dataset(tmp_path / 'index', [blank])
  assert source[0]['caption'] == source.caption(0) == ''


def test_columns_of_shards_that_differ_are_joined(tmp_path):
  def column(parts):
    file, _ = shard(tmp_path / 'a.tar', 0)
    shards = [
      (file, table.Scan([record(i, c=value) for i, value in enumerate(part)], [])) for part in parts
    ]
    source = dataset(tmp_path / 'index', [*shards, shard(tmp_path / 'a.tar', 2)])[0]
    codes, names = source.levels('c')
    texts = pa.array(source.column('c'), from_pandas=True).cast(pa.string()).to_pylist()
    assert [names[code] if code >= 0 else None for code in codes] == [
      text or None for text in texts
    ]
    assert names == list(dict.fromkeys(text or '' for text in texts)) and codes.dtype == np.int32
    return source.column('c')

  numbers = column([[1, None], [2.5, float('nan')], [None, None]])
  assert numbers[[0, 2]].tolist() == [1, 2.5] and np.isnan(numbers[[1, 3, 4, 5, 6, 7]]).all()
  assert column([[1, 2], ['x', None], [[1], {'a': 1}]]).tolist() == [
    '1',
    '2',
    'x',
    None,
    '[1]',
    '{"a": 1}',
    None,
    None,
  ]
  assert column([[1 << 70, 2]]).tolist() == [str(1 << 70), '2', None, None]
  assert column([[None, None]]).tolist() == [None] * 4
  assert column([[3, 4], [5, 6]])[:4].tolist() == [3, 4, 5, 6]
  assert column([['x', float('nan')]]).tolist() == ['x', None, None, None]
  assert column([['b', 'a', ''], ['c', 'a']])[:5].tolist() == ['b', 'a', '', 'c', 'a']
  with pytest.raises(InputError, match="no column 'other'"):
    reader.Source(str(tmp_path / 'index')).column('other')


def test_same_samples_are_the_same_bytes_of_the_same_file(tmp_path):
  file, scan = shard(tmp_path / 'a.tar', 6)
  elsewhere, _ = shard(tmp_path / 'b.tar', 6)
  pool, _ = dataset(tmp_path / 'pool', [(elsewhere, scan), (file, scan)])
  some, _ = dataset(
    tmp_path / 'some',
    [(file, table.Scan(scan.records[1:3], [])), (file, table.Scan(scan.records[4:5], []))],
  )
  assert np.flatnonzero(pool.same_samples(some)).tolist() == [7, 8, 10]
  assert some.same_samples(pool).all()


def test_files_that_changed_are_named(tmp_path, source):
  (tmp_path / '2.tar').write_bytes(BYTES[:150])
  with pytest.raises(InputError, match='2.tar ends at byte 150'):
    source[3]
  os.remove(tmp_path / '0.tar')
  with pytest.raises(InputError, match='0.tar cannot be read'):
    source[0]


def test_threads_and_pickles_read_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(reader, '_OPEN_FILES', 2)  # so that files are closed while others read
  shards = [shard(tmp_path / f'{i}.tar', 20, 20 * i) for i in range(8)]
  source, _ = dataset(tmp_path / 'index', shards)
  expected = list(source)
  assert len(pickle.dumps(source)) < 300
  again, wrong = pickle.loads(pickle.dumps(source)), []

  def read(seed):
    for row in np.random.default_rng(seed).integers(0, 160, 1500):
      if again[row] != expected[row]:
        wrong.append(row)

  in_threads(read, 8)
  assert not wrong
  opened = [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')]
  assert len([path for path in opened if path.startswith(str(tmp_path)) and '.tar' in path]) <= 4


def _mixed(tmp_path):
  """A dataset of two tars here, two on a remote storage, a folder, and a format that reads many."""
  system = fsspec.filesystem('memory')
  shards = [shard(tmp_path / f'{i}.tar', 20, 20 * i) for i in range(2)]
  for i in range(2):
    system.pipe(f'/reader/{i}.tar', BYTES)
    where = {'format': 'webdataset', 'root': '', 'path': f'memory://reader/{i}.tar'}
    shards.append((where, table.Scan([record(100 * i + j) for j in range(20)], [])))
  (tmp_path / 'images').mkdir()
  images = []
  for i in range(4):
    (tmp_path / 'images' / f'{i}.png').write_bytes(b'image %d' % i)
    images.append(table.Record(f'{i}.png', 'c', 0, 'g', 0, 7, 1, 1, {}, f'{i}.png'))
  where = {'format': 'folder', 'root': str(tmp_path / 'images'), 'path': ''}
  shards.append((where, table.Scan(images, [])))
  where = {'format': 'rows', 'root': '', 'path': str(tmp_path / '0.tar')}
  shards.append((where, table.Scan([record(i) for i in range(20)], [])))
  return shards


class _Rows(storage.File):
  """A reader that can read many at once, as that of parquet can."""

  calls: list[int] = []

  def read_many(self, ranges):
    self.calls.append(len(ranges))
    return [self.read(*place) for place in ranges]


def test_many_is_one_after_another_whatever_the_storage(tmp_path, monkeypatch):
  asked, read = [], storage.read_ranges
  monkeypatch.setattr(
    storage, 'read_ranges', lambda ranges: asked.append(len(ranges)) or read(ranges)
  )
  monkeypatch.setitem(
    formats.FORMATS,
    'rows',
    formats.Format(formats.FORMATS['webdataset'].samples, lambda where: _Rows(where['path']), ()),
  )
  monkeypatch.setattr(_Rows, 'calls', [])
  source, _ = dataset(tmp_path / 'index', _mixed(tmp_path))
  rng = np.random.default_rng(0)
  for n in (0, 1, 7, 200):
    rows = rng.integers(0, len(source), n)
    expected = [source[row] for row in rows]
    asked.clear()
    _Rows.calls.clear()
    assert source.read_samples(rows) == source.read_samples(rows.tolist()) == expected
    assert len(asked) <= 2 and len(_Rows.calls) <= 2
  assert asked[0] > 50 and _Rows.calls[0] > 20
  for rows in ([0, len(source)], [-1]):
    with pytest.raises(IndexError):
      source.read_samples(rows)


def test_many_names_files_that_changed(tmp_path, source):
  (tmp_path / '2.tar').write_bytes(BYTES[:150])
  with pytest.raises(InputError, match='2.tar ends at byte 150'):
    source.read_samples([3, 4])
  os.remove(tmp_path / '0.tar')
  with pytest.raises(InputError, match='0.tar cannot be read'):
    source.read_samples([0])
  system = fsspec.filesystem('memory')
  system.pipe('/reader/x.tar', BYTES)
  where = {'format': 'webdataset', 'root': '', 'path': 'memory://reader/x.tar'}
  remote, _ = dataset(
    tmp_path / 'remote', [(where, table.Scan([record(i) for i in range(30)], []))]
  )
  system.pipe('/reader/x.tar', BYTES[:150])
  with pytest.raises(InputError, match='memory://reader/x.tar ends at byte 150'):
    remote.read_samples([1, 20, 21])
  system.rm('/reader/x.tar')
  with pytest.raises(InputError, match='memory://reader/x.tar'):
    remote.read_samples([1, 2])
  with pytest.raises(InputError, match='memory://reader/x.tar'):
    remote[1]


_HEAP = """
import json, sys
import numpy as np
from clip_jax.data import reader, views

def heap():
  with open('/proc/self/status') as f:
    return next(int(line.split()[1]) / 1024 for line in f if line.startswith('RssAnon'))

source = views.Subset(reader.Source(sys.argv[1]), sys.argv[1] + '/rows.npy')
place = (lambda k, rng=np.random.default_rng(0): int(rng.integers(len(source))))
if sys.argv[2] == 'order':
  from clip_jax.data import order
  place = order.Global(len(source), 1).place
[source[place(k)] for k in range(500)]
begin = heap()
for k in range(500, 20_500):
  source[place(k)]
  if not k % 100:
    source.read_samples([place(k + i) for i in range(20)])
print(json.dumps([len(source), begin, heap() - begin]))
"""


def _large(directory, rows, shards):
  """Writes a table of many rows of one small tar and of one folder, as assemble would."""
  directory.mkdir()
  (directory / 'x.tar').write_bytes(BYTES)
  (directory / 'a').mkdir()
  (directory / 'a' / 'x.png').write_bytes(b'image')
  places, numbers = np.zeros(rows, table.TABLE_DTYPE), np.arange(rows)
  places['shard'] = numbers * shards // rows
  places['offset'], places['length'] = numbers % 90_000, 1 + numbers % 100
  places['caption_offset'], places['caption_length'] = numbers * 20, 20
  image = places['shard'] == shards - 1  # the folder
  places['offset'][image], places['length'][image] = 0, 5
  np.save(directory / 'table.npy', places)
  np.save(directory / 'starts.npy', np.searchsorted(places['shard'], np.arange(shards + 1)))
  np.save(directory / 'rows.npy', np.flatnonzero(numbers % 3 != 1))
  ends = np.cumsum(image * len('a/x.png'))
  np.save(directory / 'path_ends.npy', ends)
  (directory / 'paths.bin').write_bytes(b'a/x.png' * int(image.sum()))
  with open(directory / 'captions.bin', 'wb') as f:
    f.truncate(20 * rows)
  where = {'format': 'webdataset', 'root': '', 'path': str(directory / 'x.tar'), 'image_key': 'jpg'}
  folder = {'format': 'folder', 'root': str(directory), 'path': '', 'image_key': 'jpg'}
  (directory / 'files.json').write_text(
    json.dumps({'shards': [where] * (shards - 1) + [folder], 'classes': []})
  )


def _heap(directory, order='random'):
  """Returns (rows, MB of private memory after the first reads, MB that 20,000 more add)."""
  done = subprocess.run(
    [sys.executable, '-c', _HEAP, str(directory), order], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_rows(tmp_path):
  found = []
  for rows in (100_000, 3_000_000):
    _large(tmp_path / str(rows), rows, 50)
    found.append(_heap(tmp_path / str(rows)))
  (small, begin, grown), (large, large_begin, large_grown) = found
  assert large > 25 * small  # of rows there would be 100 MB, of the list of chosen rows 16
  assert abs(large_begin - begin) < 4 and grown < 3 and large_grown < 3 and large_begin < 100


@pytest.mark.slow
def test_memory_of_many_millions_of_rows_in_the_order_of_training(tmp_path):
  found = []
  for rows in (2_000_000, 5_000_000, 20_000_000):
    _large(tmp_path / str(rows), rows, 2000)
    found.append(_heap(tmp_path / str(rows), 'order'))
  for _, begin, grown in found:
    assert abs(begin - found[0][1]) < 8 and grown < 8 and begin < 200
