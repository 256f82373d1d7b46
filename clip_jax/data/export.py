"""Copies of samples for other programs: rows of a dataset -> a webdataset tar, or ArrayRecord.

In: the dataset's folder as table.assemble leaves it, and its source files. Out: a file, which is
read back and compared with the source before it gets its name. Where the source is a tar, all
members of a sample are copied as they are, headers and all.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import io
import json
import os
import re
import tarfile
from typing import Any

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import array_record
from clip_jax.data import formats
from clip_jax.data import storage
from clip_jax.data import webdataset
from clip_jax.data.reader import Source
from clip_jax.data.table import Sample
from clip_jax.data.table import read_columns

SAMPLES_A_SHARD = 10_000  # as img2dataset's
_BLOCK = 512              # bytes, of a tar
_AT_ONCE = 1 << 23        # bytes that are copied at a time
_MOST_HEADERS = 1 << 22   # bytes of the headers of one member; more is no honest tar
_STARTS = {b'\xff\xd8\xff': 'jpg', b'\x89PNG\r\n': 'png'}  # an image's first bytes -> its ending


@dataclasses.dataclass
class _Run:
  """Bytes of a source tar that are copied as they are: samples that lie one after another."""
  reader: formats.Reader
  begin: int
  end: int

  def blocks(self) -> Iterator[bytes]:
    for at in range(self.begin, self.end, _AT_ONCE):
      yield self.reader.read(at, min(_AT_ONCE, self.end - at))


@dataclasses.dataclass
class _Made:
  """A sample whose members get new headers."""
  key: str
  members: Callable[[], Mapping[str, bytes]]  # reads them
  lengths: dict[str, int] = dataclasses.field(default_factory=dict)  # as they were read last

  def blocks(self) -> Iterator[bytes]:
    self.lengths = {}
    for ending, data in self.members().items():
      self.lengths[ending] = len(data)
      info = tarfile.TarInfo(f'{self.key}.{ending}')
      info.size = len(data)
      yield info.tobuf(tarfile.GNU_FORMAT, 'utf-8') + data + bytes(-len(data) % _BLOCK)


class _Ahead:
  """Small reads of a file, one after another, out of a part of it that is read at once."""

  def __init__(self, reader: formats.Reader, at_once: int):
    self._reader, self._at_once, self._start, self._data = reader, at_once, 0, b''

  def read(self, offset: int, length: int) -> bytes:
    if not self._start <= offset <= offset + length <= self._start + len(self._data):
      self._start, self._data = offset, self._reader.read(offset, max(length, self._at_once))
    return self._data[offset - self._start:offset - self._start + length]


@dataclasses.dataclass
class _Plan:
  """What a tar is to hold, in order."""
  pieces: list[_Run | _Made] = dataclasses.field(default_factory=list)
  # key -> ending -> bytes of that member; None where they are known when it was read
  samples: dict[str, dict[str, int] | None] = dataclasses.field(default_factory=dict)
  renamed: int = 0
  copies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  refused: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def name(self, key: str) -> str:
    """Adds a sample; returns its key, changed where another sample has it."""
    free = key
    while free in self.samples:
      self.copies[key] += 1
      free = f'{key}-{self.copies[key] + 1}'
    self.renamed += free != key
    self.samples[free] = None
    return free


def write_tar(path: str, directory: str, rows: Array) -> dict[str, Any]:  # rows: [n] int64, sorted
  """Writes rows of a dataset as a webdataset tar, in order; returns counts.

  A row that is there twice, or whose key another sample of this tar has, gets the key `<key>-2`,
  or -3, ..., and so new headers. A sample of a source that is no tar is its image, `txt` (its
  caption) and `json` (its key, and its label where it has one); what may not stand in a member's
  name becomes _ in its key. Counts: samples, members, bytes, copied (byte for byte, headers too),
  renamed, and refused: {'key', 'reason'} of samples whose names lead out of the folder that they
  are unpacked in.
  """
  plan = _Plan()
  for shard, where, some in _by_shard(directory, rows):
    if where['format'] == 'webdataset':
      _plan_copies(plan, where, directory, some)
    else:
      _plan_made(plan, directory, shard, some)
  with files.atomic(path) as temporary:
    with temporary.open('wb') as f:
      for piece in plan.pieces:
        for block in piece.blocks():
          f.write(block)
      f.write(bytes(2 * _BLOCK))
    members = _check_tar(os.fspath(temporary), path, plan)
    size = temporary.stat().length
  made = sum(isinstance(piece, _Made) for piece in plan.pieces)
  return {'samples': len(plan.samples), 'members': members, 'bytes': size,
          'copied': len(plan.samples) - made, 'renamed': plan.renamed, 'refused': plan.refused}


def write_array_record(path: str, directory: str, rows: Array) -> dict[str, Any]:  # [n] int64
  """Writes rows of a dataset as an ArrayRecord file of tf.train.Examples; returns counts.

  Each has key, the image under its type's ending ('jpg', 'png', 'webp', 'image'), txt, and label
  where it has one. Records are found one by one ('group_size:1').
  """
  from array_record.python import array_record_module
  names = _Plan()
  keys = []
  for shard, _, some in _by_shard(directory, rows):
    for key in _keys(directory, shard, some):
      keys.append(names.name(key))
  with files.atomic(path) as temporary:
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), array_record.OPTIONS)
    for record in _records(directory, rows, keys):
      writer.write(record)
    writer.close()
    _check_array_record(os.fspath(temporary), path, directory, rows, keys)
    size = temporary.stat().length
  return {'samples': len(keys), 'bytes': size, 'renamed': names.renamed}


def image_bytes(directory: str, rows: Array) -> int:  # [n] int64
  """Returns how many bytes the images of these rows have."""
  lengths = np.load(os.path.join(directory, 'table.npy'), mmap_mode='r')['length']
  return int(lengths[rows].sum(dtype=np.int64))


def _by_shard(directory: str, rows: Array) -> Iterator[tuple[int, dict[str, str], Array]]:
  """Yields (shard, where its file is, rows of it) in order."""
  shards = files.read_json(os.path.join(directory, 'files.json'))['shards']
  starts = np.load(os.path.join(directory, 'starts.npy'))
  of = np.searchsorted(starts, rows, side='right') - 1
  for some in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(of)) + 1):
    if len(some):
      shard = int(of[some[0]])
      yield shard, shards[shard], rows[some]


def _keys(directory: str, shard: int, rows: Array) -> list[str]:  # [n], of this shard
  start = int(np.load(os.path.join(directory, 'starts.npy'), mmap_mode='r')[shard])
  return read_columns(directory, shard, ['key'])['key'].take(rows - start).to_pylist()


def _plan_copies(plan: _Plan, where: Mapping[str, str], directory: str, rows: Array) -> None:
  """Plans the copies of samples of one source tar."""
  path = where['path']
  samples, _ = webdataset.samples(path, os.path.basename(path))
  of_image = {offset: sample for sample in samples for offset, _ in sample.members.values()}
  ends = np.sort([_end(*place) for sample in samples for place in sample.members.values()])
  table = np.load(os.path.join(directory, 'table.npy'), mmap_mode='r')
  reader = formats.get('webdataset').open(where)
  ahead = _Ahead(reader, 1 << 16 if files.is_local(path) else 1 << 22)
  for offset in table['offset'][rows].tolist():
    sample = of_image.get(offset)
    if sample is None:
      raise InputError(f'{path} has no sample at byte {offset}: it is not the file that was '
                       'indexed. Put that back, or index again with --redo=ingest.')
    begins = {ending: _begin(ahead, ends, place[0]) for ending, place in sample.members.items()}
    reason = next(filter(None, (
        _refusal(sample.key, ending, ahead, begin, sample.members[ending][0])
        for ending, begin in begins.items())), '')
    if reason:
      plan.refused.append({'key': sample.key, 'reason': reason})
    else:
      _plan_copy(plan, reader, sample, begins)


def _plan_copy(plan: _Plan, reader: formats.Reader, sample: Sample, begins: Mapping[str, int]
               ) -> None:
  """Plans the copy of one sample. begins: ending -> where that member's headers begin."""
  key = plan.name(sample.key)
  if key != sample.key:
    plan.pieces.append(_Made(key, functools.partial(_members, reader, sample.members)))
    return
  plan.samples[key] = {ending: length for ending, (_, length) in sample.members.items()}
  for begin, end in sorted((begins[ending], _end(*place))
                           for ending, place in sample.members.items()):
    last = plan.pieces[-1] if plan.pieces else None
    if isinstance(last, _Run) and last.reader is reader and last.end == begin:
      last.end = end
    else:
      plan.pieces.append(_Run(reader, begin, end))


