"""Stage ingest beyond the demo's path: every format in one dataset, labels of folders, the summary,
moves.
"""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from squares import run, sample, write_tar

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.data import array_record, formats, images, reader, summary
from clip_jax.experiment.graph import Graph
from clip_jax.stages import ingest


def _pool(**block):
  c = defaults.get_config()
  c.pool = defaults.dataset(**block)
  return c


def _ingest(c, workdir, capsys):
  status, said = run(c, workdir, capsys, ['ingest'])
  assert status == 0, said
  return said


def _summary(workdir, dataset='pool'):
  return json.loads((workdir / 'ingest' / dataset / 'summary.json').read_text())


def _source(workdir):
  return reader.Source(str(workdir / 'ingest/pool'))


def _files(folder, samples, ending='png'):
  for name, members in samples.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.{ending}').write_bytes(members['png'])
    (folder / f'{name}.txt').write_bytes(members['txt'])


def _parquet(path, samples):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(
    pa.table(
      {
        'key': list(samples),
        'png': [s['png'] for s in samples.values()],
        'caption': [s['txt'].decode() for s in samples.values()],
      }
    ),
    path,
  )


def _array_record(path, samples):
  from array_record.python import array_record_module

  path.parent.mkdir(parents=True, exist_ok=True)
  writer = array_record_module.ArrayRecordWriter(str(path), array_record.OPTIONS)
  for key, s in samples.items():
    writer.write(
      array_record.example({'key': key, 'image': s['png'], 'caption': s['txt'].decode()})
    )
  writer.close()


def _some(start, n=4):
  return {f'{i:05d}': sample(i, i % 3) for i in range(start, start + n)}


def _mixed(data):
  write_tar(data / 'tars/0.tar', _some(0))
  write_tar(data / 'tars/1.tar', _some(4))
  _parquet(data / 'parquet/0.parquet', _some(6))  # two of the keys, and captions, of the tars
  _files(data / 'folder', {f'x/{key}': s for key, s in _some(20).items()})
  _array_record(data / 'records/0.array_record', _some(30))
  c = _pool(format='concat')
  c.pool.sources = dict(
    a=defaults.dataset(format='webdataset', path=f'{data}/tars'),
    b=defaults.dataset(format='parquet', path=f'{data}/parquet', image_key='png'),
    c=defaults.dataset(format='folder', path=f'{data}/folder', label_key='none'),
    d=defaults.dataset(format='array_record', path=f'{data}/records'),
  )
  return c


def test_all_formats_are_one_dataset_which_is_summed_up_and_may_move(tmp_path, capsys):
  workdir = tmp_path / 'w'
  said = _ingest(_mixed(tmp_path / 'data'), workdir, capsys)
  assert '20 samples' in said
  assert '2 samples have the key of an earlier one' in said
  assert "'00006' in a/1.tar and b/0.parquet" in said
  source = _source(workdir)
  expected = [*range(10), *range(20, 24), *range(30, 34)]
  expected[8:8] = [6, 7]
  assert [row['image'] for row in map(source.__getitem__, range(20))] == [
    sample(i, i % 3)['png'] for i in expected
  ]
  found = _summary(workdir)
  assert (found['samples'], found['shards'], found['images']['types']) == (20, 5, {'png': 20})
  assert found['images']['short_side']['max'] == 16 and found['captions']['repeated'] == 17
  assert found['repeated_keys'] == {
    'samples': 2,
    'first': [
      {'key': key, 'samples': 2, 'files': ['a/1.tar', 'b/0.parquet']} for key in ('00006', '00007')
    ],
  }
  (tmp_path / 'data').rename(tmp_path / 'moved')
  del source
  c = _mixed(tmp_path / 'other')  # the same config, of another folder
  shutil.rmtree(tmp_path / 'other')
  (tmp_path / 'moved').rename(tmp_path / 'other')
  before = {
    path: path.read_bytes()
    for path in (workdir / 'ingest').rglob('*')
    if path.name != 'files.json' and path.is_file()
  }
  assert 'nothing was done' in _ingest(c, workdir, capsys)
  assert all(path.read_bytes() == data for path, data in before.items())
  source = _source(workdir)
  assert [source[i]['image'] for i in range(20)] == [sample(i, i % 3)['png'] for i in expected]


