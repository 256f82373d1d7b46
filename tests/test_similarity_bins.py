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
  assert sum(b.images for b in bins) == 2000
  for b in bins:
    members = (similarity >= b.low) & ((similarity < b.high) | (b.high == 1))
    assert b.images == members.sum() and b.high - b.low == pytest.approx(0.05)
    assert b.accuracy == pytest.approx(correct[:, members].mean())
    assert b.few == (b.images < 20)
    assert b.accuracy_low <= b.accuracy <= b.accuracy_high or b.images == 1
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
  np.testing.assert_allclose([b.within_class for b in bins], effect, atol=1e-9)


def test_class_effects_take_out_what_classes_explain():
  bins = [b for b in accuracy_by_similarity(*data(images=20_000)) if b.images > 300]
  raw, within = (np.ptp([getattr(b, f) for b in bins]) for f in ('accuracy', 'within_class'))
  assert raw > 0.25 and within < 0.06


def test_bins_that_share_no_class_are_not_compared_within_class():
  correct = np.ones((3, 6), bool)
  bins = accuracy_by_similarity(correct, [0.12, 0.18, 0.12, 0.18, 0.5, 0.5], [0, 0, 1, 1, 2, 2])
  assert [np.isnan(b.within_class) for b in bins] == [False, False, True]
  alone = accuracy_by_similarity(correct, [0.5] * 6, [0] * 6)
  assert len(alone) == 1 and np.isnan(alone[0].within_class)


def test_edges():
  """0.7 in float32 lies in [0.7, 0.75); a cosine of 1.0004 counts below 1; no value, no bin."""
  similarity = np.array([0.7, 1.0004, 0.99, -0.01, np.nan, -np.inf], np.float32)
  bins = accuracy_by_similarity(np.ones((1, 6)), similarity, np.zeros(6))
  assert [(b.low, b.high, b.images) for b in bins] == [(-0.05, 0, 1), (0.7, 0.75, 1), (0.95, 1, 2)]
  assert accuracy_by_similarity(np.ones((1, 2)), [np.nan, np.nan], [0, 0]) == []
  with pytest.raises(ValueError, match='number of images'):
    accuracy_by_similarity(np.ones((1, 2)), [0.5], [0, 0])


def test_groups_widen_the_interval():
  correct, similarity, label = data()
  twice = [np.repeat(a, 4, -1) for a in (correct, similarity, label)]
  grouped = accuracy_by_similarity(*twice, groups=np.repeat(np.arange(2000), 4))
  for plain, one in zip(accuracy_by_similarity(correct, similarity, label), grouped, strict=True):
    if plain.images > 100:
      assert one.accuracy_high - one.accuracy_low == pytest.approx(
        plain.accuracy_high - plain.accuracy_low, rel=0.02
      )
