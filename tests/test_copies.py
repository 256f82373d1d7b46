"""Local copies of remote files, and the formats that are read from them."""

import concurrent.futures
import multiprocessing
import os
import pathlib

import fsspec
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import copies, listing, storage

_DATA = os.urandom(100_000)


@pytest.fixture(name='cache', autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv(copies._FOLDER, str(tmp_path / 'cache'))
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
  path = pathlib.Path(copies.local_copy(_listed(), str(cache)))
  path.write_bytes(path.read_bytes()[:100])  # a disk that lost its end
  assert pathlib.Path(copies.local_copy(_listed(), str(cache))).read_bytes() == _DATA


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
