"""stages/checkpoint.py: checkpoints and weights on the benchmarks of a config."""

import json
import shutil

import pytest
import squares
from squares import config
from test_convert import CLIP, write_open_clip

from clip_jax.core import checkpoints
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.stages import checkpoint, convert, models


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


def test_a_checkpoint_that_training_removes_while_it_is_read(tmp_path, monkeypatch):
  folder = tmp_path / 'run/checkpoints'
  steps(folder)
  restore = checkpoints.restore_params

  def slow(path, *item):
    if not (folder / '00000004').exists():
      steps(folder, '00000004')
      (folder / '00000000/params/_METADATA').unlink()  # half removed
    return restore(path, *item)

  monkeypatch.setattr(checkpoints, 'restore_params', slow)
  assert models.read(str(tmp_path / 'run')).step == 4
  with pytest.raises(InputError, match='00000000 is damaged'):  # it was named
    models.read(str(folder / '00000000'))


def test_a_folder_of_weights_names_its_file(tmp_path):
  write_open_clip(tmp_path / 'a', CLIP)
  with pytest.raises(InputError, match='a/open_clip_model.safetensors'):
    models.read(str(tmp_path / 'a'))


def test_a_file_of_weights_in_a_bucket():
  with pytest.raises(ConfigError, match='gs://b/x.safetensors: .*on this machine'):
    models.resolve_path('gs://b/x.safetensors')
