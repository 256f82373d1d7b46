import asyncio
import collections
import concurrent.futures
import io
import multiprocessing
import os
import pickle
import random
import re
import socket
import threading

import fsspec
from fsspec import asyn
import pytest
import web

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, listing, storage

_DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(name='memory')
def _memory():
  system = fsspec.filesystem('memory')
  system.pipe('/bucket/a.bin', _DATA)
  yield 'memory://bucket/a.bin'
  system.rm('/bucket', recursive=True)


@pytest.fixture(name='site')
def _site(tmp_path):
  (tmp_path / 'a.bin').write_bytes(_DATA)
  with web.serve(tmp_path) as (url, server):
    yield f'{url}/a.bin', server


def _small_windows(monkeypatch):
  monkeypatch.setattr(storage, '_WINDOW', 4096)
  monkeypatch.setattr(storage, '_REMOTE_WINDOW', 5000)


def _opened(kind, tmp_path, memory):
  (tmp_path / 'a.bin').write_bytes(_DATA)
  return storage.open_file(str(tmp_path / 'a.bin') if kind == 'local' else memory)


@pytest.mark.parametrize('kind', ['local', 'memory'])
def test_any_place_can_be_read(kind, tmp_path, memory):
  file = _opened(kind, tmp_path, memory)
  assert file.size() == len(_DATA)
  for offset, length in ((0, 10), (123_456, 7), (299_990, 10), (299_990, 99), (5, 0), (0, 1 << 20)):
    assert file.read(offset, length) == _DATA[offset : offset + length]


def test_a_stamp_tells_states_apart():
  local = storage.SourceFile('/x', 'x', 5, 2.5)
  remote = storage.SourceFile('s3://b/x', 'x', 5, 0.0, 'etag')
  assert local.stamp == '5 2.5' and remote.stamp == '5 etag'


@pytest.mark.parametrize('kind', ['local', 'memory'])
def test_reading_ahead_gives_the_bytes_of_the_file_in_any_order(
  kind, tmp_path, memory, monkeypatch
):
  _small_windows(monkeypatch)
  rng = random.Random(1)
  for _ in range(30):
    ahead, at = storage.ReadAhead(_opened(kind, tmp_path, memory)), 0
    for _ in range(60):
      length = rng.choice((1, 512, 3000, 9000))
      if rng.random() < 0.1:
        at = rng.randrange(len(_DATA) + 1000)
      assert ahead.read(at, length) == _DATA[at : at + length]
      at += length + rng.choice((0, 0, 0, 700, 4000, 30_000))
      if rng.random() < 0.02:
        ahead.close()
    ahead.close()


class _Counting(storage.RemoteFile):
  """A remote file that notes what is read of it, and by which thread."""

  def __init__(self, path):
    super().__init__(path)
    self.reads, self.threads = [], set()

  def read(self, offset, length):
    self.reads.append((offset, length))
    self.threads.add(threading.get_ident())
    return super().read(offset, length)


def test_a_remote_pass_fetches_each_byte_once_and_ahead(memory, monkeypatch):
  _small_windows(monkeypatch)
  file = _Counting(memory)
  ahead = storage.ReadAhead(file)
  assert b''.join(ahead.read(at, 100) for at in range(0, len(_DATA), 100)) == _DATA
  assert sum(length for _, length in file.reads) == len(_DATA)
  assert sorted(offset for offset, _ in file.reads) == list(range(0, len(_DATA), 5000))
  assert threading.get_ident() in file.threads and len(file.threads) > 1
  ahead.close()


def test_what_a_remote_pass_skips_is_not_read(memory, monkeypatch):
  _small_windows(monkeypatch)
  file = _Counting(memory)
  ahead = storage.ReadAhead(file)
  for at in range(0, len(_DATA), 30_000):
    assert ahead.read(at, 100) == _DATA[at : at + 100]
  ahead.close()
  assert sum(length for _, length in file.reads) <= 10 * 5000 + 3 * 5000


def test_a_file_that_shrinks_ends_a_pass(tmp_path, monkeypatch):
  _small_windows(monkeypatch)
  (tmp_path / 'a.bin').write_bytes(_DATA)
  ahead = storage.ReadAhead(storage.open_file(str(tmp_path / 'a.bin')))
  os.truncate(tmp_path / 'a.bin', 10_000)
  assert ahead.read(9000, 4000) == _DATA[9000:10_000] and ahead.read(20_000, 10) == b''


