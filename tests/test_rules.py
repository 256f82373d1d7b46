"""The rules against their definition in plain Python, on exact similarities full of ties."""

import inspect
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.pruning import cells, rules

NAMES = ('sketch', 'val')
seeds = st.integers(0, 2**32 - 1)


def make_world(seed, n=40, queries=3, noise=4e-6, levels=2):
  """Returns columns whose float32 values are off by up to `noise`, and the exact numbers.

  Exact similarities lie on a coarse grid plus a few parts in 10^9: many exact ties, and many
  near-ties that float32 cannot tell apart.
  """
  rng = np.random.default_rng(seed)
  exact = {
      name: rng.integers(0, 4, [n, queries]) / 4 + rng.integers(0, 3, [n, queries]) * 1e-9
      for name in NAMES}
  t = {name: rng.integers(1, 4, queries) / 4 + 1e-9 for name in NAMES}
  highest = {name: exact[name].max(axis=1) for name in NAMES}
  excess = {name: (exact[name] - t[name]).max(axis=1) for name in NAMES}

  def blurred(values):
    return (values + rng.uniform(-noise, noise, n)).astype(np.float32)

  columns = rules.Columns(
      candidates=rng.random(n) < 0.8,
      similarity={name: blurred(highest[name]) for name in NAMES},
      excess={name: blurred(excess[name]) for name in NAMES},
      exact_similarity=lambda names, rows: np.max([highest[b][rows] for b in names], axis=0),
      exact_excess=lambda names, rows: np.max([excess[b][rows] for b in names], axis=0),
      anchor_class=rng.integers(0, 2, n).astype(np.int32),
      anchor_class_similarity=(rng.integers(0, levels, n) / 9).astype(np.float32),
      caption_length=rng.integers(0, levels, n).astype(np.int32),
      image_pixels=rng.integers(0, levels, n) * 1000,
      domain=np.array(['sketch', None], object)[rng.integers(0, 2, n)])
  return columns, exact, t


def candidate_list(columns):
  return [row for row, usable in enumerate(columns.candidates) if usable]


some_names = st.sampled_from([('sketch',), ('val',), NAMES])


@given(seeds, some_names, st.sampled_from([-0.25, 0.0, 1e-9, 0.25]))
def test_gap_aligned_drops_what_is_strictly_over_for_any_query(seed, names, slack):
  columns, exact, t = make_world(seed)
  kept = []
  for row in candidate_list(columns):
    over = [exact[name][row, i] - t[name][i] > slack for name in names for i in range(3)]
    if not any(over):
      kept.append(row)
  result = rules.gap_aligned(columns, benchmarks=names, slack=slack)
  assert result.rows.tolist() == kept
  assert result.rows.dtype == np.int64
  dropped = rules.dropped_rows(columns, benchmarks=names, slack=slack)
  assert sorted(kept + dropped.tolist()) == candidate_list(columns)


@given(seeds)
def test_combined_is_the_union_of_drops(seed):
  columns, _, _ = make_world(seed)
  one, two, both = (
      set(rules.dropped_rows(columns, benchmarks=names).tolist())
      for names in (('sketch',), ('val',), NAMES))
  assert both == one | two


@given(seeds, some_names, st.floats(0, 1))
def test_near_and_far_keep_the_extremes_ties_by_pool_order(seed, names, share):
  columns, exact, _ = make_world(seed)
  rows = candidate_list(columns)
  count = math.floor(share * len(rows) + 0.5)
  similarity = {row: max(exact[name][row, i] for name in names for i in range(3)) for row in rows}
  lowest = sorted(rows, key=lambda row: (similarity[row], row))[:count]
  highest = sorted(rows, key=lambda row: (-similarity[row], row))[:count]
  near = rules.near(columns, benchmarks=names, count=count).rows
  far = rules.far(columns, benchmarks=names, count=count).rows
  assert near.tolist() == sorted(lowest)
  assert far.tolist() == sorted(highest)
  assert near.dtype == far.dtype == np.int64


