import json
import os

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import listing, row_rules, table, vector_index
from clip_jax.data.reader import Source
from clip_jax.data.row_rules import RowRules


def _vectors(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, np.eye(max(rows, 4), dtype=np.float16)[:rows])


def _metadata(path, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path)


def _index(folder, out, metadata='', assemble=True, **rules):
  """Indexes all files of vectors in a folder; returns the source and the counts of each file."""
  found = listing.list_files('embeddings', str(folder))
  out.mkdir(exist_ok=True)
  counts = [
    vector_index.write(str(out), i, file, beside, RowRules(**rules))
    for i, (file, beside) in enumerate(
      zip(found, vector_index.companions(found, metadata), strict=True)
    )
  ]
  if not assemble:
    return None, counts
  table.assemble(
    str(out),
    [{'format': 'embeddings', 'root': '', 'path': file.path, 'image_key': ''} for file in found],
  )
  return Source(str(out)), counts


def _pair(folder, metadata=''):
  found = listing.list_files('embeddings', str(folder))
  return [
    {kind: file.name for kind, file in beside.items()}
    for beside in vector_index.companions(found, metadata)
  ]


def test_files_are_paired_by_their_numbers_whatever_their_zeros(tmp_path):
  for number in ('0001', '0002', '0010'):
    _vectors(tmp_path / f'img_emb/img_emb_{number}.npy', 2)
  for number in ('1', '2', '10'):
    _metadata(tmp_path / f'metadata/metadata_{number}.parquet', key=['a', 'b'])
  expected = [{'metadata': f'metadata_{i}.parquet'} for i in (1, 2, 10)]
  assert (
    _pair(tmp_path) == _pair(tmp_path / 'img_emb') == _pair(tmp_path / 'img_emb/*.npy') == expected
  )
  assert _pair(tmp_path / 'img_emb', str(tmp_path / 'metadata/*.parquet')) == expected


def test_a_missing_partner_is_named(tmp_path):
  for number in range(3):
    _vectors(tmp_path / f'img_emb/img_emb_{number}.npy', 2)
    _metadata(
      tmp_path / f'metadata/metadata_{number + 1}.parquet', key=['a', 'b']
    )  # counted from 1
  with pytest.raises(
    InputError, match='img_emb_0.npy has no partner in .*metadata: .*end in 1 to 3'
  ):
    _pair(tmp_path)
  (tmp_path / 'img_emb/img_emb_0.npy').unlink()
  (tmp_path / 'metadata/metadata_2.parquet').unlink()  # a hole
  with pytest.raises(InputError, match='img_emb_2.npy has no partner'):
    _pair(tmp_path)
  _vectors(tmp_path / 'img_emb/all.npy', 2)
  with pytest.raises(InputError, match='all.npy has no partner'):
    _pair(tmp_path)


def test_partitions_that_the_pattern_leaves_out_need_no_vectors(tmp_path):
  for number in range(3):
    _vectors(tmp_path / f'img_emb/img_emb_{number}.npy', 2)
    _metadata(tmp_path / f'metadata/metadata_{number}.parquet', key=[f'{number}a', f'{number}b'])
  assert _pair(tmp_path / 'img_emb/img_emb_[02].npy') == [
    {'metadata': 'metadata_0.parquet'},
    {'metadata': 'metadata_2.parquet'},
  ]


def test_a_number_that_comes_twice_is_refused(tmp_path):
  _vectors(tmp_path / 'img_emb/img_emb_1.npy', 2)
  for name in ('metadata_1', 'metadata_01'):
    _metadata(tmp_path / f'metadata/{name}.parquet', key=['a', 'b'])
  with pytest.raises(InputError, match='both end in the number 1'):
    _pair(tmp_path)
  _vectors(tmp_path / 'more/img_emb_1.npy', 2)
  (tmp_path / 'metadata/metadata_01.parquet').unlink()
  with pytest.raises(InputError, match='format=concat'):
    _pair(tmp_path / '{img_emb,more}/*.npy', str(tmp_path / 'metadata'))


