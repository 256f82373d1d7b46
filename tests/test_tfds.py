import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds_library

from clip_jax.core.errors import InputError
from clip_jax.data import listing, tfds

IMAGE_KEY = ('jpg', 'image')
COLUMNS = ('text', 'label', 'score', 'tags', 'nested/b')


def _png(i):
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(i).integers(0, 256, (4 + i % 3, 5, 3), np.uint8)).save(
    out, 'PNG'
  )
  return out.getvalue()


class NoiseSplits(tfds_library.core.GeneratorBasedBuilder):
  """Two splits of noise."""

  VERSION = tfds_library.core.Version('1.0.0')

  def _info(self):
    features = tfds_library.features
    return tfds_library.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          'image': features.Image(shape=(None, None, 3)),
          'text': features.Text(),
          'label': features.ClassLabel(names=['cat', 'dog']),
          'score': np.float32,
          'tags': features.Sequence(features.Text()),
          'nested': {'a': np.int64, 'b': features.Text()},
          'number': features.ClassLabel(num_classes=3),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 30), 'val': self._generate_examples(100, 7)}

  def _generate_examples(self, start, count):
    for i in range(start, start + count):
      yield (
        i,
        {
          'image': io.BytesIO(_png(i)),
          'text': f'é {i}',
          'label': i % 2,
          'score': i / 2,
          'number': 1,
          'tags': ['a', 'b', 'c'][: i % 4],
          'nested': {'a': i, 'b': 'x'},
        },
      )


