"""experiment/base_rows.py: rows of the base set and those of each dataset."""

import numpy as np

from clip_jax.experiment.base_rows import BaseRows


def test_rows_are_the_pools_then_the_anchors_then_the_copies():
  base = BaseRows(('pool', 'anchor', 'planted'), (5, 3, 2))
  assert base.dataset_starts == [0, 5, 8, 10]
  own = base.rows_by_dataset(np.array([0, 4, 4, 5, 7, 8, 9]))
  assert {name: rows.tolist() for name, rows in own.items()} == {
    'pool': [0, 4, 4],
    'anchor': [0, 2],
    'planted': [0, 1],
  }


def test_datasets_without_a_row():
  base = BaseRows(('pool', 'anchor'), (0, 3))
  assert {name: rows.tolist() for name, rows in base.rows_by_dataset(np.array([1, 2])).items()} == {
    'pool': [],
    'anchor': [1, 2],
  }
  assert {
    name: len(rows) for name, rows in base.rows_by_dataset(np.zeros(0, np.int64)).items()
  } == {
    'pool': 0,
    'anchor': 0,
  }
