"""Several commands share a work directory: each does a part, and the result is that of one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import squares
import tiny

from clip_jax.core import files, folders, locks, products
from clip_jax.core.errors import ConfigError
from clip_jax.core.products import Product
from clip_jax.stages import pipeline, sharing

TARS = 40  # of three images: 20 parts of two shards


@pytest.mark.parametrize('first, second, is_free', [(True, True, True), (True, False, False)])
def test_a_shared_lock_keeps_only_others_out(tmp_path, first, second, is_free):
  for a, b in ((first, second), (second, first)):
    with locks.lock(str(tmp_path), 'a/lot', shared=a):
      if is_free:
        with locks.lock(str(tmp_path), 'a/lot', shared=b):
          pass
      else:
        with pytest.raises(locks.Busy, match='engine.name=shared'):
          with locks.lock(str(tmp_path), 'a/lot', shared=b):
            pass
  assert not list((tmp_path / 'a').iterdir())


def test_what_is_made_elsewhere_and_its_readers_come_later(monkeypatch):
  monkeypatch.setattr(time, 'sleep', lambda seconds: asked.append(seconds))
  asked, made, busy = [], [], {'x/1': 2}  # x/1 is made elsewhere, and seen so twice
  shards = [Product(f'x/{i}', 'embeddings', ('pool', i), batch='x/all') for i in range(3)]
  merged = Product('x/merged', 'merged', inputs=tuple(shards))

  def make(batch, part):
    (product,) = batch
    if busy.get(product.name, 0):
      busy[product.name] -= 1
      raise locks.Busy
    made.append((product.name, part))
    return batch

  assert sum(sharing.shared(make, [*shards, merged]), []) == [
    shards[0],
    shards[2],
    shards[1],
    merged,
  ]
  assert [name for name, _ in made] == ['x/0', 'x/2', 'x/1', 'x/merged']
  assert [part for _, part in made] == [f'embeddings-00{i}' for i in (0, 2, 1)] + ['']
  assert len(asked) == 1


def test_parts_are_few_and_the_same_whatever_is_missing():
  shards = [Product(f'x/{i}', 'search shard', ('val', i), batch='x') for i in range(100)]
  parts = dict(sharing.parts(shards))
  assert len(parts) == 25 and [p.subject[1] for p in parts['search-shard-003']] == [12, 13, 14, 15]


def test_files_that_another_command_deletes_meanwhile_are_no_error(tmp_path, monkeypatch):
  products.finish(str(tmp_path), Product('x/0'), [], {})
  listed = list(products._sidecar_paths(str(tmp_path)))
  gone = products.sidecar_path(str(tmp_path), 'x/1')
  monkeypatch.setattr(products, '_sidecar_paths', lambda folder: [gone, *listed])
  assert list(products.sidecars(str(tmp_path))) == ['x/0']
  assert products.read_sidecar(str(tmp_path), 'x/1') is None
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')  # listed, and not there
  assert folders.size_below(str(tmp_path)) == os.path.getsize(listed[0])


def test_redo_is_not_for_shared_work(tmp_path):
  squares.make(tmp_path)
  c = squares.config(tmp_path, **{'engine.name': 'shared'})
  with pytest.raises(ConfigError, match='--redo=search with config.engine.name=shared'):
    pipeline.run(c, str(tmp_path / 'w'), stages=None, redo='search', dry_run=False)


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import squares

def get_config():
  return squares.config({data!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize('kills', [0, 9])
def test_three_commands_killed_and_replaced_give_the_bytes_of_one(tmp_path, kills):
  data = tmp_path / 'data'
  squares.make(data)
  for path in (data / 'pool').iterdir():
    path.unlink()
  for i in range(TARS):
    samples = {f'{3 * i + j:05d}': squares.sample(3 * i + j, j) for j in range(3)}
    squares.write_tar(data / f'pool/{i:03d}.tar', samples)
  config = tmp_path / 'config.py'
  config.write_text(CONFIG.format(tests=str(tiny.ROOT / 'tests'), data=str(data)))

  def start(name, *more):
    command = [sys.executable, '-m', 'clip_jax.main', f'--config={config}']
    with open(tmp_path / f'{name}.out', 'a') as out:
      return subprocess.Popen(
        [*command, f'--workdir={tmp_path / name}', *more],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=out,
        stderr=subprocess.STDOUT,
      )

  assert start('one').wait() == 0
  shared = '--config.engine.name=shared', '--config.engine.kills=0'
  running, draw = [start('three', *shared) for _ in range(3)], random.Random(0)
  while kills and any(process.poll() is None for process in running):
    time.sleep(draw.uniform(0.5, 3))
    i = draw.randrange(3)
    if running[i].poll() is None:
      running[i].kill()
      assert running[i].wait() == -signal.SIGKILL
      running[i], kills = start('three', *shared), kills - 1
  said = (tmp_path / 'three.out').read_text()
  assert [process.wait() for process in running] == [0] * 3, said
  one, three = (products.sidecars(str(tmp_path / name)) for name in ('one', 'three'))
  assert one.keys() == three.keys()
  for name in one:
    if name.startswith('train/'):
      assert one[name]['counts']['digest'] == three[name]['counts']['digest']
    elif not name.startswith(('report/', 'evaluate/')):
      assert one[name]['checksum'] == three[name]['checksum'], name
    assert one[name]['fingerprint'] == three[name]['fingerprint'] or name == 'report/index'
  for name in ('base', 'pruned'):
    found = [
      files.read_json(tmp_path / run / f'evaluate/{name}/seed0/squares.json')['top1']
      for run in ('one', 'three')
    ]
    assert found[0] == found[1]
  left = [path for path in (tmp_path / 'three').rglob('*') if path.name.endswith('.lock')]
  assert not left and not os.path.exists(tmp_path / 'three/redo.json')
