"""exact.py against brute force: every column, every tie, and the same bits however it is cut."""

import hashlib
import itertools
import os
import subprocess
import sys
from unittest import mock

from by_number import ByNumber
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.similarity import decide, exact

SEEDS = st.integers(0, 2**32 - 1)


def unit(rng, n, dim):
  x = rng.standard_normal((n, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def coarse(rng, n, dim=6):
  """Four entries of +-1/2: float32 dots are exact, and most rows tie with, or equal, another."""
  x = np.zeros((n, dim), np.float16)
  for row in x:
    row[rng.permutation(dim)[:4]] = rng.choice([0.5, -0.5], 4)
  return x


def queries_of(vectors, sizes, thresholds=None):
  edges = np.cumsum([0, *sizes])
  segments = tuple((f'b{i}', int(a), int(b)) for i, (a, b) in enumerate(itertools.pairwise(edges)))
  return exact.Queries(vectors, segments, thresholds)


def same(a, b):
  for benchmark in a:
    for key in a[benchmark]:
      assert np.array_equal(a[benchmark][key], b[benchmark][key], equal_nan=True), (benchmark, key)


def on(accelerator):
  """The way of a GPU or TPU, float16 products and all, or the CPU's, here on the CPU."""
  return mock.patch.object(exact, '_accelerated', return_value=accelerator)


def join(parts, starts, k):
  """What a caller does with shards: columns one after the other, top lists merged."""
  out = {}
  for benchmark in parts[0]:
    results = [part[benchmark] for part in parts]
    similarity, row = exact.merge_top(
      [(r['top_similarity'], r['top_row'] + start) for r, start in zip(results, starts)], k
    )
    out[benchmark] = {
      key: np.concatenate([r[key] for r in results]) for key in ('similarity', 'nearest', 'excess')
    }
    out[benchmark] |= {'top_similarity': similarity, 'top_row': row}
  return out


@settings(max_examples=40, deadline=None)
@given(
  SEEDS,
  st.sampled_from([1, 2, 63, 64, 65, 200]),
  st.sampled_from([(1,), (3, 70), (64, 1, 130)]),
  st.sampled_from([0, 1, 5, 63, 300]),
  st.sampled_from([0, 0.3, 1]),
)
def test_every_column_equals_brute_force_ties_included(seed, rows, sizes, k, unusable):
  check_by_brute_force(seed, rows, sizes, k, unusable, False)


@settings(max_examples=10, deadline=None)
@given(
  SEEDS,
  st.sampled_from([1, 200]),
  st.sampled_from([(3, 70), (64, 1, 130)]),
  st.sampled_from([5, 70]),
  st.sampled_from([0, 0.3]),
)
def test_an_accelerators_columns_equal_brute_force(seed, rows, sizes, k, unusable):
  check_by_brute_force(seed, rows, sizes, k, unusable, True)


def check_by_brute_force(seed, rows, sizes, k, unusable, accelerator):
  rng = np.random.default_rng(seed)
  pool, vectors = coarse(rng, rows), coarse(rng, sum(sizes))
  usable = rng.random(rows) >= unusable
  pool[~usable] = np.nan  # never looked at
  cuts = rng.choice(np.float32([-0.5, 0, 0.25, 0.5, 1]), len(vectors))
  queries = queries_of(vectors, sizes, cuts)
  with on(accelerator):
    found = exact.search_shard(
      pool, usable, queries, k=k, tile_rows=64, query_block=64, devices=jax.devices()[:1]
    )
  good = np.flatnonzero(usable)
  s = pool[good].astype(np.float64) @ vectors.astype(np.float64).T
  for benchmark, start, stop in queries.segments:
    part, result = s[:, start:stop], found[benchmark]
    assert np.array_equal(result['similarity'][good], part.max(1))
    assert np.array_equal(result['nearest'][good], part.argmax(1))
    assert np.array_equal(result['excess'][good], (part - cuts[start:stop]).max(1))
    assert (result['similarity'][~usable] == -np.inf).all()
    assert (result['excess'][~usable] == -np.inf).all() and (result['nearest'][~usable] == -1).all()
    order = np.argsort(-part, axis=0, kind='stable')[:k].T
    assert np.array_equal(result['top_row'], good[order])
    assert np.array_equal(result['top_similarity'], np.take_along_axis(part.T, order, 1))
    assert [result[key].dtype for key in result] == [
      np.float32,
      np.int32,
      np.float32,
      np.float32,
      np.int64,
    ]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([40, 129]), st.sampled_from([5, 640]), st.booleans())
def test_real_vectors_are_within_the_error_bound(seed, rows, dim, accelerator):
  rng = np.random.default_rng(seed)
  pool, vectors, t = unit(rng, rows, dim), unit(rng, 70, dim), rng.uniform(-1, 1, 70)
  with on(accelerator):
    result = exact.search_shard(
      pool,
      np.ones(rows, bool),
      queries_of(vectors, [70], t.astype('f4')),
      k=7,
      tile_rows=64,
      query_block=64,
      devices=jax.devices()[:1],
    )['b0']
  s = pool.astype(np.float64) @ vectors.astype(np.float64).T
  bound = decide.error_bound(dim)
  assert np.abs(result['similarity'] - s.max(1)).max() <= bound
  assert np.abs(result['excess'] - (s - t).max(1)).max() <= bound
  assert (s[np.arange(rows), result['nearest']] >= s.max(1) - 2 * bound).all()
  seventh = np.sort(s, axis=0)[-7]
  assert (np.take_along_axis(s.T, result['top_row'], 1) >= seventh[:, None] - 2 * bound).all()


@pytest.mark.parametrize('dim', [3, 96, 640])
def test_same_bits_for_every_tile_block_and_shard(dim):
  rng = np.random.default_rng(dim)
  pool, sizes = unit(rng, 900, dim), [130, 1, 300]
  pool[rng.integers(900, size=90)] = pool[rng.integers(900, size=90)]
  vectors = unit(rng, sum(sizes), dim)
  vectors[::9] = pool[: len(vectors[::9])]
  usable = rng.random(900) > 0.1
  queries = queries_of(vectors, sizes, rng.uniform(0, 0.5, len(vectors)).astype(np.float32))
  want = exact.search_shard(pool, usable, queries, k=20)
  for tile_rows, query_block in [(64, 64), (100, 512), (512, 1), (4096, 192)]:
    got = exact.search_shard(
      pool, usable, queries, k=20, tile_rows=tile_rows, query_block=query_block
    )
    same(want, got)
  for starts in ([0, 450], [0, 1, 65, 300, 899]):
    for tile_rows in (0, 128):
      parts = [
        exact.search_shard(pool[a:b], usable[a:b], queries, k=20, tile_rows=tile_rows)
        for a, b in zip(starts, [*starts[1:], 900])
      ]
      same(want, join(parts, starts, 20))


@pytest.mark.parametrize('accelerator, spread', [(False, False), (True, False), (True, True)])
def test_same_bits_for_every_number_of_devices(accelerator, spread):
  """Tiles go round the devices; or, too many for one's memory, the queries are spread over them."""
  rng = np.random.default_rng(0)
  pool, sizes = unit(rng, 700, 96), [130, 1, 300]
  pool[rng.integers(700, size=90)] = pool[rng.integers(700, size=90)]
  queries = queries_of(unit(rng, 431, 96), sizes, rng.uniform(0, 0.5, 431).astype(np.float32))
  usable = rng.random(700) > 0.1
  with on(accelerator):
    want = exact.search_shard(
      pool, usable, queries, k=20, tile_rows=128, query_block=64, devices=jax.devices()[:1]
    )
    with mock.patch.object(exact.accelerator, 'too_large', return_value=spread):
      for count in [3] if accelerator else [2, 8]:
        same(
          want,
          exact.search_shard(
            pool,
            usable,
            queries,
            k=20,
            tile_rows=128,
            query_block=64,
            devices=jax.devices()[:count],
          ),
        )


@pytest.mark.parametrize('accelerator', [False, True])
def test_what_is_not_asked_for_is_not_there_and_changes_nothing_else(accelerator):
  rng = np.random.default_rng(0)
  pool, vectors, usable = unit(rng, 200, 8), unit(rng, 90, 8), np.ones(200, bool)
  cuts = np.zeros(90, np.float32)
  with on(accelerator):
    whole = exact.search_shard(pool, usable, queries_of(vectors, [20, 70], cuts), k=5)
    bare = exact.search_shard(pool, usable, queries_of(vectors, [20, 70]), k=0, nearest=False)
  for benchmark, result in bare.items():
    assert np.array_equal(result['similarity'], whole[benchmark]['similarity'])
    assert (result['nearest'] == -1).all() and np.isnan(result['excess']).all()
    assert result['top_row'].shape == (20 if benchmark == 'b0' else 70, 0)


def test_only_an_accelerator_uses_more_than_one_device_unasked():
  rng = np.random.default_rng(0)
  pool, queries = unit(rng, 600, 8), queries_of(unit(rng, 4, 8), [4])
  for accelerator, want in ((False, 1), (True, len(jax.local_devices()))):
    with on(accelerator), mock.patch.object(exact, '_tiles_on_devices', return_value=[]) as passes:
      exact.search_shard(pool, np.ones(600, bool), queries, k=0, tile_rows=64)
    assert len(passes.call_args.args[2].places) == want


def test_a_pair_has_the_same_bits_in_columns_and_lists():
  rng = np.random.default_rng(0)
  pool, vectors = unit(rng, 300, 96), unit(rng, 150, 96)
  queries = queries_of(vectors, [150])
  result = exact.search_shard(pool, np.ones(300, bool), queries, k=300, tile_rows=128)['b0']
  s = np.empty((150, 300), np.float32)
  np.put_along_axis(s, result['top_row'], result['top_similarity'], 1)
  assert np.array_equal(result['similarity'], s.max(0))
  assert np.array_equal(result['nearest'], s.argmax(0))


BITS = """
import hashlib, os, sys
if sys.argv[1] == 'one':
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if sys.argv[1] == 'plain':
  os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
import numpy as np
from clip_jax.similarity import exact
rng = np.random.default_rng(0)
x = rng.standard_normal((1400, 640))
x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
queries = exact.Queries(x[:400], (('a', 0, 150), ('b', 150, 400)), np.zeros(400, np.float32))
found = exact.search_shard(x[400:], np.ones(1000, bool), queries, k=10, tile_rows=512)
print(hashlib.sha256(b''.join(v.tobytes() for r in found.values() for v in r.values())).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='needs Linux to pin to one CPU')
def test_same_bits_for_every_number_of_threads():
  environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  del environment['OMP_NUM_THREADS'], environment['OPENBLAS_NUM_THREADS']
  digests = [
    subprocess.run(
      [sys.executable, '-c', BITS, threads],
      capture_output=True,
      text=True,
      check=True,
      env=environment,
    ).stdout
    for threads in ('one', 'all', 'plain')
  ]
  assert len(set(digests)) == 1 and len(digests[0]) == 1 + len(hashlib.sha256().hexdigest())


def test_a_memory_mapped_pool_and_shards_give_the_same(tmp_path):
  rng = np.random.default_rng(0)
  pool, queries = unit(rng, 200, 8), queries_of(unit(rng, 20, 8), [20])
  np.save(tmp_path / 'a.npy', pool)
  usable = np.ones(200, bool)
  want = exact.search_shard(pool, usable, queries, k=3)
  same(want, exact.search_shard(np.load(tmp_path / 'a.npy', mmap_mode='r'), usable, queries, k=3))
  same(want, exact.search_shard(ByNumber(pool), usable, queries, k=3))


def test_excess_is_nan_where_a_benchmark_has_no_thresholds():
  rng = np.random.default_rng(0)
  pool, vectors, usable = unit(rng, 5, 8), unit(rng, 4, 8), np.array([1, 0, 1, 1, 1], bool)
  found = exact.search_shard(pool, usable, queries_of(vectors, [4]), k=1)
  assert np.isnan(found['b0']['excess']).all()
  cuts = np.float32([0, 0, np.nan, np.nan])  # the class means beside a benchmark
  found = exact.search_shard(pool, usable, queries_of(vectors, [2, 2], cuts), k=1)
  assert np.isfinite(found['b0']['excess'][usable]).all() and np.isnan(found['b1']['excess']).all()
  assert (found['b1']['nearest'][usable] >= 0).all()


def test_merging_is_associative_and_drops_padding():
  rng = np.random.default_rng(0)
  rows = rng.permutation(60).reshape(3, 1, 20)
  parts = [(rng.integers(0, 4, r.shape).astype(np.float32), r) for r in rows]
  parts[1][0][:, 15:], parts[1][1][:, 15:] = -np.inf, -1  # as a search without enough rows pads
  whole = exact.merge_top(parts, 12)
  steps = exact.merge_top([exact.merge_top(parts[1:], 12), parts[0]], 12)
  assert all(np.array_equal(a, b) for a, b in zip(whole, steps))
  order = sorted((-s, r) for part in parts for s, r in zip(part[0][0], part[1][0]))[:12]
  assert list(zip(-whole[0][0], whole[1][0])) == order
  similarity, row = exact.merge_top(parts, 1000)
  assert similarity.shape == (1, 60) and (row[0, -5:] == -1).all()


def nearly_tied(rng, rows, count):
  """Anchors that differ, for these queries, by less than float32 resolves, and repeats of them."""
  small = np.arange(9) % 2 == 0  # between the large entries, so that each addition rounds
  anchor, queries = np.repeat(unit(rng, 1, 9), rows, axis=0), unit(rng, count, 9)
  anchor[:, ~small] *= 0.95 / np.linalg.norm(anchor[0, ~small].astype(float))
  anchor[:, small] = rng.uniform(-0.15, 0.15, (rows, 5))
  queries[:, ~small] /= np.linalg.norm(queries[:, ~small].astype(float), axis=1)[:, None]
  queries[:, small] = rng.integers(-4, 5, (count, 5)) * 2.0**-24
  return np.concatenate([anchor, anchor]), queries


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 64, 150]), st.sampled_from([1, 64, 70]), st.booleans())
def test_thresholds_equal_float64_brute_force(seed, rows, count, tied):
  rng = np.random.default_rng(seed)
  anchor, queries = (
    nearly_tied(rng, rows, count) if tied else (unit(rng, rows, 9), unit(rng, count, 9))
  )
  usable = rng.random(len(anchor)) > 0.2
  usable[rng.integers(len(anchor))] = True
  good = np.flatnonzero(usable)
  s = queries.astype(np.float64) @ anchor[good].astype(np.float64).T  # exact
  anchor[~usable] = 0
  t, nearest = exact.thresholds(anchor, usable, queries, tile_rows=64, query_block=64)
  assert np.array_equal(t, s.max(1)) and np.array_equal(nearest, good[s.argmax(1)])
  assert t.dtype == np.float64 and nearest.dtype == np.int64


@settings(max_examples=25, deadline=None)
@given(
  SEEDS,
  st.sampled_from([1, 64, 150]),
  st.sampled_from([1, 70]),
  st.sampled_from([1, 2, 9]),
  st.booleans(),
)
def test_anchor_top_equals_float64_brute_force(seed, rows, count, k, tied):
  rng = np.random.default_rng(seed)
  anchor, queries = (
    nearly_tied(rng, rows, count) if tied else (unit(rng, rows, 9), unit(rng, count, 9))
  )
  usable = rng.random(len(anchor)) > 0.2
  usable[rng.permutation(len(anchor))[:k]] = True
  good = np.flatnonzero(usable)
  if k > len(good):
    with pytest.raises(InputError, match=f'anchor: only {len(good)} of its {len(anchor)} rows'):
      exact.anchor_top(anchor, usable, queries, k)
    return
  s = queries.astype(np.float64) @ anchor[good].astype(np.float64).T  # exact
  anchor[~usable] = 0
  order = np.argsort(-s, axis=1, kind='stable')[:, :k]
  for tile_rows in (0, 64):
    t, row = exact.anchor_top(anchor, usable, queries, k, tile_rows=tile_rows, query_block=64)
    assert np.array_equal(t, np.take_along_axis(s, order, 1)) and np.array_equal(row, good[order])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([0, 1, 64, 150]), st.sampled_from([1, 70]), st.booleans())
def test_pairs_over_equals_float64_brute_force(seed, count, queries, tied):
  """Cuts are similarities of rows themselves, or a hair beside, so that most decisions are ties."""
  rng = np.random.default_rng(seed)
  x, q = nearly_tied(rng, 100, queries) if tied else (unit(rng, 200, 9), unit(rng, queries, 9))
  rows = np.sort(rng.permutation(200)[:count])
  s = q.astype(np.float64) @ x.astype(np.float64).T  # exact
  cut = s[np.arange(queries), rng.integers(200, size=queries)]
  cut = cut + rng.choice([0, 2**-47, -(2**-47), 1e-8, -1e-8], queries)
  cut[rng.random(queries) < 0.1] = np.nan  # an unusable query
  pool = np.where(np.isin(np.arange(200), rows)[:, None], x, np.float16(np.nan))  # others: not read
  parts = list(exact.pairs_over(pool, rows, q, cut, tile_rows=64, query_block=64))
  assert len(parts) == -(-count // 64)
  for part, (query, row, similarity) in enumerate(parts):
    tile = rows[64 * part : 64 * part + 64]
    want, position = np.nonzero(s[:, tile] > cut[:, None])
    assert np.array_equal(query, want) and np.array_equal(row, tile[position])
    assert np.array_equal(similarity, s[query, row])
    assert (query.dtype, row.dtype, similarity.dtype) == (np.int64, np.int64, np.float64)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([1, 70]), st.booleans())
def test_float16_at_its_edges(seed, count, accelerator):
  """Subnormals, both zeros, and vectors as long and as short as is let through."""
  rng = np.random.default_rng(seed)

  def edgy(n):
    x = rng.choice(np.float16([2**-24, -(2**-24), 2**-14, 0, -0.0, 2**-15 + 2**-24]), (n, 7))
    x[np.arange(n), rng.integers(7, size=n)] = rng.choice(np.float16([1, 0.9004, 1.099, -1]), n)
    return x

  pool, vectors = edgy(150), edgy(count)
  with on(accelerator):
    result = exact.search_shard(
      pool,
      np.ones(150, bool),
      queries_of(vectors, [count]),
      k=3,
      tile_rows=64,
      devices=jax.devices()[:1],
    )['b0']
  s = pool.astype(np.float64) @ vectors.astype(np.float64).T
  assert np.abs(result['similarity'] - s.max(1)).max() <= decide.error_bound(7)
  t, row = exact.anchor_top(pool, np.ones(150, bool), vectors, 3, tile_rows=64)
  order = np.argsort(-s.T, axis=1, kind='stable')[:, :3]
  assert np.array_equal(row, order) and np.array_equal(t, np.take_along_axis(s.T, order, 1))


def test_nothing_usable():
  rng = np.random.default_rng(0)
  pool, vectors, usable = unit(rng, 5, 8), unit(rng, 4, 8), np.zeros(5, bool)
  result = exact.search_shard(pool, usable, queries_of(vectors, [4], np.zeros(4, 'f4')), k=3)['b0']
  assert (result['similarity'] == -np.inf).all() and result['top_row'].shape == (4, 0)
  with pytest.raises(InputError, match='none of its 5 rows is usable'):
    exact.thresholds(pool, usable, vectors)


@pytest.mark.parametrize('value', [np.nan, 0, np.inf, 65504, 2**-24, 0.5])
def test_bad_vectors_are_named(value):
  rng = np.random.default_rng(0)
  pool, vectors, usable = unit(rng, 90, 8), unit(rng, 4, 8), np.ones(90, bool)
  pool[71] = value
  with pytest.raises(InputError, match='pool/00003.npy: row 71 '):
    exact.search_shard(pool, usable, queries_of(vectors, [4]), k=3, name='pool/00003.npy')
  with pytest.raises(InputError, match='anchor: row 71 '):
    exact.thresholds(pool, usable, vectors)
  with pytest.raises(InputError, match='removed: row 71 '):
    list(exact.pairs_over(pool, np.arange(70, 72), vectors, np.zeros(4), name='removed'))
  usable[71] = False
  exact.search_shard(pool, usable, queries_of(vectors, [4]), k=3)
  vectors[2] = value
  with pytest.raises(InputError, match='queries: row 2 '):
    exact.search_shard(pool, usable, queries_of(vectors, [4]), k=3)


@pytest.mark.parametrize(
  'make',
  [
    lambda x: exact.Queries(x.astype(np.float32), (('a', 0, 4),)),
    lambda x: exact.Queries(x, (('a', 0, 4),), np.zeros(3, np.float32)),
    lambda x: exact.Queries(x, (('a', 0, 4), ('b', 4, 4))),
    lambda x: exact.search_shard(x[:, :7], np.ones(4, bool), queries_of(x, [4]), k=1),
    lambda x: exact.search_shard(x, np.ones(3, bool), queries_of(x, [4]), k=1),
  ],
)
def test_wrong_shapes_are_refused(make):
  with pytest.raises(ValueError):
    make(unit(np.random.default_rng(0), 4, 8))
