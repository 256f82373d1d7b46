"""data/captions_file.py: the forms of COCO, Karpathy and Flickr, and files of no such form."""

import json

import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import captions_file


def folder(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b'x')
  return str(root)


def read(tmp_path, text, *names, splits=()):
  """Returns image -> captions, and the missing names, for a file with a text."""
  path = tmp_path / 'captions'
  path.write_text(text, encoding='utf-8')
  root = folder(tmp_path / 'images', *(names or ('a.jpg', 'b.jpg')))
  found = captions_file.read(str(path), root, splits)
  return {image: list(entry.captions) for image, entry in found.entries.items()}, found.missing


def karpathy(**splits_of_names):
  return json.dumps(
    {
      'images': [
        {
          'filename': f'{name}.jpg',
          'filepath': 'val2014',
          'split': split,
          'sentences': [{'raw': f'{name} {i}'} for i in range(5)],
        }
        for split, names in splits_of_names.items()
        for name in names
      ]
    }
  )


def test_karpathy_needs_a_split(tmp_path):
  text = karpathy(test='ab', train='c')
  with pytest.raises(InputError, match=r'splits test, train.*where=dict\(split='):
    read(tmp_path, text)
  found, missing = read(tmp_path, text, splits=('test',))
  assert found == {f'{n}.jpg': [f'{n} {i}' for i in range(5)] for n in 'ab'} and not missing
  assert read(tmp_path, text, splits=('train',)) == ({}, ['val2014/c.jpg'])
  assert len(read(tmp_path, karpathy(test='ab'))[0]) == 2  # one split needs no choice
  with pytest.raises(InputError, match='no captions of the split test; it has: no splits'):
    read(tmp_path, 'a.jpg,x', splits=('test',))


def test_names_match_by_their_folder_if_two_images_share_one(tmp_path):
  names = ('train2014/a.jpg', 'val2014/a.jpg', 'train2014/xval2014/b.jpg')
  assert list(read(tmp_path, karpathy(test='a'), *names)[0]) == ['val2014/a.jpg']
  assert list(read(tmp_path, karpathy(test='b'), *names)[0]) == ['train2014/xval2014/b.jpg']
  with pytest.raises(InputError, match=r"'a\.jpg', which matches several images"):
    read(tmp_path, 'a.jpg#0\tx', *names)


def test_coco(tmp_path):
  text = json.dumps(
    {
      'images': [{'id': 7, 'file_name': 'b.jpg'}, {'id': 8, 'file_name': 'a.jpg'}],
      'annotations': [
        {'image_id': 7, 'caption': 'one\n'},
        {'image_id': 7, 'caption': 'two'},
      ],
    }
  )
  assert read(tmp_path, text) == ({'b.jpg': ['one\n', 'two'], 'a.jpg': []}, [])
  with pytest.raises(InputError, match='KeyError 9'):
    read(tmp_path, text.replace('"image_id": 7', '"image_id": 9'))


@pytest.mark.parametrize(
  'text',
  [
    'a.jpg#0\tone, two\na.jpg#1\tthree\n\nb.jpg#0\tfour',
    'image,caption\na.jpg,one, two\na.jpg,three\nb.jpg,four\n',
    'image,caption\r\na.jpg,"one, two"\r\na.jpg,three\r\nb.jpg,four\r\n',
    'image_name| comment_number| comment\na.jpg| 0| one, two\na.jpg| 1| three\nb.jpg| 0| four',
    'a.jpg\tone, two\na.jpg\tthree\nb.jpg\tfour\n',
  ],
)
def test_lines_of_name_and_caption(tmp_path, text):
  assert read(tmp_path, text)[0] == {'a.jpg': ['one, two', 'three'], 'b.jpg': ['four']}


def test_captions_keep_quotation_marks_and_empty_ones_count(tmp_path):
  text = 'a.jpg#0\t"Stop" it says\na.jpg#1\t\nb.jpg,"a ""big"" dog"\n'
  assert read(tmp_path, text)[0] == {'a.jpg': ['"Stop" it says', ''], 'b.jpg': ['a "big" dog']}


def test_images_that_the_folder_lacks_are_listed(tmp_path):
  assert read(tmp_path, 'a.jpg,x\nz.jpg,y\n') == ({'a.jpg': ['x']}, ['z.jpg'])


@pytest.mark.parametrize(
  'text, message',
  [
    ('{"images": [', 'is not valid JSON'),
    ('{"images": [{"name": "a"}]}', "KeyError 'filename'"),
    ('{"a.jpg": "x"}', "KeyError 'images'"),
    ('{"images": 3}', 'has neither the form'),
    ('a.jpg,x\nnothing here\n', "the line 'nothing here'"),
    ('{"images": [{"filename": "a.jpg", "sentences": [{"raw": 3}]}]}', 'not a text'),
  ],
)
def test_other_forms_are_errors(tmp_path, text, message):
  with pytest.raises(InputError, match=message):
    read(tmp_path, text)


def test_a_file_that_is_not_utf8_or_not_there(tmp_path):
  (tmp_path / 'x').write_bytes(b'a.jpg,\xff\n')
  with pytest.raises(InputError, match='not UTF-8'):
    captions_file.read(str(tmp_path / 'x'), folder(tmp_path / 'images', 'a.jpg'))
  with pytest.raises(InputError, match='cannot be read'):
    captions_file.read(str(tmp_path / 'y'), str(tmp_path / 'images'))


def test_an_image_that_is_listed_twice(tmp_path):
  with pytest.raises(InputError, match='lists the image .*twice'):
    read(tmp_path, karpathy(test='aa'))
