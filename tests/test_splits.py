"""Splits: base rows, the brute-force check of alignment, the printed figures, overlaps."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.pruning import rules, splits


def unit(rng, n, dim=6, spread=1.0):
  x = rng.normal(size=[n, dim]) * spread + 1
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def make_space(seed, n=60):
  """Returns pool, anchor and queries on the sphere, with copies, and the pool's columns."""
  rng = np.random.default_rng(seed)
  anchor, queries = unit(rng, 9), {'val': unit(rng, 12), 'sketch': unit(rng, 7)}
  pool = np.concatenate([unit(rng, n - 15), anchor, queries['val'][:3], queries['sketch'][:3]])

  def similarities(x, name):  # exact: sums of products of float16 numbers fit in float64
    return x.astype(np.float64) @ queries[name].astype(np.float64).T

  t = {name: similarities(anchor, name).max(axis=0) for name in queries}
  exact = {name: similarities(pool, name).max(axis=1) for name in queries}
  excess = {name: (similarities(pool, name) - t[name]).max(axis=1) for name in queries}
  columns = rules.Columns(
      candidates=rng.random(n) < 0.9,
      similarity={name: value.astype(np.float32) for name, value in exact.items()},
      excess={name: value.astype(np.float32) for name, value in excess.items()},
      exact_similarity=lambda names, rows: np.max([exact[name][rows] for name in names], axis=0),
      exact_excess=lambda names, rows: np.max([excess[name][rows] for name in names], axis=0))
  return pool, anchor, queries, t, columns


def test_rows_that_are_there_twice_stay_twice():
  rows = splits.base_rows(np.array([1, 1, 4]), 10, np.array([0]), True)
  assert rows.tolist() == [1, 1, 4, 10]
  assert splits.rows_hash(rows) != splits.rows_hash(rows[1:])
  names, jaccard, inside = splits.overlap({'a': np.array([1, 1, 4]), 'b': np.array([1, 4]), 'c': np.array([4])})
  assert jaccard[0].tolist() == [1, 1, 0.5] and inside[0].tolist() == [1, 1, 0.5] and inside[2, 0] == 1


def test_base_rows_and_their_hash():
  rows = splits.base_rows(np.array([1, 4]), 10, np.array([0, 2]), True)
  assert rows.tolist() == [1, 4, 10, 12] and rows.dtype == np.int64
  assert splits.base_rows(np.array([1, 4]), 10, np.array([0, 2]), False).tolist() == [1, 4]
  assert splits.base_rows([], 10, [], True).tolist() == []
  assert splits.base_rows([], 10, [3], True).dtype == np.int64
  expected = hashlib.sha256(struct.pack('<4q', 1, 4, 10, 12)).hexdigest()
  assert splits.rows_hash(rows) == splits.rows_hash(rows.astype(np.int32)) == expected


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([('val',), ('sketch',), ('val', 'sketch')]))
def test_after_pruning_the_split_is_as_near_as_the_anchor(seed, names):
  pool, anchor, queries, t, columns = make_space(seed)
  kept = rules.gap_aligned(columns, benchmarks=names).rows
  split = np.concatenate([pool[kept], anchor]).astype(np.float64)
  for name in names:
    s = (split @ queries[name].astype(np.float64).T).max(axis=0)
    assert (s == t[name]).all()
    result = splits.check_aligned(
        queries[name], [pool[kept], anchor], [anchor], append_anchor=True, sample=100)
    assert result == {'checked': len(s), 'failures': 0, 'kind': 'equality', 'first_failures': []}
  # Every row that was dropped had to go: put back, it breaks the equality for some query.
  base = anchor.astype(np.float64)
  for row in np.setdiff1d(np.flatnonzero(columns.candidates), kept):
    longer = np.concatenate([base, pool[row:row + 1].astype(np.float64)])
    assert any(((longer @ queries[name].astype(np.float64).T).max(axis=0) > t[name]).any()
               for name in names)


def test_the_check_finds_one_row_too_many_and_an_anchor_row_too_few():
  pool, anchor, queries, t, columns = make_space(0)
  kept = rules.gap_aligned(columns, benchmarks=('val',)).rows
  leak = 60 - 6  # a copy of query 0
  blocks = [pool[kept[:5]], pool[kept[5:]], pool[leak:leak + 1], anchor]
  result = splits.check_aligned(queries['val'], blocks, [anchor], append_anchor=True, sample=100)
  assert result['failures'] >= 1 and result['first_failures'][0]['query'] == 0
  assert result['first_failures'][0]['split'] > t['val'][0] == result['first_failures'][0]['anchor']
  nearest = (anchor.astype(float) @ queries['val'].astype(float).T).argmax(axis=0)[3]
  missing = np.delete(anchor, nearest, axis=0)
  lacking = splits.check_aligned(
      queries['val'], [missing], [anchor], append_anchor=True, sample=100)
  assert 3 in [failure['query'] for failure in lacking['first_failures']]


