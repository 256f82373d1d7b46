import dataclasses
import hashlib
import io
import json
import os
import tarfile

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import formats, images, listing, sources

PACS = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'data', 'pacs')


def _image(width=8, height=6, format='PNG'):
  out = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(pixels).save(out, format)
  return out.getvalue()


def _tar(path, samples):
  """Writes {key: {ending: bytes, str or dict}} as a tar and returns it as a SourceFile."""
  with tarfile.open(path, 'w') as tar:
    for key, members in samples.items():
      for ending, value in members.items():
        data = (
          value
          if isinstance(value, bytes)
          else (value if isinstance(value, str) else json.dumps(value)).encode()
        )
        info = tarfile.TarInfo(f'{key}.{ending}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  (file,) = listing.list_files('webdataset', str(path))
  return file


def _scan(tmp_path, samples, **rules):
  return sources.scan('webdataset', _tar(tmp_path / 'x.tar', samples), **rules)


def _keys(scan):
  return [record.key for record in scan.records]


def _touch(path, data=b''):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def test_paths_are_listed_in_natural_order_and_braces_as_written(tmp_path):
  for name in ('s10.tar', 's9.tar', 's1.tar', 'a/s2.tar', 'b/s1.tar', 'note.txt'):
    _touch(tmp_path / name)

  def names(path):
    return [file.name for file in listing.list_files('webdataset', str(tmp_path / path))]

  assert names('') == names('*.tar') == names('s*.tar') == ['s1.tar', 's9.tar', 's10.tar']
  assert names('s{10..9}.tar') == names('s{10,9}.tar') == ['s10.tar', 's9.tar']
  assert names('{b,a}/*.tar') == ['b/s1.tar', 'a/s2.tar']
  assert names('**/s[12].tar') == ['a/s2.tar', 'b/s1.tar', 's1.tar']
  assert names('s9.tar') == ['s9.tar']


def test_braces_keep_the_width_of_their_numbers():
  assert listing.expand_braces('/x/{008..010}-{a,b}') == [
    '/x/008-a',
    '/x/008-b',
    '/x/009-a',
    '/x/009-b',
    '/x/010-a',
    '/x/010-b',
  ]
  assert listing.expand_braces('/x/{1..2}') == ['/x/1', '/x/2']
  assert listing.expand_braces('/x/{odd}') == ['/x/{odd}']


def test_paths_that_mean_nothing_are_errors(tmp_path):
  _touch(tmp_path / '0.tar')
  (tmp_path / 'empty').mkdir()
  for path in ('nothing*.tar', 'missing.tar', '{0..1}.tar', 'empty'):
    with pytest.raises(InputError, match='matches no file'):
      listing.list_files('webdataset', str(tmp_path / path))
  with pytest.raises(InputError, match='more than once'):
    listing.list_files('webdataset', str(tmp_path / '{0,0}.tar'))
  for path in ('empty', '0.tar', 'missing'):
    with pytest.raises(InputError):
      listing.list_files('folder', str(tmp_path / path))
  with pytest.raises(ConfigError, match="Did you mean 'webdataset'"):
    listing.list_files('webdatasets', str(tmp_path))
  with pytest.raises(ConfigError):
    sources.scan('tarr', [])


def test_a_literal_path_with_braces_and_stars_is_taken_as_it_is(tmp_path):
  _touch(tmp_path / 'we[i]{r,d}*.tar')
  (file,) = listing.list_files('webdataset', str(tmp_path / 'we[i]{r,d}*.tar'))
  assert file.name == 'we[i]{r,d}*.tar' and os.path.isabs(file.path)


def test_rows_say_where_images_lie_and_how_large_they_are(tmp_path):
  file = _tar(
    tmp_path / 'x.tar',
    {
      'a': {'json': {'domain': 'photo'}, 'png': _image(8, 6), 'txt': ' a cat\n'},
      'b': {'jpg': _image(20, 10, 'JPEG'), 'txt': 'b', 'json': {}},
    },
  )
  scan = sources.scan('webdataset', file, columns=('domain',))
  a, b = scan.records
  data = open(file.path, 'rb').read()
  assert data[a.offset : a.offset + a.length] == _image(8, 6)
  assert (a.key, a.caption, a.label, a.group) == ('a', 'a cat', -1, 'a')
  assert a.columns == {'domain': 'photo'}
  assert (a.width, a.height, b.width, b.height) == (8, 6, 20, 10) and b.columns == {'domain': None}
  assert scan.skipped == [] and scan.left_out == 0


def test_what_cannot_be_used_is_listed_and_never_fatal(tmp_path):
  image = _image(90, 80, 'JPEG')
  scan = _scan(
    tmp_path,
    {
      'good': {'jpg': image, 'txt': 'x', 'json': {'label': 1}},
      'half': {'jpg': image[: len(image) // 2], 'txt': 'x'},
      'garbage': {'jpg': b'garbage', 'txt': 'x'},
      'empty': {'jpg': b'', 'txt': 'x'},
      'no_image': {'txt': 'x'},
      'no_caption': {'jpg': image},
      'blank': {'jpg': image, 'txt': ' \n'},
      'json': {'jpg': image, 'txt': 'x', 'json': '{"label": '},
      'list': {'jpg': image, 'txt': 'x', 'json': '[1]'},
      'deep': {'jpg': image, 'txt': 'x', 'json': '[' * 100_000},
      'label': {'jpg': image, 'txt': 'x', 'json': {'label': 'dogg'}},
      'high': {'jpg': image, 'txt': 'x', 'json': {'label': 2}},
      'big': {'jpg': image, 'txt': 'x', 'json': {'label': 1 << 70}},
      'dict': {'jpg': image, 'txt': 'x', 'json': {'label': {}}},
    },
    label_key='label',
    classes=('cat', 'dog'),
  )
  assert _keys(scan) == ['good', 'half', 'garbage', 'empty']
  assert [(r.width, r.height) for r in scan.records] == [(90, 80), (90, 80), (0, 0), (0, 0)]
  assert {entry['key']: entry['reason'] for entry in scan.skipped} == {
    'no_image': 'no image',
    'no_caption': 'no caption',
    'blank': 'no caption',
    'json': 'bad json',
    'list': 'bad json',
    'deep': 'bad json',
    'label': 'bad label',
    'high': 'bad label',
    'big': 'bad label',
    'dict': 'bad label',
  }


def test_headers_far_into_a_file_are_found(tmp_path):
  out = io.BytesIO()
  image = Image.fromarray(np.zeros((5, 7, 3), np.uint8))
  image.save(out, 'JPEG', exif=b'Exif\0\0' + bytes(60_000))
  scan = _scan(tmp_path, {'a': {'jpg': out.getvalue(), 'txt': 'x'}})
  assert (scan.records[0].width, scan.records[0].height) == (7, 5)


def test_captions_and_labels_come_from_where_the_keys_say(tmp_path):
  fields = {'caption': 'json', 'class_name': 'seal', 'label': 'dog', 'txt': 'field'}
  samples = {'a': {'jpg': _image(), 'txt': 'text', 'cls': '1\n', 'json': fields}}

  def record(**rules):
    scan = _scan(tmp_path, samples, **rules)
    return scan.records[0] if scan.records else scan.skipped[0]['reason']

  assert record().caption == 'text' and record(caption_key='json:caption').caption == 'json'
  assert record(caption_key='json:txt').caption == 'field'
  assert record(caption_key='json:none') == 'no caption'
  assert record(caption_key='json:none', require_caption=False).caption == ''
  assert record(caption_template='a {}, a {}!').caption == 'a seal, a seal!'
  assert record(caption_template='a {}', label_key='cls', classes=('cat', 'dog')).caption == 'a dog'
  assert record(label_key='cls').label == 1
  assert record(label_key='label', classes=('cat', 'dog')).label == 1
  assert record(label_key='label') == 'bad label' and record(label_key='none').label == -1
  assert record(image_key='png') == 'no image' and record(image_key='png;JPG').key == 'a'


def test_text_is_kept_even_where_it_is_not_unicode(tmp_path):
  scan = _scan(
    tmp_path,
    {
      'latin': {'jpg': _image(), 'txt': 'caf\xe9'.encode('latin1'), 'json': {}},
      'half': {'jpg': _image(), 'txt': 'x', 'json': '{"c": "\\ud800", "g": "\\ud800"}'},
      'bom': {'jpg': _image(), 'txt': b'\xef\xbb\xbfmark', 'json': b'\xef\xbb\xbf{}'},
    },
    columns=('c',),
  )
  assert [r.caption for r in scan.records] == ['caf\ufffd', 'x', 'mark']
  assert scan.records[1].columns == {'c': '?'}
  assert scan.noted == {'caption not UTF-8': 1} and scan.skipped == []


def test_captions_are_decoded_by_their_byte_order_mark(tmp_path):
  text = 'a café 漢字'
  encodings = ('utf-8-sig', 'utf-16', 'utf-32')
  samples = {name: {'jpg': _image(), 'txt': text.encode(name)} for name in encodings}
  for order, mark in {'le': '\ufeff', 'be': '\ufeff'}.items():
    samples[order] = {'jpg': _image(), 'txt': f'{mark}{text}'.encode(f'utf-16-{order}')}
  samples['json'] = {'jpg': _image(), 'json': json.dumps({'caption': text}).encode('utf-16')}
  scan = _scan(tmp_path, samples)
  assert [record.caption for record in scan.records] == [text] * 6
  assert scan.skipped == [] and not scan.noted


def test_captions_with_lost_characters_are_counted(tmp_path):
  samples = {
    'cp1252': {'jpg': _image(), 'txt': b'the dog\x92s ball'},
    'no mark': {'jpg': _image(), 'txt': 'dog'.encode('utf-16-le')},
    'nul': {'jpg': _image(), 'txt': bytes(3)},
    'gbk': {'jpg': _image(), 'txt': '\u6c49\u5b57'.encode('gbk')},
    'nul, json': {'jpg': _image(), 'txt': bytes(3), 'json': {'caption': 'good'}},
    'good': {'jpg': _image(), 'txt': 'good'},
  }
  scan = _scan(tmp_path, samples)
  assert [(r.key, r.caption) for r in scan.records] == [
    ('cp1252', 'the dog\ufffds ball'),
    ('no mark', 'd\0o\0g\0'),
    ('nul, json', 'good'),
    ('good', 'good'),
  ]
  assert scan.noted == {'caption not UTF-8': 3}
  assert scan.skipped == [{'key': key, 'reason': 'caption not UTF-8'} for key in ('nul', 'gbk')]
  scan = _scan(tmp_path, samples, require_caption=False)
  assert scan.noted == {'caption not UTF-8': 5} and scan.records[2].caption == ''


def test_a_json_without_fields_costs_no_sample_where_none_is_asked_for(tmp_path):
  odd = {'list': '[{"bbox": [0]}]', 'empty': '', 'blank': ' \n', 'null': 'null', 'text': '"a"'}
  samples = {key: {'jpg': _image(), 'txt': 'x', 'json': text} for key, text in odd.items()}
  scan = _scan(tmp_path, samples)
  assert _keys(scan) == list(odd) and scan.skipped == []
  scan = _scan(tmp_path, samples, caption_template='a {}', label_key='cls', classes=('cat',))
  assert {entry['reason'] for entry in scan.skipped} == {'bad json'}  # class_name may be in it
  for rules in ({'columns': ('a',)}, {'label_key': 'a'}, {'where': {'a': 1}}, {'group_key': 'a'}):
    scan = _scan(tmp_path, samples, **rules)
    assert not scan.records and {entry['reason'] for entry in scan.skipped} == {'bad json'}
  for members in samples.values():
    members['cls'] = '0'
  scan = _scan(tmp_path, samples, caption_template='a {}', label_key='cls', classes=('cat',))
  assert [record.caption for record in scan.records] == ['a cat'] * len(odd)


def test_names_with_several_dots_are_counted_image_by_image(tmp_path):
  members = {f'{i}.{end}': _image() for i in range(3) for end in ('jpg', 'txt')}
  scan = _scan(tmp_path, {'shot_1': members})
  assert scan.skipped == [
    {'key': f'shot_1.{i}.jpg', 'reason': 'several dots in the name'} for i in range(3)
  ]
  scan = _scan(tmp_path, {'shot_1': {'jpg': _image(), **members}})
  assert scan.skipped == [{'key': 'shot_1 (4 images)', 'reason': 'no caption'}]
  scan = _scan(tmp_path, {'shot_1': {'jpg': _image(), 'txt': 'x', **members}})
  assert _keys(scan) == ['shot_1'] and scan.noted == {'further image of a key, not used': 3}


def test_16_bit_greys_are_counted(tmp_path):
  grey = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
  samples = {'rgb': {'jpg': _image(), 'txt': 'x'}}
  for format in ('PNG', 'TIFF', 'PPM'):
    out = io.BytesIO()
    grey.save(out, format)
    samples[format] = {'jpg': out.getvalue(), 'txt': 'x'}
  scan = _scan(tmp_path, samples)
  assert len(scan.records) == 4 and scan.noted == {'16-bit greyscale image': 3}


def test_a_number_in_cls_is_an_index_also_where_class_names_are_numbers(tmp_path):
  samples = {f's{i}': {'jpg': _image(), 'cls': f'{i}\n', 'json': {'n': str(i)}} for i in range(4)}
  rules = {'classes': ('3', '2', '1'), 'require_caption': False}
  scan = _scan(tmp_path, samples, label_key='cls', **rules)
  assert [record.label for record in scan.records] == [0, 1, 2]
  assert scan.skipped == [{'key': 's3', 'reason': 'bad label'}]
  assert scan.noted == {'number in .cls taken as an index, not as a class name': 2}
  scan = _scan(tmp_path, samples, label_key='n', **rules)
  assert [record.label for record in scan.records] == [0, 2, 1, 0]  # '0' is no class name
  samples = {'a': {'jpg': _image(), 'cls': 'cat'}, 'b': {'jpg': _image(), 'cls': '9' * 5000}}
  scan = _scan(tmp_path, samples, label_key='cls', classes=('dog', 'cat'), require_caption=False)
  assert [record.label for record in scan.records] == [1] and not scan.noted
  assert scan.skipped == [{'key': 'b', 'reason': 'bad label'}]


@pytest.mark.skipif('AVIF' not in images.FORMATS, reason='this Pillow has no AVIF')
def test_avif_members_are_images(tmp_path):
  scan = _scan(tmp_path, {'a': {'avif': _image(format='AVIF'), 'txt': 'x'}})
  assert [(r.key, r.type, r.width, r.height) for r in scan.records] == [('a', 'avif', 8, 6)]


def test_where_takes_values_and_tuples(tmp_path):
  samples = {
    str(i): {'jpg': _image(), 'txt': 'x', 'json': {'d': d} if d else {}}
    for i, d in enumerate(['a', 'b', 'c', 3, None])
  }
  assert _keys(_scan(tmp_path, samples, where={'d': 'a'})) == ['0']
  scan = _scan(tmp_path, samples, where={'d': ['a', 3]})
  assert _keys(scan) == ['0', '3'] and scan.left_out == 2
  assert scan.skipped == [{'key': '4', 'reason': 'no d'}]


def test_parts_are_by_group_and_cover_everything_once(tmp_path):
  samples = {
    f'n{i}': {'jpg': _image(), 'txt': 'x', 'json': {'s': f'dir/n{i // 3}-{i % 3}.png'}}
    for i in range(120)
  }
  rules = {'group_key': 's', 'group_pattern': r'/(n\d+)'}
  edges = ((0, 0.3), (0.3, 0.75), (0.75, 1))
  parts = [_scan(tmp_path, samples, part=part, **rules) for part in edges]
  assert sorted(key for part in parts for key in _keys(part)) == sorted(samples)
  groups = [{record.group for record in part.records} for part in parts]
  assert all(groups) and not groups[0] & groups[1] and not groups[1] & groups[2]
  for (lo, hi), names in zip(edges, groups, strict=True):
    for group in names:
      assert lo <= int(hashlib.sha256(group.encode()).hexdigest(), 16) / 2**256 < hi
  scan = _scan(tmp_path, {'a': {'jpg': _image(), 'txt': 'x'}}, **rules)
  assert scan.skipped == [{'key': 'a', 'reason': 'no s'}]


def test_group_pattern_takes_the_first_group_else_the_match_else_all(tmp_path):
  def group(pattern, text='photo/dog/n02_77-3.png'):
    samples = {'a': {'jpg': _image(), 'txt': 'x', 'json': {'s': text}}}
    return _scan(tmp_path, samples, group_key='s', group_pattern=pattern).records[0].group

  assert group('') == 'photo/dog/n02_77-3.png' and group(r'n\d+_\d+') == 'n02_77'
  assert group(r'(n\d+)_') == 'n02' and group('zebra') == 'photo/dog/n02_77-3.png'
  assert group('(zebra)?n') == 'n' and group('', 7) == '7'


def test_caption_edit_takes_its_share_by_key_alone(tmp_path):
  samples = {f'k{i}': {'jpg': _image(), 'txt': 'a photo of a dog'} for i in range(400)}
  edit = (r'a (photo|sketch) of ', '', 0.5)
  whole = {r.key: r.caption for r in _scan(tmp_path, samples, caption_edit=edit).records}
  assert set(whole.values()) == {'a dog', 'a photo of a dog'}
  assert 160 < sum(caption == 'a dog' for caption in whole.values()) < 240
  half = _scan(tmp_path, samples, caption_edit=edit, part=(0, 0.5)).records  # not the part's hash
  assert all(whole[r.key] == r.caption for r in half)
  assert 0.3 < np.mean([r.caption == 'a dog' for r in half]) < 0.7


@pytest.mark.parametrize(
  'rules',
  [
    {'group_pattern': '('},
    {'caption_edit': ('a(', '', 0.5)},
    {'caption_edit': ('a', r'\1', 0.5)},
    {'columns': ('key',)},
    {'labels_file': 'x.txt', 'label_key': 'label'},
  ],
)
def test_rules_that_cannot_be_followed_are_config_errors(tmp_path, rules):
  with pytest.raises(ConfigError):
    _scan(tmp_path, {}, **rules)


def test_the_first_caption_that_says_something_counts(tmp_path):
  samples = {
    'txt': {'jpg': _image(), 'txt': 'one', 'json': {'caption': 'two'}},
    'blank': {'jpg': _image(), 'txt': ' ', 'json': {'caption': '', 'text': 'three'}},
    'number': {'jpg': _image(), 'json': {'caption': 5, 'text': 'four'}},
    'none': {'jpg': _image(), 'json': {'caption': None}},
  }
  captions = lambda **rules: {r.key: r.caption for r in _scan(tmp_path, samples, **rules).records}
  assert captions() == {'txt': 'one', 'blank': 'three', 'number': 'four'}
  assert captions(caption_key='json:caption; txt ;') == {'txt': 'two'}
  assert captions(caption_key='txt') == {'txt': 'one'}


def test_the_type_of_an_image_is_that_of_its_bytes(tmp_path):
  scan = _scan(
    tmp_path,
    {
      'a': {'jpg': _image(format='PNG'), 'txt': 'x'},
      'b': {'png': _image(format='JPEG'), 'txt': 'x'},
      'c': {'webp': _image(format='WEBP'), 'txt': 'x'},
      'd': {'jpg': b'garbage', 'txt': 'x'},
    },
  )
  assert [record.type for record in scan.records] == ['png', 'jpeg', 'webp', '']


def _parquet(tmp_path, data, **rules):
  n = len(next(iter(data.values())))
  pq.write_table(
    pa.table({'jpg': pa.array([_image()] * n, pa.binary()), **data}), tmp_path / 'x.parquet'
  )
  (file,) = listing.list_files('parquet', str(tmp_path / 'x.parquet'))
  return sources.scan('parquet', file, **rules)


def test_columns_of_a_file_count_as_fields(tmp_path):
  data = {
    'uid': list('abcd'),
    'text': ['x', 'y', None, 'z'],
    'd': ['p', 'q', 'p', None],
    'n': [0, 1, 1, -1],
    's': [{'a': [1]}] * 4,
  }
  scan = _parquet(
    tmp_path, data, where={'d': 'p'}, label_key='n', columns=('s', 'n'), group_key='json:d'
  )
  (record,) = scan.records
  assert (record.key, record.caption, record.label, record.group) == ('a', 'x', 0, 'p')
  assert record.columns == {'s': {'a': [1]}, 'n': 0} and (record.offset, record.length) == (
    0,
    len(_image()),
  )
  assert (record.type, record.width, record.height) == ('png', 8, 6)
  assert (
    scan.skipped == [{'key': 'c', 'reason': 'no caption'}, {'key': 'd', 'reason': 'no d'}]
    and scan.left_out == 1
  )
  assert _keys(_parquet(tmp_path, data, sample_key='d;uid')) == ['p', 'q', 'x/000000003']
  assert [
    r.label
    for r in _parquet(
      tmp_path, data, label_key='d', classes=('q', 'p'), caption_template='a {}'
    ).records
  ] == [1, 0, 1]


def test_nan_is_no_value_and_whole_floats_are_labels(tmp_path):
  data = {'key': list('abcde'), 'txt': ['x'] * 5, 'n': [1.0, float('nan'), None, 0.5, float('inf')]}
  scan = _parquet(tmp_path, data, label_key='n', columns=('n',), classes=('cat', 'dog'))
  assert [(r.key, r.label, r.columns['n']) for r in scan.records] == [
    ('a', 1, 1.0),
    ('b', -1, None),
    ('c', -1, None),
  ]
  assert scan.skipped == [{'key': key, 'reason': 'bad label'} for key in 'de']
  scan = _parquet(tmp_path, data, where={'n': (1, 0.5)}, group_key='n')
  assert [(r.key, r.group) for r in scan.records] == [
    ('a', '1.0'),
    ('d', '0.5'),
  ] and scan.left_out == 1
  assert scan.skipped == [{'key': key, 'reason': 'no n'} for key in 'bc']


def test_of_a_list_of_captions_the_first_that_says_something_counts(tmp_path):
  data = {'txt': [['a', 'b'], ['', ' c '], [], None, [None, 'd']], 'text': ['e'] * 5}
  assert [r.caption for r in _parquet(tmp_path, data).records] == ['a', 'c', 'e', 'e', 'd']


def test_a_json_column_is_read_only_where_a_key_asks_for_it(tmp_path):
  data = {
    'key': list('abc'),
    'caption': list('xyz'),
    'json': ['{"caption": "j", "n": 1}', '[1]', None],
  }
  assert [r.caption for r in _parquet(tmp_path, data).records] == ['x', 'y', 'z']
  scan = _parquet(tmp_path, data, caption_key='json:caption', columns=('json:n',))
  assert [(r.key, r.caption, r.columns) for r in scan.records] == [
    ('a', 'j', {'json:n': 1}),
    ('c', 'z', {'json:n': None}),
  ]
  assert scan.skipped == [{'key': 'b', 'reason': 'bad json'}]
  struct = _parquet(tmp_path, {'json': [{'caption': 'j'}, None]}, caption_key='json:caption')
  assert [r.caption for r in struct.records] == ['j'] and len(struct.skipped) == 1


def test_a_file_that_fails_while_it_is_read_is_an_error_that_says_so(tmp_path, monkeypatch):
  def samples(*_):
    raise OSError(5, 'Input/output error')
    yield

  form = dataclasses.replace(
    formats.FORMATS['parquet'], samples=lambda *given: (samples(*given), [])
  )
  monkeypatch.setitem(formats.FORMATS, 'parquet', form)
  with pytest.raises(InputError, match='cannot be read: .*Input/output error'):
    _parquet(tmp_path, {'txt': ['a']})


def test_class_names_that_a_file_tells_are_found(tmp_path):
  said = json.dumps({'info': {'features': {'n': {'names': ['cat', 'dog']}}}})
  table = pa.table({'n': [0]}).replace_schema_metadata({'huggingface': said})
  pq.write_table(table, tmp_path / 'x.parquet')
  assert sources.classes('parquet', str(tmp_path / 'x.parquet'), 'n') == ('cat', 'dog')
  assert sources.classes('parquet', str(tmp_path / 'x.parquet'), '') == ()
  assert sources.classes('webdataset', str(tmp_path / 'x.tar'), 'n') == ()


def test_pacs_sketches_share_the_group_of_their_photo():
  if not os.path.isdir(PACS):
    pytest.skip('the PACS files lie beside the repository only where it is developed')
  files = listing.list_files('webdataset', PACS)
  assert len(files) == 12
  rules = {'group_key': 'source', 'group_pattern': r'n\d{8}_\d+', 'label_key': 'label'}
  photos, sketches = (
    [
      record
      for file in files
      if domain in file.name
      for record in sources.scan('webdataset', file, where={'domain': domain}, **rules).records
    ]
    for domain in ('photo', 'sketch')
  )
  assert len(photos) == 1670 and len(sketches) == 3929
  assert len({r.group for r in sketches}) == 1140
  assert len({r.group for r in sketches} & {r.group for r in photos}) == 434
  assert {(r.width, r.height) for r in photos} == {(96, 96)}
  assert {r.label for r in photos} == set(range(7))
