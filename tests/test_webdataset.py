import io
import json
import os
import random
import subprocess
import tarfile
import tracemalloc

import fsspec
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import webdataset as writer

from clip_jax.data import storage, webdataset


def _tar(path, members, format=tarfile.USTAR_FORMAT):
  """Writes [(name, bytes)] with Python's tarfile, the independent side of these tests."""
  with tarfile.open(path, 'w', format=format) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return str(path)


def _tar_version():
  try:
    return subprocess.run(['tar', '--version'], capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return ''


def _sample(key, n=0):
  return [
    (f'{key}.jpg', b'image' * (n + 1)),
    (f'{key}.txt', f'caption {key}'.encode()),
    (f'{key}.json', b'{}'),
  ]


def _read(path, name='x.tar'):
  """Returns [(key, {ending: bytes})] and what was skipped."""
  samples, skipped = webdataset.samples(path, name)
  return [
    (sample.key, {ending: sample.read(ending, 1 << 30) for ending in sample.members})
    for sample in samples
  ], skipped


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_equals_tarfile(tmp_path, format):
  names = ['a.jpg', './dir/b.jpg', 'ü/ö.png', 'x' * 90 + '/' + 'y' * 80 + '.jpg']
  if format != tarfile.USTAR_FORMAT:
    names += ['long' * 60 + '.jpg', 'deep/' * 60 + 'é' * 120 + '.jpg']
  members = [(name, os.urandom(i * 333)) for i, name in enumerate(names)]
  path = _tar(tmp_path / 'x.tar', members, format)
  with tarfile.open(path) as tar:
    expected = [(member.name, member.offset_data, member.size) for member in tar]
  found = webdataset._members(storage.ReadAhead(storage.File(path)))
  assert [member[:3] for member in found] == expected
  assert len(expected) == len(names)


def test_members_are_grouped_by_key_in_order_of_first_member(tmp_path):
  path = _tar(
    tmp_path / 'x.tar',
    [
      ('b.jpg', b'1'),
      ('a.jpg', b'2'),
      ('a.seg.png', b'3'),
      ('b.TXT', b'4'),
      ('d/b.jpg', b'5'),
      ('.hidden.jpg', b'6'),
      ('noending', b'7'),
      ('d/._b.jpg', b'8'),
    ],
  )
  samples, skipped = _read(path)
  assert samples == [
    ('b', {'jpg': b'1', 'txt': b'4'}),
    ('a', {'jpg': b'2', 'seg.png': b'3'}),
    ('d/b', {'jpg': b'5'}),
  ]
  assert skipped == [{'key': 'noending', 'reason': 'name without an ending'}]


@pytest.mark.skipif('GNU' not in _tar_version(), reason='needs GNU tar')
@pytest.mark.parametrize('format', ['gnu', 'posix'])
@pytest.mark.parametrize('segments', [1, 3, 4, 5, 60])
def test_a_sparse_member_is_skipped_alone(tmp_path, format, segments):
  folder = tmp_path / 'x'
  folder.mkdir()
  for name, data in [member for key in 'abc' for member in _sample(key)]:
    (folder / name).write_bytes(data)
  with open(folder / 'b.meta', 'wb') as f:  # data and holes in turn
    for i in range(segments):
      f.seek((2 * i + 1) << 16)
      f.write(b'data')
    f.truncate((2 * segments + 1) << 16)
  path = str(tmp_path / 'x.tar')
  command = ['tar', f'--format={format}', '--sort=name', '-S', '-cf', path, '-C', str(folder), '.']
  subprocess.run(command, check=True)
  samples, skipped = _read(path)
  expected = [(f'./{key}', {e.split('.')[1]: d for e, d in _sample(key)}) for key in 'abc']
  assert samples == expected
  assert skipped == [{'key': './b.meta', 'reason': 'sparse member'}]
  whole = (tmp_path / 'x.tar').read_bytes()
  for cut in range(512, len(whole) - 10240, 512):  # no cut is fatal
    (tmp_path / 'cut.tar').write_bytes(whole[:cut])
    assert _read(str(tmp_path / 'cut.tar'))[1][-1]['reason'] in ('truncated', 'damaged header')


def test_duplicate_keys_are_listed_and_the_first_counts(tmp_path):
  path = _tar(tmp_path / 'x.tar', _sample('a') + _sample('b') + _sample('a', 5) + _sample('a', 6))
  samples, skipped = _read(path)
  assert [key for key, _ in samples] == ['a', 'b'] and samples[0][1]['jpg'] == b'image'
  assert skipped == [{'key': 'a', 'reason': 'duplicate key'}] * 2


def test_links_and_folders_are_no_members(tmp_path):
  with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
      info = tarfile.TarInfo('evil.jpg')
      info.type, info.linkname = kind, '/etc/passwd'
      tar.addfile(info)
    info = tarfile.TarInfo('../../up.jpg')
    info.size = 3
    tar.addfile(info, io.BytesIO(b'abc'))
  assert _read(tmp_path / 'x.tar') == ([('../../up', {'jpg': b'abc'})], [])


def test_every_cut_keeps_the_whole_samples_before_it_and_says_where(tmp_path):
  whole = tmp_path / 'x.tar'
  _tar(whole, [member for key in 'abc' for member in _sample(key, ord(key))])
  data = whole.read_bytes()
  full, _ = _read(str(whole))
  with tarfile.open(whole) as tar:
    end = max(member.offset_data + 512 for member in tar)
  for cut in [0, 1, 511, 512, 513, *range(600, end, 97), end]:
    (tmp_path / 'cut.tar').write_bytes(data[:cut])
    samples, skipped = _read(str(tmp_path / 'cut.tar'), 'cut.tar')
    assert skipped == [
      {'key': f'cut.tar, byte {cut}', 'reason': 'truncated' if cut else 'empty file'}
    ]
    assert [key for key, _ in samples] == [key for key, _ in full][: len(samples)]
    assert samples[:-1] == full[: len(samples)][:-1]
    for _, got in samples[-1:]:  # the last may lack members that come after the cut
      assert got.items() <= full[len(samples) - 1][1].items()
    if cut == end:
      assert samples == full


def test_a_sample_whose_member_is_cut_is_no_sample(tmp_path):
  path = tmp_path / 'x.tar'
  _tar(path, [('a.jpg', b'1'), ('b.jpg', b'2'), ('b.txt', b'x' * 600)])
  path.write_bytes(path.read_bytes()[: 5 * 512 + 100])
  samples, skipped = _read(str(path))
  assert [key for key, _ in samples] == ['a']
  assert skipped == [{'key': f'x.tar, byte {5 * 512 + 100}', 'reason': 'truncated'}]


@pytest.mark.parametrize(
  ('data', 'entry'),
  [
    (b'', {'key': 'x.tar, byte 0', 'reason': 'empty file'}),
    (b'\x1f\x8b' + b'garbage' * 300, {'key': 'x.tar, byte 0', 'reason': 'compressed, unpack it'}),
    (bytes(10240), {'key': 'x.tar', 'reason': 'no samples'}),
  ],
)
def test_files_without_samples_are_listed(tmp_path, data, entry):
  (tmp_path / 'x.tar').write_bytes(data)
  assert _read(tmp_path / 'x.tar') == ([], [entry])


def test_a_damaged_header_in_the_middle_ends_the_walk_there(tmp_path):
  path = tmp_path / 'x.tar'
  _tar(path, _sample('a') + _sample('b'))
  data = bytearray(path.read_bytes())
  data[3 * 1024] ^= 1
  path.write_bytes(data)
  samples, skipped = _read(path)
  assert [key for key, _ in samples] == ['a']
  assert skipped == [{'key': f'x.tar, byte {3 * 1024}', 'reason': 'damaged header'}]


def test_bytes_after_the_end_mark_are_listed(tmp_path):
  one, two = tmp_path / 'x.tar', tmp_path / 'y.tar'
  _tar(one, _sample('a'))
  _tar(two, _sample('b'))
  one.write_bytes(one.read_bytes()[: -10240 + 4096] + two.read_bytes())
  samples, skipped = _read(one)
  assert [key for key, _ in samples] == ['a']
  assert [entry['reason'] for entry in skipped] == ['bytes after the end mark']


def _header(size: bytes, kind=b'0', name=b'a.jpg'):
  block = bytearray(512)
  block[: len(name)] = name
  block[124:136] = size
  block[156:157] = kind
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


@pytest.mark.parametrize('kind', [b'0', b'L', b'x', b'g', b'\0'])
@pytest.mark.parametrize('size', [b'77777777777\0', b'\x80' + b'\x7f' * 11, b'\xff' * 12])
def test_a_forged_size_allocates_nothing(tmp_path, kind, size):
  (tmp_path / 'x.tar').write_bytes(_header(size, kind) + bytes(2048))
  samples, skipped = _read(tmp_path / 'x.tar')
  assert samples == [] and [entry['reason'] for entry in skipped] == ['truncated']


@pytest.mark.parametrize(
  'size', [b'-0000000010\0', b'zz', b'00000000009\0', b'0000000_010\0', b'+0000000010\0']
)
def test_a_size_that_is_no_number_is_damage(tmp_path, size):
  (tmp_path / 'x.tar').write_bytes(_header(size.ljust(12, b'\0')) + bytes(2048))
  assert [entry['reason'] for entry in _read(tmp_path / 'x.tar')[1]] == ['not a tar']


def test_binary_sizes_and_pax_sizes_are_read(tmp_path):
  record = b'10 size=3\n'
  (tmp_path / 'x.tar').write_bytes(
    _header(b'\x80' + (3).to_bytes(11, 'big'))
    + b'abc'.ljust(512, b'\0')
    + _header(b'%011o\0' % len(record), b'x', b'pax')
    + record.ljust(512, b'\0')
    + _header(b'00000000000\0', name=b'b.jpg')
    + b'def'.ljust(512, b'\0')
    + bytes(1024)
  )
  assert _read(tmp_path / 'x.tar') == ([('a', {'jpg': b'abc'}), ('b', {'jpg': b'def'})], [])


@pytest.mark.parametrize('number', ['1_0', '+3', ' 3', '-3', '٣', '', '9' * 5000])
def test_a_pax_size_that_others_read_otherwise_is_damage(tmp_path, number):
  record = b' size=' + number.encode() + b'\n'
  record = b'%d' % next(n for n in range(9999) if n == len(str(n)) + len(record)) + record
  (tmp_path / 'x.tar').write_bytes(
    _header(b'%011o\0' % len(record), b'x')
    + record
    + bytes(-len(record) % 512)
    + _header(b'00000000003\0')
    + b'abc'.ljust(512, b'\0')
    + bytes(1024)
  )
  assert [entry['reason'] for entry in _read(tmp_path / 'x.tar')[1]] == ['damaged header']


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_never_fatal(tmp_path_factory, data):
  path = tmp_path_factory.mktemp('fuzz') / 'x.tar'
  _tar(
    path,
    [('long' * 40 + '.jpg', b'1' * 700), *_sample('b')],
    data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
  )
  raw = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, 6000))
    raw[at : at + 1] = data.draw(st.binary(min_size=0, max_size=3))
  path.write_bytes(raw)
  size = os.path.getsize(path)
  samples, skipped = webdataset.samples(str(path), 'x.tar')
  for sample in samples:
    assert all(0 < offset <= offset + length <= size for offset, length in sample.members.values())
  assert all(set(entry) == {'key', 'reason'} for entry in skipped)


