import datetime
import decimal
import json
import os
import random
import subprocess
import sys

import damaged
import fsspec
import indexed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import parquet, sources
from clip_jax.data.storage import SourceFile

IMAGE_KEY = ('jpg', 'jpeg', 'png', 'webp', 'image')


def _images(n, most=200, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.bytes(int(size)) for size in rng.integers(1, most, n)]


def _write(path, columns, **how):
  pq.write_table(pa.table(columns), path, **how)
  return _source(path)


def _source(path):
  return SourceFile(str(path), os.path.basename(path), os.path.getsize(path), 0.0)


def _read(file, image_key=IMAGE_KEY, sample_key=('key', 'uid'), columns=()):
  """Returns the samples, all read while they come, and what was skipped."""
  samples, skipped = parquet.samples(file, image_key, sample_key, columns)
  return [
    (
      sample.key,
      dict(sample.members),
      sample.fields,
      [sample.read(ending, 1 << 30) for ending in sample.members],
    )
    for sample in samples
  ], skipped


def test_files_of_img2dataset(tmp_path):
  images = _images(5)
  images[3] = None  # a failed download
  file = _write(
    tmp_path / '00000.parquet',
    {
      'url': ['http://x'] * 5,
      'caption': list('abcde'),
      'key': [f'{i:09d}' for i in range(5)],
      'status': ['success'] * 3 + ['failed_to_download', 'success'],
      'width': pa.array([7] * 5, pa.int32()),
      'json': [json.dumps({'similarity': i}) for i in range(5)],
      'jpg': pa.array(images, pa.binary()),
    },
  )
  found, skipped = _read(file, columns=('caption', 'width', 'json', 'none'))
  assert skipped == [] and [key for key, *_ in found] == [f'{i:09d}' for i in range(5)]
  assert [members for _, members, *_ in found] == [
    {} if image is None else {'jpg': (row, len(image))} for row, image in enumerate(images)
  ]
  assert found[4][2] == {
    'key': '000000004',
    'caption': 'e',
    'width': 7,
    'json': '{"similarity": 4}',
  }
  assert [read for *_, read in found] == [[image] if image else [] for image in images]
  reader = parquet.Reader(file.path, ';'.join(IMAGE_KEY))
  assert [
    reader.read_many([(row, len(image))])[0] for row, image in enumerate(images) if image
  ] == [image for image in images if image]


@pytest.mark.parametrize(
  ('kind', 'struct'),
  [
    (pa.binary(), False),
    (pa.large_binary(), False),
    (pa.binary_view(), False),
    (pa.dictionary(pa.int32(), pa.binary()), False),
    (pa.opaque(pa.binary(), 'image', 'someone'), False),
    (pa.binary(), True),
    (pa.large_binary(), True),
  ],
)
def test_every_way_to_store_bytes_is_read(tmp_path, kind, struct):
  images = [*_images(7), *_images(7)]
  array = pa.array(images, getattr(kind, 'storage_type', kind))
  array = pa.ExtensionArray.from_storage(kind, array) if hasattr(kind, 'storage_type') else array
  if struct:
    array = pa.StructArray.from_arrays([pa.array(['p'] * 14), array], ['path', 'bytes'])
  file = _write(tmp_path / 'x.parquet', {'Image': array}, row_group_size=5)
  found, skipped = _read(file)
  assert skipped == [] and [read for *_, read in found] == [[image] for image in images]
  assert [key for key, *_ in found][::13] == ['x/000000000', 'x/000000013']
  reader = parquet.Reader(file.path, 'jpg;image')
  ranges = [(row, len(images[row])) for row in (13, 0, 5, 4, 5)]
  assert reader.read_many(ranges) == [images[row] for row, _ in ranges]


def test_a_path_in_place_of_the_bytes_is_listed_and_never_opened(tmp_path):
  secret = tmp_path / 'secret.jpg'
  secret.write_bytes(b'secret')
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  rows = [
    {'bytes': b'image', 'path': None},
    {'bytes': None, 'path': str(secret)},
    None,
    {'bytes': None, 'path': None},
  ]
  file = _write(tmp_path / 'x.parquet', {'image': pa.array(rows, kind), 'uid': list('abcd')})
  found, skipped = _read(file)
  assert skipped == [{'key': 'b', 'reason': 'image is not in the file'}]
  assert [(key, members) for key, members, *_ in found] == [
    ('a', {'image': (0, 5)}),
    ('c', {}),
    ('d', {}),
  ]
  with pytest.raises(InputError):
    parquet.Reader(str(tmp_path / 'x.parquet'), 'image').read_many([(1, 6)])[0]


