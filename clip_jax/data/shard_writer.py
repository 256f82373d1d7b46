"""Copies rows of a dataset to a webdataset tar or an ArrayRecord file, for other programs.

In: the dataset's folder as table.assemble writes it, and its source files. Out: a file, which is
read back and compared with the source before it gets its name. From a source tar, all members of a
sample are copied unchanged, with their headers.
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

SAMPLES_A_SHARD = 10_000  # img2dataset's default
_BLOCK = 512  # bytes, of a tar
_AT_ONCE = 1 << 23  # bytes copied at a time
_MOST_NAME = 1 << 12  # characters of a member's name; no path of a file can be longer
_MOST_KEY = 1 << 10  # characters of a sanitised key
_MOST_HEADERS = 1 << 22  # bytes of the headers of one member; more is a forged tar
# Matches a member's name that has a part '..' or is absolute, on any system.
_LEADS_OUT = re.compile(r'(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^[A-Za-z]:').search
_STARTS = {b'\xff\xd8\xff': 'jpg', b'\x89PNG\r\n': 'png'}  # an image's first bytes -> its ending


@dataclasses.dataclass
class _Contents:
  """The contents of a file while it is written."""

  # key -> ending -> bytes of that member
  samples: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  copies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  renamed: int = 0
  new_headers: int = 0  # samples whose members got new headers
  refused: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def name(self, key: str) -> str:
    """Adds a sample; returns its key, changed if another sample has the same key."""
    free = key
    while free in self.samples:
      self.copies[key] += 1
      free = f'{key}-{self.copies[key] + 1}'
    self.renamed += free != key
    self.samples[free] = {}
    return free


def write_tar(path: str, directory: str, rows: Array) -> dict[str, Any]:  # rows: [n] int64, sorted
  """Writes rows of a dataset as a webdataset tar, in order; returns counts.

  A duplicate row, or one whose key is already in this tar, gets the key `<key>-2`, or -3, ..., and
  new headers. A sample of a source that is no tar has its image, `txt` (its caption) and `json`
  (its key, and its label if it has one); characters that are invalid in a member's name become _ in
  its key. Counts: samples, members, bytes, copied (byte for byte, with headers), renamed, and
  refused: {'key', 'reason'} of samples whose names would be unpacked outside the target folder.
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
    'copied': len(contents.samples) - contents.new_headers,
    'renamed': contents.renamed,
    'refused': contents.refused,
  }


def write_array_record(path: str, directory: str, rows: Array) -> dict[str, Any]:  # [n] int64
  """Writes rows of a dataset as an ArrayRecord file of tf.train.Examples; returns counts.

  Each has key, the image under its type's ending ('jpg', 'png', 'webp', 'image'), txt, and label if
  there is one. Every record is its own group ('group_size:1'), for fast random access.
  """
  contents, source = _Contents(), reader.Source(directory)
  keys = [
    contents.name(key)
    for shard, _, shard_rows in _by_shard(directory, rows)
    for key in _keys(directory, shard, shard_rows)
  ]
  with files.atomic(path) as temporary:
    records = (_record(source[row], key) for row, key in zip(rows.tolist(), keys, strict=True))
    sums = _write_records(os.fspath(temporary), records)
    _check_array_record(os.fspath(temporary), path, sums)
    size = temporary.stat().length
  return {'samples': len(keys), 'bytes': size, 'renamed': contents.renamed}


def image_bytes(directory: str, rows: Array) -> int:  # [n] int64
  """Returns the total size of the images of the given rows, bytes."""
  lengths = files.read_npy(os.path.join(directory, 'table.npy'), mmap=True)['length']
  return int(lengths[rows].sum(dtype=np.int64))


def _by_shard(directory: str, rows: Array) -> Iterator[tuple[int, dict[str, str], Array]]:
  """Yields (shard, its entry in files.json, rows of it) in order."""
  shards = table.read_files(directory)['shards']
  starts = files.read_npy(os.path.join(directory, 'starts.npy'))
  shard_of = np.searchsorted(starts, rows, side='right') - 1
  for places in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shard_of)) + 1):
    if len(places):
      shard = int(shard_of[places[0]])
      yield shard, shards[shard], rows[places]


def _keys(directory: str, shard: int, rows: Array) -> list[str]:  # [n], of this shard
  start = int(files.read_npy(os.path.join(directory, 'starts.npy'))[shard])
  return table.read_columns(directory, shard, ['key'])['key'].take(rows - start).to_pylist()


def _tar(contents: _Contents, directory: str, rows: Array) -> Iterator[bytes]:
  """Yields the bytes of a tar, and records its samples in `contents`."""
  source = reader.Source(directory)
  for shard, where, shard_rows in _by_shard(directory, rows):
    if where['format'] == 'webdataset':
      yield from _copied(contents, where['path'], directory, shard_rows)
    else:
      for row, key in zip(shard_rows.tolist(), _keys(directory, shard, shard_rows), strict=True):
        yield from _with_new_headers(
          contents, contents.name(_safe_key(key) or f'row{row}'), _as_members(source[row], key)
        )
  yield bytes(2 * _BLOCK)


