"""Explained share, difference in differences, placebo and dose on data with a known answer."""

import json
import warnings

import make_statistics_golden
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from clip_jax.evaluation import causal, robustness, statistics


def runs(rng, seeds, images, rate):
  return rng.random((seeds, images)) < rate


def exactly(right, images=10_000, seeds=3):
  """Every seed gets the same number right, on other images: known means, some noise."""
  return np.stack([np.roll(np.arange(images) < right, 1000 * s) for s in range(seeds)])


def test_the_papers_share():
  """ImageNet-Sketch: base 50.21, pruned 44.78, about 14 on the effective-robustness line."""
  found = causal.explained_share(exactly(5021), exactly(4478), [0.14] * 3, reference_name='line')
  assert found.value == pytest.approx((50.21 - 44.78) / (50.21 - 14))
  assert f'{found.value:.0%}' == '15%'
  assert found.reason == '' and found.low < found.value < found.high
  assert found.loss.value == pytest.approx(0.0543) and found.lead.value == pytest.approx(0.3621)
  same = causal.explained_share(exactly(5021), exactly(4478), exactly(1400))
  assert same.value == pytest.approx(found.value)


def test_share_is_0_for_no_loss_and_1_for_all():
  base, reference = exactly(5000), exactly(1000)
  none, everything = (
    causal.explained_share(base, gap, reference, control_name='matched')
    for gap in (base, reference)
  )
  assert (none.value, everything.value) == (0, 1) and none.control == 'matched'
  assert none.low < 0 < none.high  # equal answers on every image are not certainty


def test_no_share_without_room():
  rng = np.random.default_rng(0)
  base, gap = runs(rng, 3, 500, 0.5), runs(rng, 3, 500, 0.4)
  for reference in (base, runs(rng, 3, 500, 0.6), [0.5, 0.52, 0.49]):
    found = causal.explained_share(base, gap, reference)
    assert np.isnan([found.value, found.low, found.high]).all()
    assert 'base is not shown to be better than anchor_only' in found.reason
  assert causal.explained_share(base, gap, base, groups=['one'] * 500).reason
  behind = base.copy()
  behind[0, :3] = False  # one seed is 3 images behind: more than 0, and not shown to be
  close = causal.explained_share(base, gap, behind)
  assert close.lead.value > 0 and close.reason


def test_share_by_number_of_seeds():
  rng = np.random.default_rng(1)
  base, gap, reference = (runs(rng, 3, 2000, p) for p in (0.5, 0.45, 0.2))
  one, two, three = (causal.explained_share(base[:s], gap[:s], reference[:s]) for s in (1, 2, 3))
  assert [s.method for s in (one, two, three)] == ['this checkpoint', 'range', 'crossed']
  per_seed = (base.mean(1) - gap.mean(1)) / (base.mean(1) - reference.mean(1))
  assert [two.low, two.high] == pytest.approx(sorted(per_seed[:2]))
  assert one.low < one.value < one.high
  assert three == causal.explained_share(base, gap, reference)  # seeded


def test_the_error_of_a_line_widens_the_share_and_its_denominator():
  base, gap = exactly(5021), exactly(4478)
  line = dict(reference=[0.14] * 3, reference_name='line')
  known = causal.explained_share(base, gap, **line)
  assert known == causal.explained_share(base, gap, **line, reference_error=0.0, reference_df=5)
  wide = causal.explained_share(base, gap, **line, reference_error=0.05, reference_df=20)
  assert wide.value == known.value and wide.loss == known.loss
  assert wide.low < known.low and wide.high > known.high
  assert wide.lead.error == pytest.approx(np.hypot(known.lead.error, 0.05))
  own = known.lead.error**2
  df = (own + 0.0025) ** 2 / (own**2 / known.lead.df + 0.0025**2 / 20)
  assert wide.lead.df == pytest.approx(df)
  half = stats.t.ppf(0.975, df) * wide.lead.error
  assert [wide.lead.low, wide.lead.high] == pytest.approx(
    [known.lead.value - half, known.lead.value + half]
  )
  assert wide.lead.p_value == pytest.approx(2 * stats.t.sf(known.lead.value / wide.lead.error, df))
  far = causal.explained_share(base, gap, **line, reference_error=0.2, reference_df=20)
  assert far.reason.startswith('base is not shown to be better than the effective-robustness line')
  two = causal.explained_share(base[:2], gap[:2], [0.14] * 2, reference_error=0.2, reference_df=20)
  assert two == causal.explained_share(base[:2], gap[:2], [0.14] * 2)  # a range


