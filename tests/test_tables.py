"""How numbers are written, and that CSV holds what the page shows."""

import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest

from clip_jax.core import progress
from clip_jax.reporting import tables

NAN = float('nan')


def estimate(value, low=NAN, high=NAN, method='crossed'):
  return SimpleNamespace(value=value, low=low, high=high, method=method)


@pytest.mark.parametrize(
  'value, text',
  [
    (0.6234, '62.3'),
    (1.0, '100.0'),
    (-0.0311, '\u22123.1'),
    (-0.0001, '0.0'),
    (0.0, '0.0'),
    (NAN, '\u2013'),
    (None, '\u2013'),
  ],
)
def test_percent(value, text):
  assert tables.percent(value) == text


@pytest.mark.parametrize(
  'value, text',
  [(0.012, '+1.2'), (-0.031, '\u22123.1'), (0.0, '0.0'), (-0.0004, '0.0'), (None, '\u2013')],
)
def test_points(value, text):
  assert tables.points(value) == text


@pytest.mark.parametrize(
  'value, text',
  [(0.031, '3.1 %'), (0.0004, '0.04 %'), (0.0, '0.0 %'), (1.0, '100.0 %'), (None, '\u2013')],
)
def test_share(value, text):
  assert tables.share(value) == text


@pytest.mark.parametrize(
  'value, text',
  [
    (1234567, '1,234,567'),
    (-5, '\u22125'),
    (28.0, '28'),
    (32.94, '32.9'),
    (999.7, '1,000'),
    (-999.4, '\u2212999'),
    (np.int64(7), '7'),
    (0, '0'),
    (None, '\u2013'),
  ],
)
def test_number(value, text):
  assert tables.number(value) == text


@pytest.mark.parametrize(
  'value, text',
  [(0.0321, 'p = 0.032'), (1e-9, 'p < 0.001'), (1.0, 'p = 1.000'), (NAN, ''), (None, '')],
)
def test_probability(value, text):
  assert tables.probability(value) == text


def test_bounds_say_whether_they_are_an_interval():
  assert tables.bounds(estimate(0.6, 0.55, 0.65)) == '[55.0, 65.0]'
  assert tables.bounds(estimate(0.6, 0.55, 0.65, 'range')) == '(seeds: 55.0 to 65.0)'
  assert tables.bounds(estimate(0.6)) == tables.bounds(None) == ''
  assert tables.estimate_text(estimate(-0.02, -0.04, 0.0)) == '\u22122.0 [\u22124.0, 0.0]'
  assert tables.estimate_text(estimate(NAN)) == '\u2013'


def test_ratios_have_no_exponents():
  assert [tables.ratio(value) for value in (1.0234, 9.996, 12.34, 18000.0)] == [
    '1.02',
    '10',
    '12',
    '> 1,000',
  ]


def test_listed():
  assert [progress.join_names(names) for names in ((), ('a',), ('a', 'b'), ('a', 'b', 'c'))] == [
    '',
    'a',
    'a and b',
    'a, b and c',
  ]


def test_csv_keeps_full_precision_and_empty_fields():
  records = [
    {'name': 'a, "b"', 'value': 0.1 + 0.2},
    {'name': 'c', 'low': None, 'value': NAN, 'n': 3},
  ]
  rows = list(csv.DictReader(io.StringIO(tables.csv_text(records))))
  assert rows[0] == {'name': 'a, "b"', 'value': '0.30000000000000004', 'low': '', 'n': ''}
  assert rows[1] == {'name': 'c', 'value': '', 'low': '', 'n': '3'}


def test_csv_writes_numpy_numbers_as_plain_ones():
  assert tables.csv_text([{'a': np.float64(0.5), 'b': np.int64(2)}]) == 'a,b\n0.5,2\n'


def test_matrix_shades_what_is_shared_but_not_the_diagonal():
  table = tables.matrix('overlap', ['a', 'b'], np.array([[1, 0.25], [0.5, 1]]))
  assert [[cell.text for cell in row] for row in table.rows] == [
    ['a', '100', '25'],
    ['b', '50', '100'],
  ]
  assert [cell.shade for cell in table.rows[0][1:]] == [None, 0.25]
  assert table.records[1] == {'split': 'a', 'also_in': 'b', 'share': 0.25}


def test_bars_show_the_first_and_say_that_the_csv_holds_all():
  entries = [{'what': str(i), 'count': i, 'total': 10} for i in range(5)]
  table = tables.bars('n', 'c', 'class', entries, most=2)
  assert len(table.rows) == 2 and len(table.records) == 5 and 'the CSV has all' in table.notes[0]
  assert table.rows[1][3].text == '10.0 %' and table.rows[1][3].bar == 0.1
  assert not tables.bars('n', 'c', 'class', entries, most=5).notes
