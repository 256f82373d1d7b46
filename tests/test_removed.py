"""What a split removed: counts that add up, warnings that show, words with their uncertainty."""

from clip_jax.reporting import page
from clip_jax.reporting import removed as removed_lib
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.words import Word

ABOUT = {
  'dropped': 50,
  'candidates': 200,
  'warnings': ["95.0% of domain 'sketch' is gone: this is domain removal"],
  'queries': {
    'sketch': {'queries': 100, 'hit': 84, 'hit_share': 0.84, 'leaked': 2, 'leaked_share': 0.02}
  },
  'by_class': {
    'cat': {'candidates': 100, 'dropped': 10, 'share': 0.1},
    'dog': {'candidates': 100, 'dropped': 40, 'share': 0.4},
  },
  'by_domain': {},
  'dropped_at_slack': {'0.01': 30, '-0.01': 70, '0': 50},
  'checks': {'sketch': {'checked': 200, 'failures': 0, 'kind': 'equality'}},
}
DRAW = {
  'removed': 50,
  'drawn': 48,
  'shortfall': 2,
  'without_full_cell_donor': 0.1,
  'random_without_full_cell_donor': 0.05,
  'no_matched_control': False,
  'standardised_differences': {'caption_length': 0.02, 'image_pixels': 0.3, 'domain': None},
  'differences_before': {'caption_length': 0.5, 'image_pixels': 0.4, 'domain': 1.2},
}


def removed(about=None, captions=None, controls=None, gallery=None):
  return removed_lib.blocks_of(
    {**ABOUT, **(about or {})},
    name='gap',
    words='aligned to sketch',
    gallery=gallery,
    captions=captions,
    controls=controls or {},
  )


def texts(blocks, tone=None):
  return [b.text for b in blocks if b.kind == 'text' and tone in (None, b.tone)]


def tables_of(blocks):
  section = page.Section('s', '', '', tuple(blocks))
  return {b.name: b for b in page.blocks([section], 'table')}


def test_numbers_and_hits_are_said():
  said = ' '.join(texts(removed()))
  assert '50 of 200 candidates are removed (25.0 %)' in said
  assert '84 of 100 queries (84.0 %) lose' in said and '2 queries (2.0 %) already' in said
  assert 'each of 200 queries of sketch' in said and 'equals that to the anchor' in said


def test_warnings_are_warnings():
  assert texts(removed(), 'warning') == [
    "95.0% of domain 'sketch' is gone: this is domain removal."
  ]


def test_a_failed_check_is_a_warning_and_a_missing_one_is_said():
  failed = removed({'checks': {'sketch': {'checked': 200, 'failures': 3, 'kind': 'equality'}}})
  assert any(
    'differs from the anchor\u2019s for 3 of 200' in text for text in texts(failed, 'warning')
  )
  assert any(
    'does not exceed' in text
    for text in texts(
      removed({'checks': {'sketch': {'checked': 9, 'failures': 0, 'kind': 'inequality'}}})
    )
  )
  assert any(
    'does not exceed that to the anchor by more than the slack, +0.1130' in text
    for text in texts(
      removed(
        {'checks': {'sketch': {'checked': 9, 'failures': 0, 'kind': 'inequality'}}, 'slack': 0.113}
      )
    )
  )
  assert any(
    'the j-th nearest pool image of the split is not nearer' in text
    for text in texts(
      removed({'checks': {'sketch': {'checked': 9, 'failures': 0, 'kind': 'each of k'}}})
    )
  )
  assert any(
    'not checked' in text for text in texts(removed({'checks': {'sketch': {'checked': 0}}}))
  )


def test_classes_are_ordered_by_what_they_lose_and_slacks_by_size():
  found = tables_of(removed())
  assert [row[0].text for row in found['removed_by_class_gap'].rows] == ['dog', 'cat']
  assert found['removed_by_class_gap'].rows[0][3].text == '40.0 %'
  assert [row[0].text for row in found['slack_gap'].rows] == ['\u22120.01', '0', '+0.01']
  assert 'another rounding' in found['slack_gap'].notes[0]
  assert 'removed_by_domain_gap' not in found