def test_the_share_covers_over_refits_of_the_line(monkeypatch):
  """The line is refitted from few models, so that its error is most of the share's."""
  rng, runs_, models = np.random.default_rng(5), 200, logit(np.linspace(0.4, 0.8, 8))
  x, images = np.array([0.5, 0.52, 0.54]), 1500
  expected = lambda: float(expit(logit(x) - 2).mean())
  true = (0.6 - 0.4) / (0.6 - expected())
  hits = {True: 0, False: 0}
  for k in range(runs_):
    hard = rng.random(images)
    base, gap = (hard + 0.05 * rng.normal(size=(3, images)) < rate for rate in (0.6, 0.4))
    fit = robustness.fit_line(expit(models), expit(models - 2 + 0.6 * rng.normal(size=8)))
    monkeypatch.setitem(robustness.LINES, ('made', 'val'), (fit, fit))
    error, df = robustness.mean_line_error('made', x)
    line = [fit.accuracy(value) for value in x]
    for holds in hits:
      found = causal.explained_share(
        base, gap, line, reference_error=error * holds, reference_df=df, draws=200, seed=k
      )
      hits[holds] += found.low <= true <= found.high
  assert hits[True] / runs_ > 0.92, hits
  assert hits[False] / runs_ < 0.85, hits


@pytest.mark.parametrize('seed_sd', [0.02, 0.15])
def test_share_covers(seed_sd):
  rng, hits = np.random.default_rng(2), 0
  grid = np.linspace(-4, 4, 41)
  z = seed_sd * grid[:, None] + 1.5 * grid
  weight = np.exp(-(grid[:, None] ** 2 + grid**2) / 2)
  truth = [np.average(expit(b + z), weights=weight) for b in (0, -0.3, -2.2)]
  share = (truth[0] - truth[1]) / (truth[0] - truth[2])
  for _ in range(120):
    image = 1.5 * rng.normal(size=400)
    base, gap, reference = (
      runs(rng, 3, 400, expit(b + seed_sd * rng.normal(size=(3, 1)) + image))
      for b in (0, -0.3, -2.2)
    )
    found = causal.explained_share(base, gap, reference, draws=300)
    hits += found.reason == '' and found.low <= share <= found.high
  assert hits / 120 > 0.91, hits / 120


def contrast_data(rng, *, effect, seeds=4, images=4000):
  """Hit queries sit in classes where P loses anyway: standardising by class must take that out."""
  label = rng.integers(0, 5, images)
  hit = rng.random(images) < np.array([0.1, 0.2, 0.4, 0.7, 0.9])[label]
  class_loss = np.array([0, 0.02, 0.05, 0.1, 0.15])[label]
  control = runs(rng, seeds, images, 0.7)
  pruned = runs(rng, seeds, images, 0.7 - class_loss - effect * hit)
  return pruned, control, hit, label


def test_difference_in_differences_finds_a_planted_effect():
  rng = np.random.default_rng(3)
  for effect in (0.0, 0.1):
    pruned, control, hit, label = contrast_data(rng, effect=effect)
    found = causal.difference_in_differences(pruned, control, hit, ~hit, label)
    assert found.estimate.low < -effect < found.estimate.high and found.reason == ''
    assert found.estimate.error < 0.04
  d = pruned.mean(0) - control.mean(0).astype(float)
  classes = [c for c in range(5) for _ in range((hit & (label == c)).sum())]
  by_hand = np.mean([d[hit & (label == c)].mean() - d[~hit & (label == c)].mean() for c in classes])
  assert found.estimate.value == pytest.approx(by_hand)
  naive = d[hit].mean() - d[~hit].mean()
  assert naive < found.estimate.value - 0.03  # the test can fail: the raw contrast is confounded
  assert (found.hit, found.unhit, found.used) == (hit.sum(), (~hit).sum(), 1.0)


def test_difference_in_differences_covers():
  rng, covered = np.random.default_rng(4), 0
  for _ in range(200):
    pruned, control, hit, label = contrast_data(rng, effect=0.1, images=600)
    found = causal.difference_in_differences(pruned, control, hit, ~hit, label).estimate
    covered += found.low <= -0.1 <= found.high
  assert covered / 200 >= 0.93, covered / 200


