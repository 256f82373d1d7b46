"""Subsets in the formats of other programs: lists of keys to rows of the pool, and back.

Three kinds of keys: DataComp's uids (32 hexadecimal digits; [n] 'u8,u8' in a .npy), clip-ood's
numbers ([n] int64 in a .npy) and texts (a column of a parquet file, or one per line). A key that a
file lists twice counts twice. A pool's keys are a column of strings or integers: a pyarrow array or
a sequence. Lists and pools are read in blocks, and a list of more than _IN_MEMORY keys is matched
in parts, so that memory does not grow with the keys (except 16 bytes for each row found).
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import csv
import dataclasses
import errno
import itertools
import mmap
import os
import sys
import tempfile
from typing import IO, Any

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
_IN_MEMORY = 1 << 20  # a list of more keys is matched in parts
_PART_BITS = 6  # 64 parts
_ODD = 0x9E3779B97F4A7C15  # multiplier of hashes: 2^64 divided by the golden ratio
_HASHED_WORDS = 16  # of 8 bytes: the end of a text, which decides its part
_READ_AT_ONCE = 1 << 25  # bytes of a text file
_LINES = 1 << 16  # lines of a CSV file, each a list of Python strings
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


def sort_uids(
  values: Array,  # [n] UID
) -> None:
  """Sorts uids in place, in DataComp's order: by the first half, then by the second."""
  # NumPy sorts the bytes of texts, but not pairs of numbers, without a copy.
  halves = values.view('u8')
  halves.byteswap(inplace=sys.byteorder == 'little')
  values.view('S16').sort()
  halves.byteswap(inplace=sys.byteorder == 'little')


def read(path, column: str = '') -> Iterator[Any]:
  """Yields the keys that a file lists, in file order, in pyarrow arrays of one of three kinds.

  The file's ending sets the format: .npy, .parquet, .txt or .csv. column: of a parquet or CSV
  file; if it has no column of that name: 'key', 'uid', or its only column.
  """
  path = epath.Path(path)
  ending = os.path.splitext(path.name)[1].lower()
  if ending not in _READERS:
    raise InputError(f'{path} must end in {", ".join(_READERS)}: the ending sets its format.')
  if not path.is_file():
    raise InputError(f'{path} is not a file. Give the path of a file that lists samples.')
  rows = missing = 0
  for keys in _READERS[ending](path, column):
    rows, missing = rows + len(keys), missing + keys.null_count
    if len(keys):
      yield keys
  if not rows:
    raise InputError(f'{path} lists no sample. Give another file.')
  if missing:
    raise InputError(f'{path} has no key in {missing} of {rows} rows. Remove these rows.')


def find_rows(
  listed: Iterable[Any], blocks: Iterable[Column], scratch: str | None = None
) -> ListedRows:
  """Returns the pool rows whose keys are in a list.

  listed: the blocks of `read`. blocks: the keys of the pool, in row order; a row may have no key. A
  key that several rows have selects all of them. Keys are compared as a whole, never by a hash
  alone. scratch: a folder for temporary files, for a list of more than _IN_MEMORY keys; both the
  list and the pool's keys are written there (None: the system's folder).
  """
  listed, first, size = iter(listed), [], 0
  while size <= _IN_MEMORY and (keys := next(listed, None)) is not None:
    first.append(keys)
    size += len(keys)
  kind = first[0].type
  if size <= _IN_MEMORY:
    whole = pa.chunked_array(first, kind)
    return _joined([_match(whole, np.arange(size), _numbered(blocks, kind))])
  with contextlib.ExitStack() as stack:
    try:
      lists, pools = (_Parts(stack, kind, scratch) for _ in range(2))
      size = 0
      for keys in itertools.chain(first, listed):
        lists.write(keys, np.arange(size, size + len(keys)))
        size += len(keys)
      first.clear()
      for keys, rows in _numbered(blocks, kind):
        pools.write(keys, rows)
      return _joined([_match(*lists.read(i), [pools.read(i)]) for i in range(lists.count)])
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      raise InputError(
        f'No space left in {scratch or tempfile.gettempdir()} to match a list of {size:,} keys: it '
        'takes about 25 bytes for each uid of the list and of the pool, for texts their length and '
        '16 bytes. Free some space, or set config.cache_dir.'
      ) from error


