"""Intervals against hand computation, SciPy and simulation; decisions against hand values."""

import json
import warnings

from hypothesis import given, settings
from hypothesis import strategies as some
import make_statistics_golden
import numpy as np
import pytest
from scipy import stats

from clip_jax.evaluation import statistics


def anova(d):
  """Two-way random effects by explicit loops: the variance of the mean, and its df."""
  seeds, images = d.shape
  mean = d.sum() / d.size
  ms_s = images * sum((d[s].mean() - mean) ** 2 for s in range(seeds)) / (seeds - 1)
  ms_i = seeds * sum((d[:, i].mean() - mean) ** 2 for i in range(images)) / (images - 1)
  ms_e = sum(
    (d[s, i] - d[s].mean() - d[:, i].mean() + mean) ** 2
    for s in range(seeds)
    for i in range(images)
  ) / ((seeds - 1) * (images - 1))
  ms = max(ms_s + ms_i - ms_e, ms_s, ms_i)
  part = ms_s / ms
  return ms / (seeds * images), 1 / (part / (seeds - 1) + (1 - part) / (images - 1))


def crossed(rng, seeds, images, mean, seed_sd, image_sd, error_sd):
  return (
    mean
    + seed_sd * rng.normal(size=(seeds, 1))
    + image_sd * rng.normal(size=(1, images))
    + error_sd * rng.normal(size=(seeds, images))
  )


def crossed_many(rng, runs, seeds, images, *, seed_sd, image_sd, error_sd):  # [runs, S, Q]
  return (
    seed_sd * rng.normal(size=(runs, seeds, 1))
    + image_sd * rng.normal(size=(runs, 1, images))
    + error_sd * rng.normal(size=(runs, seeds, images))
  )


@pytest.mark.parametrize('components', [(0.3, 0.1, 0.1), (0, 0.5, 0.2), (0, 0, 0.4), (0.1, 0, 0.4)])
def test_crossed_interval_is_the_anova_by_hand(components):
  d = crossed(np.random.default_rng(0), 4, 30, 0.1, *components)
  variance, df = anova(d)
  found = statistics.crossed_interval(d)
  half = stats.t.ppf(0.975, df) * np.sqrt(variance)
  np.testing.assert_allclose(
    [found.value, found.low, found.high, found.error, found.df],
    [d.mean(), d.mean() - half, d.mean() + half, np.sqrt(variance), df],
    rtol=1e-9,
  )
  assert found.p_value == pytest.approx(2 * stats.t.sf(abs(d.mean()) / np.sqrt(variance), df))
  assert (found.method, found.seeds, found.images, found.groups) == ('crossed', 4, 30, 30)


def test_df_lie_between_those_of_seeds_and_images():
  rng = np.random.default_rng(12)
  for seeds, images in ((6, 3), (3, 40)):
    df = [statistics.crossed_interval(rng.normal(size=(seeds, images))).df for _ in range(200)]
    low, high = sorted((seeds - 1, images - 1))
    assert low <= min(df) < max(df) <= high and max(df) - min(df) > 0.3 * (high - low)


def test_mean_squares_and_tests_are_those_of_statsmodels():
  golden = json.loads(make_statistics_golden.PATH.read_text())
  d = make_statistics_golden.layout()
  ms = golden['mean_squares']
  variance, df = anova(d)
  total = max(ms['seeds'] + ms['images'] - ms['error'], ms['seeds'], ms['images'])
  assert variance == pytest.approx(total / d.size)
  found = statistics.two_way(d / d.shape[1])
  assert found == pytest.approx((total / d.size, df))
  np.testing.assert_allclose(statistics.holm(make_statistics_golden.P_VALUES), golden['holm'])
  for (right, images), bounds in zip(make_statistics_golden.COUNTS, golden['wilson'], strict=True):
    found = statistics.image_interval(np.arange(images) < right)
    np.testing.assert_allclose([found.low, found.high], bounds, atol=1e-12)


def test_two_way_takes_many_draws_at_once():
  z = np.random.default_rng(13).normal(size=(5, 3, 8))
  for effective in (None, 5.5):
    variance, df = statistics.two_way(z, effective)
    for k in range(5):
      one = statistics.two_way(z[k], effective)
      assert (variance[k], df[k]) == pytest.approx(one)


