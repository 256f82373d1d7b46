"""The rules against their definition in plain Python, on exact similarities full of ties."""

import inspect
import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from worlds import NAMES, candidate_list, make_world

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.pruning import rules

seeds = st.integers(0, 2**32 - 1)


some_names = st.sampled_from([('sketch',), ('val',), NAMES])


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
    exact_excess=lambda names, rows: exact[rows],
  )
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
    np.array([1, 1, 1, 1, 0], bool),
    {'val': values},
    {'val': values - np.float32(0.5)},
    exact,
    lambda names, rows: exact(names, rows) - 0.5,
  )
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
    3,
    2,
    10,
    10,
    7,
    7,
    400,
  ]
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


@pytest.mark.parametrize('n', [0, 1])
def test_tiny_pools(n):
  zeros = np.zeros(n, np.float32)
  columns = rules.Columns(
    np.ones(n, bool),
    {'val': zeros},
    {'val': zeros},
    lambda names, rows: np.zeros(len(rows)),
    lambda names, rows: np.zeros(len(rows)),
  )
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
  assert kept.report == {
    'rows': len(named),
    'not_candidates': len(named) - len(expected),
    'repeats': len(expected) - len(set(expected)),
  }


def test_below_drops_rows_from_the_similarity_on():
  columns = rules.Columns(
    np.array([1, 1, 1, 0, 1], bool),
    {'a': np.array([0.2, 0.9, 0.95, 0.99, 0.1]), 'b': np.array([0.96, 0.9, 0.1, 0.1, 0.1])},
  )
  keep = lambda *names, similarity=0.95: rules.below(
    columns, benchmarks=names, similarity=similarity
  ).rows.tolist()
  assert keep('a') == [0, 1, 4] and keep('b') == [1, 2, 4] and keep('a', 'b') == [1, 4]
  assert keep('a', similarity=1.0) == [0, 1, 2, 4]


def test_below_asks_for_the_cosine_of_rows_near_the_cut_alone():
  asked = []

  def reaches(names, rows, similarity):
    asked.append((names, rows.tolist(), similarity))
    return rows == 1  # whatever the column says

  values = np.array([0.5, 0.949, 0.951, 0.96], np.float32)
  columns = rules.Columns(np.ones(4, bool), {'a': values}, reaches=reaches)
  kept = rules.below(columns, benchmarks=('a',), similarity=0.95)
  assert kept.rows.tolist() == [0, 2] and kept.report == {'decided_exactly': 2}
  assert asked == [(('a',), [1, 2], 0.95)]


@given(seeds, st.sampled_from(['at_least', 'top', 'count', 'quantile']))
def test_a_column_keeps_its_highest_values(seed, by):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 5, 40) / 4  # full of ties
  scores[rng.random(40) < 0.2] = np.nan
  columns = rules.Columns(rng.random(40) < 0.8)
  rows = candidate_list(columns)
  known = [row for row in rows if not np.isnan(scores[row])]
  ordered = sorted(known, key=lambda row: (-scores[row], row))
  if by == 'at_least':
    given_, expected = {'at_least': 0.5}, [row for row in known if scores[row] >= 0.5]
  elif by == 'top':
    given_, expected = {'top': 0.25}, ordered[: math.floor(0.25 * len(rows) + 0.5)]
  elif by == 'count':
    given_, expected = {'top': 3.0}, ordered[:3]
  else:
    cut = sorted(scores[row] for row in known)[math.floor(0.7 * len(known))]
    given_, expected = {'quantile': 0.7}, [row for row in known if scores[row] >= cut]
  kept = rules.column(columns, scores=scores, **given_)
  assert kept.rows.tolist() == sorted(expected)
  assert kept.report == {
    'without_value': len(rows) - len(known),
    'value_at_cut': min(scores[row] for row in expected),
  }


def test_a_column_with_too_few_values_is_an_error():
  columns = rules.Columns(np.ones(4, bool))
  with pytest.raises(ConfigError, match='only 1 candidates have a value'):
    rules.column(columns, scores=np.array([1.0, np.nan, np.nan, np.nan]), top=0.5)
  nothing = rules.column(columns, scores=np.full(4, np.nan), quantile=0.5)
  assert nothing.rows.tolist() == [] and nothing.report['value_at_cut'] is None


@given(seeds, st.integers(1, 9), st.integers(0, 5))
def test_clusters_keep_the_candidates_of_those_that_a_reference_hits(seed, clusters, images):
  rng = np.random.default_rng(seed)
  columns = rules.Columns(rng.random(30) > 0.3)
  assignment = np.where(columns.candidates, rng.integers(clusters, size=30), -1).astype(np.int32)
  reference = rng.integers(clusters, size=images).astype(np.int32)
  kept = rules.clusters(columns, clusters=clusters, assignment=assignment, reference=reference)
  assert kept.rows.dtype == np.int64 and kept.rows.tolist() == [
    row for row in candidate_list(columns) if assignment[row] in set(reference.tolist())
  ]
  assert kept.report == {
    'clusters': clusters,
    'clusters_kept': len(set(reference.tolist())),
    'reference_rows': images,
  }


