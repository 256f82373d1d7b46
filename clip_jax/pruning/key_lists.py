"""Subsets as other programs write them: lists of keys to rows of the pool, and back. No images.

Three kinds of keys: DataComp's uids (32 hexadecimal digits; [n] 'u8,u8' in a .npy), clip-ood's
numbers ([n] int64 in a .npy) and texts (a column of a parquet, or a line each). A key that a file
lists twice counts twice. A pool's keys come as a column: strings or integers, a pyarrow array or a
sequence.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import os
from typing import Any

from etils import epath
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array

# What the rows of a split can be written as by their keys: kind -> file.
LISTS = {'datacomp': 'uids.npy', 'clip_ood': 'clip_ood.npy', 'keys': 'keys.parquet'}
Column = Any  # pyarrow.Array or ChunkedArray, or a sequence of str or int
UID = np.dtype('u8,u8')  # DataComp's: the first and the last 16 hexadecimal digits of a uid
_BLOCK = 1 << 20  # rows that are looked at together
_ANOTHER = (
  'Name the column that has them in config.prune.export_key, and in the columns of the pool.'
)

_HEX = np.full(256, 255, np.uint8)  # byte -> its value as a hexadecimal digit; 255: none
for _digits in (b'0123456789abcdef', b'0123456789ABCDEF'):
  _HEX[np.frombuffer(_digits, np.uint8)] = np.arange(16)


@dataclasses.dataclass(frozen=True)
class Found:
  """The rows of a pool that a list of keys names."""

  rows: Array  # [n] int64, sorted; a row is there as often as its key is listed
  report: dict  # listed, listed_twice, not_in_pool, several_rows: counts of keys
  not_in_pool: list[str]  # up to three of these keys


def uids(keys: Column, rows: Array | int = 0) -> Array:  # [n] UID
  """Returns uids as DataComp writes them, in the order of `keys`.

  rows: where the keys stand in the pool, or the first of them, for what is said of a bad one.
  """
  return _uid_bytes(keys, rows).view('>u8').astype('u8').view(UID)[:, 0]


def numbers(keys: Column, rows: Array | int = 0) -> Array:  # [n] int64
  """Returns keys as numbers: '000000012' is 12. rows: as of `uids`."""
  return _numbers(keys, rows).to_numpy(zero_copy_only=False)


def sorted_uids(
  found: Array,  # [n] UID
) -> Array:
  """Returns uids in DataComp's order: by the first half, then by the second."""
  return found[np.lexsort((found['f1'], found['f0']))]


def read(path, column: str = '') -> Any:
  """Returns the keys that a file lists, in its order, as a pyarrow array of one of the three kinds.

  The ending says the format: .npy, .parquet, .txt. column: of a parquet; where it has none of that
  name, 'key', 'uid', or its only one.
  """
  path = epath.Path(path)
  ending = os.path.splitext(path.name)[1].lower()
  if ending not in _READERS:
    raise InputError(f'{path} must end in {", ".join(_READERS)}, to say what it is.')
  if not path.is_file():
    raise InputError(f'{path} is not there. Give the path of a file that lists samples.')
  keys = _READERS[ending](path, column)
  if not len(keys):
    raise InputError(f'{path} lists no sample. Give another file.')
  if keys.null_count:
    raise InputError(f'{path} has no key in {keys.null_count} of {len(keys)} rows. Leave them out.')
  return keys


def find(listed, blocks: Iterable[Column]) -> Found:
  """Returns the pool rows that a list of keys names.

  listed: as `read` returns it. blocks: the keys of the pool, in the order of its rows; a row may
  have none. A key of several rows names all of them. Memory: a few times the list, not the pool.
  """
  counted = pc.value_counts(listed)
  if isinstance(counted, pa.ChunkedArray):
    counted = counted.combine_chunks()
  wanted, times = counted.field('values'), counted.field('counts').to_numpy()
  hits, rows, start = np.zeros(len(wanted), np.int64), [np.zeros(0, np.int64)], 0
  # The table of what is wanted is built anew for each block, so blocks are as large as it is.
  for block in _joined(blocks, wanted.type, max(_BLOCK, len(wanted))):
    places = pc.fill_null(pc.index_in(block, value_set=wanted), -1).to_numpy()
    here = np.flatnonzero(places >= 0)
    rows.append(np.repeat(start + here, times[places[here]]))
    hits += np.bincount(places[here], minlength=len(wanted))
    start += len(block)
  missing = np.flatnonzero(hits == 0)
  report = {
    'listed': len(listed),
    'listed_twice': int((times > 1).sum()),
    'not_in_pool': len(missing),
    'several_rows': int((hits > 1).sum()),
  }
  return Found(np.concatenate(rows), report, [said(wanted[int(i)]) for i in missing[:3]])


