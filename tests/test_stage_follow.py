"""stages/follow.py: each checkpoint of a run is evaluated once, whatever happens meanwhile."""

import json
import os
import shutil

import pytest
import squares
from squares import config

from clip_jax.core import products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment import step_accuracies
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import checkpoint, follow, models, pipeline

RESULT = {'n': 12, 'groups': 12, 'top1': 0.5, 'top1_low': None, 'top1_high': None}
RESULT |= {'mean_per_class': 0.5}


class World:
  """A run whose training and evaluation are replaced; `between` is what happens at each wait."""

  def __init__(self, folder, monkeypatch):
    squares.make(folder)
    self.x = Experiment(config(folder), str(folder / 'scratch'))
    self.run, self.scored, self.lines = folder / 'run', [], []
    self.during = lambda step: None  # happens while a step is read or evaluated
    monkeypatch.setattr(models, 'load', self.load)
    say = lambda text, *args: self.lines.append(text % args)
    monkeypatch.setattr(follow.logging, 'info', say)
    monkeypatch.setattr(follow.logging, 'warning', say)
    self.patch = monkeypatch

  def save(self, *steps, run='one'):
    self.run.mkdir(exist_ok=True)
    (self.run / 'config.json').write_text(json.dumps({'fingerprint': run}))
    for step in steps:
      for item in ('params', 'data', 'config'):
        (self.run / f'checkpoints/{step:08d}/{item}').mkdir(parents=True)

  def remove(self, step):
    shutil.rmtree(self.run / f'checkpoints/{step:08d}')

  def complete(self, step):
    path = self.run / f'run{products.SIDECAR}'
    path.write_text(json.dumps({'counts': {'steps': step}}))

  def load(self, folder, **how):
    self.during(int(os.path.basename(folder)))
    if not os.path.exists(os.path.join(folder, 'params')):
      raise InputError(f'Checkpoint {folder} is damaged or incomplete.')
    return 'model'

  def evaluate(self, folder, model, names, output):
    step = int(os.path.basename(folder))
    self.scored.append(step)
    for name in names if output else ():
      os.makedirs(output, exist_ok=True)
      with open(os.path.join(output, f'{name}.json'), 'w') as f:
        f.write('{}')
    return dict.fromkeys(names, {**RESULT, 'top1': step / 100})

  def follow(self, *between, output=''):
    """Follows; between[i]() is what training does during wait i. Returns the steps evaluated."""
    waits = iter(between)
    self.patch.setattr(follow.time, 'sleep', lambda _: next(waits)())
    self.scored, self.lines = [], []
    follow.follow(self.x, [follow.Run(str(self.run), output)], ['squares'], self.evaluate)
    assert next(waits, None) is None  # it did not end earlier
    return self.scored

  def table(self):
    return (self.run / step_accuracies.FILE).read_text()


@pytest.fixture
def world(tmp_path, monkeypatch):
  return World(tmp_path, monkeypatch)


def finish(world, step):
  world.save(step)
  world.complete(step)


def test_a_run_that_starts_later_is_followed_to_its_end(world):
  assert not world.run.exists()
  scored = world.follow(
    lambda: world.save(), lambda: world.save(4, 8), lambda: None, lambda: finish(world, 12)
  )
  assert scored == [4, 8, 12]
  assert 'This folder does not exist yet' in world.lines[0]
  assert world.lines[-1].startswith(f'Training of {world.run} is complete')
  assert 'step 12' in world.lines[-1] and '3 checkpoints' in world.lines[-1]
  lines = [json.loads(line) for line in world.table().splitlines()]
  assert [(line['step'], line['benchmark'], line['top1']) for line in lines] == [
    (4, 'squares', 0.04),
    (8, 'squares', 0.08),
    (12, 'squares', 0.12),
  ]


