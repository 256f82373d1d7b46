import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading
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


def test_threads_run_together_and_an_error_starts_no_other():
  at_once, running, most, started = 3, 0, 0, []
  lock, together = threading.Lock(), threading.Barrier(at_once, timeout=60)

  def job(i):
    nonlocal running, most
    with lock:
      started.append(i)
      running += 1
      most = max(most, running)
    if i < at_once:
      together.wait()  # passes only if all three run at the same time
    with lock:
      running -= 1
    return _square(i)

  assert sorted(engine.in_threads(job, range(9), at_once=at_once)) == [i * i for i in range(9)]
  assert most == at_once and sorted(started) == list(range(9))
  started.clear()
  with pytest.raises(InputError, match='13'):
    list(engine.in_threads(job, [13, *range(20, 40)], at_once=1))
  assert started == [13] and not running


_TWO_SIGNALS = """
import os, signal, sys, threading, time
from clip_jax.core import command, engine, interrupts

def job(i):
  with interrupts.deferred() as should_stop:
    os.write(1, b'ready\\n')  # in one piece, whatever the threads do
    while not should_stop():
      time.sleep(0.01)
    os.write(1, b'ends\\n')
    while 'hangs' in sys.argv:
      time.sleep(0.01)

sys.exit(command.run_command(lambda: list(engine.in_threads(job, range(5), at_once=2))))
"""


@pytest.mark.parametrize('hangs', [False, True])
def test_a_signal_ends_each_thread_and_a_second_one_the_process(hangs):
  process = subprocess.Popen(
    [sys.executable, '-c', _TWO_SIGNALS, *(['hangs'] if hangs else [])],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert [process.stdout.readline() for _ in range(2)] == ['ready\n'] * 2
  process.send_signal(signal.SIGTERM)
  assert [process.stdout.readline() for _ in range(2)] == ['ends\n'] * 2
  if hangs:
    process.send_signal(signal.SIGTERM)
  rest, _ = process.communicate(timeout=60)
  assert process.returncode == 143 and 'ready' not in rest


def _slow(path):
  pathlib.Path(path).touch()
  time.sleep(1 if path.endswith('0') else 600)
  pathlib.Path(f'{path}.done').touch()


_TO_ALL = """
import sys, test_engine
from clip_jax.core import command, engine

paths = sys.argv[1:]
work = engine.finished(test_engine._slow, paths, workers=2, desc='x', unit='job')
sys.exit(command.run_command(lambda: list(work)))
"""


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('twice', [False, True])
def test_a_signal_to_all_processes_lets_the_running_jobs_end(signum, twice, tmp_path):
  """Unless it comes a second time, which kills them."""
  names = ('a1', 'b1', 'c1') if twice else ('a0', 'b0', 'c0', 'd0', 'e0', 'f0')
  paths = [str(tmp_path / name) for name in names]
  process = subprocess.Popen(
    [sys.executable, '-c', _TO_ALL, *paths],
    cwd=os.path.dirname(__file__),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 60
  while len(os.listdir(tmp_path)) < 2:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  for _ in range(2 if twice else 1):
    os.killpg(process.pid, signum)
    time.sleep(0.5)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signum and 'Traceback' not in said, said
  found = {name for name in names if (tmp_path / name).exists()}
  done = {name for name in names if (tmp_path / f'{name}.done').exists()}
  assert found == {'a1', 'b1'} and not done if twice else done == found and len(found) <= 3