def names_any(listed, blocks: Iterable[Column]) -> bool:
  """Returns whether a key of `listed`, one block of `read`, is in the pool; reads up to a hit."""
  keys, places = pa.chunked_array([listed]), np.arange(len(listed))
  return any(len(_match(keys, places, [block]).rows) for block in _numbered(blocks, listed.type))


@dataclasses.dataclass(frozen=True)
class _Matches:
  """The rows of a pool whose keys are in a list, or in a part of it."""

  rows: Array  # [n] int64
  counts: Array  # [4] int64: listed, listed_twice, not_in_pool, several_rows
  missing: list[tuple[int, str]]  # up to three keys that are not in the pool, after their places


def _match(listed, places: Array, blocks: Iterable[tuple[Any, Array]]) -> _Matches:
  """Returns the rows of blocks of keys whose keys are listed, each as often as its key is.

  listed: the keys, without null. places: their places in the whole list.
  """
  counted = pc.value_counts(listed)
  if isinstance(counted, pa.ChunkedArray):
    counted = counted.combine_chunks()
  wanted, times = counted.field('values'), counted.field('counts').to_numpy()
  hits, found = np.zeros(len(wanted), np.int64), [np.zeros(0, np.int64)]
  # The lookup table of wanted keys is rebuilt for each block, so blocks are at least as large.
  for keys, rows in _join_blocks(blocks, wanted.type, max(_BLOCK, len(wanted))):
    at = pc.fill_null(pc.index_in(keys, value_set=wanted), -1).to_numpy()
    positions = np.flatnonzero(at >= 0)
    found.append(np.repeat(rows[positions], times[at[positions]]))
    hits += np.bincount(at[positions], minlength=len(wanted))
  missing = np.flatnonzero(hits == 0)
  few = wanted.take(missing[:3])
  first = [pc.index(listed, key).as_py() for key in few]
  counts = [len(listed), (times > 1).sum(), len(missing), (hits > 1).sum()]
  return _Matches(
    np.concatenate(found),
    np.array(counts, np.int64),
    [(int(places[at]), key_text(key)) for at, key in zip(first, few, strict=True)],
  )


def _joined(parts: list[_Matches]) -> ListedRows:
  """Returns the rows of all parts, sorted; empties the list, so that memory holds them twice."""
  counts = np.sum([part.counts for part in parts], axis=0).tolist()
  missing = sorted(key for part in parts for key in part.missing)[:3]
  rows = np.concatenate([part.rows for part in parts])
  parts.clear()
  rows.sort()
  names = ('listed', 'listed_twice', 'not_in_pool', 'several_rows')
  return ListedRows(rows, dict(zip(names, counts, strict=True)), [key for _, key in missing])