def _copied(contents: _Contents, path: str, directory: str, rows: Array) -> Iterator[bytes]:
  """Yields the tar bytes of rows of one source tar."""
  samples, _, headers = webdataset.samples_and_headers(path, os.path.basename(path))
  of_image = {offset: sample for sample in samples for offset, _ in sample.members.values()}
  offsets = files.read_npy(os.path.join(directory, 'table.npy'), mmap=True)['offset'][rows]
  with contextlib.closing(storage.ReadAhead(storage.open_file(path))) as tar:
    for offset in offsets.tolist():
      sample = of_image.get(offset)
      if sample is None:
        raise InputError(
          f'{path} has no sample at byte {offset}: it is not the file that was '
          'indexed. Restore that file, or index again with --redo=ingest.'
        )
      if reason := _reason_not_to_copy(sample, tar, headers):
        contents.refused.append({'key': sample.key, 'reason': reason})
        continue
      key = contents.name(sample.key)
      if key != sample.key:
        yield from _with_new_headers(
          contents, key, {ending: tar.read(*place) for ending, place in sample.members.items()}
        )
        continue
      contents.samples[key] = {ending: length for ending, (_, length) in sample.members.items()}
      for begin, length in sorted(sample.members.values()):
        end = begin + -(-length // _BLOCK) * _BLOCK
        for at in range(headers.get(begin, begin - _BLOCK), end, _AT_ONCE):
          size = min(_AT_ONCE, end - at)
          # Padded, because a truncated source may lack the last zeros.
          yield tar.read(at, size).ljust(size, b'\0')


def _with_new_headers(
  contents: _Contents, key: str, members: Mapping[str, bytes]
) -> Iterator[bytes]:
  """Yields the tar bytes of a sample with new headers."""
  contents.new_headers += 1
  contents.samples[key] = {ending: len(data) for ending, data in members.items()}
  for ending, data in members.items():
    info = tarfile.TarInfo(f'{key}.{ending}')
    info.size = len(data)
    yield info.tobuf(tarfile.GNU_FORMAT, 'utf-8') + data + bytes(-len(data) % _BLOCK)


def _reason_not_to_copy(
  sample: table.Sample, tar: storage.ReadAhead, headers: Mapping[int, int]
) -> str:
  """Returns the reason why a sample must not be copied with its members' names, '' for none."""
  for ending, (offset, _) in sample.members.items():
    name = f'{sample.key}.{ending}'
    if len(name) > _MOST_NAME:
      return 'its name is too long'
    if _LEADS_OUT(name):
      return 'its name leads out of the folder'
    begin = headers.get(offset)
    if begin is None:
      continue  # a single header has only one name
    if offset - begin > _MOST_HEADERS:
      return 'its headers are too long'
    read_name = _unpacked_name(tar.read(begin, offset - begin))
    # The endings of samples are in lower case.
    if not read_name.startswith(f'{sample.key}.') or read_name.lower() != name.lower():
      return 'its headers give it several names'
  return ''


def _unpacked_name(headers: bytes) -> str:
  """Returns the name under which tar programs unpack a member, '' if they may disagree."""
  try:
    with tarfile.open(fileobj=io.BytesIO(headers), mode='r:', encoding='utf-8') as tar:
      member = tar.next()
      name = member.name if member else ''
      return '' if tar.pax_headers else name  # global pax headers also affect later members
  except Exception:  # tarfile raises a dozen different types for forged headers
    return ''


def _as_members(sample: Mapping[str, Any], key: str) -> dict[str, bytes]:
  return {
    _ending(sample['image']): sample['image'],
    'txt': sample['caption'].encode(),
    'json': json.dumps({'key': key, **_label(sample)}).encode(),
  }


def _safe_key(key: str) -> str:
  """Returns a key that is valid in a member's name: short, without dots, inside the folder."""
  return '/'.join(part for part in re.sub(r'[^\w/-]+', '_', key[:_MOST_KEY]).split('/') if part)


def _ending(image: bytes) -> str:
  if image[:4] == b'RIFF' and image[8:12] == b'WEBP':
    return 'webp'
  return next((ending for start, ending in _STARTS.items() if image.startswith(start)), 'image')


def _check_tar(temporary: str, path: str, contents: _Contents, sha256: str) -> int:
  """Checks a written tar: its hash and all its samples; returns the number of members."""
  if files.sha256(temporary) != sha256:
    raise _differs(path, 'what was written')
  expected = contents.samples
  samples, skipped, _ = webdataset.samples_and_headers(temporary, path)
  written = {
    sample.key: {ending: length for ending, (_, length) in sample.members.items()}
    for sample in samples
  }
  if expected and (skipped or list(written.items()) != list(expected.items())):
    wrong = next((key for key in expected if written.get(key) != expected[key]), skipped[:1])
    raise _differs(path, f'sample {wrong!r}')
  return sum(map(len, written.values()))


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
  except RuntimeError as error:  # the writer's only type; its text has the system's error
    full = os.strerror(errno.ENOSPC) in str(error)
    raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
  return sums


def _check_array_record(temporary: str, path: str, sums: list[bytes]) -> None:
  """Checks every written record; sums: the expected sha256 of each."""
  written = array_record.Records(temporary)
  if len(written) != len(sums):
    raise _differs(path, f'the number of its records, {len(written)} of {len(sums)},')
  for i, expected in enumerate(sums):
    if hashlib.sha256(written.values([i])[0]).digest() != expected:
      raise _differs(path, f'record {i}')


def _differs(path: str, what: str) -> InputError:
  return InputError(
    f'{path}: {what} differs from the source when read back, so the file is removed. '
    'A source file was changed during the run, or the disk fails: run again.'
  )


# Formats for copies of a split's rows with their images: kind -> (ending, writer of one file).
COPIES = {'webdataset': ('tar', write_tar), 'array_record': ('array_record', write_array_record)}
