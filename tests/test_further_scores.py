"""The tables of recalls and of few-shot probes, and the estimates of the probes."""

from types import SimpleNamespace

import numpy as np
import pytest
import squares

from clip_jax.evaluation import statistics
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import further_scores
from clip_jax.stages.report import panels
from clip_jax.stages.report.facts import Facts, Results, _few_shot

RNG = np.random.default_rng(0)


def estimate(value, groups=100, df=2.5):
  return SimpleNamespace(
    value=value, low=value - 0.1, high=value + 0.1, method='crossed', seeds=3, images=100,
    groups=groups, df=df,
  )  # fmt: skip


def probe(value, groups=100, df=2.5):
  return {'estimate': estimate(value, groups, df), 'draws': 3, 'lowest': 0.2, 'highest': 0.6}


def result(split, probes):
  return {'split': split, 'rule': 'all', 'benchmark': 'val', 'training_set': 'anchor'} | {
    'probes': probes
  }


def test_a_probe_has_its_interval_and_its_draws():
  (details,) = further_scores.few_shot_blocks(
    [result('base', {1: probe(0.4), 5: probe(0.5, df=4)}), result('pruned', {1: probe(0.3)})]
  )
  (table,) = details.blocks
  assert [f'{cell.text} {cell.detail}' for cell in table.columns[1:3]] == [
    '1 training image of each class',
    '5 training images of each class',
  ]
  base, pruned = table.rows
  assert (base[0].detail, base[1].text) == ('val, trained on anchor', '40.0')
  assert base[1].detail == '[30.0, 50.0]\ndraws: 20.0 to 60.0'
  assert (pruned[2].text, base[3].text) == ('\u2013', '3 seeds, 100 images, ungrouped, 2.5 to 4 df')
  assert [(r['split'], r['shots'], r['value'], r['highest_draw']) for r in table.records] == [
    ('base', 1, 0.4, 0.6),
    ('base', 5, 0.5, 0.6),
    ('pruned', 1, 0.3, 0.6),
  ]
  assert len(table.notes) == 1 and further_scores.few_shot_blocks([]) == []


def test_few_groups_are_named():
  (details,) = further_scores.few_shot_blocks([result('base', {1: probe(0.4, groups=4)})])
  assert 'Fewer than 12 groups (val: 4 groups)' in details.blocks[0].notes[1]


def test_recalls():
  measures = {f'{way} recall@{k}': estimate(k / 20) for way in ('a-to-b', 'b-to-a') for k in (1, 5)}
  rows = [{'split': 'base', 'rule': 'all', 'benchmark': 'pairs', 'recalls': measures}]
  _, table = further_scores.recall_blocks(rows)
  assert [cell.text for cell in table.rows[0]] == ['base', '5.0', '25.0', '5.0', '25.0']
  assert table.rows[0][2].detail == '[15.0, 35.0]' and table.records[1]['measure'] == (
    'a-to-b recall@5'
  )


@pytest.mark.parametrize('seeds', [1, 2, 3])
def test_estimates_are_over_seeds_and_images_of_the_mean_over_draws(seeds):
  correct = RNG.random((seeds, 3, 40)) < np.array([0.3, 0.5, 0.7])[:, None]
  groups = np.repeat(np.arange(20), 2)
  results = Results(
    {}, {}, {}, {}, {'squares': groups}, few_shot={('base', 'squares'): {5: correct}}
  )
  c = squares.config('data')
  c.benchmarks.squares.few_shot = 'anchor'
  facts = Facts(Experiment(c, 'w'), results, {}, {}, {}, None, {}, {})
  (panel,) = panels.few_shot(facts)
  found = panel['probes'][5]
  wanted = statistics.accuracy_interval(correct.mean(1), groups)
  assert found['estimate'] == wanted or seeds == 2 and found['estimate'].low == wanted.low
  assert found['estimate'].value == pytest.approx(correct.mean()) and panel['rule'] == 'all'
  by_draw = correct.mean((0, 2))
  assert (found['lowest'], found['highest'], found['draws']) == (min(by_draw), max(by_draw), 3)


def test_only_shots_of_all_seeds_count():
  of = lambda *shots: {
    'few_shot_shots': np.array(shots),
    'few_shot_correct': RNG.random((len(shots), 3, 8)) < 0.5,
  }
  first, second = of(1, 5), of(1)
  found = _few_shot([first, second])
  assert list(found) == [1] and found[1].shape == (2, 3, 8)
  assert (found[1][0] == first['few_shot_correct'][0]).all()
  assert _few_shot([first, {}]) == {}