def _forged(rng):
  """Returns the bytes of a tar with headers as an attacker, or a bad disk, would leave them."""
  names = [
    b'a.jpg',
    b'a.txt',
    b'b.JPG',
    b'../../x.jpg',
    b'/etc/passwd.jpg',
    b'.hidden.jpg',
    b'',
    b'..',
    b'a\0b.jpg',
    b'/',
    b'dir/',
    b'x' * 100,
    b'a.' * 50,
    b'\xff\xfe.jpg',
    b'././@LongLink',
  ]
  values = [b'3', b'-3', b'9' * 22, b'9' * 5000, b'../../y.jpg', b'a=b', b'\n', b'\0', b'\xff', b'']
  out = b''
  for i in range(rng.randrange(1, 14)):
    kind = bytes(rng.choices(b'0\0001234567LKxXgSV\xff', [40] + [2] * 16)[:1])
    data = rng.choice([b'', b'abc', rng.randbytes(rng.randrange(1500)), b'n' * rng.randrange(3000)])
    if kind in (b'x', b'X', b'g') and rng.random() < 0.8:
      key = rng.choice([b'path', b'size', b'GNU.sparse.major', b'linkpath', b''])
      record = key + b'=' + rng.choice(values) + b'\n'
      data += b'%d %s' % (rng.choice([len(record) + 3] * 5 + [0, 4, -1, 10**9]), record)
    size = b'%011o\0' % len(data)
    if rng.random() < 0.05:
      size = rng.choice(
        [
          b'77777777777\0',
          b'\xff' * 12,
          b'-0000000010\0',
          b'zz',
          b'',
          b'99999999999\0',
          b'\x80' + (2**80).to_bytes(11, 'big'),
          b'\x80' + len(data).to_bytes(11, 'big'),
        ]
      )
    header = bytearray(
      _header(size.ljust(12, b'\0'), kind, rng.choice(names + [b'%d.jpg' % i] * 9))
    )
    if rng.random() < 0.02:
      header[rng.randrange(512)] ^= 1 << rng.randrange(8)
    out += bytes(header) + data + bytes(-len(data) % 512)
  out += rng.choice([b'', bytes(512), bytes(1024), bytes(1024), bytes(1024) + b'junk'])
  return out if rng.random() < 0.8 else out[: rng.randrange(len(out) + 1)]


