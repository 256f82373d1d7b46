"""Subsets in the formats of other programs: lists of keys to rows of the pool, and back.

Three kinds of keys: DataComp's uids (32 hexadecimal digits; [n] 'u8,u8' in a .npy), clip-ood's
numbers ([n] int64 in a .npy) and texts (a column of a parquet file, or one per line). A key that a
file lists twice counts twice. A pool's keys are a column of strings or integers: a pyarrow array or
a sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
import csv
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

_FORMS = ('.parquet', '.txt', '.csv', '.npy')  # of a list of keys; the kind omits '.parquet'
# The rows of the split, and the pool rows that are not in it: kind -> file.
KEPT, REMOVED = (
  {f'{stem}{form}'.removesuffix('.parquet'): f'{stem}{form}' for form in _FORMS}
  for stem in ('keys', 'removed_keys')
)
# Formats in which a split's keys can be written: kind -> file.
LISTS = {'datacomp': 'uids.npy', 'clip_ood': 'clip_ood.npy', **KEPT, **REMOVED}
# Lists that name rows of the pool only; the others name anchor rows and planted copies, too.
OF_POOL = tuple(kind for kind in LISTS if kind not in ('keys', 'keys.csv'))
Column = Any  # pyarrow.Array or ChunkedArray, or a sequence of str or int
UID = np.dtype('u8,u8')  # DataComp's: the first and the last 16 hexadecimal digits of a uid
_BLOCK = 1 << 20  # rows processed at a time
_ANOTHER_COLUMN = (
  'Set config.prune.export_key to the column that has such keys, and add it to the pool\u2019s '
  'columns.'
)

_HEX = np.full(256, 255, np.uint8)  # byte -> value of the hexadecimal digit; 255: no digit
for _digits in (b'0123456789abcdef', b'0123456789ABCDEF'):
  _HEX[np.frombuffer(_digits, np.uint8)] = np.arange(16)


@dataclasses.dataclass(frozen=True)
class ListedRows:
  """The rows of a pool whose keys are in a list."""

  rows: Array  # [n] int64, sorted; a row occurs as often as its key is listed
  report: dict  # listed, listed_twice, not_in_pool, several_rows: counts of keys
  not_in_pool: list[str]  # up to three keys that are not in the pool


def product_name(kind: str) -> str:
  """Returns the name of the product of a kind of LISTS, beside its file."""
  return os.path.splitext(LISTS[kind])[0] if kind in ('datacomp', 'clip_ood') else kind


def keys_to_uids(keys: Column, rows: Array | int = 0) -> Array:  # [n] UID
  """Returns uids in DataComp's dtype, in the order of `keys`.

  rows: the keys' rows in the pool, or the first of consecutive rows, for error messages.
  """
  return _uid_bytes(keys, rows).view('>u8').astype('u8').view(UID)[:, 0]


def keys_to_int64(keys: Column, rows: Array | int = 0) -> Array:  # [n] int64
  """Returns keys as numbers: '000000012' is 12; `rows` as in `uids`."""
  return _to_int64(keys, rows).to_numpy(zero_copy_only=False)


def sorted_uids(
  values: Array,  # [n] UID
) -> Array:
  """Returns uids in DataComp's order: by the first half, then by the second."""
  return values[np.lexsort((values['f1'], values['f0']))]


def read(path, column: str = '') -> Any:
  """Returns the keys that a file lists, in file order, as a pyarrow array of one of three kinds.

  The file's ending sets the format: .npy, .parquet, .txt or .csv. column: of a parquet or CSV
  file; if it has no column of that name: 'key', 'uid', or its only column.
  """
  path = epath.Path(path)
  ending = os.path.splitext(path.name)[1].lower()
  if ending not in _READERS:
    raise InputError(f'{path} must end in {", ".join(_READERS)}: the ending sets its format.')
  if not path.is_file():
    raise InputError(f'{path} is not a file. Give the path of a file that lists samples.')
  keys = _READERS[ending](path, column)
  if not len(keys):
    raise InputError(f'{path} lists no sample. Give another file.')
  if keys.null_count:
    raise InputError(
      f'{path} has no key in {keys.null_count} of {len(keys)} rows. Remove these rows.'
    )
  return keys


