"""Copies of samples: byte for byte against tarfile, read by webdataset and by ourselves, and
hostile tars.
"""

import io
import json
import os
import resource
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.data import (
  array_record,
  listing,
  reader,
  shard_writer,
  sources,
  storage,
  table,
  webdataset,
)


def picture(i: int, kind: str = 'PNG') -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)).save(out, kind)
  return out.getvalue()


def add(tar, name: str, data: bytes, **more) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for key, value in more.items():
    setattr(info, key, value)
  tar.addfile(info, io.BytesIO(data))


def index(folder, format: str, path, **more) -> str:
  """Indexes a dataset as ingest does; returns its folder."""
  root, found = listing.root(format, str(path)), listing.list_files(format, str(path))
  groups = [found] if format == 'folder' else [[file] for file in found]
  for i, group in enumerate(groups):
    scan = sources.scan(format, group, root=root, caption_key='txt', **more)
    table.write_shard(str(folder), i, scan)
  table.assemble(
    str(folder),
    [
      {
        'format': format,
        'root': root,
        'path': '' if format == 'folder' else group[0].path,
        'image_key': 'jpg;png;webp',
      }
      for group in groups
    ],
  )
  return str(folder)


def raw_members(path) -> dict[str, bytes]:
  """Returns the blocks of every regular member by name, headers first, as tarfile finds them."""
  found, data = {}, open(path, 'rb').read()
  with tarfile.open(path) as tar:
    for info in tar:
      if info.isreg():
        end = info.offset_data + -(-info.size // 512) * 512
        found.setdefault(info.name, data[info.offset : end])
  return found


def odd_tar(path) -> None:
  """Writes a tar as they come: members apart, long names, extended headers, strangers between."""
  long = 'deep/' * 30 + 'x' * 120
  with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
    add(tar, 'readme', b'no sample' * 200)
    add(tar, 'a.png', picture(0))
    add(tar, 'b.png', picture(1))
    add(tar, 'b.txt', b'second')
    add(tar, '.hidden.txt', b'x')
    add(tar, 'd', b'', type=tarfile.DIRTYPE)
    add(tar, 'link.txt', b'', type=tarfile.SYMTYPE, linkname='l' * 200)
    add(tar, 'a.TXT', b'first')
    add(tar, 'b.txt', b'again')
    add(tar, 'a.seg.png', picture(9))
    add(tar, f'{long}.png', picture(2))
    add(tar, f'{long}.txt', b'long')
    add(tar, 'e.txt', b'')  # no bytes at all, and no caption
    add(tar, 'e.png', picture(4))
  with tarfile.open(path, 'a', format=tarfile.PAX_FORMAT) as tar:
    tar.pax_headers = {'comment': 'about all'}
    add(tar, 'p.png', picture(5), mtime=1.25, pax_headers={'path': 'p.png', 'big': 'y' * 3000})
    add(tar, 'p.txt', b'extended', mtime=2.5, uname='ü')
    add(tar, 'q.txt', b'last')
    add(tar, 'q.png', picture(6))


@pytest.fixture
def odd(tmp_path):
  odd_tar(tmp_path / 'odd.tar')
  return index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar', require_caption=False)


def keys_of(path) -> list[str]:
  found, skipped = webdataset.samples(str(path), 'x')
  assert not skipped
  return [sample.key for sample in found]


@pytest.mark.parametrize('rows', [[0, 1, 2, 3, 4, 5], [1], [0, 2, 4], [5], [3]])
def test_members_are_copied_with_their_headers(odd, tmp_path, rows):
  out = tmp_path / 'out.tar'
  counts = shard_writer.write_tar(str(out), odd, np.array(rows))
  names = [
    ['a.png', 'a.TXT', 'a.seg.png'],
    ['b.png', 'b.txt'],
    [name for name in raw_members(tmp_path / 'odd.tar') if name.startswith('deep')],
    ['e.txt', 'e.png'],
    ['p.png', 'p.txt'],
    ['q.txt', 'q.png'],
  ]
  source, copied = raw_members(tmp_path / 'odd.tar'), raw_members(out)
  expected = [name for row in rows for name in names[row]]
  assert copied == {name: source[name] for name in expected} and list(copied) == expected
  assert out.read_bytes() == b''.join(copied.values()) + bytes(1024)
  assert counts == {
    'samples': len(rows),
    'members': len(expected),
    'copied': len(rows),
    'bytes': out.stat().st_size,
    'renamed': 0,
    'refused': [],
    'sha256': files.sha256(out),
  }


def test_the_copy_is_read_by_webdataset_and_by_ourselves_alike(odd, tmp_path):
  import webdataset as wds

  rows = np.arange(6)
  os.mkdir(tmp_path / 'copy')
  shard_writer.write_tar(str(tmp_path / 'copy/00000.tar'), odd, rows)
  theirs = list(wds.WebDataset(f'file:{tmp_path}/copy/00000.tar', shardshuffle=False))
  source = reader.Source(odd)
  assert [sample['png'] for sample in theirs] == [source[row]['image'] for row in rows]
  again = reader.Source(
    index(tmp_path / 'again', 'webdataset', tmp_path / 'copy/*.tar', require_caption=False)
  )
  assert [again[row] for row in rows] == [source[row] for row in rows]
  assert (again.column('key') == source.column('key')).all()


def test_a_repeated_row_and_a_key_of_two_tars_are_named_anew(tmp_path):
  for name, caption in (('0', b'one'), ('1', b'two')):
    with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
      for key in ('k', 'k-2', 'only' + name):
        add(tar, f'{key}.png', picture(len(key) + int(name)))
        add(tar, f'{key}.txt', caption + key.encode())
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar')
  rows = np.array([0, 0, 1, 2, 3, 5])
  os.mkdir(tmp_path / 'out')
  counts = shard_writer.write_tar(str(tmp_path / 'out/0.tar'), folder, rows)
  assert keys_of(tmp_path / 'out/0.tar') == ['k', 'k-2', 'k-2-2', 'only0', 'k-3', 'only1']
  assert counts['renamed'] == 3 and counts['copied'] == 3
  source, again = (
    reader.Source(folder),
    reader.Source(index(tmp_path / 'again', 'webdataset', tmp_path / 'out/*.tar')),
  )
  assert [again[i] for i in range(6)] == [source[row] for row in rows]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_rows_of_any_tar_come_back_as_they_were(tmp_path_factory, data):
  """Members in any order, of any size, with headers of every kind, strangers among them; rows with
  repeats.
  """
  folder = tmp_path_factory.mktemp('any')
  keys = [f'{"d/" * (i % 3)}k{i}' + 'x' * (97 * (i % 4 == 3)) for i in range(6)]
  wanted = [(key, ending) for key in keys for ending in ('png', 'txt', 'cls')] + [
    ('', f'{i}') for i in range(3)
  ]
  with tarfile.open(folder / 'a.tar', 'w') as tar:
    for key, ending in data.draw(st.permutations(wanted)):
      tar.format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
      size = data.draw(st.sampled_from([0, 1, 511, 512, 513, 70_000]))
      content = picture(size) + bytes(size) if ending == 'png' else b'z' * size
      add(
        tar,
        f'{key}.{ending}' if key else f'stranger{ending}',
        content,
        mtime=data.draw(st.sampled_from([0, 7, 1.5])),
      )
  source_folder = index(folder / 'index', 'webdataset', folder / 'a.tar', require_caption=False)
  source, original = reader.Source(source_folder), raw_members(folder / 'a.tar')
  rows = np.array(sorted(data.draw(st.lists(st.integers(0, 5), max_size=8))), np.int64)
  os.mkdir(folder / 'out')
  counts = shard_writer.write_tar(str(folder / 'out/a.tar'), source_folder, rows)
  copied = raw_members(folder / 'out/a.tar')
  assert counts['samples'] == len(rows) and counts['copied'] == len(set(rows.tolist()))
  for key in source.column('key')[np.unique(rows)]:
    for ending in ('png', 'txt', 'cls'):
      assert copied[f'{key}.{ending}'] == original[f'{key}.{ending}']
  assert len(copied) == counts['members'] == 3 * len(rows)
  if len(rows):
    again = reader.Source(
      index(folder / 'again', 'webdataset', folder / 'out/a.tar', require_caption=False)
    )
    assert [again[i] for i in range(len(again))] == [source[row] for row in rows]


def test_a_remote_tar_is_copied_alike(tmp_path, odd):
  import fsspec

  fsspec.filesystem('memory').pipe('/there/odd.tar', (tmp_path / 'odd.tar').read_bytes())
  far = index(tmp_path / 'far', 'webdataset', 'memory://there/odd.tar', require_caption=False)
  for name, folder in (('near', odd), ('far', far)):
    shard_writer.write_tar(str(tmp_path / f'{name}.copy'), folder, np.array([0, 2, 2, 4]))
  assert (tmp_path / 'near.copy').read_bytes() == (tmp_path / 'far.copy').read_bytes()


def test_a_remote_tar_is_read_once_to_find_and_once_to_copy(tmp_path, monkeypatch):
  import fsspec

  forged(tmp_path / 'a.tar', *'abcde')
  fsspec.filesystem('memory').pipe('/plain/a.tar', (tmp_path / 'a.tar').read_bytes())
  folder = index(tmp_path / 'index', 'webdataset', 'memory://plain/a.tar')
  real, lengths = storage.read_ranges, []
  monkeypatch.setattr(
    storage,
    'read_ranges',
    lambda ranges: (lengths.extend(length for *_, length in ranges), real(ranges))[1],
  )
  shard_writer.write_tar(str(tmp_path / 'out.tar'), folder, np.arange(5))
  assert sum(lengths) <= 2 * os.path.getsize(tmp_path / 'a.tar')


@pytest.mark.parametrize('format', ['webdataset', 'parquet'])
def test_rows_of_more_files_than_may_be_open(tmp_path, monkeypatch, format):
  monkeypatch.setattr(reader, '_OPEN_FILES', 8)
  for i in range(40):
    if format == 'webdataset':
      forged(tmp_path / f'{i}.tar', 'k')
    else:
      pq.write_table(
        pa.table({'jpg': [picture(i)], 'txt': ['text'], 'key': ['k']}), tmp_path / f'{i}.parquet'
      )
  folder = index(tmp_path / 'index', format, tmp_path / '*.*')
  opened = len(os.listdir('/proc/self/fd'))
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
  try:
    counts = shard_writer.write_tar(str(tmp_path / 'out/0.tar'), folder, np.arange(40))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert counts['samples'] == 40 and counts['renamed'] == 39


@pytest.mark.parametrize('rows', [[0, 1], [1, 1]])
def test_a_tar_that_was_cut_in_the_zeros_behind_a_sample(tmp_path, rows):
  forged(tmp_path / 'a.tar', 'a', 'b')
  (tmp_path / 'a.tar').write_bytes((tmp_path / 'a.tar').read_bytes()[: 7 * 512 + 20])
  forged(tmp_path / 'b.tar', 'c')
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar')
  counts = shard_writer.write_tar(str(tmp_path / 'out/0.tar'), folder, np.array([*rows, 2]))
  source, again = (
    reader.Source(folder),
    reader.Source(index(tmp_path / 'again', 'webdataset', tmp_path / 'out/0.tar')),
  )
  assert [again[i] for i in range(3)] == [source[row] for row in (*rows, 2)]
  assert counts['members'] == 6


def test_names_that_no_file_can_have(tmp_path):
  forged(tmp_path / 'a.tar', 'a', 'k' * 5000)
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / 'a.tar')
  counts = shard_writer.write_tar(str(tmp_path / 'out/0.tar'), folder, np.array([0, 1]))
  assert [entry['reason'] for entry in counts['refused']] == ['its name is too long']
  assert counts['samples'] == 1 and len(shard_writer._safe_key('k' * 5000)) == 1024


