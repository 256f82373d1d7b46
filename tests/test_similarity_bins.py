"""Bins against plain loops; class effects against the dense regression."""

import numpy as np
import pytest

from clip_jax.evaluation.similarity_bins import accuracy_by_similarity


def data(seed=0, images=2000):
  """Within a class accuracy does not depend on similarity; hard classes are the dissimilar ones."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 8, images)
  similarity = np.clip(0.45 + 0.05 * label + 0.08 * rng.normal(size=images), 0, 1)
  return rng.random((3, images)) < 0.2 + 0.08 * label, similarity, label


def test_bins_are_plain_counts():
  correct, similarity, label = data()
  bins = accuracy_by_similarity(correct, similarity, label)
  assert sum(b.raw.images for b in bins) == 2000
  for b in bins:
    members = (similarity >= b.low) & ((similarity < b.high) | (b.high == 1))
    assert b.raw.images == members.sum() and b.high - b.low == pytest.approx(0.05)
    assert b.raw.value == pytest.approx(correct[:, members].mean())
    assert b.few == (b.raw.images < 20)
    assert b.few or b.raw.low < b.raw.value < b.raw.high
  assert [b.low for b in bins] == sorted(b.low for b in bins)


def test_within_class_is_the_dense_regression():
  correct, similarity, label = data(images=400)
  similarity[label == 0] *= 0.9
  bins = accuracy_by_similarity(correct, similarity, label)
  index = np.array(
    [next(j for j, b in enumerate(bins) if b.low - 1e-9 <= s < b.high) for s in similarity]
  )
  x = np.hstack([np.eye(len(bins))[index], np.eye(8)[label]])
  y = correct.mean(0)
  effect = np.linalg.lstsq(x, y, rcond=None)[0][: len(bins)]
  effect += y.mean() - effect[index].mean()
  np.testing.assert_allclose([b.within_class.value for b in bins], effect, atol=1e-9)


def test_class_effects_take_out_what_classes_explain():
  bins = [b for b in accuracy_by_similarity(*data(images=20_000)) if b.raw.images > 300]
  raw, within = (np.ptp([getattr(b, f).value for b in bins]) for f in ('raw', 'within_class'))
  assert raw > 0.25 and within < 0.06


def test_bins_that_share_no_class_are_not_compared_within_class():
  correct = np.ones((3, 6), bool)
  bins = accuracy_by_similarity(correct, [0.12, 0.18, 0.12, 0.18, 0.5, 0.5], [0, 0, 1, 1, 2, 2])
  assert [b.within_class is None for b in bins] == [False, False, True]
  alone = accuracy_by_similarity(correct, [0.5] * 6, [0] * 6)
  assert len(alone) == 1 and alone[0].within_class is None


def test_edges():
  """0.7 in float32 lies in [0.7, 0.75); a cosine of 1.0004 counts below 1; no value, no bin."""
  similarity = np.array([0.7, 1.0004, 0.99, -0.01, np.nan, -np.inf], np.float32)
  bins = accuracy_by_similarity(np.ones((1, 6)), similarity, np.zeros(6))
  assert [(b.low, b.high, b.raw.images) for b in bins] == [
    (-0.05, 0, 1),
    (0.7, 0.75, 1),
    (0.95, 1, 2),
  ]
  assert accuracy_by_similarity(np.ones((1, 2)), [np.nan, np.nan], [0, 0]) == []
  with pytest.raises(ValueError, match='number of images'):
    accuracy_by_similarity(np.ones((1, 2)), [0.5], [0, 0])


@pytest.mark.parametrize('seeds', [1, 2, 3])
@pytest.mark.parametrize('right', [0, 1])
def test_few_images_are_a_count_and_no_interval_has_width_zero(seeds, right):
  """One image that is right in all seeds, and 19 of them, say little about others like it."""
  rng = np.random.default_rng(3)
  counts = {0.12: 1, 0.22: 19, 0.32: 20, 0.42: 400}
  similarity = np.repeat(list(counts), list(counts.values()))
  label = rng.integers(0, 3, len(similarity))
  correct = rng.random((seeds, len(similarity))) < 0.5
  correct[:, similarity < 0.4] = right
  bins = accuracy_by_similarity(correct, similarity, label)
  assert [b.few for b in bins] == [True, True, False, False]
  for b in bins:
    for found in (b.raw, b.within_class):
      if b.few:
        assert np.isnan([found.low, found.high, found.df]).all() and found.method == 'none'
      elif seeds != 2:  # a range of two seeds is no interval
        assert found.high - found.low > 0.02
  if seeds != 2:  # a twenty-first image could well be the other way
    low, high = bins[2].within_class.low, bins[2].within_class.high
    assert high - low >= bins[2].raw.high - bins[2].raw.low - 0.02 > 0.1
  assert [b.raw.value for b in bins[:3]] == [right] * 3


def test_groups_widen_the_interval():
  correct, similarity, label = data()
  twice = [np.repeat(a, 4, -1) for a in (correct, similarity, label)]
  grouped = accuracy_by_similarity(*twice, groups=np.repeat(np.arange(2000), 4))
  for plain, one in zip(accuracy_by_similarity(correct, similarity, label), grouped, strict=True):
    if plain.raw.images > 100:
      for of in ('raw', 'within_class'):
        wide, narrow = (getattr(b, of).high - getattr(b, of).low for b in (one, plain))
        assert wide == pytest.approx(narrow, rel=0.02), of


def test_the_interval_without_class_effects_is_the_sandwich_of_the_dense_regression():
  """One seed: the textbook HC1-like sandwich by group, with every dummy column written out."""
  rng = np.random.default_rng(1)
  label, group = rng.integers(0, 4, 300), np.arange(300) // 3
  similarity = np.clip(0.4 + 0.1 * label + 0.1 * rng.normal(size=300), 0.11, 0.89)
  correct = (rng.random((1, 300)) < 0.3 + 0.1 * label) | (rng.random(100) < 0.2)[group]
  bins = accuracy_by_similarity(correct, similarity, label, group, width=0.2)
  index = np.array(
    [next(j for j, b in enumerate(bins) if b.low - 1e-9 <= s < b.high) for s in similarity]
  )
  x = np.hstack([np.eye(len(bins))[index], np.eye(4)[label]])
  share = np.bincount(index) / 300
  # b-th row: effect of bin b, less the mean effect, plus the overall mean
  pick = np.hstack([np.eye(len(bins)) - share, np.zeros((len(bins), 4))])
  weights = pick @ np.linalg.pinv(x) + 1 / 300
  residual = correct[0] - x @ np.linalg.pinv(x) @ correct[0]
  assert sum(not b.few for b in bins) == 3
  for b, w in zip(bins, weights, strict=True):
    sums = np.bincount(group, w * residual)
    size = np.bincount(group, w**2) ** 0.5
    effective = size.sum() ** 2 / (size**2).sum()
    few = effective / (effective - 1)
    assert b.within_class.value == pytest.approx(w @ correct[0])
    if b.few:
      continue
    assert b.within_class.error == pytest.approx(
      np.sqrt(few * ((sums - sums.mean()) ** 2).sum()), rel=1e-6
    )
    assert b.within_class.df == pytest.approx(effective - 1)


@pytest.mark.slow
def test_the_interval_without_class_effects_covers():
  rng, hits = np.random.default_rng(2), []
  label = rng.integers(0, 5, 600)
  similarity = np.clip(0.4 + 0.05 * label + 0.1 * rng.normal(size=600), 0.01, 0.99)
  edges = np.floor(similarity / 0.2)
  truth = 0.3 + 0.08 * label + 0.1 * edges
  kept = np.unique(edges, return_counts=True)
  for _ in range(400):
    p = truth + 0.02 * rng.normal(size=(3, 1))
    bins = accuracy_by_similarity(rng.random((3, 600)) < p, similarity, label, width=0.2)
    effects = 0.1 * kept[0] - 0.1 * edges.mean() + truth.mean()
    hits.append([b.within_class.low <= e <= b.within_class.high for b, e in zip(bins, effects)])
  assert (np.mean(hits, 0)[kept[1] > 20] > 0.93).all(), np.mean(hits, 0)
