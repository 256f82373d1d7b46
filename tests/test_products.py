"""core/products.py: fingerprints, sidecars, what follows from what, locks."""

import json
import multiprocessing
import os

import pytest

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product


def make(workdir, product, text='x'):
  (workdir / product.name).parent.mkdir(parents=True, exist_ok=True)
  files.write_bytes(workdir / f'{product.name}.txt', text.encode())
  products.finish(workdir, product, [f'{product.name}.txt'], {'rows': 1})


def test_fingerprint_covers_keys_inputs_and_version_only():
  one = Product('a/b', {'k': 1, 'j': (1, 2)}, {'in': 'x'})
  assert one.fingerprint == Product('c/d', {'j': [1, 2], 'k': 1}, {'in': 'x'}).fingerprint
  for other in (Product('a/b', {'k': 2, 'j': (1, 2)}, {'in': 'x'}),
                Product('a/b', {'k': 1, 'j': (1, 2)}, {'in': 'y'}),
                Product('a/b', {'k': 1, 'j': (1, 2)}, {'in': 'x'}, version=2)):
    assert one.fingerprint != other.fingerprint


def test_status_and_differences(tmp_path):
  old = Product('s/a', {'search.top_k': 10, 'gone': 1}, {'embeddings/pool/00000': 'f'})
  assert products.status(tmp_path, old) == 'missing'
  make(tmp_path, old)
  assert products.status(tmp_path, old) == 'fits'
  new = Product('s/a', {'search.top_k': 20}, {'embeddings/pool/00000': 'g'})
  assert products.status(tmp_path, new) == 'differs'
  why = products.differences(tmp_path, new)
  assert 'config.search.top_k: 10 -> 20' in why and 'embeddings/pool/00000 has changed' in why
  with pytest.raises(InputError, match='search.top_k: 10 -> 20.*--redo=search:s'):
    products.missing(tmp_path, [new], remake=False, redo='search:s')
  assert products.missing(tmp_path, [new], remake=True, redo='search') == [new]
  assert not (tmp_path / 's/a.txt').exists()  # what did not fit is gone before it is made again


@pytest.mark.parametrize('remake', [True, False])
def test_nothing_is_made_of_a_product_that_does_not_fit(tmp_path, remake):
  rows = [Product('s/rows', {'size': size}) for size in (1, 2)]
  runs = [Product('t/run', {}, {row.name: row.fingerprint, 'pool/0.tar': 'stamp', 's/other': products.FROZEN})
          for row in rows]
  make(tmp_path, rows[0])
  make(tmp_path, Product('s/other', {}))
  with pytest.raises(InputError, match='t/run reads s/rows .*made with another config.*Run without --stages'):
    products.missing(tmp_path, [runs[1]], remake=remake, redo='train')
  assert products.missing(tmp_path, [runs[0]], remake=remake, redo='train') == [runs[0]]
  make(tmp_path, runs[0])
  with pytest.raises(InputError, match='t/run reads s/rows'):
    products.missing(tmp_path, [runs[1]], remake=remake, redo='train')
  assert products.status(tmp_path, runs[0]) == 'fits'  # it was not removed
  make(tmp_path, rows[1])
  assert products.missing(tmp_path, [runs[1]], remake=True, redo='train') == [runs[1]]


def test_a_lost_or_cut_file_makes_it_missing(tmp_path):
  product = Product('s/a', {})
  make(tmp_path, product, 'hello')
  (tmp_path / 's/a.txt').write_text('hell')
  assert products.status(tmp_path, product) == 'missing'
  make(tmp_path, product)
  (tmp_path / 's/a.txt').unlink()
  assert products.status(tmp_path, product) == 'missing'


def test_a_sum_that_is_known_is_taken_and_gives_the_same_checksum(tmp_path, monkeypatch):
  product = Product('s/a', {})
  make(tmp_path, product)
  checksum = products.read_sidecar(tmp_path, product.name)['checksum']
  known = {'s/a.txt': files.sha256(tmp_path / 's/a.txt')}
  monkeypatch.setattr(files, 'sha256', lambda path: pytest.fail(f'{path} is read again'))
  products.finish(tmp_path, product, ['s/a.txt'], sums=known)
  assert products.read_sidecar(tmp_path, product.name)['checksum'] == checksum


def test_followers_last_first(tmp_path):
  a = Product('in/a', {})
  b = Product('em/b', {}, {a.name: a.fingerprint})
  c = Product('se/c', {}, {a.name: a.fingerprint, b.name: b.fingerprint})
  d = Product('tr/d', {}, {c.name: c.fingerprint})
  other = Product('in/other', {})
  for product in (a, b, c, d, other):
    make(tmp_path, product)
  assert products.followers(tmp_path, ['in/a']) == ['tr/d', 'se/c', 'em/b', 'in/a']
  assert products.followers(tmp_path, ['se/c']) == ['tr/d', 'se/c']