def test_what_is_broken_is_listed_with_its_file(tmp_path, capsys, monkeypatch):
  bad = _some(0)
  del bad['00001']['txt']
  bad['00002']['json'] = b'{'
  write_tar(tmp_path / 'data/0.tar', _some(10))
  write_tar(tmp_path / 'data/1.tar', bad)
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  monkeypatch.setattr(ingest, 'RATE_SECS', 0.0)
  said = _ingest(c, tmp_path / 'w', capsys)
  path = tmp_path / 'w/ingest/pool/broken.csv'
  assert f'unusable samples and reasons: {path}' in said and re.search(
    r'8 samples, \d+\.\d kB, scanned in', said
  )
  assert path.read_text().splitlines() == [
    'shard,file,key,reason',
    '1,1.tar,00001,no caption',
    '1,1.tar,00002,bad json',
  ]
  assert _summary(tmp_path / 'w')['reasons'] == {'bad json': 1, 'no caption': 1}
  c.pool.where.label = 7
  c.pool.path = f'{tmp_path}/data/1.tar'
  status, said = run(c, tmp_path / 'v', capsys, ['ingest'])
  assert (
    status == 1 and 'pool is empty: `where`, `part`' in said and 'exclude 3 samples and' in said
  )
  assert '(1 bad json)' in said
  assert '0,1.tar,00002,bad json' in (tmp_path / 'v/ingest/pool/broken.csv').read_text()
  c = _pool(format='webdataset', path=f'{tmp_path}/data/0.tar')
  assert 'unusable samples' not in _ingest(c, tmp_path / 'u', capsys)
  assert (tmp_path / 'u/ingest/pool/broken.csv').exists()


def test_rows_that_are_peculiar_are_counted_in_log_and_summary(tmp_path, capsys):
  for number in (0, 1):
    samples = _some(4 * number)
    for members in list(samples.values())[:2]:
      members['txt'] = b'caf\xe9'
    write_tar(tmp_path / f'data/{number}.tar', samples)
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  said = _ingest(c, tmp_path / 'w', capsys)
  assert 'pool: 8 rows in 2 shards; not skipped, but counted: 4 caption not UTF-8.' in said
  assert _summary(tmp_path / 'w')['noted'] == {'caption not UTF-8': 4}
  counts = products.counts(str(tmp_path / 'w'), 'ingest/pool/index-00001')
  assert counts['noted'] == {'caption not UTF-8': 2}
  assert _ingest(c, tmp_path / 'w', capsys).count('caption not UTF-8') == 0  # nothing to do