def test_datacomp_and_clip_ood_lie_beside_one_another(tmp_path):
  for stem in ('0a1', '0b1'):  # both end in 1: hashes are no numbers
    np.savez(tmp_path / f'{stem}.npz', l14_img=np.eye(2, dtype=np.float16))
    _metadata(tmp_path / f'{stem}.parquet', uid=['u', 'v'])
  assert _pair(tmp_path) == [{'metadata': '0a1.parquet'}, {'metadata': '0b1.parquet'}]
  ood = tmp_path / 'val/ViT-B-16__laion'
  _vectors(ood / 'images/img_emb_0.npy', 3)
  for kind, values in (
    ('labels', np.array([2, 0, -1])),
    ('paths', np.array(['a.png', 'b.png', 'ü.png'])),
  ):
    (ood / kind).mkdir()
    np.save(ood / f'{kind}/{kind}_0.npy', values)
  assert _pair(ood) == [{'labels': 'labels_0.npy', 'paths': 'paths_0.npy'}]
  source, _ = _index(ood, tmp_path / 'out', label_key='labels', columns=('labels',))
  assert source.labels.tolist() == [2, 0, -1] and source.column('labels').tolist() == [2, 0, -1]
  assert source.column('key').tolist() == ['a.png', 'b.png', 'ü.png']
  np.save(ood / 'paths/paths_0.npy', np.array(['a', None, 'c'], object), allow_pickle=True)
  with pytest.raises(InputError, match='paths_0.npy cannot be read .*no Python objects'):
    _index(ood, tmp_path / 'out', assemble=False)


def test_another_number_of_rows_is_refused_by_name(tmp_path):
  _vectors(tmp_path / 'img_emb/img_emb_0.npy', 3)
  _metadata(tmp_path / 'metadata/metadata_0.parquet', key=['a', 'b'])
  with pytest.raises(
    InputError, match='metadata_0.parquet describes 2 rows.*img_emb_0.npy has 3 vectors'
  ):
    _index(tmp_path, tmp_path / 'out', assemble=False)


def test_without_metadata_a_key_is_the_file_and_the_row(tmp_path, monkeypatch):
  monkeypatch.setattr(vector_index, '_ROWS', 2)
  for number, rows in enumerate((3, 0, 2)):
    _vectors(tmp_path / f'img_emb/e_{number}.npy', rows)
  source, counts = _index(tmp_path, tmp_path / 'out')
  assert source.column('key').tolist() == [
    'img_emb/e_0.npy/0',
    'img_emb/e_0.npy/1',
    'img_emb/e_0.npy/2',
    'img_emb/e_2.npy/0',
    'img_emb/e_2.npy/1',
  ]
  assert [c['rows'] for c in counts] == [3, 0, 2] and {c['dim'] for c in counts} == {4}
  assert source.offsets(0).tolist() == [0, 1, 2] and source.offsets(2).tolist() == [0, 1]
  assert not source.has_images and source.caption(1) == '' and source.labels.tolist() == [-1] * 5
  with pytest.raises(InputError, match='e_0.npy holds vectors and no images'):
    source[0]


SAMPLES = {
  'image_path': ['p0', 'p1', 'p2', 'p3'],
  'uid': ['u0', None, 'u2', 'u3'],
  'caption': [' a ', '', None, 'ü'],
  'text': ['b', ' c ', None, 'd'],
  'class': ['cat', 'dog', None, 'cow'],
  'number': [1.0, 0.0, None, 7.0],
  'width': [10, 20, None, -1],
  'original_width': [1] * 4,
  'original_height': [5.0, float('nan'), 7.0, 8.0],
  'domain': ['x', 'y', 'x', None],
  'score': [0.5, float('nan'), None, 1.0],
  'tags': [['s'], [], None, ['t', 'u']],
  'seen': [True, None, False, True],
}


@pytest.fixture(name='described')
def _described(tmp_path):
  _vectors(tmp_path / 'img_emb/img_emb_0.npy', 4)
  _metadata(tmp_path / 'metadata/metadata_0.parquet', **SAMPLES)
  return tmp_path


@pytest.mark.parametrize('rows', [1, 3, 100])
def test_columns_of_metadata(described, monkeypatch, rows):
  monkeypatch.setattr(vector_index, '_ROWS', rows)
  source, _ = _index(
    described,
    described / 'out',
    columns=('domain', 'score', 'tags', 'seen', 'nowhere'),
    label_key='class',
    classes=('dog', 'cat', 'cow'),
  )
  column = lambda name: source.column(name).tolist()
  assert column('key') == ['u0', 'img_emb/img_emb_0.npy/1', 'u2', 'u3']
  assert [source.caption(i) for i in range(4)] == [
    'a',
    'c',
    '',
    'ü',
  ]  # the first of caption_key that says something
  assert source.labels.tolist() == [1, 0, -1, 2]
  assert column('width') == [10, 20, 0, 0] and column('height') == [5, 0, 7, 8]
  assert column('domain') == ['x', 'y', 'x', None] and column('tags') == [
    '["s"]',
    '[]',
    None,
    '["t", "u"]',
  ]
  assert column('seen') == ['true', None, 'false', 'true'] and column('nowhere') == [None] * 4
  assert (
    column('score')[::3] == [0.5, 1.0]
    and np.isnan(column('score')[1])
    and np.isnan(column('score')[2])
  )
  assert column('group') == column('key')


