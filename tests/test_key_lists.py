"""Lists of keys, to and from rows of the pool: against plain Python, and forged files."""

import io
import pickle
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import InputError
from clip_jax.pruning import key_lists

hexes = st.text('0123456789abcdef', min_size=32, max_size=32)


def expected_rows(listed, pool):
  """The definition: every row of the pool whose key is listed, as often as it is."""
  return sorted(row for row, key in enumerate(pool) for other in listed if other == key)


def keys_in(path, column=''):
  """Returns all keys that a file lists."""
  return [key for block in key_lists.read(path, column) for key in block.to_pylist()]


def cut(keys, seed):
  """Returns the keys as blocks of odd sizes, of the types that indexes have."""
  rng = np.random.default_rng(seed)
  ends = sorted(rng.integers(0, len(keys) + 1, 3).tolist())
  parts = [keys[a:b] for a, b in zip([0, *ends], [*ends, len(keys)])]
  return [
    pa.array(part, pa.string()) if i % 2 else pa.chunked_array([part], pa.string())
    for i, part in enumerate(parts)
  ]


@given(st.lists(hexes, min_size=1, max_size=20))
def test_uids_are_two_numbers_sorted_as_pairs(keys):
  found = key_lists.keys_to_uids(keys)
  assert found.dtype == np.dtype('u8,u8')
  pairs = [(int(key[:16], 16), int(key[16:], 16)) for key in keys]
  assert found.tolist() == pairs
  key_lists.sort_uids(found)
  assert found.tolist() == sorted(pairs)
  assert key_lists.keys_to_uids([key.upper() for key in keys]).tolist() == pairs
  assert key_lists.keys_to_uids(pa.array(['x', *keys, 'y']).slice(1, len(keys))).tolist() == pairs


@settings(max_examples=25)
@given(st.data())
def test_files_of_every_kind_name_the_same_rows(tmp_path_factory, data):
  few = data.draw(st.lists(st.integers(-3, 9), min_size=1, max_size=5))
  pool = data.draw(st.lists(st.sampled_from([*few, 11, 12]), min_size=1, max_size=30))
  listed = data.draw(st.lists(st.sampled_from([*pool, 77]), min_size=1, max_size=20))
  folder, seed = tmp_path_factory.mktemp('lists'), data.draw(st.integers(0, 9))
  as_uid = lambda key: f'{key + 3:016x}{key * key:016x}'
  expected = expected_rows(listed, pool)
  report = {
    'listed': len(listed),
    'not_in_pool': len(set(listed) - set(pool)),
    'listed_twice': sum(listed.count(key) > 1 for key in set(listed)),
    'several_rows': sum(pool.count(key) > 1 for key in set(listed)),
  }

  np.save(folder / 'u.npy', key_lists.keys_to_uids(list(map(as_uid, listed))))
  np.save(folder / 'i.npy', np.array(listed, np.int32))
  np.save(folder / 's.npy', np.array([f'k{key}' for key in listed]))
  pq.write_table(
    pa.table({'url': ['u'] * len(listed), 'uid': list(map(as_uid, listed))}), folder / 't.parquet'
  )
  pq.write_table(pa.table({'SAMPLE_ID': pa.array(listed, pa.int32())}), folder / 'n.parquet')
  name_of = lambda file, key: {
    'u': as_uid(key),
    't.p': as_uid(key),
    'i': str(key),
    'n': str(key),
  }.get(file[: 3 if file == 't.parquet' else 1], f'k{key}')
  texts = [f'k{key}' for key in pool]
  (folder / 't.txt').write_text('\n\r\n'.join(f'k{key}' for key in listed))
  for name, keys in (
    ('u.npy', list(map(as_uid, pool))),
    ('i.npy', [f'{key:09d}' for key in pool]),
    ('s.npy', texts),
    ('t.parquet', list(map(as_uid, pool))),
    ('n.parquet', list(map(str, pool))),
    ('t.txt', texts),
  ):
    for in_memory in (1 << 22, 0, 3):  # whole, and in parts in files
      with (
        mock.patch.object(key_lists, '_IN_MEMORY', in_memory),
        mock.patch.object(key_lists, '_PART_BITS', 1),
        mock.patch.object(key_lists, '_BLOCK', 4),
        mock.patch.object(key_lists, '_READ_AT_ONCE', 5),
      ):
        found = key_lists.find_rows(key_lists.read(folder / name), cut(keys, seed))
      assert found.rows.dtype == np.int64 and found.rows.tolist() == expected, name
      assert found.report == report, name
      assert found.not_in_pool == (report['not_in_pool'] and [name_of(name, 77)] or []), name


