"""The most similar pairs on the page, and the card of leaks.json."""

import numpy as np

from clip_jax.evaluation import statistics
from clip_jax.reporting import duplicate_pairs

PAIR = {
  'query_key': 'q<1>',
  'query_file': 'b.tar',
  'pool_key': 'p',
  'pool_file': '0.tar',
  'similarity': 0.98764,
  'kind': 'near',
  'evidence': None,
  'caption': 'x' * 400,
}


def test_pairs_in_words():
  exact = PAIR | {'kind': 'exact', 'evidence': 'pixels', 'caption': None}
  (table,) = duplicate_pairs.pair_blocks('val', [exact, PAIR], 50, complete=True)
  assert [cell.text for cell in table.rows[0]] == ['q<1>', 'p', '0.9876', 'exact: equal pixels', '']
  assert table.rows[1][4].text == 'x' * duplicate_pairs.LONGEST + '\u2026'
  assert '2 of 50 pairs' in table.notes[0] and 'approximate' not in table.notes[0]
  (table,) = duplicate_pairs.pair_blocks('val', [PAIR], 1, complete=False)
  assert 'all pairs' in table.caption and 'may lack pairs' in table.notes[0]
  assert duplicate_pairs.pair_blocks('val', [], 0, complete=True) == []


def test_the_card_has_counts_rates_and_intervals():
  counts = {'pairs': 5, 'queries': 2, 'pool_rows': 4}
  none = {'pairs': 0, 'queries': 0, 'pool_rows': 0}
  lists = {'val': {'queries': 10, 'near': counts, 'exact': none, 'evidence': {}}}
  near = statistics.image_interval(np.arange(10) < 2)
  card = duplicate_pairs.card(
    lists,
    {'val': {'near': near, 'exact': None}},
    similarity=0.9,
    backend='scann',
    pool={'rows': 7},
    embedder={},
    versions={},
  )
  assert card['complete'] is False
  assert card['benchmarks']['val']['near'] == counts | {
    'rate': 0.2,
    'low': near.low,
    'high': near.high,
  }
  assert card['benchmarks']['val']['exact']['rate'] is None
