"""decide.py: float64 is exact for float16 vectors, and every decision equals one in fractions."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from clip_jax.similarity import decide

QUICK = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def unit(rng, n, dim):
  x = rng.standard_normal((n, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def edgy(rng, n, dim):
  """Unit vectors with float16's extremes in them: subnormals, zeros of both signs, one large."""
  x = unit(rng, n, dim)
  tiny = rng.choice(np.float16([2**-24, -(2**-24), 2**-14, 0.0, -0.0, 2**-15 + 2**-24]), (n, dim))
  x = np.where(rng.random((n, dim)) < 0.7, tiny, x)
  x[:, 0] = 0
  x[:, 0] = np.sqrt(np.maximum(0, 1 - np.square(x, dtype=np.float64).sum(1)))
  return x


def fraction_dot(a, b) -> Fraction:
  return sum(Fraction(float(i)) * Fraction(float(j)) for i, j in zip(a, b))


@QUICK
@given(SEEDS, st.sampled_from([1, 7, 64, 300]))
def test_a_float64_sum_of_float16_products_rounds_in_no_order(seed, dim):
  rng = np.random.default_rng(seed)
  for make in (unit, edgy):
    a, b = make(rng, 2, dim).astype(np.float64)
    exact = fraction_dot(a, b)
    assert Fraction(float(a @ b)) == exact
    for _ in range(3):
      order = rng.permutation(dim)
      total = 0.0
      for i in order:
        total += a[i] * b[i]
      assert Fraction(total) == exact == Fraction(float((a[order] * b[order]).sum()))


@QUICK
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 300))
def test_pair_dots_are_exact_both_ways(seed, rows, queries, pairs):
  """Many pairs of few vectors go through a matrix product, few of many do not."""
  rng = np.random.default_rng(seed)
  x, q = edgy(rng, rows, 9), unit(rng, queries, 9)
  query, row = rng.integers(queries, size=pairs), rng.integers(rows, size=pairs)
  want = [float(fraction_dot(q[i], x[j])) for i, j in zip(query, row)]
  assert decide.pair_dots(q, query, x, row).tolist() == want


@QUICK
@given(SEEDS, st.sampled_from([2, 64, 640]))
def test_error_bound_holds(seed, dim):
  """Against the worst order we know: all the large sums first, in float32."""
  rng = np.random.default_rng(seed)
  a, b = np.abs(unit(rng, 2, dim)) * np.float16(1.09)
  products = np.sort(a.astype(np.float32) * b.astype(np.float32))[::-1]
  exact = float(a.astype(np.float64) @ b.astype(np.float64))
  assert abs(np.cumsum(products, dtype=np.float32)[-1] - exact) <= decide.error_bound(dim)


def cut_off(values, largest):
  """Numbers without the bits that lie 24 or more below the largest one's first."""
  unit = 2.0 ** (np.frexp(np.maximum(largest, 2.0**-126))[1] - 24)
  return np.trunc(values / unit) * unit


@QUICK
@given(SEEDS, st.sampled_from([2, 64, 640]), st.sampled_from([4, 16]))
def test_error_bound_holds_for_sums_that_cut_off(seed, dim, width):
  """As tensor cores add: some products and the sum so far aligned to the largest, none rounded."""
  rng = np.random.default_rng(seed)
  a, b = np.abs(unit(rng, 2, dim)) * np.float16(1.09)
  products = np.sort(a.astype(np.float64) * b.astype(np.float64))[::-1]
  total = 0.0
  for i in range(0, dim, width):
    terms = np.append(products[i : i + width], total)
    total = cut_off(terms, terms.max()).sum()
    total = float(cut_off(total, total))
  assert 0 <= products.sum() - total <= decide.error_bound(dim)


def test_error_bound_says_when_1e_5_is_enough():
  assert decide.error_bound(30) < 1e-5 < decide.error_bound(31)


@QUICK
@given(SEEDS, st.integers(1, 5), st.integers(0, 30))
def test_update_best_keeps_the_highest_and_lowest_row(seed, queries, pairs):
  rng = np.random.default_rng(seed)
  best, nearest = np.full(queries, -np.inf), np.full(queries, -1)
  seen = [
    (q, v, r)
    for r, (q, v) in enumerate(
      zip(rng.integers(queries, size=pairs), rng.integers(3, size=pairs).astype(float))
    )
  ]
  for part in (seen[: pairs // 2], seen[pairs // 2 :]):
    part = [part[i] for i in rng.permutation(len(part))]
    q, v, r = (np.array([p[i] for p in part]) for i in range(3))
    decide.update_best(best, nearest, q.astype(int), v, r.astype(int))
  for query in range(queries):
    want = min(((-v, r) for q, v, r in seen if q == query), default=(np.inf, -1))
    assert (-best[query], nearest[query]) == want


@QUICK
@given(SEEDS, st.integers(1, 5), st.integers(0, 40), st.sampled_from([1, 2, 7]))
def test_update_top_keeps_the_k_highest_ties_lowest_row_first(seed, queries, pairs, k):
  rng = np.random.default_rng(seed)
  best, row = np.full((queries, k), -np.inf), np.full((queries, k), -1)
  q, v = rng.integers(queries, size=pairs), rng.integers(3, size=pairs).astype(float)
  order = rng.permutation(pairs)
  for part in (order[: pairs // 2], order[pairs // 2 :]):
    decide.update_top(best, row, q[part], v[part], part)
  for query in range(queries):
    want = sorted((-v[r], r) for r in range(pairs) if q[r] == query)[:k]
    want += [(np.inf, -1)] * (k - len(want))
    assert list(zip(-best[query], row[query])) == want


@QUICK
@given(SEEDS, st.integers(0, 30), st.integers(1, 30))
def test_exact_similarity_and_excess(seed, rows, queries):
  rng = np.random.default_rng(seed)
  x, q = edgy(rng, rows, 6), unit(rng, queries, 6)
  t = rng.uniform(-1, 1, queries)
  s = [[float(fraction_dot(i, j)) for j in q] for i in x]
  assert decide.exact_similarity(x, q).tolist() == [max(row) for row in s]
  assert decide.exact_excess(x, q, t).tolist() == [max(row - t) for row in s]


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.sampled_from([0, 1, 63, 200]), st.sampled_from([1, 70]))
def test_count_over_decides_every_tie(seed, rows, queries):
  """Thresholds are similarities of rows themselves, or a hair beside, so that most pairs tie."""
  rng = np.random.default_rng(seed)
  x, q = unit(rng, rows, 5), unit(rng, queries, 5)
  x = x[rng.integers(max(rows, 1), size=rows)] if rows else x  # exact duplicates, too
  s = q.astype(np.float64) @ x.astype(np.float64).T  # exact
  t = s[np.arange(queries), rng.integers(rows, size=queries)] if rows else np.zeros(queries)
  t = t + rng.choice([0, 2**-47, -(2**-47), 1e-8, -1e-8], queries)
  margins = (0.0, 0.02, -0.01)
  want = np.stack([(s > (t - margin)[:, None]).sum(1) for margin in margins], 1)
  got = decide.count_over(x, q, t, margins, tile_rows=64, query_block=64)
  assert got.dtype == np.int64 and np.array_equal(got, want)


def test_count_over_without_queries():
  x = unit(np.random.default_rng(0), 3, 5)
  assert decide.count_over(x, x[:0], np.zeros(0)).shape == (0, 2)
