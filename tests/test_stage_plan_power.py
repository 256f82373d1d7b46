"""stages/plan_power.py: the planned tests, from assumptions or from a pilot, in words."""

import shutil

import numpy as np
import pytest
import squares
from squares import config

from clip_jax import defaults
from clip_jax.core import files, products
from clip_jax.evaluation import power
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import plan_power

ROWS = {'pool': 60, 'anchor': 12, 'squares': 12}


@pytest.fixture
def data(tmp_path):
  squares.make(tmp_path)
  return tmp_path


def planned(data='none', **override):
  c = config(data, **{'train.seeds': (0, 1, 2), **override})
  c.splits.matched = defaults.split(rule='matched', to='pruned')
  return c


def lines(c, folder='none', rows=ROWS) -> list[str]:
  return list(plan_power.lines(Experiment(c, str(folder)), rows))


def test_nothing_without_an_aligned_split_and_a_sentence_without_a_control():
  c = planned()
  del c.splits['matched']
  (line,) = lines(c)
  assert 'no test is planned' in line and 'rule "matched"' in line
  del c.splits['pruned']
  assert lines(c) == []


def test_assumptions_before_ingest(data):
  head, line, assumed = lines(planned(data))
  assert '80 %' in head and 'adjustment' not in head
  assert line.startswith('  pruned against matched on squares, 12 images, 3 seeds: ')
  assert 'Not reached: 1, 2 or 5 points; 100 seeds find' in line and '(the images limit it)' in line
  assert 'No pilot yet' in assumed and 'sd 4.1 points' in assumed and '30 %' in assumed
  _, late = lines(planned(data), rows={**ROWS, 'squares': None})
  assert late.endswith('on squares: after ingest, when its images are counted.')
  c = planned(data)
  c.benchmarks.squares.group_pattern = r'(\d)\d$'
  assert 'Groups are known after ingest' in lines(c)[2]


def test_many_images_need_few_seeds(data):
  _, line, _ = lines(planned(data), rows={**ROWS, 'squares': 50_000})
  of = power.variances(power.assumed(np.ones(50_000)))
  assert f'3 seeds: {100 * power.detectable(of, 3, 50_000):.1f} points.' in line
  needed = power.seeds_needed(0.05, of, 50_000)
  assert f'{needed} for 5 points' in line and 'Not reached: 1 point; ' in line
  assert '(the seeds limit it)' in line


def test_two_seeds_give_no_test_and_only_shared_seeds_count(data):
  c = planned(data)
  c.splits.matched.seeds = (1, 2, 3)
  assert '12 images, 2 seeds: no test, which takes 3 seeds.' in lines(c)[1]


def test_several_benchmarks_doses_and_held_back_queries(data):
  c = planned(data)
  c.benchmarks.others = c.benchmarks.squares.copy_and_resolve_references()
  c.splits.pruned.benchmarks = ('squares', 'others')
  defaults.add_doses(c, 'dose', benchmarks=('squares',), doses=(0.5,))
  found = plan_power.comparisons(Experiment(c, str(data)))
  assert found == [
    plan_power.Comparison('pruned', 'matched', name) for name in ('squares', 'others')
  ]
  assert 'before the adjustment for 2 tests' in lines(c, rows={**ROWS, 'others': 12})[0]
  c = planned(data)
  c.splits.pruned.queries = (0.0, 0.25)
  assert 'on squares, 3 images, 3 seeds' in lines(c)[1]


@pytest.fixture
def prepared(prepared_squares, tmp_path):
  """A config with three seeds and a matched split, and a work directory up to prune."""
  shutil.copytree(prepared_squares / 'run', tmp_path / 'run')
  return planned(prepared_squares / 'data'), tmp_path / 'run'


def test_a_pilot_is_read_from_the_work_directory(prepared):
  c, run = prepared
  _, line, assumed = lines(c, run)
  assert '12 images, 3 seeds' in line and 'No pilot yet' in assumed
  # Two seeds of base that disagree on 3 of 12 images; the anchor alone is no pilot.
  c.splits.anchor_only = defaults.split(rule='anchor')
  x = Experiment(c, str(run))
  correct = np.arange(12) < np.array([[6], [9]])
  for split in ('base', 'anchor_only'):
    for seed, row in enumerate(correct):
      name = x.graph.result(split, seed, 'squares').name
      files.write_npz(x.path(name + '.npz'), correct=row)
      files.write_json(x.path(name + '.json'), {})
      endings = [name + '.npz', name + '.json']
      products.finish(x.workdir, x.graph.result(split, seed, 'squares'), endings, {'n': 12})
  pilot = lines(c, run)[2]
  sd = 100 * correct.mean(1).std(ddof=1)
  assert f'Pilot (base; df = 1): an accuracy varies between seeds with sd {sd:.1f}' in pilot
  assert 'two seeds disagree on 25 % of the images' in pilot
  c.benchmarks.squares.templates = ('{}',)  # the results do not fit any more
  assert 'No pilot yet' in lines(c, run)[2]


def test_a_control_of_random_rows_is_no_test(prepared, monkeypatch):
  c, run = prepared
  about = {'draws': {'rows-seed0': {'no_matched_control': True}}}
  monkeypatch.setattr(workdir, 'split_json', lambda x, split: about if split == 'matched' else {})
  assert 'matched holds random rows, as no matched control exists' in lines(c, run)[2]
