"""Several processes train one model or share k-means: as one does, killed and stopped ones, too."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tiny

from clip_jax.core import checkpoints, files, hosts, metrics
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.stages import sharing

RUN = 'train/base/seed0'
ONLY = {'train.only': "('base/seed0',)", 'train.samples': 640}  # 20 steps
TWO = {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_JOB_ID': '5000', 'SLURM_PROCID': '1'}
OMPI = 'OMPI_COMM_WORLD_'


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('node7', 'node7'),
    ('node001,other2', 'node001'),
    ('gpu[003-004,007],x', 'gpu003'),
    ('a-b[12,14]', 'a-b12'),
  ],
)
def test_slurm_says_all(nodes, first):
  env = {**TWO, 'SLURM_STEP_NODELIST': nodes, 'SLURM_STEP_NUM_NODES': '2', 'SLURM_LOCALID': '0'}
  assert hosts.launched(env) == dict(
    coordinator_address=f'{first}:62344', num_processes=2, process_id=1, local_device_ids=None
  )


def test_several_processes_of_a_node_share_its_devices():
  env = {**TWO, 'SLURM_STEP_NODELIST': 'a', 'SLURM_STEP_NUM_NODES': '1', 'SLURM_LOCALID': '1'}
  assert hosts.launched(env)['local_device_ids'] == [1]
  assert hosts.launched({**env, 'CUDA_VISIBLE_DEVICES': '3'})['local_device_ids'] is None
  assert hosts.launched({**env, 'CUDA_VISIBLE_DEVICES': '2,3'})['local_device_ids'] == [1]


@pytest.mark.parametrize(
  'env', [{}, {'SLURM_NTASKS': '8', 'SLURM_JOB_ID': '1'}, {**TWO, 'SLURM_STEP_NUM_TASKS': '1'}]
)
def test_one_process_is_alone(env):  # a batch script of eight tasks is no task of a step
  assert hosts.launched(env) == {}


def test_open_mpi_says_who_and_perhaps_where():
  ranks = {'SIZE': '4', 'RANK': '2', 'LOCAL_RANK': '0', 'LOCAL_SIZE': '1'}
  env = {OMPI + name: value for name, value in ranks.items()}
  uri = '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'
  assert hosts.launched({**env, 'OMPI_MCA_orte_hnp_uri': uri}) == dict(
    coordinator_address='10.96.0.1:62624', num_processes=4, process_id=2, local_device_ids=None
  )
  assert hosts.launched(env)['coordinator_address'] is None


@pytest.mark.parametrize(
  'given',
  [
    ('', 2, 0),
    ('a:1', 0, 0),
    ('a:1', 2, -1),
    ('a:1', 2, 2),
    ('a:1', -2, 0),
    ('a', 2, 0),
    ('a:b', 2, 0),
    ('a:65536', 2, 0),
  ],
)
def test_flags_must_be_complete(given):
  with pytest.raises(ConfigError, match='--coordinator=HOST:PORT .* 0 <= I < N'):
    hosts.start(*given)


@pytest.mark.parametrize('wrong', [{'SLURM_PROCID': 'x'}, {}])
def test_variables_of_a_launcher_must_be_complete(monkeypatch, wrong):
  for name, value in {**TWO, 'SLURM_STEP_NODELIST': 'a', **wrong}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('SLURM_LOCALID', raising=False)
  with pytest.raises(ConfigError, match='SLURM .* variables is missing or is no number'):
    hosts.start()
  hosts.start(processes=1)
  assert hosts.count() == 1


def test_the_port_of_process_0_must_be_free():
  with socket.create_server(('', 0)) as used:
    with pytest.raises(InputError, match='Process 0 of 2 .* in use. Check .* free port'):
      hosts.start(f'127.0.0.1:{used.getsockname()[1]}', 2, 0)


def test_an_error_of_the_devices_may_be_that_of_another_process(monkeypatch):
  gloo = ValueError('UNKNOWN: Gloo AllGather failed: Connection closed by peer\nand more')
  assert hosts.lost(gloo) == ''
  monkeypatch.setattr(hosts, '_count', 2)
  monkeypatch.setattr(hosts, 'SAID_SECS', 0)
  assert 'closed by peer. If one of the processes is gone' in hosts.lost(gloo)
  assert hosts.lost(ValueError('a mistake: of ours')) == ''


def test_alone_nothing_is_asked():
  hosts.start()
  assert (hosts.index(), hosts.count(), hosts.agree(3, 0)) == (0, 1, (3, 0))
  assert hosts.gather(np.ones((2, 3))).shape == (1, 2, 3)


def test_all_processes_must_share_the_work_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(sharing, 'SEEN_SECS', 0)
  sharing._check_is_shared(str(tmp_path))
  with pytest.raises(InputError, match='does not see .*/absent, which process 0 has written'):
    sharing._check_is_shared(str(tmp_path / 'absent'))


# ------------------------------------------------------------------------------------------------
# processes on this machine

ALONE_OF_TWO = """
import sys
from clip_jax.core import command, hosts
hosts.CONNECT_SECS = 1
sys.exit(command.run_command(lambda: hosts.start('127.0.0.1:PORT', 2, int(sys.argv[1]))))
"""


@pytest.mark.parametrize('process', [0, 1])
def test_who_waits_in_vain_says_so(process):
  with socket.create_server(('', 0)) as free:
    port = free.getsockname()[1]
  done = subprocess.run(
    [sys.executable, '-c', ALONE_OF_TWO.replace('PORT', str(port)), str(process)],
    cwd=tiny.ROOT,
    env=tiny.environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert re.fullmatch(r'Error: .*: 1 seconds have passed. Check .*\n', done.stderr), done.stderr


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A work directory with all stages before training."""
  folder = tmp_path_factory.mktemp('hosts') / 'prepared'
  stages = '--stages=ingest,embedder,embed,dedup,search,prune'
  done = tiny.run(folder, stages, **ONLY)
  assert done.returncode == 0, done.stdout
  return folder


