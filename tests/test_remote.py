"""Work directories on object storage: a server on this machine, commands with their own caches.

Each command has a name of a machine and a folder of its own for copies, so that it sees of the
others only what is in the bucket. What comes out is compared with a run in a local folder.
"""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import bucket
import pytest
import squares
import tiny

from clip_jax.core import products

pytest.importorskip('obstore', reason='needs obstore: the s3 extra')
pytestmark = pytest.mark.slow

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import squares

def get_config():
  return squares.config({data!r}, **{{'train.samples': 640, 'train.save_every_steps': 3}})
"""
TARS = 8
on_both = pytest.mark.parametrize('server', ['s3', 'az'], indirect=True)
SHARED = '--config.engine.name=shared', '--config.engine.kills=0'


@pytest.fixture(scope='module')
def server(request, tmp_path_factory):
  protocol = getattr(request, 'param', 's3')
  with bucket.serve(protocol, tmp_path_factory.mktemp('server')) as found:
    yield found


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """The path of a config of a pool of eight tars."""
  folder = tmp_path_factory.mktemp('squares')
  squares.make(folder / 'data')
  for i in range(TARS):
    samples = {f'{8 * i + j:05d}': squares.sample(8 * i + j, j % 3) for j in range(8)}
    squares.write_tar(folder / f'data/pool/{i}.tar', samples)
  path = folder / 'config.py'
  path.write_text(CONFIG.format(tests=str(tiny.ROOT / 'tests'), data=str(folder / 'data')))
  return path


@pytest.fixture(scope='module')
def one(config, tmp_path_factory):
  """The work directory of the same experiment in a folder."""
  folder = tmp_path_factory.mktemp('one') / 'run'
  said = subprocess.run(
    [sys.executable, '-m', 'clip_jax.main', f'--config={config}', f'--workdir={folder}'],
    cwd=tiny.ROOT,
    env=tiny.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert said.returncode == 0, said.stdout + said.stderr
  return folder


@pytest.fixture
def on(server, config, tmp_path):
  """Returns start(url, machine, *flags): starts the command there; what it says is in said()."""
  started = []

  def start(url, machine, *flags, address='', given=config, **environment):
    with open(tmp_path / f'{machine}.out', 'a') as out:
      process = subprocess.Popen(
        [sys.executable, 'tests/machine.py', f'--config={given}', f'--workdir={url}', *flags],
        cwd=tiny.ROOT,
        env={
          **tiny.environment(),
          'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0',
          'PYTHONPATH': os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / 'tests')]),
          'MACHINE': machine,
          **server.environment(tmp_path / machine, address),
          **environment,
        },
        stdout=out,
        stderr=subprocess.STDOUT,
      )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()


@pytest.fixture
def url(request, server):
  return f'{server.protocol}://{bucket.NAME}/{request.node.name.replace("[", "-").replace("]", "")}'


def said(tmp_path) -> str:
  return ''.join(path.read_text() for path in sorted(tmp_path.glob('*.out')))


def stored(server, url) -> dict[str, bytes]:
  prefix = url.split('/', 3)[3] + '/'
  return {name.removeprefix(prefix): server.read(name) for name in server.names(prefix)}


def finish(process, tmp_path) -> None:
  assert process.wait() == 0, said(tmp_path)
  assert 'Traceback' not in said(tmp_path), said(tmp_path)


def assert_same(one, objects, killed=False) -> None:
  """Asserts that a work directory on storage holds what the one in the folder `one` holds.

  killed: a process was killed, whose lease may be there if nobody has needed it since.
  """
  ours = products.sidecars(str(one))
  found = [json.loads(objects[name]) for name in objects if name.endswith('.sidecar.json')]
  theirs = {sidecar['name']: sidecar for sidecar in found}
  assert theirs.keys() == ours.keys()
  for name, sidecar in ours.items():
    if name.startswith('train/'):
      assert theirs[name]['counts']['digest'] == sidecar['counts']['digest'], name
    elif not name.startswith('report/'):
      assert theirs[name]['checksum'] == sidecar['checksum'], name
      for file in sidecar['files']:
        assert objects[file] == (one / file).read_bytes(), file
  for name in objects:  # what is named after a process, or unfinished
    assert '.tmp' not in name and (killed or not name.endswith('.lock')), name
  assert not any(name.startswith(('replaced/', 'redo.json', '.write-test')) for name in objects)


def assert_published(tmp_path, machine, url, objects) -> None:
  """Asserts that the copies of a machine are all in the storage, with the same bytes."""
  folder = tmp_path / machine / 'clip_jax/workdirs' / url.replace('://', '/')
  for path in folder.rglob('*'):
    name = str(path.relative_to(folder))
    if path.is_file() and name != '.mirror.jsonl':
      assert objects.get(name) == path.read_bytes(), name


@on_both
def test_a_run_on_storage_is_that_in_a_folder_and_another_machine_goes_on(
  one, on, server, url, tmp_path
):
  finish(on(url, 'a', '--dry_run'), tmp_path)
  assert stored(server, url) == {}
  finish(on(url, 'a'), tmp_path)
  objects = stored(server, url)
  assert_same(one, objects)
  assert_published(tmp_path, 'a', url, objects)
  files = {str(path.relative_to(one)) for path in one.rglob('*') if path.is_file()}
  assert {name for name in files ^ objects.keys() if '/checkpoints/' not in name} == set()
  finish(on(url, 'b'), tmp_path)
  assert 'nothing was done' in (tmp_path / 'b.out').read_text()
  after = stored(server, url)
  changed = {name for name in {**objects, **after} if objects.get(name) != after.get(name)}
  assert changed <= {'log.txt', 'times.json', 'config.json', 'versions.json'}, changed
  finish(on(url, 'c', '--redo=search', '--stages=search,prune'), tmp_path)
  finish(on(url, 'd'), tmp_path)
  assert_same(one, stored(server, url))


@on_both
@pytest.mark.parametrize('seed', [0, 1])
def test_killed_anywhere_and_started_on_another_machine(one, on, server, url, tmp_path, seed):
  draw, kills = random.Random(seed), 0
  for number in range(20):
    process = on(url, f'm{number}', *(['--redo=dedup'] if number > 12 else []))
    try:
      process.wait(draw.uniform(3, 14) if kills < 8 else None)
    except subprocess.TimeoutExpired:
      process.kill()
      kills += process.wait() == -signal.SIGKILL
      continue
    assert process.returncode == 0, said(tmp_path)
    if kills >= 8 or number > 12:
      break
  assert 'Traceback' not in said(tmp_path), said(tmp_path)
  assert_same(one, stored(server, url), killed=True)


@pytest.mark.parametrize('signum, status', [('SIGKILL', -9), ('SIGTERM', 143), ('SIGINT', 130)])
def test_stopped_in_training_it_goes_on_from_the_last_checkpoint_elsewhere(
  one, on, server, url, tmp_path, signum, status
):
  for machine in ('a', 'b', 'c'):
    process = on(url, machine)
    before = _steps(server, url)
    while process.poll() is None and len(_steps(server, url) - before) < 2:
      time.sleep(0.05)
    process.send_signal(getattr(signal, signum))
    assert process.wait() == status, said(tmp_path)
    if status > 0:
      objects = stored(server, url)
      assert_published(tmp_path, machine, url, objects)
      assert not [name for name in objects if name.endswith('.lock')]
  finish(on(url, 'd'), tmp_path)
  assert_same(one, stored(server, url), killed=True)


def _steps(server, url) -> set[str]:
  """Returns the whole checkpoints on the storage."""
  names = server.names(url.split('/', 3)[3] + '/train/')
  return {name.split('/data/')[0] for name in names if '/data/' in name}


def test_two_processes_train_together_each_with_its_own_copies(one, on, server, url, tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    where = f'127.0.0.1:{free.getsockname()[1]}'

  def started(names, *flags):
    together = f'--coordinator={where}', f'--processes={len(names)}'
    return [on(url, name, *together, f'--process={i}', *flags) for i, name in enumerate(names)]

  first = started(['a', 'b'])
  while all(process.poll() is None for process in first) and len(_steps(server, url)) < 2:
    time.sleep(0.05)
  for process in first:
    process.kill()
    process.wait()
  steps = _steps(server, url)
  assert len(steps) >= 2, said(tmp_path)
  for process in started(['c', 'd']):
    finish(process, tmp_path)
  assert 'Training resumes from the checkpoint' in (tmp_path / 'c.out').read_text()
  finish(on(url, 'e'), tmp_path)  # one process finds all whole
  assert 'nothing was done' in (tmp_path / 'e.out').read_text()
  theirs = stored(server, url)
  for name, sidecar in products.sidecars(str(one)).items():
    found = json.loads(theirs[f'{name}.sidecar.json'])
    if name.startswith('train/'):  # the sums over two devices have other last bits
      assert found['counts']['steps'] == sidecar['counts']['steps']
    elif not name.startswith(('report/', 'evaluate/')):
      assert found['checksum'] == sidecar['checksum'], name


@on_both
@pytest.mark.parametrize('count, kills', [(2, 0), (3, 6)])
def test_machines_share_the_work_killed_and_replaced(one, on, server, url, tmp_path, count, kills):
  running, draw = [on(url, f'm{i}', *SHARED) for i in range(count)], random.Random(count)
  number = count
  while kills and any(process.poll() is None for process in running):
    time.sleep(draw.uniform(1, 6))
    i = draw.randrange(count)
    if running[i].poll() is None:
      running[i].kill()
      running[i].wait()
      running[i], kills, number = on(url, f'm{number}', *SHARED), kills - 1, number + 1
  assert [process.wait() for process in running] == [0] * count, said(tmp_path)
  assert 'Traceback' not in said(tmp_path), said(tmp_path)
  assert_same(one, stored(server, url), killed=True)


@on_both
def test_two_commands_that_do_not_share(one, on, server, url, tmp_path):
  first = on(url, 'a')
  while not _locks(server, url):
    time.sleep(0.05)
  second = on(url, 'b')
  assert second.wait() == 1
  text = (tmp_path / 'b.out').read_text()
  assert 'is being made by process' in text and ' on a since ' in text and '/clip_jax/' not in text
  finish(first, tmp_path)
  assert_same(one, stored(server, url))


def _locks(server, url) -> list[str]:
  return [name for name in stored(server, url) if name.endswith('.lock')]


def test_a_mirror_that_is_full_all_the_time(one, on, server, url, tmp_path):
  full = '--config.cache_gb=1e-6'
  finish(on(url, 'a', full, IN_USE='0.5'), tmp_path)
  objects = stored(server, url)
  assert_same(one, objects)
  assert_published(tmp_path, 'a', url, objects)
  folder = tmp_path / 'a/clip_jax/workdirs' / url.replace('://', '/')
  assert sum(path.is_file() for path in folder.rglob('*')) < len(objects) / 2


FAULTS = {
  'busy': lambda n, method, path: '503 SlowDown' if n % 10 == 9 else '',
  'answer lost': lambda n, method, path: 'lost' if n % 10 == 9 else '',
  'body cut': lambda n, method, path: 'cut' if n % 10 == 9 and method == 'GET' else '',
}


@pytest.mark.parametrize('fault', sorted(FAULTS))
def test_a_server_that_fails_now_and_then(one, on, server, tmp_path, fault):
  where = f's3://{bucket.NAME}/{fault.replace(" ", "-")}'
  with bucket.proxy(server.address, FAULTS[fault]) as address:
    finish(on(where, 'a', address=address), tmp_path)
    finish(on(where, 'b', address=address), tmp_path)
  assert_same(one, stored(server, where))


ERRORS = {  # name -> (URL, answers of the server, more environment, words of the message)
  'no bucket': ('s3://nosuch/x', '', {}, 'NoSuchBucket'),
  'denied': ('s3://bucket/e', '403 AccessDenied', {}, 'AccessDenied'),
  'keys': ('s3://bucket/e', '403 InvalidAccessKeyId', {}, 'InvalidAccessKeyId'),
  'busy': ('s3://bucket/e', '503 SlowDown', {}, 'SlowDown'),
  'read only': ('s3://bucket/e', 'read only', {}, 'AccessDenied'),
  'hangs': ('s3://bucket/e', 'hang', {}, 'error sending request'),
  'no server': ('s3://bucket/e', '', {'AWS_ENDPOINT_URL': 'http://127.0.0.1:9'}, 'error sending'),
  'no profile': ('s3://bucket/e', '', {'AWS_PROFILE': 'nosuch'}, 'profile (nosuch)'),
  'query': ('s3://bucket/e?x=1', '', {}, 'without ?, #'),
  'dots': ('s3://bucket/e/../f', '', {}, 'no usable address'),
  'protocol': ('ftp://bucket/e', '', {}, 'gs://, s3://, az://'),
}


@pytest.mark.parametrize('name', sorted(ERRORS))
def test_what_is_wrong_from_the_start_is_said_in_seconds(on, server, tmp_path, name):
  where, answers, environment, words = ERRORS[name]

  def fails(n, method, path):
    if answers == 'read only':
      return '403 AccessDenied' if method in ('PUT', 'POST', 'DELETE') else ''
    return answers

  began = time.monotonic()
  with bucket.proxy(server.address, fails) as address:
    process = on(where, 'a', address=address, **environment)
    assert process.wait() == 1, said(tmp_path)
  text = said(tmp_path)
  assert words in text and 'Traceback' not in text and 'Error: ' in text, text
  assert time.monotonic() - began < 60, text  # 2 to 25 s, on a machine with nothing else to do
  assert not [path for path in tmp_path.rglob('*') if path.name.startswith('.tmp')]


@pytest.mark.parametrize('how', ['403 AccessDenied', 'hang'])
def test_a_server_that_ends_in_the_middle(one, on, server, url, tmp_path, how):
  with bucket.proxy(server.address, lambda n, method, path: how if n > 90 else '') as address:
    process = on(url, 'a', address=address)
    assert process.wait() in (1, 143), said(tmp_path)
  text = said(tmp_path)
  assert 'Error: ' in text and 'Traceback' not in text, text
  finish(on(url, 'b'), tmp_path)
  finish(on(url, 'a'), tmp_path)
  assert_same(one, stored(server, url), killed=True)


@on_both
def test_the_pool_is_on_storage_too(one, on, server, config, url, tmp_path):
  if server.protocol == 's3':
    pytest.importorskip('s3fs', reason='needs s3fs: the s3 extra')
  data = config.parent / 'data'
  for path in data.rglob('*.tar'):
    server.upload(path, f'data/{path.relative_to(data)}')
  remote = tmp_path / 'config.py'
  remote.write_text(
    config.read_text().replace(repr(str(data)), repr(f'{server.protocol}://{bucket.NAME}/data'))
  )
  finish(on(url, 'a', given=remote), tmp_path)
  objects = stored(server, url)
  for name in ('base', 'pruned'):
    sidecar = f'train/{name}/seed0/run.sidecar.json'
    counts = [
      json.loads(text)['counts'] for text in (objects[sidecar], (one / sidecar).read_text())
    ]
    assert counts[0]['digest'] == counts[1]['digest']


def test_drawn_images_are_read_where_each_machine_has_them(on, server, url, tmp_path):
  flags = tiny.flags()
  given = pathlib.Path(tiny.ROOT / flags[0].removeprefix('--config=').split(':')[0])
  given, stages = f'{given}:full', '--stages=ingest,embedder,embed,dedup'
  folder = str(tmp_path / 'run')
  assert tiny.run(folder, stages).returncode == 0
  running = [on(url, f'm{i}', *SHARED, *flags[1:], stages, given=given) for i in range(3)]
  assert [process.wait() for process in running] == [0] * 3, said(tmp_path)
  assert 'Traceback' not in said(tmp_path), said(tmp_path)
  objects = stored(server, url)
  for name, sidecar in products.sidecars(folder).items():
    assert json.loads(objects[f'{name}.sidecar.json'])['checksum'] == sidecar['checksum'], name


@on_both
def test_results_and_checkpoints_are_read_by_url(one, on, server, url, config, tmp_path):
  finish(on(url, 'a'), tmp_path)
  before, found = stored(server, url), {}
  for where in (url, str(one)):
    code = (
      'import sys, clip_jax; of = clip_jax.read(sys.argv[1]); '
      'split = clip_jax.open_split(sys.argv[1], "pruned"); '
      'print(of.results.to_pylist(), of.search("squares").to_pylist(), len(split), split[3]); '
      'clip_jax.load(sys.argv[1] + "/train/base/seed0")'
    )
    evaluate = '-m', 'clip_jax.evaluate', f'--config={config}', f'--output={tmp_path / "out"}'
    for command in (('-c', code, where), (*evaluate, f'--checkpoint={where}/train/base/seed0')):
      said_now = subprocess.run(
        [sys.executable, *command],
        cwd=tiny.ROOT,
        env={**tiny.environment(), **server.environment(tmp_path / 'b')},
        capture_output=True,
        text=True,
        check=False,
      )
      assert said_now.returncode == 0, said_now.stderr
      found.setdefault(where, []).append(said_now.stdout.replace(where, ''))
  assert found[url] == found[str(one)]
  assert stored(server, url) == before
