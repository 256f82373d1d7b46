import json

import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import labels_file

IMAGES = ('a,b.jpg', 'c.jpg', 'my dog.jpg', 'sub/1.png', 'sub/2.png', 'x/1.png')
ROOT = '/data/val'


def _read(tmp_path, text, images=IMAGES):
  (tmp_path / 'file').write_bytes(text if isinstance(text, bytes) else text.encode())
  return labels_file.read(str(tmp_path / 'file'), ROOT, list(images))


@pytest.mark.parametrize(
  ('text', 'classes'),
  [
    ('my dog.jpg n01\nsub/2 4', {'my dog.jpg': 'n01', 'sub/2.png': '4'}),
    ('"a,b.jpg",n02\nmy dog.jpg,n 1', {'a,b.jpg': 'n02', 'my dog.jpg': 'n 1'}),
    (
      'c.jpg great white shark, or so\nx/1 \t dog',
      {'c.jpg': 'great white shark, or so', 'x/1.png': 'dog'},
    ),
    ('val/sub/1.png\tn03\na,b.jpg\tn 4', {'sub/1.png': 'n03', 'a,b.jpg': 'n 4'}),
  ],
)
def test_names_with_spaces_commas_and_folders(tmp_path, text, classes):
  truth = _read(tmp_path, text)
  assert truth.classes == classes and not truth.in_order
  assert truth.everything == frozenset(truth.classes.values())


def test_lines_that_are_separated_otherwise_are_refused(tmp_path):
  for text in ('c.jpg n01\nx/1 n02\n"a,b.jpg",n02', 'c.jpg great shark\nx/1 n01\nmy dog.jpg n02'):
    with pytest.raises(InputError, match='has the line .*separator'):
      _read(tmp_path, text)


def test_a_name_that_means_two_images_is_refused_and_a_path_is_not(tmp_path):
  assert _read(tmp_path, 'x/1.png a\nsub/1.png b\n2.png c').classes == {
    'x/1.png': 'a',
    'sub/1.png': 'b',
    'sub/2.png': 'c',
  }
  for name in ('1.png', '1'):
    with pytest.raises(InputError, match=f"'{name}', .*more than one image"):
      _read(tmp_path, f'{name} a\n2.png c')


def test_contradictions_are_refused(tmp_path):
  assert _read(tmp_path, 'c.jpg a\nc a').classes == {'c.jpg': 'a'}
  for text in ('c.jpg a\nc b', '{"c.jpg": "a", "c": "b"}', '{"c": "a", "c": "b"}'):
    with pytest.raises(InputError, match="'c.jpg' two classes, 'a' and 'b'"):
      _read(tmp_path, text)


def test_names_are_never_opened_and_never_reach_outside(tmp_path):
  lines = [
    '../secret.jpg n03',
    '/etc/passwd n03',
    '../val/../c.jpg n03',
    'x' * 200_000 + ',n03',
    '"',
    ',',
    '\x00 n03',
    'sub/../c.jpg n02',
  ]
  assert _read(tmp_path, '\n'.join(lines)).classes == {'c.jpg': 'n02'}
  assert _read(tmp_path, json.dumps({'../c.jpg': 'n03', '': 'n04', 'c': 'n01'})).classes == {
    'c.jpg': 'n01'
  }


def test_lines_of_other_images_are_split_as_most_are_and_headings_left_out(tmp_path):
  truth = _read(
    tmp_path, 'name,class\nc.jpg,a b\nmy dog.jpg,d\nelse.jpg,e f\nnothing here\nsub/1.png,g'
  )
  assert truth.classes == {'c.jpg': 'a b', 'my dog.jpg': 'd', 'sub/1.png': 'g'}
  assert truth.everything == {'a b', 'd', 'g', 'e f'}
  truth = _read(
    tmp_path, 'ImageId,PredictionString\r\nc,n02 1 2 3 4 n05 1 2 3 4 \r\nother_7,n01 9 9 9 9 \r\n'
  )
  assert (truth.classes, truth.everything) == ({'c.jpg': 'n02'}, {'n01', 'n02'})


def test_one_class_a_line_is_for_exactly_all_images_in_a_clear_order(tmp_path):
  truth = _read(tmp_path, '# six\n\na\r\nb\re d\nd\n\ne\nf\n')
  assert truth.in_order and truth.classes == dict(
    zip(IMAGES, ('a', 'b', 'e d', 'd', 'e', 'f'), strict=True)
  )
  with pytest.raises(InputError, match='has 5 lines for 6 images'):
    _read(tmp_path, 'a\nb\nc\nd\ne')
  with pytest.raises(InputError, match="'c.jpg', an image without a class"):
    _read(tmp_path, 'a\nb\nc.jpg\nd\ne\nf')
  with pytest.raises(InputError, match='the order of the images is ambiguous'):
    _read(tmp_path, 'a\nb', ('10.png', '9.png'))


def test_a_file_that_is_no_text_too_large_or_gone_is_a_sentence(tmp_path, monkeypatch):
  for data in (b'\xff\xfe', 'c.jpg é'.encode('latin-1')):
    with pytest.raises(InputError, match='not UTF-8'):
      _read(tmp_path, data)
  with pytest.raises(InputError, match='cannot be read'):
    labels_file.read(str(tmp_path), ROOT, IMAGES)
  (tmp_path / 'list.json').write_text('[1]')
  with pytest.raises(InputError, match='not a JSON object'):
    labels_file.json_pairs(str(tmp_path / 'list.json'))
  monkeypatch.setattr(labels_file, '_MOST_BYTES', 9)
  with pytest.raises(InputError, match='MB, too large'):
    _read(tmp_path, 'c.jpg a\nx b')
