"""A work directory on object storage (in memory here), and what another machine sees of it."""

import os

import numpy as np
import pytest

from clip_jax.core import files, folders, mirror, objects, products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product


@pytest.fixture
def machines(tmp_path, monkeypatch, request):
  """Returns open(name): opens the test's URL with the cache of a machine of that name."""
  monkeypatch.delenv(mirror._OPEN, raising=False)
  url = f'memory://{request.node.name}'

  def open_on(name, limit=0):
    monkeypatch.setenv(mirror._OPEN, '[]')
    mirror._mirrors.clear()
    return mirror.open_mirror(url, str(tmp_path / name), limit)

  yield open_on
  mirror._mirrors.clear()


def _published(folder):
  at = mirror.of(folder)
  assert at is not None
  return at.objects.below()


def test_what_one_machine_writes_another_reads(machines):
  a = machines('a')
  files.write_npy(f'{a}/x/rows.npy', np.arange(5))
  files.write_json(f'{a}/config.json', {'a': 1})
  assert _published(a).keys() == {'x/rows.npy', 'config.json'}
  b = machines('b')
  assert a != b and not os.path.exists(f'{b}/x/rows.npy')
  assert files.exists(f'{b}/x/rows.npy') and files.exists(f'{b}/x') and files.is_folder(f'{b}/x')
  assert not files.exists(f'{b}/y') and not files.exists(f'{b}/x/rows')
  assert files.size(f'{b}/x/rows.npy') == os.path.getsize(f'{a}/x/rows.npy')
  assert files.size(f'{b}/x') == -1 and files.size(f'{b}/none') is None
  assert files.names(f'{b}/x') == ['rows.npy'] and files.names(f'{b}/none') == []
  assert files.matching(b, '*/*.npy') == ['x/rows.npy'] and files.matching(b, '*.npy') == []
  assert files.read_npy(f'{b}/x/rows.npy').tolist() == [0, 1, 2, 3, 4]
  assert os.path.exists(f'{b}/config.json')  # small JSON files come at the start
  assert files.sha256(f'{b}/x/rows.npy') == files.sha256(f'{a}/x/rows.npy')


def test_changed_and_deleted_files_are_seen_after_a_refresh(machines):
  b = machines('b')
  at = mirror.of(b)
  assert at is not None
  files.write_json(f'{b}/x/old.json', 1)
  files.write_json(f'{b}/x/gone.json', 1)
  at.objects.write('x/old.json', b'2')  # by another machine
  at.objects.delete(['x/gone.json'])
  assert files.read_json(f'{b}/x/old.json') == 1
  files.refresh(f'{b}/x')
  assert files.read_json(f'{b}/x/old.json') == 2
  assert files.names(f'{b}/x') == ['old.json'] and not files.exists(f'{b}/x/gone.json')
  at.objects.delete(['x/old.json'])
  files.refresh(b)
  assert files.names(f'{b}/x') == []


def test_a_killed_download_or_upload_leaves_nothing_that_looks_whole(machines, monkeypatch):
  a = machines('a')
  files.write_npy(f'{a}/rows.npy', np.arange(5))

  def fail(*args):
    raise InputError('no network')

  with monkeypatch.context() as patch:
    patch.setattr(objects.Objects, 'upload', fail)
    with pytest.raises(InputError, match='no network'):
      files.write_npy(f'{a}/rows.npy', np.arange(6))
  assert len(files.read_npy(f'{a}/rows.npy')) == 5  # a file that is only here would be never there
  b = machines('b')
  with monkeypatch.context() as patch:
    patch.setattr(objects.Objects, 'download', fail)
    with pytest.raises(InputError, match='no network'):
      files.read_npy(f'{b}/rows.npy')
  assert os.listdir(b) == []
  assert len(files.read_npy(f'{b}/rows.npy')) == 5


def test_an_object_that_goes_while_the_command_runs_is_an_error(machines):
  b = machines('b')
  at = mirror.of(b)
  assert at is not None
  at.objects.write('x.json', b'1')
  at.refresh()
  at.objects.delete(['x.json'])
  with pytest.raises(InputError, match=r'x\.json is gone'):
    files.read_json(f'{b}/x.json')


