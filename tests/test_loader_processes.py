import functools
import os
import signal
import subprocess
import sys
import time

from absl import logging
import loader_sources
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import loader_processes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _elements(make, count=20, processes=2, threads=1, slot_bytes=2000):
  return loader_processes.elements(
    make, count, processes=processes, threads=threads, slot_bytes=slot_bytes
  )


def _gone(pid, secs=60.0):
  """Waits until a process is gone, as one that is no child of ours is seen."""
  deadline = time.time() + secs
  while time.time() < deadline:
    try:
      os.kill(pid, 0)
      with open(f'/proc/{pid}/stat') as f:
        if f.read().rsplit(')', 1)[1].split()[0] == 'Z':  # nobody buries it here
          return True
    except OSError:
      return True
    time.sleep(0.05)
  return False


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


@pytest.mark.parametrize('processes, threads, slot_bytes', [(1, 1, 2000), (3, 2, 2000), (2, 2, 5)])
def test_elements_come_in_order_from_other_processes(processes, threads, slot_bytes, warnings):
  pids = set()
  for k, element in enumerate(_elements(loader_sources.late, 20, processes, threads, slot_bytes)):
    assert element['k'] == k and (element['x'] == k * k).all() and len(element['x']) == 100
    assert element['empty'].shape == (0, 3)
    pids.add(element['pid'])
  assert k == 19 and len(pids) == processes and os.getpid() not in pids
  assert all(map(_gone, pids)) and not warnings


def test_an_element_s_memory_is_used_again():
  kept, copies = [], []
  for element in _elements(loader_sources.square, 30):
    kept.append(element['x'])
    copies.append(element['x'].copy())
  assert all((copy == k * k).all() for k, copy in enumerate(copies))
  assert any((old != copy).any() for old, copy in zip(kept, copies))  # so they had to be copied
  assert not kept[-1].flags.owndata


def test_errors_are_raised_in_their_place_with_where_they_came_from():
  elements = _elements(loader_sources.fails)
  assert [next(elements)['k'] for _ in range(5)] == [0, 1, 2, 3, 4]
  with pytest.raises(KeyError, match='five') as error:
    next(elements)
  assert 'loader_sources.py' in error.value.__notes__[0]
  with pytest.raises(RuntimeError, match='Odd: 1 and 0'):
    next(_elements(loader_sources.fails_oddly))


def test_a_process_that_is_killed_is_replaced_and_nothing_is_lost(warnings):
  seen, killed = [], []
  for element in _elements(loader_sources.late, 60, processes=2, threads=2):
    seen.append(element['k'])
    if element['k'] in (10, 30):
      killed.append(element['pid'])
      os.kill(element['pid'], signal.SIGKILL)
  assert seen == list(range(60)) and len(warnings) == 2
  for pid, warning in zip(killed, warnings):
    assert f'(pid {pid})' in warning and 'SIGKILL' in warning and 'again' in warning


def test_all_processes_may_be_killed_at_once(warnings):
  elements = _elements(loader_sources.late, 40, processes=3)
  pids = {next(elements)['pid'] for _ in range(12)}
  for pid in pids:
    os.kill(pid, signal.SIGKILL)
  assert [element['k'] for element in elements] == list(range(12, 40))
  assert len(warnings) == len(pids) == 3


def test_elements_that_kill_are_made_again_until_it_is_hopeless(tmp_path, warnings):
  make = functools.partial(loader_sources.dies, str(tmp_path), (3, 11), 2)
  assert [element['k'] for element in _elements(make)] == list(range(20))
  assert len(warnings) == 4
  make = functools.partial(loader_sources.dies, str(tmp_path), (15,), 100)
  elements = _elements(make)
  assert [next(elements)['k'] for _ in range(15)] == list(range(15))
  with pytest.raises(InputError, match=r'SIGKILL.*3 times.*memory.*train.loader_processes'):
    next(elements)


def test_processes_see_no_accelerator_and_import_little(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  assert next(_elements(loader_sources.environment)) == {'platforms': 'cpu', 'heavy': []}
  assert os.environ['JAX_PLATFORMS'] == 'cuda'
  monkeypatch.delenv('JAX_PLATFORMS')
  next(_elements(loader_sources.environment))
  assert 'JAX_PLATFORMS' not in os.environ


PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, 'tests')
import loader_sources
from clip_jax.data import loader_processes
if __name__ == '__main__':
  elements = loader_processes.elements(loader_sources.late, 1 << 40, processes=2, threads=2,
                                       slot_bytes=2000)
  pids = {next(elements)['pid'] for _ in range(30)}
  print(*pids, flush=True)
  %s
"""


def _program(tmp_path, end):
  path = tmp_path / 'program.py'
  path.write_text(PROGRAM % end)
  return subprocess.Popen(
    [sys.executable, str(path)],
    stdout=subprocess.PIPE,
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    env={**os.environ, 'PYTHONPATH': ROOT},
  )


@pytest.mark.parametrize(
  'end, status',
  [
    ('', 0),
    ('elements.close()', 0),
    ('raise SystemExit(3)', 3),
    ('del elements', 0),
    ('os.kill(os.getpid(), signal.SIGKILL)', -9),
    ('os._exit(5)', 5),
  ],
)
def test_no_process_stays_and_an_end_is_quiet(tmp_path, end, status):
  process = _program(tmp_path, end)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (status, '')
  pids = list(map(int, out.split()))
  assert len(pids) == 2 and all(map(_gone, pids))


@pytest.mark.parametrize(
  'signum, group', [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_signals_are_for_the_first_process_to_answer(tmp_path, signum, group):
  end = """
  def stop(signum, frame):
    raise SystemExit(7)
  signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
  print('ready', flush=True)
  for _ in elements:
    pass
"""
  process = _program(tmp_path, end)
  pids = list(map(int, process.stdout.readline().split()))
  assert process.stdout.readline() == 'ready\n'
  (os.killpg if group else os.kill)(process.pid, signum)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (7, '')
  assert all(map(_gone, pids))
