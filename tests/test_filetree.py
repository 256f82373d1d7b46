"""The same questions about files and folders, on this machine and on remote storage."""

import hashlib
import os

import fsspec
import pytest
import web

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, storage

_NAMES = ('a.txt', 'sub folder/b #1.png', 'sub folder/c%20.png', 'sub folder/deep/d.png')


@pytest.fixture(name='place', params=['local', 'memory', 'web'])
def _place(request, tmp_path):
  folder = tmp_path / 'top'
  for name in _NAMES:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(name)
  if request.param == 'local':
    yield str(folder)
  elif request.param == 'web':
    with web.serve(tmp_path) as (url, _):
      filetree.forget(url)
      yield f'{url}/top'
  else:
    system = fsspec.filesystem('memory')
    for name in _NAMES:
      system.pipe(f'/tree/top/{name}', name.encode())
    filetree.forget('memory://tree')
    yield 'memory://tree/top'
    system.rm('/tree', recursive=True)


def test_files_and_folders_are_told_apart(place):
  for name in _NAMES:
    path = filetree.join(place, name)
    assert filetree.is_file(path) and not filetree.is_folder(path)
    assert filetree.base_name(path) == os.path.basename(name)
    folder = filetree.parent(path)
    assert filetree.is_folder(folder) and not filetree.is_file(folder)
    assert folder == filetree.join(place, os.path.dirname(name)).rstrip('/')
  for name in ('none', 'none/', 'sub folder/none.png', 'a.txt/x'):
    path = filetree.join(place, name)
    assert not filetree.is_file(path) and not filetree.is_folder(path)
  assert filetree.absolute(f'{place}/') == place


def test_a_file_is_found_with_its_state_and_read(place):
  files = filetree.source_files(place, list(_NAMES))
  for file, name in zip(files, _NAMES, strict=True):
    assert file == filetree.source_file(filetree.join(place, name), name)
    assert (file.name, file.size) == (name, len(name)) and (file.version or file.mtime)
    assert filetree.read_text(file.path, 99, 'too long.') == name
    assert filetree.sha256(file) == hashlib.sha256(name.encode()).hexdigest()
  with pytest.raises(InputError, match='a.txt is larger than 0 MB, too long'):
    filetree.read_bytes(filetree.join(place, 'a.txt'), 4, 'too long.')
  with pytest.raises(InputError, match='none.txt'):
    filetree.read_bytes(filetree.join(place, 'none.txt'), 4, 'too long.')


def test_a_remote_folder_is_listed_once_until_it_is_forgotten(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  with web.serve(tmp_path) as (url, server):
    filetree.forget(url)
    assert set(filetree.entries(url)) == set(filetree.entries(f'{url}/')) == {'a.txt'}
    assert len(server.asked) == 1
    (tmp_path / 'b.txt').write_text('b')
    assert set(filetree.entries(url)) == {'a.txt'}
    filetree.forget(url)
    assert set(filetree.entries(url)) == {'a.txt', 'b.txt'}


def test_links_of_a_page_to_other_places_are_no_entries(tmp_path):
  links = ('/', '?C=N;O=D', 'x.png', '/in/y.png', 'http://elsewhere/z.png', '../a.txt', 'sub/')
  page = ''.join(f'<a href="{link}">text</a>' for link in links)
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'index.html').write_text(page)
  with web.serve(tmp_path) as (url, _):
    found = filetree.entries(f'{url}/in')
    assert {name: entry.is_folder for name, entry in found.items()} == {
      'x.png': False,
      'y.png': False,
      'sub': True,
    }


def test_names_and_folders_of_addresses():
  assert filetree.base_name('https://h/d/x%20y.png?sig=a/b') == 'x y.png'
  assert filetree.parent('s3://bucket/a') == filetree.parent('s3://bucket') == 's3://bucket'


@pytest.mark.parametrize('how', ['503', '403'])
def test_a_server_that_refuses_is_not_one_without_files(tmp_path, monkeypatch, how):
  waits = []
  monkeypatch.setattr(storage.time, 'sleep', waits.append)
  (tmp_path / 'a.txt').write_text('a')
  with web.serve(tmp_path) as (url, server):
    filetree.forget(url)
    server.fails, server.how = 1000, how
    for ask in (filetree.is_file, filetree.is_folder, filetree.source_file):
      with pytest.raises(InputError, match=f'a.txt cannot be read .*{how}'):
        ask(f'{url}/a.txt')
    assert bool(waits) == (how == '503')
