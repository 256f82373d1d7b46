"""Saving, damage, kills: what Orbax leaves on the disk is believed only if its digest fits."""

from concurrent import futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.core import checkpoints, mirror
from clip_jax.core.errors import InputError

CONFIG = {'model': {'width': 8}, 'mean': [0.5, 0.5, 0.5]}


def state(seed, size=1000):
  """params and opt with numbered list elements and a scalar, as models have them."""
  key = jax.random.key(seed)
  blocks = {
    i: {'weight': jax.random.normal(jax.random.fold_in(key, i), (size,))} for i in range(11)
  }
  params = {'tower': {'blocks': blocks}, 'scale': jnp.float32(seed)}
  return dict(params=params, opt={'moment': jax.tree.map(lambda x: x * 2, params)})


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(folder, *steps, keep=5):
  store = checkpoints.Checkpoints(folder, keep=keep)
  for step in steps:
    store.save(step, state(step), {'seconds': step / 2}, CONFIG)
  store.close()


def restore(folder):
  store = checkpoints.Checkpoints(folder, keep=5)
  try:
    return store.restore(abstract(state(0)))
  finally:
    store.close()


def damage(folder):
  """Flips one byte in the middle of every file that holds array bytes."""
  for path in pathlib.Path(folder).rglob('d/*'):
    flip(path, path.stat().st_size // 2)


def flip(path, position):
  data = bytearray(path.read_bytes())
  data[position] ^= 1
  path.write_bytes(data)


def test_a_digest_tells_values_names_shapes_and_types_apart():
  base = {'a': np.arange(6, dtype=np.float32), 'b': np.float32(1)}
  others = [
    {'a': base['a'], 'b': np.float32(2)},
    {'a': base['a'], 'c': base['b']},
    {'a': base['a'].reshape(2, 3), 'b': base['b']},
    {'a': base['a'].view(np.int32), 'b': base['b']},
    {'a': -0.0 * base['a'], 'b': base['b']},
  ]
  digests = {checkpoints.digest(tree) for tree in [base, *others]}
  assert len(digests) == 6
  assert checkpoints.digest(dict(reversed(base.items()))) == checkpoints.digest(base)
  assert checkpoints.digest(jax.tree.map(jnp.asarray, base)) == checkpoints.digest(base)


def test_all_comes_back(tmp_path):
  save(tmp_path / 'run' / 'checkpoints', 2, 4)
  step, arrays, data = restore(tmp_path / 'run' / 'checkpoints')
  assert step == 4 and data['seconds'] == 2
  assert checkpoints.digest(arrays) == checkpoints.digest(state(4))
  for path, want in (('run', 4), ('run/checkpoints', 4), ('run/checkpoints/00000002', 2)):
    params, step, config = checkpoints.restore_params(tmp_path / path)
    assert step == want and config == CONFIG
    assert isinstance(params['scale'], np.ndarray)
    assert sorted(params['tower']['blocks']) == list(range(11))
    assert checkpoints.digest(params) == checkpoints.digest(state(want)['params'])


def test_relative_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save('checkpoints', 1)
  assert checkpoints.restore_params('checkpoints')[1] == 1


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
  save(tmp_path, 1, 2, 2, 3, keep=2)
  save(tmp_path, 3, keep=2)
  assert [folder.name for folder in checkpoints.step_folders(tmp_path)] == ['00000002', '00000003']


@pytest.mark.parametrize('item', ['params', 'opt'])
def test_a_flipped_byte_falls_back_to_the_step_before(tmp_path, caplog, item):
  save(tmp_path, 1, 2)
  damage(tmp_path / '00000002' / item)
  step, arrays, _ = restore(tmp_path)
  assert step == 1 and float(arrays['params']['scale']) == 1
  assert 'damaged' in caplog.text and '00000002' in caplog.text
  save(tmp_path, 2)
  assert restore(tmp_path)[0] == 2


def test_no_flipped_byte_anywhere_gives_something_else(tmp_path):
  save(tmp_path, 1)
  want = checkpoints.digest(state(1)['params'])
  rng = np.random.default_rng(0)
  paths = sorted(p for p in (tmp_path / '00000001').rglob('*') if p.is_file() and p.stat().st_size)
  noticed = 0
  for _ in range(60):
    path = paths[rng.integers(len(paths))]
    position = rng.integers(path.stat().st_size)
    flip(path, position)
    try:
      params, step, config = checkpoints.restore_params(tmp_path)
      assert checkpoints.digest(params) == want and (step, config) == (1, CONFIG)
    except InputError:
      noticed += 1
    flip(path, position)
  assert noticed > 3
  assert checkpoints.digest(checkpoints.restore_params(tmp_path)[0]) == want


def test_a_flipped_byte_is_an_error_where_only_parameters_are_read(tmp_path):
  save(tmp_path, 1, 2)
  damage(tmp_path / '00000002' / 'params')
  with pytest.raises(InputError, match='00000002'):
    checkpoints.restore_params(tmp_path)
  assert checkpoints.restore_params(tmp_path / '00000001')[1] == 1


def test_an_empty_step_is_none(tmp_path):
  save(tmp_path, 1)
  (tmp_path / '00000007').mkdir()
  assert checkpoints.restore_params(tmp_path)[1] == 1
  assert restore(tmp_path)[0] == 1


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path / 'checkpoints') is None
  for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'absent'):
    with pytest.raises(InputError, match='holds no checkpoint'):
      checkpoints.restore_params(path)


