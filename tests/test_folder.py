import contextlib
import io
import json
import os
import subprocess

import fsspec
import numpy as np
from PIL import Image
import pyarrow.parquet as pq
import pytest
import web

from clip_jax import defaults
from clip_jax.core import objects
from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder, listing, reader, sources, storage, table
from clip_jax.experiment import shards
from clip_jax.stages import ingest


def _image(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  out = io.BytesIO()
  Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(out, 'PNG')
  path.write_bytes(out.getvalue())


def _scan(root, **rules):
  files = listing.list_files('folder', str(root))
  return sources.scan('folder', files, root=listing.root('folder', str(root)), **rules)


def test_every_image_is_a_sample_in_natural_order(tmp_path):
  for name in ('dog/10.png', 'dog/9.PNG', 'cat/sub/1.jpeg', 'dog/a.t', '.no/1.png', 'cat/._1.png'):
    _image(tmp_path / name)
  scan = _scan(tmp_path, caption_template='a {}')
  assert [r.key for r in scan.records] == ['cat/sub/1.jpeg', 'dog/9.PNG', 'dog/10.png']
  assert [r.caption for r in scan.records] == ['a cat', 'a dog', 'a dog']
  assert all((r.offset, r.width, r.height) == (0, 6, 4) for r in scan.records)
  assert all(r.length == os.path.getsize(tmp_path / r.path) for r in scan.records)


def test_files_beside_an_image_belong_to_it(tmp_path):
  _image(tmp_path / '00000' / '000000001.png')
  (tmp_path / '00000' / '000000001.txt').write_text('a caption')
  (tmp_path / '00000' / '000000001.json').write_text(json.dumps({'domain': 'web', 'label': 3}))
  _image(tmp_path / '00000' / '000000002.png')
  scan = _scan(tmp_path, label_key='label', columns=('domain', 'folder'))
  assert scan.skipped == [{'key': '00000/000000002.png', 'reason': 'no caption'}]
  (record,) = scan.records
  assert (record.caption, record.label) == ('a caption', 3)
  assert record.columns == {'domain': 'web', 'folder': '00000'}
  assert len(_scan(tmp_path, where={'domain': 'web'}).records) == 1


def test_files_beside_an_image_have_the_endings_and_the_case_of_tars(tmp_path):
  endings = ('caption', 'TXT', 'text', 'txt', 'Txt', 'JSON', 'CAPTION')
  for ending in endings:
    _image(tmp_path / f'{ending}_.1.png')
    text = '{"caption": "words"}' if ending == 'JSON' else 'words'
    (tmp_path / f'{ending}_.1.{ending}').write_text(text)
  scan = _scan(tmp_path)
  assert scan.skipped == [] and len(scan.records) == len(endings)
  assert {record.caption for record in scan.records} == {'words'}
  scan = _scan(tmp_path, caption_key='Caption')
  found = sorted(record.key.partition('_')[0] for record in scan.records)
  assert found == ['CAPTION', 'caption']  # fields of a json keep their case


def test_of_two_files_that_differ_in_case_the_lower_case_one_counts(tmp_path):
  _image(tmp_path / 'a.png')
  for name in ('a.TXT', 'a.txt', 'a.Txt', 'A.txt'):
    (tmp_path / name).write_text(name)
  (tmp_path / 'a.Domain').write_text('web')
  (record,) = _scan(tmp_path, columns=('domain',)).records
  assert record.caption == 'a.txt' and record.columns == {'domain': 'web'}


@pytest.mark.parametrize('ending', ['cls', 'CLS'])
def test_a_number_in_cls_beside_an_image_is_an_index(tmp_path, ending):
  _image(tmp_path / 'a.png')
  (tmp_path / f'a.{ending}').write_text('0')
  scan = _scan(tmp_path, label_key='cls', classes=('1', '0'), require_caption=False)
  assert [record.label for record in scan.records] == [0] and len(scan.noted) == 1


def test_folders_of_shards_are_no_classes_where_the_label_key_is_none(tmp_path):
  for shard in ('00000', '00001', '00003'):
    _image(tmp_path / shard / '1.png')
    (tmp_path / shard / '1.txt').write_text('a caption')
    (tmp_path / shard / '1.json').write_text('[]')
  assert [record.label for record in _scan(tmp_path).records] == [0, 1, 3]
  scan = _scan(tmp_path, label_key='none')
  assert [record.label for record in scan.records] == [-1] * 3 and scan.skipped == []


def test_links_to_a_folder_above_end_and_names_that_are_no_text_are_listed(tmp_path):
  _image(tmp_path / 'a' / '1.png')
  os.symlink(tmp_path, tmp_path / 'a' / 'loop')
  os.symlink('self', tmp_path / 'a' / 'self')
  os.symlink(tmp_path / 'a' / '1.png', tmp_path / 'a' / '2.png')
  odd = os.fsencode(tmp_path / 'a') + b'/\xff.png'
  os.link(tmp_path / 'a' / '1.png', odd)
  os.mkdir(os.fsencode(tmp_path) + b'/\xfe')
  os.link(tmp_path / 'a' / '1.png', os.fsencode(tmp_path) + b'/\xfe/1.png')
  scan = _scan(tmp_path, require_caption=False)
  assert [r.path for r in scan.records] == ['a/1.png', 'a/2.png']
  assert [r.label for r in scan.records] == [0, 0]
  assert sorted(entry['key'] for entry in scan.skipped) == ['\\xfe/1.png', 'a/\\xff.png']
  assert {entry['reason'] for entry in scan.skipped} == {'name is not UTF-8'}


def test_what_is_no_file_is_no_image_and_a_broken_link_is_listed(tmp_path):
  _image(tmp_path / 'a' / '1.png')
  os.mkfifo(tmp_path / 'a' / 'pipe.png')  # opening it would wait for ever
  _image(tmp_path / 'a' / 'folder.png' / '2.png')
  os.symlink('nowhere.png', tmp_path / 'a' / 'broken.png')
  os.symlink('self.png', tmp_path / 'a' / 'self.png')
  names = ['a/1.png', 'a/broken.png', 'a/folder.png/2.png', 'a/self.png']
  assert sorted(folder.paths(str(tmp_path))) == names
  found, skipped = folder.samples(str(tmp_path), filetree.source_files(str(tmp_path), names))
  assert [sample.key for sample in found] == ['a/1.png', 'a/folder.png/2.png']
  assert skipped == [
    {'key': f'a/{name}.png', 'reason': 'file cannot be read'} for name in ('broken', 'self')
  ]


def test_folders_in_one_another_without_end_and_odd_names(tmp_path):
  here = os.open(tmp_path, os.O_RDONLY)
  deep = [here]
  for _ in range(1100):  # deeper than Python may recurse
    os.mkdir('d', dir_fd=deep[-1])
    deep.append(os.open('d', os.O_RDONLY, dir_fd=deep.pop()))
  os.close(os.open('1.png', os.O_CREAT, dir_fd=deep[-1]))
  os.close(deep[-1])
  _image(tmp_path / 'new\nline' / '2\n.PNG')
  assert set(folder.paths(str(tmp_path))) == {'d/' * 1100 + '1.png', 'new\nline/2\n.PNG'}
  assert folder.class_folders(str(tmp_path)) == ('d', 'new\nline')
  subprocess.run(['rm', '-rf', tmp_path / 'd'], check=True)  # pytest's own removal recurses


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
  _image(tmp_path / 'a' / '1.png')
  scandir = os.scandir

  def forbidden(path):
    if os.path.basename(path) == 'a':
      raise PermissionError(13, 'Permission denied')
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', forbidden)
  with pytest.raises(InputError, match="/a' cannot be listed .Permission denied"):
    folder.find(str(tmp_path))


def test_class_folders_hold_an_image(tmp_path):
  for name in ('b/x/1.png', 'a/1.JPG', '.c/1.png', 'd/.1.png', 'e/1.txt', 'top.png'):
    _image(tmp_path / name)
  (tmp_path / 'empty').mkdir()
  assert folder.class_folders(str(tmp_path)) == ('a', 'b')
  assert [folder.class_folder(name) for name in ('b/x/1.png', 'top.png', 'images/a/1.png')] == [
    'b',
    '',
    'images',
  ]
  assert folder.class_folder('images/a/1.png', 'images/') == 'a'
  assert (
    folder.class_folder('other/a/1.png', 'images/')
    == ''
    == folder.class_folder('images/1.png', 'images/')
  )
  with pytest.raises(InputError, match='is not a folder'):
    folder.find(str(tmp_path / 'nowhere'))
  with pytest.raises(InputError, match='holds no file that ends in'):
    folder.find(str(tmp_path / 'empty'))


def _pool(top):
  """Writes a folder with every peculiarity that a storage can have, too."""
  for i, name in enumerate(('n2/10.png', 'n2/9.PNG', 'n1/sub/1 a#.png', 'n1/.no/1.png', 'top.png')):
    _image(top / name, 10 * i)
  (top / 'n2' / '9.TXT').write_text('nine')
  (top / 'n2' / '10.txt').write_text('ten' * 9000)  # more than the first bytes
  (top / 'n2' / '10.json').write_text('{"domain": "web"}')
  (top / 'n1' / 'sub' / '1 a#.txt').write_text('one')
  (top / 'top.txt').write_text('top')
  (top / 'n3').mkdir()
  (top / 'n3' / 'note.txt').write_text('no image')


def _objectnet(top):
  for name in ('alarm_clock/1.png', 'alarm_clock/2.png', 't-shirt/1.png', 'bench/1.png'):
    _image(top / 'images' / name)
  (top / 'mappings').mkdir()
  folders = {'alarm_clock': 'Alarm clock', 't-shirt': 'T-shirt', 'bench': 'Bench'}
  (top / 'mappings' / 'folder_to_objectnet_label.json').write_text(json.dumps(folders))
  chosen = {'T-shirt': 'jersey', 'Alarm clock': 'clock'}
  (top / 'mappings' / 'objectnet_to_imagenet_1k.json').write_text(json.dumps(chosen))


def _val(top):
  for i in range(12):
    _image(top / f'val_{i}.png')
  (top / 'labels.tsv').write_text(''.join(f'val_{i}.png\tn{i % 3}\n' for i in range(12)))
  (top / 'captions.csv').write_text(''.join(f'val_{i}.png,words {i}\n' for i in range(11)))


_FOLDERS = {  # name -> function that writes it, folder of the images, keys of the block
  'class folders': (_pool, '', dict(columns=('domain', 'folder'))),
  'ObjectNet': (_objectnet, '', dict(caption_template='{}')),
  'images of ObjectNet': (_objectnet, 'images', dict(caption_template='{}')),
  'labels_file': (_val, '', dict(labels_file='labels.tsv', caption_template='a {}')),
  'retrieval': (
    _val,
    '',
    dict(task='retrieval', captions='captions.csv', label_key='none'),
  ),
}


@pytest.fixture(name='remote', params=['memory', 'web', pytest.param('s3', marks=pytest.mark.slow)])
def _remote(request, monkeypatch, tmp_path):
  """Returns a function that serves a local folder, and returns its URL."""
  with contextlib.ExitStack() as stack:
    system = fsspec.filesystem('memory')
    if request.param == 'web':
      url = stack.enter_context(web.serve(tmp_path))[0]
      yield lambda folder: f'{url}/{folder.relative_to(tmp_path)}'
      return
    url = 'memory://folders'
    if request.param == 's3':
      moto = pytest.importorskip('moto.server')
      server = moto.ThreadedMotoServer(port=0)
      server.start()
      stack.callback(server.stop)
      host, port = server.get_host_and_port()
      monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
      for key in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
        monkeypatch.setenv(key, 'key')
      fsspec.get_filesystem_class('s3').clear_instance_cache()
      objects._store.cache_clear()  # each server has another port
      storage._file_system.cache_clear()
      stack.callback(storage._file_system.cache_clear)
      system, url = fsspec.filesystem('s3'), 's3://folders'
      system.mkdir(url)

    def upload(folder):
      for path in folder.rglob('*'):
        if path.is_file():
          system.pipe(f'{url}/{path.relative_to(folder.parent)}', path.read_bytes())
      return f'{url}/{folder.name}'

    stack.callback(lambda: system.rm(url, recursive=True))
    yield upload


@pytest.mark.parametrize('name', _FOLDERS)
def test_a_remote_folder_has_the_rows_of_the_local_one(name, remote, tmp_path, monkeypatch):
  write, inside, keys = _FOLDERS[name]
  monkeypatch.setattr(folder, '_BATCH', 2)
  top = tmp_path / 'data'
  write(top)
  found = []
  for where, root in (('local', str(top)), ('remote', remote(top))):
    block = defaults.benchmark(
      format='folder',
      path=filetree.join(root, inside),
      **{
        key: filetree.join(root, value) if key in ('labels_file', 'captions') else value
        for key, value in keys.items()
      },
    )
    listed = shards.list_shards(block)
    index = tmp_path / where
    for shard in listed:
      ingest.scan_shard((str(index), shard, name == 'class folders'))
    table.assemble(str(index), [s.location() for s in listed], [s.classes for s in listed])
    source = reader.Source(str(index))
    found.append(
      {
        'table': (index / 'table.npy').read_bytes(),
        'captions': (index / 'captions.bin').read_bytes(),
        'index': pq.read_table(index / 'index-00000.parquet').to_pylist(),
        'skipped': (index / 'skipped-00000.json').read_text(),
        'paths': (index / 'paths.bin').read_bytes(),
        'images': [sample['image'] for sample in source.read_samples(range(len(source)))],
        'classes': source.classes,
        'labels': [(shard.labels, shard.labels_by) for shard in listed],
        'stamps': [list(shard.stamps(False)) for shard in listed],
        'content': [shard.stamps(True) for shard in listed],
      }
    )
  assert found[0]['images'] and found[0] == found[1]


def test_a_remote_folder_is_read_in_few_requests_and_its_changes_are_seen(tmp_path, monkeypatch):
  for i in range(30):
    _image(tmp_path / f'c{i % 3}' / f'{i}.png', i)
  with web.serve(tmp_path) as (url, server):
    before = listing.list_files('folder', url)
    assert len(server.asked) == 4  # sizes are asked for with HEAD
    server.asked.clear()
    scan = sources.scan('folder', before, root=url, require_caption=False, caption_template='')
    assert [record.label for record in scan.records] == [int(r.path[1]) for r in scan.records]
    images = [path for path, _ in server.asked if path.endswith('.png')]
    assert len(images) == len(set(images)) == 30
    _image(tmp_path / 'c1' / '1.png', 99)
    after = listing.list_files('folder', f'{url}/')
    changed = [new.name for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ['c1/1.png']


def test_a_remote_folder_without_images_is_an_error(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'x.txt').write_text('x')
  with web.serve(tmp_path) as (url, _):
    with pytest.raises(InputError, match='holds no file that ends in'):
      listing.list_files('folder', f'{url}/a')
    with pytest.raises(InputError, match='none. is not a folder'):
      listing.list_files('folder', f'{url}/none')
