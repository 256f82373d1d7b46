"""kmeans.py: Lloyd's steps against plain NumPy; the same clusters however it is cut or resumed."""

from concurrent import futures
import dataclasses
import threading

from by_number import ByNumber
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.similarity import kmeans

SEEDS = st.integers(0, 2**32 - 1)


def clustered(rng, rows, centers=5, dim=8, spread=0.4):
  x = rng.standard_normal((centers, dim))[rng.integers(centers, size=rows)]
  x = x + spread * rng.standard_normal((rows, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def distances(x, centers):  # [n, K] float64
  return np.square(x[:, None].astype(np.float64) - centers.astype(np.float64)).sum(2)


def same(a, b):
  assert np.array_equal(a.centers, b.centers) and np.array_equal(a.assignment, b.assignment)
  assert (a.iterations, a.changed) == (b.iterations, b.changed)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([1, 5, 64, 200]), st.sampled_from([1, 4, 70]), st.booleans())
def test_each_iteration_is_one_of_lloyds(seed, rows, clusters, copies):
  rng = np.random.default_rng(seed)
  x = clustered(rng, rows)
  if copies:
    x = x[rng.integers(rows, size=rows)]
  usable = rng.random(rows) > 0.2
  usable[0] = True
  x[~usable] = np.nan  # never looked at
  states = []
  final = kmeans.fit(
    x,
    usable,
    clusters=clusters,
    seed=seed,
    tile_rows=64,
    max_iterations=50,
    on_iteration=states.append,
  )
  same(final, states[-1])
  assert [state.iterations for state in states] == list(range(1, len(states) + 1))
  assert final.changed == 0 or final.iterations == 50
  before, good = np.full(rows, -1), x[usable]
  for i, state in enumerate(states):
    assert state.centers.dtype == np.float32 and state.assignment.dtype == np.int32
    assert (state.assignment[~usable] == -1).all()
    d = distances(good, state.centers)
    mine = state.assignment[usable]
    assert (d[np.arange(len(good)), mine] <= d.min(1) + 1e-6).all()
    assert state.changed == (state.assignment != before).sum()
    before = state.assignment
    if i + 1 < len(states):
      for k, center in enumerate(states[i + 1].centers):
        members = good[mine == k].astype(np.float64)
        want = members.mean(0) if len(members) else state.centers[k]
        np.testing.assert_allclose(center, want, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([1, 40, 1500]), st.sampled_from([1, 7, 1000]))
def test_first_centres_are_dissimilar_and_as_many_as_there_are(seed, rows, clusters):
  rng = np.random.default_rng(seed)
  x, usable = clustered(rng, rows, spread=0.2), np.flatnonzero(rng.random(rows) > 0.1)
  chosen = kmeans.initial_rows(x, usable, clusters, seed, 0.9)
  assert np.isin(chosen, usable).all()
  v = x[chosen].astype(np.float64)
  assert (v @ v.T)[~np.eye(len(v), dtype=bool)].max(initial=-1) < 0.9
  if len(chosen) < clusters:  # then every other row is similar to one of them
    rest = np.setdiff1d(usable, chosen)
    assert ((x[rest].astype(np.float64) @ v.T).max(1, initial=-1) >= 0.9).all()
  want, taken = [], np.zeros((0, x.shape[1]))  # the definition: in a random order, one by one
  for row in np.random.default_rng(seed).permutation(usable):
    if len(want) < clusters and (taken @ x[row].astype(np.float64) < 0.9).all():
      want.append(row)
      taken = x[want].astype(np.float64)
  assert chosen.tolist() == want


def test_similarities_at_the_limit_are_decided_exactly(monkeypatch):
  """A thousand copies of one row and a single other: float32 would round some to the wrong side."""
  monkeypatch.setattr(kmeans, 'CANDIDATES', 64)
  rng = np.random.default_rng(0)
  for _ in range(20):
    x = np.repeat(clustered(rng, 2, centers=1), [1000, 1], axis=0)
    limit = float(x[0].astype(np.float64) @ x[-1].astype(np.float64))
    assert len(kmeans.initial_rows(x, np.arange(1001), 2, 0, limit)) == 1
    assert len(kmeans.initial_rows(x, np.arange(1001), 2, 0, np.nextafter(limit, 9))) == 2


def test_too_few_centres_are_said_so(caplog):
  x = np.repeat(np.float16([[1, 0], [0, 1]]), 50, axis=0)
  with caplog.at_level('INFO'):
    found = kmeans.fit(x, np.ones(100, bool), clusters=10, seed=0)
  assert len(found.centers) == 2 and '2 of 10 centres' in caplog.text
  assert len(set(found.assignment[:50])) == 1 == len(set(found.assignment[50:]))


@pytest.mark.parametrize('dim', [8, 640])
def test_tiles_and_shards_change_no_bit(dim):
  rng = np.random.default_rng(dim)
  x, usable = clustered(rng, 900, dim=dim, spread=1), rng.random(900) > 0.1
  clusters = 70 if dim == 8 else 12
  want = kmeans.fit(x, usable, clusters=clusters, seed=1, max_iterations=6)
  assert want.iterations > 2
  for rows, tile_rows in [(x, 64), (x, 500), (ByNumber(x), 256)]:
    same(
      want,
      kmeans.fit(rows, usable, clusters=clusters, seed=1, max_iterations=6, tile_rows=tile_rows),
    )


def test_resuming_goes_on_to_the_same_result():
  rng = np.random.default_rng(0)
  x, usable, states = clustered(rng, 700, spread=1), rng.random(700) > 0.1, []
  want = kmeans.fit(x, usable, clusters=20, seed=1, on_iteration=states.append)
  assert len(states) > 4
  for state in (states[0], states[len(states) // 2], states[-1]):
    same(want, kmeans.fit(x, usable, clusters=20, seed=1, state=state))
  same(states[1], kmeans.fit(x, usable, clusters=20, seed=1, max_iterations=2))


def together(count, work):
  """Returns [work(part)] of parts that meet as processes do, each in a thread."""
  given, meet = [None] * count, threading.Barrier(count, timeout=60)

  def in_part(index):
    def gather(array):
      given[index] = array.copy()
      meet.wait()
      every = np.stack(given)  # raises unless the shapes are equal
      assert {(a.dtype, a.shape) for a in given} == {(array.dtype, array.shape)}
      meet.wait()
      return every

    try:
      return work(kmeans.Part(index, count, gather))
    except BaseException:
      meet.abort()
      raise

  with futures.ThreadPoolExecutor(count) as pool:
    return list(pool.map(in_part, range(count)))


def whole(part, state, rows):
  """Returns a part's state with the whole assignment in part 0."""
  return dataclasses.replace(state, assignment=part.whole(state.assignment, rows))


@pytest.mark.parametrize('count', [1, 2, 3])
def test_parts_give_the_same_bits_also_resumed_by_another_number(monkeypatch, count):
  monkeypatch.setattr(kmeans, 'EXCHANGED', 900)  # several blocks of everything
  rng = np.random.default_rng(0)
  # Numbers so different that sums of them need more than float32.
  x = rng.standard_normal((700, 8)) * rng.choice([1, 1e-3], (700, 8)) + 1e-4
  x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
  usable = rng.random(700) > 0.1
  usable[:250] = False  # of 3 parts, one has no usable row
  common = dict(clusters=12, initial_similarity=1, seed=1, min_change=0.01)
  states = []
  want = kmeans.fit(x, usable, **common, on_iteration=states.append)
  assert len(states) > 4

  def work(part, state=None):
    seen = []
    found = kmeans.fit(
      x,
      usable,
      **common,
      part=part,
      state=state,
      on_iteration=lambda state: seen.append(whole(part, state, 700)),
    )
    assert len(found.assignment) == len(range(700)[part.own(700)])
    rows = kmeans.assign(x, usable, found.centers, part=part)
    return seen, whole(part, found, 700), part.whole(rows, 700)

  (seen, found, rows), *others = together(count, work)
  for mine, theirs in zip(seen, states, strict=True):
    same(mine, theirs)
  same(found, want)
  assert np.array_equal(rows, kmeans.assign(x, usable, want.centers))
  for _, other, rows in others:
    assert np.array_equal(other.centers, want.centers) and not len(rows)
  resumed = together(count, lambda part: work(part, None if part.index else states[3]))
  same(resumed[0][1], want)


@pytest.mark.parametrize('rows, count', [(1, 3), (4, 3), (6, 3), (0, 2)])
def test_parts_may_be_uneven_and_empty(rows, count):
  x = clustered(np.random.default_rng(0), max(rows, 1))[:rows]
  owned = [len(range(rows)[kmeans.Part(i, count).own(rows)]) for i in range(count)]
  assert sum(owned) == rows and owned == sorted(owned, reverse=True)
  if rows:
    usable = np.ones(rows, bool)
    work = lambda part: whole(part, kmeans.fit(x, usable, clusters=2, seed=0, part=part), rows)
    same(together(count, work)[0], kmeans.fit(x, usable, clusters=2, seed=0))


def test_a_bad_row_is_named_by_the_part_that_has_it():
  x, said = clustered(np.random.default_rng(0), 700), []
  x[500] = np.nan

  def work(part):
    try:
      kmeans.fit(x, np.ones(700, bool), clusters=3, seed=0, part=part)
    except InputError as error:
      said.append((part.index, str(error)))
      raise

  with pytest.raises((InputError, threading.BrokenBarrierError)):
    together(2, work)
  ((index, message),) = said
  assert 'pool: row 500 ' in message


def test_an_empty_cluster_keeps_its_centre():
  x = clustered(np.random.default_rng(0), 100)
  far = np.zeros((1, 8), np.float32) + 10
  start = kmeans.KMeans(
    np.concatenate([far, x[:1], x[:1]]).astype(np.float32), np.ones(100, np.int32), 1, 100
  )
  states = []
  kmeans.fit(x, np.ones(100, bool), clusters=3, seed=0, state=start, on_iteration=states.append)
  assert np.array_equal(states[-1].centers[0], far[0])
  assert np.isfinite(states[-1].centers).all() and set(states[-1].assignment) <= {1, 2}


def test_ties_go_to_the_lowest_centre():
  x = clustered(np.random.default_rng(0), 100)
  centers = np.repeat(x[:2].astype(np.float32), [80, 80], axis=0)  # equal ones in three blocks
  state = kmeans.KMeans(centers, np.full(100, -1, np.int32), 0, 100)
  tied = kmeans.fit(
    x, np.ones(100, bool), clusters=160, seed=0, state=state, max_iterations=1, center_block=64
  )
  assert set(tied.assignment) == {0, 80}


def test_bad_input():
  x = clustered(np.random.default_rng(0), 100)
  x[9] = np.inf
  with pytest.raises(InputError, match='pool: row 9 '):
    kmeans.fit(x, np.ones(100, bool), clusters=3, seed=0)
  with pytest.raises(InputError, match='none of its 100 rows'):
    kmeans.fit(x, np.zeros(100, bool), clusters=3, seed=0)
