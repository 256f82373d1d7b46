import io
import os
import tarfile

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.data import array_record, formats, listing, sources, table
from clip_jax.data.reader import Source


def _image(i, kind):
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(i).integers(0, 256, (4 + i, 9, 3), np.uint8)).save(
    out, kind
  )
  return out.getvalue()


SAMPLES = [
  {
    'key': f'k{i}',
    'image': _image(i, ('JPEG', 'PNG', 'WEBP')[i % 3]),
    'txt': f'ä {i}',
    'label': i % 2,
  }
  for i in range(7)
]
KINDS = ['jpeg', 'png', 'webp', 'jpeg', 'png', 'webp', 'jpeg']


def _webdataset(folder):
  with tarfile.open(folder / 'x.tar', 'w') as tar:
    for sample in SAMPLES:
      for ending, data in (
        ('jpg', sample['image']),
        ('txt', sample['txt'].encode()),
        ('json', b'{"label": %d}' % sample['label']),
      ):
        info = tarfile.TarInfo(f'{sample["key"]}.{ending}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return folder


def _parquet(folder):
  columns = {name: [sample[name] for sample in SAMPLES] for name in ('key', 'txt', 'label')}
  images = pa.array(
    [{'bytes': sample['image'], 'path': None} for sample in SAMPLES],
    pa.struct([('bytes', pa.binary()), ('path', pa.string())]),
  )
  pq.write_table(pa.table({**columns, 'image': images}), folder / 'x.parquet', row_group_size=3)
  return folder


def _folder(folder):
  for sample in SAMPLES:
    (folder / str(sample['label'])).mkdir(exist_ok=True)
    (folder / str(sample['label']) / f'{sample["key"]}.jpg').write_bytes(sample['image'])
    (folder / str(sample['label']) / f'{sample["key"]}.txt').write_text(sample['txt'])
  return folder


def _array_record(folder):
  writer = array_record_module.ArrayRecordWriter(
    str(folder / 'x.array_record'), array_record.OPTIONS
  )
  for sample in SAMPLES:
    writer.write(array_record.example(sample))
  writer.close()
  return folder


def _tfds(folder):
  import tensorflow_datasets as tfds

  features = {
    'key': tfds.features.Text(),
    'image': tfds.features.Image(),
    'txt': tfds.features.Text(),
    'label': tfds.features.ClassLabel(num_classes=2),
  }

  class FormatsOfOne(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i, sample in enumerate(SAMPLES):
        yield i, {**sample, 'image': io.BytesIO(sample['image'])}

  builder = FormatsOfOne(data_dir=folder, file_format='array_record')
  builder.download_and_prepare()
  return f'{builder.data_path}/train'


MAKERS = {
  'webdataset': _webdataset,
  'parquet': _parquet,
  'folder': _folder,
  'array_record': _array_record,
  'tfds': _tfds,
}


@pytest.mark.parametrize('format', [name for name, form in formats.FORMATS.items() if form.samples])
def test_every_format_gives_the_same_dataset(tmp_path, format):
  path = str(MAKERS[format](tmp_path))
  files = listing.list_files(format, path)
  root = listing.root(format, path)
  rules = {} if format == 'folder' else {'label_key': 'label'}
  (tmp_path / 'index').mkdir()
  scan = sources.scan(format, files, root=root, **rules)
  assert scan.skipped == [] and scan.left_out == 0
  table.write_shard(str(tmp_path / 'index'), 0, scan)
  table.assemble(
    str(tmp_path / 'index'),
    [
      {
        'format': format,
        'root': root,
        'path': '' if root else files[0].path,
        'image_key': 'jpg;image',
      }
    ],
  )
  source = Source(str(tmp_path / 'index'))
  order = sorted(
    range(7), key=lambda row: source.caption(row)
  )  # TFDS shuffles, folders sort by class
  assert (
    [source[row] for row in order]
    == source.read_samples(order)
    == [
      {'image': sample['image'], 'caption': sample['txt'], 'label': sample['label']}
      for sample in SAMPLES
    ]
  )
  assert [scan.records[row].type for row in order] == KINDS
  assert [(scan.records[row].width, scan.records[row].height) for row in order] == [
    (9, 4 + i) for i in range(7)
  ]
  if format != 'folder':
    assert [scan.records[row].key for row in order] == [sample['key'] for sample in SAMPLES]


def test_an_unknown_format_is_an_error_that_names_the_nearest():
  with pytest.raises(ConfigError, match="Did you mean 'parquet'"):
    formats.by_name('parkett')


def test_the_formats_of_one_file_a_shard_find_their_files_in_a_folder(tmp_path):
  for name in (
    '2.tar',
    '10.tar',
    '2.parquet',
    '10.parquet',
    'c.txt',
    'a.array_record',
    'b.array_record-00000-of-00002',
  ):
    (tmp_path / name).write_bytes(b'')
  names = lambda format: [
    os.path.basename(file.path) for file in listing.list_files(format, str(tmp_path))
  ]
  assert names('webdataset') == ['2.tar', '10.tar'] and names('parquet') == [
    '2.parquet',
    '10.parquet',
  ]
  assert names('array_record') == ['a.array_record', 'b.array_record-00000-of-00002']
