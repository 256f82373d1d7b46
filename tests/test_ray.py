"""The driver of a Ray cluster: with a cluster of this machine (slow), and with a pretended one."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import tiny

from clip_jax.core import hosts, interrupts, locks, on_ray, products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Product
from clip_jax.stages import pipeline

TO_PRUNE = '--stages=ingest,embedder,embed,dedup,search,prune'
CAP_SECS = 400  # for each command on a cluster


class _Killed(BaseException):
  pass


def _make_and_be_killed(folder, wanted, kills=3):
  """Makes products; leaves the lock file of a process that is killed at the second one."""
  lock, left = folder / 'x/all-part.lock', []

  def work(todo):
    for product in todo:
      if product.name == 'x/1':
        left.append(lock.read_text())
        raise _Killed
      yield product, [], {}

  try:
    products.make(str(folder), wanted, work, part='part', kills=kills)
  except _Killed:
    lock.write_text(left[0])


def test_a_shard_that_kills_three_processes_in_a_row_is_named_and_then_tried_again(tmp_path):
  wanted = [Product(f'x/{i}', batch='x/all') for i in range(3)]
  for _ in range(3):
    _make_and_be_killed(tmp_path, wanted)
  with pytest.raises(InputError, match='x/1 in .*: 3 processes in a row were killed'):
    _make_and_be_killed(tmp_path, wanted)
  assert (
    not list(tmp_path.rglob('*.lock'))
    and products.count_finished(str(tmp_path), [product.name for product in wanted]) == 1
  )
  for _ in range(5):  # the message ends the count; and 0 is no limit
    _make_and_be_killed(tmp_path, wanted, kills=0)


def test_progress_ends_the_count_of_kills(tmp_path):
  run = Product('train/run')
  found = []
  for step in (None, None, 10, 10, 20):
    if step:
      (tmp_path / f'train/checkpoints/{step}').mkdir(parents=True, exist_ok=True)
    with locks.lock(str(tmp_path), 'train/run') as note:
      found.append(note(products._making(str(tmp_path), run)))
      text = (tmp_path / 'train/run.lock').read_text()
    (tmp_path / 'train/run.lock').write_text(text)
  assert found == [0, 1, 0, 1, 0]
  assert json.loads(text)['making'] == 'train/run (after step 20)'


def test_without_ray_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(ConfigError, match=r'pip install .clip-jax-ood\[ray\]'):
    on_ray.run(print, (), workdir='', address='', cpus=1, watch=lambda calls, replaced: 0)


def test_processes_of_a_launcher_are_refused(monkeypatch):
  monkeypatch.setattr(hosts, '_count', 2)
  with pytest.raises(ConfigError, match='engine.name=ray is for one process'):
    pipeline.run(tiny.config(**{'engine.name': 'ray'}), None, stages=None, redo='', dry_run=False)


class _Ray(types.ModuleType):
  """A cluster in a script: at each look, the CPUs of its nodes and how the oldest call ends."""

  def __init__(self, looks, lock):
    super().__init__('ray')
    self.exceptions = types.ModuleType('ray.exceptions')
    for name in (
      'RayTaskError',
      'NodeDiedError',
      'WorkerCrashedError',
      'OutOfMemoryError',
      'RayError',
    ):
      setattr(self.exceptions, name, type(name, (Exception,), {'cause': InputError('a shard')}))
    self.looks, self.now, self.begun, self.ended = looks, 0, 0, False
    self.lock, self.told = lock, []

  def init(self, *args, **kwargs):
    self.address = args[0]

  def shutdown(self):
    self.ended = True

  def cluster_resources(self):
    return {'CPU': sum(self.looks[0][0])}

  def nodes(self):
    return [{'Alive': True, 'Resources': {'CPU': cpus}} for cpus in self.looks[self.now][0]]

  def remote(self, **options):
    assert options['max_retries'] == 0 and options['max_calls'] == 1
    self.options = options
    return lambda function: types.SimpleNamespace(remote=self._begin)

  def _begin(self, *arguments):
    self.begun += 1
    return self.begun

  def wait(self, calls, timeout, num_returns=1):
    if timeout == on_ray.END_SECS:
      self.told.append((calls, self.lock.exists()))
      return calls, []
    self.now += 1
    return ([min(calls)], []) if self.looks[self.now][1] else ([], calls)

  def get(self, call):
    end = self.looks[self.now][1]
    if isinstance(end, str):
      raise getattr(self.exceptions, end)(f'{end} of {call}')
    return end


def _drive(monkeypatch, folder, looks, done=lambda: 0):
  ray, said = _Ray(looks, folder / 'ray.lock'), []
  monkeypatch.setitem(sys.modules, 'ray', ray)
  monkeypatch.setitem(sys.modules, 'ray.exceptions', ray.exceptions)
  monkeypatch.setattr(time, 'sleep', lambda seconds: setattr(ray, 'now', ray.now + 1))
  monkeypatch.setattr(interrupts, '_received', [])

  def watch(calls, replaced):
    said.append((calls, replaced))
    return done()

  try:
    on_ray.run(print, (), workdir=str(folder), address='', cpus=2, watch=watch)
  finally:
    assert ray.ended and ray.address == 'local'
  return ray, said


def test_calls_follow_the_nodes_and_are_replaced_until_one_returns(monkeypatch, tmp_path):
  looks = [
    ([2, 5], None),  # rooms for 1 + 2
    ([2, 5], 'WorkerCrashedError'),
    ([2], 'NodeDiedError'),
    ([2], 'NodeDiedError'),  # one left
    ([], 'NodeDiedError'),  # none
    ([4], None),
    ([4], True),
    ([4], None),
  ]
  ray, said = _drive(monkeypatch, tmp_path, looks)
  assert said == [(3, 0), (3, 1), (2, 2), (1, 3), (0, 4), (2, 4)]
  assert ray.begun == 6 and ray.told == [([6], True)] and ray.options['num_cpus'] == 2


def test_an_error_of_a_call_stops_the_others(monkeypatch, tmp_path):
  with pytest.raises(InputError, match='^a shard$'):
    _drive(monkeypatch, tmp_path, [([4], None), ([4], 'RayTaskError'), ([4], None)])
  ray = sys.modules['ray']
  assert ray.told == [([2], False)]  # they see that the lock is free


def test_a_node_that_cannot_run_the_call_is_an_error(monkeypatch, tmp_path):
  with pytest.raises(InputError, match='cannot run .RayError of 1.*Every node needs this package'):
    _drive(monkeypatch, tmp_path, [([2], None), ([2], 'RayError'), ([2], None)])


def test_calls_that_are_killed_without_end_are_an_error(monkeypatch, tmp_path):
  looks = [([2], None), *[([2], 'WorkerCrashedError')] * 9, ([2], True), ([2], None)]
  with pytest.raises(InputError, match='5 workers in a row were killed'):
    _drive(monkeypatch, tmp_path, looks)
  _drive(
    monkeypatch, tmp_path, looks, done=iter(range(99)).__next__
  )  # while work gets done they may be many


def test_a_node_without_the_work_directory_is_an_error(tmp_path):
  with pytest.raises(InputError, match='is not the folder that the driver has'):
    on_ray._call(print, (), (str(tmp_path),), str(tmp_path))


def test_a_cluster_without_room_is_an_error(monkeypatch, tmp_path):
  with pytest.raises(ConfigError, match='No node of the Ray cluster has 2 CPUs'):
    _drive(monkeypatch, tmp_path, [([1, 1], None)])


# ------------------------------------------------------------------------------------------------
# with Ray


def make_numbers(folder):
  """Makes five products; the fourth kills its process. Workers import it from here."""

  def work(todo):
    for product in todo:
      if product.name == 'x/3':
        os.kill(os.getpid(), signal.SIGKILL)
      pathlib.Path(folder, product.name).write_text(product.name)
      yield product, [product.name], {}

  for i in range(5):
    while True:
      try:
        products.make(folder, [Product(f'x/{i}')], work, kills=3)
        break
      except locks.Busy:
        time.sleep(0.1)


POISON = """
import sys
from clip_jax.core import on_ray
import test_ray