def test_the_effective_number_of_groups():
  assert statistics.effective_groups(np.full(7, 3)) == pytest.approx(7)
  assert statistics.effective_groups([4, 1, 1]) == pytest.approx(36 / 18)
  d = crossed(np.random.default_rng(14), 3, 60, 0, 0.1, 0.3, 0.3)
  equal = statistics.crossed_interval(d, np.arange(60) // 10)
  skewed = statistics.crossed_interval(d, np.minimum(np.arange(60), 5))  # 55 images in one group
  assert equal.groups == skewed.groups == 6 and skewed.df < equal.df
  both = statistics.crossed_interval(d[:, :4], [0, 1, 1, 1])  # counts as two groups, the fewest
  assert 1 <= both.df <= 2


@pytest.mark.parametrize('seeds', [3, 5])
def test_type_one_error_if_seeds_vary_and_images_hardly_do(seeds):
  """Satterthwaite's df gives 7.5 to 8 % here at three seeds; the mean square is that of 2 df."""
  rng, runs = np.random.default_rng(15), 4000
  z = crossed_many(rng, runs, seeds, 200, seed_sd=0.05, image_sd=0.3, error_sd=0.1) / 200
  variance, df = statistics.two_way(z)
  wrong = np.abs(z.sum(-1).mean(-1)) > stats.t.ppf(0.975, df) * np.sqrt(variance)
  assert 0.02 < wrong.mean() < 0.066, wrong.mean()  # 6 % and three standard errors of 4,000 runs
  row, column = z.mean(-1), z.mean(-2)
  ms_s, ms_i = 200 * row.var(-1, ddof=1), seeds * column.var(-1, ddof=1)
  rest = z - row[..., None] - column[:, None] + z.mean((1, 2))[:, None, None]
  ms_e = (rest**2).sum((1, 2)) / ((seeds - 1) * 199)
  ms = np.maximum(np.maximum(ms_s + ms_i - ms_e, ms_s), ms_i)
  old = ms**2 / (ms_s**2 / (seeds - 1) + ms_i**2 / 199 + ms_e**2 / ((seeds - 1) * 199))
  old = np.maximum(old, seeds - 1)
  loose = np.abs(z.sum(-1).mean(-1)) > stats.t.ppf(0.975, old) * np.sqrt(variance)
  assert loose.mean() > wrong.mean() + (0.01 if seeds == 3 else 0), loose.mean()


def test_hand_numbers():
  d = np.array([[1, 0, 0, 1], [1, 0, 1, 0], [1, -1, 0, 0.0]])  # means: seeds .5 .5 0; all 1/3
  ms_s, ms_i = 4 * (2 / 36 + 1 / 9) / 2, 3 * (4 / 9 + 4 / 9) / 3
  ms_e = (4 + 1 + 1 - 4 / 3 - 2 * ms_s - 3 * ms_i) / 6
  assert statistics.crossed_interval(d).error == pytest.approx(
    np.sqrt(max(ms_s + ms_i - ms_e, ms_s, ms_i) / 12)
  )


def test_repeating_images_inside_a_group_changes_nothing():
  d = crossed(np.random.default_rng(1), 3, 20, 0.1, 0.05, 0.2, 0.3)
  plain = statistics.crossed_interval(d)
  twice = statistics.crossed_interval(np.repeat(d, 2, 1), np.repeat(np.arange(20), 2))
  assert twice.groups == 20 and twice.images == 40
  np.testing.assert_allclose(
    [twice.value, twice.error, twice.df], [plain.value, plain.error, plain.df]
  )
  assert statistics.crossed_interval(np.repeat(d, 2, 1)).error < 0.99 * twice.error


def test_sizes_of_groups_add_no_variance_of_their_own():
  rng = np.random.default_rng(2)
  group = np.repeat(np.arange(30), rng.integers(1, 30, 30))
  correct = (rng.random((3, len(group))) < 0.9).astype(float)
  ones = statistics.accuracy_interval(correct, group)
  naive = np.bincount(group, correct.mean(0)).std(ddof=1) * np.sqrt(30) / len(group)
  assert ones.error < 0.3 * naive


def test_an_image_without_a_group_stands_alone():
  for names in (
    [None, None, 'a', 'a'],
    ['', '', 'a', 'a'],
    [-1, -1, 7, 7],
    [np.nan, np.nan, 1.0, 1.0],
    np.float32([np.nan, np.nan, 1, 1]),
    np.array(['', '', 'a', 'a']),
  ):
    assert statistics.group_index(names, 4).tolist() == [0, 1, 2, 2]
  with pytest.raises(ValueError, match='3 for 4 images'):
    statistics.group_index(['a'] * 3, 4)


@pytest.mark.parametrize('components', [(0.02, 0.3, 0.3), (0, 0.5, 0.1), (0.08, 0.1, 0.4)])
@pytest.mark.parametrize('seeds', [3, 5])
def test_coverage(seeds, components):
  rng, runs, hits, image_hits = np.random.default_rng(3), 800, 0, 0
  for _ in range(runs):
    d = crossed(rng, seeds, 80, 0.05, *components)
    found = statistics.crossed_interval(d)
    hits += found.low <= 0.05 <= found.high
    image_hits += abs(d.mean() - 0.05) < 1.99 * d.mean(0).std(ddof=1) / np.sqrt(80)
  assert 0.925 < hits / runs < 0.99, (hits / runs, image_hits / runs)
  if components[0] == 0.08:  # the test can fail: seeds matter, and images alone do not cover
    assert image_hits / runs < 0.9


def test_coverage_with_groups():
  rng, runs, hits, loose = np.random.default_rng(4), 500, 0, 0
  for _ in range(runs):
    group = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    d = 0.3 * rng.normal(size=40)[group] + crossed(rng, 3, len(group), 0.05, 0.01, 0.1, 0.2)
    found, ignoring = statistics.crossed_interval(d, group), statistics.crossed_interval(d)
    hits += found.low <= 0.05 <= found.high
    loose += ignoring.low <= 0.05 <= ignoring.high
  assert 0.91 < hits / runs < 0.99 and loose / runs < 0.85, (hits / runs, loose / runs)


def test_bootstrap_agrees_where_it_should():
  d = crossed(np.random.default_rng(5), 12, 300, 0.05, 0.03, 0.4, 0.05)
  exact, drawn = statistics.crossed_interval(d), statistics.bootstrap_interval(d, draws=4000)
  assert drawn.error == pytest.approx(exact.error, rel=0.1)
  assert drawn.value == pytest.approx(exact.value) and drawn.method == 'bootstrap'
  np.testing.assert_allclose(
    [drawn.low, drawn.high], [exact.low, exact.high], atol=0.4 * exact.error
  )
  assert drawn == statistics.bootstrap_interval(d, draws=4000)
  assert drawn.low != statistics.bootstrap_interval(d, draws=4000, seed=1).low


def test_bootstrap_variance_is_unbiased_for_few():
  """Three seeds and nothing else, then five images and nothing else: the variance of a mean."""
  few = np.array([0.1, 0.4, 0.9])
  for d, n in ((np.repeat(few[:, None], 50, 1), 3), (np.tile([0, 0, 1, 1, 0.5], (4, 1)), 5)):
    drawn = statistics.bootstrap_interval(d, draws=20_000)
    means = d.mean(1) if n == 3 else d.mean(0)
    assert drawn.error == pytest.approx(np.sqrt(means.var(ddof=1) / n), rel=0.03)


def test_bootstrap_is_the_resampling_that_it_says():
  """Against a plain loop over the same definition, with groups and few distinct columns."""
  rng = np.random.default_rng(6)
  values = rng.integers(0, 2, (2, 4, 60)).astype(float)
  group = np.repeat(np.arange(32), [1] * 10 + [2, 4] * 7 + [1] * 8)
  units, loops = group.max() + 1, []
  for _ in range(3000):
    seeds = rng.integers(0, 4, 3)
    images = np.concatenate([np.flatnonzero(group == g) for g in rng.integers(0, units, units - 1)])
    loops.append(values[:, seeds][:, :, images].mean((1, 2)))
  drawn = statistics.crossed_bootstrap(values, group, draws=3000)
  np.testing.assert_allclose(drawn.mean(0), np.mean(loops, 0), atol=0.01)
  np.testing.assert_allclose(np.cov(drawn.T), np.cov(np.array(loops).T), rtol=0.15, atol=3e-4)


@pytest.mark.parametrize(('right', 'images'), [(0, 10), (7, 10), (10, 10), (633, 1000), (1, 1)])
def test_wilson_is_scipys(right, images):
  correct = np.arange(images) < right
  expected = stats.binomtest(right, images).proportion_ci(0.95, 'wilson')
  for groups in (None, [None] * images, np.arange(images)):
    found = statistics.image_interval(correct, groups)
    np.testing.assert_allclose([found.low, found.high], expected, atol=1e-12)
    assert found.method == 'wilson' and found.value == right / images
  assert statistics.accuracy_interval(correct[None]) == statistics.image_interval(correct)


def test_cluster_robust_counts_groups_not_images():
  correct = np.arange(50) < 30
  found = statistics.image_interval(np.repeat(correct, 4), np.repeat(np.arange(50), 4))
  assert found.method == 'cluster-robust' and found.groups == 50
  assert found.error == pytest.approx(np.sqrt(0.6 * 0.4 / 49))
  alone = statistics.image_interval(correct)
  assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_one_run_whose_images_are_one_group_has_no_interval():
  found = statistics.image_interval(np.arange(50) < 30, np.zeros(50, int))
  assert found.method == 'none' and np.isnan(found.low) and found.groups == 1


def test_the_range_of_a_linear_estimate_stays_within_0_and_1():
  values = np.array([[1.0, 1, 0], [0, 1, 1]])
  found = statistics.linear_interval(np.array([1.5, -1, 0.5]), values, values)
  assert (found.low, found.high, found.method) == (0, 0.5, 'range')


def test_a_linear_estimate_beyond_1_has_an_interval_with_a_width():
  """It is the one around the nearest possible value, which is nearer to any true one."""
  rng = np.random.default_rng(9)
  values = np.ones((3, 40))
  weights, residual = np.full(40, 1.2 / 40), 0.2 * rng.normal(size=(3, 40))
  found = statistics.linear_interval(weights, values, residual)
  half = stats.t.ppf(0.975, found.df) * found.error
  assert found.value == pytest.approx(1.2) and half < 0.2
  assert [found.low, found.high] == pytest.approx([1 - half, 1])


def test_accuracy_over_seeds():
  rng = np.random.default_rng(7)
  correct = rng.random((4, 500)) < 0.6
  found, plain = statistics.accuracy_interval(correct), statistics.crossed_interval(correct)
  assert found.value == pytest.approx(correct.mean()) and np.isnan(found.p_value)
  np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], atol=2e-3)
  right = statistics.accuracy_interval(np.ones((3, 20)), np.arange(20) // 4)  # 5 groups were seen
  assert right.low == pytest.approx(1 / (1 + stats.t.ppf(0.975, 4) ** 2 / 5)) and right.high == 1
  few = statistics.accuracy_interval(rng.random((3, 30)) < 0.97)
  assert 0 <= few.low < few.value < few.high <= 1


def test_balanced_accuracy():
  rng = np.random.default_rng(8)
  label = np.repeat([0, 3, 7], [100, 10, 40])  # classes 1, 2 have no images
  correct = rng.random((3, 150)) < np.array([0.9, 0.2, 0.5])[np.searchsorted([0, 3, 7], label)]
  found = statistics.balanced_accuracy(correct, label)
  assert found.value == pytest.approx(np.mean([correct[:, label == c].mean() for c in (0, 3, 7)]))
  assert found.error > statistics.accuracy_interval(correct).error
  even = statistics.balanced_accuracy(correct, np.arange(150) % 3)
  plain = statistics.accuracy_interval(correct)
  np.testing.assert_allclose([even.low, even.high], [plain.low, plain.high])


def test_seeds_decide_what_is_said():
  d = np.random.default_rng(9).integers(-1, 2, (3, 40)).astype(float)
  one, two, three = (statistics.crossed_interval(d[:s]) for s in (1, 2, 3))
  assert [e.method for e in (one, two, three)] == ['this checkpoint', 'range', 'crossed']
  assert np.isnan([one.p_value, two.p_value, two.error]).all() and three.p_value <= 1
  assert [two.low, two.high] == sorted(d[:2].mean(1).tolist())
  assert one.error == pytest.approx(d[0].std(ddof=1) / np.sqrt(40)) and one.df == 39


@settings(max_examples=60, deadline=None)
@given(
  some.integers(1, 4), some.integers(1, 12), some.sampled_from([-1, 0, 1]), some.integers(0, 10**6)
)
def test_extremes_are_never_certain(seeds, images, constant, seed):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    rng = np.random.default_rng(seed)
    group = rng.integers(-1, 3, images)
    noise = rng.integers(-1, 2, (seeds, images)).astype(float)
    for d in (np.full((seeds, images), float(constant)), noise):
      for groups in (None, group):
        found = statistics.crossed_interval(d, groups)
        assert found.value == pytest.approx(d.mean())
        if found.method in ('crossed', 'this checkpoint'):
          assert found.low < found.value < found.high
        else:
          assert seeds == 2 or found.groups == 1
        exact = statistics.accuracy_interval(np.abs(d), groups)
        if not np.isnan(exact.low):
          assert 0 <= exact.low <= exact.value <= exact.high <= 1
          assert seeds == 2 or exact.high > exact.low
        statistics.balanced_accuracy(np.abs(d), rng.integers(0, 3, images), groups)
        statistics.bootstrap_interval(d, groups, draws=20)
        assert statistics.equivalence(d, groups).verdict in (
          'equivalent',
          'different',
          'undetermined',
        )


def test_equivalence():
  rng = np.random.default_rng(10)
  nothing = crossed(rng, 3, 5000, 0, 0.0005, 0.1, 0.1)
  found = statistics.equivalence(nothing)
  assert found.verdict == 'equivalent' and found.margin == 0.01
  assert -0.01 < found.low < found.high < 0.01
  narrow = statistics.crossed_interval(nothing, level=0.9)
  assert (found.low, found.high) == (narrow.low, narrow.high)
  assert found.p_value < 0.05
  value = abs(nothing.mean())
  wide = statistics.crossed_interval(nothing)
  assert found.p_value == pytest.approx(stats.t.sf((0.01 - value) / wide.error, wide.df))
  edge = statistics.equivalence(nothing, margin=max(abs(found.low), abs(found.high)))
  assert edge.p_value == pytest.approx(0.05)  # the 90 % interval touches the margin
  assert statistics.equivalence(nothing + 0.05).verdict == 'different'
  noise = crossed(rng, 3, 100, 0.02, 0.01, 0.4, 0.4)
  assert statistics.equivalence(noise).verdict == 'undetermined'
  assert statistics.equivalence(nothing[:1] + 0.05).verdict == 'undetermined'
  assert np.isnan(statistics.equivalence(nothing[:2]).detectable)
  assert statistics.equivalence(nothing[:, :400]).margin == 0.03
  assert statistics.equivalence(np.zeros((3, 20))).verdict == 'undetermined'  # 20 images: no proof
  assert statistics.equivalence(np.zeros((3, 5000))).verdict == 'equivalent'


def test_the_detectable_difference_is_found_four_times_in_five():
  rng = np.random.default_rng(11)
  size = statistics.equivalence(crossed(rng, 5, 400, 0, 0.005, 0.3, 0.1)).detectable
  found = [
    statistics.crossed_interval(crossed(rng, 5, 400, size, 0.005, 0.3, 0.1)).low > 0
    for _ in range(300)
  ]
  assert 0.7 < np.mean(found) < 0.9


def test_mcnemar_hand_values():
  def pair(both, first, second, neither):
    return (
      np.repeat([True, True, False, False], [both, first, second, neither]),
      np.repeat([True, False, True, False], [both, first, second, neither]),
    )

  found = statistics.mcnemar(*pair(20, 1, 5, 3))
  assert (found.first_only, found.second_only) == (1, 5)
  assert found.p_value == pytest.approx((2 * (1 + 6) - 6) / 64)
  assert statistics.mcnemar(*pair(9, 4, 4, 0)).p_value == pytest.approx(1)
  assert statistics.mcnemar(*pair(9, 0, 0, 5)).p_value == pytest.approx(1)
  assert statistics.mcnemar(*pair(0, 10, 0, 0)).p_value == pytest.approx(2**-10)
  first, second = pair(20, 1, 5, 3)
  assert statistics.mcnemar(second, first).p_value == found.p_value


def test_holm():
  np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(statistics.holm([0.02, np.nan, 0.03]), [0.04, np.nan, 0.04])
  np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1, 1])
  assert statistics.holm([]).shape == (0,) and np.isnan(statistics.holm([np.nan])).all()


def test_bad_arrays_are_refused():
  for bad in (np.zeros(5), np.zeros((0, 5)), np.zeros((3, 0)), np.full((3, 5), np.nan)):
    with pytest.raises(ValueError, match='non-empty array|NaN'):
      statistics.crossed_interval(bad)
  with pytest.raises(ValueError, match=r'\(5,\) and second \(4,\)'):
    statistics.mcnemar(np.ones(5), np.ones(4))
  with pytest.raises(ValueError, match='number of images'):
    statistics.balanced_accuracy(np.ones((3, 5)), np.ones(4))