def test_the_table_tells_what_each_rule_takes():
  parameter = {
    'target': 'removed',
    'file': 'rows',
    'levels': 'codes',
    'scores': 'scores',
    'matches': 'matches',
  }
  same = (
    'benchmarks',
    'slack',
    'quantile',
    'dose',
    'k',
    'values',
    'seed',
    'clusters',
    'count',
    'draw',
    'others',
    'similarity',
    'at_least',
    'top',
  )
  for rule in rules.RULES.values():
    takes = set(inspect.signature(rule.keep).parameters) - {'columns', 'names'}
    named = {*rule.keys, *rule.needs}
    expected = {parameter[name] for name in named & set(parameter)} | (named & set(same))
    if 'clusters' in rule.needs:  # the caller runs k-means, with the seed
      expected = expected - {'seed'} | {'assignment', 'reference'}
    assert takes == expected


@pytest.mark.parametrize(
  'rule, of, words',
  [
    ('gap_aligned', {}, 'without rows that are nearer to a query of a and b than any anchor image'),
    (
      'gap_aligned',
      {'slack': 0.01},
      'without rows that are nearer to a query of a and b than any anchor image, by more than 0.01',
    ),
    (
      'gap_aligned',
      {'slack': -0.01},
      'without rows that are nearer to a query of a and b than any anchor image, by more '
      'than \u22120.01',
    ),
    (
      'gap_aligned',
      {'dose': 0.5},
      'without rows that are nearer to a query of a and b than any anchor image; 50 % of the '
      'number that slack 0 removes, largest excess first',
    ),
    (
      'gap_aligned',
      {'quantile': 0.9},
      'without rows that are nearer to a query of a and b than any anchor image, by more '
      'than the 90 % quantile of the excess',
    ),
    (
      'k_aligned',
      {'k': 5},
      'aligned for the 5 nearest images of each query of a and b: no pool image is nearer than the '
      'anchor image of the same rank',
    ),
    ('near', {}, 'near-pruned (most similar removed), by a and b'),
    ('far', {}, 'far-pruned (most similar kept), by a and b'),
    ('random', {}, 'random rows, the control for size'),
    (
      'matched',
      {'to': 'gap'},
      'matched control: without as many other rows as gap removes, alike except in similarity',
    ),
    (
      'domain_removal',
      {'column': 'domain', 'values': ('sketch', 'toon')},
      'domain removal, not alignment: without rows whose domain is sketch and toon',
    ),
    (
      'domain_removal',
      {'reference': 'styles', 'values': ('sketch',)},
      'domain removal, not alignment: without rows classified as sketch by the nearest example of '
      'styles',
    ),
    (
      'below',
      {'similarity': 0.95},
      'without rows that are 0.95 or more similar to a query of a and b',
    ),
    ('column', {'column': 'clip', 'at_least': 0.0}, 'rows whose clip is 0 or more'),
    ('column', {'column': 'clip', 'top': 0.3}, 'the 30 % of rows with the highest clip'),
    ('column', {'column': 'clip', 'top': 5000.0}, '5,000 rows with the highest clip'),
    (
      'column',
      {'column': 'clip', 'quantile': 0.7},
      'rows whose clip is at or over its 70 % quantile',
    ),
    ('caption', {'words': ('cat', 'hot dog')}, 'rows whose caption has cat or hot dog'),
    (
      'caption',
      {'words': tuple('abcde')},
      'rows whose caption has a, b, c or one of 2 other words',
    ),
    (
      'clusters',
      {'clusters': 1000},
      'rows of the k-means clusters (of 1,000) that are the nearest of an anchor image',
    ),
    (
      'clusters',
      {'clusters': 5, 'reference': 'toys'},
      'rows of the k-means clusters (of 5) that are the nearest of an image of toys',
    ),
    ('union', {'of': ('x', 'y')}, 'rows that x or y keeps'),
    ('union', {'of': ('x', 'y', 'z')}, 'rows that x, y or z keeps'),
    ('intersection', {'of': ('x', 'y', 'z')}, 'rows that x, y and z all keep'),
    ('minus', {'of': ('x', 'y')}, 'rows that x keeps and y does not'),
    ('minus', {'of': ('x', 'y', 'z')}, 'rows that x keeps and y and z do not'),
  ],
)
def test_words_say_what_a_split_is(rule, of, words):
  block = {**defaults.split(), 'benchmarks': ('a', 'b'), **of}
  assert rules.RULES[rule].words({key: block[key] for key in rules.RULES[rule].keys}) == words


def test_the_table_tells_how_each_rule_is_shown():
  block = {**defaults.split(), 'of': ('x', 'y')}
  assert all(rule.words({key: block[key] for key in rule.keys}) for rule in rules.RULES.values())
  assert len({rule.label for rule in rules.RULES.values()}) == len(rules.RULES)
  assert all(len(rule.strips) == 4 * bool(rule.column) for rule in rules.RULES.values())
  named = lambda kind: {name for name, rule in rules.RULES.items() if getattr(rule, kind)}
  assert named('is_drawn') == {'random', 'matched'}
  assert named('is_aligned') == {'gap_aligned', 'k_aligned'}
  assert named('has_size') == {'near', 'far', 'random'}
  assert named('compared') == {'gap_aligned', 'near', 'far'}
