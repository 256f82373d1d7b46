"""Curves over a cut: the lines are where the numbers say, empty counts are left out, names are
there.
"""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clip_jax.reporting import curves, svg

SLACK = np.linspace(-0.05, 0.05, 11)


def words(text: str) -> str:
  return ' '.join(t.strip() for t in ET.fromstring(text).itertext() if t.strip())


def line(name, rows, together=False):
  return {'name': name, 'rows': np.asarray(rows), 'at_zero': int(rows[5]), 'together': together}


def path_points(text: str, color: str) -> int:
  """Returns of how many points the longest line of a colour is made."""
  paths = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: {color}', text)
  return max(path.count('L') + 1 for path in paths)


def test_rows_by_slack_names_its_lines_and_leaves_out_empty_counts():
  rows = np.array([900, 800, 700, 600, 500, 400, 300, 0, 0, 0, 0])
  text = curves.rows_by_slack(
    SLACK,
    [line('sketch', rows), line('all together', rows + 1, True)],
    title='T',
    limits=(-0.05, 0.05),
  )
  found = words(text)
  assert 'sketch' in found and 'all together' in found and 'rows removed' in found
  assert path_points(text, svg.SERIES[0][0]) == 7
  assert '0.00' in found and '1 10 100 1k' in found


def test_one_line_needs_no_names():
  text = curves.rows_by_slack(
    SLACK, [line('sketch', np.arange(11)[::-1])], title='T', limits=(-0.05, 0.05)
  )
  assert 'sketch' not in words(text)


def test_nothing_dropped_at_all_draws_too():
  curves.rows_by_slack(SLACK, [line('sketch', np.zeros(11, int))], title='T', limits=(-0.02, 0.02))


def test_rows_by_cut_is_in_percent():
  lines = [
    {
      'name': 'a name that is far too long for two columns',
      'kept': np.linspace(1, 0, 11),
      'together': False,
    },
    {'name': 'b', 'kept': np.linspace(0.5, 0, 11), 'together': True},
  ]
  found = words(curves.rows_by_cut(np.linspace(0, 1, 11), lines, title='T', limits=(0, 1)))
  assert '% of candidates kept' in found and 'far too long' in found and '75' in found


def test_many_benchmarks_differ_in_colour_or_dash():
  lines = [{'name': str(i), 'kept': np.ones(3), 'together': False} for i in range(20)]
  text = curves.rows_by_cut(np.arange(3), lines, title='T', limits=(0, 2))
  assert len(set(svg.SERIES)) == len(svg.SERIES) >= 20 and all(
    color in text for color, _ in svg.SERIES
  )


@pytest.mark.parametrize(
  'clusters, labels', [((1, 2, 5, 20), ['1', '2', '5', '20']), ((9, 10, 11), ['9'])]
)
def test_recall_by_clusters_labels_do_not_meet(clusters, labels):
  points = [{'clusters': k, 'recall': 0.8, 'low': 0.7, 'high': 0.9} for k in clusters]
  text = curves.recall_by_clusters(points, title='T')
  ticks = words(text).split('clusters')[0].split()
  assert ticks[: len(labels)] == labels and '% of pairs found' in words(text)


def test_curves_are_pure():
  draw = lambda: curves.rows_by_slack(
    SLACK, [line('a', np.arange(11)[::-1])], title='t', limits=(-0.05, 0.05)
  )
  assert draw() == draw()


def test_accuracy_by_samples_draws_each_seed_and_the_mean_of_shared_counts():
  two = [{640: 0.2, 1280: 0.4, 1920: 0.5}, {1280: 0.6, 640: 0.4}]
  lines = [{'name': 'base', 'seeds': two}, {'name': 'pruned', 'seeds': [{640: 0.1, 1280: 0.2}]}]
  text = curves.accuracy_by_samples(lines, title='sketch')
  found = words(text)
  assert all(word in found for word in ('sketch', 'base', 'pruned', 'samples seen', 'accuracy, %'))
  drawn = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {svg.SERIES[0][0]}', text)
  assert [path.count('L') + 1 for path in drawn] == [3, 2, 2]  # two seeds and their mean


def test_accuracy_by_samples_without_shared_counts_draws_the_seeds():
  lines = [{'name': 'base', 'seeds': [{640: 0.2, 1280: 0.3}, {700: 0.4, 1400: 0.5}]}]
  text = curves.accuracy_by_samples(lines, title='sketch')
  drawn = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {svg.SERIES[0][0]}', text)
  assert [path.count('L') + 1 for path in drawn] == [2, 2] and 'base' in words(text)