def test_difference_in_differences_needs_50_queries_in_shared_classes():
  rng = np.random.default_rng(5)
  pruned, control, hit, label = contrast_data(rng, effect=0, images=400)
  few = hit & (np.cumsum(hit) <= 49)
  found = causal.difference_in_differences(pruned, control, few, ~hit, label)
  assert found.estimate is None and 'not estimable: 49 hit' in found.reason
  few = ~hit & (np.cumsum(~hit) <= 49)
  found = causal.difference_in_differences(pruned, control, hit, few, label)
  assert found.estimate is None and 'and 49 unhit' in found.reason
  apart = causal.difference_in_differences(pruned, control, hit, ~hit, hit.astype(int))
  assert apart.estimate is None and apart.used == 0  # no class holds both kinds
  assert causal.difference_in_differences(pruned, control, ~hit & hit, hit, label).hit == 0
  with pytest.raises(ValueError, match='marked both hit and unhit'):
    causal.difference_in_differences(pruned, control, hit, hit, label)


def test_a_lead_without_an_interval_is_named():
  one = np.ones((3, 20))
  found = causal.explained_share(one * 0.5, one, one, groups=np.zeros(20, int))
  assert found.reason.endswith('(\u221250.0 points, no interval: all images belong to one group)')


def test_images_of_a_contrast_are_those_of_classes_with_both_kinds():
  pruned, control, hit, label = contrast_data(np.random.default_rng(5), effect=0, images=400)
  hit[label == 0] = True
  found = causal.difference_in_differences(pruned, control, hit, ~hit, label)
  assert found.estimate is not None and 0 < found.used < 1
  assert found.estimate.images == found.estimate.groups == (label != 0).sum() < hit.size


def test_placebo():
  rng = np.random.default_rng(6)
  control, others = runs(rng, 4, 3000, 0.6), runs(rng, 4, 2000, 0.8)
  pruned, others_pruned = runs(rng, 4, 3000, 0.5), runs(rng, 4, 2000, 0.77)
  found = causal.placebo(pruned, control, others_pruned, others)
  assert found.estimate.value == pytest.approx(
    pruned.mean() - control.mean() - others_pruned.mean() + others.mean()
  )
  assert found.estimate.low < -0.07 < found.estimate.high < 0
  assert (found.hit, found.unhit, found.estimate.groups) == (3000, 2000, 5000)
  names = np.arange(3000)  # the first 2,000 images of both sets come from one photo each
  assert (
    causal.placebo(pruned, control, others_pruned, others, names, names[:2000]).estimate.groups
    == 3000
  )
  with pytest.raises(ValueError, match='same seeds: got 4 and 3'):
    causal.placebo(pruned, control, others_pruned[:3], others[:3])


def test_what_a_benchmark_and_its_placebo_share_cancels():
  rng = np.random.default_rng(7)
  control, pruned = runs(rng, 3, 800, 0.6), runs(rng, 3, 800, 0.5)
  same = causal.placebo(pruned, control, pruned, control, np.arange(800), np.arange(800)).estimate
  apart = causal.placebo(pruned, control, pruned, control).estimate
  assert same.value == 0 and same.error < 0.2 * apart.error


def dose_data(rng, slope, seeds=3, images=1500):
  label = rng.integers(0, 6, images)
  excess = np.maximum(rng.normal(0.02, 0.08, images), -1)
  amount = np.maximum(excess, 0)
  eta = np.array([-1, -0.5, 0, 0.5, 1, 1.5])[label] + 2 * amount
  seed = 0.3 * rng.normal(size=(seeds, 1))
  control = runs(rng, seeds, images, expit(eta + seed))
  pruned = runs(rng, seeds, images, expit(eta + seed - 0.2 + slope * amount))
  return pruned, control, excess, label


def test_dose_recovers_a_planted_slope():
  rng = np.random.default_rng(8)
  found = [causal.dose(*dose_data(rng, -6.0)) for _ in range(60)]
  slopes, errors = np.array([(f.value, f.error) for f in found]).T
  assert slopes.mean() == pytest.approx(-6, abs=0.4)
  assert slopes.std(ddof=1) == pytest.approx(errors.mean(), rel=0.35)
  assert np.mean([f.low <= -6 <= f.high for f in found]) > 0.93
  assert np.mean([abs(causal.dose(*dose_data(rng, 0.0)).value) < 2.5 for _ in range(20)]) > 0.8