def test_words_have_intervals_and_images_are_shown_where_they_are_known():
  word = Word('sketch', 0.8, 0.1, 12.34, 5.06, 30.2, 5.5)
  captions = {'removed': [word], 'kept': [], 'read_removed': 50, 'read_kept': 2000}
  blocks = removed(captions=captions, gallery=Gallery('', ()))
  table = tables_of(blocks)['words_gap']
  assert [cell.text for cell in table.rows[0]] == ['sketch', '80.0 %', '10.0 %', '\u00d7 12']
  assert table.rows[0][3].detail == '[5.06, 30]' and table.records[0]['z'] == 5.5
  assert any(b.kind == 'gallery' for b in blocks) and 'words_gap_kept' not in tables_of(blocks)
  none = removed(captions={**captions, 'removed': []})
  assert any(
    'No word distinguishes' in text and '50 removed and 2,000' in text for text in texts(none)
  )
  assert 'words_gap' not in tables_of(removed())


def test_what_a_rule_found_where_it_cuts_is_said():
  first = lambda **about: texts(removed(about))[0]
  draw = lambda **found: {'draws': {'rows': found}}
  assert 'a similarity of 0.912.' in first(**draw(similarity_at_cut=0.9123))
  said = first(**draw(slack=0.0144, aligned_dropped=100), parameters={'dose': 0.5})
  assert 'The slack is +0.0144. This is 50.0 % of the 100 rows that slack 0 removes.' in said
  assert 'slack' not in first(**draw(slack=0.0, aligned_dropped=50), parameters={'slack': 0.0})
  assert 'For 7 queries, more rows are removed' in first(**draw(denser_queries=7))
  said = first(**draw(dropped_by_value={'sketch': 41, 'toon': 9}, without_value=3))
  assert 'sketch: 41 rows. toon: 9 rows. 3 candidates have no value and are kept.' in said


def test_balance_of_the_control_is_shown():
  about = {'domains': '16 k-means clusters of the embeddings', 'draws': {'rows-seed0': DRAW}}
  blocks = removed(controls={'like_gap': about})
  assert any('removes 48 other rows in place of the 50' in text for text in texts(blocks))
  table = tables_of(blocks)['balance_like_gap']
  assert table.rows[2][0].text == 'domain (16 k-means clusters of the embeddings)'
  assert [row[2].tone for row in table.rows] == ['', 'bad', 'bad']
  assert [row[1].text for row in table.rows] == ['+0.500', '+0.400', '+1.200']
  assert [row[2].text for row in table.rows] == ['+0.020', '+0.300', '\u2013']
  assert 'the classes of the anchor have no names' in table.notes[1]


def test_of_several_draws_the_largest_difference_is_shown():
  other = {**DRAW, 'standardised_differences': {**DRAW['standardised_differences']}}
  first = next(iter(other['standardised_differences']))
  other['standardised_differences'][first] = -0.5
  about = {'draws': {'rows-seed0': DRAW, 'rows-seed1': other}}
  table = tables_of(removed(controls={'like_gap': about}))['balance_like_gap']
  assert [row[2].text for row in table.rows] == ['\u22120.500', '+0.300', '\u2013']
  assert table.notes[0].endswith('Of the 2 draws, one for each seed, the largest.')


def test_the_balance_is_drawn_before_and_after_matching():
  blocks = removed(controls={'like_gap': {'draws': {'rows-seed0': DRAW}}})
  (figure,) = next(b for b in blocks if b.kind == 'figures').items
  assert figure.name == 'balance_like_gap' and 'domain, against all candidates: 1.200' in figure.svg
  assert 'image size, against matched rows: 0.300' in figure.svg
  older = {key: value for key, value in DRAW.items() if key != 'differences_before'}
  blocks = removed(controls={'like_gap': {'draws': {'rows-seed0': older}}})
  (figure,) = next(b for b in blocks if b.kind == 'figures').items
  assert 'against matched rows' in figure.svg and 'against all candidates' not in figure.svg


def test_a_balance_names_the_variables_that_are_not_known():
  draw = {**DRAW, 'standardised_differences': {'caption_length': 0.02, 'caption_names_class': 0.0}}
  table = tables_of(removed(controls={'like_gap': {'draws': {'rows-seed0': draw}}}))
  assert table['balance_like_gap'].notes[1:] == (
    'No domain is known, so it is not among the variables.',
  )


def test_a_control_without_donors_is_said_not_to_exist():
  draw = {**DRAW, 'no_matched_control': True, 'without_full_cell_donor': 0.5}
  blocks = removed(controls={'like_gap': {'draws': {'rows-seed0': draw}}})
  assert any(
    text.startswith('No matched control exists: 50.0 %') for text in texts(blocks, 'warning')
  )
