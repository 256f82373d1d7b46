"""Format 'webdataset': a tar in which the members of one sample share a key.

In: a .tar. Out: its samples, with the offset and length of each member; nothing is extracted. One
pass reads the headers. Python's tarfile is not used: it allocates the size that a forged header
claims, does not report a truncated tar, and is several times slower.
"""

import collections
from collections.abc import Iterator
import functools
import os
import re
import struct
import zlib

from clip_jax.data import storage
from clip_jax.data.table import Sample

_BLOCK = 512  # bytes
_MAX_TEXT = 1 << 20  # bytes of a long name or an extended header; a larger one is damage
_HEAD = 1 << 12  # first bytes of a member that the pass caches for Sample.read ...
_MAX_CACHED = 1 << 26  # ... up to this many bytes per tar; the others are read again
_OVERHEAD = 100  # bytes of a cache entry beside its content
_HEADER = struct.Struct('100s 24x 12s 12x 8s B 355x')  # name, size, checksum, type
_GZIP = b'\x1f\x8b'
_MAGIC, _PREFIX = 257, 345  # offsets of these fields in a header
# Of GNU's sparse members: offsets of the flag for a further block of the map, in the header and in
# a block of the map.
_MORE_MAP, _STILL_MORE_MAP = 482, 504


# Reasons for which a tar is not read to its end: how many samples follow is unknown.
ENDS_EARLY = ('truncated', 'empty file', 'bytes after the end mark', 'damaged header')


class _Damage(Exception):
  """Damage that ends the pass over a tar: the reason, the byte and the member."""

  def __init__(self, reason: str, byte: int, member: str = ''):
    super().__init__(reason)
    self.reason, self.byte, self.member = reason, byte, member


def samples(path: str, name: str) -> tuple[list[Sample], list[dict[str, str]]]:
  """Returns the samples of a tar, ordered by their first members, and the skipped entries.

  A damaged or truncated tar gives the samples before the damage, and a skipped entry with `name`
  and the byte. A duplicate key is skipped; its first members count. A member without an ending and
  a sparse member are skipped alone. Hidden files, links and folders are ignored, as in webdataset.
  Only one thread may read the samples.
  """
  return _samples(path, name, _MAX_CACHED)[:2]


def samples_and_headers(
  path: str, name: str
) -> tuple[list[Sample], list[dict[str, str]], dict[int, int]]:
  """Returns the result of `samples`, and the members with a name in more than one header field.

  The dict maps the offset of such a member's data to the offset of its first header. Every other
  member has one header, the block before its data.
  """
  return _samples(path, name, 0)


def _samples(
  path: str, name: str, memory_bytes: int
) -> tuple[list[Sample], list[dict[str, str]], dict[int, int]]:
  tar = storage.ReadAhead(storage.open_file(path))
  headers: dict[int, int] = {}
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  heads: dict[int, bytes] = {}  # offset of a member -> its first bytes
  repeats: collections.Counter[tuple[str, str]] = collections.Counter()
  skipped = []
  try:
    for member, offset, length, first_header in _members(tar):
      key, ending = _split(member)
      if offset < 0:
        skipped.append({'key': member, 'reason': 'sparse member'})
        continue
      if not key:
        if not os.path.basename(member).startswith('.'):
          skipped.append({'key': member, 'reason': 'name without an ending'})
        continue
      if first_header >= 0:
        headers[offset] = first_header
      members = samples.get(key)
      if members is None:
        members = samples[key] = {}
      elif ending in members:
        repeats[key, ending] += 1
        continue
      members[ending] = offset, length
      if memory_bytes > 0:
        at, most = offset - tar.start, length if length < _HEAD else _HEAD
        heads[offset] = tar.data[at : at + most]
        memory_bytes -= most + _OVERHEAD
  except _Damage as damage:
    skipped.append({'key': f'{name}, byte {damage.byte}', 'reason': damage.reason})
    samples.pop(_split(damage.member)[0], None)  # the truncated sample is incomplete
  finally:
    tar.close()
  if not samples and not skipped:
    skipped.append({'key': name, 'reason': 'no samples'})
  copies: dict[str, int] = {}
  for (key, _), count in repeats.items():
    copies[key] = max(count, copies.get(key, 0))
  for key, count in copies.items():
    skipped += [{'key': key, 'reason': 'duplicate key'}] * count
  return (
    [
      Sample(key, members, functools.partial(_read, tar, heads, members))
      for key, members in samples.items()
    ],
    skipped,
    headers,
  )


def _split(member: str) -> tuple[str, str]:
  """Returns (key, ending), split at the first dot of the file name; ('', '') for no sample."""
  first = member.rfind('/') + 1
  dot = member.find('.', first)
  return (member[:dot], member[dot + 1 :].lower()) if dot > first else ('', '')


def _read(
  tar: storage.ReadAhead,
  heads: dict[int, bytes],
  members: dict[str, tuple[int, int]],
  ending: str,
  most: int,
) -> bytes:
  offset, length = members[ending]
  length = min(length, most)
  head = heads.get(offset, b'')
  return head[:length] if length <= len(head) else tar.read(offset, length)


