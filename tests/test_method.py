"""The rules against method.md, written out word by word in float64: small sizes, many ties and
exact duplicates.
"""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from clip_jax.pruning import columns as columns_lib
from clip_jax.pruning import rules, splits

NAMES = ('sketch', 'val')
seeds = st.integers(0, 2**32 - 1)
some_names = st.sampled_from([('sketch',), ('val',), NAMES])


@dataclasses.dataclass
class World:
  """Vectors on a coarse grid, so that similarities tie, with rows and queries that are there
  twice.
  """

  seed: int
  pool_rows: int
  anchor_rows: int
  query_rows: int

  def __post_init__(self):
    rng = np.random.default_rng(self.seed)
    vectors = lambda n: (rng.integers(-2, 3, [n, 4]) / 4).astype(np.float16)
    self.anchor = vectors(self.anchor_rows)
    self.queries = {name: vectors(self.query_rows) for name in NAMES}
    self.pool = np.concatenate([vectors(self.pool_rows), self.anchor[:2], self.queries['val'][:2]])
    n = len(self.pool)
    self.candidates = rng.random(n) < 0.85
    self.label, self.domain = rng.integers(0, 3, n), rng.integers(0, 2, n)
    similarities = lambda x, name: x.astype(np.float64) @ self.queries[name].astype(np.float64).T
    self.sim = {name: similarities(self.pool, name) for name in NAMES}  # [n, Q]
    self.anchor_sim = {name: -np.sort(-similarities(self.anchor, name), axis=0) for name in NAMES}
    highest = {name: self.sim[name].max(1) for name in NAMES}
    excess = {name: (self.sim[name] - self.anchor_sim[name][0]).max(1) for name in NAMES}
    blurred = lambda x: (x + rng.uniform(-4e-6, 4e-6, n)).astype(np.float32)
    self.columns = rules.Columns(
      self.candidates,
      {name: blurred(highest[name]) for name in NAMES},
      {name: blurred(excess[name]) for name in NAMES},
      lambda names, rows: np.max([highest[name][rows] for name in names], axis=0),
      lambda names, rows: np.max([excess[name][rows] for name in names], axis=0),
      pairs=self.pairs,
    )

  def rows(self):
    return np.flatnonzero(self.candidates).tolist()

  def excess(self, names):
    """Of each pool row, by the words of the method."""
    return {
      row: max(
        self.sim[name][row, i] - self.anchor_sim[name][0, i]
        for name in names
        for i in range(self.query_rows)
      )
      for row in self.rows()
    }

  def pairs(self, name, k):
    top = self.anchor_sim[name][:k].T
    query, row = np.nonzero(top[:, -1:] < self.sim[name].T)
    half = query < self.query_rows // 2
    for mine in (half, ~half):
      yield columns_lib.Pairs(
        top, query[mine].astype(np.int32), row[mine], self.sim[name].T[query, row][mine]
      )

  def check(self, names, kept, append_anchor, slack, k=0):
    base = np.concatenate([self.pool, self.anchor])
    rows = splits.base_rows(
      sorted(kept), len(self.pool), np.arange(len(self.anchor)), append_anchor and not k
    )
    promise = splits.AlignmentClaim(names, rows, append_anchor, slack, k)
    found = splits.check_aligned(
      {'it': promise},
      {name: self.queries[name] for name in names},
      [(np.arange(len(base)), base)],
      [self.anchor],
    )
    return sum(figures['failures'] for figures in found['it'].values())


worlds = st.builds(World, seeds, st.integers(1, 30), st.integers(2, 8), st.integers(1, 6))


