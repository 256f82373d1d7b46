import pickle

import numpy as np
import pytest

from clip_jax.data import views


class _Source:
  def __init__(self, name, n):
    self._name, self._n = name, n

  def __len__(self):
    return self._n

  def __getitem__(self, row):
    assert type(row) is int and 0 <= row < self._n
    return {'caption': self.caption(row), 'image': b'', 'label': row}

  def caption(self, row):
    return f'{self._name}{row}'


def test_concatenation_numbers_rows_through():
  both = views.Concatenation([_Source('a', 3), _Source('empty', 0), _Source('b', 2)])
  assert [both.caption(i) for i in range(len(both))] == ['a0', 'a1', 'a2', 'b0', 'b1']
  assert [sample['caption'] for sample in both] == ['a0', 'a1', 'a2', 'b0', 'b1']
  assert [sample['caption'] for sample in views.Concatenation([])] == []


@pytest.mark.parametrize('dtype', [np.int64, np.int32, np.uint32])
def test_subset_keeps_the_order_of_its_rows(dtype):
  both = views.Concatenation([_Source('a', 3), _Source('b', 3)])
  some = views.Subset(both, np.array([5, 0, 3], dtype))
  assert [sample['caption'] for sample in some] == ['b2', 'a0', 'b0'] and some.caption(2) == 'b0'
  assert [sample['label'] for sample in views.Subset(some, np.array([2]))] == [0]


def test_rows_in_a_file_are_mapped_and_a_pickle_holds_its_name_only(tmp_path):
  np.save(tmp_path / 'rows.npy', np.arange(100_000)[::-1])
  some = views.Subset(_Source('a', 100_000), tmp_path / 'rows.npy')
  assert isinstance(some._rows.base, np.memmap)
  data = pickle.dumps(some)
  assert len(data) < 500
  again = pickle.loads(data)
  assert len(again) == 100_000 and again.caption(0) == 'a99999'
  assert pickle.loads(pickle.dumps(views.Subset(_Source('a', 9), np.array([4])))).caption(0) == 'a4'


def test_indices_outside_are_errors():
  some = views.Subset(_Source('a', 9), np.array([1, 2]))
  for index in (-1, 2, 10**12):
    with pytest.raises(IndexError):
      some[index]
    with pytest.raises(IndexError):
      views.Concatenation([some]).caption(index)
  for rows in (np.array([True, False]), np.array([1.0]), np.array([[1]])):
    with pytest.raises(ValueError, match='integers'):
      views.Subset(_Source('a', 9), rows)
