"""Splits: base rows, the brute-force check of alignment, the printed figures, overlaps."""

import hashlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.pruning import columns as columns_lib
from clip_jax.pruning import rules, splits


def numbered(blocks):
  """Yields each block with the numbers of its rows, counted through all blocks."""
  start = 0
  for block in blocks:
    yield np.arange(start, start + len(block)), block
    start += len(block)


def check(queries, split_blocks, anchor_blocks, *, append_anchor, slack=0.0, k=0, **given):
  """Checks one split that holds all rows of the blocks, against one benchmark."""
  split_blocks = list(split_blocks)
  promise = splits.AlignmentClaim(
    ('val',), np.arange(sum(map(len, split_blocks))), append_anchor, slack, k
  )
  found = splits.check_aligned(
    {'one': promise}, {'val': queries}, numbered(split_blocks), anchor_blocks, **given
  )
  return found['one']['val']


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
    exact_excess=lambda names, rows: np.max([excess[name][rows] for name in names], axis=0),
  )
  return pool, anchor, queries, t, columns


def test_rows_that_are_there_twice_stay_twice():
  rows = splits.base_rows(np.array([1, 1, 4]), 10, np.array([0]), True)
  assert rows.tolist() == [1, 1, 4, 10]
  assert splits.rows_hash(rows) != splits.rows_hash(rows[1:])
  names, jaccard, inside = splits.overlap(
    {'a': np.array([1, 1, 4]), 'b': np.array([1, 4]), 'c': np.array([4])}
  )
  assert (
    jaccard[0].tolist() == [1, 1, 0.5] and inside[0].tolist() == [1, 1, 0.5] and inside[2, 0] == 1
  )


def test_planted_rows_come_last():
  rows = splits.base_rows([1, 4], 10, [0, 2], True, 13, [0, 3])
  assert rows.tolist() == [1, 4, 10, 12, 13, 16] and rows.dtype == np.int64
  assert splits.base_rows([1, 4], 10, [0, 2], False, 13, [3]).tolist() == [1, 4, 16]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.integers(0, 30))
