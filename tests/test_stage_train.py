"""How a run is loaded: what changes the data it sees is in its fingerprint, all else is not."""

import pathlib
import shutil
import types

import numpy as np
import pytest
from squares import config, run_stages

from clip_jax import defaults
from clip_jax.core import checkpoints, files, metrics
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.stages import check, fit, pipeline, train
from clip_jax.training import loop


@pytest.fixture
def data(prepared_squares):
  return prepared_squares / 'data'


def test_only_what_changes_the_data_is_a_key_of_a_run(data):
  plain = Graph(config(data)).run('base', 0)
  assert {
    'train.order',
    'train.jpeg_shrink',
  } <= plain.keys.keys() and 'train.shuffle_window' not in plain.keys
  for same in (
    'train.loader_processes',
    'train.loader_threads',
    'train.shuffle_window',
    'train.log_every_steps',
    'train.save_every_steps',
    'train.cache_mb',
    'train.runs_at_once',
    'train.epochs',
    'evaluate.batch_size',
  ):
    assert Graph(config(data, **{same: 9})).run('base', 0).fingerprint == plain.fingerprint
  for other, keys in (
    ({'train.jpeg_shrink': 2.0}, set()),
    ({'train.order': 'blocks'}, {'train.shuffle_window'}),
  ):
    run = Graph(config(data, **other)).run('base', 0)
    assert run.keys.keys() - plain.keys.keys() == keys and run.fingerprint != plain.fingerprint
    trained = {'embedder.source': 'train', 'embedder.samples': 64}
    a, b = (Graph(config(data, **trained, **more)).embedder() for more in ({}, other))
    assert b.keys.keys() - a.keys.keys() == keys and a.fingerprint != b.fingerprint


@pytest.mark.slow
def test_averages_are_evaluated_and_the_best_checkpoint_is_kept(prepared_squares, tmp_path):
  shutil.copytree(prepared_squares / 'run', tmp_path / 'run')
  keys = {
    'train.ema_decay': 0.5,
    'train.keep_best': 'squares',
    'train.save_every_steps': 1,
    'train.keep_checkpoints': 1,
    'train.samples': 5 * config(prepared_squares / 'data').train.batch_size,
  }
  found = {}
  for ema in (False, True):
    c = config(prepared_squares / 'data', **keys, **{'evaluate.ema': ema})
    pipeline.run(c, str(tmp_path / 'run'), stages=['train', 'evaluate'], redo='', dry_run=False)
    sidecar = files.read_json(tmp_path / 'run/evaluate/base/seed0/squares.sidecar.json')
    found[ema] = sidecar['keys'].get('evaluate.ema', False)
  assert found == {False: False, True: True}
  steps = checkpoints.step_folders(tmp_path / 'run/train/base/seed0')
  assert 1 <= len(steps) <= 2 and steps[-1].name == '00000005'
  run, averages = (
    checkpoints.restore_params(steps[-1], item)[0]['visual']['proj'] for item in ('params', 'ema')
  )
  assert not np.array_equal(run, averages)


@pytest.mark.parametrize(
  'keys, message',
  [
    ({'train.keep_best': 'square'}, "keep_best='square' must be a benchmark.*'squares'"),
    ({'evaluate.ema': True}, 'set config.train.ema_decay'),
  ],
)
def test_scores_and_averages_need_their_keys(data, keys, message):
  with pytest.raises(ConfigError, match=message):
    check.check(config(data, **keys))


class _Taken(Exception):
  """Carries the batches that a run was given."""


def _batches(c, workdir, monkeypatch):
  def take(*, batches, batch_size, **_):
    stream = batches(2 * batch_size)
    found = [next(stream) for _ in range(5)]
    stream.close()
    raise _Taken(found)

  monkeypatch.setattr(loop, 'train', take)
  with pytest.raises(_Taken) as taken:
    run_stages(c, workdir, 'train')
  return taken.value.args[0]


def _same(a, b):
  return all(
    (ours[name] == other[name]).all()
    for ours, other in zip(a, b, strict=True)
    for name in ('image', 'index')
  )


def test_a_run_sees_the_same_with_processes_and_other_data_in_blocks(
  data, prepared_squares, tmp_path, monkeypatch
):
  found = {}
  for name, options in {
    'plain': {},
    'processes': {'train.loader_processes': 2},
    'blocks': {'train.order': 'blocks', 'train.shuffle_window': 16},
    'shrink': {'train.jpeg_shrink': 1.0},
  }.items():
    shutil.copytree(prepared_squares / 'run', tmp_path / name)
    c = config(data, **{'train.only': ('base/seed0',)}, **options)
    found[name] = _batches(c, tmp_path / name, monkeypatch)
  assert _same(found['plain'], found['processes']) and _same(found['plain'], found['shrink'])
  assert not _same(found['plain'], found['blocks'])