@pytest.fixture(scope='module')
def alone(prepared):
  """The same with the run of one process with four devices."""
  folder = prepared.parent / 'alone'
  subprocess.run(['cp', '-r', prepared, folder], check=True)
  assert _finished(_start(folder, 1, devices=4)) == [0]
  return folder


def _start(folder, count, devices=1, flags=(), of_last=(), script=None, **override):
  """Starts the processes of a command; `of_last`: further flags of the last one, `script`: its
  program.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  env = {k: v for k, v in tiny.environment().items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices} ' + env.get('XLA_FLAGS', '')
  started = []
  for i in range(count):
    more = [*flags, *(of_last if i == count - 1 else ())]
    if count > 1:
      more += [f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={i}']
    command = tiny.command(folder, *more, **{**ONLY, **override})
    if script and i == count - 1:
      command[1:3] = '-c', script
    with open(f'{folder}.{i}.out', 'w') as out:
      started.append(
        subprocess.Popen(
          command,
          cwd=tiny.ROOT,
          env=env,
          stdout=out,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      )
  return started


def _finished(processes):
  try:
    return [process.wait(600) for process in processes]
  finally:
    for process in processes:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _said(folder, i):
  with open(f'{folder}.{i}.out') as f:
    return f.read()


def _copy(prepared, tmp_path):
  os.makedirs(tmp_path, exist_ok=True)
  subprocess.run(['cp', '-r', prepared, tmp_path / 'work'], check=True)
  return tmp_path / 'work'


def _wait_for_step(folder, step, processes):
  """Waits until a step is logged while all processes run."""
  while not any(line['step'] >= step for line in metrics.read(folder / RUN / 'metrics.jsonl')):
    assert all(process.poll() is None for process in processes), _said(folder, 0)
    time.sleep(0.05)


def _agree(folder, alone):
  """Checks that a run is, to float tolerance, the run of one process, each step once."""
  ours, theirs = (metrics.read(path / RUN / 'metrics.jsonl') for path in (folder, alone))
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for name in ('train/loss', 'train/logit_scale', 'train/learning_rate', 'train/samples'):
    np.testing.assert_allclose(
      [line[name] for line in ours], [line[name] for line in theirs], rtol=2e-5, err_msg=name
    )
  params = [checkpoints.restore_params(path / RUN)[0] for path in (folder, alone)]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params[0]):
    name = jax.tree_util.keystr(path)
    if 'in_proj_bias' in name:  # the gradient of the keys' part is rounding noise
      continue
    other = params[1]
    for key in path:
      other = other[key.key]
    np.testing.assert_allclose(leaf, other, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  'count, devices, override',
  [
    (2, 2, {}),
    (4, 1, {'mesh.fsdp': 2}),
    (2, 2, {'mesh.tensor': 2, 'train.pack_captions': 'always'}),
    (2, 1, {'mesh.fsdp': 2, 'train.microbatches': 2, 'train.loss_chunk': 5}),
  ],
)
def test_several_processes_agree_with_one(prepared, alone, tmp_path, count, devices, override):
  folder = _copy(prepared, tmp_path)
  processes = _start(folder, count, devices, **override)
  assert _finished(processes) == [0] * count, [_said(folder, i) for i in range(count)]
  _agree(folder, alone)
  scores = [files.read_json(path / 'evaluate/base/seed0/val.json') for path in (folder, alone)]
  assert scores[0]['n'] == scores[1]['n'] and abs(scores[0]['top1'] - scores[1]['top1']) <= 0.02
  assert 'Error' not in _said(folder, 0) and '1 of 9' not in _said(folder, 1)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_another_number_goes_on(prepared, alone, tmp_path):
  folder = _copy(prepared, tmp_path)
  slow = {'train.save_every_steps': 2}
  processes = _start(folder, 2, 2, **slow)
  _wait_for_step(folder, 5, processes)
  os.killpg(processes[1].pid, signal.SIGKILL)
  first, second = _finished(processes)
  # While a checkpoint is saved, JAX aborts after a minute without a heartbeat.
  assert second == -signal.SIGKILL and first in (1, -signal.SIGABRT), _said(folder, 0)
  if first == 1:
    assert re.search('Error: .* is gone, start all of them again', _said(folder, 0))
    assert 'Traceback' not in _said(folder, 0)
  assert _finished(_start(folder, 3, **slow)) == [2] * 3
  assert 'batch_size=32 must be a multiple' in _said(folder, 0)
  assert _finished(_start(folder, 1, **slow)) == [0]
  assert 'resumes from the checkpoint of step' in _said(folder, 0)
  _agree(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize('receiver', [0, 1])
def test_a_signal_to_one_stops_all_with_a_checkpoint(prepared, alone, tmp_path, receiver):
  folder = _copy(prepared, tmp_path)
  never = {'train.save_every_steps': 1000}
  processes = _start(folder, 2, 1, **never)
  _wait_for_step(folder, 2, processes)
  processes[receiver].send_signal(signal.SIGTERM)
  assert _finished(processes) == [143, 143], _said(folder, 0)
  (step,) = (int(found.name) for found in checkpoints.step_folders(folder / RUN))
  assert step >= 2
  assert _finished(_start(folder, 4, 1, **never)) == [0] * 4, _said(folder, 0)
  assert f'from the checkpoint of step {step}' in _said(folder, 0)
  _agree(folder, alone)


@pytest.mark.slow
def test_stopped_processes_go_on_to_the_same_bits(prepared, tmp_path):
  digests = []
  for folder in (_copy(prepared, tmp_path / 'a'), _copy(prepared, tmp_path / 'b')):
    processes = _start(folder, 2, flags=['--stages=train'], **{'train.save_every_steps': 1000})
    if digests:
      _wait_for_step(folder, 3, processes)
      processes[1].send_signal(signal.SIGTERM)
      assert _finished(processes) == [143, 143], _said(folder, 0)
      processes = _start(folder, 2, flags=['--stages=train'])
    assert _finished(processes) == [0, 0], _said(folder, 0)
    digests.append(files.read_json(folder / RUN / 'run.sidecar.json')['counts']['digest'])
  assert 'resumes from the checkpoint of step' in _said(folder, 0)
  assert digests[0] == digests[1]


@pytest.mark.slow
def test_what_trains_nothing_ends_in_all(prepared, monkeypatch):
  monkeypatch.setenv('http_proxy', 'http://proxy.invalid:1')  # as clusters have
  for _ in range(3):  # Python aborted now and then
    assert _finished(_start(prepared, 2, flags=['--graph'])) == [0, 0], _said(prepared, 1)


@pytest.mark.slow
def test_an_error_in_one_ends_all(prepared, tmp_path):
  folder = _copy(prepared, tmp_path)
  processes = _start(folder, 2, of_last=['--config.train.learning_rate=1.0'])
  assert _finished(processes) == [2, 2]
  said = _said(folder, 0)
  assert re.search(r'Error: process 1: .* are not those of process 0', said), said
  assert 'Traceback' not in said + _said(folder, 1)
  assert not os.path.exists(folder / RUN / 'metrics.jsonl')


@pytest.mark.slow
def test_an_embedder_is_trained_together(prepared, tmp_path):
  folder = tmp_path / 'work'
  trained = {'embedder.source': 'train', 'embedder.samples': 64, 'train.pack_captions': 'never'}
  stages = ['--stages=ingest,embedder']
  assert _finished(_start(folder, 2, flags=stages, **trained)) == [0, 0], _said(folder, 0)
  assert files.read_json(folder / 'embedder/embedder.json')['source'] == 'train'


@pytest.mark.slow
def test_arrays_of_all_processes_arrive_bit_for_bit():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    where = f'127.0.0.1:{s.getsockname()[1]}'
  script = textwrap.dedent("""
    import sys
    import numpy as np
    from clip_jax.core import hosts
    i = int(sys.argv[2])
    hosts.start(sys.argv[1], 2, i)
    floats, ints = np.array([[1 / 3, i]]), np.array([2**53 + 1 + i])
    for array in (floats, ints, np.array([i > 0, True, False])):
      print(hosts.gather(array).tolist())
    hosts.end()""")
  started = [
    subprocess.Popen(
      [sys.executable, '-c', script, where, str(i)],
      cwd=tiny.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in started:
    said = process.communicate(timeout=300)[0].splitlines()
    assert said[-3:] == [
      str([[[1 / 3, 0.0]], [[1 / 3, 1.0]]]),
      str([[2**53 + 1], [2**53 + 2]]),
      str([[False, True, False], [True, True, False]]),
    ]


# De-duplication

CLUSTERS = {'dedup.clusters': 12, 'dedup.threshold': 0.02}
KILLED = """
import os, runpy, signal
from clip_jax.similarity import kmeans
means, calls = kmeans._means, []
def killed(*given):
  calls.append(given)
  if len(calls) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  return means(*given)