def _members(tar: storage.ReadAhead) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, offset, length, first header) of every regular file of a tar (ustar, GNU or pax).

  When a member is yielded, its first _HEAD bytes are in the window of `tar`. first header: its
  offset, or -1 if the member has only one header, with the name in one field. The offset of a
  sparse member, of which the tar lacks the zeros, is -1.
  """
  size, at, first_header = tar.size, 0, -1
  extended: dict[str, str] = {}  # fields of the extended headers before a member
  while True:
    tar.move(at, _BLOCK + _HEAD)
    data, first = tar.data, at - tar.start
    if size < at + _BLOCK or len(data) < first + _BLOCK:
      raise _Damage('truncated' if size else 'empty file', size)
    if not data[first] and not data[first : first + _BLOCK].strip(b'\0'):
      if tar.read(at, 1 << 16).strip(b'\0'):
        raise _Damage('bytes after the end mark', at)
      return
    kind, name, length = _parse_header(data, first, at)
    if extended:
      name, length = extended.get('path', name), int(extended.get('size', length))
    start = at + _BLOCK
    if start + length > size:
      raise _Damage('truncated', size, name)
    if kind in 'LKxXg':
      if length > _MAX_TEXT:
        raise _Damage('damaged header', at, name)
      text = tar.read(start, length)
      first_header = at if first_header < 0 and kind != 'g' else first_header
      extended |= {'path': _text(text)} if kind == 'L' else _pax(text, at) if kind in 'xX' else {}
    elif kind == 'S' or extended and any(key.startswith('GNU.sparse') for key in extended):
      yield extended.get('GNU.sparse.name', name), -1, length, -1
      if kind == 'S':
        start = _after_sparse_map(tar, at)
        if start + length > size:
          raise _Damage('truncated', size, name)
      extended, first_header = {}, -1
    else:
      if kind in '07' and not name.endswith('/'):
        if data[first + _PREFIX] and first_header < 0:
          first_header = at
        yield name, start, length, first_header
      extended, first_header = {}, -1
    at = start + -(-length // _BLOCK) * _BLOCK


def _after_sparse_map(tar: storage.ReadAhead, at: int) -> int:
  """Returns the offset of the data of GNU's sparse member whose header is at `at`.

  The header has a flag that says that a block of the map follows, and so has each of these blocks.
  """
  flag = _MORE_MAP
  while tar.read(at + flag, 1).strip(b'\0'):
    at, flag = at + _BLOCK, _STILL_MORE_MAP
  return at + _BLOCK


def _parse_header(data: bytes, first: int, at: int) -> tuple[str, str, int]:
  """Returns (type, name, bytes of data) of the header that begins at data[first]."""
  name, size, stored, kind = _HEADER.unpack_from(data, first)
  try:
    checksum, length = _number(stored), _number(size)
  except ValueError:
    checksum = length = -1
  # The checksum is the sum of the header's bytes, with its own field read as spaces. The low half
  # of Adler-32 is 1 + the sum modulo 65,521; these parts are smaller. It is 8 times faster than
  # sum().
  a, b, middle, end = first + 148, first + 156, first + 334, first + _BLOCK
  total = (
    (zlib.adler32(data[first:a]) & 0xFFFF)
    + (zlib.adler32(data[b:middle]) & 0xFFFF)
    + (zlib.adler32(data[middle:end]) & 0xFFFF)
    - 3
    + 8 * ord(' ')
  )
  if length < 0 or checksum != total:
    raise _Damage(
      'damaged header'
      if at
      else 'compressed, unpack it'
      if data[first : first + 2] == _GZIP
      else 'not a tar',
      at,
    )
  kind, name = chr(kind) if kind else '0', _text(name)
  if data[first + _PREFIX] and data[first + _MAGIC : first + _MAGIC + 6] == b'ustar\0':
    # GNU's magic is 'ustar ', without a prefix field.
    name = f'{_text(data[first + _PREFIX : end - 12])}/{name}'
  return kind, name, 0 if kind in '123456' else length  # links, devices and folders have no data


def _number(field: bytes) -> int:
  if field[0] & 0x80:  # GNU: a binary number, too large for octal digits
    return int.from_bytes(field, 'big') & ~(0x80 << 8 * (len(field) - 1))
  digits = field.rstrip(b'\0 ')
  if not digits.isdigit():  # rare; int() alone would also accept '-7' and '1_0'
    digits = field.split(b'\0', 1)[0].strip(b' ') or b'0'
    if not digits.isdigit():
      raise ValueError(field)
  return int(digits, 8)


def _text(data: bytes) -> str:
  # backslashreplace keeps different invalid names different.
  return data.split(b'\0', 1)[0].decode('utf-8', 'backslashreplace')


def _pax(data: bytes, at: int) -> dict[str, str]:
  """Returns the records of an extended header; each is '<length> <key>=<value>\\n'."""
  records, first, end = {}, 0, len(data.rstrip(b'\0'))
  try:
    while first < end:
      space = data.index(b' ', first, first + 20)
      length = int(data[first:space])
      if length < 5 or data[first + length - 1 : first + length] != b'\n':
        raise ValueError(length)
      key, value = data[space + 1 : first + length - 1].split(b'=', 1)
      records[_text(key)] = _text(value)
      first += length
    if not re.fullmatch('[0-9]{1,20}', records.get('size', '0')):
      raise ValueError(records)
  except ValueError as error:
    raise _Damage('damaged header', at) from error
  return records
