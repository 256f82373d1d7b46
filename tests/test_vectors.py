import os
import zipfile

import hypothesis
from hypothesis import strategies
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import vectors

_X = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)


def _lists(path, x, kind=pa.list_(pa.float32()), **more):
  pq.write_table(
    pa.table({'id': list(range(len(x))), 'embedding': pa.array(x.tolist(), kind), **more}),
    path,
    row_group_size=7,
  )


def _tensors(path, x):
  tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x[:, None])  # of shape [1, E]
  pq.write_table(pa.table({'id': list(range(len(x))), 'embedding': tensors}), path)


_WRITERS = {
  'x.npy': lambda path: np.save(path, _X),
  'half.npy': lambda path: np.save(path, _X.astype(np.float16)),
  'double.npy': lambda path: np.save(path, _X.astype(np.float64)),
  'big_endian.npy': lambda path: np.save(path, _X.astype('>f4')),
  'fortran.npy': lambda path: np.save(path, np.asfortranarray(_X)),
  'x.npz': lambda path: np.savez(path, b32_img=_X, uid=np.arange(23)),
  'packed.npz': lambda path: np.savez_compressed(path, b32_img=_X),
  'fortran.npz': lambda path: np.savez(path, b32_img=np.asfortranarray(_X)),
  'x.parquet': lambda path: _lists(path, _X),
  'fixed.parquet': lambda path: _lists(path, _X, pa.list_(pa.float32(), 5)),
  'view.parquet': lambda path: _lists(path, _X, pa.list_view(pa.float32())),
  'large_view.parquet': lambda path: _lists(path, _X, pa.large_list_view(pa.float16())),
  'tensor.parquet': lambda path: _tensors(path, _X),
  'large.parquet': lambda path: _lists(path, _X, pa.large_list(pa.float64())),
}


def _read(path, key='', dim=0, block_rows=4):
  found = vectors.read_header(str(path), key, dim)
  starts, blocks = zip(*vectors.read_blocks(str(path), found, block_rows))
  whole = np.concatenate(blocks)
  assert whole.shape == (found.rows, found.dim) and list(starts) == list(
    range(0, found.rows, block_rows)
  )
  return whole


@pytest.mark.parametrize('name', _WRITERS)
def test_every_kind_of_file_gives_its_vectors(tmp_path, name):
  _WRITERS[name](tmp_path / name)
  np.testing.assert_allclose(_read(tmp_path / name).astype(np.float32), _X, rtol=2e-3)
  assert np.array_equal(_read(tmp_path / name, block_rows=23), _read(tmp_path / name, block_rows=1))


@pytest.mark.parametrize('name', ['emb.npy', 'emb.bin', 'emb'])
def test_float32_without_a_header_has_any_ending_and_needs_its_dim(tmp_path, name):
  _X.tofile(tmp_path / name)
  assert np.array_equal(_read(tmp_path / name, dim=5), _X)
  with pytest.raises(InputError, match='set vector_dim'):
    vectors.read_header(str(tmp_path / name))
  with pytest.raises(InputError, match=r'460 bytes, .*vector_dim=7'):
    vectors.read_header(str(tmp_path / name), dim=7)


def test_a_dim_that_a_header_contradicts(tmp_path):
  np.save(tmp_path / 'x.npy', _X)
  with pytest.raises(InputError, match='x.npy has vectors of 5 numbers.*vector_dim=6'):
    vectors.read_header(str(tmp_path / 'x.npy'), dim=6)


def test_one_of_several_arrays_is_named(tmp_path):
  path = str(tmp_path / 'x.npz')
  np.savez(path, b32_img=_X, l14_img=2 * _X, n=np.arange(3))
  with pytest.raises(
    InputError, match='several arrays of vectors: b32_img, l14_img. Name one in vector_key'
  ):
    vectors.read_header(path)
  with pytest.raises(
    InputError, match="no array 'l14', which vector_key names; it has b32_img, l14_img, n"
  ):
    vectors.read_header(path, 'l14')
  with pytest.raises(InputError, match='n, holds int64 numbers'):
    vectors.read_header(path, 'n')
  assert np.array_equal(_read(path, 'l14_img'), 2 * _X)
  path = str(tmp_path / 'x.parquet')
  _lists(path, _X, other=pa.array((3 * _X).tolist(), pa.list_(pa.float32())))
  with pytest.raises(InputError, match='several columns of vectors: embedding, other'):
    vectors.read_header(path)
  with pytest.raises(InputError, match="the column 'id' holds int64"):
    vectors.read_header(path, 'id')
  with pytest.raises(InputError, match="no column 'emb'"):
    vectors.read_header(path, 'emb')
  np.testing.assert_array_equal(_read(path, 'other'), 3 * _X)