@pytest.mark.parametrize('append', [True, False])
@pytest.mark.parametrize('slack', [-0.02, 0.0, 0.02])
def test_with_slack_or_without_anchor_the_check_is_an_inequality(append, slack):
  pool, anchor, queries, _, columns = make_space(1)
  kept = rules.gap_aligned(columns, benchmarks=('val',), slack=slack).rows
  split = [pool[kept]] + [anchor] * append
  result = splits.check_aligned(
      queries['val'], split, [anchor], append_anchor=append, slack=slack, sample=100)
  assert result['kind'] == ('equality' if append and slack <= 0 else 'inequality')
  assert result['failures'] == 0
  everything = splits.check_aligned(
      queries['val'], [pool], [anchor], append_anchor=append, slack=slack, sample=100)
  assert everything['failures'] > 0


def test_the_sample_is_seeded_and_blocks_do_not_matter(monkeypatch):
  pool, anchor, queries, _, _ = make_space(2)

  def failing(seed, blocks, sample=4):
    result = splits.check_aligned(
        queries['val'], blocks, [anchor], append_anchor=True, sample=sample, seed=seed)
    assert result['checked'] == sample
    return result

  assert failing(3, [pool, anchor]) == failing(3, [pool[:7], pool[7:], anchor[:0], anchor])
  assert failing(3, [pool, anchor]) != failing(4, [pool, anchor])
  whole = failing(3, [pool, anchor])
  monkeypatch.setattr(splits, 'CHECK_ROWS', 3)
  assert failing(3, iter([pool, anchor])) == whole
  assert failing(3, [pool], sample=0)['failures'] == 0
  with pytest.raises(ValueError, match=r'\[rows, 6\].*\(6,\)'):
    failing(3, pool)


def test_an_empty_split_is_aligned_without_the_anchor_and_not_with_it():
  _, anchor, queries, _, _ = make_space(3)
  assert splits.check_aligned(queries['val'], [], [anchor], append_anchor=False)['failures'] == 0
  assert splits.check_aligned(queries['val'], [], [anchor], append_anchor=True)['failures'] == 12


def describe(columns, kept, **given):
  names = ('val',)
  defaults = dict(
      benchmarks=names, removed_over={'val': np.array([0, 2, 1, 0])},
      anchor_cosine={'val': np.array([0.2, 0.9, 0.95, 0.1])}, duplicate_similarity=0.9)
  return splits.describe_aligned(columns, kept, **{**defaults, **given})


def test_the_figures_of_an_aligned_split():
  excess = np.array([-0.02, -0.007, -0.001, 0.0, 0.002, 0.007, 0.02, 0.5, 0.5, 0.5])
  columns = rules.Columns(
      np.array([1] * 9 + [0], bool), excess={'val': excess.astype(np.float32)},
      exact_excess=lambda names, rows: excess[rows])
  kept = rules.gap_aligned(columns, benchmarks=('val',)).rows
  result = describe(
      columns, kept, label=np.array([0, 0, 0, 1, 1, 1, -1, -1, -1, 5]),
      domain=np.array(['photo'] * 5 + ['sketch'] * 3 + [None, 'oil'], object))
  assert kept.tolist() == [0, 1, 2, 3]
  assert result['dropped'] == 5 and result['dropped_share'] == 5 / 9
  assert result['by_class'] == {
      '-1': {'candidates': 3, 'dropped': 3, 'share': 1.0},
      '0': {'candidates': 3, 'dropped': 0, 'share': 0.0},
      '1': {'candidates': 3, 'dropped': 2, 'share': 2 / 3}}
  assert {name: figures['dropped'] for name, figures in result['by_domain'].items()} == {
      '': 1, 'photo': 1, 'sketch': 3}
  assert result['dropped_at_slack'] == {'-0.01': 8, '-0.005': 7, '0': 5, '0.005': 4, '0.01': 3}
  assert result['queries'] == {
      'val': {'queries': 4, 'hit': 2, 'hit_share': 0.5, 'leaked': 2, 'leaked_share': 0.5}}
  assert result['warnings'] == [
      "100.0% of domain 'sketch' is gone: this is domain removal, not alignment",
      '5 of 9 candidates are dropped, more than half']
  assert columns.candidates.sum() == 9  # the columns are left as they were


def test_a_mild_split_has_no_warnings_and_an_empty_pool_no_division():
  columns = rules.Columns(np.ones(3, bool), excess={'val': np.array([-1, -1, 1], np.float32)})
  mild = describe(columns, np.array([0, 1]))
  assert mild['warnings'] == [] and mild['by_class'] == {} and mild['by_domain'] == {}
  none = rules.Columns(np.zeros(0, bool), excess={'val': np.zeros(0, np.float32)})
  empty = describe(none, np.zeros(0, np.int64), domain=np.array([], object),
                   removed_over={'val': np.zeros(0)}, anchor_cosine={'val': np.zeros(0)})
  assert empty['dropped'] == 0 and empty['dropped_share'] == 0 and empty['warnings'] == []


@given(st.lists(st.sets(st.integers(0, 70)), max_size=5))
def test_overlap_is_that_of_sets(rows):
  names, jaccard, inside = splits.overlap(
      {f'split{i}': np.array(sorted(r), np.int64) for i, r in enumerate(rows)})
  assert names == [f'split{i}' for i in range(len(rows))]
  assert jaccard.shape == inside.shape == (len(rows), len(rows))
  for i, a in enumerate(rows):
    for j, b in enumerate(rows):
      assert jaccard[i, j] == (len(a & b) / len(a | b) if a | b else 1)
      assert inside[i, j] == (len(a & b) / len(a) if a else 1)