def find_rows(listed, blocks: Iterable[Column]) -> ListedRows:
  """Returns the pool rows whose keys are in a list.

  listed: a result of `read`. blocks: the keys of the pool, in row order; a row may have no key. A
  key that several rows have selects all of them. Memory: a few times the list, not the pool.
  """
  counted = pc.value_counts(listed)
  if isinstance(counted, pa.ChunkedArray):
    counted = counted.combine_chunks()
  wanted, times = counted.field('values'), counted.field('counts').to_numpy()
  hits, rows, start = np.zeros(len(wanted), np.int64), [np.zeros(0, np.int64)], 0
  # The lookup table of wanted keys is rebuilt for each block, so blocks are at least as large.
  for block in _join_blocks(blocks, wanted.type, max(_BLOCK, len(wanted))):
    places = pc.fill_null(pc.index_in(block, value_set=wanted), -1).to_numpy()
    positions = np.flatnonzero(places >= 0)
    rows.append(np.repeat(start + positions, times[places[positions]]))
    hits += np.bincount(places[positions], minlength=len(wanted))
    start += len(block)
  missing = np.flatnonzero(hits == 0)
  report = {
    'listed': len(listed),
    'listed_twice': int((times > 1).sum()),
    'not_in_pool': len(missing),
    'several_rows': int((hits > 1).sum()),
  }
  return ListedRows(np.concatenate(rows), report, [key_text(wanted[int(i)]) for i in missing[:3]])


def key_text(key: Any) -> str:
  """Returns a key (a pyarrow scalar of one of the three kinds) as text for messages."""
  value = key.as_py()
  return value.hex() if isinstance(value, bytes) else str(value)


def _join_blocks(blocks: Iterable[Column], kind, size: int) -> Iterator[Any]:
  """Yields the blocks' keys as one kind, in chunked arrays of at least `size` rows."""
  chunks, rows, start = [], 0, 0
  for block in blocks:
    chunks.append(_to_kind(block, kind, start + rows))
    rows += len(chunks[-1])
    if rows >= size:
      yield pa.chunked_array(chunks, kind)
      chunks, rows, start = [], 0, start + rows
  if chunks:
    yield pa.chunked_array(chunks, kind)


def _to_kind(keys: Column, kind, first_row: int):
  """Returns keys as a pyarrow array of a kind; None stays None."""
  if kind == pa.int64():
    return _to_int64(keys, first_row, allow_none=True)
  if kind != pa.binary(16):
    return _strings(keys)
  keys = _strings(keys)
  if not keys.null_count:
    return _binary(_uid_bytes(keys, first_row))
  valid = np.flatnonzero(keys.is_valid().to_numpy(zero_copy_only=False))
  places = np.full(len(keys), -1)
  places[valid] = np.arange(len(valid))
  known = _binary(_uid_bytes(keys.drop_null(), first_row + valid))
  return known.take(pa.array(places, pa.int64(), mask=places < 0))


def _uid_bytes(keys: Column, rows: Array | int) -> Array:  # [n, 16] uint8
  """Returns the 16 bytes of each uid."""
  keys = _strings(keys)
  is_bad = pc.fill_null(pc.not_equal(pc.binary_length(keys), 32), True)
  bad = np.flatnonzero(is_bad.to_numpy(zero_copy_only=False))
  decoded = np.zeros((len(keys), 16), np.uint8)
  for start in range(0, 0 if len(bad) else len(keys), _BLOCK):
    part = keys.slice(start, _BLOCK)
    _, ends, text = part.buffers()
    begin = int(np.frombuffer(ends, np.int64, 1, 8 * part.offset)[0])
    digits = _HEX[np.frombuffer(text, np.uint8, 32 * len(part), begin)].reshape(-1, 32)
    bad = start + np.flatnonzero((digits == 255).any(axis=1))
    if len(bad):
      break
    decoded[start : start + _BLOCK] = digits[:, ::2] << 4 | digits[:, 1::2]
  if len(bad):
    raise _bad_key(keys, int(bad[0]), rows, 'uid, 32 hexadecimal digits')
  return decoded


def _to_int64(keys: Column, rows: Array | int, allow_none: bool = False):
  """Returns keys as a pyarrow array of int64."""
  keys = _to_array(keys)
  texts = _strings(keys)
  are_good = pc.match_substring_regex(texts, r'^-?[0-9]+$')
  are_good = pc.fill_null(are_good, allow_none).to_numpy(zero_copy_only=False)
  bad = np.flatnonzero(~are_good)
  if not len(bad):
    try:
      return (keys if pa.types.is_integer(keys.type) else texts).cast(pa.int64())
    except pa.ArrowInvalid:  # some numbers are too large, or have many leading zeros
      values = [None if text is None else int(text) for text in texts.to_pylist()]
      bad = [
        i for i, value in enumerate(values) if value is not None and not -(2**63) <= value < 2**63
      ]
      if not bad:
        return pa.array(values, pa.int64())
  raise _bad_key(texts, int(bad[0]), rows, '64-bit number')


def _bad_key(keys, i: int, rows: Array | int, what: str) -> InputError:
  row = rows + i if isinstance(rows, int) else rows[i]
  return InputError(f'The key {keys[i].as_py()!r} of row {row} is no {what}. {_ANOTHER_COLUMN}')


def _strings(keys: Column):
  """Returns keys as a pyarrow array of large_string, since texts may exceed 2 GB."""
  return _to_array(keys).cast(pa.large_string())