def test_forged_headers_never_crash_nor_read_outside_the_file(tmp_path, monkeypatch):
  path, found = tmp_path / 'x.tar', 0
  for seed in range(400):
    rng = random.Random(seed)
    monkeypatch.setattr(storage, '_WINDOW', rng.choice([5000, 6000, 1 << 18]))
    data = _forged(rng)
    path.write_bytes(data)
    samples, skipped = webdataset.samples(str(path), 'x.tar')
    for sample in samples:
      found += 1
      for ending, (offset, length) in sample.members.items():
        assert 512 <= offset <= offset + length <= len(data)
        assert sample.read(ending, 1 << 40) == data[offset : offset + length]
        assert sample.read(ending, 5) == data[offset : offset + min(5, length)]
    assert all(set(entry) == {'key', 'reason'} for entry in skipped)
  assert found > 300


def test_large_members_are_passed_over_and_what_is_kept_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(webdataset, '_MAX_CACHED', 1 << 18)
  path = tmp_path / 'x.tar'
  with open(path, 'wb') as f:  # a sparse file: reading all of it would take 4 GB
    for i in range(8):
      f.write(_header(b'%011o\0' % (1 << 29), name=b'%d.jpg' % i))
      f.seek(1 << 29, os.SEEK_CUR)
    for i in range(500):
      f.write(
        _header(b'%011o\0' % 2000, name=b'%d.png' % (i + 8)) + bytes([i % 256]) * 2000 + bytes(48)
      )
    f.write(bytes(1024))
  tracemalloc.start()
  try:
    samples, skipped = webdataset.samples(str(path), 'x.tar')
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
  finally:
    tracemalloc.stop()
  assert len(samples) == 508 and not skipped
  for i, sample in enumerate(samples[8:]):  # also those of which nothing was kept
    assert sample.read('png', 3000) == bytes([i % 256]) * 2000


