"""Rows that are no array, as the stages give the search: a shape, a dtype, and rows by their
numbers.
"""

import numpy as np


class ByNumber:
  """Hides an array [N, E] behind its rows: x[rows] gives an array [m, E], and nothing else
  works.
  """

  def __init__(self, array):
    self._array, self.shape, self.dtype = array, array.shape, array.dtype

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    return np.stack([self._array[int(row)] for row in rows]) if len(rows) else self._array[:0]