def forged(path, *names: str, **more) -> None:
  with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
    for name in names:
      add(tar, f'{name}.png', picture(1), **more)
      add(tar, f'{name}.txt', b'text')


def test_names_that_lead_out_of_the_folder_are_left_out_and_listed(tmp_path):
  bad = ('../x', '/etc/x', 'a/../../x', 'C:\\x', '\\x', 'x' * 150 + '/../../y')
  forged(tmp_path / 'a.tar', 'ok', *bad, 'dots..in/a')
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar')
  keys = reader.Source(folder).column('key').tolist()
  counts = shard_writer.write_tar(str(tmp_path / 'out/a.tar'), folder, np.arange(len(keys)))
  assert keys_of(tmp_path / 'out/a.tar') == ['ok', 'dots..in/a']
  assert {entry['key'] for entry in counts['refused']} == set(keys) - {'ok', 'dots..in/a'}
  assert len(keys) == 2 + len(bad) and counts['samples'] == 2
  assert all(entry['reason'] == 'its name leads out of the folder' for entry in counts['refused'])


def test_headers_that_give_a_member_two_names_are_left_out(tmp_path):
  """An unpacker may believe the other name."""
  data = picture(0)

  def member(name, prefix=b'', kind=b'0', data=data, magic=b'ustar\x0000'):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    block[257:265], block[345 : 345 + len(prefix)] = magic, prefix
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)

  pax = lambda text: b'%d path=%s\n' % (len(text) + 9, text)
  assert len(pax(b'ok2.png')) == 16
  parts = [
    member('ok.png'),
    member('gnu.png', b'../../evil', magic=b'ustar  \0'),
    member('L', kind=b'L', data=b'../evil.png\0')
    + member('x', kind=b'x', data=pax(b'ok2.png'))
    + member('pax.png'),
    member('x', kind=b'x', data=pax(b'ok3.png')) + member('../../evil.png'),
    member('x', kind=b'x', data=b'11 mtime=7\n')
    + member('L', kind=b'L', data=b'../evil.png\0')
    + member('L', kind=b'L', data=b'ok4.png\0')
    + member('x.png'),
    member('x', kind=b'x', data=b'11 mtime=7\n')
    + member('g', kind=b'g', data=pax(b'ok9.png'))
    + member('ok5.png'),
    member('x', kind=b'x', data=b'11 mtime=7\n')
    + member('g', kind=b'g', data=b'15 size=BINARY\n')
    + member('ok7.png'),
    member('g', kind=b'g', data=pax(b'ok9.png')) + member('ok6.png'),
  ]
  (tmp_path / 'a.tar').write_bytes(b''.join(parts) + bytes(1024))
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar', require_caption=False)
  assert reader.Source(folder).column('key').tolist() == [
    'ok',
    'gnu',
    'ok2',
    'ok3',
    'ok4',
    'ok5',
    'ok7',
    'ok6',
  ]
  counts = shard_writer.write_tar(str(tmp_path / 'out/a.tar'), folder, np.arange(8))
  with tarfile.open(tmp_path / 'out/a.tar') as tar:
    assert tar.getnames() == [
      'ok.png',
      'ok3.png',
      'ok6.png',
    ]  # what counts for all members is not copied
  assert [entry['key'] for entry in counts['refused']] == ['gnu', 'ok2', 'ok4', 'ok5', 'ok7']