def said(key: Any) -> str:
  """Returns a key, a pyarrow scalar of one of the three kinds, as a person writes it."""
  value = key.as_py()
  return value.hex() if isinstance(value, bytes) else str(value)


def _joined(blocks: Iterable[Column], kind, size: int) -> Iterator[Any]:
  """Yields the blocks' keys as keys of one kind, in chunked arrays of at least `size` rows."""
  chunks, rows, start = [], 0, 0
  for block in blocks:
    chunks.append(_as(block, kind, start + rows))
    rows += len(chunks[-1])
    if rows >= size:
      yield pa.chunked_array(chunks, kind)
      chunks, rows, start = [], 0, start + rows
  if chunks:
    yield pa.chunked_array(chunks, kind)


def _as(keys: Column, kind, first_row: int):
  """Returns a pyarrow array of keys of this kind; None stays."""
  if kind == pa.int64():
    return _numbers(keys, first_row, allow_none=True)
  if kind != pa.binary(16):
    return _strings(keys)
  keys = _strings(keys)
  if not keys.null_count:
    return _binary(_uid_bytes(keys, first_row))
  there = np.flatnonzero(keys.is_valid().to_numpy(zero_copy_only=False))
  places = np.full(len(keys), -1)
  places[there] = np.arange(len(there))
  known = _binary(_uid_bytes(keys.drop_null(), first_row + there))
  return known.take(pa.array(places, pa.int64(), mask=places < 0))


def _uid_bytes(keys: Column, rows: Array | int) -> Array:  # [n, 16] uint8
  """Returns the 16 bytes of each uid."""
  keys = _strings(keys)
  is_bad = pc.fill_null(pc.not_equal(pc.binary_length(keys), 32), True)
  bad = np.flatnonzero(is_bad.to_numpy(zero_copy_only=False))
  found = np.zeros((len(keys), 16), np.uint8)
  for start in range(0, 0 if len(bad) else len(keys), _BLOCK):
    part = keys.slice(start, _BLOCK)
    _, ends, text = part.buffers()
    begin = int(np.frombuffer(ends, np.int64, 1, 8 * part.offset)[0])
    digits = _HEX[np.frombuffer(text, np.uint8, 32 * len(part), begin)].reshape(-1, 32)
    bad = start + np.flatnonzero((digits == 255).any(axis=1))
    if len(bad):
      break
    found[start : start + _BLOCK] = digits[:, ::2] << 4 | digits[:, 1::2]
  if len(bad):
    raise _bad(keys, int(bad[0]), rows, 'uid, 32 hexadecimal digits')
  return found


def _numbers(keys: Column, rows: Array | int, allow_none: bool = False):
  """Returns keys as a pyarrow array of int64."""
  keys = _plain(keys)
  texts = _strings(keys)
  are_good = pc.match_substring_regex(texts, r'^-?[0-9]+$')
  are_good = pc.fill_null(are_good, allow_none).to_numpy(zero_copy_only=False)
  bad = np.flatnonzero(~are_good)
  if not len(bad):
    try:
      return (keys if pa.types.is_integer(keys.type) else texts).cast(pa.int64())
    except pa.ArrowInvalid:  # some are too large, or have many zeros in front
      values = [None if text is None else int(text) for text in texts.to_pylist()]
      bad = [
        i for i, value in enumerate(values) if value is not None and not -(2**63) <= value < 2**63
      ]
      if not bad:
        return pa.array(values, pa.int64())
  raise _bad(texts, int(bad[0]), rows, '64-bit number')