def test_the_first_name_that_holds_images_counts(tmp_path):
  columns = {
    'image': ['a/b.jpg'],
    'png': pa.array([b'1'], pa.binary()),
    'jpg': pa.array([b'22'], pa.binary()),
  }
  file = _write(tmp_path / 'x.parquet', columns)
  for names, ending in {'jpg;png': 'jpg', 'image;png;jpg': 'png'}.items():
    assert list(_read(file, names.split(';'))[0][0][1]) == [ending]
    assert (
      len(parquet.Reader(file.path, names.replace(';', '; ')).values([0])[0])
      == {'jpg': 2, 'png': 1}[ending]
    )
  for read in (lambda: _read(file, ['image', 'webp']), lambda: parquet.Reader(file.path, 'image')):
    with pytest.raises(
      InputError, match=r'x.parquet has no column of image bytes.*image \(string\), png'
    ):
      read()


def test_columns_of_one_name_are_an_error(tmp_path):
  image, text = pa.array([b'1'], pa.binary()), pa.array(['a'])
  for columns, name in (([image, image, text], 'jpg'), ([image, text, text], 'text')):
    names = ['jpg', 'jpg', 'text'] if name == 'jpg' else ['jpg', 'text', 'text']
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / 'x.parquet')
    with pytest.raises(InputError, match=f'x.parquet has two columns named {name}'):
      _read(_source(tmp_path / 'x.parquet'), columns=('text',))


def test_names_match_without_case_where_only_one_does(tmp_path):
  columns = {
    'Image': _images(2),
    'TEXT': ['a', 'b'],
    'KEY': ['k0', 'k1'],
    'url': ['lower', 'lower'],
    'URL': ['upper', 'upper'],
    'Name': ['x', 'x'],
    'NAME': ['y', 'y'],
  }
  file = _write(tmp_path / 'x.parquet', columns)
  samples, skipped = _read(file, columns=('text', 'url', 'URL', 'name', 'image', 'Text'))
  assert [key for key, *_ in samples] == ['k0', 'k1'] and skipped == []
  assert samples[1][2] == {'key': 'k1', 'text': 'b', 'url': 'lower', 'URL': 'upper', 'Text': 'b'}
  scan = sources.scan('parquet', file, columns=('url',), where={'text': 'b'})
  assert [(r.key, r.caption, r.columns) for r in scan.records] == [('k1', 'b', {'url': 'lower'})]


def test_captions_of_bytes_are_decoded_and_counted(tmp_path):
  texts = ['é'.encode('utf-16'), b'\x92', b'\xef\xbb\xbfgood', b'caf\xe9', bytes(2)]
  file = _write(tmp_path / 'x.parquet', {'jpg': _images(5), 'txt': texts})
  scan = sources.scan('parquet', file)
  assert [record.caption for record in scan.records] == ['é', 'good', 'caf\ufffd']
  assert scan.noted == {'caption not UTF-8': 1}
  assert [entry['reason'] for entry in scan.skipped] == ['caption not UTF-8'] * 2


def test_names_of_columns_may_have_dots(tmp_path):
  bytes_ = lambda *images: pa.array(images, pa.binary())
  file = _write(
    tmp_path / 'x.parquet',
    {
      'image.bytes': bytes_(b'1'),
      'image': pa.array([{'bytes': b'22', 'path': 'x'}]),
      'a.b': bytes_(b'333'),
    },
  )
  for name, image in (('image', b'22'), ('image.bytes', b'1'), ('a.b', b'333')):
    assert [read for *_, read in _read(file, [name])[0]] == [[image]]
    assert parquet.Reader(file.path, name).read_many([(0, len(image))])[0] == image


def test_what_a_column_says_can_be_written_as_json(tmp_path):
  values = {
    'int': 2**62,
    'float': 0.5,
    'bool': True,
    'list': [1, None],
    'struct': {'a': [b'\xff'], 'b': None},
    'date': datetime.datetime(2020, 1, 2),
    'decimal': decimal.Decimal('1.5'),
    'none': None,
  }
  columns = {name: pa.array([value]) for name, value in values.items()}
  columns['bytes'] = pa.array([b'caf\xe9'], pa.binary())
  columns['text'] = pa.Array.from_buffers(pa.string(), 1, columns['bytes'].buffers())
  columns['words'] = pa.array(['word'], pa.string()).dictionary_encode()
  columns['late'] = pa.array([2**62], pa.timestamp('us'))  # a year that Python has not
  file = _write(tmp_path / 'x.parquet', {'jpg': pa.array([b'1'], pa.binary()), **columns})
  ((_, _, fields, _),) = _read(file, columns=tuple(columns))[0]
  json.dumps(fields)
  assert fields['int'] == 2**62 and fields['bool'] is True and fields['list'] == [1, None]
  assert (
    fields['struct'] == {'a': ['\ufffd'], 'b': None} and fields['date'] == '2020-01-02 00:00:00'
  )
  assert fields['decimal'] == '1.5' and fields['text'] == fields['bytes'] == 'caf\ufffd'
  assert fields['words'] == 'word' and fields['none'] is None