class _Unpickled:
  """Leaves a mark where it is unpickled."""

  def __reduce__(self):
    return os.mkdir, (os.environ['MARK'],)


@pytest.mark.parametrize(
  'array, said',
  [
    (np.array([[None, 1.0]], object), 'Python objects .dtype object., which are never unpickled'),
    (_X[0], r'an array of shape \(5,\)'),
    (_X[:20].reshape(2, 10, 5), r'an array of shape \(2, 10, 5\)'),
    (_X.astype(np.int64), 'holds int64 numbers'),
    (_X.astype(np.complex64), 'holds complex64 numbers'),
    (_X.astype(np.longdouble), 'holds (float128|longdouble) numbers'),
    (np.zeros((4, 0), np.float32), 'vectors of 0 numbers'),
    (np.zeros(3, 'u8,u8'), 'holds '),
  ],
)
def test_arrays_that_are_no_vectors(tmp_path, array, said):
  np.save(tmp_path / 'x.npy', array, allow_pickle=True)
  with pytest.raises(InputError, match='x.npy.*' + said):
    vectors.read_header(str(tmp_path / 'x.npy'))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
  monkeypatch.setenv('MARK', str(tmp_path / 'mark'))
  np.save(tmp_path / 'x.npy', np.array([_Unpickled()], object), allow_pickle=True)
  np.savez(tmp_path / 'x.npz', a=np.array([_Unpickled()], object))
  for name in ('x.npy', 'x.npz'):
    for key in ('', 'a'):
      with pytest.raises(InputError):
        vectors.read_header(str(tmp_path / name), key)
  assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('name', _WRITERS)
