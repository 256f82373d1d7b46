import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from clip_jax.core import engine
from clip_jax.core.errors import InputError


def _square(x):
  if x == 13:
    raise InputError('13 is no number here.')
  return x * x


def _process(job):
  return os.getpid()


def _wait_for(job):
  """Job 0 ends after all others did."""
  folder, i = job
  deadline = time.monotonic() + 60
  while not i and len(os.listdir(folder)) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
  pathlib.Path(folder, str(i)).touch()
  return i


def _killed(job):
  folder, i = job
  if i == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  pathlib.Path(folder, str(i)).touch()
  return i


@pytest.mark.parametrize('workers', [0, 2])
def test_results_come_with_their_numbers(workers):
  said = {'workers': workers, 'desc': 'x', 'unit': 'job'}
  found = list(engine.finished(_square, range(9), **said))
  assert sorted(found) == [(x, x * x) for x in range(9)] and (workers or found == sorted(found))
  assert list(engine.finished(_square, [], **said)) == []
  assert (os.getpid() in {pid for _, pid in engine.finished(_process, range(4), **said)}) == (
    not workers
  )
  with pytest.raises(InputError, match='13'):
    list(engine.finished(_square, [1, 13, 2], **said))


def test_what_is_finished_is_told_before_a_slow_job_ends(tmp_path):
  jobs = [(str(tmp_path), i) for i in range(4)]
  numbers = [i for i, _ in engine.finished(_wait_for, jobs, workers=2, desc='x', unit='job')]
  assert sorted(numbers) == [0, 1, 2, 3] and numbers[-1] == 0


def test_a_killed_worker_is_a_sentence_and_what_was_finished_is_told(tmp_path):
  jobs, told = [(str(tmp_path), i) for i in range(9)], []
  with pytest.raises(InputError, match='worker process.*engine.workers'):
    for i, _ in engine.finished(_killed, jobs, workers=1, desc='x', unit='job'):
      told.append(i)
  assert sorted(told) == [0, 1] == sorted(map(int, os.listdir(tmp_path)))
  with pytest.raises(InputError, match='worker process'):
    list(engine.finished(_killed, jobs, workers=3, desc='x', unit='job'))


def _locked(path):
  with open(path, 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # until this process ends
    f.write('x')
    f.flush()
    time.sleep(600)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  paths = [str(tmp_path / f'{i}') for i in range(2)]
  code = (
    'import sys, test_engine; from clip_jax.core import engine\n'
    'list(engine.finished(test_engine._locked, sys.argv[1:], workers=2, desc="x", unit="job"))'
  )
  parent = subprocess.Popen(
    [sys.executable, '-c', code, *paths], cwd=os.path.dirname(__file__), stderr=subprocess.DEVNULL
  )
  deadline = time.monotonic() + 60
  while not all(os.path.exists(path) and os.path.getsize(path) for path in paths):
    assert parent.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  parent.kill()
  parent.wait()
  for path in paths:
    with open(path) as f:
      while True:
        try:
          fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
          break
        except BlockingIOError:
          assert time.monotonic() < deadline
          time.sleep(0.05)