def test_keys_are_what_the_file_says_else_the_row(tmp_path):
  images = pa.array([b'1'] * 4, pa.binary())
  keys = lambda **columns: [
    key for key, *_ in _read(_write(tmp_path / 'x.parquet', {'jpg': images, **columns}))[0]
  ]
  assert keys(uid=list('abca'), key=[1, 2, None, 2]) == ['1', '2', 'x/000000002', '2']
  assert keys(uid=list('abca')) == list('abca')
  assert keys() == [f'x/{i:09d}' for i in range(4)]


def _small(monkeypatch, batch=500, cached=2000):
  monkeypatch.setattr(parquet, '_BATCH', batch)
  monkeypatch.setattr(parquet, '_decoded', parquet._LRUCache(cached))


def test_rows_are_read_in_any_order_from_many_threads(tmp_path, monkeypatch):
  _small(monkeypatch)
  images = _images(300)
  file = _write(tmp_path / 'x.parquet', {'jpg': pa.array(images, pa.binary())}, row_group_size=70)
  reader, wrong = parquet.Reader(file.path, 'jpg'), []
  assert min(reader._file.steps) < 10  # so that a row group is many batches

  def read(seed):
    draw = random.Random(seed)
    for _ in range(25):
      rows = [draw.randrange(300) for _ in range(draw.randrange(1, 8))]
      if reader.read_many([(row, len(images[row])) for row in rows]) != [
        images[row] for row in rows
      ]:
        wrong.append(rows)

  indexed.in_threads(read, 4)
  assert not wrong and parquet._decoded._size <= 2000
  assert parquet._decoded._size == sum(
    batch.nbytes for batch, _ in parquet._decoded._entries.values()
  )
  assert len(parquet._streams._entries) == parquet._streams._size <= parquet._STREAMS


def test_a_call_decodes_each_row_group_once_and_rows_in_order_go_on(tmp_path, monkeypatch):
  _small(monkeypatch)
  images = _images(300)
  file = _write(tmp_path / 'x.parquet', {'jpg': pa.array(images, pa.binary())}, row_group_size=100)
  started = []
  batches = parquet._File.batches
  monkeypatch.setattr(
    parquet._File,
    'batches',
    lambda self, group, columns: (started.append(group), batches(self, group, columns))[1],
  )
  reader = parquet.Reader(file.path, 'jpg')
  rows = random.Random(0).sample(range(300), 90)
  reader.read_many([(row, len(images[row])) for row in rows])
  assert sorted(started) == [0, 1, 2]
  started.clear()
  reader = parquet.Reader(file.path, 'jpg')
  assert [reader.read_many([(row, len(image))])[0] for row, image in enumerate(images)] == images
  assert started == [0, 1, 2]


def test_one_large_row_group_is_not_held_whole(tmp_path):
  images = [os.urandom(100_000) for _ in range(400)]
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  file = _write(
    tmp_path / 'x.parquet',
    {'image': pa.array([{'bytes': image} for image in images], kind)},
    write_batch_size=4,
  )  # a page is decoded whole, and ends when a batch is written
  before = pa.total_allocated_bytes()
  most = 0
  for sample in parquet.samples(file, ('image',), (), ())[0]:
    most = max(most, pa.total_allocated_bytes() - before)
  assert sample.members == {'image': (399, 100_000)} and most < 20_000_000
  del sample
  reader = parquet.Reader(file.path, 'image')
  assert reader.read_many([(20, 100_000)])[0] == images[20]
  assert pa.total_allocated_bytes() - before < 20_000_000


def test_class_names_of_hugging_face_are_found(tmp_path):
  table = pa.table({'image': pa.array([b'1'], pa.binary()), 'label': [0]})
  said = {
    'info': {'features': {'label': {'names': ['cat', 'dog'], '_type': 'ClassLabel'}, 'x': {}}}
  }
  for text, key, names in (
    (json.dumps(said), 'label', ('cat', 'dog')),
    (json.dumps(said), 'x', ()),
    (json.dumps(said), 'none', ()),
    ('[1', 'label', ()),
    ('[1]', 'label', ()),
    ('{"info": 3}', 'label', ()),
    ('[' * 100_000, 'label', ()),
  ):
    pq.write_table(table.replace_schema_metadata({'huggingface': text}), tmp_path / 'x.parquet')
    assert parquet.classes(str(tmp_path / 'x.parquet'), key) == names
  (tmp_path / 'bad.parquet').write_bytes(b'PAR1')
  assert parquet.classes(str(tmp_path / 'bad.parquet'), 'label') == ()