class _Parts:
  """Keys and their rows in temporary files, in parts by a hash of the key.

  Equal keys are in one part, in the order in which they were written. The files have no name, so
  the system removes them whenever the process ends.
  """

  def __init__(self, stack: contextlib.ExitStack, kind, scratch: str | None):
    if scratch:
      os.makedirs(scratch, exist_ok=True)
    self.count = 1 << _PART_BITS
    self._schema = pa.schema([('key', kind), ('row', pa.int64())])
    new_file = lambda: stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
    self._files: list[IO[bytes]] = [new_file() for _ in range(self.count)]
    self._writers = [pa.ipc.new_stream(file, self._schema) for file in self._files]

  def write(self, keys, rows: Array) -> None:
    """Adds keys (an array; null keys are left out) and their rows [n] int64."""
    if keys.null_count:
      rows = rows[keys.is_valid().to_numpy(zero_copy_only=False)]
      keys = keys.drop_null()
    part = (_hashes(keys) >> np.uint64(64 - _PART_BITS)).astype(np.uint8)
    order = np.argsort(part, kind='stable')
    ends = np.cumsum(np.bincount(part, minlength=self.count)).tolist()
    batch = pa.record_batch([keys.take(pa.array(order)), rows[order]], schema=self._schema)
    for writer, start, end in zip(self._writers, [0, *ends], ends):
      if end > start:
        writer.write_batch(batch.slice(start, end - start))

  def read(self, part: int) -> tuple[Any, Array]:
    """Returns the keys of a part, a chunked array, and their rows [n] int64; ends its writing."""
    self._writers[part].close()
    self._files[part].flush()
    mapped = mmap.mmap(self._files[part].fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
    return table['key'], table['row'].to_numpy()


def _hashes(keys) -> Array:  # [n] uint64
  """Returns a hash of each key, well mixed in its highest bits; keys has no null."""
  start, size = keys.offset, len(keys)
  if keys.type == pa.int64():
    words = [keys.to_numpy().view(np.uint64)]
  elif keys.type == pa.binary(16):
    words = np.frombuffer(keys.buffers()[1], '<u8', 2 * size, 16 * start).reshape(-1, 2).T
  else:
    words = _last_words(keys)
  result = np.zeros(size, np.uint64)
  for i, word in enumerate(words):
    mixed = word * np.uint64(_ODD + 2 * i)  # 0 of 0: words before a text's first change nothing
    mixed ^= mixed >> np.uint64(32)
    result += mixed * np.uint64(_ODD)
  result ^= result >> np.uint64(32)
  return result * np.uint64(_ODD)


def _last_words(texts) -> Iterator[Array]:  # [n] uint64 each
  """Yields the last bytes of each text in words of 8 bytes, the last word first, and zeros."""
  _, ends, data = texts.buffers()
  ends = np.frombuffer(ends, np.int64, len(texts) + 1, 8 * texts.offset)
  padded = np.zeros(ends[-1] - ends[0] + 8, np.uint8)
  if len(padded) > 8:
    padded[8:] = np.frombuffer(data, np.uint8, len(padded) - 8, int(ends[0]))
  # Any 8 bytes as one number: place i holds the bytes that end before byte i of the texts.
  any_word = np.ndarray(len(padded) - 7, '<u8', padded, strides=(1,))
  lengths, ends = np.diff(ends), ends[1:] - ends[0]
  yield lengths.astype(np.uint64)
  for used in range(0, min(int(lengths.max(initial=0)), 8 * _HASHED_WORDS), 8):
    left = lengths - used
    word = any_word[np.where(left > 0, ends - used, 0)]
    short = np.clip(8 - left, 0, 8).astype(np.uint64) * np.uint64(8)  # bits of an earlier text
    yield np.where(short < 64, word >> np.minimum(short, 63) << np.minimum(short, 63), 0)


def key_text(key: Any) -> str:
  """Returns a key (a pyarrow scalar of one of the three kinds) as text for messages."""
  value = key.as_py()
  return value.hex() if isinstance(value, bytes) else str(value)


def _numbered(blocks: Iterable[Column], kind) -> Iterator[tuple[Any, Array]]:
  """Yields the blocks' keys as an array of one kind, and their rows, counted from 0, [n] int64."""
  start = 0
  for block in blocks:
    keys = _to_kind(block, kind, start)
    yield keys, np.arange(start, start + len(keys))
    start += len(keys)


def _join_blocks(
  blocks: Iterable[tuple[Any, Array]], kind, size: int
) -> Iterator[tuple[Any, Array]]:
  """Yields keys and their rows of several blocks at once: at least `size` rows, chunked."""
  parts, count = [], 0
  for block in blocks:
    parts.append(block)
    count += len(block[1])
    if count >= size:
      yield _chunked(parts, kind)
      parts, count = [], 0
  if parts:
    yield _chunked(parts, kind)


def _chunked(parts: list[tuple[Any, Array]], kind) -> tuple[Any, Array]:
  keys, rows = zip(*parts)
  chunks = [chunk for key in keys for chunk in getattr(key, 'chunks', [key])]
  return pa.chunked_array(chunks, kind), np.concatenate(rows)


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


def _npy(path: epath.Path, column: str) -> Iterator[Any]:
  """Reads uids, numbers or texts from a .npy file; never unpickles."""
  del column
  try:
    with path.open('rb') as f:
      lib = np.lib.format
      read_header = lib.read_array_header_1_0 if lib.read_magic(f) == (1, 0) else _header
      shape, _, kind = read_header(f)
      if kind.hasobject or not kind.itemsize:
        raise ValueError('it holds pickled Python objects' if kind.hasobject else 'no numbers')
      is_uid = [kind[name].str[1:] for name in kind.names or ()] == ['u8', 'u8']
      if len(shape) != 1 or not (is_uid or kind.kind in 'iuUS'):
        raise InputError(
          f'{path} holds {kind} {list(shape)}. Give shape [n] and dtype u8,u8 (uids) or int64 '
          '(numbers).'
        )
      for start in range(0, shape[0], _BLOCK):
        size = min(_BLOCK, shape[0] - start)
        data = f.read(size * kind.itemsize)
        if len(data) < size * kind.itemsize:
          raise ValueError(f'it ends before row {start + size:,} of {shape[0]:,}')
        yield _array_keys(path, np.frombuffer(data, kind) if data else np.zeros(size, kind))
  except InputError:
    raise
  except Exception as error:  # a forged header can raise any exception: numpy parses it as Python
    raise InputError(
      f'{path} cannot be read ({error}). Give a .npy file of dtype u8,u8 (uids) or int64, written '
      'without pickle.'
    ) from error


_header = np.lib.format.read_array_header_2_0  # of every version above 1.0


def _array_keys(path: epath.Path, values: Array):  # [n] UID, integers or texts
  """Returns the keys of an array of one of the three kinds."""
  if values.dtype.kind in 'US':
    return _strings(pa.array(values.astype(np.str_)))
  if values.dtype.names:
    halves = np.stack([values[name] for name in values.dtype.names], axis=1, dtype='>u8')
    return _binary(halves.view(np.uint8))
  if values.max() >= 2**63:
    raise InputError(f'{path} holds the number {values.max()}, which is no int64. Use int64.')
  return pa.array(values.astype(np.int64))


def _parquet(path: epath.Path, column: str) -> Iterator[Any]:
  """Reads texts or numbers from a column of a parquet file; of an export, the pool's rows only."""
  start = 0
  try:
    with path.open('rb') as f:
      file = pq.ParquetFile(f)
      have = file.schema_arrow.names
      name = have[_key_column(path, have, column)]
      is_export = _is_export(have)
      for batch in file.iter_batches(_BLOCK, columns=['dataset', name] if is_export else [name]):
        batch.validate(full=True)  # finds texts that are not UTF-8
        if is_export:
          batch = batch.filter(pc.equal(batch['dataset'], 'pool'))
        keys = _to_array(batch[name])
        if pa.types.is_integer(keys.type):
          yield _to_int64(keys, start, allow_none=True)
        elif pa.types.is_large_string(keys.type):
          yield keys
        else:
          raise InputError(f'{path}: the column {name!r} is {keys.type}. Give strings or integers.')
        start += len(keys)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path} cannot be read ({error}). Give a parquet file.') from error


