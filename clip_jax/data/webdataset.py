"""Format 'webdataset': a tar in which the members of one sample share a key. Nothing is extracted.

In: a .tar. Out: its samples, each member an offset and a length, found in one pass over the file.
The pass is our own: Python's tarfile allocates what a forged header asks for, does not tell of a
tar that ends early, and takes several times as long.
"""

import collections
from collections.abc import Iterator
import functools
import re
import struct
import zlib

from clip_jax.data import storage
from clip_jax.data.table import Sample

_BLOCK = 512  # bytes
_MOST_TEXT = 1 << 20  # bytes of a long name or an extended header; more is damage
_KEPT = 1 << 12  # bytes of the beginning of a member that the pass keeps for Sample.read ...
_MOST_KEPT = 1 << 26  # ... while all that it keeps is less than this: what is more is read again
_OVERHEAD = 100  # bytes of what is kept, beside itself
_HEADER = struct.Struct('100s 24x 12s 12x 8s B 355x')  # name, size, checksum, type
_GZIP = b'\x1f\x8b'
_MAGIC, _PREFIX = 257, 345  # bytes of a header where these begin


class _Damage(Exception):
  """What ends the pass over a tar early: where, and in which member."""

  def __init__(self, reason: str, byte: int, member: str = ''):
    super().__init__(reason)
    self.reason, self.byte, self.member = reason, byte, member


def samples(path: str, name: str) -> tuple[list[Sample], list[dict[str, str]]]:
  """Returns the samples of a tar, ordered by their first members, and what is listed as skipped.

  A tar that is damaged or cut short gives its samples up to there, and an entry with `name` and the
  byte. A key that comes again is listed; its first members count. Hidden files and members without
  an ending are no samples, as in webdataset. One thread may read the samples.
  """
  return _samples(path, name, _MOST_KEPT)[:2]


def samples_and_headers(
  path: str, name: str
) -> tuple[list[Sample], list[dict[str, str]], dict[int, int]]:
  """Returns what `samples` does; and the members whose names are said by more than one field.

  These as the byte where the data begins -> the one where the first of the headers does; of others
  there is one header, the block before the data.
  """
  return _samples(path, name, 0)


def _samples(
  path: str, name: str, room: int
) -> tuple[list[Sample], list[dict[str, str]], dict[int, int]]:
  tar = storage.Ahead(storage.open_file(path))
  headers: dict[int, int] = {}
  found: dict[str, dict[str, tuple[int, int]]] = {}
  kept: dict[int, bytes] = {}  # offset of a member -> its beginning
  repeats: collections.Counter[tuple[str, str]] = collections.Counter()
  skipped = []
  try:
    for member, offset, length, first_header in _members(tar):
      key, ending = _split(member)
      if not key:
        continue
      if first_header >= 0:
        headers[offset] = first_header
      members = found.get(key)
      if members is None:
        members = found[key] = {}
      elif ending in members:
        repeats[key, ending] += 1
        continue
      members[ending] = offset, length
      if room > 0:
        at, most = offset - tar.start, length if length < _KEPT else _KEPT
        kept[offset] = tar.data[at : at + most]
        room -= most + _OVERHEAD
  except _Damage as damage:
    skipped.append({'key': f'{name}, byte {damage.byte}', 'reason': damage.reason})
    found.pop(_split(damage.member)[0], None)  # what the cut sample would have said is not known
  finally:
    tar.close()
  if not found and not skipped:
    skipped.append({'key': name, 'reason': 'no samples'})
  copies: dict[str, int] = {}
  for (key, _), count in repeats.items():
    copies[key] = max(count, copies.get(key, 0))
  for key, count in copies.items():
    skipped += [{'key': key, 'reason': 'duplicate key'}] * count
  return (
    [
      Sample(key, members, functools.partial(_read, tar, kept, members))
      for key, members in found.items()
    ],
    skipped,
    headers,
  )


