import io
import json
import os

import numpy as np
from PIL import Image
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import folder
from clip_jax.data import listing
from clip_jax.data import sources


def _image(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  out = io.BytesIO()
  Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(out, 'PNG')
  path.write_bytes(out.getvalue())


def _scan(root, **rules):
  files = listing.list_files('folder', str(root))
  return sources.scan('folder', files, root=listing.root('folder', str(root)), **rules)


def _labels(root, **rules):
  return {r.path: r.label for r in _scan(root, require_caption=False, **rules).records}


def test_every_image_is_a_sample_in_natural_order(tmp_path):
  for name in ('dog/10.png', 'dog/9.PNG', 'cat/sub/1.jpeg', 'dog/a.t', '.no/1.png', 'cat/._1.png'):
    _image(tmp_path / name)
  scan = _scan(tmp_path, caption_template='a {}')
  assert [r.key for r in scan.records] == ['cat/sub/1.jpeg', 'dog/9.PNG', 'dog/10.png']
  assert [r.caption for r in scan.records] == ['a cat', 'a dog', 'a dog']
  assert all((r.offset, r.width, r.height) == (0, 6, 4) for r in scan.records)
  assert all(r.length == os.path.getsize(tmp_path / r.path) for r in scan.records)


def test_labels_are_class_places_numbers_or_ranks(tmp_path):
  for name in ('n02', 'n01', 'n10', 'empty_has_no_rank/.x'):
    _image(tmp_path / 'wnid' / name / 'a.png')
  for name in ('0', '2', '10'):
    _image(tmp_path / 'number' / name / 'a.png')
  ranks = {'n01/a.png': 0, 'n02/a.png': 1, 'n10/a.png': 2}
  assert _labels(tmp_path / 'wnid') == _labels(tmp_path / 'wnid', classes=('x', 'y', 'z')) == ranks
  assert _labels(tmp_path / 'wnid', classes=('n10', 'n02', 'n01')) == {
      'n01/a.png': 2, 'n02/a.png': 1, 'n10/a.png': 0}
  assert _labels(tmp_path / 'number') == {'0/a.png': 0, '2/a.png': 2, '10/a.png': 10}
  assert sources.folder_classes(str(tmp_path / 'wnid')) == ('n01', 'n02', 'n10')
  assert sources.folder_classes(str(tmp_path / 'number')) == tuple(map(str, range(11)))
  for kind in ('wnid', 'number'):  # the class names found there give the same labels
    assert _labels(tmp_path / kind) == _labels(
        tmp_path / kind, classes=sources.folder_classes(str(tmp_path / kind)))
  assert list(_labels(tmp_path).values()) == [0, 0, 0, 1, 1, 1]
  assert _labels(tmp_path / 'wnid' / 'n01') == {'a.png': -1}


def test_labels_that_cannot_be_told_are_never_guessed(tmp_path):
  for name in ('n01', 'n02'):
    _image(tmp_path / name / 'a.png')
  with pytest.raises(InputError, match='None of 1000 classes'):
    _labels(tmp_path, classes=[f'class {i}' for i in range(1000)])
  scan = _scan(tmp_path, classes=('n02', 'other'), require_caption=False)
  assert [r.label for r in scan.records] == [0]
  assert scan.skipped == [{'key': 'n01/a.png', 'reason': 'bad label'}]
  assert folder.label('7', ('0', '7'), ()) == 7 and folder.label('20240101', ('20240101',), ()) == 0


def test_files_beside_an_image_belong_to_it(tmp_path):
  _image(tmp_path / '00000' / '000000001.png')
  (tmp_path / '00000' / '000000001.txt').write_text('a caption')
  (tmp_path / '00000' / '000000001.json').write_text(json.dumps({'domain': 'web', 'label': 3}))
  _image(tmp_path / '00000' / '000000002.png')
  scan = _scan(tmp_path, label_key='label', columns=('domain', 'folder'))
  assert scan.skipped == [{'key': '00000/000000002.png', 'reason': 'no caption'}]
  record, = scan.records
  assert (record.caption, record.label) == ('a caption', 3)
  assert record.columns == {'domain': 'web', 'folder': '00000'}
  assert len(_scan(tmp_path, where={'domain': 'web'}).records) == 1


def test_links_to_a_folder_above_end_and_names_that_are_no_text_are_listed(tmp_path):
  _image(tmp_path / 'a' / '1.png')
  os.symlink(tmp_path, tmp_path / 'a' / 'loop')
  os.symlink(tmp_path / 'a' / '1.png', tmp_path / 'a' / '2.png')
  odd = os.fsencode(tmp_path / 'a') + b'/\xff.png'
  os.link(tmp_path / 'a' / '1.png', odd)
  scan = _scan(tmp_path, require_caption=False)
  assert [r.path for r in scan.records] == ['a/1.png', 'a/2.png']
  assert scan.skipped == [{'key': 'a/\\xff.png', 'reason': 'name is not UTF-8'}]