def test_another_models_checkpoint_is_refused_and_kept(tmp_path):
  save(tmp_path, 1)
  store = checkpoints.Checkpoints(tmp_path, keep=5)
  with pytest.raises(InputError, match=r'00000001.*shape \(1000,\) .*\(7,\)'):
    store.restore(abstract(state(0, size=7)))
  store.close()
  assert restore(tmp_path)[0] == 1


SAVE_FOR_EVER = """
import sys
sys.path[:0] = sys.argv[2:]
from test_checkpoints import checkpoints, state
store = checkpoints.Checkpoints(sys.argv[1], keep=3)
print('begin', flush=True)
step = max((int(f.name) for f in checkpoints.step_folders(sys.argv[1])), default=0)
while True:
  step += 1
  store.save(step, state(step, 100_000), {'seconds': 0}, {})
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_never_leaves_a_step_that_looks_whole(tmp_path):
  here = os.path.dirname(__file__)
  for kill in range(6):
    process = subprocess.Popen(
      [sys.executable, '-c', SAVE_FOR_EVER, tmp_path, here, os.path.dirname(here)],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    process.stdout.readline()
    time.sleep(1 + 0.17 * kill)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for folder in checkpoints.step_folders(tmp_path):
      params, step, _ = checkpoints.restore_params(folder)
      assert checkpoints.digest(params) == checkpoints.digest(state(step, 100_000)['params'])
  assert checkpoints.step_folders(tmp_path)


def test_a_step_that_a_killed_process_did_not_upload_whole_is_made_again(tmp_path, monkeypatch):
  monkeypatch.setenv(mirror._OPEN, '[]')
  home = mirror.open_mirror('memory://steps', str(tmp_path))
  folder, at = os.path.join(home, 'run/checkpoints'), mirror.of(home)
  assert at is not None
  save(folder, 1)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, '_publish', lambda self, step: None)
    save(folder, 2)  # killed before
  at.objects.write('run/checkpoints/00000003/params/part', b'x')  # killed in between
  at.refresh()
  found = restore(folder)
  assert found is not None and found[0] == 1
  assert {name.split('/')[2] for name in at.objects.below()} == {'00000001'}
  save(folder, 2)
  assert 'run/checkpoints/00000002/data/metadata' in at.objects.below()
  mirror._mirrors.clear()


def test_runs_in_threads_save_together(tmp_path):
  """Without their turns, Orbax takes the folder of one save for that of another."""

  def save(number):
    run = checkpoints.Checkpoints(tmp_path / str(number), keep=1, alone=False)
    for step in range(1, 9):
      arrays = dict(params={'a': np.full(3, number + step)}, opt={'m': np.zeros(1)})
      run.save(step, arrays, {}, {})
    run.close()

  with futures.ThreadPoolExecutor(3) as pool:
    list(pool.map(save, range(3)))
  for number in range(3):
    params, step, _ = checkpoints.restore_params(tmp_path / str(number))
    assert step == 8 and params['a'].tolist() == [number + 8] * 3
