"""Local copies of remote files, and the formats that are read from them."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil

from array_record.python import array_record_module
import fsspec
import pyarrow.parquet as pq
import pytest
import test_tfds

from clip_jax import defaults
from clip_jax.core.errors import InputError
from clip_jax.data import array_record, copies, listing, reader, storage, table
from clip_jax.experiment import shards
from clip_jax.stages import ingest

_DATA = os.urandom(100_000)


@pytest.fixture(name='cache', autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv(copies._FOLDER, str(tmp_path / 'cache'))
  monkeypatch.setenv(copies._LIMIT, '0')
  monkeypatch.setattr(copies, '_AT_ONCE', 40_000)
  return tmp_path / 'cache'


@pytest.fixture(name='system')
def _system():
  system = fsspec.filesystem('memory')
  system.pipe('/copied/x.npy', _DATA)
  yield system
  system.rm('/copied', recursive=True)


def _listed():
  return listing.list_files('embeddings', 'memory://copied')[0]


def _copies(cache):
  return [path for path in cache.iterdir() if path.suffix != '.lock']


def test_a_remote_file_is_copied_once_and_again_when_it_changes(cache, system, monkeypatch):
  path = copies.local_copy(_listed())
  assert pathlib.Path(path).read_bytes() == _DATA and _copies(cache) == [pathlib.Path(path)]
  with monkeypatch.context() as patch:
    patch.setattr(storage, 'open_file', None)
    assert copies.local_copy(_listed()) == path  # no second copy
    assert copies.of('memory://copied/x.npy') == path
    assert copies.copied(_listed()).path == path
    file = _listed()
    assert copies.opened({'path': file.path, **copies.stored(file)}) == path
  system.pipe('/copied/x.npy', _DATA[::-1])
  assert pathlib.Path(copies.local_copy(_listed())).read_bytes() == _DATA[::-1]


def test_a_local_file_is_its_own_copy(tmp_path, cache):
  (tmp_path / 'x').write_bytes(_DATA)
  file = storage.SourceFile(str(tmp_path / 'x'), 'x', len(_DATA), 1.5)
  assert copies.local_copy(file) == copies.of(file.path) == file.path
  assert copies.stored(file) == {} and copies.opened({'path': file.path}) == file.path
  assert not cache.exists()


def test_an_incomplete_copy_is_never_read(cache, system, monkeypatch):
  whole = storage.RemoteFile.read_many
  monkeypatch.setattr(
    storage.RemoteFile, 'read_many', lambda *args: [part[:-1] for part in whole(*args)]
  )
  with pytest.raises(InputError, match='x.npy ends at byte 9,999 of 100,000'):
    copies.local_copy(_listed())
  assert not _copies(cache)
  monkeypatch.undo()
  path = pathlib.Path(copies.local_copy(_listed()))
  path.write_bytes(path.read_bytes()[:100])  # a disk that lost its end
  assert pathlib.Path(copies.local_copy(_listed())).read_bytes() == _DATA


def test_beyond_the_limit_the_least_recently_used_copies_go(cache, system, monkeypatch):
  for i in range(5):
    system.pipe(f'/copied/{i}.npy', bytes([i]) * 1000)
  copies.keep_in(str(cache), 2500)
  (cache / f'{0:016x}-tfds').mkdir(parents=True)
  (cache / 'other').write_bytes(_DATA)  # no copies of files
  paths = [copies.of(f'memory://copied/{i}.npy') for i in range(5)]
  assert all(map(os.path.exists, paths))  # they were all used within a minute
  for i, path in enumerate(paths):
    os.utime(path, (i, i))
  assert copies.of('memory://copied/0.npy') == paths[0]  # so it was used last
  whole = copies.of('memory://copied/x.npy')
  assert [os.path.exists(path) for path in (*paths, whole)] == [True, *[False] * 4, True]
  assert (cache / f'{0:016x}-tfds').exists() and (cache / 'other').exists()
  for i, path in enumerate(paths):
    assert pathlib.Path(copies.of(f'memory://copied/{i}.npy')).read_bytes() == bytes([i]) * 1000


def test_of_several_readers_one_copies(system, monkeypatch):
  copied, copy = [], copies._copy
  monkeypatch.setattr(copies, '_copy', lambda *args: copied.append(1) or copy(*args))
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    paths = list(threads.map(copies.local_copy, [_listed()] * 8))
  assert len(set(paths)) == len(copied) == 1


def _folder(queue):
  queue.put(copies.folder())


def test_worker_processes_have_the_same_folder(tmp_path, monkeypatch):
  copies.keep_in(str(tmp_path / 'other'))
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  worker = context.Process(target=_folder, args=(queue,), daemon=True)
  worker.start()
  assert queue.get(timeout=60) == copies.folder() == str(tmp_path / 'other')
  worker.join()
  monkeypatch.delenv(copies._FOLDER)
  monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
  assert copies.folder() == '/caches/clip_jax/copies'


def test_a_missing_file_is_named(system):
  with pytest.raises(InputError, match='memory://copied/none.txt does not exist'):
    copies.of('memory://copied/none.txt')


def _upload(system, folder, url):
  for path in pathlib.Path(folder).rglob('*'):
    if path.is_file():
      system.pipe(f'{url}/{path.relative_to(folder)}', path.read_bytes())


def _indexed(block, folder):
  """Returns the dataset's rows, images and stored locations, as a new process reads them."""
  listed = shards.list_shards(block)
  for shard in listed:
    ingest.scan_shard((str(folder), shard, False))
  table.assemble(str(folder), [s.location() for s in listed], [s.classes for s in listed])
  source = reader.Source(str(folder))
  rows = source.read_samples(range(len(source)))
  index = [pq.read_table(folder / f'index-{i:05d}.parquet').to_pylist() for i in range(len(listed))]
  return rows, index, source.classes, [list(shard.stamps(False)) for shard in listed]