def _lines(path: epath.Path, column: str) -> Iterator[Any]:
  """Reads a text file with one key per line."""
  del column
  with path.open('rb') as f:
    rest, data = b'', f.read(_READ_AT_ONCE).removeprefix(b'\xef\xbb\xbf')
    while data or rest:
      whole, end, rest = (rest + data).rpartition(b'\n') if data else (rest, b'', b'')
      yield _split_lines(path, whole + end)
      data = f.read(_READ_AT_ONCE) if data else b''


def _split_lines(path: epath.Path, data: bytes):
  """Returns the lines of a text as an array, without white space around them and empty ones."""
  ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('\n')) + 1
  ends = np.concatenate([[0], ends, [len(data)]]).astype(np.int64)
  lines = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))
  try:
    lines.validate(full=True)
  except pa.ArrowInvalid as error:
    raise InputError(f'{path} is not text in UTF-8 ({error}). Write one key per line.') from error
  lines = pc.utf8_trim_whitespace(lines)
  return lines.filter(pc.not_equal(lines, ''))


def _csv(path: epath.Path, column: str) -> Iterator[Any]:
  """Reads texts from a column of a CSV file with a header; of an export, the pool's rows only."""
  try:
    with open(path, encoding='utf-8-sig', newline='') as f:
      lines = csv.reader(f)
      have = next(lines, [])
      name = _key_column(path, have, column)
      dataset = have.index('dataset') if _is_export(have) else None
      while part := list(itertools.islice(lines, _LINES)):
        keys = [
          line[name] if name < len(line) else None
          for line in part
          if line and (dataset is None or line[dataset] == 'pool')
        ]
        yield _strings(pa.array(keys, pa.string()))
  except (csv.Error, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path} cannot be read ({error}). Give a CSV file with a header.') from error


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
