import os
import random
import subprocess
import sys

from array_record.python import array_record_module
import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
import indexed
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import array_record
from clip_jax.data.storage import SourceFile

IMAGE_KEY = ('jpg', 'jpeg', 'png', 'webp', 'image')


def _write(path, records, options=array_record.OPTIONS):
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()
  return _source(path)


def _source(path):
  return SourceFile(str(path), os.path.basename(path), os.path.getsize(path), 0.0)


def _read(file, image_key=IMAGE_KEY, sample_key=('key', 'uid'), columns=()):
  samples, skipped = array_record.samples(file, image_key, sample_key, columns)
  return [
    (
      sample.key,
      dict(sample.members),
      dict(sample.fields),
      [sample.read(ending, 1 << 30) for ending in sample.members],
    )
    for sample in samples
  ], skipped


_FEATURES = st.dictionaries(
  st.text(max_size=5),
  st.one_of(
    st.binary(max_size=20),
    st.text(max_size=20),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
  ),
  max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(features=_FEATURES)
def test_an_example_is_what_tfds_takes_it_for(features):
  from tensorflow_datasets.proto import tf_example_pb2

  record = array_record.example(features)
  theirs = tf_example_pb2.Example.FromString(record).features.feature
  found = {
    name: list(getattr(feature, feature.WhichOneof('kind')).value)
    for name, feature in theirs.items()
  }
  assert found == {
    name: [value.encode() if isinstance(value, str) else value] for name, value in features.items()
  }
  assert record == array_record.example(dict(reversed(features.items())))
  expected = {
    name: value.decode('utf-8', 'replace') if isinstance(value, bytes) else value
    for name, value in features.items()
  }
  ours = array_record._parsed(record)
  assert {name: array_record._value(feature) for name, feature in ours.items()} == expected


def test_records_are_samples(tmp_path):
  file = _write(
    tmp_path / 'a.array_record',
    map(
      array_record.example,
      [
        {'key': 'k0', 'jpg': b'123', 'txt': 'a cät', 'label': 3, 'score': 0.5},
        {'png': b'4567', 'txt': b'\xff', 'other': b'x' * 100},
        {'txt': 'no image'},
      ],
    ),
  )
  found, skipped = _read(file, columns=('txt', 'label', 'score'))
  assert skipped == []
  assert found == [
    ('k0', {'jpg': (0, 3)}, {'txt': 'a cät', 'label': 3, 'score': 0.5}, [b'123']),
    ('a/000000001', {'png': (1, 4)}, {'txt': '\ufffd'}, [b'4567']),
    ('a/000000002', {}, {'txt': 'no image'}, []),
  ]
  reader = array_record.reader(file.path, ';'.join(IMAGE_KEY))
  assert reader.read_many([(1, 4), (0, 3), (1, 4)]) == [b'4567', b'123', b'4567']
  for row, length in ((0, 4), (2, 1), (3, 1), (-1, 4), (1 << 40, 1)):
    with pytest.raises(InputError, match='--redo=ingest'):
      reader.read_many([(row, length)])[0]


def test_texts_are_decoded_by_their_byte_order_mark(tmp_path):
  texts = ['é'.encode('utf-16'), b'\xef\xbb\xbfgood', b'caf\xe9']
  records = [array_record.example({'image': b'x', 'txt': text}) for text in texts]
  samples, _ = _read(_write(tmp_path / 'x.array_record', records), columns=('txt',))
  assert [fields['txt'] for _, _, fields, _ in samples] == ['é', 'good', 'caf\ufffd']


def test_several_values_are_a_list_and_several_images_no_image(tmp_path):
  message = array_record._example_type()()
  for name, values in {
    'jpg': [b'1', b'2'],
    'image': [b'3'],
    'tags': [b'a', b'b'],
    'none': [],
  }.items():
    message.features.feature[name].bytes_list.value.extend(values)
  message.features.feature['ids'].int64_list.value.extend([1, 2])
  file = _write(tmp_path / 'x.array_record', [message.SerializeToString()])
  ((_, members, fields, images),) = _read(file, columns=('tags', 'ids', 'none'))[0]
  assert members == {'image': (0, 1)} and images == [b'3']
  assert fields == {'tags': ['a', 'b'], 'ids': [1, 2], 'none': None}
  assert array_record.reader(file.path, 'jpg;image').read_many([(0, 1)])[0] == b'3'


def test_records_of_another_kind_are_listed(tmp_path):
  good = array_record.example({'jpg': b'1'})
  bad = [b'', b'text', b'\x08\x01', good, b'\x0a\xff\xff\xff\xff\x0f', good[:-1]]
  file = _write(tmp_path / 'x.array_record', bad)
  found, skipped = _read(file)
  assert [members for _, members, *_ in found] == [{'jpg': (3, 1)}]
  assert skipped == [
    {'key': f'x/{row:09d}', 'reason': 'not a tf.train.Example'} for row in (0, 1, 2, 4, 5)
  ]


@pytest.mark.parametrize('data', [b'', b'text', bytes(100_000), b'\xff' * 70_000])
def test_files_of_another_kind_are_listed(tmp_path, data):
  (tmp_path / 'x.array_record').write_bytes(data)
  file = _source(tmp_path / 'x.array_record')
  assert _read(file) == ([], [{'key': 'x.array_record', 'reason': 'not an ArrayRecord file'}])
  with pytest.raises(InputError, match='x.array_record is damaged'):
    array_record.reader(file.path, 'jpg')


def test_files_that_are_not_there_or_not_here_are_errors(tmp_path):
  with pytest.raises(FileNotFoundError):
    array_record.reader(str(tmp_path / 'none.array_record'), 'jpg')
  with pytest.raises(AssertionError, match='gs://'):  # and does not wait for the bucket
    array_record.reader('gs://bucket/x.array_record', 'jpg')
  assert _read(_write(tmp_path / 'x.array_record', [])) == (
    [],
    [{'key': 'x.array_record', 'reason': 'no samples'}],
  )


@pytest.mark.parametrize('options', [array_record.OPTIONS, 'group_size:32'])
def test_many_threads_read_the_same_bytes(tmp_path, options, monkeypatch):
  monkeypatch.setattr(array_record, '_BATCH', 1000)
  rng = np.random.default_rng(0)
  images = [rng.bytes(int(size)) for size in rng.integers(1, 500, 300)]
  file = _write(
    tmp_path / 'x.array_record', (array_record.example({'jpg': image}) for image in images), options
  )
  assert [read for *_, read in _read(file)[0]] == [[image] for image in images]
  reader, wrong = array_record.reader(file.path, 'jpg'), []

  def read(seed):
    draw = random.Random(seed)
    for _ in range(30):
      rows = [draw.randrange(300) for _ in range(draw.randrange(1, 20))]
      if reader.read_many([(row, len(images[row])) for row in rows]) != [
        images[row] for row in rows
      ]:
        wrong.append(rows)

  indexed.in_threads(read, 4)
  assert not wrong


def test_a_damaged_record_is_listed_and_the_others_count(tmp_path):
  path = tmp_path / 'x.array_record'
  images = [bytes([i]) * 3000 + os.urandom(3000) for i in range(20)]
  file = _write(path, (array_record.example({'jpg': image}) for image in images))
  data = bytearray(path.read_bytes())
  at = data.index(images[7][3000:])
  data[at] ^= 1
  path.write_bytes(data)
  found, skipped = _read(file)
  assert [members['jpg'][0] for _, members, *_ in found] == [i for i in range(20) if i != 7]
  assert skipped == [{'key': 'x/000000007', 'reason': 'damaged record'}]
  reader = array_record.reader(str(path), 'jpg')
  assert reader.read_many([(8, 6000)])[0] == images[8]
  with pytest.raises(InputError, match='is damaged'):
    reader.read_many([(7, 6000)])[0]


@pytest.mark.parametrize('options', [array_record.OPTIONS, 'group_size:8'])
def test_damage_anywhere_is_never_fatal(tmp_path, options):
  """In a process of its own: the reader, which is C++, could end it."""
  rng = np.random.default_rng(0)
  _write(
    tmp_path / 'x.array_record',
    (
      array_record.example({'jpg': rng.bytes(100), 'key': str(i), 'text': 'x', 'label': i})
      for i in range(24)
    ),
    options,
  )
  done = subprocess.run(
    [sys.executable, damaged.__file__, 'array_record', str(tmp_path / 'x.array_record'), '400'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 40  # files of which something was read none the less
