import os

import fsspec
import pytest
import web

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import listing, storage

_NAMES = ('s10.tar', 's9.tar', 's1.tar', 'a/s2.tar', 'b/s1.tar', 'note.txt', 'a/x.parquet')


@pytest.fixture(name='place', params=['local', 'memory'])
def _place(request, tmp_path):
  """The same files on this machine and on a remote storage."""
  if request.param == 'local':
    for name in _NAMES:
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_bytes(name.encode())
    (tmp_path / 'empty').mkdir()
    yield str(tmp_path)
    return
  system = fsspec.filesystem('memory')
  for name in _NAMES:
    system.pipe(f'/pool/{name}', name.encode())
  system.mkdir('/pool/empty')
  yield 'memory://pool'
  system.rm('/pool', recursive=True)


def _names(path, format='webdataset'):
  return [file.name for file in listing.list_files(format, path)]


def test_paths_are_listed_in_natural_order_and_braces_as_written(place):
  for path in (place, f'{place}/', f'{place}/*.tar', f'{place}/s*.tar'):
    assert _names(path) == ['s1.tar', 's9.tar', 's10.tar']
  assert (
    _names(f'{place}/s{{10..9}}.tar') == _names(f'{place}/s{{10,9}}.tar') == ['s10.tar', 's9.tar']
  )
  assert _names(f'{place}/{{b,a}}/*.tar') == ['b/s1.tar', 'a/s2.tar']
  assert _names(f'{place}/{{b,a}}') == ['b/s1.tar', 'a/s2.tar']
  assert _names(f'{place}/**/s[12].tar') == ['a/s2.tar', 'b/s1.tar', 's1.tar']
  assert _names(f'{place}/s9.tar') == ['s9.tar']
  assert _names(f'{place}/a', 'parquet') == ['x.parquet']


def test_a_file_is_as_it_was_listed(place):
  for file in listing.list_files('webdataset', f'{place}/{{s9,a/s2}}.tar'):
    assert file.path == f'{place}/{file.name}' and file.size == len(file.name)
    assert storage.open_file(file.path).read(0, 99) == file.name.encode()


def test_a_stamp_is_the_same_however_a_file_is_named_and_changes_with_it(place):
  def stamp(path):
    return next(file.stamp for file in listing.list_files('webdataset', path) if 's9' in file.name)

  paths = (place, f'{place}/s9.tar', f'{place}/s*.tar', f'{place}/s{{9,1}}.tar')
  before = {stamp(path) for path in paths}
  if storage.is_remote(place):
    fsspec.filesystem('memory').pipe('/pool/s9.tar', b's9 new!')
  else:
    with open(f'{place}/s9.tar', 'wb') as f:
      f.write(b's9 new!')
    os.utime(f'{place}/s9.tar', ns=(1, 1))
  after = {stamp(path) for path in paths}
  assert len(before) == len(after) == 1 and before != after


def test_paths_that_mean_nothing_are_errors(place):
  for path in ('nothing*.tar', 'missing.tar', 's{0..1}.tar', 'empty', 'missing/', 'missing/*.tar'):
    with pytest.raises(InputError, match=r'matches no file|does not exist'):
      listing.list_files('webdataset', f'{place}/{path}')
  for path in ('s{1,1}.tar', '{s,s}*.tar'):
    with pytest.raises(InputError, match='s1.tar more than once'):
      listing.list_files('webdataset', f'{place}/{path}')
  with pytest.raises(InputError, match='without file://'):
    listing.list_files('webdataset', 'file:///nowhere/*.tar')
  with pytest.raises(InputError, match="path=''"):
    listing.list_files('webdataset', '')
  with pytest.raises(ConfigError, match="Did you mean 'webdataset'"):
    listing.list_files('webdatasets', place)


def test_braces_keep_the_width_of_their_numbers():
  assert listing.expand_braces('/x/{008..010}-{a,b}') == [
    '/x/008-a',
    '/x/008-b',
    '/x/009-a',
    '/x/009-b',
    '/x/010-a',
    '/x/010-b',
  ]
  assert listing.expand_braces('/x/{1..2}') == ['/x/1', '/x/2']
  assert listing.expand_braces('/x/{odd}') == ['/x/{odd}']


def test_many_shards_of_a_storage_are_one_question():
  system, asked = fsspec.filesystem('memory'), []

  class Told(type(system)):
    def ls(self, path, detail=True, **kwargs):
      asked.append(path)
      return super().ls(path, detail, **kwargs)

  for i in range(40):
    system.pipe(f'/many/{i:03d}.tar', b'x')
  try:
    storage._file_system.cache_clear()
    fsspec.register_implementation('memory', Told, clobber=True)
    assert len(_names('memory://many/{000..039}.tar')) == 40
    assert [path.rstrip('/').rsplit('/', 1)[-1] for path in asked].count('many') == 1
  finally:
    fsspec.register_implementation('memory', type(system), clobber=True)
    storage._file_system.cache_clear()
    system.rm('/many', recursive=True)


def test_a_web_server_is_listed(tmp_path, monkeypatch):
  monkeypatch.setattr(storage.time, 'sleep', lambda secs: None)
  for name in ('s10.tar', 's9.tar', 'note.txt'):
    (tmp_path / name).write_bytes(name.encode())
  with web.serve(tmp_path) as (url, _):
    for path in (f'{url}/', f'{url}/*.tar', f'{url}/s{{9,10}}.tar'):
      files = listing.list_files('webdataset', path)
      assert [(file.name, file.size) for file in files] == [('s9.tar', 6), ('s10.tar', 7)]
      assert storage.open_file(files[0].path).read(0, 99) == b's9.tar'
    (signed,) = listing.list_files('webdataset', f'{url}/s9.tar?token=*{{a}}')
    assert signed.name == 's9.tar' and signed.path.endswith('?token=*{a}')
    assert signed.stamp == files[0].stamp
    (tmp_path / 's9.tar').write_bytes(b'changed')
    assert listing.list_files('webdataset', f'{url}/s9.tar')[0].stamp != files[0].stamp
    with pytest.raises(InputError, match='matches no file|does not exist'):
      listing.list_files('webdataset', f'{url}/none.tar')
  with pytest.raises(InputError, match='127.0.0.1'):
    listing.list_files('webdataset', f'{url}/s9.tar')


@pytest.mark.parametrize('name', ['', '*.tar', 's9.tar', 's{9,10}.tar'])
def test_a_listing_survives_a_server_that_fails_for_a_while(tmp_path, monkeypatch, name):
  waits = []
  monkeypatch.setattr(storage.time, 'sleep', waits.append)
  for tar in ('s10.tar', 's9.tar'):
    (tmp_path / tar).write_bytes(tar.encode())
  with web.serve(tmp_path) as (url, server):
    expected = listing.list_files('webdataset', f'{url}/{name}')
    server.fails = 4
    assert listing.list_files('webdataset', f'{url}/{name}') == expected and waits