@pytest.fixture
def images(tmp_path):
  """A folder of images, indexed: keys with slashes, dots and spaces; three types."""
  for i, (name, kind) in enumerate(
    (
      ('cat/a b.jpg', 'JPEG'),
      ('cat/a.b.png', 'PNG'),
      ('dog/über.webp', 'WEBP'),
      ('dog/a_b.jpg', 'JPEG'),
    )
  ):
    path = tmp_path / 'images' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(i, kind))
    path.with_suffix('.txt').write_text(f'caption {i}')
  return index(tmp_path / 'index', 'folder', tmp_path / 'images')


def test_other_sources_become_tars(images, tmp_path):
  import webdataset as wds

  rows = np.array([0, 0, 1, 2, 3])
  out = tmp_path / 'out/0.tar'
  counts = shard_writer.write_tar(str(out), images, rows)
  source = reader.Source(images)
  theirs = list(wds.WebDataset(f'file:{out}', shardshuffle=False))
  assert len({sample['__key__'] for sample in theirs}) == 5 == counts['samples']
  endings = []
  for row, sample in zip(rows, theirs, strict=True):
    (ending,) = {'jpg', 'png', 'webp'} & sample.keys()
    endings.append(ending)
    about = json.loads(sample['json'])
    assert (
      sample[ending] == source[row]['image'] and sample['txt'].decode() == source[row]['caption']
    )
    assert about == {'key': source.column('key')[row], 'label': source[row]['label']}
  assert sorted(endings) == ['jpg', 'jpg', 'jpg', 'png', 'webp'] and counts['copied'] == 0
  again = reader.Source(
    index(tmp_path / 'again', 'webdataset', tmp_path / 'out/*.tar', label_key='label')
  )
  assert [again[i] for i in range(5)] == [source[row] for row in rows]


