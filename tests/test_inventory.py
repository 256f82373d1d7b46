"""Sections on the data: counts that add up, warnings that show, lists that are cut and say so."""

import numpy as np

from clip_jax.reporting import inventory
from clip_jax.reporting.gallery import Gallery

ABOUT = {
    'dropped': 50, 'candidates': 200,
    'warnings': ["95.0% of domain 'sketch' is gone: this is domain removal"], 'queries': {
        'sketch': {'queries': 100, 'hit': 84, 'hit_share': 0.84, 'leaked': 2, 'leaked_share': 0.02}
    }, 'by_class': {
        'cat': {'candidates': 100, 'dropped': 10, 'share': 0.1},
        'dog': {'candidates': 100, 'dropped': 40, 'share': 0.4}
    }, 'by_domain': {}, 'dropped_at_slack': {'0.01': 30, '-0.01': 70, '0': 50},
    'checks': {'sketch': {'checked': 200, 'failures': 0, 'kind': 'equality'}}
}
DRAW = {
    'removed': 50, 'drawn': 48, 'shortfall': 2, 'without_full_cell_donor': 0.1,
    'no_matched_control': False,
    'standardised_differences': {'caption_length': 0.02, 'image_pixels': 0.3, 'domain': None}
}


def removed(about=None, words=(), controls=None, gallery=None):
  return inventory.removed_blocks({**ABOUT, **(about or {})}, name='gap', benchmarks=('sketch',),
                                  gallery=gallery, words=list(words), controls=controls or {})


def texts(blocks, tone=None):
  return [b.text for b in blocks if b.kind == 'text' and tone in (None, b.tone)]


def tables_of(blocks):
  inner = [x for b in blocks for x in (b.blocks if b.kind in ('columns', 'details') else [b])]
  return {b.name: b for b in inner if b.kind == 'table'}


def test_numbers_and_hits_are_said():
  said = ' '.join(texts(removed()))
  assert '50 of 200 candidates are removed (25.0 %)' in said
  assert '84 of 100 queries (84.0 %) lose' in said and '2 (2.0 %) already' in said
  assert 'equals the anchor\u2019s for every one' in said


def test_warnings_are_warnings():
  assert texts(removed(),
               'warning') == ["95.0% of domain 'sketch' is gone: this is domain removal."]


def test_a_failed_check_is_a_warning_and_a_missing_one_is_said():
  failed = removed({'checks': {'sketch': {'checked': 200, 'failures': 3, 'kind': 'equality'}}})
  assert any(
      'differs from the anchor\u2019s for 3 of 200' in text for text in texts(failed, 'warning'))
  assert any('does not exceed' in text for text in texts(
      removed({'checks': {'sketch': {'checked': 9, 'failures': 0, 'kind': 'inequality'}}})))
  assert any(
      'not checked' in text for text in texts(removed({'checks': {'sketch': {'checked': 0}}})))


def test_classes_are_ordered_by_what_they_lose_and_slacks_by_size():
  found = tables_of(removed())
  assert [row[0].text for row in found['removed_by_class_gap'].rows] == ['dog', 'cat']
  assert found['removed_by_class_gap'].rows[0][3].text == '40.0 %'
  assert [row[0].text for row in found['slack_gap'].rows] == ['\u22120.01', '0', '+0.01']
  assert 'fragile' in found['slack_gap'].notes[0]
  assert 'removed_by_domain_gap' not in found


def test_words_and_images_are_shown_where_they_are_known():
  blocks = removed(words=[('sketch', 0.8, 0.1)], gallery=Gallery('', ()))
  assert 'words_gap' in tables_of(blocks) and any(b.kind == 'gallery' for b in blocks)
  assert 'words_gap' not in tables_of(removed())


def test_balance_of_the_control_is_shown():
  blocks = removed(controls={'like_gap': {'draws': {'rows-seed0': DRAW}}})
  assert any('removes 48 other rows in place of 50' in text for text in texts(blocks))
  rows = tables_of(blocks)['balance_like_gap'].rows
  assert [row[1].tone for row in rows] == ['', 'bad', 'bad']
  assert [row[1].text for row in rows] == ['+0.020', '+0.300', '\u2013']


