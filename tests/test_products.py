"""core/products.py: fingerprints, sidecars, what is made, what follows from what, locks."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from clip_jax.core import files, locks, products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product


def write(workdir, product, text='x'):
  """Writes the file of a product; returns its name."""
  files.write_bytes(workdir / f'{product.name}.txt', text.encode())
  return [f'{product.name}.txt']


def make(workdir, *wanted, text='x'):
  """Makes what is missing of some products; returns their names."""

  def work(todo):
    for product in todo:
      yield product, write(workdir, product, text), {'rows': 1}

  return [product.name for product in products.make(workdir, list(wanted), work)]


def test_fingerprint_covers_keys_inputs_sources_and_version_only():
  read = Product('in/x')
  one = Product('a/b', keys={'k': 1, 'j': (1, 2)}, inputs=(read,), sources={'f': '1'})
  same = Product(
    'a/c',
    'kind',
    (3,),
    {'j': [1, 2], 'k': 1},
    (read,),
    sources={'f': '1'},
    at_least={'top': 3},
    batch='b',
    is_cheap=True,
  )
  assert one.fingerprint == same.fingerprint
  for other in (
    Product('a/b', keys={'k': 2, 'j': (1, 2)}, inputs=(read,), sources={'f': '1'}),
    Product(
      'a/b',
      keys={'k': 1, 'j': (1, 2)},
      inputs=(Product('in/x', keys={'n': 1}),),
      sources={'f': '1'},
    ),
    Product('a/b', keys={'k': 1, 'j': (1, 2)}, inputs=(read,), sources={'f': '2'}),
    Product('a/b', keys={'k': 1, 'j': (1, 2)}, inputs=(read,), sources={'f': '1'}, version=2),
  ):
    assert one.fingerprint != other.fingerprint


def test_status_and_differences(tmp_path):
  pool = [Product('embeddings/pool/00000', keys={'n': n}) for n in (1, 2)]
  old = Product('search/a/q', keys={'search.top_k': 10, 'gone': 1}, inputs=(pool[0],))
  assert products.status(tmp_path, old) == 'missing'
  make(tmp_path, pool[0])
  assert make(tmp_path, old) == ['search/a/q'] and make(tmp_path, old) == []
  assert products.status(tmp_path, old) == 'fits'
  new = Product('search/a/q', keys={'search.top_k': 20}, inputs=(pool[1],))
  assert products.status(tmp_path, new) == 'differs'
  why = products.differences(tmp_path, new)
  assert 'config.search.top_k: 10 -> 20' in why and 'embeddings/pool/00000 has changed' in why
  make(tmp_path, Product('embeddings/pool/00000', keys={'n': 2}, is_cheap=True))
  with pytest.raises(InputError, match='search.top_k: 10 -> 20.*--redo=search:a '):
    make(tmp_path, new)
  cheap = Product('search/a/q', keys={'search.top_k': 20}, inputs=(pool[1],), is_cheap=True)
  assert make(tmp_path, cheap) == ['search/a/q'] and products.status(tmp_path, new) == 'fits'


def test_more_than_at_least_is_wanted_fits_and_does_not_change_what_follows(tmp_path):
  wide, narrow, wider = (
    Product('search/a/pool-00000', at_least={'search.top_k': k}) for k in (10, 5, 20)
  )
  make(tmp_path, wide)
  assert (
    products.status(tmp_path, narrow) == 'fits' and products.status(tmp_path, wider) == 'differs'
  )
  with pytest.raises(InputError, match='config.search.top_k: 10 -> 20'):
    make(tmp_path, wider)
  assert wide.fingerprint == narrow.fingerprint == wider.fingerprint


def test_changes_of_an_untracked_input_do_not_invalidate(tmp_path):
  indexes = [Product('ingest/pool/index', keys={'n': n}, is_cheap=True) for n in (1, 2)]
  embedders = [Product('embedder/embedder', untracked=(index,)) for index in indexes]
  with pytest.raises(InputError, match='ingest/pool/index.*add `ingest`'):
    make(tmp_path, embedders[0])
  make(tmp_path, indexes[0])
  make(tmp_path, embedders[0])
  make(tmp_path, indexes[1])
  assert products.status(tmp_path, embedders[1]) == 'fits'
  assert products.followers(tmp_path, ['ingest/pool/index']) == [
    'embedder/embedder',
    'ingest/pool/index',
  ]


@pytest.mark.parametrize('is_cheap', [True, False])
def test_nothing_is_made_of_a_product_that_does_not_fit(tmp_path, is_cheap):
  rows = [Product('splits/rows', keys={'size': size}, is_cheap=True) for size in (1, 2)]
  runs = [
    Product('train/run', inputs=(row,), sources={'pool/0.tar': 'stamp'}, is_cheap=is_cheap)
    for row in rows
  ]
  make(tmp_path, rows[0])
  with pytest.raises(InputError, match='train/run reads splits/rows .*--stages'):
    make(tmp_path, runs[1])
  make(tmp_path, runs[0])
  with pytest.raises(InputError, match='train/run reads splits/rows'):
    make(tmp_path, runs[1])
  assert products.status(tmp_path, runs[0]) == 'fits'  # it was not removed
  make(tmp_path, rows[1])
  if is_cheap:
    assert make(tmp_path, runs[1]) == ['train/run']
  else:
    with pytest.raises(InputError, match='train/run in .*: splits/rows has changed'):
      make(tmp_path, runs[1])


def test_inputs_may_be_made_by_the_same_call(tmp_path):
  one = Product('splits/a/rows')
  assert make(tmp_path, one, Product('splits/b/rows', inputs=(one,))) == [
    'splits/a/rows',
    'splits/b/rows',
  ]


def test_a_product_that_waits_is_left_out_until_its_input_is_there(tmp_path):
  run = Product('train/a/run')
  result = Product('evaluate/a/val', inputs=(run,), waits=True, is_cheap=True)
  assert make(tmp_path, result) == []
  make(tmp_path, run)
  assert make(tmp_path, result) == ['evaluate/a/val']


def test_a_product_that_reads_all_is_made_again_when_anything_changes(tmp_path):
  page = Product('report/index', reads_all=True, is_cheap=True)
  assert make(tmp_path, page) == ['report/index'] and make(tmp_path, page) == []
  make(tmp_path, Product('splits/a/rows', is_cheap=True))
  assert products.status(
    tmp_path, page
  ) == 'differs' and 'splits/a/rows is new' in products.differences(tmp_path, page)
  assert make(tmp_path, page) == ['report/index']
  make(tmp_path, Product('splits/a/rows', keys={'size': 1}, is_cheap=True))
  assert make(tmp_path, page) == ['report/index'] and make(tmp_path, page) == []


def test_a_kill_in_between_keeps_what_is_finished(tmp_path):
  parts = [Product(f'embeddings/pool/{i:05d}', batch='embeddings/pool/embed') for i in range(3)]

  def work(todo):
    yield todo[0], write(tmp_path, todo[0]), {}
    write(tmp_path, todo[1])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    products.make(tmp_path, parts, work)
  assert [products.status(tmp_path, part) for part in parts] == ['fits', 'missing', 'missing']
  assert make(tmp_path, *parts) == [part.name for part in parts[1:]]


def test_a_lost_or_cut_file_makes_it_missing(tmp_path):
  product = Product('s/a')
  make(tmp_path, product, text='hello')
  (tmp_path / 's/a.txt').write_text('hell')
  assert products.status(tmp_path, product) == 'missing'
  make(tmp_path, product)
  (tmp_path / 's/a.txt').unlink()
  assert products.status(tmp_path, product) == 'missing'


def test_a_sum_that_is_known_is_taken_and_gives_the_same_checksum(tmp_path, monkeypatch):
  product = Product('s/a')
  make(tmp_path, product)
  checksum = products.read_sidecar(tmp_path, product.name)['checksum']
  known = {'s/a.txt': files.sha256(tmp_path / 's/a.txt')}
  monkeypatch.setattr(files, 'sha256', lambda path: pytest.fail(f'{path} is read again'))
  products.finish(tmp_path, product, known, {})
  assert products.read_sidecar(tmp_path, product.name)['checksum'] == checksum


def test_followers_last_first(tmp_path):
  a, other = Product('in/a'), Product('in/other')
  b = Product('em/b', inputs=(a,))
  c = Product('se/c', inputs=(a, b))
  d = Product('tr/d', inputs=(c,))
  for product in (a, b, c, d, other):
    make(tmp_path, product)
  assert products.followers(tmp_path, ['in/a']) == ['tr/d', 'se/c', 'em/b', 'in/a']
  assert products.followers(tmp_path, ['se/c']) == ['tr/d', 'se/c']


def test_followers_include_planned_products_and_each_comes_before_its_inputs(tmp_path):
  a = Product('in/a')
  layer = [a]
  for depth in range(12):  # 3^12 paths lead from the first to the last layer
    layer = [Product(f'l{depth}/{i}', inputs=tuple(layer)) for i in range(3)]
    make(tmp_path, a, *layer)
  begun = Product('train/x/run', inputs=tuple(layer))
  names = products.followers(tmp_path, ['in/a'], [begun])
  assert names[0] == 'train/x/run' and names[-1] == 'in/a' and len(names) == len({*names}) == 38
  depths = [int(name.split('/')[0][1:]) for name in names[1:-1]]
  assert depths == sorted(depths, reverse=True)
  assert 'train/x/run' not in products.followers(tmp_path, ['in/a'])


def test_followers_of_two_configs_that_contradict_each_other(tmp_path):
  make(tmp_path, Product('splits/a'), Product('splits/b', inputs=(Product('splits/a'),)))
  planned = [Product('splits/a', inputs=(Product('splits/b'),))]  # it was the other way round
  assert sorted(products.followers(tmp_path, ['splits/a'], planned)) == ['splits/a', 'splits/b']


@pytest.mark.parametrize(
  'names, redo',
  [
    (['ingest/pool/index-00000', 'ingest/pool/index-00001'], 'ingest:pool'),
    (['embedder/embedder'], 'embedder'),
    (['dedup/keep'], 'dedup'),
    (['embeddings/pool/00000'], 'embed:pool'),
    (['train/base/seed0/run'], 'train:base/seed0'),
    (['search/val/pool-00000', 'search/val/pool-00001'], 'search:val'),
    (['search/val/pool-00000', 'search/sketch/pool-00000'], 'search'),
    (['embedders/hog/embeddings/pool/00000'], 'embed:hog@pool'),
    (['embedders/hog/embedder/embedder'], 'embedder:hog@'),
    (['splits/base/rows', 'splits/near/rows'], 'prune'),
  ],
)
def test_what_redo_must_say(names, redo):
  assert products.redo_of(names) == redo


def test_set_aside_and_delete_leave_nothing_in_place(tmp_path):
  product = Product('s/a')
  make(tmp_path, product)
  products.set_aside(tmp_path, 's/a')
  assert not os.listdir(tmp_path / 's')
  assert sorted(os.listdir(tmp_path / 'replaced/s')) == ['a.sidecar.json', 'a.txt']
  assert products.sidecars(tmp_path) == {}
  make(tmp_path, product)
  products.set_aside(tmp_path, 's/a')  # what was aside gives way
  make(tmp_path, product)
  products.delete(tmp_path, 's/a')
  assert not os.listdir(tmp_path / 's')


def test_manifest_lists_finished_products_only(tmp_path):
  done, not_done = Product('s/a'), Product('s/b')
  make(tmp_path, done)
  products.write_manifest(tmp_path, 's', [done, not_done])
  entries = files.read_json(tmp_path / 's/manifest.json')['products']
  assert [entry['name'] for entry in entries] == ['s/a'] and entries[0]['counts'] == {'rows': 1}


def test_checksum_is_of_the_content(tmp_path):
  product = Product('s/a')
  sums = []
  for text in ('x', 'x', 'y'):
    products.finish(tmp_path, product, write(tmp_path, product, text), {})
    sums.append(products.read_sidecar(tmp_path, 's/a')['checksum'])
  assert sums[0] == sums[1] != sums[2]


def test_many_reasons_are_counted(tmp_path):
  make(tmp_path, Product('s/a', keys={'old': 1, 'same': 1, 'changed': 1}))
  few = Product('s/a', keys={'old': 1, 'same': 1, 'changed': 2, 'new': 3})
  assert products.reasons(tmp_path, few, 3) == ('config.changed: 1 -> 2; config.new: missing -> 3')
  many = Product('s/a', keys={'same': 1, 'changed': 2, **dict.fromkeys('abcd', 0)}, version=2)
  assert products.reasons(tmp_path, many, 3) == (
    '4 new config keys, changed config keys, removed config keys, format version: 1 -> 2'
  )


def _hold(path, ready, done):
  with locks.lock(path, 's/a'):
    ready.set()
    done.wait(600)  # its parent ends it sooner


@pytest.fixture
def holder(tmp_path):
  context = multiprocessing.get_context('spawn')
  ready, done = context.Event(), context.Event()
  process = context.Process(target=_hold, args=(str(tmp_path), ready, done))
  process.start()
  assert ready.wait(60)
  yield process, done
  process.kill()
  process.join()


def test_lock_says_who_holds_it_and_is_free_afterwards(tmp_path, holder):
  process, done = holder
  with pytest.raises(InputError, match=f'process {process.pid} on .*s/a.lock'):
    make(tmp_path, Product('s/a'))
  done.set()
  process.join()
  with locks.lock(tmp_path, 's/a'):
    assert json.loads((tmp_path / 's/a.lock').read_text())['pid'] == os.getpid()
    with pytest.raises(InputError, match=f'process {os.getpid()} on'):  # in the same process, too
      with locks.lock(tmp_path, 's/a'):
        pass
  assert not os.listdir(tmp_path / 's')


def test_a_lock_of_a_killed_process_is_free_even_as_a_zombie(tmp_path, holder):
  process, _ = holder
  process.kill()
  os.waitid(
    os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
  )  # it is dead, and nobody has collected it
  assert (tmp_path / 's/a.lock').exists()
  assert make(tmp_path, Product('s/a')) == ['s/a']


def test_a_lock_of_a_killed_fork_is_free_while_it_is_a_zombie(tmp_path):
  ready, holds = os.pipe()
  child = os.fork()
  if not child:
    with locks.lock(str(tmp_path), 's/a'):
      os.write(holds, b'x')
      time.sleep(600)
    os._exit(1)
  try:
    assert os.read(ready, 1) == b'x'
    message = f'made by process {child} on .*since .*lock: {tmp_path}/s/a.lock'
    with pytest.raises(InputError, match=message):
      make(tmp_path, Product('s/a'))
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until it is dead; it is not collected
    assert 'Z' in (files.epath.Path(f'/proc/{child}/stat')).read_text().rpartition(')')[2]
    assert make(tmp_path, Product('s/a')) == ['s/a']
  finally:
    os.waitpid(child, 0)
    os.close(ready)
    os.close(holds)


OUTLIVED = """
import multiprocessing, os, sys, time
from clip_jax.core import locks

