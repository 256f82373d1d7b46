"""reporting/collateral.py: a row for each pair of splits, own benchmarks marked, budgets named."""

import numpy as np

from clip_jax.evaluation.statistics import Estimate
from clip_jax.reporting import collateral


def estimate(value, method='crossed', seeds=3, groups=100):
  return Estimate(value, value - 0.02, value + 0.02, 0.01, 2.5, np.nan, seeds, 100, groups, method)


def item(split='pruned', against='base', own=('sketch',), budgets=('samples', 'samples'), **values):
  return {
    'split': split,
    'shown': split,
    'rule': 'gap_aligned',
    'against': against,
    'budgets': list(budgets),
    'own': own,
    'differences': {name: estimate(value) for name, value in values.items()},
  }


def test_every_benchmark_is_a_column_and_own_ones_are_bold():
  items = [item(sketch=-0.1, val=0.0), item('near', 'random', ('val',), val=-0.05)]
  (table,) = collateral.blocks_of(items, ['val', 'sketch', 'unused'])
  assert [cell.text for cell in table.columns] == ['split', 'val', 'sketch']
  first, second = table.rows
  assert (first[0].text, first[0].detail) == ('pruned', 'minus base')
  assert first[2].text == '\u221210.0' and first[2].detail == '[\u221212.0, \u22128.0]'
  assert [cell.tone for cell in first] == ['', '', 'strong']
  assert [cell.tone for cell in second] == ['', 'strong', 'muted']
  record = table.records[0]
  assert (record['benchmark'], record['value'], record['own_benchmark']) == ('sketch', -0.1, True)
  assert '3 seeds. val: 100 images, ungrouped, 2.5 df; sketch' in table.notes[1]
  assert 'support no claim' in table.notes[0] and len(table.notes) == 2


def test_notes_on_seeds_groups_and_budgets():
  odd = item(budgets=('epochs', 'samples'), sketch=-0.1)
  odd['differences']['val'] = estimate(0.1, 'range', 2, groups=6)
  one = item('far', sketch=-0.1)
  one['differences']['sketch'] = estimate(0.1, 'this checkpoint', 1)
  (table,) = collateral.blocks_of([odd, one], ['val', 'sketch'])
  text = ' '.join(table.notes)
  assert '1 to 3 seeds' in text and 'Two seeds' in text and 'One seed' in text
  assert 'equal passes against equal samples: pruned minus base.' in text
  assert 'Fewer than 12 groups (val: 6 groups)' in text


def test_nothing_to_compare_is_no_table():
  assert collateral.blocks_of([], ['val']) == []