@pytest.mark.parametrize(
  'key, safe',
  [
    ('../../x', '_/_/x'),
    ('/etc/x', 'etc/x'),
    ('a.b/c.jpg', 'a_b/c_jpg'),
    ('..', '_'),
    ('a\0b\n', 'a_b_'),
    ('C:\\x', 'C_x'),
    ('', ''),
    ('//', ''),
    ('ü/é', 'ü/é'),
    ('.hidden', '_hidden'),
  ],
)
def test_keys_of_other_sources_are_made_safe(key, safe):
  assert shard_writer._safe_key(key) == safe


def test_array_records_are_read_by_their_own_library(images, odd, tmp_path):
  from array_record.python import array_record_module

  for folder, rows in ((images, [0, 1, 1, 2, 3]), (odd, [1, 2, 3])):
    out = tmp_path / f'{len(rows)}.array_record'
    source = reader.Source(folder)
    counts = shard_writer.write_array_record(str(out), folder, np.array(rows))
    records = array_record_module.ArrayRecordReader(str(out)).read_all()
    keys = [source.column('key')[row] for row in rows]
    keys = [f'{key}-2' if key in keys[:i] else key for i, key in enumerate(keys)]
    assert records == [
      array_record.example(
        {
          'key': key,
          {'JPEG': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}[
            Image.open(io.BytesIO(image)).format
          ]: image,
          'txt': caption,
          **({'label': label} if label >= 0 else {}),
        }
      )
      for key, row in zip(keys, rows)
      for image, label, caption in [source[row].values()]
    ]
    assert counts['samples'] == len(rows) and counts['renamed'] == len(rows) - len(set(rows))


