"""The positive control is loud, and claims no more than its intervals allow."""

import pytest

from clip_jax.reporting import planted_copies

GAIN = {'value': 12.0, 'low': 8.0, 'high': 16.0, 'error': 1.0, 'df': 5.0, 'p_value': 0.01, 'method': 'crossed',
        'seeds': 3, 'images': 300, 'groups': 300}
KIND = {'kind': 'crop', 'copies': 75, 'found': 60, 'recall': 0.8, 'low': 0.69, 'high': 0.88, 'least': 0.71,
        'median': 0.93, 'similarity_wanted': 0.85, 'threshold_wanted': 0.15, 'others_over_wanted': 0.02,
        'others_over_wanted_low': 0.01, 'others_over_wanted_high': 0.05}
CALIBRATION = {'embedder': 'pca', 'similarity': 0.876, 'threshold': 0.124, 'wanted': 0.95, 'queries': 150,
               'others_over': 0.01, 'others_median': 0.7, 'others_highest': 0.9,
               'kinds': [KIND, {**KIND, 'kind': 'all', 'copies': 150}]}
FOUND = {'benchmark': 'sketch', 'share': 0.5, 'copies': 1, 'kinds': ['crop', 'jpeg'], 'queries': 300, 'drawn': 151,
         'unreadable': ['k7'], 'samples': 150, 'calibration': CALIBRATION,
         'calibrations': {'': CALIBRATION, 'hog': CALIBRATION},
         'contrasts': [{'split': 'leaky', 'base': 'base', 'reason': '', 'planted_queries': 150,
                        'unplanted_queries': 149, 'estimate': GAIN, 'gain_planted': {**GAIN, 'low': None, 'high': None},
                        'gain_unplanted': GAIN}]}


def tables_of(blocks):
  return {b.name: b for b in blocks if b.kind == 'table'}


def test_the_banner_counts_the_images_that_are_held():
  said = planted_copies.banner(FOUND)
  assert said.startswith('This experiment holds planted copies of test images.') and '150 of the 300 images' in said
  assert 'no result' in said and '3 transformed copies' in planted_copies.banner({**FOUND, 'copies': 3})


def test_the_contrast_is_in_points_on_the_page_and_in_proportions_in_the_records():
  table = tables_of(planted_copies.blocks_of(FOUND))['planted_contrast']
  assert table.rows[0][1].text == '+12.0 [+8.0, +16.0] points' and 'leakage shows' in table.rows[0][2].text
  assert table.rows[1][1].text == '+12.0 points'
  assert table.records[0]['value'] == 0.12 and table.records[1]['low'] is None


@pytest.mark.parametrize('change, said', [
    ({'low': -1.0}, 'Undetermined'), ({'low': -9.0, 'high': -1.0}, 'look for a mistake'),
    ({'method': 'range'}, 'no claim'), ({'low': None, 'high': None, 'method': 'none'}, 'no interval'),
    ({'method': 'this checkpoint'}, 'These checkpoints only')])
def test_words_follow_from_the_interval(change, said):
  contrast = {**FOUND['contrasts'][0], 'estimate': {**GAIN, **change}}
  table = tables_of(planted_copies.blocks_of({**FOUND, 'contrasts': [contrast]}))['planted_contrast']
  assert said in table.rows[0][2].text


def test_a_reason_stands_for_a_missing_estimate():
  contrast = {**FOUND['contrasts'][0], 'reason': 'not estimable: 3 planted', 'estimate': None, 'gain_planted': None,
              'gain_unplanted': None}
  table = tables_of(planted_copies.blocks_of({**FOUND, 'contrasts': [contrast]}))['planted_contrast']
  assert table.rows[0][2].text == 'Not estimable: 3 planted.' and table.records == ()


def test_the_calibration_has_a_row_for_each_embedder_and_kind():
  table = tables_of(planted_copies.blocks_of(FOUND))['planted_calibration']
  assert [(row[0].text, row[0].detail) for row in table.rows] == [
      ('crop', 'the main embedder'), ('all', 'the main embedder'), ('crop', 'hog'), ('all', 'hog')]
  assert [cell.text for cell in table.rows[0][1:]] == ['75', '80.0 %', '0.930', '0.710', '0.850', '0.150', '2.0 %']
  assert table.rows[0][7].detail == '[1.0, 5.0]'
  assert table.rows[0][2].detail == '[69.0, 88.0]' and '1.0 % have another image' in table.notes[0]
  empty = tables_of(planted_copies.blocks_of({**FOUND, 'calibration': None, 'calibrations': {}, 'contrasts': []}))
  assert empty == {}