def test_float32_alone_would_decide_wrongly():
  exact = np.array([0.0, 1e-9, -1e-9])
  columns = rules.Columns(
      candidates=np.ones(3, bool),
      similarity={'val': np.array([3e-7, 2e-7, 1e-7], np.float32)},
      excess={'val': np.array([3e-7, -2e-7, 2e-7], np.float32)},
      exact_similarity=lambda names, rows: exact[rows],
      exact_excess=lambda names, rows: exact[rows])
  assert rules.gap_aligned(columns, benchmarks=('val',)).rows.tolist() == [0, 2]
  assert rules.near(columns, benchmarks=('val',), count=2).rows.tolist() == [0, 2]
  assert rules.far(columns, benchmarks=('val',), count=1).rows.tolist() == [1]


def test_only_rows_near_the_cut_are_decided_exactly():
  asked = []

  def exact(names, rows):
    asked.extend(rows.tolist())
    return columns.similarity['val'][rows].astype(np.float64)

  values = np.array([0.1, 0.5, 0.500004, 0.9, 0.500004], np.float32)
  columns = rules.Columns(
      np.array([1, 1, 1, 1, 0], bool), {'val': values}, {'val': values - np.float32(0.5)},
      exact, lambda names, rows: exact(names, rows) - 0.5)
  assert rules.near(columns, benchmarks=('val',), count=2).report['decided_exactly'] == 2
  assert asked == [1, 2]
  asked.clear()
  assert rules.gap_aligned(columns, benchmarks=('val',)).rows.tolist() == [0, 1]
  assert asked == [1, 2]