def _to_array(keys: Column):
  """Returns a column as one pyarrow array of large_string or integers."""
  keys = pa.table({'key': keys})['key']  # a ChunkedArray for every kind of input
  kind = keys.type.value_type if pa.types.is_dictionary(keys.type) else keys.type
  kind = pa.large_string() if pa.types.is_string(kind) else kind  # texts may exceed 2 GB
  return pa.concat_arrays([chunk.cast(kind) for chunk in keys.chunks] or [pa.array([], kind)])


def _binary(
  values: Array,  # [n, 16] uint8
):
  data = pa.py_buffer(np.ascontiguousarray(values))
  return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(values), [None, data])


def _npy(path: epath.Path, column: str):
  """Reads uids, numbers or texts from a .npy file; never unpickles."""
  del column
  try:
    with path.open('rb') as f:
      values = np.lib.format.read_array(f, allow_pickle=False)
    if values.ndim == 1 and values.dtype.kind in 'US':
      return _strings(pa.array(values.astype(np.str_)))
  except Exception as error:  # a forged header can raise any exception: numpy parses it as Python
    raise InputError(
      f'{path} cannot be read ({error}). Give a .npy file of dtype u8,u8 (uids) or int64, written '
      'without pickle.'
    ) from error
  kind = values.dtype
  fields = kind.names or ()
  is_uid = [kind[name].str[1:] for name in fields] == ['u8', 'u8']
  if values.ndim != 1 or not (is_uid or kind.kind in 'iu'):
    raise InputError(
      f'{path} holds {kind} {list(values.shape)}. Give shape [n] and dtype u8,u8 (uids) or int64 '
      '(numbers).'
    )
  if is_uid:
    halves = np.stack([values[name] for name in fields], axis=1, dtype='>u8')
    return _binary(halves.view(np.uint8))
  if len(values) and values.max() >= 2**63:
    raise InputError(f'{path} holds the number {values.max()}, which is no int64. Use int64.')
  return pa.array(values.astype(np.int64))


def _parquet(path: epath.Path, column: str):
  """Reads texts or numbers from a column of a parquet file; of an export, the pool's rows only."""
  try:
    with path.open('rb') as f:
      file = pq.ParquetFile(f)
      have = file.schema_arrow.names
      name = have[_key_column(path, have, column)]
      is_export = _is_export(have)
      read = file.read(['dataset', name] if is_export else [name])
      read.validate(full=True)  # finds texts that are not UTF-8
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path} cannot be read ({error}). Give a parquet file.') from error
  if is_export:
    read = read.filter(pc.equal(read['dataset'], 'pool'))
  keys = _to_array(read[name])
  if pa.types.is_integer(keys.type):
    return _to_int64(keys, 0, allow_none=True)
  if not (pa.types.is_string(keys.type) or pa.types.is_large_string(keys.type)):
    raise InputError(f'{path}: the column {name!r} is {keys.type}. Give strings or integers.')
  return _strings(keys)


def _lines(path: epath.Path, column: str):
  """Reads a text file with one key per line."""
  del column
  data = path.read_bytes().removeprefix(b'\xef\xbb\xbf')
  ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('\n')) + 1
  ends = np.concatenate([[0], ends, [len(data)]]).astype(np.int64)
  lines = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))
  try:
    lines.validate(full=True)
  except pa.ArrowInvalid as error:
    raise InputError(f'{path} is not text in UTF-8 ({error}). Write one key per line.') from error
  lines = pc.utf8_trim_whitespace(lines)
  return lines.filter(pc.not_equal(lines, ''))


def _csv(path: epath.Path, column: str):
  """Reads texts from a column of a CSV file with a header; of an export, the pool's rows only."""
  try:
    with open(path, encoding='utf-8-sig', newline='') as f:
      lines = csv.reader(f)
      have = next(lines, [])
      name = _key_column(path, have, column)
      dataset = have.index('dataset') if _is_export(have) else None
      keys = [
        line[name] if name < len(line) else None
        for line in lines
        if line and (dataset is None or line[dataset] == 'pool')
      ]
  except (csv.Error, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path} cannot be read ({error}). Give a CSV file with a header.') from error
  return _strings(pa.array(keys, pa.string()))


def _is_export(have: Sequence[str]) -> bool:
  """Returns whether columns are those of a list that names rows of several datasets."""
  return {'dataset', 'key', 'row'} <= set(have)


def _key_column(path: epath.Path, have: Sequence[str], column: str) -> int:
  """Returns the position of the keys among the columns of a file."""
  only = have[0] if len(have) == 1 else ''
  name = next((name for name in (column, 'key', 'uid', only) if name in have), None)
  if name is None:
    raise InputError(
      f'{path} has the columns {", ".join(have[:9])}, and no {column or "key"!r}. Set '
      'config.prune.export_key to one of its columns.'
    )
  return list(have).index(name)


_READERS = {'.npy': _npy, '.parquet': _parquet, '.txt': _lines, '.csv': _csv}
