"""Sections on the data: counts that add up, warnings that show, lists that are cut and say so."""

import numpy as np

from clip_jax.reporting import inventory


def texts(blocks, tone=None):
  return [b.text for b in blocks if b.kind == 'text' and tone in (None, b.tone)]


def tables_of(blocks):
  inner = [x for b in blocks for x in (b.blocks if b.kind in ('columns', 'details') else [b])]
  return {b.name: b for b in inner if b.kind == 'table'}


def test_deduplication_says_which_row_stays():
  dedup = {
    'usable': 200,
    'duplicates': 5,
    'clusters': 1,
    'threshold': 0.124,
    'survivor': 'first',
    'embedder': '',
  }
  blocks = inventory.dedup_blocks(
    dedup,
    [{'kind': 'exact', 'planted': 4, 'found': 3, 'recall': 0.75, 'low': 0.3, 'high': 0.95}],
    None,
  )
  assert '5 of 200' in blocks[0].text and 'over 0.876 within one of 1 cluster.' in blocks[0].text
  assert 'the first row in pool order is kept' in blocks[0].text
  found = tables_of(blocks)
  assert [cell.text for cell in found['planted_duplicates'].rows[0]] == [
    'exact',
    '4',
    '3',
    '75.0 %',
  ]
  assert found['planted_duplicates'].rows[0][3].detail == '[30.0, 95.0]'
  other = inventory.dedup_blocks({**dedup, 'survivor': 'longest', 'embedder': 'b16'}, [], None)[0]
  assert (
    'of the embedder b16 over 0.876' in other.text and 'the longest caption is kept' in other.text
  )
  assert inventory.dedup_blocks(None, [], None) == []


def test_the_audit_of_deduplication_has_recall_with_intervals_and_chains():
  audit = {
    'rows': 500,
    'threshold': 0.1,
    'pairs': 40,
    'dropped_exhaustive': 30,
    'by_clusters': [
      {
        'clusters': 1,
        'found': 40,
        'recall': 1.0,
        'low': 0.912,
        'high': 1.0,
        'dropped': 30,
        'precision': 1.0,
      },
      {
        'clusters': 9,
        'found': 30,
        'recall': 0.75,
        'low': 0.598,
        'high': 0.858,
        'dropped': 25,
        'precision': None,
      },
    ],
    'chains': {'components': 25, 'largest': 4, 'through_dropped': 2, 'sizes': {'10': 1, '2': 24}},
  }
  blocks = inventory.dedup_blocks(None, [], audit)
  table = tables_of(blocks)['dedup_audit']
  assert [cell.text for cell in table.rows[1]] == ['9', '30', '75.0 %', '25', '\u2013']
  assert [row[0].detail for row in table.rows] == ['', 'as de-duplicated']
  assert table.rows[1][2].detail == '[59.8, 85.8]' and 'marks 30 of the' in table.notes[0]
  assert 'the largest has 4 rows. 2 of the sampled rows are marked' in texts(blocks)[0]
  assert [row[0].text for row in tables_of(blocks)['dedup_chains'].rows] == ['2', '10']
  (figure,) = (f for b in blocks if b.kind == 'figures' for f in b.items)
  assert figure.name == 'dedup_recall'
  lone = inventory.dedup_blocks(None, [], {**audit, 'by_clusters': audit['by_clusters'][:1]})
  assert not any(b.kind == 'figures' for b in lone)  # a curve needs two points


def test_skipped_lists_are_cut_on_the_page_and_whole_in_the_records():
  lost = [{'key': str(i), 'reason': 'no caption' if i % 2 else 'bad json'} for i in range(50)]
  blocks = inventory.skipped_blocks(
    [
      {'name': 'pool', 'rows': 900, 'skipped': lost, 'unreadable': ['k']},
      {'name': 'val', 'rows': 10, 'skipped': [], 'unreadable': None},
    ],
    {'base/seed0': 2, 'gap/seed0': 0},
  )
  table, listed = blocks[0], blocks[1].blocks[0]
  assert [cell.text for cell in table.rows[0]] == [
    'pool',
    '900',
    '50',
    'bad json: 25, no caption: 25',
    '1',
  ]
  assert table.rows[1][4].text == '\u2013'
  assert (
    len(table.records) == 51
    and len(listed.rows) == 40
    and listed.notes == ('11 more in skipped.csv.',)
  )
  assert blocks[2].text.endswith('base/seed0: 2.')


def test_nothing_skipped_lists_nothing():
  blocks = inventory.skipped_blocks(
    [{'name': 'pool', 'rows': 9, 'skipped': [], 'unreadable': []}], {}
  )
  assert len(blocks) == 1 and blocks[0].records == ()


def test_overlap_is_by_row():
  (table,) = inventory.overlap_blocks(['a', 'b'], np.array([[1, 0.5], [1.0, 1]]))
  assert [cell.text for cell in table.rows[0]] == ['a', '100', '50']


def test_provenance_has_times_versions_and_runs():
  run = {
    'run': 'base/seed0',
    'samples': 25600,
    'passes': 28.0,
    'steps': 400,
    'seconds': None,
    'images_per_sec': 2500.0,
    'mark': 'not finished',
  }
  blocks = inventory.provenance_blocks(
    [('Command', 'python')], [{'stage': 'train', 'seconds': 1265.0}], {'jax': '0.10'}, [run]
  )
  found = tables_of(blocks)
  assert found['wall_clock'].rows[0][1].text == '21 min 5 s'
  assert [cell.text for cell in found['training'].rows[0]] == [
    'base/seed0',
    '25,600',
    '28',
    '400',
    '\u2013',
    '2,500',
  ]
  assert found['training'].rows[0][0].detail == 'not finished'
  assert found['versions'].records == ({'what': 'jax', 'value': '0.10'},)
  assert len(inventory.provenance_blocks([('Command', 'python')], [], {}, [])) == 1