def test_blocks_are_looked_up_in_order_however_they_are_joined(monkeypatch):
  keys = [f'{i:05d}' for i in range(100)]
  for size in (1, 7, 1000):
    monkeypatch.setattr(key_lists, '_BLOCK', size)
    found = key_lists.find_rows([pa.array([3, 99, 3, 200])], [keys[:1], [], keys[1:50], keys[50:]])
    assert found.rows.tolist() == [3, 3, 99] and found.not_in_pool == ['200']
    uids = key_lists.keys_to_uids([f'{i:032x}' for i in range(20)])
    assert uids['f1'].tolist() == list(range(20))


def test_rows_without_a_key_are_never_named():
  uid = f'{5:032x}'
  file = io.BytesIO()
  np.save(file, key_lists.keys_to_uids([uid]))
  listed = key_lists._binary(np.frombuffer(bytes(15) + b'\5', np.uint8).reshape(1, 16))
  found = key_lists.find_rows([listed], [pa.array([None, uid, None]), pa.nulls(2), pa.array([uid])])
  assert found.rows.tolist() == [1, 5]
  assert key_lists.find_rows(
    [pa.array([7])], [pa.array([None, '007']), pa.array([7, None])]
  ).rows.tolist() == [1, 2]


@pytest.mark.parametrize(
  'convert, keys, said',
  [
    (key_lists.keys_to_uids, ['0' * 32, 'abc'], "'abc' of row 11 is no uid"),
    (key_lists.keys_to_uids, ['0' * 32, None], 'None of row 11 is no uid'),
    (key_lists.keys_to_uids, ['0' * 32, '0' * 31 + 'g'], '0g.* of row 11 is no uid'),
    (key_lists.keys_to_uids, ['é' * 16], 'of row 10 is no uid'),
    (key_lists.keys_to_int64, ['1', '1.0'], "'1.0' of row 11 is no 64-bit number"),
    (key_lists.keys_to_int64, ['0x1F'], 'no 64-bit number'),
    (key_lists.keys_to_int64, [' 1'], 'no 64-bit number'),
    (key_lists.keys_to_int64, [str(2**63)], '9223372036854775808.* of row 10'),
    (key_lists.keys_to_int64, ['', '1'], 'row 10'),
    (key_lists.keys_to_int64, [1.5], "'1.5' of row 10"),
    (key_lists.keys_to_int64, ['5', None], 'None of row 11'),
  ],
)
def test_bad_keys_are_named_with_their_row(convert, keys, said):
  with pytest.raises(InputError, match=f'{said}.*prune.export_key'):
    convert(keys, 10)
  with pytest.raises(InputError, match=said):
    convert(keys, np.arange(10, 10 + len(keys)))


def test_numbers_with_many_zeros_and_the_largest():
  assert key_lists.keys_to_int64(['0' * 30 + '7', str(2**63 - 1), str(-(2**63))]).tolist() == [
    7,
    2**63 - 1,
    -(2**63),
  ]


def test_uids_of_a_machine_with_other_bytes(tmp_path):
  np.save(tmp_path / 'u.npy', np.array([(1, 2**64 - 1)], '>u8,>u8'))
  assert key_lists.find_rows(
    key_lists.read(tmp_path / 'u.npy'), [[f'{1:016x}{2**64 - 1:016X}']]
  ).rows.tolist() == [0]


class Bomb:
  def __reduce__(self):
    return open, ('/nonexistent/bomb', 'w')