def _members(reader: formats.Reader, members: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
  return {ending: reader.read(*place) for ending, place in members.items()}


def _begin(
    ahead: _Ahead,
    ends: Array,  # [m] int64, sorted: where members of samples end
    offset: int,
) -> int:
  """Returns where the headers of the member whose data is at `offset` begin.

  Its header has others before it where its name is long, or its time has fractions. They begin
  where what lies before them ends: mostly another member of a sample.
  """
  before = int(np.searchsorted(ends, offset))
  at = begin = int(ends[before - 1]) if before else 0
  while at + _BLOCK < offset:
    header = ahead.read(at, _BLOCK)
    kind = header[156:157]
    try:
      size = 0 if kind in b'123456' else max(tarfile.nti(header[124:136]), 0)
    except tarfile.HeaderError:
      break
    at = _end(at + _BLOCK, size)
    if kind not in b'LKxX':
      begin = at
  if at + _BLOCK != offset:
    raise InputError(f'The headers before byte {offset} of a tar are not those that were indexed. '
                     'Put the file back, or index again with --redo=ingest.')
  return begin


def _end(offset: int, length: int) -> int:
  """Returns where a member's blocks end."""
  return offset + -(-length // _BLOCK) * _BLOCK


def _refusal(key: str, ending: str, ahead: _Ahead, begin: int, data: int) -> str:
  """Returns why a member may not be copied with its name, '' where it may."""
  name = f'{key}.{ending}'
  parts = re.split(r'[/\\]', name)
  if '..' in parts or not parts[0] or re.match('[A-Za-z]:', name):
    return 'its name leads out of the folder'
  if data - begin > _MOST_HEADERS:
    return 'its headers are too long'
  headers = ahead.read(begin, data - begin)
  try:
    if not headers[345 - _BLOCK] and _says_no_name(headers[:-_BLOCK]):
      return ''  # the one header says it
    # As a program that unpacks it will understand several.
    told = tarfile.open(fileobj=io.BytesIO(headers), mode='r:', encoding='utf-8').next().name
  except (tarfile.TarError, AttributeError, RecursionError):
    told = ''
  is_same = told.startswith(f'{key}.') and told.lower() == name.lower()  # endings are lower
  return '' if is_same else 'its headers give it several names'


def _says_no_name(headers: bytes) -> bool:
  """Returns whether no header, or one extension without a path, stands before a member's own."""
  return not headers or (
      headers[156:157] in b'xX' and b'path' not in headers and
      _end(_BLOCK, tarfile.nti(headers[124:136])) == len(headers))


def _plan_made(plan: _Plan, directory: str, shard: int, rows: Array) -> None:
  """Plans samples of a source that is no tar."""
  source = Source(directory)
  for row, key in zip(rows.tolist(), _keys(directory, shard, rows)):
    name = plan.name(_safe(key) or f'row{row}')
    plan.pieces.append(_Made(name, functools.partial(_as_members, source, row, key)))


def _as_members(source: Source, row: int, key: str) -> dict[str, bytes]:
  sample = source[row]
  about = {'key': key} | ({'label': sample['label']} if sample['label'] >= 0 else {})
  return {_ending(sample['image']): sample['image'], 'txt': sample['caption'].encode(),
          'json': json.dumps(about).encode()}


def _safe(key: str) -> str:
  """Returns a key as a member's name may have it: no dots, no way out of the folder."""
  return '/'.join(part for part in re.sub(r'[^\w/-]+', '_', key).split('/') if part)


def _ending(image: bytes) -> str:
  if image[:4] == b'RIFF' and image[8:12] == b'WEBP':
    return 'webp'
  return next((ending for start, ending in _STARTS.items() if image.startswith(start)), 'image')


def _check_tar(temporary: str, path: str, plan: _Plan) -> int:
  """Reads a tar back: every byte as in the source, every sample as planned. Returns its members."""
  written, at = storage.open_file(temporary), 0
  expected = dict(plan.samples)
  for piece in plan.pieces:
    for block in piece.blocks():
      if written.read(at, len(block)) != block:
        raise _differs(path, f'byte {at} or one after it')
      at += len(block)
    if isinstance(piece, _Made):
      expected[piece.key] = piece.lengths
  samples, skipped = webdataset.samples(temporary, path)
  found = {sample.key: {ending: length for ending, (_, length) in sample.members.items()}
           for sample in samples}
  if expected and (skipped or list(found.items()) != list(expected.items())):
    wrong = next((key for key in expected if found.get(key) != expected[key]), skipped[:1])
    raise _differs(path, f'sample {wrong!r}')
  return sum(map(len, found.values()))


def _records(directory: str, rows: Array, keys: list[str]) -> Iterator[bytes]:
  source = Source(directory)
  for row, key in zip(rows.tolist(), keys, strict=True):
    sample = source[row]
    label = {'label': sample['label']} if sample['label'] >= 0 else {}
    yield array_record.example({'key': key, _ending(sample['image']): sample['image'],
                                'txt': sample['caption'], **label})


def _check_array_record(temporary: str, path: str, directory: str, rows: Array, keys: list[str]
                        ) -> None:
  """Reads every record back, and makes it once more from the source."""
  written = array_record.Records(temporary)
  if len(written) != len(keys):
    raise _differs(path, f'the number of its records, {len(written)} of {len(keys)},')
  for i, record in enumerate(_records(directory, rows, keys)):
    if written.values([i]) != [record]:
      raise _differs(path, f'record {i}')


def _differs(path: str, what: str) -> InputError:
  return InputError(f'{path}: {what} is not as in the source when read back, so nothing is left of '
                    'it. A source file was changed meanwhile, or the disk fails: run again.')