def test_a_control_without_donors_is_said_not_to_exist():
  draw = {**DRAW, 'no_matched_control': True, 'without_full_cell_donor': 0.5}
  blocks = removed(controls={'like_gap': {'draws': {'rows-seed0': draw}}})
  assert any(
      text.startswith('No matched control exists: 50.0 %') for text in texts(blocks, 'warning'))


def test_duplicates_of_pool_and_queries():
  blocks = inventory.duplicate_blocks(
      {'usable': 200, 'duplicates': 5, 'clusters': 1, 'threshold': 0.124},
      [{'kind': 'exact', 'planted': 4, 'found': 3}], [{
          'benchmark': 'v2', 'queries': 100, 'pool': 3, 'anchor': None, 'exact_pool': 0,
          'exact_anchor': None
      }], 0.876)
  assert '5 of 200' in blocks[0].text and 'over 0.876 inside one of 1 cluster.' in blocks[0].text
  found = tables_of(blocks)
  assert [cell.text for cell in found['planted_duplicates'].rows[0]
         ] == ['exact', '4', '3', '75.0 %']
  assert [cell.text for cell in found['duplicate_rates'].rows[0]
         ] == ['v2', '100', '3.0 %', '0.0 %', '\u2013', '\u2013']
  assert found['duplicate_rates'].records[0]['pool'] == 3
  assert inventory.duplicate_blocks(None, [], [], 0.9) == []


def test_skipped_lists_are_cut_on_the_page_and_whole_in_the_records():
  lost = [{'key': str(i), 'reason': 'no caption' if i % 2 else 'bad json'} for i in range(50)]
  blocks = inventory.skipped_blocks(
      [{'name': 'pool', 'rows': 900, 'skipped': lost, 'unreadable': ['k']},
       {'name': 'val', 'rows': 10, 'skipped': [], 'unreadable': None}],
      {'base/seed0': 2, 'gap/seed0': 0})
  table, listed = blocks[0], blocks[1].blocks[0]
  assert [cell.text for cell in table.rows[0]
         ] == ['pool', '900', '50', '25 bad json, 25 no caption', '1']
  assert table.rows[1][4].text == '\u2013'
  assert len(table.records) == 51 and len(
      listed.rows) == 40 and listed.notes == ('11 more in skipped.csv.',)
  assert blocks[2].text.endswith('base/seed0: 2.')


def test_nothing_skipped_lists_nothing():
  blocks = inventory.skipped_blocks([{'name': 'pool', 'rows': 9, 'skipped': [], 'unreadable': []}],
                                    {})
  assert len(blocks) == 1 and blocks[0].records == ()


def test_overlap_is_by_row():
  table, = inventory.overlap_blocks(['a', 'b'], np.array([[1, 0.5], [1.0, 1]]))
  assert [cell.text for cell in table.rows[0]] == ['a', '100', '50']


def test_provenance_has_times_versions_and_runs():
  run = {
      'run': 'base/seed0', 'samples': 25600, 'passes': 28.0, 'steps': 400, 'seconds': None,
      'images_per_sec': 2500.0, 'mark': 'not finished'
  }
  blocks = inventory.provenance_blocks([('Command', 'python')],
                                       [{'stage': 'train', 'seconds': 1265.0}], {'jax': '0.10'},
                                       [run])
  found = tables_of(blocks)
  assert found['wall_clock'].rows[0][1].text == '21 min 5 s'
  assert [cell.text for cell in found['training'].rows[0]] == [
      'base/seed0', '25,600', '28', '400', '\u2013', '2,500']
  assert found['training'].rows[0][0].detail == 'not finished'
  assert found['versions'].records == ({'what': 'jax', 'value': '0.10'},)
  assert len(inventory.provenance_blocks([('Command', 'python')], [], {}, [])) == 1
