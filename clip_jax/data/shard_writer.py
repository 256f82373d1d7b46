"""Copies of samples for other programs: rows of a dataset -> a webdataset tar, or ArrayRecord.

In: the dataset's folder as table.assemble leaves it, and its source files. Out: a file, which is
read back and compared with the source before it gets its name. Where the source is a tar, all
members of a sample are copied as they are, headers and all.
"""

import collections
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import errno
import hashlib
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
from clip_jax.data import array_record, reader, storage, table, webdataset

SAMPLES_A_SHARD = 10_000  # as img2dataset's
_BLOCK = 512  # bytes, of a tar
_AT_ONCE = 1 << 23  # bytes that are copied at a time
_MOST_NAME = 1 << 12  # characters of a member's name: no file can have a longer path
_MOST_KEY = 1 << 10  # characters of a key that is made safe
_MOST_HEADERS = 1 << 22  # bytes of the headers of one member; more is no honest tar
# Of a member's name: it has .. among its parts, or is absolute, on some system.
_LEADS_OUT = re.compile(r'(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^[A-Za-z]:').search
_STARTS = {b'\xff\xd8\xff': 'jpg', b'\x89PNG\r\n': 'png'}  # an image's first bytes -> its ending


@dataclasses.dataclass
class _Contents:
  """What was put into a file that is being written."""

  samples: dict[str, dict[str, int]] = dataclasses.field(
    default_factory=dict
  )  # key -> ending -> bytes of that member
  copies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  renamed: int = 0
  made: int = 0  # samples whose members got new headers
  refused: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def name(self, key: str) -> str:
    """Adds a sample; returns its key, changed where another sample has it."""
    free = key
    while free in self.samples:
      self.copies[key] += 1
      free = f'{key}-{self.copies[key] + 1}'
    self.renamed += free != key
    self.samples[free] = {}
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
  contents, digest = _Contents(), hashlib.sha256()
  with files.atomic(path) as temporary:
    with temporary.open('wb') as f:
      for block in _tar(contents, directory, rows):
        digest.update(block)
        f.write(block)
    members = _check_tar(os.fspath(temporary), path, contents, digest.hexdigest())
    size = temporary.stat().length
  return {
    'samples': len(contents.samples),
    'members': members,
    'bytes': size,
    'sha256': digest.hexdigest(),
    'copied': len(contents.samples) - contents.made,
    'renamed': contents.renamed,
    'refused': contents.refused,
  }


def write_array_record(path: str, directory: str, rows: Array) -> dict[str, Any]:  # [n] int64
  """Writes rows of a dataset as an ArrayRecord file of tf.train.Examples; returns counts.

  Each has key, the image under its type's ending ('jpg', 'png', 'webp', 'image'), txt, and label
  where it has one. Records are found one by one ('group_size:1').
  """
  contents, source = _Contents(), reader.Source(directory)
  keys = [
    contents.name(key)
    for shard, _, some in _by_shard(directory, rows)
    for key in _keys(directory, shard, some)
  ]
  with files.atomic(path) as temporary:
    records = (_record(source[row], key) for row, key in zip(rows.tolist(), keys, strict=True))
    sums = _write_records(os.fspath(temporary), records)
    _check_array_record(os.fspath(temporary), path, sums)
    size = temporary.stat().length
  return {'samples': len(keys), 'bytes': size, 'renamed': contents.renamed}


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
  return table.read_columns(directory, shard, ['key'])['key'].take(rows - start).to_pylist()


def _tar(contents: _Contents, directory: str, rows: Array) -> Iterator[bytes]:
  """Yields the bytes of a tar, and adds what is in them to `contents`."""
  source = reader.Source(directory)
  for shard, where, some in _by_shard(directory, rows):
    if where['format'] == 'webdataset':
      yield from _copies(contents, where['path'], directory, some)
    else:
      for row, key in zip(some.tolist(), _keys(directory, shard, some), strict=True):
        yield from _made(
          contents, contents.name(_safe(key) or f'row{row}'), _as_members(source[row], key)
        )
  yield bytes(2 * _BLOCK)