@pytest.mark.parametrize('kind', ['local', 'memory'])
def test_a_stream_seeks_and_reads(kind, tmp_path, memory):
  (tmp_path / 'a.bin').write_bytes(_DATA)
  with storage.open_stream(str(tmp_path / 'a.bin') if kind == 'local' else memory) as stream:
    assert stream.seek(-8, io.SEEK_END) == len(_DATA) - 8 and stream.read() == _DATA[-8:]
    assert stream.read(5) == b'' and stream.seek(1000) == 1000
    assert stream.read(10) == _DATA[1000:1010] and stream.tell() == 1010
    assert stream.seek(90, io.SEEK_CUR) == 1100 and stream.read(200_000) == _DATA[1100:201_100]
    assert stream.seek(0) == 0 and stream.read() == _DATA


def test_ranges_come_in_order_however_they_are_merged(memory, monkeypatch):
  fsspec.filesystem('memory').pipe('/bucket/b.bin', _DATA[::-1])
  monkeypatch.setattr(storage, '_MAX_GAP', 1000)
  monkeypatch.setattr(storage, '_MAX_MERGED', 20_000)
  contents = {memory: _DATA, memory.replace('a.bin', 'b.bin'): _DATA[::-1]}
  rng = random.Random(2)
  for _ in range(50):
    ranges = [
      (rng.choice(list(contents)), rng.randrange(len(_DATA)), rng.choice((0, 1, 900, 30_000)))
      for _ in range(rng.randrange(40))
    ]
    assert storage.read_ranges(ranges) == [
      contents[path][offset : offset + length] for path, offset, length in ranges
    ]


def test_neighbours_are_one_request_and_the_rest_are_not(site):
  url, server = site
  file = storage.open_file(url)
  assert file.read_many([(70_000, 10), (100, 50), (0, 50), (250_000, 9)]) == [
    _DATA[70_000:70_010],
    _DATA[100:150],
    _DATA[:50],
    _DATA[250_000:250_009],
  ]
  asked = sorted(wanted for _, wanted in server.asked)
  assert asked == ['bytes=0-149', 'bytes=250000-250008', 'bytes=70000-70009']


def test_a_web_server_is_read_in_parts(site):
  url, server = site
  file = storage.open_file(url)
  assert file.size() == len(_DATA) and file.read(1000, 10) == _DATA[1000:1010]
  with storage.open_stream(url) as stream:
    stream.seek(200_000)
    assert stream.read() == _DATA[200_000:]
  assert server.asked and all(wanted for _, wanted in server.asked)


@pytest.fixture(name='waits')
def _waits(monkeypatch):
  waits = []
  monkeypatch.setattr(storage.time, 'sleep', waits.append)
  return waits


@pytest.mark.parametrize('how', ['503', '429', 'cut', 'reset'])
def test_a_server_that_fails_now_and_then_is_asked_again(site, how, waits, monkeypatch):
  url, server = site
  said = []
  monkeypatch.setattr(storage.logging, 'warning', lambda text, *values: said.append(text % values))
  ranges = [(url, 70_000 * i, 1000) for i in range(4)]
  server.fails, server.how = 6, how
  assert storage.read_ranges(ranges) == [_DATA[at : at + 1000] for _, at, _ in ranges]
  assert len(server.asked) <= 10  # only what has failed is asked for again
  assert waits == list(storage._WAITS[: len(said)]) and 1 <= len(said) <= 2
  assert all(re.search('a.bin cannot be read .*Trying again in', text) for text in said)
  if how != 'cut':
    server.fails = 2  # both ways to ask
    assert storage.open_file(url).size() == len(_DATA)