def test_followers_in_the_work_directories_of_further_embedders(tmp_path):
  home = tmp_path / 'embedders/hog'
  home.mkdir(parents=True)
  (home / 'ingest').symlink_to('../../ingest')
  a = Product('ingest/a', {})
  b = Product('em/b', {}, {a.name: a.fingerprint})
  c = Product('se/c', {}, {b.name: b.fingerprint, a.name: a.fingerprint})
  d = Product('splits/d', {}, {'embedders/hog/se/c': c.fingerprint})
  for folder, product in ((tmp_path, a), (tmp_path, b), (home, b), (home, c), (tmp_path, d)):
    make(folder, product)
  assert list(products.sidecars(tmp_path)) == ['em/b', 'ingest/a', 'splits/d']
  assert sorted(products.all_sidecars(tmp_path)) == ['em/b', 'embedders/hog/em/b', 'embedders/hog/se/c', 'ingest/a',
                                                     'splits/d']
  found = ['splits/d', 'embedders/hog/se/c', 'embedders/hog/em/b']
  assert products.followers(tmp_path, ['embedders/hog/em/b']) == found
  assert set(products.followers(tmp_path, ['ingest/a'])) == {*found, 'em/b', 'ingest/a'}
  assert products.followers(tmp_path, ['em/b']) == ['em/b']  # the main one's
  for name in found:
    products.forget(tmp_path, name)
  assert sorted(products.all_sidecars(tmp_path)) == ['em/b', 'ingest/a'] and not os.listdir(home / 'em')


def test_a_further_embedder_is_named_where_its_product_differs(tmp_path):
  home = tmp_path / 'embedders/hog'
  home.mkdir(parents=True)
  (home / 'ingest').symlink_to('../../ingest')
  make(home, Product('em/b', {'embedder.dim': 8}))
  with pytest.raises(InputError, match=r'config\.embedders\.hog\.dim: 8 -> 9.*--redo=embed:hog@pool to'):
    products.missing(home, [Product('em/b', {'embedder.dim': 9})], remake=False, redo='embed:pool')
  assert (products.embedder_of(home), products.embedder_of(tmp_path)) == ('hog', '')


def test_manifest_lists_finished_products_only(tmp_path):
  done, not_done = Product('s/a', {}), Product('s/b', {})
  make(tmp_path, done)
  products.write_manifest(tmp_path, 's', [done, not_done])
  entries = files.read_json(tmp_path / 's/manifest.json')['products']
  assert [entry['name'] for entry in entries] == ['s/a'] and entries[0]['counts'] == {'rows': 1}


def test_checksum_is_of_the_content(tmp_path):
  product = Product('s/a', {})
  sums = []
  for text in ('x', 'x', 'y'):
    make(tmp_path, product, text)
    sums.append(products.read_sidecar(tmp_path, 's/a')['checksum'])
  assert sums[0] == sums[1] != sums[2]


def test_forget_leaves_nothing(tmp_path):
  product = Product('s/a', {})
  make(tmp_path, product)
  products.forget(tmp_path, 's/a')
  assert not os.listdir(tmp_path / 's')


def _hold(path, ready, done):
  with products.lock(path, 's/a'):
    ready.set()
    done.wait(30)


def test_lock_says_who_holds_it_and_is_free_afterwards(tmp_path):
  context = multiprocessing.get_context('spawn')
  ready, done = context.Event(), context.Event()
  holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
  holder.start()
  assert ready.wait(60)
  with pytest.raises(InputError, match=f'process {holder.pid} on'):
    with products.lock(tmp_path, 's/a'):
      pass
  done.set()
  holder.join()
  with products.lock(tmp_path, 's/a'):
    assert json.loads((tmp_path / 's/a.lock').read_text())['pid'] == os.getpid()
  assert not os.listdir(tmp_path / 's')


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path):
  context = multiprocessing.get_context('spawn')
  ready, done = context.Event(), context.Event()
  holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
  holder.start()
  assert ready.wait(60)
  holder.kill()
  holder.join()
  assert (tmp_path / 's/a.lock').exists()
  with products.lock(tmp_path, 's/a'):
    pass


def test_a_reused_process_id_is_not_mistaken_for_the_holder(tmp_path):
  (tmp_path / 's').mkdir()
  import socket
  holder = {'host': socket.gethostname(), 'pid': os.getpid(), 'time': 'then', 'started': 'long ago'}
  (tmp_path / 's/a.lock').write_text(json.dumps(holder))
  with products.lock(tmp_path, 's/a'):
    pass