@pytest.mark.parametrize(
  'records', [b'5 a=\n' * 100_000, b'999 a=\n' * 9, b'9' * 900_000, b' ' * 9]
)
def test_an_extended_header_takes_no_more_time_than_its_length(tmp_path, records):
  block = records.ljust(-(-len(records) // 512) * 512, b'\0')
  (tmp_path / 'x.tar').write_bytes(
    (_header(b'%011o\0' % len(records), b'x') + block) * 2 + _header(b'%011o\0' % 0) + bytes(1024)
  )
  samples, skipped = _read(tmp_path / 'x.tar')
  assert [key for key, _ in samples] == (['a'] if records[:1] == b'5' else [])
  assert not skipped or skipped[0]['reason'] == 'damaged header'


def test_a_remote_tar_is_read_once_and_as_a_local_one(tmp_path, monkeypatch):
  system, read = fsspec.filesystem('memory'), []
  monkeypatch.setattr(storage, '_REMOTE_WINDOW', 20_000)
  rng = random.Random(0)
  members = [
    (f'{i}.{ending}', rng.randbytes(rng.randrange(2000)))
    for i in range(100)
    for ending in ('jpg', 'txt')
  ]
  local = _tar(tmp_path / 'x.tar', members)
  system.pipe('/remote/x.tar', (tmp_path / 'x.tar').read_bytes())
  ranges = storage.read_ranges
  monkeypatch.setattr(storage, 'read_ranges', lambda asked: read.extend(asked) or ranges(asked))
  assert _read('memory://remote/x.tar') == _read(local)
  system.rm('/remote', recursive=True)
  assert sum(length for _, _, length in read) <= os.path.getsize(local) + 4 * 20_000


def test_what_webdataset_writes_is_read(tmp_path):
  written = [
    {'__key__': f'dir/{i:09d}', 'jpg': os.urandom(50 * i), 'txt': f'text {i}', 'json': {'i': i}}
    for i in range(30)
  ]
  with writer.TarWriter(str(tmp_path / 'x.tar'), encoder=True) as tar:
    for sample in written:
      tar.write(sample)
  samples, skipped = _read(tmp_path / 'x.tar')
  assert skipped == [] and [key for key, _ in samples] == [sample['__key__'] for sample in written]
  for (_, members), sample in zip(samples, written, strict=True):
    assert members['jpg'] == sample['jpg'] and members['txt'].decode() == sample['txt']
    assert json.loads(members['json']) == sample['json']