class _Busy:
  """A storage that serves one more range at every fourth request."""

  def __init__(self):
    self.asked = collections.Counter()

  def cat_file(self, path, start, end, **_):
    self.asked[start] += 1
    if self.asked[start] < 4 * (1 + start // 70_000):
      raise OSError('busy')
    return _DATA[start:end]


def test_a_storage_that_serves_some_each_time_is_asked_for_the_rest(waits, monkeypatch):
  monkeypatch.setattr(storage, 'file_system', lambda path, busy=_Busy(): busy)
  ranges = [('memory://b/a.bin', 70_000 * i, 10) for i in range(4)]
  assert storage.read_ranges(ranges) == [_DATA[at : at + 10] for _, at, _ in ranges]
  assert len(waits) > len(storage._WAITS)


def test_a_file_that_is_missing_is_not_asked_for_again(memory, waits):
  with pytest.raises(InputError, match='none.bin does not exist'):
    storage.open_file(memory.replace('a.bin', 'none.bin')).read(0, 10)
  with pytest.raises(InputError, match='none.bin does not exist'):
    storage.open_file(memory.replace('a.bin', 'none.bin')).size()
  assert not waits


@pytest.mark.parametrize('how', ['503', 'cut', 'reset', '403', '404'])
def test_a_server_that_goes_on_failing_is_an_error(site, how, waits):
  url, server = site
  server.fails, server.how = 1000, how
  with pytest.raises(InputError, match='a.bin') as error:
    storage.open_file(url).read(0, 10)
  assert len(waits) == (0 if how in ('403', '404') else len(storage._WAITS))
  assert ('cannot be read' in str(error.value)) == (how != '404')
  again = pickle.loads(pickle.dumps(error.value))  # as where another process reads
  assert isinstance(again, InputError) and str(again) == str(error.value)


def test_errors_of_the_network_name_the_path(site, tmp_path, waits):
  url, server = site
  with pytest.raises(InputError, match='none.bin does not exist'):
    storage.open_file(url.replace('a.bin', 'none.bin')).read(0, 10)
  server.fails = 5
  with pytest.raises(InputError, match='a.bin cannot be read .*503'):
    storage.open_file(url).read(0, 10)
  with pytest.raises(InputError, match='a.bin cannot be read'):
    storage.open_file(url).read(len(_DATA) + 5, 10)
  with web.serve(tmp_path, ranges=False) as (whole, _):
    with pytest.raises(InputError, match='a.bin .*whole files'):
      storage.open_file(f'{whole}/a.bin').read(5, 10)
    gone = f'{whole}/a.bin'
  with pytest.raises(InputError, match='a.bin'):
    storage.open_file(gone).read(5, 10)


@pytest.mark.parametrize(
  ('path', 'say'),
  [
    ('gs://b/x', r'clip-jax-ood\[gcs\]'),
    ('s3://b/x', r'clip-jax-ood\[s3\]'),
    ('https://h/x', r'clip-jax-ood\[http\]'),
    ('az://c/x', r'clip-jax-ood\[az\]'),
    ('abfs://c/x', r'clip-jax-ood\[az\]'),
    ('hf://datasets/u/n/x', r'clip-jax-ood\[hf\]'),
    ('nothing://h/x', 'Protocol not known'),
  ],
)
def test_a_storage_without_its_package_is_told(path, say, monkeypatch):
  known = fsspec.filesystem

  def filesystem(protocol, **options):
    if protocol in storage._EXTRAS:
      raise ImportError('Install it')
    return known(protocol, **options)

  monkeypatch.setattr(fsspec, 'filesystem', filesystem)
  storage._file_system.cache_clear()
  with pytest.raises(InputError, match=say):
    storage.open_file(path).size()


@pytest.fixture(name='silent')
def _silent(monkeypatch):
  """A server that accepts connections and never answers: its address."""
  monkeypatch.setattr(storage, '_SILENT_SECS', 0.3)
  with socket.create_server(('127.0.0.1', 0), backlog=1000) as server:
    address = f'http://127.0.0.1:{server.getsockname()[1]}'
    constants = pytest.importorskip('huggingface_hub.constants')
    for name in ('HF_HUB_DOWNLOAD_TIMEOUT', 'HF_HUB_ETAG_TIMEOUT', 'DEFAULT_REQUEST_TIMEOUT'):
      monkeypatch.setattr(constants, name, 0.3)
    credentials = {'key': 'k', 'secret': 's'}
    monkeypatch.setitem(fsspec.config.conf, 's3', {'endpoint_url': address, **credentials})
    monkeypatch.setitem(fsspec.config.conf, 'hf', {'endpoint': address})
    storage._file_system.cache_clear()
    fsspec.get_filesystem_class('http').clear_instance_cache()
    yield address
  storage._file_system.cache_clear()
  fsspec.get_filesystem_class('http').clear_instance_cache()


@pytest.mark.parametrize('path', ['/x.tar', 's3://bucket/x.tar', 'hf://datasets/u/n/x.tar'])
def test_a_server_that_never_answers_is_an_error(path, silent, waits):
  if path.startswith('s3'):
    pytest.importorskip('s3fs')
  path = silent + path if path.startswith('/') else path
  read = lambda path: storage.open_file(path).read(0, 5)
  for ask in (filetree.is_file, filetree.is_folder, read):
    filetree._entries.cache_clear()
    with pytest.raises(InputError, match='cannot be read .*[Tt]imeout.*Check the path'):
      ask(path)
    assert waits == list(storage._WAITS)
    waits.clear()


def test_missing_credentials_are_an_error_at_once(waits, monkeypatch):
  pytest.importorskip('s3fs')
  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
  monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', '/nowhere')
  monkeypatch.setenv('AWS_CONFIG_FILE', '/nowhere')
  storage._file_system.cache_clear()
  fsspec.get_filesystem_class('s3').clear_instance_cache()
  for ask in (filetree.is_file, filetree.is_folder):
    with pytest.raises(InputError, match='NoCredentialsError.*Check the path, the credentials'):
      ask('s3://bucket/x.tar')
  assert not waits


def test_a_users_options_of_a_file_system_come_first(monkeypatch):
  assert storage._time_limits('s3').keys() == {'config_kwargs'}
  monkeypatch.setitem(fsspec.config.conf, 's3', {'config_kwargs': {'read_timeout': 5}})
  assert storage._time_limits('s3') == storage._time_limits('memory') == {}
  assert storage._time_limits('abfs') == {'connection_timeout': 20, 'read_timeout': 30}


class _Hub(fsspec.AbstractFileSystem):
  """Files as a Hugging Face dataset has them, in a file system without asyncio."""

  protocol, files = 'hf', {'datasets/u/n/a/1.tar': _DATA, 'datasets/u/n/a/2.tar': _DATA[:99]}

  def _info(self, name):
    return {
      'name': name,
      'size': len(self.files[name]),
      'type': 'file',
      'blob_id': f'blob-{name[-5:]}',
    }

  def ls(self, path, detail=True, **_):
    path = self._strip_protocol(path)
    found = [self._info(name) for name in self.files if name.startswith(path)]
    if path == 'datasets/u/n':
      found = [{'name': f'{path}/a', 'size': 0, 'type': 'directory'}]
    if not found:
      raise FileNotFoundError(path)
    return found

  def cat_file(self, path, start, end, cache_type):
    assert cache_type == 'none'  # the default would read 5 MB more with each range
    return self.files[self._strip_protocol(path)][start:end]


def test_a_hugging_face_dataset_is_listed_and_read(monkeypatch):
  monkeypatch.setattr(storage, 'file_system', lambda path, hub=_Hub(): hub)
  folder = 'hf://datasets/u/n'
  for path in (f'{folder}/a', f'{folder}/a/*.tar', f'{folder}/*/{{1,2}}.tar'):
    files = listing.list_files('webdataset', path)
    assert [file.path for file in files] == [f'{folder}/a/{i}.tar' for i in (1, 2)]
    assert [file.stamp for file in files] == ['300000 blob-1.tar', '99 blob-2.tar']
  assert filetree.is_folder(folder) and filetree.is_file(files[1].path)
  assert storage.read_ranges([(file.path, 5, 10) for file in files]) == [_DATA[5:15]] * 2
  with pytest.raises(InputError, match='none.tar does not exist'):
    filetree.source_file(f'{folder}/a/none.tar')


def _read_in_process(url, queue):
  queue.put(storage.open_file(url).read(5, 10))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_processes_read_what_this_one_has_open(site, method):
  url, _ = site
  assert (
    storage.open_file(url).read(5, 10) == _DATA[5:15]
  )  # threads of its event loop are there now
  context = multiprocessing.get_context(method)
  queue = context.Queue()
  worker = context.Process(target=_read_in_process, args=(url, queue), daemon=True)
  worker.start()
  try:
    assert queue.get(timeout=60) == _DATA[5:15]
  finally:
    worker.kill()
    worker.join()


def test_threads_read_at_once(site):
  url, _ = site
  file, places = storage.open_file(url), [random.Random(i).randrange(299_000) for i in range(100)]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    assert list(threads.map(lambda at: file.read(at, 50), places)) == [
      _DATA[at : at + 50] for at in places
    ]


def test_paths_sort_by_their_numbers():
  assert sorted(['s10', 's9', 'a/b', 's9/1'], key=storage.natural_key) == [
    'a/b',
    's9',
    's9/1',
    's10',
  ]


def test_a_server_that_does_not_answer_is_asked_again(site, waits, monkeypatch):
  url, server = site
  said = []
  monkeypatch.setattr(storage.logging, 'warning', lambda text, *values: said.append(text % values))
  monkeypatch.setattr(storage, '_ANSWER_SECS', 0.2)
  server.fails, server.how = 3, 'silent'
  file = storage.open_file(url)
  assert file.read(5, 10) == _DATA[5:15] and len(server.asked) == 4
  assert waits == list(storage._WAITS[:3]) and 'a.bin cannot be read (' in said[0]
  server.fails = 1000
  with pytest.raises(InputError, match=r'a.bin cannot be read \(.*no answer in time\)'):
    file.read(5, 10)


def test_what_has_come_is_kept_and_large_ranges_get_more_time(waits, monkeypatch):
  asked = []

  class System(asyn.AsyncFileSystem):
    async def _cat_file(self, path, start, end):
      asked.append(end - start)
      if end - start < 10_000:  # lost, by the short time
        await asyncio.sleep(60)
      await asyncio.sleep(0.2)
      return _DATA[start:end]

  monkeypatch.setattr(storage, 'file_system', lambda path, system=System(): system)
  monkeypatch.setattr(storage, '_ANSWER_SECS', 0.05)
  monkeypatch.setattr(storage, '_LEAST_RATE', 5e4)
  ranges = [('memory://b/a.bin', 0, 50_000), ('memory://b/b.bin', 0, 10)]
  with pytest.raises(storage.Unavailable, match='b.bin'):
    storage.read_ranges(ranges)
  assert asked.count(50_000) == 1 and asked.count(10) > len(storage._WAITS)