def watch(calls, replaced):
  print('replaced:', replaced)
  return 0

folder = sys.argv[1]
on_ray.run(test_ray.make_numbers, (folder,), workdir=folder, address='', cpus=1, watch=watch)
"""


def _environment():
  return tiny.environment() | {
    'PYTHONPATH': os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / 'tests'), *sys.path])
  }


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_three_times_stops_the_run(tmp_path):
  pytest.importorskip('ray')
  ended = subprocess.run(
    [sys.executable, '-c', POISON, str(tmp_path)],
    env=_environment(),
    capture_output=True,
    text=True,
    timeout=CAP_SECS,
  )
  assert 'InputError: x/3 in ' in ended.stderr and '3 processes in a row' in ended.stderr
  assert 'replaced: 3\n' in ended.stdout and 'replaced: 4' not in ended.stdout
  assert products.count_finished(str(tmp_path), [f'x/{i}' for i in range(5)]) == 3


@pytest.mark.slow
def test_a_node_lost_a_node_added_and_a_worker_killed_give_the_bytes_of_one_command(
  tmp_path, monkeypatch
):
  pytest.importorskip('ray')
  from ray import cluster_utils

  one = subprocess.run(
    tiny.command(tmp_path / 'one', TO_PRUNE),
    env=tiny.environment(),
    cwd=tiny.ROOT,
    timeout=CAP_SECS,
  )
  assert one.returncode == 0
  names = set(products.sidecars(str(tmp_path / 'one')))
  for key, value in (
    _environment() | {'XLA_FLAGS': tiny.environment().get('XLA_FLAGS', '')}
  ).items():
    monkeypatch.setenv(key, value)  # of the nodes
  small = dict(object_store_memory=80 << 20)
  cluster = cluster_utils.Cluster(
    initialize_head=True, head_node_args=dict(small, num_cpus=0, include_dashboard=False)
  )
  ray = tmp_path / 'ray'
  command = tiny.command(
    ray, TO_PRUNE, **{'engine.name': 'ray', 'engine.address': cluster.address, 'engine.cpus': 1}
  )
  try:
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    with open(tmp_path / 'said', 'w') as said:
      driver = subprocess.Popen(
        command, env=os.environ, cwd=tiny.ROOT, stdout=said, stderr=subprocess.STDOUT
      )

    def wait_for(count):
      until = time.monotonic() + CAP_SECS
      while products.count_finished(str(ray), names) < count and driver.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)

    wait_for(2)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for(len(names) // 3)
    cluster.add_node(num_cpus=1, **small)
    wait_for(len(names) // 2)
    for log in sorted(ray.glob('log-*.txt'), key=os.path.getmtime, reverse=True):
      with contextlib.suppress(ProcessLookupError):  # of the lost node
        os.kill(int(log.stem.rpartition('-')[2]), signal.SIGKILL)
        break
    assert driver.wait(timeout=CAP_SECS) == 0, (tmp_path / 'said').read_text()
  finally:
    cluster.shutdown()
  text = (tmp_path / 'said').read_text()
  assert 'A node is lost' in text and 'A worker was killed' in text
  found = [products.sidecars(str(tmp_path / name)) for name in ('one', 'ray')]
  assert found[0] == found[1]
  assert not list(ray.rglob('*.lock'))
