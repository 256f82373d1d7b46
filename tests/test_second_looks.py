"""Other embedders and the ridge preview: right numbers, and marked as what they are."""

from clip_jax.reporting import second_looks
from clip_jax.reporting.gallery import Gallery

ONE = {
  'embedder': 'hog',
  'removed_here': 117,
  'removed_there': 126,
  'jaccard': 0.5,
  'same_count_jaccard': 0.625,
  'spearman': 0.813,
  'only_here': 30,
  'only_there': 39,
  'rows_only_here': [1, 2],
  'rows_only_there': [3],
}
PREVIEW = {
  'embedder': 'hog',
  'features': 324,
  'rows': 600,
  'labelled': 480,
  'l2': 0.1,
  'benchmarks': {'val': {'n': 300, 'top1': 0.8, 'low': 0.76, 'high': 0.84, 'groups': 9, 'df': 8.0}},
}


def test_overlap_and_flips_of_each_split_and_embedder():
  blank = {**ONE, 'spearman': None}
  table, details = second_looks.sensitivity_blocks(
    {'gap': [ONE], 'near': [blank]}, {('gap', 'hog'): Gallery('', ())}
  )
  assert [cell.text for cell in table.rows[0]] == ['gap', '117', '50.0 %', '62.5 %', '+0.81', '69']
  assert table.rows[0][0].detail == 'against hog'
  heads = [cell.text for cell in table.columns]
  assert sum('(count)' in head for head in heads) == 3 and 'without an interval' in table.notes[0]
  assert table.rows[0][5].detail == '30 removed by this one only\n39 by the other only'
  assert table.rows[1][4].text == '\u2013'
  assert 'rows_only_here' not in table.records[0] and table.records[0]['only_there'] == 39
  assert 'gap: rows that hog and' in details.summary and details.blocks[0].kind == 'gallery'
  assert second_looks.sensitivity_blocks({}, {}) == []


def test_the_preview_says_that_it_is_no_training():
  text, table = second_looks.preview_blocks(
    {
      'base': {**PREVIEW, 'classes_by': {'pool': 'captions', 'val': 'labels'}},
      'gap': {**PREVIEW, 'benchmarks': {}},
    }
  )
  assert (
    text.tone == 'warning'
    and 'not CLIP training' in text.text
    and '324 frozen features' in text.text
  )
  assert (
    'embedder hog' in text.text and 'The classes of pool are read from captions.' in table.notes[0]
  )
  assert [cell.text for cell in table.rows[0]] == ['base', '80.0', '600'] and table.rows[0][
    1
  ].detail == '[76.0, 84.0]'
  assert table.rows[0][2].detail == '80.0 %' and table.rows[1][1].text == '\u2013'
  assert table.records == (
    {
      'split': 'base',
      'benchmark': 'val',
      'n': 300,
      'accuracy': 0.8,
      'low': 0.76,
      'high': 0.84,
      'groups': 9,
      'df': 8.0,
      'embedder': 'hog',
      'rows': 600,
      'labelled': 480,
      'l2': 0.1,
    },
  )
  assert table.columns[1].detail == '300 images in 9 groups\n8 df'
  assert 'Fewer than 12 groups (val: 9 groups)' in table.notes[1]
  assert second_looks.preview_blocks({}) == []
