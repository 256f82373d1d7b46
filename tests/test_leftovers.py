"""Nothing stays of a command, however it ends: process, shared memory, lock or temporary file."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import squares
import tiny

pytestmark = pytest.mark.slow
SECS = 300  # for one command
MARK = 'CLIP_JAX_TEST_LEFTOVERS'  # in the environment of a command and of what it starts
ENGINES = {
  'local': (),
  'two workers': ('--config.engine.workers=2', '--config.train.loader_processes=2'),
  'shared': ('--config.engine.name=shared',),
}
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import squares

def get_config():
  return squares.config({data!r}, **{{'train.samples': 1024, 'train.save_every_steps': 8}})
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('leftovers')
  squares.make(folder / 'data')
  tars = sorted((folder / 'data/pool').iterdir())
  for i in range(2, 12):  # shards enough for a signal between them
    samples = {f'{1000 + 3 * i + j:05d}': squares.sample(1000 + 3 * i + j, j) for j in range(3)}
    squares.write_tar(folder / f'data/pool/{i}.tar', samples)
  assert len(tars) == 2
  tests, own = str(tiny.ROOT / 'tests'), str(folder / 'data')
  (folder / 'config.py').write_text(CONFIG.format(tests=tests, data=own))
  return folder


def start(data, workdir, *more):
  """Starts a command; its temporary files go to WORKDIR.tmp."""
  scratch = pathlib.Path(f'{workdir}.tmp')
  scratch.mkdir(exist_ok=True)
  command = [sys.executable, '-m', 'clip_jax.main', f'--config={data / "config.py"}']
  with open(f'{workdir}.out', 'a') as out:
    return subprocess.Popen(
      [*command, f'--workdir={workdir}', *more],
      cwd=tiny.ROOT,
      env=tiny.environment() | {MARK: str(workdir), 'TMPDIR': str(scratch)},
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )


def processes(workdir) -> list[str]:
  """Returns the command lines of what the command has started and still runs."""
  mark, found = f'{MARK}={workdir}'.encode(), []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if mark in (folder / 'environ').read_bytes().split(b'\0'):
        found.append((folder / 'cmdline').read_bytes().replace(b'\0', b' ').decode())
    except OSError:  # it has ended, or is another user's
      continue
  return found


def shared_memory() -> set[str]:
  return set(os.listdir('/dev/shm')) if os.path.isdir('/dev/shm') else set()


def check_nothing_is_left(workdir, memory_before) -> None:
  until = time.monotonic() + 10  # for the end of processes whose parent has ended
  while processes(workdir) and time.monotonic() < until:
    time.sleep(0.1)
  said = pathlib.Path(f'{workdir}.out').read_text()
  assert processes(workdir) == [], said
  ours = {
    name
    for name in shared_memory() - memory_before
    if not processes_with(f'/dev/shm/{name}')  # those of other programs that run now
  }
  assert ours == set(), said
  names = [str(path.relative_to(workdir)) for path in workdir.rglob('*')]
  left = [name for name in names if name.endswith('.lock') or '.tmp' in name or 'redo' in name]
  assert left == [], said
  assert [path.name for path in pathlib.Path(f'{workdir}.tmp').iterdir()] == [], said


def processes_with(path) -> list[str]:
  """Returns the numbers of processes that have a file of shared memory open or mapped."""
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if path in (folder / 'maps').read_text():
        found.append(folder.name)
    except OSError:
      continue
  return found


@pytest.mark.parametrize('engine', ENGINES)
def test_after_success(engine, data, tmp_path):
  before = shared_memory()
  assert start(data, tmp_path / 'w', *ENGINES[engine]).wait(SECS) == 0, (
    tmp_path / 'w.out'
  ).read_text()
  check_nothing_is_left(tmp_path / 'w', before)


@pytest.mark.parametrize('engine', ENGINES)
def test_after_an_error(engine, data, tmp_path):
  """A benchmark that is damaged: an error in the middle of ingest."""
  before = shared_memory()
  bad = tmp_path / 'bench/0.tar'
  bad.parent.mkdir()
  bad.write_bytes(b'not a tar' * 1000)
  flags = (*ENGINES[engine], f'--config.benchmarks.squares.path={bad}')
  assert start(data, tmp_path / 'w', *flags).wait(SECS) == 1, (tmp_path / 'w.out').read_text()
  assert 'Error: ' in (tmp_path / 'w.out').read_text()
  check_nothing_is_left(tmp_path / 'w', before)


@pytest.mark.parametrize('to_all', [True, False], ids=['to all', 'to the command'])
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('engine', ENGINES)
def test_after_a_signal(engine, signum, to_all, data, tmp_path):
  """Once while shards are indexed, and once in training; Ctrl-C reaches all processes at once."""
  before, workdir = shared_memory(), tmp_path / 'w'
  for moment in ('ingest/pool/index-00000.sidecar.json', 'train/base/seed0/checkpoints/*'):
    process = start(data, workdir, *ENGINES[engine])
    until = time.monotonic() + SECS
    while not list(workdir.glob(moment)):
      assert process.poll() is None and time.monotonic() < until, (tmp_path / 'w.out').read_text()
      time.sleep(0.01)
    os.killpg(process.pid, signum) if to_all else process.send_signal(signum)
    assert process.wait(SECS) == 128 + signum, (tmp_path / 'w.out').read_text()
    said = (tmp_path / 'w.out').read_text()
    assert 'Traceback' not in said, said
    check_nothing_is_left(workdir, before)


def test_the_listing_sees_what_is_left(tmp_path):
  """The check can fail: a process, its shared memory, a lock and a temporary file."""
  code = (
    'import tempfile, time; from multiprocessing import shared_memory; '
    'memory = shared_memory.SharedMemory(create=True, size=9); open(tempfile.mkstemp()[1]); '
    'print(memory.name, flush=True); time.sleep(99)'
  )
  workdir, before = tmp_path / 'w', shared_memory()
  (tmp_path / 'w.tmp').mkdir()
  workdir.mkdir()
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    env=os.environ | {MARK: str(workdir), 'TMPDIR': str(tmp_path / 'w.tmp')},
    stdout=subprocess.PIPE,
    text=True,
  )
  name = process.stdout.readline().strip()
  assert len(processes(workdir)) >= 1 and name in shared_memory() - before
  assert processes_with(f'/dev/shm/{name}') == [str(process.pid)]
  process.kill()
  process.communicate()
  assert len(list((tmp_path / 'w.tmp').iterdir())) == 1