def test_the_limit_of_megapixels_counts_where_it_is_not_the_default(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('CLIP_JAX_MAX_MEGAPIXELS', '179')  # restored after the test
  monkeypatch.setattr(images.Image, 'MAX_IMAGE_PIXELS', 179_000_000)
  write_tar(tmp_path / 'data/0.tar', {'a': sample(0, 0)})  # 256 pixels
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  (before,) = Graph(c).index_shards('pool')
  assert 'ingest.max_megapixels' not in before.keys
  _ingest(c, tmp_path / 'w', capsys)
  assert _summary(tmp_path / 'w')['images']['unknown_size'] == 0
  c.ingest.max_megapixels = 1
  assert Graph(c).index_shards('pool')[0].keys['ingest.max_megapixels'] == 1
  status, said = run(c, tmp_path / 'w', capsys, ['ingest'])
  assert status == 1 and 'max_megapixels' in said
  assert images.Image.MAX_IMAGE_PIXELS == 1_000_000


def test_a_summary_that_is_missing_or_was_cut_off_is_made_without_looking_at_the_files(
  tmp_path, capsys, monkeypatch
):
  write_tar(tmp_path / 'data/0.tar', _some(0))
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  _ingest(c, tmp_path / 'w', capsys)
  folder = tmp_path / 'w/ingest/pool'
  whole = (folder / 'summary.json').read_bytes()
  for name in (
    'summary.sidecar.json',
    'summary.json',
    'broken.csv',
  ):  # as before there were summaries
    (folder / name).unlink()
  monkeypatch.setattr(ingest, 'scan_shard', None)
  said = _ingest(c, tmp_path / 'w', capsys)
  assert (folder / 'summary.json').read_bytes() == whole and '4 samples' in said
  (folder / 'broken.csv').unlink()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(summary, 'sentences', killed)
  with pytest.raises(KeyboardInterrupt):
    run(c, tmp_path / 'w', capsys, ['ingest'])
  assert products.read_sidecar(tmp_path / 'w', 'ingest/pool/summary')  # what was finished counts
  names = [
    entry['name']
    for entry in json.loads((tmp_path / 'w/ingest/manifest.json').read_text())['products']
  ]
  assert names == ['ingest/pool/index-00000', 'ingest/pool/index', 'ingest/pool/summary']


def test_files_added_at_the_end_keep_all_shards_and_remake_the_summary(tmp_path, capsys):
  write_tar(tmp_path / 'data/0.tar', _some(0))
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  _ingest(c, tmp_path / 'w', capsys)
  write_tar(tmp_path / 'data/1.tar', _some(4))
  said = _ingest(c, tmp_path / 'w', capsys)
  assert '1 of 2 shards are indexed already' in said and '8 samples' in said
  assert _summary(tmp_path / 'w')['samples'] == 8


def _flat(tmp_path):
  _files(
    tmp_path / 'val', {f'ILSVRC2012_val_0000000{i}': sample(i, i % 3) for i in range(1, 5)}, 'JPEG'
  )
  (tmp_path / 'truth.txt').write_text(
    '\n'.join(f'ILSVRC2012_val_0000000{i} n0{i % 2}' for i in (4, 3, 1))
  )
  return _pool(
    format='folder',
    path=f'{tmp_path}/val',
    labels_file=f'{tmp_path}/truth.txt',
    caption_template='a {}',
  )


def test_a_file_of_labels_counts_by_its_content(tmp_path, capsys):
  c = _flat(tmp_path)
  said = _ingest(c, tmp_path / 'w', capsys)
  assert 'pool: labels by truth.txt: 3 of 4 images.' in said
  source = _source(tmp_path / 'w')
  assert (
    source.labels.tolist() == [1, 1, 0]
    and source.classes == ('n00', 'n01')
    and source[0]['caption'] == 'a n01'
  )
  assert (
    '0,./,ILSVRC2012_val_00000002.JPEG,no label'
    in (tmp_path / 'w/ingest/pool/broken.csv').read_text()
  )
  (tmp_path / 'truth.txt').rename(tmp_path / 'elsewhere.txt')
  c.pool.labels_file = f'{tmp_path}/elsewhere.txt'
  assert 'nothing was done' in _ingest(c, tmp_path / 'w', capsys)
  text = (tmp_path / 'elsewhere.txt').read_text()
  (tmp_path / 'elsewhere.txt').write_text(text.replace('4 n00', '4 n01'))
  status, said = run(c, tmp_path / 'w', capsys, ['ingest'])
  assert status == 1 and 'labels of images has changed' in said and '--redo=ingest:pool' in said


def test_a_class_that_moves_the_others_is_noticed(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(
    formats.FORMATS, 'folder', dataclasses.replace(formats.FORMATS['folder'], files_a_shard=2)
  )
  _files(tmp_path / 'data', {'n2/1': sample(1, 1), 'n2/2': sample(2, 1)})
  c = _pool(format='folder', path=f'{tmp_path}/data', caption_template='{}')
  _ingest(c, tmp_path / 'w', capsys)
  _files(tmp_path / 'data', {'n3/1': sample(3, 1)})
  said = _ingest(c, tmp_path / 'w', capsys)  # a class behind the others keeps their labels
  assert '1 of 2 shards' in said and _source(tmp_path / 'w').labels.tolist() == [0, 0, 1]
  _files(
    tmp_path / 'data', {'n10/1': sample(4, 1)}
  )  # n2, n3, n10 as files; but as text n10 is the first class
  status, said = run(c, tmp_path / 'w', capsys, ['ingest'])
  assert status == 1 and 'labels of images has changed' in said


def test_objectnet_asks_for_its_shared_names_only(tmp_path, capsys):
  top = tmp_path / 'objectnet-1.0'
  names = ('alarm_clock', 'broom', 'air_freshener')
  _files(top / 'images', {f'{name}/1': sample(i, 0) for i, name in enumerate(names)})
  (top / 'mappings').mkdir()
  (top / 'mappings/folder_to_objectnet_label.json').write_text(
    '{"alarm_clock": "Alarm clock", "broom": "Broom", "air_freshener": "Air freshener"}'
  )
  (top / 'mappings/objectnet_to_imagenet_1k.json').write_text(
    '{"Broom": "broom", "Alarm clock": "analog clock"}'
  )
  c = _pool(format='folder', path=str(top), caption_template='a {}')
  said = _ingest(c, tmp_path / 'w', capsys)
  assert 'recognised as ObjectNet' in said and '2 names that ImageNet has too' in said
  source = _source(tmp_path / 'w')
  assert [(source.caption(i), int(source.labels[i])) for i in range(2)] == [
    ('a Alarm clock', 0),
    ('a Broom', 1),
  ]
  assert (_summary(tmp_path / 'w')['left_out'], _summary(tmp_path / 'w')['skipped']) == (1, 0)


def test_odd_names_of_files(tmp_path, capsys):
  _files(tmp_path / 'data', {'a/1': sample(1, 1), 'new\nline/2': sample(2, 1)})
  os.link(tmp_path / 'data/a/1.png', os.fsencode(tmp_path) + b'/data/\xff.png')
  os.mkdir(os.fsencode(tmp_path) + b'/data/\xfe')
  os.link(tmp_path / 'data/a/1.png', os.fsencode(tmp_path) + b'/data/\xfe/1.png')
  c = _pool(format='folder', path=f'{tmp_path}/data')
  _ingest(c, tmp_path / 'w', capsys)
  assert _source(tmp_path / 'w').classes == ('a', 'new\nline')
  assert _summary(tmp_path / 'w')['reasons'] == {'name is not UTF-8': 2}
  assert 'nothing was done' in _ingest(c, tmp_path / 'w', capsys)
  c = _pool(format='folder', path=f'{tmp_path}/one')
  (tmp_path / 'one').mkdir()
  os.link(tmp_path / 'data/a/1.png', os.fsencode(tmp_path) + b'/one/\xff.png')
  status, said = run(c, tmp_path / 'v', capsys, ['ingest'])
  assert status == 1 and 'pool is empty' in said


def test_json_labels_of_a_folder_of_shards_are_not_its_folders(tmp_path, capsys):
  _files(tmp_path / 'data', {f'00000/{key}': s for key, s in _some(0).items()})
  for key, s in _some(0).items():
    (tmp_path / f'data/00000/{key}.json').write_bytes(s['json'])
  _ingest(
    _pool(format='folder', path=f'{tmp_path}/data', label_key='label'), tmp_path / 'w', capsys
  )
  source = _source(tmp_path / 'w')
  assert source.labels.tolist() == [0, 1, 2, 0] and source.classes == ()


def test_content_counts_where_that_is_asked(tmp_path, capsys):
  write_tar(tmp_path / 'data/0.tar', _some(0))
  c = _pool(format='webdataset', path=f'{tmp_path}/data')
  c.ingest.check_content = True
  _ingest(c, tmp_path / 'w', capsys)
  os.utime(tmp_path / 'data/0.tar', (0, 0))
  assert 'nothing was done' in _ingest(c, tmp_path / 'w', capsys)
  data = bytearray((tmp_path / 'data/0.tar').read_bytes())
  data[600] ^= 1
  (tmp_path / 'data/0.tar').write_bytes(data)
  assert run(c, tmp_path / 'w', capsys, ['ingest'])[0] == 1


def test_shards_in_processes_give_the_same(tmp_path, capsys):
  c = _mixed(tmp_path / 'data')
  _ingest(c, tmp_path / 'one', capsys)
  c.engine.workers = 2
  _ingest(c, tmp_path / 'two', capsys)
  for name in (
    'table.npy',
    'captions.bin',
    'paths.bin',
    'summary.json',
    'files.json',
    'index-00004.parquet',
  ):
    assert (tmp_path / 'one/ingest/pool' / name).read_bytes() == (
      tmp_path / 'two/ingest/pool' / name
    ).read_bytes()
  assert np.load(tmp_path / 'two/ingest/pool/starts.npy').tolist() == [0, 4, 8, 12, 16, 20]


def test_what_is_done_with_a_dataset_later_is_in_no_fingerprint_of_its_index(tmp_path):
  write_tar(tmp_path / 'a/0.tar', _some(0))
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')

  def index(folder='a', **given):
    return Graph(_pool(format='webdataset', path=f'{tmp_path}/{folder}', **given)).index_shards(
      'pool'
    )[0]

  plain = index()
  assert {
    'pool.format',
    'pool.where',
    'pool.part',
    'pool.caption_key',
    'pool.classes',
    'pool.needs_caption',
  } <= plain.keys.keys()
  later = dict(any_norm=True, images='DIR', metadata='DIR', domain_column='domain')
  assert not {f'pool.{key}' for key in (*later, 'path', 'labels_file')} & plain.keys.keys()
  assert index('b', **later).fingerprint == plain.fingerprint
  for given in (
    dict(vector_key='l14_img'),
    dict(where={'label': 1}),
    dict(part=(0.0, 0.5)),
    dict(columns=('uid',)),
  ):
    assert index(**given).fingerprint != plain.fingerprint
