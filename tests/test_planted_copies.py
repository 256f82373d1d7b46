"""The positive control is loud, and claims no more than its intervals allow."""

import math
import types

import pytest

from clip_jax.reporting import planted_copies

NAN = float('nan')
GAIN = {'value': 0.12, 'low': 0.08, 'high': 0.16, 'method': 'crossed'} | {
  'seeds': 3,
  'images': 299,
  'groups': 8,
  'df': 2.5,
}
KIND = {
  'kind': 'crop',
  'copies': 75,
  'found': 60,
  'recall': 0.8,
  'low': 0.69,
  'high': 0.88,
  'least': 0.71,
  'median': 0.93,
  'similarity_wanted': 0.85,
  'threshold_wanted': 0.15,
  'others_over_wanted': 0.02,
  'others_over_wanted_low': 0.01,
  'others_over_wanted_high': 0.05,
}
CALIBRATION = {
  'embedder': 'pca',
  'similarity': 0.876,
  'threshold': 0.124,
  'wanted': 0.95,
  'queries': 150,
  'others_over': 0.01,
  'others_median': 0.7,
  'others_highest': 0.9,
  'kinds': [KIND, {**KIND, 'kind': 'all', 'copies': 150}],
}


def leakage(reason='', **change):
  """Returns what evaluation/positive_control.contrast returns."""
  gain = lambda **more: None if reason else types.SimpleNamespace(**{**GAIN, **more})
  return types.SimpleNamespace(
    estimate=gain(**change),
    planted=gain(low=NAN, high=NAN),
    unplanted=gain(),
    planted_queries=150,
    unplanted_queries=149,
    reason=reason,
  )


CONTROL = {
  'benchmark': 'sketch',
  'copies': 1,
  'queries': 300,
  'copied': 150,
  'calibrations': {'': CALIBRATION, 'hog': CALIBRATION},
  'contrasts': [('leaky', 'base', leakage())],
}


def tables_of(blocks):
  return {b.name: b for b in blocks if b.kind == 'table'}


def test_the_banner_counts_the_images_that_are_held():
  said = planted_copies.banner(CONTROL)
  assert (
    said.startswith('This experiment contains planted copies of test images.')
    and '150 of the 300 images' in said
  )
  assert 'Do not report its accuracy' in said and '3 transformed copies' in planted_copies.banner(
    {**CONTROL, 'copies': 3}
  )


def test_the_contrast_is_in_points_on_the_page_and_in_proportions_in_the_records():
  table = tables_of(planted_copies.blocks_of(CONTROL))['planted_contrast']
  assert table.rows[0][1].text == '+12.0 [+8.0, +16.0] points' and table.rows[0][2].text.startswith(
    'An estimate: the interval lies above zero'
  )
  assert table.rows[0][1].detail == (
    '95 % interval over seeds and images\n3 seeds, 299 images in 8 groups, 2.5 df'
  )
  assert table.rows[1][1].text == '+12.0 points' and 'leaky: 8 groups' in table.notes[1]
  assert table.records[0]['groups'] == 8 and table.records[0]['df'] == 2.5
  assert table.records[0]['value'] == 0.12 and math.isnan(table.records[1]['low'])


@pytest.mark.parametrize(
  'change, said',
  [
    ({'low': -0.01}, 'Undetermined'),
    ({'low': -0.09, 'high': -0.01}, 'look for an error'),
    ({'method': 'range'}, 'no claim'),
    ({'low': NAN, 'high': NAN, 'method': 'none'}, 'no interval'),
    ({'method': 'this checkpoint'}, 'these checkpoints only'),
  ],
)
def test_words_follow_from_the_interval(change, said):
  contrasts = [('leaky', 'base', leakage(**change))]
  table = tables_of(planted_copies.blocks_of({**CONTROL, 'contrasts': contrasts}))[
    'planted_contrast'
  ]
  assert said in table.rows[0][2].text


def test_a_reason_stands_for_a_missing_estimate():
  contrasts = [('leaky', 'base', leakage('not estimable: 3 planted'))]
  table = tables_of(planted_copies.blocks_of({**CONTROL, 'contrasts': contrasts}))[
    'planted_contrast'
  ]
  assert table.rows[0][2].text == 'Not estimable: 3 planted.' and table.records == ()


def test_the_calibration_has_a_row_for_each_embedder_and_kind():
  table = tables_of(planted_copies.blocks_of(CONTROL))['planted_calibration']
  assert [(row[0].text, row[0].detail) for row in table.rows] == [
    ('crop', 'the main embedder'),
    ('all', 'the main embedder'),
    ('crop', 'hog'),
    ('all', 'hog'),
  ]
  assert [cell.text for cell in table.rows[0][1:]] == [
    '75',
    '80.0 %',
    '0.930',
    '0.710',
    '0.850',
    '0.150',
    '2.0 %',
  ]
  assert table.rows[0][7].detail == '[1.0, 5.0]'
  assert table.rows[0][2].detail == '[69.0, 88.0]' and '1.0 % have another image' in table.notes[0]
  empty = tables_of(planted_copies.blocks_of({**CONTROL, 'calibrations': {}, 'contrasts': []}))
  assert empty == {}
