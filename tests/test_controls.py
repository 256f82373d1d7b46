"""The controls against their definition in plain Python."""

from collections import Counter, defaultdict
import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from worlds import candidate_list, make_world

from clip_jax.core.errors import InputError
from clip_jax.pruning import cells, controls, rules
from clip_jax.pruning import columns as columns_lib

seeds = st.integers(0, 2**32 - 1)
NUMBERS = ('anchor_class_similarity', 'caption_length', 'image_pixels', 'caption_names_class')


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
  assert (
    rules.random(columns, count=8, seed=6).rows.tolist()
    != rules.random(columns, count=8, seed=5).rows.tolist()
  )


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
  named = columns.caption_names_class
  cell = {
    row: (
      *(columns.anchor_class[row], columns.domain[row], similarity[i]),
      *([] if named is None else [named[row]]),
      *(caption[i], pixels[i]),
    )
    for i, row in enumerate(rows)
  }
  waiting, drawn, served = set(removed), [], []
  for kept_digits in range(5 if named is None else 6, 0, -1):
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
@given(seeds, st.floats(0.02, 0.5), st.integers(0, 3), st.integers(1, 5), st.booleans())
def test_matched_is_its_definition(seed, share, draw, levels, has_names):
  columns, _, _ = make_world(seed, n=120, levels=levels)
  rows = candidate_list(columns)
  rng = np.random.default_rng(seed)
  if has_names:
    columns = dataclasses.replace(columns, caption_names_class=rng.random(120) < 0.5)
  removed = np.sort(rng.choice(rows, int(share * len(rows)), replace=False))
  order = columns_lib.random_order(np.ones(120, bool), 7, draw, controls.MATCHED_STREAM)
  drawn, served = python_matched(columns, removed.tolist(), order)
  result = rules.matched(columns, removed=removed, seed=7, draw=draw)
  report = result.report
  assert report['removed'] == len(removed)
  assert report['drawn'] == len(drawn)
  assert report['shortfall'] == len(removed) - len(drawn)
  assert list(report['drawn_after_merging']) == [
    'image_pixels',
    'caption_length',
    *(['caption_names_class'] if has_names else []),
    'anchor_class_similarity',
    'domain',
  ]
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
  others = sorted(set(rows) - set(removed.tolist()))
  assert report['differences_before'] == cells.differences(
    removed,
    np.array(others, int),
    {name: getattr(columns, name) for name in report['differences_before'] if name in NUMBERS},
    {'anchor_class': columns.anchor_class, 'domain': cells.levels(columns.domain)[0]},
  )


def big_columns(n=4000, domain=True):
  rng = np.random.default_rng(0)
  return rules.Columns(
    candidates=np.ones(n, bool),
    anchor_class=rng.integers(0, 3, n).astype(np.int32),
    anchor_class_similarity=rng.random(n).astype(np.float32),
    caption_length=rng.integers(1, 80, n).astype(np.int32),
    image_pixels=rng.integers(1, 10**6, n),
    domain=rng.integers(0, 2, n) if domain else None,
  )


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
    'anchor_class',
    'domain',
    'anchor_class_similarity',
    'caption_length',
    'image_pixels',
  }
  assert differences['anchor_class'] == 0
  assert max(abs(value) for value in differences.values()) < 0.1
  drawn = np.setdiff1d(np.arange(4000), result.rows)
  assert not set(drawn) & set(removed)
  kept = rules.random(columns, count=len(result.rows), seed=0).rows
  uniform = np.setdiff1d(np.arange(4000), kept)
  plain = cells.differences(
    removed, uniform, {'x': columns.anchor_class_similarity}, {'c': columns.anchor_class}
  )
  assert plain['x'] > 0.2 and plain['c'] > 0.5
  assert rules.matched(columns, removed=removed, seed=0).rows.tolist() == result.rows.tolist()
  assert rules.matched(columns, removed=removed, seed=0, draw=1).rows.tolist() != (
    result.rows.tolist()
  )


def test_whether_the_caption_names_the_class_is_balanced_only_as_a_variable():
  columns, rng = big_columns(), np.random.default_rng(1)
  named = rng.random(4000) < 0.4
  removed = np.flatnonzero(rng.random(4000) < 0.05 + 0.1 * named)
  with_names = dataclasses.replace(columns, caption_names_class=named)
  report = rules.matched(with_names, removed=removed, seed=0).report
  assert not report['no_matched_control']
  assert report['differences_before']['caption_names_class'] > 0.3
  assert abs(report['standardised_differences']['caption_names_class']) < 0.05
  unaware = rules.matched(columns, removed=removed, seed=0)
  drawn = np.setdiff1d(np.arange(4000), unaware.rows)
  assert cells.differences(removed, drawn, {'named': named}, {})['named'] > 0.3
  assert 'caption_names_class' not in unaware.report['standardised_differences']


def test_a_domain_of_one_row_and_columns_that_are_constant():
  columns = dataclasses.replace(
    big_columns(),
    domain=np.array(['rare'] + ['web'] * 3999, object),
    caption_names_class=np.zeros(4000, bool),
  )
  removed = np.arange(0, 4000, 10)  # the rare row is removed: it has no donor in its domain
  report = rules.matched(columns, removed=removed, seed=0).report
  assert report['drawn_after_merging']['domain'] >= 1 and report['shortfall'] == 0
  assert report['standardised_differences']['caption_names_class'] == 0


def test_matched_without_donors_falls_back_to_random_and_says_so():
  columns = big_columns(domain=False)
  removed = np.flatnonzero(columns.anchor_class == 1)  # a whole class: nobody is like them
  result = rules.matched(columns, removed=removed, seed=0, draw=2)
  assert result.report['no_matched_control']
  assert result.report['without_full_cell_donor'] == 1
  assert result.report['shortfall'] == len(removed)
  assert (
    result.rows.tolist()
    == rules.random(columns, count=4000 - len(removed), seed=0, draw=2).rows.tolist()
  )
  assert result.report['standardised_differences']['anchor_class'] > 0.1


def test_matched_of_nothing_and_of_everything():
  columns = big_columns(50)
  nothing = rules.matched(columns, removed=np.zeros(0, np.int64), seed=0)
  assert nothing.rows.tolist() == list(range(50)) and not nothing.report['no_matched_control']
  everything = rules.matched(columns, removed=np.arange(50), seed=0)
  assert everything.rows.tolist() == [] and everything.report['no_matched_control']
  empty = rules.Columns(
    np.zeros(0, bool),
    anchor_class=np.zeros(0, np.int32),
    anchor_class_similarity=np.zeros(0, np.float32),
    caption_length=np.zeros(0, np.int32),
    image_pixels=np.zeros(0, np.int64),
    domain=np.array([], object),
  )
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


@pytest.mark.parametrize(
  'numbers, highest, kind',
  [
    ([-1, 127], 0, np.int8),
    ([-1, 127], 128, np.int16),
    ([0, 128], 0, np.int16),
    ([0, 32_768], 0, np.int32),
    ([-200, 0], 0, np.int16),
    ([0, 2**31], 0, np.int64),
    ([], 0, np.int8),
  ],
)
def test_narrow_numbers_stay_the_same(numbers, highest, kind):
  narrow = columns_lib.narrow(np.array(numbers, np.int64), highest)
  assert narrow.dtype == kind and narrow.tolist() == numbers
