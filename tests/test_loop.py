"""The loop: what it writes, and that a stopped, killed or damaged run goes on bit for bit."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from test_checkpoints import damage
import test_step

from clip_jax.core import checkpoints
from clip_jax.core import metrics as metrics_lib
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.models import clip
from clip_jax.training import loop

BATCH = 16
RECIPE = dataclasses.replace(test_step.RECIPE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
AVERAGING = dataclasses.replace(RECIPE, ema_decay=0.9)


def batches(start):
  assert start % BATCH == 0
  n = start // BATCH
  while True:
    yield dict(test_step.batch(n, BATCH), index=np.arange(BATCH))
    n += 1


def train(folder, **changes):
  functions = clip.functions(test_step.CONFIG)
  arguments = dict(
    init_params=functions.init,
    encode=functions.encode,
    recipe=RECIPE,
    batches=batches,
    total_steps=12,
    batch_size=BATCH,
    learning_rate=1e-2,
    warmup_steps=3,
    seed=0,
    checkpoint_dir=os.path.join(folder, 'checkpoints'),
    config={'width': 8},
    save_every_steps=4,
    save_every_secs=0,
    keep=3,
    log_every_steps=2,
    metrics=metrics_lib.MetricsWriter(os.path.join(folder, 'metrics.jsonl')),
  )
  return loop.train(**(arguments | changes))


def stop_after(updates):
  asked = iter(range(1, updates + 1))  # once after each update
  return lambda: next(asked) == updates


def lines(folder):
  """The metrics without what tells of the clock."""
  return [
    {name: value for name, value in line.items() if name not in metrics_lib.TIME_FIELDS}
    for line in metrics_lib.read(os.path.join(folder, 'metrics.jsonl'))
  ]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('whole'))
  return train(folder), folder


def test_a_run_says_and_keeps_what_it_should(whole):
  result, folder = whole
  assert result.step == 12 and result.finished and result.resumed_from is None
  params, step, config = checkpoints.restore_params(folder)
  assert step == 12 and config == {'width': 8}
  assert checkpoints.digest(params) == result.digest
  assert [int(f.name) for f in checkpoints.step_folders(folder)] == [4, 8, 12]
  written = metrics_lib.read(os.path.join(folder, 'metrics.jsonl'))
  assert [line['step'] for line in written] == [2, 4, 6, 8, 10, 12]
  assert set(written[0]) == {
    'step',
    'train/loss',
    'train/logit_scale',
    'train/learning_rate',
    'train/samples',
    'train/seconds',
    'train/images_per_sec',
    'train/waiting',
  }
  assert written[-1]['train/samples'] == 12 * BATCH
  assert written[-1]['train/loss'] < written[0]['train/loss']
  np.testing.assert_allclose(written[0]['train/learning_rate'], 1e-2 * 2 / 3, rtol=1e-6)


@pytest.mark.parametrize('stopped_at', [1, 4, 7])
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, stopped_at):
  first = train(tmp_path, should_stop=stop_after(stopped_at))
  assert (first.step, first.finished) == (stopped_at, False)
  assert checkpoints.restore_params(tmp_path)[1] == stopped_at
  second = train(tmp_path)
  assert (second.resumed_from, second.digest) == (stopped_at, whole[0].digest)
  assert lines(tmp_path) == lines(whole[1])


def test_metrics_after_the_checkpoint_are_cut(whole, tmp_path, caplog):
  train(tmp_path, should_stop=stop_after(10))
  damage(tmp_path / 'checkpoints' / '00000010' / 'params')
  caplog.set_level('INFO')
  again = train(tmp_path)
  assert (again.resumed_from, again.digest) == (8, whole[0].digest)
  assert 'from the checkpoint of step 8' in caplog.text
  assert lines(tmp_path) == lines(whole[1])


def test_a_finished_run_is_left_alone(whole):
  again = train(whole[1], batches=None)
  assert again == loop.TrainResult(12, whole[0].digest, True, 12)


def test_averages_are_saved_and_resumed(whole, tmp_path):
  train(tmp_path / 'a', recipe=AVERAGING)
  train(tmp_path / 'b', recipe=AVERAGING, should_stop=stop_after(5))
  train(tmp_path / 'b', recipe=AVERAGING)
  found = [checkpoints.restore_params(tmp_path / name, 'ema')[0] for name in 'ab']
  assert checkpoints.digest(found[0]) == checkpoints.digest(found[1]) != whole[0].digest
  with pytest.raises(InputError, match='has no ema'):
    checkpoints.restore_params(whole[1], 'ema')


def test_the_best_checkpoint_is_kept_beside_the_last_ones(whole, tmp_path):
  seen, values = [], iter([0.25, 0.5, 0.125, 0.375])

  def score(params):
    seen.append(params['logit_scale'])
    return next(values)

  train(tmp_path, save_every_steps=3, keep=1, score=score)
  assert [int(f.name) for f in checkpoints.step_folders(tmp_path)] == [6, 12]
  assert len(seen) == 4 and all(isinstance(scale, np.ndarray) for scale in seen)
  assert checkpoints.restore_params(tmp_path)[1] == 12  # the last one, as without a score
  assert checkpoints.digest(checkpoints.restore_params(tmp_path)[0]) == whole[0].digest


def test_speed_is_written_and_some_updates_are_recorded(tmp_path, caplog):
  caplog.set_level('INFO')
  train(
    tmp_path,
    total_steps=4,
    flops=lambda text: 1e6 * text.size,
    peak_flops=1e15,
    profile=(1, 3),
    profile_dir=str(tmp_path / 'profile'),
  )
  last = metrics_lib.read(tmp_path / 'metrics.jsonl')[-1]
  np.testing.assert_allclose(last['train/mfu'], last['train/flops_per_sec'] / 1e15)
  per_image = last['train/flops_per_sec'] / last['train/images_per_sec']
  np.testing.assert_allclose(per_image, 1e6 * batches(0).__next__()['text'].size / BATCH)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert f'profile of the updates is in {tmp_path}' in caplog.text


def test_a_resumed_run_is_recorded_from_its_first_update(tmp_path, caplog):
  caplog.set_level('INFO')
  recorder = loop._Recorder((3, 9), str(tmp_path))
  for n in (7, 8, 9):
    with recorder.update(n):
      pass
  recorder.close()
  assert list(tmp_path.rglob('*.xplane.pb')) and caplog.text.count('profile') == 1
  late = loop._Recorder((3, 7), str(tmp_path / 'late'))
  for n in (7, 8):
    with late.update(n):
      pass
  late.close()
  assert not (tmp_path / 'late').exists() and caplog.text.count('made no update of 3:7') == 1


def test_memory_is_said_first_and_nothing_compiles_after_the_first_step(tmp_path, caplog):
  caplog.set_level('INFO')
  seen = []

  def count():
    seen.append(sum('Compiling' in text for text in caplog.messages))
    return 0

  with jax.log_compiles():
    train(
      tmp_path,
      total_steps=5,
      save_every_steps=0,
      recipe=dataclasses.replace(RECIPE, eps=1.5e-6),
      should_stop=count,
    )
  assert seen[0] > 0 and seen[1:] == seen[:1] * 4
  said = [text for text in caplog.messages if 'a step needs' in text]
  assert len(said) == 1 and re.search(r'needs \d+\.\d [kM]B on each device \(estimate\)', said[0])


def test_too_little_memory_is_said_with_advice(monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: {'bytes_limit': 1000})
  monkeypatch.setattr(loop.jax, 'local_devices', lambda: [device])
  with pytest.raises(InputError, match=r'2\.0 kB on each device, which has 1\.0 kB.*microbatches'):
    loop._check_memory(2000, 'train')


def test_the_clock_saves_too(tmp_path):
  train(tmp_path, save_every_steps=0, save_every_secs=1e-9, total_steps=4, keep=20)
  assert len(checkpoints.step_folders(tmp_path)) == 4


@pytest.mark.parametrize(
  'save_every_steps, said',
  [
    (1, 'a parameter is not finite'),
    (20, r'the loss is nan.* of the split, .*: 0, 1, 2, .* 7, \.'),
  ],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, save_every_steps, said):
  rate = dict(learning_rate=float('nan'), warmup_steps=0)
  with pytest.raises(InputError, match=f'diverged at step .*{said}'):
    train(tmp_path, **rate, save_every_steps=save_every_steps)
  assert not checkpoints.step_folders(tmp_path)


def test_a_batch_must_divide_by_the_devices(tmp_path):
  with pytest.raises(ConfigError, match='batch_size=12 .* nearest is 16'):
    train(tmp_path, batch_size=12)


RUN = """
import sys
sys.path[:0] = sys.argv[2:]
import conftest, test_loop
print(test_loop.train(sys.argv[1], save_every_steps=3, total_steps=90).digest)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
  here = os.path.dirname(__file__)

  def command(folder):
    return [sys.executable, '-c', RUN, str(folder), here, os.path.dirname(here)]

  whole = command(tmp_path / 'whole')
  want = subprocess.run(whole, capture_output=True, text=True, check=True).stdout
  killed = tmp_path / 'killed'
  for kill in range(2):
    process = subprocess.Popen(
      command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    before = max((int(f.name) for f in checkpoints.step_folders(killed)), default=0)
    while process.poll() is None and not any(
      int(f.name) > before + 10 for f in checkpoints.step_folders(killed)
    ):
      time.sleep(0.01)
    time.sleep(0.05 * kill)
    process.send_signal(signal.SIGKILL)
    process.wait()
  got = subprocess.run(command(killed), capture_output=True, text=True, check=True).stdout
  assert got == want
  assert lines(killed) == lines(tmp_path / 'whole')