def test_a_full_disk_under_an_array_record_is_a_sentence(images, tmp_path, monkeypatch):
  from array_record.python import array_record_module

  class Full(array_record_module.ArrayRecordWriter):
    def close(self):
      super().close()
      raise RuntimeError('write() failed: No space left on device; writing x; at byte 65536')

  monkeypatch.setattr(array_record_module, 'ArrayRecordWriter', Full)
  with pytest.raises(InputError, match='No space left while writing'):
    shard_writer.write_array_record(str(tmp_path / 'out/x'), images, np.arange(4))
  assert not os.listdir(tmp_path / 'out')


@pytest.mark.parametrize(
  'write, check',
  [
    (shard_writer.write_tar, '_check_tar'),
    (shard_writer.write_array_record, '_check_array_record'),
  ],
)
def test_a_file_that_differs_when_read_back_does_not_stay(
  images, tmp_path, monkeypatch, write, check
):
  real, out = getattr(shard_writer, check), tmp_path / 'out'

  def spoiled(temporary, *more):
    data = bytearray(open(temporary, 'rb').read())
    at = data.index(b'caption 2')
    data[at] ^= 1
    open(temporary, 'wb').write(data)
    return real(temporary, *more)

  monkeypatch.setattr(shard_writer, check, spoiled)
  with pytest.raises(InputError, match='differs from the source|damaged'):
    write(str(out / 'x'), images, np.arange(4))
  assert not os.listdir(out)


def test_a_copy_in_which_other_samples_are_found_does_not_stay(odd, tmp_path, monkeypatch):
  real = webdataset.samples_and_headers
  monkeypatch.setattr(
    webdataset, 'samples_and_headers', lambda *given: (*real(*given)[:2], {})
  )  # lost long names
  with pytest.raises(InputError, match="sample 'deep/.*' differs"):
    shard_writer.write_tar(str(tmp_path / 'out/x'), odd, np.arange(3))
  assert not os.listdir(tmp_path / 'out')


def test_a_source_that_is_another_file_now_is_a_sentence(odd, tmp_path):
  with tarfile.open(tmp_path / 'odd.tar', 'w') as tar:
    add(tar, 'other.png', picture(3) * 9)
  with pytest.raises(InputError, match='no sample at byte .*--redo=ingest'):
    shard_writer.write_tar(str(tmp_path / 'out/a.tar'), odd, np.arange(2))
  assert not (tmp_path / 'out').exists() or not os.listdir(tmp_path / 'out')


def test_every_sample_refused_is_an_empty_tar(tmp_path):
  forged(tmp_path / 'a.tar', '../x')
  folder = index(tmp_path / 'index', 'webdataset', tmp_path / '*.tar')
  counts = shard_writer.write_tar(str(tmp_path / 'out/a.tar'), folder, np.arange(1))
  assert counts['samples'] == 0 and tarfile.open(tmp_path / 'out/a.tar').getnames() == []


def test_image_bytes(odd):
  source = reader.Source(odd)
  rows = np.array([0, 2, 2])
  assert shard_writer.image_bytes(odd, rows) == sum(len(source[row]['image']) for row in rows)
