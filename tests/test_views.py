import pickle

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import order, views


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


class _Many(_Source):
  """In shards of 4 rows, read many at a time."""

  def __init__(self, name, n):
    super().__init__(name, n)
    self.calls = []

  @property
  def starts(self):
    return np.append(np.arange(0, self._n, 4), self._n)

  def read_samples(self, rows):
    self.calls.append(list(rows))
    return [self[row] for row in rows]


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


@given(st.lists(st.integers(0, 8), max_size=12))
def test_many_samples_are_those_read_one_by_one_in_the_order_asked(asked):
  first, second = _Many('a', 4), _Many('c', 3)
  both = views.Concatenation([first, _Source('b', 2), second])
  expected = [both[i] for i in asked]
  assert views.read_samples(both, asked) == both.read_samples(asked) == expected
  assert all(len(source.calls) <= 2 for source in (first, second))  # one a call
  some = views.Subset(both, np.array([8, 3, 3, 0]))
  found = [sample['caption'] for sample in some.read_samples([0, 2, 1, 3, 0])]
  assert found == ['c2', 'a3', 'a3', 'a0', 'c2']
  for view in (both, some):
    with pytest.raises(IndexError):
      view.read_samples([0, len(view)])


def test_rows_may_be_repeated_and_are_several_samples(tmp_path):
  rows = np.array([0, 2, 2, 2, 5, 9, 9])
  np.save(tmp_path / 'rows.npy', rows)
  for given_rows in (rows, tmp_path / 'rows.npy'):
    some = views.Subset(_Many('a', 10), given_rows)
    assert len(some) == 7 and [sample['label'] for sample in some] == rows.tolist()
    assert some.starts.tolist() == [0, 4, 5, 7]  # shards of rows 0-3, 4-7, 8-9


@pytest.mark.parametrize('bad', [-1, 10, 10**9])
def test_rows_that_are_not_there_are_named(tmp_path, bad):
  source = _Many('a', 10)
  for rows in ([bad, 1], [1, bad]):
    np.save(tmp_path / 'rows.npy', np.array(rows))
    with pytest.raises(InputError, match=f'rows.npy .* row {bad}.*10 rows'):
      views.Subset(source, tmp_path / 'rows.npy')
  some = views.Subset(source, np.array([1, bad, 2]))  # only the ends are looked at before
  for read in (lambda: some[1], lambda: some.caption(1), lambda: some.read_samples([0, 1])):
    with pytest.raises(InputError, match=f'row {bad} at index 1'):
      read()
  assert some[0]['label'] == 1 and len(views.Subset(source, np.zeros(0, int))) == 0


@given(st.lists(st.integers(0, 29), max_size=40), st.integers(1, 5))
def test_shards_of_a_view_hold_the_rows_of_the_source_s_shards(rows, most):
  base = views.Concatenation([_Many('a', 17), _Many('b', 0), _Many('c', 13)])
  shard_of = {
    row: shard
    for shard, low in enumerate(base.starts[:-1])
    for row in range(low, base.starts[shard + 1])
  }
  assert set(shard_of) == set(range(30))
  some = views.Subset(base, np.sort(np.array(rows, np.int32)))
  starts = some.starts
  assert len(starts) == len(base.starts) and starts[0] == 0 and starts[-1] == len(rows)
  for shard, (low, high) in enumerate(zip(starts, starts[1:])):
    assert all(shard_of[some._row(i)] == shard for i in range(low, high))
  if rows:
    assert order.block_starts(starts, most)[-1] == len(rows)


def test_unsorted_rows_have_no_shards(monkeypatch):
  monkeypatch.setattr(views, '_CHECKED', 2)
  for rows in ([1, 0], [0, 1, 2, 1], [0, 3, 2, 9], [0, 1, 1, 2, 5, 4]):
    with pytest.raises(InputError, match='sorted'):
      views.Subset(_Many('a', 10), np.array(rows)).starts
