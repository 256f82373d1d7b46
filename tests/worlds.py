"""Columns full of ties, with their exact numbers, for the tests of the rules."""

import numpy as np

from clip_jax.pruning import rules

NAMES = ('sketch', 'val')


def make_world(seed, n=40, queries=3, noise=4e-6, levels=2):
  """Returns columns whose float32 values are off by up to `noise`, and the exact numbers.

  Exact similarities lie on a coarse grid plus a few parts in 10^9: many exact ties, and many
  near-ties that float32 cannot tell apart.
  """
  rng = np.random.default_rng(seed)
  exact = {
    name: rng.integers(0, 4, [n, queries]) / 4 + rng.integers(0, 3, [n, queries]) * 1e-9
    for name in NAMES
  }
  t = {name: rng.integers(1, 4, queries) / 4 + 1e-9 for name in NAMES}
  highest = {name: exact[name].max(axis=1) for name in NAMES}
  excess = {name: (exact[name] - t[name]).max(axis=1) for name in NAMES}

  def blurred(values):
    return (values + rng.uniform(-noise, noise, n)).astype(np.float32)

  columns = rules.Columns(
    candidates=rng.random(n) < 0.8,
    similarity={name: blurred(highest[name]) for name in NAMES},
    excess={name: blurred(excess[name]) for name in NAMES},
    exact_similarity=lambda names, rows: np.max([highest[b][rows] for b in names], axis=0),
    exact_excess=lambda names, rows: np.max([excess[b][rows] for b in names], axis=0),
    anchor_class=rng.integers(0, 2, n).astype(np.int32),
    anchor_class_similarity=(rng.integers(0, levels, n) / 9).astype(np.float32),
    caption_length=rng.integers(0, levels, n).astype(np.int32),
    image_pixels=rng.integers(0, levels, n) * 1000,
    domain=np.array(['sketch', None], object)[rng.integers(0, 2, n)],
  )
  return columns, exact, t


def candidate_list(columns):
  return [row for row, usable in enumerate(columns.candidates) if usable]
