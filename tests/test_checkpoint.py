"""stages/checkpoint.py: a run that is followed while it trains."""

import json
import os
import shutil

import pytest
import squares
from squares import config
from test_convert import CLIP, write_open_clip

from clip_jax.core import checkpoints
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.stages import checkpoint, convert, models


class Enough(Exception):
  pass


def follow(data, path, monkeypatch, between) -> None:
  """Follows until it would wait for the second time; between() is what training does meanwhile."""
  waits = iter((between, None))

  def sleep(_):
    work = next(waits)
    if work is None:
      raise Enough
    work()

  monkeypatch.setattr(checkpoint.time, 'sleep', sleep)
  with pytest.raises(Enough):
    checkpoint.evaluate_checkpoint(
      config(data), str(path), model='', benchmarks=None, output='', follow=True
    )


def steps(folder, *names) -> None:
  """A run's checkpoints folder with some whole steps."""
  if not (folder / '00000000').exists():
    path = write_open_clip(folder.parent / 'weights', CLIP)
    convert.convert_checkpoint(path, str(folder), 'orbax', model='')
  for name in names:
    shutil.copytree(folder / '00000000', folder / name)


def test_groups_of_a_pattern_count_in_the_interval(tmp_path, monkeypatch):
  """Two groups among 12 images: 'group_pattern' alone sets them, without 'group_key'."""
  squares.make(tmp_path)
  steps(tmp_path / 'run/checkpoints')
  lines, found = [], {}
  monkeypatch.setattr(checkpoint.logging, 'info', lambda text, *args: lines.append(text % args))
  for pattern in ('', r'(\d)\d$'):
    c = config(tmp_path)
    c.benchmarks.squares.group_pattern = pattern
    output = tmp_path / f'out{bool(pattern)}'
    checkpoint.evaluate_checkpoint(
      c, str(tmp_path / 'run'), model='', benchmarks=None, output=str(output), follow=False
    )
    found[pattern] = json.loads((output / 'squares.json').read_text())
  alone, grouped = found.values()
  assert (alone['groups'], alone['df'], alone['interval']) == (12, None, 'wilson')
  assert grouped['groups'] == 2 and grouped['interval'] == 'cluster-robust'
  assert grouped['df'] == 1 and grouped['top1'] == alone['top1']
  shown = [line.split() for line in lines if 'squares' in line and '%' in line]
  assert [line[1:3] for line in shown] == [['12', '12'], ['12', '2']]
  few = [line for line in lines if line.startswith('Fewer than 12 groups')]
  assert few == ['Fewer than 12 groups: the intervals of squares are no basis for a claim.']


def test_new_checkpoints_are_evaluated_once(tmp_path, monkeypatch, capsys):
  squares.make(tmp_path)
  folder = tmp_path / 'run/checkpoints'
  scored = []
  monkeypatch.setattr(
    checkpoint, '_evaluate', lambda x, path, *more: scored.append(os.path.basename(path))
  )
  follow(tmp_path, tmp_path / 'run', monkeypatch, lambda: steps(folder, '00000004', '00000008'))
  assert scored == ['00000000', '00000004', '00000008']


def test_a_checkpoint_that_training_removes_meanwhile(tmp_path, monkeypatch):
  """Scoring takes longer than a step, and only the newest checkpoints are kept."""
  squares.make(tmp_path)
  folder = tmp_path / 'run/checkpoints'
  steps(folder, '00000004', '00000008')
  scored = []

  def evaluate(x, path, *more):
    scored.append(os.path.basename(path))
    shutil.rmtree(folder / '00000004', ignore_errors=True)

  monkeypatch.setattr(checkpoint, '_evaluate', evaluate)
  follow(tmp_path, tmp_path / 'run', monkeypatch, lambda: None)
  assert scored == ['00000000', '00000008']


def test_a_checkpoint_that_training_removes_while_it_is_read(tmp_path, monkeypatch):
  folder = tmp_path / 'run/checkpoints'
  steps(folder)
  restore = checkpoints.restore_params

  def slow(path):
    if not (folder / '00000004').exists():
      steps(folder, '00000004')
      (folder / '00000000/params/_METADATA').unlink()  # half removed
    return restore(path)

  monkeypatch.setattr(checkpoints, 'restore_params', slow)
  assert models.read(str(tmp_path / 'run')).step == 4
  with pytest.raises(InputError, match='00000000 is damaged'):  # it was named
    models.read(str(folder / '00000000'))
  assert checkpoint._load_if_kept(str(folder / '00000000'), '', lambda: False) is None
  with pytest.raises(InputError, match='00000000 is damaged'):
    checkpoint._load_if_kept(str(folder / '00000000'), '', lambda: True)


def test_a_folder_of_weights_names_its_file(tmp_path):
  write_open_clip(tmp_path / 'a', CLIP)
  with pytest.raises(InputError, match='a/open_clip_model.safetensors'):
    models.read(str(tmp_path / 'a'))


def test_a_file_of_weights_in_a_bucket():
  assert models.resolve_path('gs://b/run') == 'gs://b/run'
  with pytest.raises(ConfigError, match='gs://b/x.safetensors: .*on this machine'):
    models.resolve_path('gs://b/x.safetensors')