def test_every_cut_is_listed(tmp_path):
  path = tmp_path / 'x.parquet'
  _write(path, {'jpg': pa.array(_images(20), pa.binary())})
  data = path.read_bytes()
  for cut in [0, 1, 3, 4, 8, 11, 12, *range(100, len(data), 101), len(data) - 1]:
    path.write_bytes(data[:cut])
    assert _read(_source(path)) == ([], [{'key': 'x.parquet', 'reason': 'not a parquet file'}])
    with pytest.raises(InputError, match='x.parquet is damaged'):
      parquet.Reader(str(path), 'jpg')
  with pytest.raises(FileNotFoundError):
    parquet.Reader(str(tmp_path / 'none.parquet'), 'jpg')


def test_a_file_without_rows_is_listed(tmp_path):
  file = _write(tmp_path / 'x.parquet', {'jpg': pa.array([], pa.binary())})
  assert _read(file) == ([], [{'key': 'x.parquet', 'reason': 'no samples'}])


def test_a_damaged_row_group_is_listed_and_the_others_count(tmp_path):
  path, images = tmp_path / 'x.parquet', _images(30)
  _write(path, {'jpg': pa.array(images, pa.binary())}, row_group_size=10, use_dictionary=False)
  at = pq.read_metadata(path).row_group(1).column(0).data_page_offset
  data = bytearray(path.read_bytes())
  data[at : at + 40] = b'\xff' * 40
  path.write_bytes(data)
  found, skipped = _read(_source(path))
  assert [members['jpg'][0] for _, members, *_ in found] == [*range(10), *range(20, 30)]
  assert skipped == [{'key': 'x.parquet, row 10', 'reason': 'damaged row group'}]
  reader = parquet.Reader(str(path), 'jpg')
  assert reader.read_many([(25, len(images[25]))])[0] == images[25]
  with pytest.raises(InputError, match='damaged, or is not the file'):
    reader.read_many([(15, len(images[15]))])[0]


def test_another_file_in_its_place_is_noticed(tmp_path):
  path = tmp_path / 'x.parquet'
  _write(path, {'jpg': pa.array([b'1', None], pa.binary())})
  reader = parquet.Reader(str(path), 'jpg')
  for row, length in ((0, 2), (1, 1), (2, 1), (-1, 1), (1 << 60, 1)):
    with pytest.raises(InputError, match='index again with --redo=ingest'):
      reader.read_many([(row, length)])[0]


def test_remote_files_are_read_in_place():
  images = _images(50)
  with fsspec.open('memory://pool/x.parquet', 'wb') as f:
    pq.write_table(pa.table({'jpg': pa.array(images, pa.binary())}), f, row_group_size=20)
  file = SourceFile('memory://pool/x.parquet', 'x.parquet', 1, 0.0)
  assert [read for *_, read in _read(file)[0]] == [[image] for image in images]
  reader = parquet.Reader(file.path, 'jpg')
  assert [reader.read_many([(row, len(images[row]))])[0] for row in (49, 3, 20)] == [
    images[row] for row in (49, 3, 20)
  ]


@pytest.mark.parametrize(
  'how',
  [
    dict(row_group_size=10, use_dictionary=False),
    dict(compression='zstd'),
    dict(
      compression='none', write_page_index=True, write_page_checksum=True, data_page_version='2.0'
    ),
  ],
)
def test_damage_anywhere_is_never_fatal(tmp_path, how):
  """In a process of its own: pyarrow, which is C++, could end it."""
  images = _images(24)
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  columns = {
    'image': pa.array([{'bytes': images[i % 5], 'path': 'p'} for i in range(24)], kind),
    'jpg': pa.array(images, pa.binary()),
    'text': pa.array(['a', 'b'] * 12).dictionary_encode(),
    'when': pa.array(range(24), pa.timestamp('us')),
    'list': [[1, 2]] * 24,
  }
  _write(tmp_path / 'x.parquet', columns, **how)
  done = subprocess.run(
    [sys.executable, damaged.__file__, 'parquet', str(tmp_path / 'x.parquet'), '300'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 30  # files of which something was read none the less