def test_a_cut_without_exact_similarities_says_what_is_missing():
  columns = rules.Columns(np.ones(2, bool), {'val': np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match='exact_similarity'):
    rules.near(columns, benchmarks=('val',), count=1)


def test_sizes():
  assert [rules.count_of(size, 10) for size in (0.25, 0.24, 1, 1.0, 7, 7.0, 400)] == [
      3, 2, 10, 10, 7, 7, 400]
  assert rules.count_of(0.5, 0) == 0
  for size in (0, 0.0, -1, 1.5, math.nan, math.inf):
    with pytest.raises(ConfigError, match='size='):
      rules.count_of(size, 10)


@pytest.mark.parametrize('rule', ['near', 'far', 'random'])
def test_a_size_above_the_candidates_names_both_numbers(rule):
  columns, _, _ = make_world(0)
  parameters = {'seed': 0} if rule == 'random' else {'benchmarks': NAMES}
  available = len(candidate_list(columns))
  everything = rules.RULES[rule].keep(columns, count=available, **parameters)
  assert everything.rows.tolist() == candidate_list(columns)
  assert len(rules.RULES[rule].keep(columns, count=0, **parameters).rows) == 0
  with pytest.raises(ConfigError, match=rf'{available + 1} .* {available} '):
    rules.RULES[rule].keep(columns, count=available + 1, **parameters)


def test_all_and_anchor():
  columns, _, _ = make_world(1)
  assert rules.keep_all(columns).rows.tolist() == candidate_list(columns)
  assert rules.keep_none(columns).rows.tolist() == []
  assert rules.keep_none(columns).rows.dtype == np.int64


def test_unknown_similarities_are_errors():
  columns, _, _ = make_world(2)
  nan = {name: np.full(40, np.nan, np.float32) for name in NAMES}
  no_anchor = rules.Columns(columns.candidates, columns.similarity, nan)
  with pytest.raises(InputError, match="'gap_aligned' needs an anchor"):
    rules.gap_aligned(no_anchor, benchmarks=('val',))
  half = {'val': np.where(np.arange(40) % 2, np.nan, 1).astype(np.float32), 'sketch': nan['sketch']}
  with pytest.raises(InputError, match="'gap_aligned' needs search.backend='exact'"):
    rules.gap_aligned(rules.Columns(columns.candidates, half, half), benchmarks=('val',))
  one = {'val': np.ones(40, np.float32), 'sketch': nan['sketch']}  # known for one of two
  with pytest.raises(InputError, match="'gap_aligned' needs"):
    rules.gap_aligned(rules.Columns(columns.candidates, one, one), benchmarks=('val', 'sketch'))
  for rule in (rules.near, rules.far):
    for similarity, names in ((half, ('val',)), (one, ('val', 'sketch'))):
      with pytest.raises(InputError, match="search.backend='exact'"):
        rule(rules.Columns(columns.candidates, similarity), benchmarks=names, count=1)
    with pytest.raises(InputError, match="'oil'.*sketch.*val"):
      rule(columns, benchmarks=('val', 'oil'), count=1)
    with pytest.raises(ConfigError, match='benchmarks='):
      rule(columns, benchmarks=(), count=1)


def test_gap_aligned_of_an_approximate_search_keeps_and_counts_what_was_not_scored():
  nan = np.nan
  columns = rules.Columns(
      np.ones(5, bool),
      excess={'val': np.array([nan, 0.5, -0.5, nan, nan], np.float32),
              'sketch': np.array([nan, nan, 0.5, -0.5, nan], np.float32)},
      recall=0.9)
  result = rules.gap_aligned(columns, benchmarks=('val', 'sketch'))
  assert result.rows.tolist() == [0, 3, 4]
  assert result.report == {'decided_exactly': 0, 'recall': 0.9, 'unscored': 2}


def test_random_is_pure_nested_and_uniform():
  columns, _, _ = make_world(3)
  rows = candidate_list(columns)
  counts = Counter()
  for draw in range(600):
    small = rules.random(columns, count=8, seed=5, draw=draw).rows.tolist()
    assert small == rules.random(columns, count=8, seed=5, draw=draw).rows.tolist()
    assert len(set(small)) == 8 and small == sorted(small) and set(small) <= set(rows)
    assert set(small) <= set(rules.random(columns, count=12, seed=5, draw=draw).rows.tolist())
    counts.update(small)
  expected = 600 * 8 / len(rows)
  chi2 = sum((counts[row] - expected) ** 2 / expected for row in rows)
  assert chi2 < len(rows) + 5 * math.sqrt(2 * len(rows))
  assert rules.random(columns, count=8, seed=6).rows.tolist() != rules.random(
      columns, count=8, seed=5).rows.tolist()


def test_random_does_not_change_between_releases():
  columns = rules.Columns(np.ones(20, bool))
  assert rules.random(columns, count=5, seed=0, draw=1).rows.tolist() == [1, 2, 4, 17, 18]


def python_bins(values, bins):
  ordered = sorted(values)
  edges = [ordered[math.ceil(len(values) * j / bins) - 1] for j in range(1, bins)]
  return [sum(value > edge for edge in edges) for value in values]


def python_matched(columns, removed, order):
  """Returns the rows drawn and how many at each stage, by the words of the definition."""
  rows = candidate_list(columns)
  similarity = python_bins([columns.anchor_class_similarity[row] for row in rows], 5)
  caption = python_bins([columns.caption_length[row] for row in rows], 5)
  pixels = python_bins([columns.image_pixels[row] for row in rows], 3)
  cell = {
      row: (columns.anchor_class[row], columns.domain[row], similarity[i], caption[i], pixels[i])
      for i, row in enumerate(rows)}
  waiting, drawn, served = set(removed), [], []
  for kept_digits in (5, 4, 3, 2, 1):
    members = defaultdict(list)
    for row in sorted(set(rows) - set(removed) - set(drawn), key=lambda row: order[row]):
      members[cell[row][:kept_digits]].append(row)
    before = len(drawn)
    for row in sorted(waiting):
      donors = members[cell[row][:kept_digits]]
      if donors:
        drawn.append(donors.pop(0))
        waiting.remove(row)
    served.append(len(drawn) - before)
  return sorted(drawn), served


@settings(max_examples=150)
@given(seeds, st.floats(0.02, 0.5), st.integers(0, 3), st.integers(1, 5))
def test_matched_is_its_definition(seed, share, draw, levels):
  columns, _, _ = make_world(seed, n=120, levels=levels)
  rows = candidate_list(columns)
  rng = np.random.default_rng(seed)
  removed = np.sort(rng.choice(rows, int(share * len(rows)), replace=False))
  order = rules._random_order(120, 7, draw, rules.MATCHED_STREAM)
  drawn, served = python_matched(columns, removed.tolist(), order)
  result = rules.matched(columns, removed=removed, seed=7, draw=draw)
  report = result.report
  assert report['removed'] == len(removed)
  assert report['drawn'] == len(drawn)
  assert report['shortfall'] == len(removed) - len(drawn)
  assert list(report['drawn_after_merging']) == [
      'image_pixels', 'caption_length', 'anchor_class_similarity', 'domain']
  assert list(report['drawn_after_merging'].values()) == served[1:]
  unmatched = 1 - served[0] / len(removed) if len(removed) else 0.0
  assert report['without_full_cell_donor'] == unmatched
  assert report['no_matched_control'] == (unmatched > 0.2)
  if unmatched > 0.2:
    kept = rules.random(columns, count=len(rows) - len(removed), seed=7, draw=draw).rows.tolist()
  else:
    kept = sorted(set(rows) - set(drawn))
    assert set(removed.tolist()) <= set(kept)
  assert result.rows.tolist() == kept
  gone = sorted(set(rows) - set(kept))
  if len(removed) and gone:
    a, b = columns.caption_length[removed].astype(float), columns.caption_length[gone].astype(float)
    spread = math.sqrt((a.var() + b.var()) / 2)
    got = report['standardised_differences']['caption_length']
    if spread > 0:
      assert got == pytest.approx((a.mean() - b.mean()) / spread, abs=1e-12)


def big_columns(n=4000, domain=True):
  rng = np.random.default_rng(0)
  return rules.Columns(
      candidates=np.ones(n, bool),
      anchor_class=rng.integers(0, 3, n).astype(np.int32),
      anchor_class_similarity=rng.random(n).astype(np.float32),
      caption_length=rng.integers(1, 80, n).astype(np.int32),
      image_pixels=rng.integers(1, 10**6, n),
      domain=rng.integers(0, 2, n) if domain else None)


def test_matched_resembles_what_was_removed_and_random_does_not():
  columns = big_columns()
  odds = (columns.anchor_class == 1) * (0.05 + 0.3 * columns.anchor_class_similarity)
  removed = np.flatnonzero(np.random.default_rng(1).random(4000) < odds)
  result = rules.matched(columns, removed=removed, seed=0)
  report = result.report
  assert not report['no_matched_control'] and report['without_full_cell_donor'] < 0.2
  assert len(result.rows) == 4000 - len(removed) and report['shortfall'] == 0
  differences = report['standardised_differences']
  assert set(differences) == {
      'anchor_class', 'domain', 'anchor_class_similarity', 'caption_length', 'image_pixels'}
  assert differences['anchor_class'] == 0
  assert max(abs(value) for value in differences.values()) < 0.1
  drawn = np.setdiff1d(np.arange(4000), result.rows)
  assert not set(drawn) & set(removed)
  kept = rules.random(columns, count=len(result.rows), seed=0).rows
  uniform = np.setdiff1d(np.arange(4000), kept)
  plain = cells.differences(
      removed, uniform, {'x': columns.anchor_class_similarity}, {'c': columns.anchor_class})
  assert plain['x'] > 0.2 and plain['c'] > 0.5
  assert rules.matched(columns, removed=removed, seed=0).rows.tolist() == result.rows.tolist()
  assert rules.matched(columns, removed=removed, seed=0, draw=1).rows.tolist() != (
      result.rows.tolist())


def test_matched_without_donors_falls_back_to_random_and_says_so():
  columns = big_columns(domain=False)
  removed = np.flatnonzero(columns.anchor_class == 1)  # a whole class: nobody is like them
  result = rules.matched(columns, removed=removed, seed=0, draw=2)
  assert result.report['no_matched_control']
  assert result.report['without_full_cell_donor'] == 1
  assert result.report['shortfall'] == len(removed)
  assert result.rows.tolist() == rules.random(
      columns, count=4000 - len(removed), seed=0, draw=2).rows.tolist()
  assert result.report['standardised_differences']['anchor_class'] > 0.1


def test_matched_of_nothing_and_of_everything():
  columns = big_columns(50)
  nothing = rules.matched(columns, removed=np.zeros(0, np.int64), seed=0)
  assert nothing.rows.tolist() == list(range(50)) and not nothing.report['no_matched_control']
  everything = rules.matched(columns, removed=np.arange(50), seed=0)
  assert everything.rows.tolist() == [] and everything.report['no_matched_control']
  empty = rules.Columns(np.zeros(0, bool), anchor_class=np.zeros(0, np.int32),
                        anchor_class_similarity=np.zeros(0, np.float32),
                        caption_length=np.zeros(0, np.int32), image_pixels=np.zeros(0, np.int64),
                        domain=np.array([], object))
  assert rules.matched(empty, removed=np.zeros(0, np.int64), seed=0).rows.tolist() == []


def test_matched_refuses_what_it_cannot_use():
  columns, _, _ = make_world(4)
  not_candidate = np.flatnonzero(~columns.candidates)[:1]
  with pytest.raises(ValueError, match='only 0 of 1'):
    rules.matched(columns, removed=not_candidate, seed=0)
  with pytest.raises(InputError, match='anchor_class'):
    rules.matched(rules.Columns(columns.candidates), removed=np.zeros(0, np.int64), seed=0)
  fields = {**vars(columns), 'anchor_class_similarity': np.full(40, np.nan, np.float32)}
  with pytest.raises(InputError, match="search.backend='exact'"):
    rules.matched(rules.Columns(**fields), removed=np.zeros(0, np.int64), seed=0)


@pytest.mark.parametrize('n', [0, 1])
def test_tiny_pools(n):
  zeros = np.zeros(n, np.float32)
  columns = rules.Columns(
      np.ones(n, bool), {'val': zeros}, {'val': zeros},
      lambda names, rows: np.zeros(len(rows)), lambda names, rows: np.zeros(len(rows)))
  everything = list(range(n))
  assert rules.keep_all(columns).rows.tolist() == everything
  assert rules.gap_aligned(columns, benchmarks=('val',)).rows.tolist() == everything
  assert rules.gap_aligned(columns, benchmarks=('val',), slack=-0.1).rows.tolist() == []
  assert rules.random(columns, count=n, seed=0).rows.tolist() == everything
  for rule in (rules.near, rules.far):
    assert rule(columns, benchmarks=('val',), count=n).rows.tolist() == everything
    assert rule(columns, benchmarks=('val',), count=0).rows.tolist() == []


@given(seeds, st.lists(st.integers(0, 39), max_size=60))
def test_listed_keeps_the_named_candidates_as_often_as_they_are_named(seed, named):
  columns, _, _ = make_world(seed)
  kept = rules.listed(columns, rows=np.sort(np.array(named, np.int64)))
  expected = sorted(row for row in named if columns.candidates[row])
  assert kept.rows.tolist() == expected and kept.rows.dtype == np.int64
  assert kept.report == {'rows': len(named), 'not_candidates': len(named) - len(expected),
                         'repeats': len(expected) - len(set(expected))}


def test_the_table_tells_what_each_rule_takes():
  parameter = {'benchmarks': 'benchmarks', 'slack': 'slack', 'seed': 'seed', 'count': 'count',
               'target': 'removed', 'draw': 'draw', 'file': 'rows'}
  for rule in rules.RULES.values():
    takes = set(inspect.signature(rule.keep).parameters) - {'columns'}
    assert takes == {parameter[name] for name in (*rule.keys, *rule.needs) if name in parameter}
