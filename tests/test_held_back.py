"""Aligned against held-back queries: planted effects are told apart, and said as they are."""

import csv
import io

import numpy as np
import pytest

from clip_jax.evaluation import causal, held_back, statistics
from clip_jax.reporting import held_back as shown
from clip_jax.reporting import tables

IMAGES, GROUP, CLASSES = 20_000, 2, 8


def world(seed, loss_a, loss_u, seeds=5, images=IMAGES, size=GROUP):
  """Correctness of P and C, which images are aligned, labels and groups, drawn with known losses.

  Images, groups and seeds have random difficulty, the same for P and C.
  """
  rng = np.random.default_rng(seed)
  group = np.arange(images) // size
  label = rng.integers(0, CLASSES, images)
  aligned = (rng.random(images // size) < 0.5)[group]
  hard = 0.1 * rng.normal(size=images) + 0.1 * rng.normal(size=images // size)[group]
  rate = 0.65 + hard + 0.02 * rng.normal(size=(seeds, 1))
  draw = lambda p: rng.random((seeds, images)) < p
  control = draw(np.clip(rate, 0, 1))
  pruned = draw(np.clip(rate - np.where(aligned, loss_a, loss_u), 0, 1))
  return pruned, control, aligned, label, group


def compare(world, share=0.3, **more):
  pruned, control, aligned, label, group = world
  return held_back.compare(pruned, control, aligned, label, share_gone=share, groups=group, **more)


def test_planted_instance_and_domain_effects_are_told_apart():
  conclusions = {
    truth: [compare(world(seed, *losses, images=images)).conclusion for seed in range(12)]
    for truth, images, losses in [
      ('instance', 1000, (0.15, 0.0)),
      ('domain', 20_000, (0.15, 0.15)),  # fewer images do not show that two losses are alike
      ('nothing', 1000, (0.0, 0.0)),
      ('both', 1000, (0.3, 0.1)),
    ]
  }
  count = lambda truth, word: conclusions[truth].count(word)
  assert count('instance', 'instance') >= 10 and count('instance', 'domain') == 0
  assert count('domain', 'domain') >= 10 and count('domain', 'instance') == 0
  assert count('nothing', 'undetermined') >= 11
  assert count('both', 'undetermined') >= 10  # A lost more, but U lost, too


def test_the_interval_of_the_contrast_covers_the_truth():
  covered = equivalent = 0
  for seed in range(40):
    found = compare(world(1000 + seed, 0.12, 0.04, images=800))
    covered += found.contrast.low <= -0.08 <= found.contrast.high
    equivalent += found.is_equivalent
  assert covered >= 35 and equivalent == 0


def test_the_figures_are_those_of_the_formulas():
  pruned, control, aligned, label, group = world(0, 0.1, 0.0, images=1200)
  found = compare((pruned, control, aligned, label, group))
  d = pruned.astype(float) - control
  for side, which in ((found.aligned, aligned), (found.held_back, ~aligned)):
    assert side.difference.value == pytest.approx(d[:, which].mean())
    assert side.difference == statistics.crossed_interval(d[:, which], group[which])
    assert (side.images, side.groups) == (which.sum(), len(set(group[which])))
    assert side.right_pruned == pruned[:, which].sum()
    assert side.right_control == control[:, which].sum()
  by_class = [
    (np.mean(aligned & (label == c)) / np.mean(aligned))
    * (d[:, aligned & (label == c)].mean() - d[:, ~aligned & (label == c)].mean())
    for c in range(CLASSES)
  ]
  assert found.contrast.value == pytest.approx(sum(by_class))
  did = causal.difference_in_differences(pruned, control, aligned, ~aligned, label, group)
  assert found.contrast == did.estimate and found.used == did.used == 1


def test_a_difference_in_class_mix_is_no_effect():
  """Every class loses the same on both sides, but A has more of the class that loses."""
  label = np.repeat([0, 1], 1000)
  aligned = np.concatenate([np.arange(1000) % 5 > 0, np.arange(1000) % 5 == 0])
  rng = np.random.default_rng(0)
  control = rng.random((3, 2000)) < 0.9
  pruned = rng.random((3, 2000)) < np.where(label == 0, 0.5, 0.9)
  found = held_back.compare(pruned, control, aligned, label, share_gone=0.0)
  raw = found.aligned.difference.value - found.held_back.difference.value
  assert raw < -0.15 and abs(found.contrast.value) < 0.05


def test_nothing_is_concluded_if_nearly_all_neighbours_went():
  truth = world(0, 0.15, 0.15)
  assert compare(truth, 0.8).conclusion == 'domain'
  assert compare(truth, 0.81).conclusion == 'cannot tell'
  assert compare(world(0, 0.15, 0.0), 0.89).conclusion == 'cannot tell'
  assert compare(truth, None).conclusion == 'domain'  # no row was near a held-back query


@pytest.mark.parametrize('seeds', [1, 2])
def test_few_seeds_claim_nothing(seeds):
  found = compare(world(0, 0.3, 0.3, seeds=seeds))
  assert found.conclusion == 'undetermined' and found.contrast is not None
  assert not found.is_equivalent and not found.aligned.is_lost


def test_few_groups_are_counted():
  pruned, control, aligned, label, group = world(0, 0.3, 0.0, images=400, size=25)  # 16 groups
  found = compare((pruned, control, aligned, label, group))
  few = [side for side in (found.aligned, found.held_back) if side.groups < 10]
  assert few and all(side.difference is None and side.right_control > 0 for side in few)
  assert found.contrast is None and found.reason.startswith('not estimable: ')
  assert found.conclusion == 'undetermined'
  one = held_back.compare(pruned, control, np.ones(400, bool), label, share_gone=None)
  assert one.held_back.images == 0 and one.contrast is None and one.used == 0


def test_classes_without_both_kinds_do_not_count():
  pruned, control, aligned, label, group = world(0, 0.1, 0.1, images=400)
  apart = np.where(aligned, 0, 1)  # no class has both
  assert compare((pruned, control, aligned, apart, group)).reason.startswith(
    'not estimable: 0 aligned and 0 held-back groups'
  )
  label = np.where(aligned & (label == 0), 99, label)
  found = compare((pruned, control, aligned, label, group))
  assert 0 < found.used < 1 and found.contrast is not None


def test_wrong_arrays_are_refused():
  pruned, control, aligned, label, _ = world(0, 0.1, 0.1, images=100)
  with pytest.raises(ValueError, match='groups have both aligned and held-back'):
    held_back.compare(pruned, control, aligned, label, share_gone=0.0, groups=np.zeros(100, int))
  with pytest.raises(ValueError, match='the same seeds and images'):
    held_back.compare(pruned, control[:2], aligned, label, share_gone=0.0)
  with pytest.raises(ValueError, match='one value per image'):
    held_back.compare(pruned, control, aligned[:9], label, share_gone=0.0)


# --------------------------------------------------------------------------------------------------
# the section of the page


def item(comparison, rule='all', share=0.3):
  return {
    'split': 'half',
    'benchmark': 'sketch',
    'queries': (0.0, 0.5),
    'control': 'base' if rule == 'all' else 'like_half',
    'control_rule': rule,
    'comparison': comparison,
    'margin': held_back.MARGIN,
    'most_removed': held_back.MOST_GONE,
    'figures': {
      'rows': 100,
      'rows_removed': int(100 * share),
      'share_removed': share,
      'excess_before': 0.05,
      'excess_after': 0.02,
      'excess_removed': 0.6,
    },
  }


DOMAIN, INSTANCE = (0.15, 0.15), (0.15, 0.0)


@pytest.mark.parametrize(
  'losses, rule, share, words',
  [
    (
      DOMAIN,
      'all',
      0.3,
      'The loss is the domain\u2019s (or size\u2019s, see random): images ',
    ),
    (DOMAIN, 'random', 0.3, 'The loss is the domain\u2019s: images like these were needed, not '),
    (INSTANCE, 'all', 0.3, 'instance similarity: the model needed the neighbours themselves.'),
    (DOMAIN, 'all', 0.89, 'although only the aligned queries counted: 89.0 % of the rows'),
    ((0.0, 0.0), 'all', 0.3, 'undetermined: no loss on the aligned queries is shown.'),
    ((0.3, 0.1), 'all', 0.3, 'undetermined: both lost, but not shown to be alike within \u00b12 '),
  ],
)
def test_each_conclusion_has_its_sentence(losses, rule, share, words):
  one = item(compare(world(0, *losses), share), rule, share)
  assert words in shown.words(one)
  about, said, table = shown.blocks_of([one])
  assert words in said.text and said.text.startswith('half on sketch, against ')
  lines = shown.summary_lines([one])
  assert words in lines[1].replace('Undetermined', 'undetermined').replace('The comp', 'the comp')
  assert 'A: ' in lines[0] and 'U: ' in lines[0] and 'A minus U: ' in lines[0]
  assert about.tone == 'muted' and table.name == 'held_back'


def test_an_open_loss_is_said():
  found = compare(world(3, 0.4, 0.0, images=300, seeds=3))
  assert found.conclusion == 'instance' and found.held_back.narrow.low < -held_back.MARGIN
  assert 'A loss of the held-back queries of up to ' in shown.words(item(found))


def test_the_table_has_the_numbers():
  found = compare(world(0, *INSTANCE))
  table = shown.blocks_of([item(found), {**item(None), 'control': None, 'figures': None}])[-1]
  lines = list(csv.DictReader(io.StringIO(tables.csv_text(table.records))))
  assert [line['what'] for line in lines] == ['D_aligned', 'D_held_back', 'A_minus_U'] * 2
  assert float(lines[0]['value']) == found.aligned.difference.value
  assert float(lines[2]['low']) == found.contrast.low
  assert int(lines[1]['right_control']) == found.held_back.right_control
  assert lines[0]['share_removed'] == '0.3' and lines[0]['conclusion'] == 'instance'
  assert lines[3]['value'] == lines[3]['rows'] == lines[3]['conclusion'] == ''
  assert '20,000 images' in table.rows[0][3].detail and '90 % [' in table.rows[0][3].detail
  assert table.rows[0][5].text == '+0.050 to +0.020'
  assert shown.summary_lines([item(None)]) == []


def test_few_groups_are_said_as_counts():
  found = compare(world(0, 0.3, 0.0, images=400, size=40))
  table = shown.blocks_of([item(found)])[-1]
  assert f'{found.aligned.right_pruned:,} of ' in table.rows[0][1].text
  assert 'not estimable' in table.rows[0][3].detail
  assert 'with the control' in shown.summary_lines([item(found)])[0]
