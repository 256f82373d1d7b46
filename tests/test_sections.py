"""Sections on accuracy, similarity and size: right numbers, heads that say what intervals mean."""

from types import SimpleNamespace

from looks import LOOKS
import numpy as np
import pytest

from clip_jax.evaluation import similarity_bins
from clip_jax.reporting import sections

BASIS = {'method': 'crossed', 'seeds': 3, 'images': 30, 'groups': 6, 'df': 2.25}
BINS = [
  {
    'low': 0.5,
    'high': 0.55,
    'n': 30,
    'accuracy': 0.5,
    'accuracy_low': 0.4,
    'accuracy_high': 0.6,
    **BASIS,
  },
  {
    'low': 0.55,
    'high': 0.6,
    'n': 3,
    'accuracy': 0.7,
    'accuracy_low': None,
    'accuracy_high': None,
    **BASIS,
  },
]
SERIES = [{'name': 'base', 'rule': 'all', 'adjusted': False, 'bins': BINS}]


def estimate(value, low=None, high=None, method='crossed', seeds=3, groups=100, df=2.25):
  nan = float('nan')
  return SimpleNamespace(
    value=value,
    low=nan if low is None else low,
    high=nan if high is None else high,
    method=method,
    seeds=seeds,
    images=100,
    groups=groups,
    df=df,
  )


def split(name, seeds=(0, 1, 2), mark=''):
  return {
    'name': name,
    'rule': 'all',
    'words': 'words',
    'pool_rows': 1000,
    'anchor_rows': 50,
    'anchor_share': 50 / 1050,
    'samples': 25600,
    'passes': 24.4,
    'seeds': seeds,
    'mark': mark,
  }


def accuracy(splits, leaked=None, unleaked=None, **values):
  benchmarks = [{'name': 'val', 'queries': 100, 'leaked': leaked, 'measure': ''}]
  found = {(name, 'val'): value for name, value in values.items()}
  return sections.accuracy_blocks(splits, benchmarks, found, unleaked or {})


def heads(table):
  return ' | '.join(f'{cell.text} {cell.detail}' for cell in table.columns)


@pytest.mark.parametrize(
  'seeds, said, note',
  [
    ((0,), 'this checkpoint', 'says nothing about other training runs'),
    ((0, 1), 'range of 2 seeds', 'two seeds give no interval'),
    ((0, 1, 2, 3), 'mean of 4 seeds\n95 % interval', 'over seeds and images'),
  ],
)
def test_the_head_says_what_the_bounds_are(seeds, said, note):
  (table,) = accuracy([split('base', seeds)], base=estimate(0.6, 0.5, 0.7))
  assert said in heads(table) and note in table.notes[0]


def test_every_accuracy_says_what_its_interval_rests_on():
  (table,) = accuracy(
    [split('base'), split('gap')],
    base=estimate(0.6, 0.5, 0.7, groups=6),
    gap=estimate(0.5, 0.4, 0.6, groups=6, df=3.9),
  )
  assert table.notes[1] == (
    'Intervals rest on 3 seeds. val: 100 images in 6 groups, 2.2 to 3.9 df.'
  )
  assert 'Fewer than 12 groups (val: 6 groups)' in table.notes[2]
  assert [(r['seeds'], r['images'], r['groups'], r['df']) for r in table.records] == [
    (3, 100, 6, 2.25),
    (3, 100, 6, 3.9),
  ]
  (table,) = accuracy([split('base', (0,))], base=estimate(0.6, 0.5, 0.7, 'wilson', 1, df=np.inf))
  assert table.notes[1] == 'Intervals rest on 1 seed. val: 100 images, ungrouped.'
  assert not any('Fewer than' in note for note in table.notes)


def test_splits_with_other_numbers_of_seeds_get_a_table_of_their_own():
  many, one = accuracy(
    [split('base'), split('near', (0,))],
    base=estimate(0.6, 0.5, 0.7),
    near=estimate(0.4, 0.3, 0.5, 'wilson', 1),
  )
  assert [row[0].text for row in many.rows] == ['base'] and many.name == 'accuracy'
  assert [row[0].text for row in one.rows] == ['near'] and 'this checkpoint' in heads(one)


