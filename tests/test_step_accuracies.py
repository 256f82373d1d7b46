"""experiment/step_accuracies.py: lines in, the last fitting line of each step and benchmark out."""

import json

import pytest

from clip_jax.core import metrics
from clip_jax.experiment import step_accuracies

RESULT = dict.fromkeys(step_accuracies.SCORES, 0.5)


def test_the_last_line_counts_and_others_are_left_out(tmp_path):
  path = step_accuracies.path_in(str(tmp_path))
  assert step_accuracies.read(path, {'a': 'x'}) == ({}, 0)
  step_accuracies.append(path, 4, {'a': RESULT, 'b': RESULT}, {'a': 'x', 'b': 'y'})
  step_accuracies.append(path, 4, {'a': {**RESULT, 'top1': 0.7}}, {'a': 'x'})
  step_accuracies.append(path, 8, {'a': RESULT}, {'a': 'another definition'})
  lines, left_out = step_accuracies.read(path, {'a': 'x'})
  assert {key: line['top1'] for key, line in lines.items()} == {(4, 'a'): 0.7}
  assert left_out == 2


@pytest.mark.parametrize('kept', [1, 20, -2, -1])
def test_a_cut_off_line_never_becomes_whole(tmp_path, kept):
  """Whatever a kill leaves of a line, the next one is whole and the rest is not counted."""
  path = tmp_path / step_accuracies.FILE
  step_accuracies.append(str(path), 4, {'a': RESULT}, {'a': 'x'})
  path.write_text(path.read_text()[:kept])
  step_accuracies.append(str(path), 8, {'a': RESULT}, {'a': 'x'})
  whole = kept == -1  # only the line's end is missing
  assert [line['step'] for line in metrics.read(path)] == ([4, 8] if whole else [8])
  assert json.loads(path.read_text().splitlines()[-1])['step'] == 8


def test_a_retrieval_benchmark_has_no_classes(tmp_path):
  path = step_accuracies.path_in(str(tmp_path))
  result = {key: value for key, value in RESULT.items() if key != 'mean_per_class'}
  step_accuracies.append(path, 4, {'coco': result}, {'coco': 'x'})
  (line,) = metrics.read(path)
  assert line['top1'] == 0.5 and line['mean_per_class'] is None


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
  with pytest.raises(FileNotFoundError):
    step_accuracies.append(
      step_accuracies.path_in(str(tmp_path / 'gone')), 4, {'a': RESULT}, {'a': ''}
    )
  assert not (tmp_path / 'gone').exists()


def test_the_state_of_a_run(tmp_path):
  assert step_accuracies.last_step(str(tmp_path)) is None
  assert step_accuracies.run_fingerprint(str(tmp_path)) == ''
