"""How much of a benchmark is in the pool: sentences, tables and cuts with the given numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

from clip_jax.reporting import benchmark_overlap, svg

EDGES = np.arange(-1000, 1001) / 1000

from looks import LOOKS


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
  """Figures have tests of their own."""
  monkeypatch.setattr(svg, 'render', lambda draw, height, title: '<svg viewBox="0 0 1 1"></svg>')


def estimate(value, low, high):
  return SimpleNamespace(value=value, low=low, high=high, method='wilson')


def rate(
  name='v2', pool=estimate(0.031, 0.029, 0.033), anchor=None, exact_pool=0, exact_anchor=None
):
  return {
    'benchmark': name,
    'queries': 1000,
    'pool': pool,
    'anchor': anchor,
    'exact_pool': exact_pool,
    'exact_anchor': exact_anchor,
  }


def over(values):
  return np.array([(np.asarray(values) > edge).sum() for edge in EDGES])


def drop(name, values):
  rows = over(values)
  return {
    'name': name,
    'rows': rows,
    'at_zero': int(rows[1000]),
    'together': name == benchmark_overlap.TOGETHER,
  }


def table(blocks, name):
  inner = [x for b in blocks for x in (b.blocks if b.kind == 'details' else [b])]
  return next(b for b in inner if b.kind == 'table' and b.name == name)


def test_the_answer_has_the_rate_with_its_interval():
  said = benchmark_overlap.sentence([rate()], 0.876, [], 0)
  assert 'similarity at least 0.876) of 3.1 % of v2 (95 % interval 2.9 to 3.3 %).' in said
  assert 'would drop' not in said
  small = benchmark_overlap.sentence([rate(pool=estimate(0.0004, 0.0002, 0.0008))], 0.9, [], 0)
  assert '0.04 % of v2 (95 % interval 0.02 to 0.08 %)' in small
  assert 'not searched yet' in benchmark_overlap.sentence([rate(pool=None)], 0.9, [], 0)


def test_the_answer_says_what_aligning_would_drop():
  drops = [
    drop('a', [0.1, 0.2, -0.1]),
    drop('b', [0.3, -0.1, -0.1]),
    drop(benchmark_overlap.TOGETHER, [0.3, 0.2, -0.1]),
  ]
  said = benchmark_overlap.sentence([rate()], 0.9, drops, 4)
  assert 'would drop 2 rows for a and 1 row for b, together 2 of 4 candidates (50.0 %).' in said
  assert 'would drop 2 rows for a, of 4 candidates' in benchmark_overlap.sentence(
    [rate()], 0.9, drops[:1], 4
  )


def test_rates_have_intervals_and_columns_that_are_known():
  blocks = benchmark_overlap.rate_blocks([rate()], 0.876)
  found = table(blocks, 'duplicate_rates')
  assert [cell.text for cell in found.rows[0]] == ['v2', '1,000', '3.1 %', '0.0 %']
  assert found.rows[0][2].detail == '[2.9, 3.3]\n31 of 1,000' and found.records[0]['pool'] == 31
  assert found.records[0]['pool_low'] == 0.029 and found.records[0]['similarity'] == 0.876
  with_anchor = table(
    benchmark_overlap.rate_blocks([rate(anchor=estimate(0.0, 0.0, 0.0038), exact_anchor=0)], 0.9),
    'duplicate_rates',
  )
  assert with_anchor.rows[0][4].text == '0.0 %' and with_anchor.rows[0][4].detail.startswith(
    '[0.00, 0.38]'
  )
  assert benchmark_overlap.rate_blocks([], 0.9) == []


def test_quantiles_are_those_of_the_finite_similarities():
  found = benchmark_overlap.quantile_table(
    [{'name': 'v2', 'anchor': None, 'pool': np.array([np.nan, *np.linspace(0, 1, 101), -np.inf])}]
  )
  assert [cell.text for cell in found.rows[0]] == ['v2', '101', '0.050', '0.500', '0.950', '1.000']
  assert found.records[0]['q95'] == pytest.approx(0.95) and found.records[0]['in'] == 'pool'


def test_slacks_count_what_is_strictly_over():
  values = [0.01, 0.0099, -0.004, 0.2]
  found = table(benchmark_overlap.slack_blocks(EDGES, [drop('a', values)], 4), 'rows_by_slack')
  counts = {r['slack']: r['dropped'] for r in found.records}
  assert counts == {s: sum(v > s for v in values) for s in benchmark_overlap.SLACKS}
  assert found.rows[0][5].tone == 'strong' and found.rows[0][5].detail == '75.0 %'


def test_nothing_over_any_threshold_is_drawn_too():
  found = table(
    benchmark_overlap.slack_blocks(EDGES, [drop('a', [-1.5, -1.5])], 2), 'rows_by_slack'
  )
  assert {r['dropped'] for r in found.records} == {0}


@pytest.mark.parametrize('seed', range(3))
def test_cuts_keep_at_least_what_they_say(seed):
  values = np.random.default_rng(seed).uniform(0.2, 0.9, 400)
  line = {'name': 'a', 'over': over(values), 'together': False}
  found = table(benchmark_overlap.size_blocks(EDGES, [line], 400, LOOKS), 'cut_by_size')
  for r in found.records:
    kept = (values <= r['cut']).mean() if r['rule'] == 'near' else (values > r['cut']).mean()
    tighter = (
      (values <= r['cut'] - 0.001).mean()
      if r['rule'] == 'near'
      else (values > r['cut'] + 0.001).mean()
    )
    assert kept >= r['keep'] > tighter


def test_cuts_of_a_pool_that_is_all_copies_stay_in_range():
  line = {'name': 'a', 'over': over(np.full(10, 1.0005)), 'together': False}
  found = table(benchmark_overlap.size_blocks(EDGES, [line], 10, LOOKS), 'cut_by_size')
  assert {r['cut'] for r in found.records} == {1.0}


def test_the_published_truncation_is_one_line_and_a_table_where_it_matters():
  one = {'benchmark': 'a', 'top_k': 20_000, 'chunk_rows': 1_000_000, 'over': 117, 'missed': 0}
  (text,) = benchmark_overlap.paper_compat_blocks([one], 60)
  assert (
    'the 20,000 nearest rows' in text.text
    and 'all 117 (row, benchmark) pairs over a threshold, of 60 candidates' in text.text
  )
  text, details = benchmark_overlap.paper_compat_blocks(
    [one, {**one, 'benchmark': 'b', 'missed': 7}], 60
  )
  assert (
    'rows over a threshold: 7 of 117 for b.' in text.text
    and details.blocks[0].rows[1][2].detail == '6.0 %'
  )
  assert benchmark_overlap.paper_compat_blocks([], 60) == []