def test_the_last_caption_key_that_says_something(described):
  source, _ = _index(
    described, described / 'out', caption_key='json:text;caption', sample_key='image_path'
  )
  assert [source.caption(i) for i in range(4)] == ['b', 'c', '', 'd']
  assert source.column('key').tolist() == ['p0', 'p1', 'p2', 'p3']


def test_columns_match_without_case_where_only_one_does(tmp_path):
  _vectors(tmp_path / 'img_emb/img_emb_0.npy', 2)
  columns = {
    'KEY': ['k0', 'k1'],
    'uid': ['u0', 'u1'],
    'TEXT': ['a', 'b'],
    'Url': ['1', '1'],
    'URL': ['2', '2'],
    'WIDTH': [3, 4],
    'NSFW': ['no', 'yes'],
  }
  _metadata(tmp_path / 'metadata/metadata_0.parquet', **columns)
  source, _ = _index(
    tmp_path, tmp_path / 'out', columns=('url', 'URL', 'nsfw', 'NSFW'), where={'nsfw': 'yes'}
  )
  column = lambda name: source.column(name).tolist()
  assert column('key') == ['u1'] and source.caption(0) == 'b' and column('width') == [4]
  assert column('url') == [None] and column('URL') == ['2']
  assert column('nsfw') == column('NSFW') == ['yes']
  source, _ = _index(tmp_path, tmp_path / 'other', sample_key='key')
  assert column('key') == ['k0', 'k1']


def test_captions_with_lost_characters_are_counted(tmp_path):
  _vectors(tmp_path / 'img_emb/img_emb_0.npy', 7)
  texts = ['é'.encode('utf-16'), b'\x92s', bytes(3), 'd'.encode('utf-16-le'), b'good', None, b'']
  more = ['other'] * 7
  for kind in (pa.binary(), pa.large_binary()):
    _metadata(tmp_path / 'metadata/metadata_0.parquet', caption=pa.array(texts, kind), text=more)
    source, (counts,) = _index(tmp_path, tmp_path / 'out')
    assert [source.caption(i) for i in range(7)] == [
      'é',
      '\ufffds',
      'other',
      'd\0',
      'good',
      'other',
      'other',
    ]
    assert counts['noted'] == {'caption not UTF-8': 3} and counts['rows'] == 7
  buffers = pa.array(texts, pa.binary()).buffers()
  invalid = pa.Array.from_buffers(pa.string(), 7, buffers)  # as some writers leave them
  _metadata(tmp_path / 'metadata/metadata_0.parquet', caption=invalid, text=more)
  source, (counts,) = _index(tmp_path, tmp_path / 'out', where={'text': 'other'})
  assert source.caption(1) == '\ufffds' and counts['noted'] == {'caption not UTF-8': 3}
  source, (counts,) = _index(tmp_path, tmp_path / 'out', caption_key='text')
  assert 'noted' not in counts


def test_the_label_key_none_needs_no_column(described):
  source, _ = _index(described, described / 'out', label_key='none')
  assert source.labels.tolist() == [-1] * 4


def test_headerless_float16_is_told_by_the_rows_of_the_metadata(tmp_path):
  x = np.eye(4, dtype=np.float16)
  (tmp_path / 'img_emb').mkdir()
  x.tofile(tmp_path / 'img_emb/img_emb_0.npy')
  file = listing.list_files('embeddings', str(tmp_path / 'img_emb'))[0]
  (beside,) = vector_index.companions([file])
  assert (
    vector_index.read_header(file, beside, vector_dim=4).rows == 2
  )  # float32, as nothing else is known
  _metadata(tmp_path / 'metadata/metadata_0.parquet', key=list('abcd'))
  (beside,) = vector_index.companions([file])
  assert vector_index.read_header(file, beside, vector_dim=4).dtype == np.float16
  counts = vector_index.write(str(tmp_path), 0, file, beside, vector_dim=4)
  assert counts['rows'] == 4 and counts['dim'] == 4
  os.remove(tmp_path / 'metadata/metadata_0.parquet')
  (tmp_path / 'labels').mkdir()
  np.save(tmp_path / 'labels/labels_0.npy', np.arange(4))
  (beside,) = vector_index.companions([file])
  assert vector_index.read_header(file, beside, vector_dim=4).dtype == np.float16