def _bad(keys, i: int, rows: Array | int, what: str) -> InputError:
  row = rows + i if isinstance(rows, int) else rows[i]
  return InputError(f'The key {keys[i].as_py()!r} of row {row} is no {what}. {_ANOTHER}')


def _strings(keys: Column):
  """Returns keys as a pyarrow array of large_string: many of them may have more than 2 GB."""
  return _plain(keys).cast(pa.large_string())


def _plain(keys: Column):
  """Returns a column as one pyarrow array, its texts and integers as they are."""
  keys = pa.table({'key': keys})['key']  # chunked whatever came in
  kind = keys.type.value_type if pa.types.is_dictionary(keys.type) else keys.type
  kind = pa.large_string() if pa.types.is_string(kind) else kind  # many may have more than 2 GB
  return pa.concat_arrays([chunk.cast(kind) for chunk in keys.chunks] or [pa.array([], kind)])


def _binary(
  values: Array,  # [n, 16] uint8
):
  data = pa.py_buffer(np.ascontiguousarray(values))
  return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(values), [None, data])


def _npy(path: epath.Path, column: str):
  """Reads a .npy: uids, numbers, or texts. Never a pickle."""
  del column
  try:
    with path.open('rb') as f:
      found = np.lib.format.read_array(f, allow_pickle=False)
    if found.ndim == 1 and found.dtype.kind in 'US':
      return _strings(pa.array(found.astype(np.str_)))
  except Exception as error:  # numpy reads the header as Python: a forged one raises anything
    raise InputError(
      f'{path} cannot be read ({error}). Give a .npy of dtype u8,u8 (uids) or '
      'int64, written without pickle.'
    ) from error
  kind = found.dtype
  fields = kind.names or ()
  is_uid = [kind[name].str[1:] for name in fields] == ['u8', 'u8']
  if found.ndim != 1 or not (is_uid or kind.kind in 'iu'):
    raise InputError(
      f'{path} holds {kind} {list(found.shape)}. Give [n] of dtype u8,u8 (uids) or int64 (numbers).'
    )
  if is_uid:
    halves = np.stack([found[name] for name in fields], axis=1, dtype='>u8')
    return _binary(halves.view(np.uint8))
  if len(found) and found.max() >= 2**63:
    raise InputError(f'{path} holds the number {found.max()}, which is no int64. Give int64.')
  return pa.array(found.astype(np.int64))


def _parquet(path: epath.Path, column: str):
  """Reads a column of a parquet: texts, or numbers. Of our own keys.parquet the pool's rows."""
  try:
    with path.open('rb') as f:
      file = pq.ParquetFile(f)
      have = file.schema_arrow.names
      only = have[0] if len(have) == 1 else ''
      name = next((name for name in (column, 'key', 'uid', only) if name in have), None)
      if name is None:
        raise InputError(
          f'{path} has the columns {", ".join(have[:9])}, and no '
          f'{column or "key"!r}. Name another in config.prune.export_key.'
        )
      ours = {'dataset', 'key', 'row'} <= set(have)
      read = file.read(['dataset', name] if ours else [name])
      read.validate(full=True)  # texts may be no UTF-8
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path} cannot be read ({error}). Give a parquet file.') from error
  if ours:
    read = read.filter(pc.equal(read['dataset'], 'pool'))
  keys = _plain(read[name])
  if pa.types.is_integer(keys.type):
    return _numbers(keys, 0, allow_none=True)
  if not (pa.types.is_string(keys.type) or pa.types.is_large_string(keys.type)):
    raise InputError(f'{path}: the column {name!r} is {keys.type}. Give strings or integers.')
  return _strings(keys)


def _lines(path: epath.Path, column: str):
  """Reads a text with a key a line."""
  del column
  data = path.read_bytes().removeprefix(b'\xef\xbb\xbf')
  ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('\n')) + 1
  ends = np.concatenate([[0], ends, [len(data)]]).astype(np.int64)
  lines = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))
  try:
    lines.validate(full=True)
  except pa.ArrowInvalid as error:
    raise InputError(f'{path} is not text in UTF-8 ({error}). Give one key a line.') from error
  lines = pc.utf8_trim_whitespace(lines)
  return lines.filter(pc.not_equal(lines, ''))


_READERS = {'.npy': _npy, '.parquet': _parquet, '.txt': _lines}