def _split(member: str) -> tuple[str, str]:
  """Returns (the key, up to the first dot of the file's name; the ending), or two times ''."""
  first = member.rfind('/') + 1
  dot = member.find('.', first)
  return (member[:dot], member[dot + 1 :].lower()) if dot > first else ('', '')


def _read(
  tar: storage.Ahead,
  kept: dict[int, bytes],
  members: dict[str, tuple[int, int]],
  ending: str,
  most: int,
) -> bytes:
  offset, length = members[ending]
  length = min(length, most)
  head = kept.get(offset, b'')
  return head[:length] if length <= len(head) else tar.read(offset, length)


def _members(tar: storage.Ahead) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, offset, length, first header) of every regular file of a tar (ustar, GNU or pax).

  While a member is looked at, its first _KEPT bytes are in the window. The byte of the first of
  its headers is -1 where there is one header, with the name in one field.
  """
  size, at, first_header = tar.size, 0, -1
  said: dict[str, str] = {}  # what an extended header says of the member after it
  while True:
    tar.move(at, _BLOCK + _KEPT)
    data, first = tar.data, at - tar.start
    if size < at + _BLOCK or len(data) < first + _BLOCK:
      raise _Damage('truncated' if size else 'empty file', size)
    if not data[first] and not data[first : first + _BLOCK].strip(b'\0'):
      if tar.read(at, 1 << 16).strip(b'\0'):
        raise _Damage('bytes after the end mark', at)
      return
    kind, name, length = _header(data, first, at)
    if said:
      name, length = said.get('path', name), int(said.get('size', length))
    start = at + _BLOCK
    if start + length > size:
      raise _Damage('truncated', size, name)
    if kind in 'LKxXg':
      if length > _MOST_TEXT:
        raise _Damage('damaged header', at, name)
      text = tar.read(start, length)
      first_header = at if first_header < 0 and kind != 'g' else first_header
      said |= {'path': _text(text)} if kind == 'L' else _pax(text, at) if kind in 'xX' else {}
    elif kind == 'S' or said and any(key.startswith('GNU.sparse') for key in said):
      raise _Damage('sparse file', at, name)
    else:
      if kind in '07' and not name.endswith('/'):
        if data[first + _PREFIX] and first_header < 0:
          first_header = at
        yield name, start, length, first_header
      said, first_header = {}, -1
    at = start + -(-length // _BLOCK) * _BLOCK


def _header(data: bytes, first: int, at: int) -> tuple[str, str, int]:
  """Returns (type, name, bytes of data) from the header that begins at data[first]."""
  name, size, stored, kind = _HEADER.unpack_from(data, first)
  try:
    checksum, length = _number(stored), _number(size)
  except ValueError:
    checksum = length = -1
  # The sum of the bytes, the checksum's own as spaces. Adler-32 begins with one more than the sum
  # modulo 65,521, which these parts stay below; it takes an eighth of the time of sum().
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
    name = (
      f'{_text(data[first + _PREFIX : end - 12])}/{name}'  # GNU's magic, 'ustar ', has no prefix
    )
  return kind, name, 0 if kind in '123456' else length  # links, devices and folders have no data


def _number(field: bytes) -> int:
  if field[0] & 0x80:  # GNU: binary where octal digits do not suffice
    return int.from_bytes(field, 'big') & ~(0x80 << 8 * (len(field) - 1))
  digits = field.rstrip(b'\0 ')
  if not digits.isdigit():  # nearly all are; int() takes '-7' and '1_0' too
    digits = field.split(b'\0', 1)[0].strip(b' ') or b'0'
    if not digits.isdigit():
      raise ValueError(field)
  return int(digits, 8)


def _text(data: bytes) -> str:
  return data.split(b'\0', 1)[0].decode('utf-8', 'backslashreplace')  # keeps names apart


def _pax(data: bytes, at: int) -> dict[str, str]:
  """Returns the records, '<length> <key>=<value>\\n' each, of an extended header."""
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