def test_a_file_cut_anywhere_is_refused_by_its_name(tmp_path, name):
  _WRITERS[name](tmp_path / name)
  data = (tmp_path / name).read_bytes()
  for size in (1, 3, 7, 40, len(data) // 2, len(data) - 1):
    (tmp_path / name).write_bytes(data[:size])
    with pytest.raises(InputError, match=name):
      _read(tmp_path / name)


@hypothesis.given(place=strategies.floats(0, 1), value=strategies.integers(0, 255))
@hypothesis.settings(max_examples=60, deadline=None)
@pytest.mark.parametrize('name', ['x.npy', 'packed.npz', 'x.parquet'])
def test_a_damaged_byte_is_an_input_error_or_other_numbers(tmp_path_factory, name, place, value):
  path = tmp_path_factory.getbasetemp() / name
  _WRITERS[name](path)
  data = bytearray(path.read_bytes())
  data[int(place * (len(data) - 1))] = value
  path.write_bytes(data)
  try:
    assert _read(path).shape[0] <= 23
  except InputError as error:
    assert str(path) in str(error) and '\n' not in str(error)


def test_an_empty_file_a_long_one_and_none(tmp_path):
  (tmp_path / 'x.npy').write_bytes(b'')
  with pytest.raises(InputError, match='x.npy is empty'):
    vectors.read_header(str(tmp_path / 'x.npy'), dim=5)
  np.save(tmp_path / 'x.npy', _X)
  with open(tmp_path / 'x.npy', 'ab') as f:
    f.write(b'more')
  with pytest.raises(InputError, match='damaged'):
    vectors.read_header(str(tmp_path / 'x.npy'))
  with pytest.raises(InputError, match='y.npy does not exist'):
    vectors.read_header(str(tmp_path / 'y.npy'))
  (tmp_path / 'z.npz').write_bytes(b'')
  with zipfile.ZipFile(tmp_path / 'z.npz', 'w') as archive:
    archive.writestr('note.txt', 'nothing')
  with pytest.raises(InputError, match='no array of vectors'):
    vectors.read_header(str(tmp_path / 'z.npz'))


def test_no_rows(tmp_path):
  np.save(tmp_path / 'x.npy', _X[:0])
  assert vectors.read_header(str(tmp_path / 'x.npy')).rows == 0
  assert (
    list(vectors.read_blocks(str(tmp_path / 'x.npy'), vectors.read_header(str(tmp_path / 'x.npy'))))
    == []
  )
  _lists(tmp_path / 'x.parquet', _X[:0])
  assert vectors.read_header(str(tmp_path / 'x.parquet')).rows == 0


def test_lists_of_other_lengths_and_without_a_vector(tmp_path):
  path = tmp_path / 'x.parquet'
  lists = _X.tolist()
  lists[9] = [1.0]
  pq.write_table(pa.table({'e': pa.array(lists, pa.list_(pa.float32()))}), path)
  with pytest.raises(InputError, match='row 9 has 1 numbers.* 5'):
    _read(path)
  for missing in (None, []):
    lists[9] = lists[22] = missing
    for kind in (pa.list_, pa.large_list, pa.list_view):
      pq.write_table(pa.table({'e': pa.array(lists, kind(pa.float32()))}), path)
      found = _read(path)
      assert np.isnan(found[[9, 22]]).all()
      assert np.array_equal(np.delete(found, [9, 22], 0), np.delete(_X, [9, 22], 0))
  lists[22] = _X[22].tolist()
  lists[9] = [1.0, None, 0.0, 0.0, 0.0]
  pq.write_table(pa.table({'e': pa.array(lists, pa.list_(pa.float32()))}), path)
  assert np.isnan(_read(path)[9, 1])  # which `to_unit_float16` finds


def test_unit_vectors_are_divided_in_float32():
  x = (
    _X / np.linalg.norm(_X, axis=1, keepdims=True) * np.linspace(0.91, 1.09, 23)[:, None]
  ).astype(np.float32)
  found, bad = vectors.to_unit_float16(x)
  assert found.dtype == np.float16 and not bad.any()
  exact = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
  assert np.abs(found - exact).max() <= 2**-12
  half, bad = vectors.to_unit_float16(x.astype(np.float16))
  assert not bad.any() and np.abs(half - exact).max() <= 2**-10


@pytest.mark.parametrize('number', [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_bad_vectors_are_told(number, dtype):
  x = np.eye(4, dtype=dtype)
  x[2, 2] = number
  for any_norm in (False, True):
    assert vectors.to_unit_float16(x, any_norm)[1].tolist() == [False, False, True, False]
  assert vectors.describe_fault(x[2]) == (
    'is all zeros' if number == 0 else 'holds a NaN or an infinity'
  )


def test_norms_far_from_one_need_to_be_asked_for():
  x = np.eye(4, dtype=np.float32) * np.array([0.89, 1.0, 1.11, 1e-30], np.float32)
  assert vectors.to_unit_float16(x)[1].tolist() == [True, False, True, True]
  assert vectors.describe_fault(x[0]) == 'has norm 0.89'


@hypothesis.given(strategies.integers(-300, 300), strategies.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_length_is_taken_where_asked(power, seed):
  x = np.random.default_rng(seed).normal(size=(3, 6)) * 10.0**power
  found, bad = vectors.to_unit_float16(x, any_norm=True)
  assert not bad.any()
  assert (
    np.abs(
      found
      - x
      / np.abs(x).max(1, keepdims=True)
      / np.linalg.norm(x / np.abs(x).max(1, keepdims=True), axis=1, keepdims=True)
    ).max()
    < 2**-11
  )


def test_a_float16_that_overflowed_is_bad():
  with np.errstate(over='ignore'):
    x = (np.eye(3, dtype=np.float32) * 1e5).astype(np.float16)
  assert vectors.to_unit_float16(x, any_norm=True)[1].all()


def test_float16_without_a_header_is_told_by_the_size_where_the_rows_are_known(tmp_path):
  path = str(tmp_path / 'x')
  _X.astype('<f2').tofile(path)
  assert vectors.read_header(path, dim=5, rows=23).dtype == np.float16
  assert vectors.read_header(path, dim=5, rows=23).rows == 23
  _X[:22].astype('<f2').tofile(path)  # as many bytes as 11 rows of float32
  assert (
    vectors.read_header(path, dim=5).rows,
    vectors.read_header(path, dim=5, rows=22).rows,
  ) == (11, 22)
  assert vectors.read_header(path, dim=5, rows=11).dtype == np.float32
  assert vectors.read_header(path, dim=5, rows=10).rows == 11  # vector_index refuses it


def test_vectors_that_no_norm_makes_usable():
  x = np.ones((6, 3), np.float16)
  x[1], x[2, 1], x[3, 0], x[4] = 0, np.nan, np.inf, 1e-7
  assert vectors.is_unusable(x).tolist() == [False, True, True, True, False, False]