def test_a_restart_evaluates_nothing_twice(world):
  world.save(4, 8)
  world.complete(8)
  assert world.follow() == [4, 8]
  before = world.table()
  assert world.follow() == [] and world.table() == before
  assert any('Not evaluated again: steps 4 and 8;' in line for line in world.lines)


def test_a_line_that_a_kill_cut_off_is_written_again_and_stays_broken(world):
  world.save(4, 8)
  world.complete(8)
  world.follow()
  path = world.run / step_accuracies.FILE
  path.write_text(path.read_text()[:-9])
  assert world.follow() == [8]
  *whole, broken, last = path.read_text().splitlines()
  assert json.loads(last)['step'] == 8 and [json.loads(line)['step'] for line in whole] == [4]
  with pytest.raises(ValueError, match='JSON|delimiter|string'):
    json.loads(broken)


def test_another_run_or_another_definition_of_the_benchmark_is_evaluated_again(world):
  world.save(4)
  world.complete(4)
  world.follow()
  world.x.config.benchmarks.squares.templates = ('{}',)
  assert world.follow() == [4]
  (world.run / 'config.json').write_text(json.dumps({'fingerprint': 'two'}))
  assert world.follow() == [4]
  assert len(world.table().splitlines()) == 3


def test_a_checkpoint_that_rotation_removes_before_or_during_the_read(world):
  world.save(4, 8, 12)

  def during(step):
    if step == 4:  # meanwhile, training saves a step and removes two
      world.remove(8)
      shutil.rmtree(world.run / 'checkpoints/00000004/params')

  world.during = during
  assert world.follow(lambda: world.remove(4), lambda: finish(world, 16)) == [12, 16]
  warnings = [line for line in world.lines if line.startswith('Not evaluated: ')]
  assert len(warnings) == 2 and all('keep_checkpoints' in line for line in warnings)
  assert 'Training removed 2 more checkpoints unread.' in world.lines[-1]


def test_a_damaged_newest_checkpoint_is_an_error(world):
  world.save(4, 8)
  world.during = lambda step: step == 8 and shutil.rmtree(world.run / 'checkpoints/00000008/params')
  with pytest.raises(InputError, match='08 is damaged'):
    world.patch.setattr(
      follow.checkpoints, 'step_folders', lambda run: sorted((world.run / 'checkpoints').iterdir())
    )
    world.follow()
  assert world.scored == [4]


def test_a_run_that_redo_moves_away_is_evaluated_anew(world, tmp_path):
  world.save(4, 8)

  def again():
    os.rename(world.run, tmp_path / 'replaced')
    world.save(4)

  assert world.follow(again, lambda: finish(world, 8)) == [4, 8, 4, 8]
  assert len(world.table().splitlines()) == 2


def test_a_run_that_is_removed_during_the_evaluation(world, tmp_path):
  world.save(4)
  evaluate = world.evaluate

  def slow(*args):
    if not (tmp_path / 'replaced').exists():
      os.rename(world.run, tmp_path / 'replaced')
    return evaluate(*args)

  world.evaluate = slow
  assert world.follow(lambda: finish(world, 8)) == [4, 8]
  assert any('was removed during the evaluation of step 4' in line for line in world.lines)


def test_a_complete_run_without_its_last_checkpoint_is_an_error(world):
  world.save(4)
  world.complete(8)
  with pytest.raises(InputError, match='complete at step 8, but the checkpoint .* is missing'):
    world.follow()


def test_an_output_folder_must_hold_the_results_too(world, tmp_path):
  world.save(4, 8)
  world.complete(8)
  output = tmp_path / 'out'
  assert world.follow(output=str(output)) == [4, 8]
  assert not (world.run / step_accuracies.FILE).exists()
  (output / '00000004/squares.json').unlink()
  assert world.follow(output=str(output)) == [4]
  assert world.follow(output=str(output)) == []


def test_a_run_of_another_config_is_evaluated_anew_into_the_same_output(world, tmp_path):
  world.save(4)

  def again():
    os.rename(world.run, tmp_path / 'replaced')
    world.save(4, run='two')
    world.complete(4)

  output = str(tmp_path / 'out')
  assert world.follow(again, output=output) == [4, 4]