if __name__ == '__main__':
  with locks.lock(sys.argv[1], 's/a'):
    forked = os.fork()
    if not forked:
      time.sleep(600)
    spawned = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(600,))
    spawned.start()
    print(forked, spawned.pid, flush=True)
    time.sleep(600)
"""


def test_children_that_outlive_a_killed_holder_do_not_hold_its_lock(tmp_path):
  (tmp_path / 'holder.py').write_text(OUTLIVED)
  with subprocess.Popen(
    [sys.executable, tmp_path / 'holder.py', tmp_path],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.path.dirname(os.path.dirname(__file__))},
  ) as holder:
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
      assert len(children) == 2
      with pytest.raises(InputError, match=f'process {holder.pid} on'):
        make(tmp_path, Product('s/a'))
      holder.kill()
      holder.wait()
      for child in children:
        os.kill(child, 0)  # it still lives
      assert make(tmp_path, Product('s/a')) == ['s/a']
    finally:
      holder.kill()
      for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_leaves_the_lock_to_its_parent(tmp_path):
  parent = os.getpid()
  try:
    with locks.lock(str(tmp_path), 's/a'):
      child = os.fork()
      if child:
        os.waitpid(child, 0)
        assert (tmp_path / 's/a.lock').exists()
        with pytest.raises(InputError, match=f'process {parent} on'):
          make(tmp_path, Product('s/a'))
  finally:
    if os.getpid() != parent:
      os._exit(0)  # the child has left the block of the lock


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(locks.fcntl, 'flock', flock)
  with pytest.raises(InputError, match=r's/a.lock cannot be locked \(No locks available\)'):
    make(tmp_path, Product('s/a'))


def test_a_lock_is_not_inherited(tmp_path):
  with locks.lock(tmp_path, 's/a'):
    sleeper = os.posix_spawn('/bin/sleep', ['sleep', '30'], os.environ)
  try:
    with locks.lock(tmp_path, 's/a'):
      pass
  finally:
    os.kill(sleeper, 9)
    os.waitpid(sleeper, 0)


def test_the_reader_of_all_products_also_reads_files_of_a_pattern(tmp_path):
  """A file that no product holds, and a name with the letters of a pattern in it."""
  workdir = tmp_path / 'a[1]'
  page = Product('report/page', is_cheap=True, reads_all=True, reads_files='train/*/*/grown.jsonl')
  run = Product('train/base/seed0/run')
  make(workdir, run)
  before = dataclasses.replace(page, reads_files='')
  assert make(workdir, before) == ['report/page']
  assert products.status(workdir, page) == 'fits'  # without such a file nothing changes
  path = workdir / 'train/base/seed0/grown.jsonl'
  path.write_text('1')
  assert products.differences(workdir, page) == ['train/base/seed0/grown.jsonl is new']
  assert make(workdir, page) == ['report/page'] and make(workdir, page) == []
  path.write_text('2')
  assert products.differences(workdir, page) == ['train/base/seed0/grown.jsonl has changed']
  assert products.status(workdir, run) == 'fits'