@given(worlds, some_names)
def test_gap_aligned(world, names):
  """Drop pool item x if sim(query_i, x) > t_i for ANY query i; afterwards s_i(split) = s_i(anchor)
  for every i.
  """
  kept = [
    row
    for row in world.rows()
    if not any(
      world.sim[name][row, i] > world.anchor_sim[name][0, i]
      for name in names
      for i in range(world.query_rows)
    )
  ]
  found = rules.gap_aligned(world.columns, benchmarks=names)
  assert found.rows.tolist() == kept
  for name in names:
    for i in range(world.query_rows):
      in_split = max([*(world.sim[name][row, i] for row in kept), world.anchor_sim[name][0, i]])
      assert in_split == world.anchor_sim[name][0, i]
  assert (
    world.check(names, found.rows, True, 0.0) == world.check(names, found.rows, False, 0.0) == 0
  )
  for row in set(world.rows()) - set(kept):  # put back, each of them breaks the equality
    assert world.check(names, np.array([*kept, row]), True, 0.0)


@given(worlds, some_names, st.sampled_from([-0.25, -0.125, 0.0625, 0.125, 0.25]))
def test_slack(world, names, slack):
  """Gap-aligned with excess > slack."""
  excess = world.excess(names)
  found = rules.gap_aligned(world.columns, benchmarks=names, slack=slack)
  assert found.rows.tolist() == [row for row in world.rows() if not excess[row] > slack]
  assert found.report['slack'] == slack
  assert (
    world.check(names, found.rows, False, slack) == world.check(names, found.rows, True, slack) == 0
  )


@given(worlds, some_names, st.integers(1, 20))
def test_quantile(world, names, twentieths):
  """The slack is the lowest excess that at least this share of the candidates does not exceed."""
  excess, quantile = world.excess(names), twentieths / 20
  found = rules.gap_aligned(world.columns, benchmarks=names, quantile=quantile)
  if not excess:
    assert not len(found.rows)
    return
  slack = min(
    e
    for e in excess.values()
    if 20 * sum(other <= e for other in excess.values()) >= twentieths * len(excess)
  )
  assert found.report['slack'] == slack
  assert found.rows.tolist() == [row for row in world.rows() if not excess[row] > slack]
  assert (
    world.check(names, found.rows, False, slack) == world.check(names, found.rows, True, slack) == 0
  )


@given(worlds, some_names, st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.25, 2.0]))
def test_dose(world, names, dose):
  """Drops this many times what slack 0 drops: the largest excess first, of equal ones the
  earlier.
  """
  excess = world.excess(names)
  aligned = sum(e > 0 for e in excess.values())
  count = int(np.floor(dose * aligned + 0.5))
  if count > len(excess):
    return
  dropped = sorted(excess, key=lambda row: (-excess[row], row))[:count]
  kept = sorted(set(excess) - set(dropped))
  found = rules.gap_aligned(world.columns, benchmarks=names, dose=dose)
  assert found.rows.tolist() == kept
  assert found.report['aligned_dropped'] == aligned
  slack = max((excess[row] for row in kept), default=None)
  assert found.report['slack'] == slack
  least = -np.inf if slack is None else slack
  assert (
    world.check(names, found.rows, False, least) == world.check(names, found.rows, True, least) == 0
  )
  if dose == 1:
    assert kept == rules.gap_aligned(world.columns, benchmarks=names).rows.tolist()


@settings(max_examples=200)
@given(worlds, some_names, st.data())
def test_k_aligned(world, names, data):
  """Drop per query, most similar first, until for every j <= k the j-th nearest kept row is <=
  t_i^(j); union.
  """
  k = data.draw(st.integers(1, world.anchor_rows))
  dropped = set()
  for name in names:
    for i in range(world.query_rows):
      sim, t = world.sim[name][:, i], world.anchor_sim[name][:, i]
      kept = sorted(world.rows(), key=lambda row: (-sim[row], row))
      while any(sim[kept[j]] > t[j] for j in range(min(k, len(kept)))):
        dropped.add(kept.pop(0))
  found = rules.k_aligned(world.columns, benchmarks=names, k=k)
  assert found.rows.tolist() == sorted(set(world.rows()) - dropped)
  gap = rules.gap_aligned(world.columns, benchmarks=names)
  assert set(found.rows) <= set(gap.rows)
  if k == 1:
    assert found.rows.tolist() == gap.rows.tolist()
  assert found.report['aligned_dropped'] == len(world.rows()) - len(gap.rows)
  assert world.check(names, found.rows, True, 0.0, k) == 0
  assert bool(dropped) == bool(world.check(names, world.rows(), True, 0.0, k))


