"""Format 'webdataset': a tar in which the members of one sample share a key. Nothing is extracted.

In: a .tar. Out: its samples, each member an offset and a length, found in one pass over the
headers. The pass is our own: Python's tarfile allocates what a forged header asks for, and does not
tell of a tar that ends early.
"""

import collections
from collections.abc import Iterator
import functools
import re

from clip_jax.data.storage import File
from clip_jax.data.table import Sample

_BLOCK = 512           # bytes
_MOST_TEXT = 1 << 20   # bytes of a long name or an extended header; more is damage
_KEY = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)', re.DOTALL)  # up to the first dot of the file's name


class _Damage(Exception):
  """What ends the pass over a tar early: where, and in which member."""

  def __init__(self, reason: str, byte: int, member: str = ''):
    super().__init__(reason)
    self.reason, self.byte, self.member = reason, byte, member


def samples(path: str, name: str) -> tuple[list[Sample], list[dict[str, str]]]:
  """Returns the samples of a tar, ordered by their first members, and what is listed as skipped.

  A tar that is damaged or cut short gives its samples up to there, and an entry with `name` and the
  byte. A key that comes again is listed; its first members count. Hidden files and members without
  an ending are no samples, as in webdataset.
  """
  file = File(path)
  found: dict[str, dict[str, tuple[int, int]]] = {}
  repeats: collections.Counter[tuple[str, str]] = collections.Counter()
  skipped = []
  try:
    for member, offset, length in _members(file):
      if match := _KEY.fullmatch(member):
        key, ending = match[1], match[2].lower()
        if ending in found.setdefault(key, {}):
          repeats[key, ending] += 1
        else:
          found[key][ending] = offset, length
  except _Damage as damage:
    skipped.append({'key': f'{name}, byte {damage.byte}', 'reason': damage.reason})
    if match := _KEY.fullmatch(damage.member):
      found.pop(match[1], None)  # what the cut sample would have said is not known
  if not found and not skipped:
    skipped.append({'key': name, 'reason': 'no samples'})
  copies: dict[str, int] = {}
  for (key, _), count in repeats.items():
    copies[key] = max(count, copies.get(key, 0))
  for key, count in copies.items():
    skipped += [{'key': key, 'reason': 'duplicate key'}] * count
  return [Sample(key, members, functools.partial(_read, file, members))
          for key, members in found.items()], skipped


def _read(file: File, members: dict[str, tuple[int, int]], ending: str, most: int) -> bytes:
  offset, length = members[ending]
  return file.read(offset, min(length, most))


def _members(file: File) -> Iterator[tuple[str, int, int]]:
  """Yields (name, offset, length) of every regular file of a tar (ustar, GNU or pax)."""
  size, at, said = file.size(), 0, {}  # said: what an extended header says of the member after it
  while True:
    header = file.read(at, _BLOCK)
    if len(header) < _BLOCK:
      raise _Damage('truncated', size)
    if not header.strip(b'\0'):
      if file.read(at, 1 << 16).strip(b'\0'):
        raise _Damage('bytes after the end mark', at)
      return
    kind, name, length = _header(header, at)
    name, length = said.get('path', name), int(said.get('size', length))
    start = at + _BLOCK
    if start + length > size:
      raise _Damage('truncated', size, name)
    if kind in 'LKxXg':
      if length > _MOST_TEXT:
        raise _Damage('damaged header', at, name)
      data = file.read(start, length)
      said |= {'path': _text(data)} if kind == 'L' else _pax(data, at) if kind in 'xX' else {}
    elif kind == 'S' or any(key.startswith('GNU.sparse') for key in said):
      raise _Damage('sparse file', at, name)
    else:
      said = {}
      if kind in '07' and not name.endswith('/'):
        yield name, start, length
    at = start + -(-length // _BLOCK) * _BLOCK


def _header(block: bytes, at: int) -> tuple[str, str, int]:
  """Returns (type, name, bytes of data) from a header."""
  try:
    checksum, length = _number(block[148:156]), _number(block[124:136])
  except ValueError:
    checksum = length = -1
  if length < 0 or checksum != sum(block[:148]) + 8 * ord(' ') + sum(block[156:]):
    raise _Damage('damaged header' if at else 'not a tar', at)
  kind = chr(block[156]) if block[156] else '0'
  name = _text(block[:100])
  if block[257:263] == b'ustar\0' and block[345]:  # GNU's, 'ustar ', is another
    name = f'{_text(block[345:500])}/{name}'
  return kind, name, 0 if kind in '123456' else length  # links, devices and folders have no data


def _number(field: bytes) -> int:
  if field[0] & 0x80:  # GNU: binary where octal digits do not suffice
    return int.from_bytes(field, 'big') & ~(0x80 << 8 * (len(field) - 1))
  return int(field.split(b'\0')[0].strip() or b'0', 8)


def _text(data: bytes) -> str:
  return data.split(b'\0')[0].decode('utf-8', 'backslashreplace')  # keeps names apart


def _pax(data: bytes, at: int) -> dict[str, str]:
  """Returns the records, '<length> <key>=<value>\\n' each, of an extended header."""
  records = {}
  try:
    while data.strip(b'\0'):
      length = int(data.split(b' ', 1)[0])
      key, value = data[:length].split(b' ', 1)[1].split(b'=', 1)
      records[_text(key)] = _text(value.removesuffix(b'\n'))
      if length < 5:
        raise ValueError(length)
      data = data[length:]
    if int(records.get('size', 0)) < 0:
      raise ValueError(records)
  except (ValueError, IndexError) as error:
    raise _Damage('damaged header', at) from error
  return records