def test_forged_files_are_sentences(tmp_path):
  def refused(name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
      keys_in(tmp_path / name)

  def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()

  pickled = io.BytesIO()
  np.save(pickled, np.array([Bomb()], object), allow_pickle=True)
  refused('a.npy', pickled.getvalue(), 'cannot be read .*pickle')
  refused('a.npy', pickle.dumps([1]), 'cannot be read')
  refused('a.npy', b'', 'cannot be read')
  several = io.BytesIO()
  np.savez(several, np.arange(3))
  refused('a.npy', several.getvalue(), 'cannot be read')
  refused('a.npy', npy(np.array(['ab'])).replace(b'a\0\0\0b', b'a\0V\0b'), 'cannot be read')
  whole = npy(np.arange(100))
  refused('a.npy', whole[:-8], 'cannot be read')
  refused('a.npy', whole.replace(b'(100,)', b'(10**14,)'), 'cannot be read')
  refused(
    'a.npy', whole.replace(b'(100,), }   ', b'(99999999999999,)}'[:12]), 'cannot be read|holds'
  )
  refused('a.npy', npy(np.zeros((2, 2), np.int64)), r'holds int64 \[2, 2\]')
  refused('a.npy', npy(np.zeros(2)), 'holds float64')
  refused('a.npy', npy(np.zeros(2, 'i8,i8')), 'Give .* u8,u8')
  refused('a.npy', npy(np.zeros(2, 'u8,u8,u8')), 'Give .* u8,u8')
  refused('a.npy', npy(np.array([2**63], np.uint64)), 'no int64')
  refused('a.npy', npy(np.zeros(0, np.int64)), 'lists no sample')
  refused('a.npy', npy(np.int64(3)), 'holds int64')
  refused('a.txt', b'', 'lists no sample')
  refused('a.txt', b'\n \n', 'lists no sample')
  refused('a.txt', b'ok\n\xff\xfe\n', 'not text in UTF-8')
  refused('a.parquet', b'PAR1', 'cannot be read')
  for kept in ('key', 'some-text'):  # in a column's name, and in a row
    table = io.BytesIO()
    pq.write_table(
      pa.table({'key' if kept == 'some-text' else 'some-text': ['some-text', 'x']}),
      table,
      use_dictionary=False,
      compression='none',
    )
    refused('a.parquet', table.getvalue().replace(b'some-text', b'some\xfftext'), 'cannot be read')
  refused('a.tsv', b'a', 'must end in .npy, .parquet, .txt')
  with pytest.raises(InputError, match='none.npy is not a file'):
    keys_in(tmp_path / 'none.npy')
  for table, said in (
    ({'a': ['x'], 'b': ['y']}, "columns a, b, and no 'key'"),
    ({'key': [1.5]}, "'key' is double"),
    ({'key': ['x', None]}, '1 of 2 rows'),
    ({'key': [[1]]}, "'key' is list"),
  ):
    pq.write_table(pa.table(table), tmp_path / 't.parquet')
    with pytest.raises(InputError, match=said):
      keys_in(tmp_path / 't.parquet')


def test_a_parquet_column_is_chosen_and_ours_lists_pool_rows_only(tmp_path):
  path = tmp_path / 't.parquet'
  pq.write_table(pa.table({'key': ['a'], 'other': ['b']}), path)
  assert keys_in(path) == ['a'] and keys_in(path, 'other') == ['b']
  pq.write_table(pa.table({'dataset': ['pool', 'anchor'], 'key': ['a', 'x'], 'row': [0, 0]}), path)
  assert keys_in(path) == ['a']
  words = pa.array(['a', 'b', 'a']).dictionary_encode()
  pq.write_table(pa.table({'key': words}), path)
  assert keys_in(path) == ['a', 'b', 'a']


def test_a_long_list_is_matched_in_parts_as_a_short_one(tmp_path, monkeypatch):
  texts = [f'https://host/{"x" * (i % 300)}/{i}' for i in range(3000)]
  pool = [pa.array([*texts[1000:], None, texts[5], *texts[:1000]]), pa.array(texts[:2])]
  listed = [*texts[::2], 'none', texts[4], *texts[::3], 'nothing']
  blocks = [pa.array(listed[:999], pa.large_string()), pa.array(listed[999:], pa.large_string())]
  whole = key_lists.find_rows(blocks, pool)
  monkeypatch.setattr(key_lists, '_IN_MEMORY', 1500)
  parts = key_lists.find_rows(blocks, pool, str(tmp_path / 'scratch'))
  assert parts.rows.tolist() == whole.rows.tolist() and len(whole.rows) > 2500
  assert parts.report == whole.report and parts.report['not_in_pool'] == 2
  assert parts.not_in_pool == whole.not_in_pool == ['none', 'nothing']
  assert not list((tmp_path / 'scratch').iterdir())


@settings(max_examples=25)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=9), st.integers(0, 8))
def test_a_hash_depends_on_the_key_alone(texts, start):
  """In any array and at any place; and not on a text's length alone."""
  keys = pa.array(texts, pa.large_string())
  each = [key_lists._hashes(pa.array([text], pa.large_string()))[0] for text in texts]
  assert key_lists._hashes(keys.slice(start)).tolist() == each[start:]
  numbers = pa.array(range(len(texts)))
  assert len(set(key_lists._hashes(numbers))) == len(texts)
  assert len(set(each)) == len(set(texts))


def test_the_pool_is_read_until_a_key_is_found():
  def pool():
    yield ['a', 'b']
    yield ['c']
    raise AssertionError('read on')

  assert key_lists.names_any(pa.array(['x', 'c'], pa.large_string()), pool())
  assert not key_lists.names_any(pa.array(['x'], pa.large_string()), [['a'], ['b']])
  with pytest.raises(InputError, match="'c' of row 2 is no 64-bit number"):
    key_lists.names_any(pa.array([7]), [['1', '2'], ['c']])


def test_a_full_disk_is_a_sentence(monkeypatch):
  full = lambda dir: open('/dev/full', 'r+b', buffering=0)
  monkeypatch.setattr(key_lists.tempfile, 'TemporaryFile', full)
  monkeypatch.setattr(key_lists, '_IN_MEMORY', 2)
  with pytest.raises(InputError, match='No space left in .* to match a list of .*cache_dir'):
    key_lists.find_rows([pa.array([1, 2, 3])], [['1', '2']])