def _write_records(folder):
  folder.mkdir()
  for number in range(2):
    path = str(folder / f'x-{number}.array_record')
    writer = array_record_module.ArrayRecordWriter(path, array_record.OPTIONS)
    for i in range(5):
      features = {'jpg': b'image %d' % i, 'txt': f'words {i}', 'key': f'{number}/{i}', 'label': i}
      writer.write(array_record.example(features))
    writer.close()
  return str(folder)


@pytest.mark.parametrize('format', ['array_record', 'tfds'])
def test_a_remote_dataset_has_the_rows_of_the_local_one(
  format, cache, system, tmp_path, monkeypatch
):
  if format == 'tfds':
    folder, split = test_tfds.write_noise(tmp_path / 'tfds', 'array_record'), '/val'
  else:
    folder, split = _write_records(tmp_path / 'records'), ''
  url = 'memory://copied/NAME/1.0.0'
  _upload(system, folder, url)
  found = []
  for where in (folder, url):
    block = defaults.dataset(format=format, path=where + split, label_key='label')
    found.append(_indexed(block, tmp_path / f'index-{len(found)}'))
  assert found[0][0] and found[0] == found[1]
  located = json.loads((tmp_path / 'index-1' / 'files.json').read_text())['shards']
  assert all(shard['path'].startswith(url) for shard in located)
  assert str(tmp_path) not in json.dumps(located)
  shutil.rmtree(cache)  # another machine
  monkeypatch.setenv(copies._FOLDER, str(tmp_path / 'elsewhere'))
  source = reader.Source(str(tmp_path / 'index-1'))
  assert source.read_samples(range(len(source))) == found[0][0]
  assert len(_copies(tmp_path / 'elsewhere')) == len(located)


def test_a_record_file_that_changed_since_it_was_indexed_is_an_error(system, tmp_path):
  _upload(system, _write_records(tmp_path / 'records'), 'memory://copied/records')
  block = defaults.dataset(format='array_record', path='memory://copied/records/x-0.*')
  _indexed(block, tmp_path / 'index')
  shutil.rmtree(copies.folder())
  system.pipe('/copied/records/x-0.array_record', _DATA)
  with pytest.raises(InputError, match='x-0.array_record'):
    reader.Source(str(tmp_path / 'index'))[0]


def test_a_tfds_dataset_that_is_not_whole_is_an_error(system, tmp_path):
  url = 'memory://copied/noise/1.0.0'
  with pytest.raises(InputError, match='DIR/NAME/VERSION/SPLIT'):
    listing.list_files('tfds', f'{url}/train')
  folder = test_tfds.write_noise(tmp_path / 'tfds', 'array_record')
  _upload(system, folder, url)
  with pytest.raises(InputError, match=f'has train, val. Give {url}/train'):
    listing.list_files('tfds', f'{url}/test')
  system.rm(system.glob('/copied/noise/1.0.0/*val*')[1])
  with pytest.raises(InputError, match=f'{url}/.*val.* is missing, but dataset_info.json names it'):
    listing.list_files('tfds', f'{url}/val')
