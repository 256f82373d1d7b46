"""experiment/shards.py: the source files of a dataset as shards, and the stamps by which they
count.
"""

import os
import shutil

import numpy as np
import pytest
from squares import CLASSES, sample, write_tar

from clip_jax import defaults
from clip_jax.core.errors import InputError
from clip_jax.experiment.shards import list_shards, printable


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('shards')
  for number in (2, 10):
    write_tar(folder / f'tars/{number}.tar', {f'{number}': sample(number, 0)})
  for name in ('red', 'blue'):
    for i in range(2):
      (folder / 'images' / name).mkdir(parents=True, exist_ok=True)
      (folder / f'images/{name}/{i}.png').write_bytes(sample(i, 0)['png'])
  (folder / 'vectors/metadata').mkdir(parents=True)
  np.save(folder / 'vectors/img_emb_0.npy', np.eye(3, dtype=np.float32))
  return folder


def block(path, format='webdataset', **more):
  return defaults.dataset(format=format, path=str(path), **more)


def test_a_tar_is_a_shard_in_natural_order(data):
  shards = list_shards(block(data / 'tars/*.tar', label_key='label', classes=CLASSES))
  assert [(shard.number, shard.name, shard.classes) for shard in shards] == [
    (0, '2.tar', CLASSES),
    (1, '10.tar', CLASSES),
  ]
  assert shards[1].location() == {
    'format': 'webdataset',
    'root': shards[1].root,
    'path': str(data / 'tars/10.tar'),
    'image_key': shards[1].block.image_key,
  }
  with pytest.raises(InputError, match='nothing.* matches no file'):
    list_shards(block(data / 'nothing/*.tar'))


def test_shards_of_a_concat_are_numbered_through_and_keep_their_source(data):
  whole = defaults.dataset(format='concat')
  whole.sources = dict(b=block(data / 'tars'), a=block(data / 'images', 'folder'))
  shards = list_shards(whole)
  assert [(shard.number, shard.name, shard.format) for shard in shards] == [
    (0, 'a/./', 'folder'),
    (1, 'b/2.tar', 'webdataset'),
    (2, 'b/10.tar', 'webdataset'),
  ]
  assert len(shards[0].files) == 4 and shards[0].classes == ('blue', 'red') and shards[0].labels
  assert [list(shard.stamps(False)) for shard in shards[1:]] == [
    ['source file b/2.tar'],
    ['source file b/10.tar'],
  ]


def test_stamps_name_no_path_of_this_machine(data, tmp_path):
  shutil.copytree(data, tmp_path / 'copy')
  for path, format in (('tars', 'webdataset'), ('images', 'folder')):
    one, other = (
      list_shards(block(folder / path, format))[0].stamps(False)
      for folder in (data, tmp_path / 'copy')
    )
    assert one == other and str(data) not in str(one)
  os.utime(tmp_path / 'copy/tars/2.tar', (0, 0))
  os.utime(tmp_path / 'copy/images/red/0.png', (0, 0))
  for path, format in (('tars', 'webdataset'), ('images', 'folder')):
    for check_content in (False, True):
      one, other = (
        list_shards(block(folder / path, format))[0].stamps(check_content)
        for folder in (data, tmp_path / 'copy')
      )
      assert (one == other) == check_content  # the content is the same, the time is not


def test_classes_of_folders_count_where_they_move_others(data, tmp_path):
  shutil.copytree(data / 'images', tmp_path / 'images')
  stamps = lambda: list_shards(block(tmp_path / 'images', 'folder'))[0].labels
  before = stamps()
  (tmp_path / 'images/zebra').mkdir()
  (tmp_path / 'images/zebra/0.png').write_bytes(b'x')
  behind = list_shards(block(tmp_path / 'images', 'folder'))[0].stamps(False)
  (tmp_path / 'images/aal').mkdir()
  (tmp_path / 'images/aal/0.png').write_bytes(b'x')
  assert stamps() != before and 'labels of images' in behind


def test_drawn_tars_are_listed_before_they_are_drawn():
  (shard,) = list_shards(defaults.dataset(format='glyphs', path='anchor'))
  assert shard.files[0].path == 'ingest/glyphs/anchor-00000.tar' and shard.format == 'webdataset'
  assert shard.with_absolute_paths('/w').files[0].path == '/w/ingest/glyphs/anchor-00000.tar'
  planted = list_shards(defaults.dataset(format='planted'), ['ingest/planted/tars/00000.tar'])
  assert planted[0].location()['path'] == '../planted/tars/00000.tar'  # of ingest/<dataset>


def test_files_are_where_they_are_and_not_in_the_work_directory(data):
  shard = list_shards(block(data / 'tars'))[0]
  assert shard.with_absolute_paths('/w') is shard


def test_vectors_have_what_describes_them_beside_them(data):
  (shard,) = list_shards(block(data / 'vectors', 'embeddings'))
  assert shard.name == 'img_emb_0.npy' and shard.location()['images'] == '' and not shard.beside
  assert list(shard.stamps(False)) == ['source file img_emb_0.npy']


def test_names_that_are_no_text_can_be_written_down():
  assert printable(os.fsdecode(b'a\xff')) == 'a\\udcff' and printable('é') == 'é'