kmeans._means = killed
runpy.run_module('clip_jax.main', run_name='__main__')
"""
OTHER_ROWS = """
import runpy
import numpy as np
from clip_jax.experiment import workdir
workdir.in_anchor = lambda x: np.arange(len(workdir.source(x, 'pool'))) < 9
runpy.run_module('clip_jax.main', run_name='__main__')
"""


def _embedded(prepared, folder):
  """Copies the stages before de-duplication."""
  for name in ('ingest', 'embedder', 'embeddings'):
    shutil.copytree(prepared / name, folder / name)
  return folder


def _deduplicate(folder, count, **more):
  return _finished(_start(folder, count, flags=['--stages=dedup'], **CLUSTERS, **more))


def _marks(folder):
  found = {name: value for name, value in tiny.content(folder).items() if name.startswith('dedup/')}
  assert {'dedup/centers.npy', 'dedup/duplicate_of.npy', 'dedup/keep.npy'} < found.keys()
  assert not os.path.exists(folder / 'dedup/kmeans-state.npz')
  return found


@pytest.fixture(scope='module')
def marks(prepared):
  """The de-duplication of one process."""
  folder = _embedded(prepared, prepared.parent / 'marks')
  assert _deduplicate(folder, 1) == [0], _said(folder, 0)
  assert files.read_json(folder / 'dedup/keep.sidecar.json')['counts']['iterations'] >= 4
  return _marks(folder)


@pytest.mark.slow
@pytest.mark.parametrize('count, devices', [(2, 2), (3, 1)])
def test_several_processes_deduplicate_to_the_same_bits(prepared, marks, tmp_path, count, devices):
  folder = _embedded(prepared, tmp_path / 'work')
  assert _deduplicate(folder, count, devices=devices) == [0] * count, _said(folder, 0)
  assert _marks(folder) == marks
  assert 'near-duplicates' in _said(folder, 0) and 'near-duplicates' not in _said(folder, 1)


@pytest.mark.slow
def test_several_processes_assign_all_rows_to_the_clusters_of_a_sample(prepared, tmp_path):
  found = []
  for count in (1, 2):
    folder = _embedded(prepared, tmp_path / f'of{count}')
    assert _deduplicate(folder, count, **{'dedup.sample_rows': 100}) == [0] * count
    found.append(_marks(folder))
  assert 'a sample of 100 of' in _said(folder, 0)
  assert found[0] == found[1]


@pytest.mark.slow
def test_a_killed_kmeans_goes_on_with_another_number_to_the_same_bits(prepared, marks, tmp_path):
  folder = _embedded(prepared, tmp_path / 'work')
  assert _deduplicate(folder, 2, script=KILLED) == [1, -signal.SIGKILL], _said(folder, 0)
  assert re.search('Error: .* is gone, start all of them again', _said(folder, 0))
  assert 'Traceback' not in _said(folder, 0)
  assert _deduplicate(folder, 3) == [0, 0, 0], _said(folder, 0)
  assert 'k-means continues after iteration' in _said(folder, 0)
  assert _marks(folder) == marks


@pytest.mark.slow
def test_a_bad_vector_is_named_and_ends_all(prepared, tmp_path):
  folder = _embedded(prepared, tmp_path / 'work')
  shard = max((folder / 'embeddings/pool').glob('0*.npy'))
  vectors = np.load(shard)
  vectors[-1] = np.nan
  np.save(shard, vectors)
  assert _deduplicate(folder, 2) == [1, 1]
  said = _said(folder, 0)
  assert re.search(f'Error: .*pool/{shard.name}: row {len(vectors) - 1} is marked usable', said)
  assert 'Traceback' not in said + _said(folder, 1) and 'stopped working together' not in said


@pytest.mark.slow
def test_processes_with_other_rows_or_keys_are_refused(prepared, tmp_path):
  folder = _embedded(prepared, tmp_path / 'work')
  assert _deduplicate(folder, 2, of_last=['--config.dedup.seed=1']) == [2, 2]
  assert re.search('Error: process 1: its .* dedup .* are not those of', _said(folder, 0))
  assert _deduplicate(folder, 2, script=OTHER_ROWS) == [1, 1]
  assert 'the processes see different usable rows of the pool' in _said(folder, 0)
  assert not os.path.exists(folder / 'dedup/kmeans-state.npz')