def _copies(contents: _Contents, path: str, directory: str, rows: Array) -> Iterator[bytes]:
  """Yields the bytes of samples of one source tar."""
  samples, _, headers = webdataset.samples_and_headers(path, os.path.basename(path))
  of_image = {offset: sample for sample in samples for offset, _ in sample.members.values()}
  offsets = np.load(os.path.join(directory, 'table.npy'), mmap_mode='r')['offset'][rows]
  with contextlib.closing(storage.Ahead(storage.open_file(path))) as tar:
    for offset in offsets.tolist():
      sample = of_image.get(offset)
      if sample is None:
        raise InputError(
          f'{path} has no sample at byte {offset}: it is not the file that was '
          'indexed. Put that back, or index again with --redo=ingest.'
        )
      if reason := _refusal(sample, tar, headers):
        contents.refused.append({'key': sample.key, 'reason': reason})
        continue
      key = contents.name(sample.key)
      if key != sample.key:
        yield from _made(
          contents, key, {ending: tar.read(*place) for ending, place in sample.members.items()}
        )
        continue
      contents.samples[key] = {ending: length for ending, (_, length) in sample.members.items()}
      for begin, length in sorted(sample.members.values()):
        end = begin + -(-length // _BLOCK) * _BLOCK
        for at in range(headers.get(begin, begin - _BLOCK), end, _AT_ONCE):
          size = min(_AT_ONCE, end - at)
          yield tar.read(at, size).ljust(
            size, b'\0'
          )  # a source that was cut can end before these zeros


def _made(contents: _Contents, key: str, members: Mapping[str, bytes]) -> Iterator[bytes]:
  """Yields the bytes of a sample under new headers."""
  contents.made += 1
  contents.samples[key] = {ending: len(data) for ending, data in members.items()}
  for ending, data in members.items():
    info = tarfile.TarInfo(f'{key}.{ending}')
    info.size = len(data)
    yield info.tobuf(tarfile.GNU_FORMAT, 'utf-8') + data + bytes(-len(data) % _BLOCK)


def _refusal(sample: table.Sample, tar: storage.Ahead, headers: Mapping[int, int]) -> str:
  """Returns why a sample may not be copied with its members' names, '' where it may."""
  for ending, (offset, _) in sample.members.items():
    name = f'{sample.key}.{ending}'
    if len(name) > _MOST_NAME:
      return 'its name is too long'
    if _LEADS_OUT(name):
      return 'its name leads out of the folder'
    begin = headers.get(offset)
    if begin is None:
      continue  # the one header says the name once
    if offset - begin > _MOST_HEADERS:
      return 'its headers are too long'
    told = _told(tar.read(begin, offset - begin))
    if not told.startswith(f'{sample.key}.') or told.lower() != name.lower():  # endings are lower
      return 'its headers give it several names'
  return ''


def _told(headers: bytes) -> str:
  """Returns the name that a program which unpacks a member will read, '' where that is not sure."""
  try:
    with tarfile.open(fileobj=io.BytesIO(headers), mode='r:', encoding='utf-8') as tar:
      name = tar.next().name
      return '' if tar.pax_headers else name  # these would count for members behind it, too
  except Exception:  # of forged headers tarfile raises a dozen different types
    return ''


def _as_members(sample: Mapping[str, Any], key: str) -> dict[str, bytes]:
  return {
    _ending(sample['image']): sample['image'],
    'txt': sample['caption'].encode(),
    'json': json.dumps({'key': key, **_label(sample)}).encode(),
  }


def _safe(key: str) -> str:
  """Returns a key as a member's name may have it: short, no dots, no way out of the folder."""
  return '/'.join(part for part in re.sub(r'[^\w/-]+', '_', key[:_MOST_KEY]).split('/') if part)


def _ending(image: bytes) -> str:
  if image[:4] == b'RIFF' and image[8:12] == b'WEBP':
    return 'webp'
  return next((ending for start, ending in _STARTS.items() if image.startswith(start)), 'image')


def _check_tar(temporary: str, path: str, contents: _Contents, sha256: str) -> int:
  """Reads a tar back: the bytes that the source gave, every sample as planned; counts members."""
  if files.sha256(temporary) != sha256:
    raise _differs(path, 'what was written')
  expected = contents.samples
  samples, skipped, _ = webdataset.samples_and_headers(temporary, path)
  found = {
    sample.key: {ending: length for ending, (_, length) in sample.members.items()}
    for sample in samples
  }
  if expected and (skipped or list(found.items()) != list(expected.items())):
    wrong = next((key for key in expected if found.get(key) != expected[key]), skipped[:1])
    raise _differs(path, f'sample {wrong!r}')
  return sum(map(len, found.values()))


def _record(sample: Mapping[str, Any], key: str) -> bytes:
  return array_record.example(
    {
      'key': key,
      _ending(sample['image']): sample['image'],
      'txt': sample['caption'],
      **_label(sample),
    }
  )


def _label(sample: Mapping[str, Any]) -> dict[str, int]:
  return {'label': sample['label']} if sample['label'] >= 0 else {}


def _write_records(path: str, records: Iterator[bytes]) -> list[bytes]:
  """Writes an ArrayRecord file; returns the sha256 of each record."""
  from array_record.python import array_record_module

  writer, sums = array_record_module.ArrayRecordWriter(path, array_record.OPTIONS), []
  try:
    for record in records:
      sums.append(hashlib.sha256(record).digest())
      writer.write(record)
    writer.close()
  except RuntimeError as error:  # the writer's only type, which says the system's in its text
    full = os.strerror(errno.ENOSPC) in str(error)
    raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
  return sums


def _check_array_record(temporary: str, path: str, sums: list[bytes]) -> None:
  """Reads every record back. sums: the sha256 of each that was made."""
  written = array_record.Records(temporary)
  if len(written) != len(sums):
    raise _differs(path, f'the number of its records, {len(written)} of {len(sums)},')
  for i, expected in enumerate(sums):
    if hashlib.sha256(written.values([i])[0]).digest() != expected:
      raise _differs(path, f'record {i}')


def _differs(path: str, what: str) -> InputError:
  return InputError(
    f'{path}: {what} is not as in the source when read back, so nothing is left of '
    'it. A source file was changed meanwhile, or the disk fails: run again.'
  )


# What the rows of a split can be written as, images and all: kind -> (ending, what writes one
# file).
COPIES = {'webdataset': ('tar', write_tar), 'array_record': ('array_record', write_array_record)}