@pytest.mark.parametrize('seeds', [3, 5])
def test_dose_covers_if_the_slope_varies_over_seeds(seeds):
  """Scores summed by group alone, with seed effects, cover about 85 %: the seeds' slopes vary."""
  rng, runs_, hits, by_group = np.random.default_rng(16), 200, 0, 0
  for _ in range(runs_):
    slopes = -6 + 3 * rng.normal(size=(seeds, 1))
    data = dose_data(rng, slopes, seeds)
    found = causal.dose(*data)
    hits += found.low <= -6 <= found.high
    _, scores = causal._dose_fit(
      np.stack([data[1], data[0]], 1), np.maximum(data[2], 0), data[3], np.arange(1500)
    )
    half = 1.96 * np.sqrt((scores.mean(0) ** 2).sum())
    by_group += abs(found.value + 6) <= half
  assert hits / runs_ >= 0.93, hits / runs_
  assert by_group / runs_ < 0.9, by_group / runs_


def test_dose_is_the_logistic_regression_of_statsmodels():
  golden = json.loads(make_statistics_golden.PATH.read_text())['dose']
  pruned, control, excess, label, group = make_statistics_golden.dose_data()
  found = causal.dose(pruned, control, excess, label, group)
  slope, scores = causal._dose_fit(
    np.stack([control, pruned], 1), np.maximum(excess, 0), label, group
  )
  assert found.value == slope == pytest.approx(golden['slope'], rel=1e-6)
  by_group = np.sqrt((scores.mean(0) ** 2).sum())
  by_seed = np.sqrt((scores.sum(1) ** 2).sum()) / 3
  assert (by_group, by_seed) == pytest.approx(
    (golden['error']['group'], golden['error']['seed']), rel=1e-6
  )
  assert (found.images, found.dropped, found.groups, found.seeds) == (240, 0, 80, 3)
  variance, df = statistics.two_way(scores)  # groups of equal size
  assert (found.error, found.df) == pytest.approx((np.sqrt(variance), df))
  assert found.low == pytest.approx(found.value - stats.t.ppf(0.975, df) * found.error)
  assert variance >= by_group**2 and variance >= by_seed**2


def test_seeds_decide_what_a_dose_says():
  pruned, control, excess, label = dose_data(np.random.default_rng(17), -6, seeds=3)
  one, two, three = (causal.dose(pruned[:s], control[:s], excess, label) for s in (1, 2, 3))
  assert [d.method for d in (one, two, three)] == ['this checkpoint', 'range', 'crossed']
  assert np.isnan([one.p_value, two.p_value, two.df]).all() and three.p_value < 1
  each = [causal.dose(pruned[[s]], control[[s]], excess, label).value for s in range(2)]
  assert [two.low, two.high] == pytest.approx(sorted(each))


def test_dose_at_the_edges():
  rng = np.random.default_rng(10)
  pruned, control, excess, label = dose_data(rng, -4, images=600)
  for runs_ in (pruned, control):
    runs_[:, label == 0], runs_[:, label == 1] = True, False
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = causal.dose(pruned, control, excess, label)
    assert found.dropped == (label < 2).sum() and found.reason == '' and found.p_value >= 0
    assert np.isnan(causal.dose(pruned[:1], control[:1], excess, label).p_value)
    assert causal.dose(pruned | True, control | True, excess, label).images == 0
    per_class = causal.dose(pruned, control, label * 0.01, label)  # the class effects take it all
    assert 'dose hardly varies' in per_class.reason and np.isnan(per_class.value)
    assert causal.dose(pruned, control, -np.abs(excess), label).reason  # nobody is hit
    separated = np.broadcast_to(excess > 0, control.shape)  # right exactly where there is a dose
    assert 'separates' in causal.dose(separated, separated, excess, label).reason
    assert causal.dose(pruned, control, excess, label, ['one'] * 600).reason
  with pytest.raises(ValueError, match='2 queries have no excess'):
    causal.dose(pruned, control, np.where(np.arange(600) < 2, np.nan, excess), label)