def test_files_and_folders_are_removed_and_moved_in_both_places(machines):
  a = machines('a')
  for name in ('x/1', 'x/y/2', 'z'):
    files.write_bytes(f'{a}/{name}', b'1')
  files.move(f'{a}/x', f'{a}/old/x')
  assert _published(a).keys() == {'old/x/1', 'old/x/y/2', 'z'}
  assert not files.exists(f'{a}/x') and files.names(f'{a}/old/x') == ['1', 'y']
  files.move(f'{a}/z', f'{a}/old/z')
  files.move(f'{a}/none', f'{a}/old/none')
  assert files.exists(f'{a}/old/z') and not files.exists(f'{a}/z')
  files.remove(f'{a}/old/x/y')
  files.remove(f'{a}/none')
  assert _published(a).keys() == {'old/x/1', 'old/z'}
  files.remove(f'{a}/old')
  assert _published(a) == {} and not os.path.exists(f'{a}/old')


def test_least_recently_used_files_go_and_come_again(machines, monkeypatch):
  monkeypatch.setattr(folders, '_IN_USE_SECS', -1.0)
  a = machines('a', limit=10_000)
  for i in range(8):
    files.write_npy(f'{a}/{i}.npy', np.full(250, i))  # 2,128 bytes each
    os.utime(f'{a}/{i}.npy', (i, i))
  here = [i for i in range(8) if os.path.exists(f'{a}/{i}.npy')]
  assert here == list(range(min(here), 8)) and len(here) <= 5
  assert len(_published(a)) == 8
  for i in range(8):
    assert files.read_npy(f'{a}/{i}.npy')[0] == i
  left = sum(os.path.getsize(f'{a}/{name}') for name in os.listdir(a))
  assert left < 15_000


def test_files_that_grow_stay(machines):
  a = machines('a', limit=1)
  for name in ('log.txt', 'metrics.jsonl', 'rows.npy'):
    files.write_bytes(f'{a}/{name}', b'x' * 100)
    os.utime(f'{a}/{name}', (1, 1))
  files.write_bytes(f'{a}/more', b'x')
  assert sorted(os.listdir(a)) == ['.mirror.jsonl', 'log.txt', 'metrics.jsonl', 'more']


def test_files_in_use_stay(machines):
  a = machines('a', limit=10_000)
  for i in range(8):
    files.write_npy(f'{a}/{i}.npy', np.full(250, i))
  assert all(os.path.exists(f'{a}/{i}.npy') for i in range(8))


def test_a_product_made_on_one_machine_fits_on_another(machines):
  made = []

  def work(todo):
    for product in todo:
      made.append(product.name)
      files.write_bytes(f'{folder}/{product.name}.bin', b'1')
      yield product, [f'{product.name}.bin'], {'n': 1}

  wanted = [Product('x/0', batch='x/all'), Product('x/1', batch='x/all')]
  folder = machines('a')
  products.make(folder, wanted, work)
  assert _published(folder).keys() == {
    f'x/{i}{ending}' for i in range(2) for ending in ('.bin', products.SIDECAR)
  }
  folder = machines('b')
  assert products.make(folder, wanted, work) == [] and made == ['x/0', 'x/1']
  assert products.counts(folder, 'x/0') == {'n': 1}
  assert products.sidecars(folder).keys() == {'x/0', 'x/1'}
  products.set_aside(folder, 'x/0')
  assert products.status(folder, wanted[0]) == 'missing'
  assert products.status(folder, wanted[1]) == 'fits'
  products.make(folder, wanted, work)
  assert made == ['x/0', 'x/1', 'x/0']


def test_a_sidecar_is_published_after_its_files(machines, monkeypatch):
  folder, order = machines('a'), []
  upload = objects.Objects.upload

  def note(self, name, path):
    order.append(name)
    return upload(self, name, path)

  monkeypatch.setattr(objects.Objects, 'upload', note)

  def work(todo):
    files.write_bytes(f'{folder}/x/0.bin', b'1')
    yield todo[0], ['x/0.bin'], {}

  products.make(folder, [Product('x/0')], work)
  assert order == ['x/0.bin', f'x/0{products.SIDECAR}']


def test_messages_have_the_url(machines):
  a = machines('a')
  at = mirror.of(a)
  assert at is not None
  assert mirror.in_words(f'in {a}/x.') == f'in {at.url}/x.'
  assert mirror.in_words('in /x.') == 'in /x.'


def test_other_paths_are_in_no_mirror(machines, tmp_path):
  a = machines('a')
  assert mirror.of(f'{a}/x') is mirror.of(a) is not None
  assert mirror.of(f'{a}x') is None and mirror.of(tmp_path) is None
  assert mirror.folder_of(str(tmp_path)) == str(tmp_path)


def test_the_users_own_cache(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/some')
  assert folders.cache() == '/some/clip_jax'


def test_the_disk_of_the_mirror_does_not_limit_a_stage(machines):
  a = machines('a')
  assert files.free_bytes(a) is None
  files.check_space(a, 10**18, 'The stage embed')