def test_the_k_highest_are_exact_whatever_the_blocks(seed, k, step, rows):
  rng = np.random.default_rng(seed)
  queries, x = unit(rng, 5), unit(rng, rows)
  if rows:
    x = x[rng.integers(0, max(rows // 2, 1), rows)]  # many exact duplicates
  true = np.full([5, k], -np.inf)
  exact = -np.sort(-(queries.astype(np.float64) @ x.astype(np.float64).T), axis=1)[:, :k]
  true[:, : exact.shape[1]] = exact
  blocks = [x[i : i + step] for i in range(0, rows, step)]
  assert (splits._highest(queries, blocks, k, columns_lib.TOLERANCE) == true).all()


def test_the_highest_is_found_where_float32_prefers_another():
  least = (
    2.0**-24
  )  # 1 + least is 1 in float32: a sum that begins with the 1 loses some of the others
  rows = np.array([[1] + 255 * [least], 250 * [least] + 5 * [0] + [1]], np.float16)
  found = splits._highest(np.ones([1, 256], np.float16), [rows], 1, 1e-4)
  assert found.tolist() == [[1 + 255 * least]]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_many_splits_are_checked_in_one_pass_and_told_apart(seed, step):
  pool, anchor, queries, t, columns = make_space(seed)
  base = np.concatenate([pool, anchor])
  both, rng = ('val', 'sketch'), np.random.default_rng(seed)
  promises = {}
  for i in range(9):
    names = [both, both[:1], both[1:]][i % 3]
    if i < 6:  # the last three hold any rows
      slack = [0.0, -0.01, 0.02][rng.integers(3)]
      kept = rules.gap_aligned(columns, benchmarks=names, slack=slack).rows
    else:
      slack, kept = 0.0, np.flatnonzero(rng.random(60) < 0.3)
    append = bool(rng.integers(2))
    rows = splits.base_rows(kept, 60, np.arange(9)[rng.random(9) < (1 if i < 6 else 0.5)], append)
    promises[f'split{i}'] = splits.AlignmentClaim(names, rows, append, slack, int(i == 8) * 3)
  promises['none'] = splits.AlignmentClaim(both, np.zeros(0, np.int64), False, -np.inf)
  blocks = [(np.arange(i, min(i + step, 69)), base[i : i + step]) for i in range(0, 69, step)]
  found = splits.check_aligned(promises, queries, reversed(blocks), [anchor], sample=100)
  for split, promise in promises.items():
    assert found[split].keys() == set(promise.benchmarks)
    for name in promise.benchmarks:
      sims = -np.sort(-(queries[name].astype(float) @ base[promise.rows].astype(float).T), axis=1)
      k = max(promise.k, 1)
      s = np.full([len(sims), k], -np.inf)
      s[:, : sims.shape[1]] = sims[:, :k]
      tops = -np.sort(-(queries[name].astype(float) @ anchor.astype(float).T), axis=1)[:, :k]
      equal = promise.append_anchor and promise.slack <= 0 and not promise.k
      bad = (s != tops if equal else s - tops > promise.slack).any(1)
      got = found[split][name]
      assert got['failures'] == bad.sum() and got['checked'] == len(sims)
      assert [one['query'] for one in got['first_failures']] == np.flatnonzero(bad)[:5].tolist()
      assert got['kind'] == ('each of k' if promise.k else 'equality' if equal else 'inequality')
      assert int(split[5:] if split != 'none' else 0) > 5 or not bad.any()


def test_the_check_of_k_finds_the_first_place_that_is_too_near():
  anchor = np.array([[0.5], [0.25], [0.125]], np.float16)
  run = lambda pool, k: check(
    np.ones([1, 1], np.float16),
    [np.array(pool, np.float16)[:, None]],
    [anchor],
    append_anchor=True,
    k=k,
  )
  assert run([0.5, 0.25, 0.0], 3) == {
    'checked': 1,
    'failures': 0,
    'kind': 'each of k',
    'first_failures': [],
  }
  assert run([0.5, 0.5], 1)['failures'] == 0
  assert run([0.5, 0.375, 0.25], 3)['first_failures'] == [
    {'query': 0, 'split': 0.375, 'anchor': 0.25, 'j': 2}
  ]
  assert run([], 2)['failures'] == 0


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
    result = check(queries[name], [pool[kept], anchor], [anchor], append_anchor=True, sample=100)
    assert result == {'checked': len(s), 'failures': 0, 'kind': 'equality', 'first_failures': []}
  # Every row that was dropped had to go: put back, it breaks the equality for some query.
  base = anchor.astype(np.float64)
  for row in np.setdiff1d(np.flatnonzero(columns.candidates), kept):
    longer = np.concatenate([base, pool[row : row + 1].astype(np.float64)])
    assert any(
      ((longer @ queries[name].astype(np.float64).T).max(axis=0) > t[name]).any() for name in names
    )


def test_the_check_finds_one_row_too_many_and_an_anchor_row_too_few():
  pool, anchor, queries, t, columns = make_space(0)
  kept = rules.gap_aligned(columns, benchmarks=('val',)).rows
  leak = 60 - 6  # a copy of query 0
  blocks = [pool[kept[:5]], pool[kept[5:]], pool[leak : leak + 1], anchor]
  result = check(queries['val'], blocks, [anchor], append_anchor=True, sample=100)
  assert result['failures'] >= 1 and result['first_failures'][0]['query'] == 0
  assert result['first_failures'][0]['split'] > t['val'][0] == result['first_failures'][0]['anchor']
  nearest = (anchor.astype(float) @ queries['val'].astype(float).T).argmax(axis=0)[3]
  missing = np.delete(anchor, nearest, axis=0)
  lacking = check(queries['val'], [missing], [anchor], append_anchor=True, sample=100)
  assert 3 in [failure['query'] for failure in lacking['first_failures']]


@pytest.mark.parametrize('append', [True, False])
@pytest.mark.parametrize('slack', [-0.02, 0.0, 0.02])
def test_with_slack_or_without_anchor_the_check_is_an_inequality(append, slack):
  pool, anchor, queries, _, columns = make_space(1)
  kept = rules.gap_aligned(columns, benchmarks=('val',), slack=slack).rows
  split = [pool[kept]] + [anchor] * append
  result = check(queries['val'], split, [anchor], append_anchor=append, slack=slack, sample=100)
  assert result['kind'] == ('equality' if append and slack <= 0 else 'inequality')
  assert result['failures'] == 0
  everything = check(
    queries['val'], [pool], [anchor], append_anchor=append, slack=slack, sample=100
  )
  assert everything['failures'] > 0


def test_the_sample_is_seeded_and_blocks_do_not_matter(monkeypatch):
  pool, anchor, queries, _, _ = make_space(2)

  def failing(seed, blocks, sample=4):
    result = check(queries['val'], blocks, [anchor], append_anchor=True, sample=sample, seed=seed)
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
  assert check(queries['val'], [], [anchor], append_anchor=False)['failures'] == 0
  assert check(queries['val'], [], [anchor], append_anchor=True)['failures'] == 12


def describe(columns, kept, **given):
  names = ('val',)
  defaults = dict(
    benchmarks=names,
    dropped_at=splits.dropped_at_slack(columns, names),
    removed_over={'val': np.array([0, 2, 1, 0])},
    anchor_cosine={'val': np.array([0.2, 0.9, 0.95, 0.1])},
    duplicate_similarity=0.9,
  )
  return splits.describe_aligned(columns, kept, **{**defaults, **given})


def test_the_figures_of_an_aligned_split():
  excess = np.array([-0.02, -0.007, -0.001, 0.0, 0.002, 0.007, 0.02, 0.5, 0.5, 0.5])
  columns = rules.Columns(
    np.array([1] * 9 + [0], bool),
    excess={'val': excess.astype(np.float32)},
    exact_excess=lambda names, rows: excess[rows],
  )
  kept = rules.gap_aligned(columns, benchmarks=('val',)).rows
  result = describe(
    columns,
    kept,
    label=np.array([0, 0, 0, 1, 1, 1, -1, -1, -1, 5]),
    domain=np.array(['photo'] * 5 + ['sketch'] * 3 + [None, 'oil'], object),
  )
  assert kept.tolist() == [0, 1, 2, 3]
  assert result['dropped'] == 5 and result['dropped_share'] == 5 / 9
  assert result['by_class'] == {
    '-1': {'candidates': 3, 'dropped': 3, 'share': 1.0},
    '0': {'candidates': 3, 'dropped': 0, 'share': 0.0},
    '1': {'candidates': 3, 'dropped': 2, 'share': 2 / 3},
  }
  assert {name: figures['dropped'] for name, figures in result['by_domain'].items()} == {
    '': 1,
    'photo': 1,
    'sketch': 3,
  }
  assert result['dropped_at_slack'] == {'-0.01': 8, '-0.005': 7, '0': 5, '0.005': 4, '0.01': 3}
  assert result['queries'] == {
    'val': {'queries': 4, 'hit': 2, 'hit_share': 0.5, 'leaked': 2, 'leaked_share': 0.5}
  }
  assert result['warnings'] == [
    "100.0 % of domain 'sketch' is removed: this is domain removal, not alignment",
    'more than half of the candidates are dropped: 5 of 9',
  ]
  assert columns.candidates.sum() == 9  # the columns are left as they were


def test_a_mild_split_has_no_warnings_and_an_empty_pool_no_division():
  columns = rules.Columns(np.ones(3, bool), excess={'val': np.array([-1, -1, 1], np.float32)})
  mild = describe(columns, np.array([0, 1]))
  assert mild['warnings'] == [] and mild['by_class'] == {} and mild['by_domain'] == {}
  none = rules.Columns(np.zeros(0, bool), excess={'val': np.zeros(0, np.float32)})
  empty = describe(
    none,
    np.zeros(0, np.int64),
    domain=np.array([], object),
    removed_over={'val': np.zeros(0)},
    anchor_cosine={'val': np.zeros(0)},
  )
  assert empty['dropped'] == 0 and empty['dropped_share'] == 0 and empty['warnings'] == []


@given(st.lists(st.sets(st.integers(0, 70)), max_size=5))
def test_overlap_is_that_of_sets(rows):
  names, jaccard, inside = splits.overlap(
    {f'split{i}': np.array(sorted(r), np.int64) for i, r in enumerate(rows)}
  )
  assert names == [f'split{i}' for i in range(len(rows))]
  assert jaccard.shape == inside.shape == (len(rows), len(rows))
  for i, a in enumerate(rows):
    for j, b in enumerate(rows):
      assert jaccard[i, j] == (len(a & b) / len(a | b) if a | b else 1)
      assert inside[i, j] == (len(a & b) / len(a) if a else 1)
