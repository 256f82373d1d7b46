"""core/files.py: whole files or none."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from clip_jax.core import files
from clip_jax.core.errors import InputError


def test_round_trips(tmp_path):
  files.write_json(tmp_path / 'a/b.json', {'x': [1, 2.5, None, 'é']})
  assert files.read_json(tmp_path / 'a/b.json') == {'x': [1, 2.5, None, 'é']}
  files.write_npz(tmp_path / 'c.npz', x=np.arange(3), y=np.float16([1, 2]))
  arrays = files.read_npz(tmp_path / 'c.npz')
  assert arrays['x'].tolist() == [0, 1, 2] and arrays['y'].dtype == np.float16
  files.write_npy(tmp_path / 'd.npy', np.eye(2))
  assert np.load(tmp_path / 'd.npy', mmap_mode='r').tolist() == np.eye(2).tolist()


def test_equal_arrays_are_equal_bytes(tmp_path):
  for name in 'ab':
    files.write_npz(tmp_path / name, x=np.arange(9), y=np.zeros(2))
  assert files.sha256(tmp_path / 'a') == files.sha256(tmp_path / 'b')


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / 'x.bin'
  files.write_bytes(path, b'old')
  with pytest.raises(RuntimeError, match='stop'), files.atomic(path) as temporary:
    temporary.write_bytes(b'new')
    raise RuntimeError('stop')
  assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['x.bin']


def test_a_full_disk_is_one_sentence(tmp_path):
  with pytest.raises(InputError, match='No space left'), files.atomic(tmp_path / 'x'):
    raise OSError(errno.ENOSPC, 'No space left on device')
  assert not os.listdir(tmp_path)


def test_damaged_files_are_named(tmp_path):
  (tmp_path / 'x.json').write_text('{"a": ')
  with pytest.raises(InputError, match='x.json is not valid JSON'):
    files.read_json(tmp_path / 'x.json')
  files.write_npz(tmp_path / 'x.npz', x=np.arange(1000))
  data = (tmp_path / 'x.npz').read_bytes()
  (tmp_path / 'x.npz').write_bytes(data[:200])
  with pytest.raises(InputError, match='x.npz cannot be read'):
    files.read_npz(tmp_path / 'x.npz')


def test_json_refuses_nan(tmp_path):
  with pytest.raises(ValueError):
    files.write_json(tmp_path / 'x.json', float('nan'))
  assert not os.listdir(tmp_path)


def test_check_space(tmp_path):
  files.check_space(tmp_path / 'not/there/yet', 1, 'A file')
  with pytest.raises(InputError, match='are free'):
    files.check_space(tmp_path, 10**18, 'A huge file')
  assert files.free_bytes('gs://bucket/x') is None


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_kept(tmp_path):
  code = (
    'import os, signal, sys; from clip_jax.core import files\n'
    'with files.atomic(sys.argv[1]) as path:\n'
    '  path.write_text("half"); os.kill(os.getpid(), signal.SIGKILL)'
  )
  (tmp_path / 'deep').mkdir()
  subprocess.run([sys.executable, '-c', code, str(tmp_path / 'deep/x')], check=False)
  (left,) = (tmp_path / 'deep').iterdir()
  other = tmp_path / '.tmp-otherhost-1-y'
  other.write_text('another machine')
  with files.atomic(tmp_path / 'z') as live:
    live.write_text('whole')
    assert files.remove_unfinished(str(tmp_path)) == [str(left)]
  assert sorted(os.listdir(tmp_path)) == ['.tmp-otherhost-1-y', 'deep', 'z']


def test_what_a_zombie_left_is_removed(tmp_path):
  child = os.fork()
  if not child:
    with files.atomic(tmp_path / 'x') as path:
      path.write_text('half')
      os.kill(os.getpid(), signal.SIGKILL)
  try:
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and not collected
    os.kill(child, 0)  # its number is still taken
    (left,) = tmp_path.iterdir()
    assert files.remove_unfinished(str(tmp_path)) == [str(left)]
  finally:
    os.waitpid(child, 0)