def test_accuracies_are_percent_on_the_page_and_proportions_in_the_records():
  (table,) = accuracy([split('base')], base=estimate(0.6234, 0.5, 0.7))
  assert (table.rows[0][1].text, table.rows[0][1].detail) == ('62.3', '[50.0, 70.0]')
  assert table.records[0]['accuracy'] == 0.6234 and table.records[0]['low'] == 0.5
  assert [cell.text for cell in table.rows[0][2:]] == ['1,000', '25,600']
  assert [cell.detail for cell in table.rows[0][2:]] == [
    '+ 50',
    '24.4 passes\nanchor 4.8 %',
  ]
  assert table.records[0]['anchor_share'] == 50 / 1050


def test_leaked_queries_get_a_second_column():
  (table,) = accuracy(
    [split('base')],
    leaked=7,
    unleaked={('base', 'val'): estimate(0.5, 0.4, 0.6)},
    base=estimate(0.6, 0.5, 0.7),
  )
  assert 'val, not leaked without 7 queries' in heads(table)
  assert [cell.text for cell in table.rows[0][1:3]] == ['60.0', '50.0']
  assert [record['without_leaked'] for record in table.records] == [False, True]
  (table,) = accuracy([split('base')], leaked=0, base=estimate(0.6, 0.5, 0.7))
  assert 'leaked' not in heads(table)


def test_runs_that_did_not_converge_are_marked():
  (table,) = accuracy(
    [split('base', mark='not converged'), split('gap')],
    base=estimate(0.6, 0.5, 0.7),
    gap=estimate(0.6, 0.5, 0.7),
  )
  assert [row[1].tone for row in table.rows] == ['flag', '']
  assert any('Not converged' in note for note in table.notes)


def test_missing_intervals_are_explained():
  (table,) = accuracy([split('base')], base=estimate(0.6, method='none'))
  assert table.rows[0][1].detail == '' and any('one group' in note for note in table.notes)


def test_untrained_splits_are_named():
  table, text = accuracy([split('base'), split('gap', ())], base=estimate(0.6, 0.5, 0.7))
  assert len(table.rows) == 1 and 'gap' in text.text


def test_every_rule_has_a_colour_and_a_mark_of_its_own():
  marks = [(color, marker) for color, marker, _ in LOOKS.values()]
  assert len(set(marks)) == len(marks)


def test_the_dose_has_a_table_with_shares_and_slacks():
  point = {
    'split': 'gap_50',
    'control': 'gap_50_matched',
    'control_rule': 'matched',
    'dropped': 59,
    'slack': 0.0144,
    'share': 0.504,
    'estimate': -0.021,
    'low': -0.04,
    'high': -0.002,
    **BASIS,
  }
  _, drawn, table = sections.dose_blocks(
    [
      {
        'name': 'val',
        'embedder': '',
        'points': [{**point, 'split': 'gap', 'share': 1.0, 'low': None, 'high': None}, point],
      }
    ],
    LOOKS['gap_aligned'],
  )
  assert drawn.items[0].name == 'dose_val'
  assert [cell.text for cell in table.rows[0]] == [
    'gap_50 on val',
    '50.4 %',
    '59',
    '+0.014',
    '\u22122.1',
    '3 seeds, 30 images in 6 groups, 2.2 df',
  ]
  assert table.notes[0].startswith('Estimates') and '6 groups' in table.notes[1]
  assert table.rows[0][4].detail == '[\u22124.0, \u22120.2]' and table.rows[1][4].detail == ''
  assert sections.dose_blocks([], LOOKS['gap_aligned']) == []