def test_slow_reads_at_random_are_said(monkeypatch, caplog):
  from types import SimpleNamespace as Name

  monkeypatch.setattr(train.blocks, 'base_datasets', lambda config: ['pool'])

  def said(size, order='global', format='parquet', path='/x'):
    caplog.clear()
    shard = Name(block=Name(format=format), files=(Name(size=size, path=path),))
    x = Name(config=Name(train=Name(order=order)), graph=Name(shards=lambda name: [shard, shard]))
    with caplog.at_level('INFO', 'absl'):
      train._advise(x)
    return 'order=blocks' in caplog.text

  assert said(1e9) and said(1e9, format='webdataset', path='gs://x')
  assert not said(1e8) and not said(1e9, order='blocks') and not said(1e9, format='webdataset')


def test_a_split_may_have_a_budget_of_its_own(data, prepared_squares, tmp_path, monkeypatch):
  """The same rows under a second name: equal passes beside equal samples, and other steps."""
  recipe = {'train.epochs': 2, 'train.batch_size': 8}
  c = config(data, **recipe)
  c.splits.base_passes = defaults.split(budget='epochs')
  c.splits.pruned_passes = defaults.split(
    rule='gap_aligned', benchmarks=('squares',), budget='epochs'
  )
  check.check(c, ('train',))
  asked = {}

  def take(*, total_steps, checkpoint_dir, **_):
    asked[pathlib.Path(checkpoint_dir).parts[-3]] = total_steps
    raise _Taken

  monkeypatch.setattr(loop, 'train', take)
  workdir = tmp_path / 'run'
  shutil.copytree(prepared_squares / 'run', workdir)
  x = run_stages(c, workdir, 'prune')
  for product in x.graph.stage_products('train'):
    with pytest.raises(_Taken):
      list(train.train(x, [product]))
  rows = {name: len(np.load(workdir / f'splits/{name}/rows.npy')) for name in c.splits}
  assert rows['pruned'] == rows['pruned_passes'] < rows['base'] == rows['base_passes']
  assert asked == {
    'base': 64 // 8,
    'pruned': 64 // 8,
    'base_passes': 2 * rows['base'] // 8,
    'pruned_passes': 2 * rows['pruned'] // 8,
  }
  plain, passes = (Graph(c).run(name, 0).keys for name in ('base', 'base_passes'))
  assert plain == Graph(config(data, **recipe)).run('base', 0).keys
  assert passes['train.budget'] == 'epochs' and passes['train.epochs'] == 2
  assert 'train.samples' not in passes
  c.splits.matched = defaults.split(rule='matched', to='pruned_passes')
  with pytest.raises(ConfigError, match="matched has the budget 'samples', but pruned_passes"):
    check.check(c, ('train',))


def test_on_several_devices_runs_train_one_after_the_other(data, caplog, monkeypatch):
  caplog.set_level('INFO', 'absl')
  x = Experiment(config(data, **{'train.runs_at_once': 2}), '')
  assert pipeline._runs_at_once(x) == 1 and 'each uses all 8 devices' in caplog.text
  monkeypatch.setattr(pipeline.blocks, 'mesh', lambda _: types.SimpleNamespace(size=1))
  assert pipeline._runs_at_once(x) == 2
  profiled = config(data, **{'train.runs_at_once': 2, 'train.profile': (3, 5)})
  assert pipeline._runs_at_once(Experiment(profiled, '')) == 1  # JAX records one at a time


@pytest.mark.slow
def test_a_run_in_microbatches_ends_as_one_in_whole_batches(data, prepared_squares, tmp_path):
  """Packed captions included, and a loss in chunks that do not divide the batch."""
  losses = []
  for name, more in (
    ('whole', {}),
    ('parts', {'train.microbatches': 2, 'train.loss_chunk': 5}),
  ):
    workdir = tmp_path / name
    shutil.copytree(prepared_squares / 'run', workdir)
    recipe = {'train.only': ('base/seed0',), 'train.batch_size': 16, 'train.samples': 96}
    c = config(data, **recipe, **{'train.pack_captions': 'always', **more})
    run_stages(c, workdir, 'train')
    path = workdir / 'train/base/seed0/metrics.jsonl'
    losses.append([line['train/loss'] for line in metrics.read(path)])
  assert len(losses[0]) > 2
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_batch_norms_refuse_microbatches(data):
  c = config(data, **{'train.microbatches': 2})
  c.model.update_from_flattened_dict({key: 0 for key, value in c.model.items() if value})
  c.model.name = 'RN50'
  with pytest.raises(ConfigError, match='microbatches=2: the batch norms of RN50'):
    check.check(c)


@pytest.mark.parametrize(
  'error, message',
  [
    (OSError(28, 'No space left on device'), 'No space left for the checkpoints in runs/a'),
    (ValueError('RESOURCE_EXHAUSTED: a: No space left on device'), 'No space left for the check'),
    (RuntimeError('RESOURCE_EXHAUSTED: 3 GiB\nmore'), r'little memory \(RES.* 3 GiB\)\. Use train'),
  ],
)
def test_a_lack_of_space_is_not_one_of_memory(error, message):
  with pytest.raises(InputError, match=message), fit._enough_memory('runs/a'):
    raise error