def test_all_runs_of_a_work_directory_are_followed(world, tmp_path):
  first, second = world.run, tmp_path / 'second'
  world.save(4)
  world.complete(4)

  def later():
    world.run = second
    finish(world, 8)

  waits = iter([later])
  world.patch.setattr(follow.time, 'sleep', lambda _: next(waits)())
  every = [follow.Run(str(folder), '') for folder in (first, second)]
  follow.follow(world.x, every, ['squares'], world.evaluate)
  assert world.scored == [4, 8]
  ends = [line for line in world.lines if line.startswith('Training of')]
  assert [str(first) in ends[0], str(second) in ends[1], len(ends)] == [True, True, 2]


def test_what_can_be_followed(tmp_path, monkeypatch):
  c = config(tmp_path)
  of = lambda path, output='': [(run.folder, run.output) for run in follow.runs(path, c, output)]
  assert of('r/train/base/seed0/') == of('r/train/base/seed0/checkpoints')
  assert of('r/train/base/seed0', 'out') == [('r/train/base/seed0', 'out')]
  assert of('r', 'out') == [
    (f'r/train/{split}/seed0', f'out/{split}/seed0') for split in ('base', 'pruned')
  ]
  c.train.only = ('base/seed0',)
  assert of('r') == [('r/train/base/seed0', '')]
  (tmp_path / 'mine/checkpoints/00000004/params').mkdir(parents=True)
  for item in ('data', 'config'):
    (tmp_path / f'mine/checkpoints/00000004/{item}').mkdir()
  assert of(str(tmp_path / 'mine')) == [(str(tmp_path / 'mine'), '')]  # a run by its content
  with pytest.raises(ConfigError, match='is one step.* its run: a/seed0.'):
    of('a/seed0/checkpoints/00000008')
  with pytest.raises(ConfigError, match='gets no new steps'):
    of('model.safetensors')
  monkeypatch.setattr(follow.os, 'access', lambda *_: False)
  with pytest.raises(ConfigError, match='--output=DIR'):
    of(str(tmp_path))
  assert of(str(tmp_path), 'out')
  c.model = type(c.model)()
  with pytest.raises(ConfigError, match='has no runs to look for'):
    of('r')


@pytest.mark.slow
def test_curves_are_in_the_report_and_change_no_other_product(tmp_path):
  squares.prepare(tmp_path)
  c, run = config(tmp_path / 'data', **{'train.save_every_steps': 1}), tmp_path / 'run'
  c.train.keep_checkpoints = 9
  every = lambda: pipeline.run(c, str(run), stages=None, redo='', dry_run=False)
  every()
  assert 'Accuracy during training' not in (run / 'report/index.html').read_text()
  before = products.sidecars(str(run))
  checkpoint.evaluate_checkpoint(c, str(run), model='', benchmarks=None, output='', follow=True)
  every()
  after = products.sidecars(str(run))
  changed = [name for name in before if before[name] != after[name]]
  assert changed == ['report/index'] and before.keys() == after.keys()
  page = (run / 'report/index.html').read_text()
  assert 'Accuracy during training' in page and (run / 'report/figures').is_dir()
  steps = len(os.listdir(run / 'train/base/seed0/checkpoints'))
  assert f'squares: 12 images; {2 * steps} checkpoints of 2 runs, {steps} of each.' in page
  assert (run / 'report/figures/training_squares.svg').exists()
  # The last checkpoint's accuracy is that of the stage evaluate.
  *_, last = (run / 'train/base/seed0/accuracy.jsonl').read_text().splitlines()
  final = json.loads((run / 'evaluate/base/seed0/squares.json').read_text())
  assert json.loads(last)['top1'] == final['top1']
  # Without new lines, the page is kept.
  every()
  assert products.sidecars(str(run)) == after