@given(worlds, st.sets(st.sampled_from(['a', 'b', 'c']), min_size=1))
def test_domain_removal(world, values):
  names, codes = (
    ['a', 'b', 'c'],
    world.label - (world.domain == 0) * (world.label == 2) * 3,
  )  # some have none
  found = rules.domain_removal(world.columns, codes=codes, names=names, values=sorted(values))
  gone = [row for row in world.rows() if codes[row] >= 0 and names[codes[row]] in values]
  assert found.rows.tolist() == sorted(set(world.rows()) - set(gone))
  assert found.report == {
    'dropped_by_value': {v: sum(names[codes[row]] == v for row in gone) for v in sorted(values)},
    'without_value': sum(codes[row] < 0 for row in world.rows()),
  }


@given(worlds, st.lists(st.lists(st.integers(0, 40)), min_size=2, max_size=4))
def test_joins(world, lists):
  """Over the pool rows that some splits keep; a row that one of them has twice counts once."""
  lists = [sorted(row for row in rows if row < len(world.pool)) for rows in lists]
  others = [np.array(rows, np.int64) for rows in lists]
  first, *further = map(set, lists)
  assert rules.union(world.columns, others=others).rows.tolist() == sorted(first.union(*further))
  assert rules.intersection(world.columns, others=others).rows.tolist() == sorted(
    first.intersection(*further)
  )
  assert rules.minus(world.columns, others=others).rows.tolist() == sorted(
    first.difference(*further)
  )


@given(worlds, some_names, st.sampled_from([0.0, 0.25, 0.5]))
def test_what_is_printed_of_an_aligned_split(world, names, duplicate):
  kept = rules.gap_aligned(world.columns, benchmarks=names).rows
  gone = sorted(set(world.rows()) - set(kept.tolist()))
  over = {
    name: np.array(
      [
        sum(world.sim[name][row, i] > world.anchor_sim[name][0, i] for row in gone)
        for i in range(world.query_rows)
      ]
    )
    for name in names
  }
  cosine = {name: world.anchor_sim[name][0] for name in names}
  figures = splits.describe_aligned(
    world.columns,
    kept,
    benchmarks=names,
    dropped_at=splits.dropped_at_slack(world.columns, names),
    removed_over=over,
    anchor_cosine=cosine,
    duplicate_similarity=duplicate,
    label=world.label,
    domain=np.array(['photo', 'sketch'])[world.domain],
  )
  n = len(world.rows())
  assert figures['dropped'] == len(gone) and figures['dropped_share'] == (len(gone) / n if n else 0)
  for level, shares in figures['by_class'].items():
    mine = [row for row in world.rows() if str(world.label[row]) == level]
    assert shares['candidates'] == len(mine) and shares['dropped'] == len(set(mine) & set(gone))
  excess = world.excess(names)
  assert figures['dropped_at_slack'] == {
    f'{slack:g}': sum(e > slack for e in excess.values())
    for slack in (-0.01, -0.005, 0.0, 0.005, 0.01)
  }
  for name in names:
    q = figures['queries'][name]
    assert q['hit'] == sum(
      any(world.sim[name][row, i] > world.anchor_sim[name][0, i] for row in gone)
      for i in range(world.query_rows)
    )
    assert q['leaked'] == sum(t >= duplicate for t in world.anchor_sim[name][0])
  for i, domain in enumerate(('photo', 'sketch')):
    mine = {row for row in world.rows() if world.domain[row] == i}
    is_removal = bool(mine) and len(mine & set(gone)) > 0.9 * len(mine)
    said = any(
      f'{domain!r} is removed: this is domain removal, not' in w for w in figures['warnings']
    )
    assert said == is_removal