def test_histograms_share_one_axis_and_count_who_is_nearer_to_the_pool():
  entries = [
    {'name': 'a', 'anchor': np.array([0.5, 0.6, np.nan]), 'pool': np.array([0.7, 0.5, np.nan])}
  ]
  block, table = sections.histogram_blocks(entries)
  assert block.items[0].caption.startswith('1 of 3 queries (33.3 %, a count)')
  assert [(row[0].detail, row[1].text, row[3].text) for row in table.rows] == [
    ('nearest pool image', '2', '0.600'),
    ('nearest anchor image', '2', '0.550'),
  ]
  assert sections.histogram_blocks([]) == []
  alone, table = sections.histogram_blocks(
    [{'name': 'a', 'anchor': None, 'pool': np.array([0.7, 0.5])}]
  )
  assert alone.items[0].caption == '' and len(table.rows) == 1


def test_bins_are_associations_and_few_is_grey():
  blocks = sections.bin_blocks([{'name': 'val', 'what': 'similarity', 'series': SERIES}], LOOKS)
  assert blocks[0].text.startswith('Accuracy is associated with')
  table = blocks[-1].blocks[0]
  assert [row[4].tone for row in table.rows] == ['', 'muted']
  assert [row[4].detail for row in table.rows] == ['[40.0, 60.0]', '6 of 9 right']
  of_two = [{**SERIES[0], 'bins': [{**BINS[0], 'method': 'range', 'seeds': 2}]}]
  of_two.append({**SERIES[0], 'adjusted': True, 'bins': [BINS[1]]})
  panel = {'name': 'val', 'what': 'similarity', 'series': of_two}
  details = [r[4].detail for r in sections.bin_blocks([panel], LOOKS)[-1].blocks[0].rows]
  assert details == ['(seeds: 40.0 to 60.0)', '']  # what is fitted is no count
  assert sections.FEW_QUERIES == similarity_bins.FEW
  assert [cell.text for cell in table.rows[0][5:]] == ['3', '6', '2.2']
  assert [row[2].text for row in table.rows] == ['0.50 to 0.55', '0.55 to 0.60']
  assert sections.bin_blocks([], LOOKS) == []


def test_sizes_are_drawn_on_one_scale_and_compared_with_random():
  panel = {
    'name': 'val',
    'embedder': '',
    'base': None,
    'reference': None,
    'curves': {'near': [{'size': 5, 'accuracy': 0.5, 'low': None, 'high': None}]},
  }
  rows = [
    {
      'split': 'near_5',
      'rule': 'near',
      'embedder': '',
      'control': 'random_5',
      'benchmark': 'val',
      'estimate': estimate(-0.1, -0.2, 0.0, 'this checkpoint', 1),
    }
  ]
  figures, fact, table = sections.size_blocks([panel], rows, LOOKS)
  assert figures.items[0].name == 'size_val' and 'near-pruning hurts fast' in fact.text
  assert table.rows[0][0].detail == 'near-pruned (most similar removed)'
  assert table.rows[0][2].text == '\u221210.0 [\u221220.0, 0.0] points'
  assert table.rows[0][2].detail == (
    'this checkpoint, 95 % interval over images\n1 seed, 100 images, ungrouped, 2.2 df'
  )
  assert 'support no claim' in table.notes[0]
  assert sections.size_blocks([], [], LOOKS) == []


def test_answer_shows_what_is_missing():
  assert sections.answer_blocks([], 'missing', LOOKS) == ['missing']


def test_one_answer_has_its_words_beside_it_and_several_have_them_once():
  points = [
    {
      'rule': 'all',
      'label': 'base',
      'split': 'base',
      'accuracy': 0.5,
      'low': 0.4,
      'high': 0.6,
      'method': 'crossed',
    }
  ]
  panels = [{'name': name, 'title': name, 'detail': '', 'points': points} for name in 'ab']
  (one,) = sections.answer_blocks(panels[:1], None, LOOKS)
  assert [figure.name for figure in one.items] == ['a'] and 'Bars' in one.items[0].caption
  two, words = sections.answer_blocks(panels, None, LOOKS)
  assert [figure.caption for figure in two.items] == ['', ''] and 'Bars' in words.text
