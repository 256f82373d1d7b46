"""Every figure draws valid SVG that holds the words and the numbers given to it."""

import functools
import re
from types import SimpleNamespace
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clip_jax.reporting import figures

RNG = np.random.default_rng(0)
BINS = [
  {
    'low': 0.5 + 0.05 * i,
    'high': 0.55 + 0.05 * i,
    'n': n,
    'accuracy': 0.4 + 0.1 * i,
    'accuracy_low': 0.3,
    'accuracy_high': 0.6,
  }
  for i, n in enumerate((3, 40, 50))
]

from looks import LOOKS

accuracy_by_similarity = functools.partial(figures.accuracy_by_similarity, looks=LOOKS)
accuracy_by_size = functools.partial(figures.accuracy_by_size, looks=LOOKS)
differences = functools.partial(figures.differences, looks=LOOKS)
loss_curves = functools.partial(figures.loss_curves, looks=LOOKS)
robustness_plane = functools.partial(figures.robustness_plane, looks=LOOKS)


def words(text: str) -> str:
  return ' '.join(t.strip() for t in ET.fromstring(text).itertext() if t.strip())


def point(size, accuracy, low=None, high=None):
  return {'size': size, 'accuracy': accuracy, 'low': low, 'high': high}


def test_histogram_names_both_sets_and_their_medians():
  text = figures.similarity_histogram(
    np.full(9, 0.5), np.full(9, 0.8), title='val', limits=(0.2, 1)
  )
  assert 'anchor, median 0.50' in words(text) and 'pool, median 0.80' in words(text)


def test_histogram_without_an_anchor_shows_the_pool_alone():
  text = figures.similarity_histogram(None, RNG.random(20), title='val', limits=(0, 1))
  assert 'anchor' not in words(text) and 'pool, median' in words(text)


def test_bins_say_their_size_and_pale_ones_are_pale():
  one = {'name': 'base', 'rule': 'all', 'adjusted': False, 'bins': BINS}
  text = accuracy_by_similarity([one], title='val', xlabel='similarity')
  assert {'3', '40', '50', 'similarity', 'base'} <= set(words(text).split())
  assert re.search(r'opacity: 0.3', text)  # n = 3
  solid = [{**b, 'n': 40} for b in BINS]
  text = accuracy_by_similarity([{**one, 'bins': solid}], title='val', xlabel='similarity')
  assert not re.search(r'opacity: 0.3[^0-9]', text)


def test_bins_take_curves_without_intervals_and_without_bins():
  bare = [{**b, 'accuracy_low': None, 'accuracy_high': None} for b in BINS]
  accuracy_by_similarity(
    [
      {'name': 'base', 'rule': 'all', 'adjusted': False, 'bins': bare},
      {'name': 'out', 'rule': 'all', 'adjusted': True, 'bins': []},
    ],
    title='t',
    xlabel='x',
  )


def test_size_panel_says_near_and_far_in_words():
  text = accuracy_by_size(
    {'near': [point(50, 0.3, 0.2, 0.4)], 'far': [point(50, 0.6)], 'random': [point(50, 0.5)]},
    title='sketch',
    base=point(100, 0.68),
    reference={'accuracy': 0.2, 'low': 0.1, 'high': 0.3},
    limits=(0, 1),
  )
  found = words(text)
  assert 'near-pruned (most similar removed)' in found
  assert 'far-pruned (most similar kept)' in found
  assert 'base (the whole pool), 68.0 %' in found and 'anchor only, 20.0 %' in found


def test_size_panel_without_base_and_reference():
  accuracy_by_size({'near': [point(50, 0.3)]}, title='t', base=None, reference=None, limits=(0, 1))


def test_differences_show_titles_numbers_and_margin():
  rows = [
    {
      'title': 'p on b',
      'detail': '\u22123.1',
      'rule': 'gap_aligned',
      'estimate': -0.031,
      'low': None,
      'high': None,
    }
  ]
  text = differences(rows, title='T', xlabel='points', margin=0.03)
  assert 'p on b' in words(text) and '\u22123.1' in words(text)


def test_dose_and_loss_curves():
  points = [{'share': s, 'estimate': -0.05 * s, 'low': -0.1, 'high': 0.0} for s in (1.0, 0.5)]
  assert 'aligned count' in words(figures.dose(points, title='t', look=LOOKS['gap_aligned']))
  curves = [{'rule': 'all', 'steps': np.arange(5), 'loss': np.ones(5)}] * 2
  assert words(loss_curves(curves, title='t')).count('base (the whole pool)') == 1


def test_a_long_loss_curve_is_drawn_by_means_of_equal_parts():
  draw = lambda n: loss_curves(
    [{'rule': 'all', 'steps': np.arange(n), 'loss': np.arange(n) % 2}], title='t'
  )
  assert len(draw(figures.LOSS_POINTS * 100)) < 2 * len(draw(figures.LOSS_POINTS))
  assert figures._part_means(np.arange(400) % 2).tolist() == [0.5] * 200
  assert figures._part_means(np.arange(3)).tolist() == [0, 1, 2]


X = np.linspace(0.1, 0.9, 9)
LINE = {'x': X, 'y': 0.6 * X, 'low': 0.5 * X, 'high': 0.7 * X}


def accuracy(value, low, high):
  return SimpleNamespace(value=value, low=low, high=high)


@pytest.mark.parametrize('line', [None, LINE])
def test_plane_takes_equal_points_extremes_and_a_line(line):
  nan = float('nan')
  half = accuracy(0.5, 0.4, 0.6)
  points = [
    {'rule': 'all', 'x': accuracy(1.0, 0.9, 1.0), 'y': accuracy(0.0, nan, nan)},
    {'rule': 'gap_aligned', 'x': half, 'y': half},
  ]
  found = words(robustness_plane(points, title='t', xname='val', yname='b', line=line))
  assert 'accuracy on val' in found
  assert ('models trained on ImageNet alone, 95 % band' in found) == (line is not None)
  robustness_plane(points[1:], title='t', xname='val', yname='b')


def test_figures_are_pure():
  draw = lambda: figures.similarity_histogram(
    np.linspace(0, 1, 9), np.linspace(0, 1, 9), title='t', limits=(0, 1)
  )
  assert draw() == draw()