def test_where_and_part_choose_as_for_images(described):
  source, (counts,) = _index(described, described / 'out', where={'domain': 'x'})
  assert source.offsets(0).tolist() == [0, 2] and counts['left_out'] == 2
  source, _ = _index(described, described / 'out', where={'domain': ('x', 'y'), 'number': 0})
  assert source.offsets(0).tolist() == [1]
  low, high = 0.2, 0.7
  source, _ = _index(
    described, described / 'out', part=(low, high), group_key='image_path', group_pattern='[0-9]'
  )
  assert source.offsets(0).tolist() == [
    i for i in range(4) if low <= row_rules.fraction(str(i)) < high
  ]
  assert set(source.column('group')) <= set('0123')
  with pytest.raises(InputError, match="metadata_0.parquet has no column 'dom'.*: image_path, uid"):
    _index(described, described / 'out', where={'dom': 'x'})
  with pytest.raises(ConfigError, match=r"`where` has number=\['x'\].*double"):
    _index(described, described / 'out', where={'number': 'x'})


def test_labels_that_are_no_class_are_listed(described):
  source, (counts,) = _index(described, described / 'out', label_key='number', classes=('a', 'b'))
  assert source.labels.tolist() == [1, 0, -1] and counts['reasons'] == {'bad label': 1}
  assert json.loads((described / 'out/skipped-00000.json').read_text()) == [
    {'key': 'u3', 'reason': 'bad label'}
  ]
  source, _ = _index(described, described / 'out', label_key='class', classes=('dog', 'cat'))
  assert source.labels.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
  'rules, said',
  [
    ({'label_key': 'lable'}, "no column 'lable'"),
    ({'group_key': 'x'}, "no column 'x'"),
    ({'sample_key': 'tags'}, "its column 'tags' holds list.*not text"),
    ({'caption_key': 'tags'}, "its column 'tags' holds list"),
  ],
)
def test_columns_that_cannot_be_used(described, rules, said):
  with pytest.raises(InputError, match=said):
    _index(described, described / 'out', **rules)


def test_a_column_that_every_index_has(described):
  with pytest.raises(ConfigError, match="Remove 'caption' from columns"):
    _index(described, described / 'out', columns=('caption',))


def test_a_parquet_of_vectors_describes_itself(tmp_path):
  (tmp_path / 'x').mkdir()
  _metadata(
    tmp_path / 'x/a.parquet',
    image_id=[7, 8],
    embedding=[[1.0, 0.0], [0.0, 1.0]],
    caption=['a', 'b'],
  )
  source, _ = _index(tmp_path / 'x', tmp_path / 'out')
  assert source.column('key').tolist() == ['7', '8'] and source.caption(1) == 'b'


def test_damaged_metadata_are_named(described):
  path = described / 'metadata/metadata_0.parquet'
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(InputError, match='metadata_0.parquet cannot be read as parquet'):
    _index(described, described / 'out')


def test_remote_files_are_indexed_in_place(described):
  system = fsspec.filesystem('memory')
  for name in ('img_emb/img_emb_0.npy', 'metadata/metadata_0.parquet'):
    system.pipe(f'/pool/{name}', (described / name).read_bytes())
  found = listing.list_files('embeddings', 'memory://pool')
  (beside,) = vector_index.companions(found)
  assert beside['metadata'].path == 'memory://pool/metadata/metadata_0.parquet'
  (described / 'out').mkdir()
  assert vector_index.write(str(described / 'out'), 0, found[0], beside)['rows'] == 4
  system.rm('/pool', recursive=True)


def test_rows_that_two_datasets_share(described, tmp_path):
  (tmp_path / 'link').symlink_to(described / 'img_emb', target_is_directory=True)
  whole, _ = _index(described / 'img_emb', described / 'a')
  some, _ = _index(
    tmp_path / 'link', described / 'b', metadata=str(described / 'metadata'), where={'domain': 'x'}
  )
  assert whole.same_samples(some).tolist() == [True, False, True, False]


def test_metadata_that_are_not_there_are_told(tmp_path):
  np.save(tmp_path / 'a.npy', np.eye(2))
  with pytest.raises(InputError, match="metadata='/nowhere' matches no parquet file"):
    vector_index.companions(listing.list_files('embeddings', str(tmp_path)), '/nowhere')