def write_noise(folder, kind):
  """Prepares the dataset in a file format and returns the folder DIR/NAME/VERSION."""
  builder = NoiseSplits(data_dir=folder, file_format=kind)
  builder.download_and_prepare(
    download_config=tfds_library.download.DownloadConfig(
      num_shards=3 if kind == 'array_record' else None
    )
  )
  return str(builder.data_path)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Returns file format -> the folder DIR/NAME/VERSION; array_record in three files."""
  kinds = ('array_record', 'parquet')
  return {kind: write_noise(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.fixture
def copy(prepared, tmp_path):
  return shutil.copytree(prepared['array_record'], tmp_path / 'noise/1.0.0')


def _read(path, image_key=IMAGE_KEY, columns=COLUMNS):
  found, skipped = [], []
  for file in listing.list_files('tfds', str(path)):
    samples, left = tfds.samples(file, image_key, ('key',), columns)
    found += [
      (
        file,
        sample.key,
        dict(sample.members),
        dict(sample.fields),
        [sample.read(ending, 1 << 30) for ending in sample.members],
      )
      for sample in samples
    ]
    skipped += left
  return found, skipped


@pytest.mark.parametrize('kind', ['array_record', 'parquet'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_samples_are_those_of_tfds_own_data_source(prepared, kind, split):
  found, skipped = _read(os.path.join(prepared[kind], split))
  theirs = tfds_library.builder_from_directory(prepared[kind]).as_data_source(
    split, decoders={'image': tfds_library.decode.SkipDecoding()}
  )
  assert skipped == [] and len(found) == len(theirs) == {'train': 30, 'val': 7}[split]
  for (file, key, members, fields, images), their in zip(found, theirs, strict=True):
    assert images == [their['image']] and list(members) == ['image']
    tags = [tag.decode() for tag in their['tags']]
    assert fields == {
      'text': their['text'].decode(),
      'label': their['label'],
      'score': their['score'],
      'nested/b': 'x',
      'tags': tags if len(tags) > 1 else tags[0] if tags else None,
    }
    ((row, length),) = members.values()
    assert key.startswith(f'noise_splits-{split}-') and key.endswith(f'/{row:09d}')
    assert tfds.reader(file.path, 'jpg;image').read_many([(row, length)])[0] == their['image']
  assert len({key for _, key, *_ in found}) == len(found)
  assert len({file.path for file, *_ in found}) == (3 if kind == 'array_record' else 1)


def test_the_class_names_are_those_of_the_dataset(prepared):
  train = os.path.join(prepared['array_record'], 'train')
  assert tfds.classes(train, 'label') == ('cat', 'dog')
  assert tfds.classes(train, 'text') == tfds.classes(train, 'none') == ()
  assert tfds.classes(train, 'number') == ('0', '1', '2')


def test_the_only_split_need_not_be_named(copy):
  with pytest.raises(InputError, match='has train, val. Give .*/1.0.0/train'):
    tfds.find(str(copy))
  info = json.loads((copy / 'dataset_info.json').read_text())
  info['splits'] = info['splits'][1:]
  (copy / 'dataset_info.json').write_text(json.dumps(info))
  assert tfds.find(str(copy)) == tfds.find(str(copy / 'val')) and tfds.find(str(copy))[1]


def test_what_is_no_split_is_an_error_that_says_so(copy, tmp_path):
  for path, words in {
    'noise/1.0.0/test': 'which has train, val',
    'noise/1.0.0/train[:5]': 'which has train, val',
    'noise': 'DIR/NAME/VERSION/SPLIT',
    'none/1.0.0/train': 'DIR/NAME/VERSION/SPLIT',
  }.items():
    with pytest.raises(InputError, match=words):
      listing.list_files('tfds', str(tmp_path / path))


@pytest.mark.parametrize('kind', ['tfrecord', 'riegeli'])
def test_files_that_cannot_be_read_at_random_are_an_error(copy, kind):
  info = json.loads((copy / 'dataset_info.json').read_text())
  (copy / 'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': kind}))
  with pytest.raises(InputError, match=f"format {kind}.*file_format='array_record'"):
    tfds.find(str(copy / 'train'))


def test_descriptions_that_are_damaged_are_an_error(copy):
  for name in ('features.json', 'dataset_info.json'):
    text = (copy / name).read_text()
    for damage in (
      '',
      '[]',
      '{',
      text[: len(text) // 2],
      text.replace('tensorflow_datasets', 'none'),
      '{"a": 1}',
    ):
      if damage != text:
        (copy / name).write_text(damage)
        with pytest.raises(InputError):
          tfds.find(str(copy / 'train'))
    (copy / name).write_text(text)
  assert tfds.find(str(copy / 'train'))


def test_code_that_a_dataset_names_is_not_run(copy):
  """tensorflow-datasets imports the module of any class that features.json names."""
  path = copy / 'features.json'
  for evil in (
    {'pythonClassName': 'this.Evil', 'tensor': {}},
    {'type': 'this.Evil', 'content': {}},
  ):
    features = json.loads(path.read_text())
    features['featuresDict']['features']['evil'] = evil
    path.write_text(json.dumps(features).replace('"this.', '"\\u0074his.'))
    with pytest.raises(InputError, match='names this.Evil'):
      tfds.find(str(copy / 'train'))
  assert 'this' not in sys.modules


def test_files_that_are_missing_or_not_whole_are_named(copy):
  folder, names = tfds.find(str(copy / 'train'))
  first, second, third = (os.path.join(folder, name) for name in names)
  os.remove(third)
  with pytest.raises(InputError, match=f'{os.path.basename(third)} is missing'):
    tfds.find(str(copy / 'train'))
  shutil.copy(copy / tfds.find(str(copy / 'val'))[1][0], third)  # fewer records
  with open(first, 'r+b') as f:
    f.truncate(100)
  found, skipped = _read(copy / 'train')
  assert skipped == [
    {'key': os.path.basename(first), 'reason': 'file is damaged'},
    {'key': os.path.basename(third), 'reason': 'not as many records as dataset_info.json says'},
  ]
  assert {file.path for file, *_ in found} == {second, third}
  with pytest.raises(InputError, match='is damaged'):
    tfds.reader(first, 'image')


def test_the_image_must_be_an_image_feature(prepared):
  with pytest.raises(InputError, match='no Image feature is among text, jpg; it has image'):
    _read(os.path.join(prepared['array_record'], 'train'), ('text', 'jpg'))


def test_tensorflow_is_not_imported(prepared):
  code = (
    'import sys\nfrom clip_jax.data import formats, listing, sources\n'
    'assert "tensorflow_datasets" not in sys.modules\n'
    'files = listing.list_files("tfds", sys.argv[1])\n'
    'scan = sources.scan("tfds", files[0], label_key="label")\n'
    'row = scan.records[0]\n'
    'reader = formats.by_name("tfds").open({"path": files[0].path, "image_key": "image"})\n'
    'assert len(reader.read_many([(row.offset, row.length)])[0]) == row.length\n'
    'assert sources.classes("tfds", sys.argv[1], "label") == ("cat", "dog")\n'
    'assert "tensorflow" not in sys.modules'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, os.path.join(prepared['array_record'], 'train')],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
